"""What the Triton kernels of deformable attention have in common: the walk over corners, as text.

A program holds QUERIES x HEADS rows of one batch entry, a row being a query of a head, and walks
over the points of all levels, then over the corners of a point. A location is brought to the edge
of the grid before it becomes an integer, so that NaN, infinity and numbers beyond 2**31 are safe;
what lies outside is read as 0. Offsets are those within the batch entry, of 32 bits where they
reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.kernels.deformable.sampling import Sampling
from attnopt.kernels.triton.functions import texts

AXES = ("x", "y", "z")
LAYER = "layer"
#: a coordinate in texels of a location, and its derivative, by range and align_corners
_COORDINATES = {
    ("unit", False): ("at * size - 0.5", "size"),
    ("unit", True): ("at * (size - 1)", "size - 1"),
    ("signed", False): ("(at + 1.0) * 0.5 * size - 0.5", "size * 0.5"),
    ("signed", True): ("(at + 1.0) * 0.5 * (size - 1)", "(size - 1) * 0.5"),
    ("texels", False): ("at", "1.0"), ("texels", True): ("at", "1.0")}


_BORDER = "tl.where(x > 0.0, tl.where(x < size - 1.0, x, size - 1.0), 0.0)"
#: where a coordinate is used, and why, by padding
_NEAR = {
    "zeros": ("tl.where(x > -2.0, tl.where(x < size + 1.0, x, size + 1.0), -2.0)",
              "just outside of the grid where it lies farther out or is NaN"),
    "border": (_BORDER, "the border's where it lies beyond; NaN is the first texel"),
    "reflection": (_BORDER, "reflected where it lies beyond; NaN is the first texel")}
_INNER = "tl.where((x > 0.0) & (x < size - 1.0), {}, 0.0)"
_REFLECTION = '''
@triton.jit
def reflected(x, size):
    """A coordinate, sent to and fro between the first and the last place, and -1 where it then
    moves the other way; NaN where these are one place, or x is not finite."""
    far = x - {first}
    turns = tl.floor(tl.abs(far) / {length})
    rest = tl.abs(far) - turns * {length}
    odd = turns - 2.0 * tl.floor(turns * 0.5) == 1.0
    direction = tl.where(odd != (far < 0.0), -1.0, 1.0)
    return tl.where(odd, {length} - rest, rest) + {first}, direction

'''


@dataclass(frozen=True)
class Form:
    """What of a call is in the text of its kernels.

    depth: there is one; lost: a location that is not finite gives NaN; wide: offsets need 64 bits;
    wanted: names of the tensors whose gradients the backward kernel makes
    """

    axes: int
    linear: bool
    padding: str
    range: str
    align_corners: bool
    lost: bool = False
    depth: bool = False
    wide: bool = False
    wanted: tuple[str, ...] = ()

    @classmethod
    def of(cls, sampling: Sampling, depth: bool, wide: bool = False,
           wanted: tuple[str, ...] = ()) -> Form:
        linear, zeros = sampling.mode == "linear", sampling.padding == "zeros"
        return cls(sampling.axes, linear, sampling.padding, sampling.range, sampling.align_corners,
                   sampling.not_finite == "nan" and linear and zeros, depth, wide, wanted)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the axes of a location."""
        return (*AXES[:self.axes], *([LAYER] if self.depth else []))

    @property
    def corners(self) -> int:
        return 2 ** self.axes if self.linear else 1


def known(sampling: Sampling) -> bool:
    """Whether the text can say what a Sampling means."""
    return (sampling.mode in ("linear", "nearest") and sampling.padding in _NEAR
            and (sampling.range, sampling.align_corners) in _COORDINATES)


def functions(form: Form) -> str:
    """The functions that the kernels call."""
    coordinate, slope = _COORDINATES[form.range, form.align_corners]
    inner, why = _NEAR[form.padding]
    first = "x, _ = reflected(x, size)\n    " if form.padding == "reflection" else ""
    found = f'''
@triton.jit
def read(place, mask):
    """Numbers as float32; 0 beyond the mask."""
    return tl.cast(tl.load(place, mask=mask, other=0.0), tl.float32)


@triton.jit
def within(texel, size):
    """Whether there is such a texel, or layer, along an axis."""
    return (texel >= 0) & (texel < size)


@triton.jit
def coordinate(at, size):
    """A location in texels, 0 the centre of the first."""
    return {coordinate}


@triton.jit
def near(x, size):
    """A coordinate, {why}."""
    {first}return {inner}
'''
    if form.lost:
        found += '''

@triton.jit
def is_finite(x):
    """Not NaN, and not infinite."""
    return x - x == 0.0
'''
    if form.padding == "reflection":
        ends = ("0.0", "(size - 1)") if form.align_corners else ("-0.5", "size")
        found = _REFLECTION.format(first=ends[0], length=ends[1]) + found
    if "locations" in form.wanted:
        lines = [f"return {slope}"]
        if form.padding == "reflection":
            lines = ["x, direction = reflected(x, size)",
                     f"return {_INNER.format(slope)} * direction"]
        elif form.padding == "border":
            lines = [f"return {_INNER.format(slope)}"]
        text = "\n    ".join(lines)
        found += f'''

@triton.jit
def slope(x, size):
    """The derivative of a coordinate x, as it is used, by its location."""
    {text}
'''
    return found + ("" if form.linear else texts(["round_half_even"]))


