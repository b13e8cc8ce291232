"""The generated C++ of deformable attention: one pass over the points, nothing held but the result;
and its gradients by another such pass.

For values on a CPU. Everything is computed in float32, or in float64 where a tensor has it.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnopt.errors import AttnOptError
from attnopt.kernels.cpp.attention import warn_once
from attnopt.kernels.cpp.isa import Isa, isa
from attnopt.kernels.cpp.template import vectors
from attnopt.kernels.cpp.toolchain import compile_all, load, toolchain
from attnopt.kernels.deformable.corners import result_dtype, working_dtype
from attnopt.kernels.deformable.sampling import MODES, PADDINGS, RANGES, Sampling

ELEMENTS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16",
            torch.float64: "double"}
#: channels of a head that a kernel is made for, and texels of a batch entry
MOST_CHANNELS, MOST_TEXELS = 1024, 2**30
#: bytes of gradients of a depth that heads share, up to which each head has one of its own
MOST_APART = 64 << 20
#: the table of levels is a multiple of so many points long
GROUP = 16


def takes(value: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels compute these tensors."""
    return (value.device.type == "cpu" and value.dtype in ELEMENTS
            and all(t is None or t.dtype in ELEMENTS for t in others)
            and 0 < value.shape[-1] <= MOST_CHANNELS
            and value.shape[1] < MOST_TEXELS and not toolchain().why_not())


def gather(sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
           depth: Tensor | None, shapes: Sequence[int]) -> Tensor | None:
    """(B, Q, H, C), or None where the kernel does not take the tensors or cannot be compiled."""
    if not takes(value, locations, weights, depth):
        return None
    call = _Call(sampling, value, locations, weights, depth, shapes)
    out = torch.empty(*weights.shape[:3], value.shape[-1], dtype=call.dtype, device="cpu")
    if not call.run("gather", out, []):
        return None
    return out.to(result_dtype(value, weights))


def gradients(sampling: Sampling, tensors: Sequence[Tensor | None], wanted: Sequence[int],
              grad: Tensor, shapes: Sequence[int]) -> dict[int, Tensor] | None:
    """Gradients by number of the tensor, of the numbers in `wanted`, where the gradient of the
    result is `grad`; None as for `gather`.

    tensors: value, locations, weights, depth
    """
    value, locations, weights, depth = tensors
    assert value is not None and locations is not None and weights is not None
    if not takes(value, locations, weights, depth, grad):
        return None
    call = _Call(sampling, value, locations, weights, depth, shapes)
    grad = grad.to(call.dtype).contiguous()
    heads, apart = value.shape[2], False
    made: dict[int, Tensor] = {}
    for i in wanted:
        given = tensors[i]
        assert given is not None
        size = given.shape
        if i == 3 and given.shape[2] == 1 and heads > 1:
            apart = heads * given.numel() * call.dtype.itemsize <= MOST_APART
            size = torch.Size([heads, *given.shape]) if apart else size
        new = torch.zeros if i in (0, 3) else torch.empty
        made[i] = new(size, dtype=call.dtype, device="cpu")
    pointers = [grad.data_ptr(), *(made[i].data_ptr() if i in made else 0 for i in range(4))]
    if not call.run("scatter", None, [*pointers, int(apart)]):
        return None
    if apart:
        made[3] = made[3].sum(0)
    return {i: t.to(like.dtype) for i, t in made.items() if (like := tensors[i]) is not None}