def start(form: Form) -> list[str]:
    """Who a program is; pointers to its batch entry, offsets within it."""
    rank = len(form.names)
    lines = [
        "query_blocks = tl.cdiv(queries, QUERIES)",
        "head_blocks = tl.cdiv(heads, HEADS)",
        "program = tl.program_id(0)",
        "batch = tl.cast(program // (head_blocks * query_blocks), tl.int64)",
        "number = tl.arange(0, QUERIES * HEADS)",
        "query = program // head_blocks % query_blocks * QUERIES + number // HEADS",
        "head = program % head_blocks * HEADS + number % HEADS",
        "real = (query < queries) & (head < heads)",
        *(["query = tl.cast(query, tl.int64)", "head = tl.cast(head, tl.int64)"]
          if form.wide else []),
        "row = query * heads + head",
        "channel = tl.arange(0, PADDED)[None, :]",
        "before = batch * queries * heads",
        f"locations_here = locations + before * points * {rank}",
        "weights_here = weights + before * points",
        "value_here = value + batch * value_batch * UNIT"]
    if form.depth:
        lines.append("depth_here = depth + batch * depth_batch")
    return lines


def levels(form: Form, body: list[str]) -> list[str]:
    """The loops over levels and points."""
    sizes = [f"size_{a}" for a in AXES[:form.axes]]
    count = form.axes + 3
    loads = [f"{name} = tl.load(level_here + {i})" for i, name in enumerate(
        [*sizes, "first_texel", "first_point", "last_point"])]
    if form.depth:
        loads.append(f"size_{LAYER} = layers")
    return ["for level in tl.range(0, level_count):",
            *_in([f"level_here = levels + level * {count}", *loads,
                  "for point in tl.range(first_point, last_point):", *_in(body)])]


def point_of(form: Form) -> list[str]:
    """Weight, coordinates, texels and shares of a point."""
    rank = len(form.names)
    lines = ["spot = row * points + point", "weight = read(weights_here + spot, real)"]
    for i, a in enumerate(form.names):
        place = f"locations_here + (spot * {rank}" + (f" + {i})" if i else ")")
        lines += [f"raw_{a} = coordinate(read({place}, real), size_{a})",
                  f"{a} = near(raw_{a}, size_{a})"]
        if form.linear:
            lines += [f"floor_{a} = tl.floor({a})", f"low_{a} = tl.cast(floor_{a}, tl.int32)",
                      f"far_{a} = {a} - floor_{a}"]
        else:
            lines.append(f"low_{a} = tl.cast(round_half_even({a}), tl.int32)")
    if form.lost:
        lines += _wrapped("finite = ", [f"is_finite(raw_{a})" for a in form.names], " & ")
    if form.depth:
        lines.append(f"has_low = {_within(f'low_{LAYER}', f'size_{LAYER}')}")
        if form.linear:
            lines.append(f"has_high = {_within(f'low_{LAYER} + 1', f'size_{LAYER}')}")
    return lines


def corners_of(form: Form, body: list[str]) -> list[str]:
    """The corners of a point: texel, whether it exists, share; then `body`."""
    names = AXES[:form.axes]
    lines: list[str] = []
    inside = ["real"]
    for i, a in enumerate(names):
        side = side_of(i)
        lines.append(f"texel_{a} = low_{a}" + (f" + {side}" if form.linear else ""))
        inside.append(_within(f"texel_{a}", f"size_{a}"))
        if form.linear:
            lines.append(f"part_{a} = far_{a} if {side} == 1 else 1.0 - far_{a}")
    if form.depth:
        inside.append("(has_low | has_high)" if form.linear else "has_low")
    lines += _wrapped("inside = ", inside, " & ")
    texel = f"texel_{names[-1]}"
    for a in reversed(names[:-1]):
        texel = f"({texel}) * size_{a} + texel_{a}" if " " in texel else (
            f"{texel} * size_{a} + texel_{a}")
    texel = f"first_texel + {texel}"
    lines.append(f"texel = {texel}")
    if form.wide:
        lines.append("texel = tl.cast(texel, tl.int64)")
    if form.linear:
        lines.append("part = " + " * ".join(f"part_{a}" for a in names))
    lines.append("mask = inside[:, None] if C == PADDED else inside[:, None] & (channel < C)")
    lines += _depth(form) + body
    if form.linear:
        return [f"for corner in tl.static_range({form.corners}):", *_in(lines)]
    return lines


def _depth(form: Form) -> list[str]:
    """The depth of a corner's texel, between two layers."""
    if not form.depth:
        return []
    lines = [f"cell = texel * depth_texel + head * depth_head + low_{LAYER}",
             "lower = read(depth_here + cell, inside & has_low)"]
    if not form.linear:
        return [*lines, "score = lower"]
    return [*lines,
            "upper = read(depth_here + cell + 1, inside & has_high)",
            f"score = lower * (1.0 - far_{LAYER}) + upper * far_{LAYER}"]


def scaled(form: Form, of: str) -> str:
    """A number times the share and the depth of a corner; outside, its texel is read as 0."""
    return " * ".join([of, *(["part"] if form.linear else []), *(["score"] if form.depth else [])])


def value_rows() -> list[str]:
    """Channels of a corner, of all rows."""
    return ["place = (texel * value_texel + head * value_head) * UNIT",
            "rows = read(value_here + (place[:, None] + channel), mask)"]


def side_of(axis: int) -> str:
    """Of a corner along an axis: 0 or 1."""
    return "corner % 2" if axis == 0 else f"corner // {2 ** axis} % 2"


def _within(texel: str, size: str) -> str:
    return f"within({texel}, {size})"


def _wrapped(start: str, parts: list[str], sign: str) -> list[str]:
    """A statement over two lines, half of the parts on each."""
    if len(parts) < 4:
        return [start + sign.join(parts)]
    half = len(parts) // 2
    return [f"{start}({sign.join(parts[:half])}{sign.rstrip()}",
            " " * (len(start) + 1) + sign.join(parts[half:]) + ")"]


def _in(lines: list[str]) -> list[str]:
    return ["    " + line for line in lines]