class _Call:
    """The tensors of one call as the kernels want them."""

    def __init__(self, sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
                 depth: Tensor | None, shapes: Sequence[int]) -> None:
        self.dtype = working_dtype(value, locations, weights, depth)
        value = value if value.stride(-1) == 1 else value.contiguous()
        self.value = value.to(torch.float64) if self.dtype == torch.float64 else value
        self.at, self.weight = (t.to(self.dtype).contiguous() for t in (locations, weights))
        self.deep = None if depth is None else depth.to(self.dtype).contiguous()
        self.sampling, self.shapes = sampling, tuple(shapes)

    def run(self, name: str, out: Tensor | None, more: Sequence[int]) -> bool:
        """Whether there is such a kernel; if so, it has written what it computes."""
        value, deep = self.value, self.deep
        kernel = _kernel(name, self.sampling, value.dtype, value.shape[-1], deep is not None,
                         isa())
        if kernel is None:
            return False
        layers, depth_heads = (0, 1) if deep is None else (deep.shape[-1], deep.shape[2])
        level = _level(self.sampling, self.shapes, None if deep is None else layers)
        b, queries, h, points = self.weight.shape
        words = array("q", [
            torch.get_num_threads(), b, queries, h, points, layers, depth_heads, value.shape[1],
            value.data_ptr(), value.stride(0), value.stride(1), value.stride(2),
            self.at.data_ptr(), self.weight.data_ptr(), 0 if deep is None else deep.data_ptr(),
            0 if out is None else out.data_ptr(), level.data_ptr(), level.shape[1],
            *(more or [0] * 6)])
        kernel(words.buffer_info()[0])
        return True


@functools.lru_cache(maxsize=256)
def _level(sampling: Sampling, shapes: tuple[int, ...], layers: int | None) -> Tensor:
    """Rows over the points: sizes of their level's axes, the fastest first, and of the depth,
    strides, and the first texel."""
    columns: list[list[int]] = []
    first = 0
    for grid, count in zip(sampling.grids(shapes), sampling.points, strict=True):
        sizes, strides, step = [*reversed(grid)], [], 1
        for n in sizes:
            strides.append(step)
            step *= n
        deep = [] if layers is None else [layers]
        columns += [[*sizes, *deep, *strides, first]] * count
        first += step
    columns += [[0] * len(columns[0])] * (-len(columns) % GROUP) if columns else []
    with torch.inference_mode(False):
        return torch.tensor(columns, dtype=torch.int32, device="cpu").t().contiguous()


@functools.lru_cache(maxsize=256)
def _kernel(name: str, sampling: Sampling, dtype: torch.dtype, channels: int, depth: bool,
            target: Isa) -> Callable[[int], None] | None:
    try:
        text = source(name, sampling, dtype, channels, depth, target.width)
        function = getattr(load(compile_all([text], target)[0]), name)
    except AttnOptError as error:
        warn_once(str(error))
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], None
    found: Callable[[int], None] = function
    return found


def source(name: str, sampling: Sampling, dtype: torch.dtype, channels: int, depth: bool,
           width: int) -> str:
    """The text of a kernel, "gather" or "scatter". It does not depend on sizes or numbers of
    points.

    width: float32 lanes of a vector
    """
    wide = dtype == torch.float64
    lanes = width // 2 if wide else width
    while lanes > 4 and channels % lanes:  # a narrower vector rather than a rest
        lanes //= 2
    integers = {"AXES": sampling.axes, "C": channels, "DEPTH": int(depth),
                "RANGE": RANGES.index(sampling.range), "PADDING": PADDINGS.index(sampling.padding)}
    flags = {"LINEAR": sampling.mode == MODES[0], "ALIGN": sampling.align_corners,
             "LOST": sampling.not_finite == "nan" and sampling.padding == "zeros"
             and sampling.mode == MODES[0]}
    constants = [f"constexpr int {key} = {value};" for key, value in integers.items()]
    constants += [f"constexpr bool {key} = {str(value).lower()};" for key, value in flags.items()]
    parts = [Path(__file__).with_name(f"{part}.h").read_text("utf-8") for part in ("points", name)]
    return "\n".join([
        f"#define LANES {lanes}", f"#define DOUBLE {int(wide)}", vectors(width), *constants,
        f"typedef {ELEMENTS[dtype]} T;", f"typedef {'double' if wide else 'float'} A;", *parts])
