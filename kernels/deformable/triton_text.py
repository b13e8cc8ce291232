"""A Form -> the source of the Triton kernels of deformable attention, forward and backward.

The channels of a row, a query of a head, lie across threads, so that a corner is read 16 bytes at a
time. With p the product of a corner's shares along the axes and s its depth:

    out          = sum over points and corners of  weight * p * s * value[corner]
    g            = value[corner] . grad_out          of each corner
    grad_value   = weight * p * s * grad_out         added at the corner, in float32, by atomics
    grad_depth   = weight * p * share of the layer * g                    likewise
    grad_weight  = sum over corners of  p * s * g                         stored by the row's owner
    grad_x       = weight * sum over corners of  (dp / dx) * s * g        likewise, times dx / dat

Corners outside are neither read nor written. Strides of `value` come in units of UNIT numbers, so
that the compiler knows how they are aligned. `triton_walk` has what both kernels share.
"""

from __future__ import annotations

import functools
import textwrap

from attnopt.kernels.deformable.triton_walk import (
    AXES,
    LAYER,
    Form,
    corners_of,
    functions,
    levels,
    point_of,
    scaled,
    side_of,
    start,
    value_rows,
)
from attnopt.kernels.triton.layout import Source
from attnopt.kernels.triton.printer import Argument

_INPUTS = ("value", "locations", "weights", "depth")
#: gradients that are added by atomics
ADDED = ("value", "depth")
_SIZES = ("queries", "heads", "points", "level_count", "value_batch", "value_texel", "value_head")
_DEPTH_SIZES = ("layers", "depth_batch", "depth_texel", "depth_head")
CONSTANTS = ("QUERIES", "HEADS", "C", "PADDED", "UNIT")


@functools.lru_cache(maxsize=256)
def source(form: Form) -> Source:
    """The module of a Form: the kernel `backward` where gradients are wanted, else `forward`."""
    name = "backward" if form.wanted else "forward"
    lines = _backward(form) if form.wanted else _forward(form)
    arguments = _arguments(form)
    head = textwrap.fill(
        ", ".join([*(a.name for a in arguments), *(f"{c}: tl.constexpr" for c in CONSTANTS)]), 94,
        initial_indent=" " * 8, subsequent_indent=" " * 8)
    body = textwrap.indent("\n".join(lines) + "\n", "    ")
    title = textwrap.fill(str(form), 96)
    text = (f'"""Deformable attention, {name}, generated.\n\n{title}\n"""\n'
            f"import triton\nimport triton.language as tl\n\n{functions(form)}\n\n"
            f"@triton.jit\ndef {name}(\n{head},\n):\n{body}")
    return Source(text, {name: arguments}, {name: CONSTANTS})


def _arguments(form: Form) -> tuple[Argument, ...]:
    tensors = _INPUTS if form.depth else _INPUTS[:3]
    outputs = ("grad_out", *(f"grad_{n}" for n in form.wanted)) if form.wanted else ("out",)
    numbers = [*_SIZES, *(_DEPTH_SIZES if form.depth else ())]
    if set(ADDED) & set(form.wanted):
        numbers.append("texels")
    if "depth" in form.wanted:
        numbers.append("depth_heads")
    return (*(Argument(n, "pointer", n) for n in (*tensors, *outputs)),
            Argument("levels", "list", "levels"), *(Argument(n, "size", n) for n in numbers))


# -- forward --------------------------------------------------------------------------------------
def _forward(form: Form) -> list[str]:
    corner = [*value_rows(), f"total += rows * ({scaled(form, 'weight')})[:, None]"]
    point = point_of(form)
    if form.lost:
        point.append("weight = tl.where(finite, weight, float('nan'))")
    return [*start(form),
            "total = tl.zeros([QUERIES * HEADS, PADDED], tl.float32)",
            *levels(form, [*point, *corners_of(form, corner)]),
            "whole = real[:, None] & (channel < C)",
            "tl.store(out + before * C + ((row * C)[:, None] + channel), total, mask=whole)"]


# -- backward -------------------------------------------------------------------------------------
def _backward(form: Form) -> list[str]:
    wanted, rank = set(form.wanted), len(form.names)
    lines = [*start(form),
             "whole = real[:, None] & (channel < C)",
             "grad = read(grad_out + before * C + ((row * C)[:, None] + channel), whole)"]
    lines += [f"grad_{n}_here = grad_{n} + before * points" + (f" * {rank}" if i else "")
              for i, n in enumerate(("weights", "locations")) if n in wanted]
    if "value" in wanted:
        lines.append("grad_value_here = grad_value + batch * texels * heads * C")
    if "depth" in wanted:
        lines.append("grad_depth_here = grad_depth + batch * texels * depth_heads * layers")
    point = point_of(form)
    zero = "tl.zeros([QUERIES * HEADS], tl.float32)"
    moved = form.names if "locations" in wanted and form.linear else ()
    sums = [f"grad_{a}" for a in moved]
    if "weights" in wanted:
        sums.append("grad_weight")
    point += [f"{name} = {zero}" for name in sums]
    point += corners_of(form, _corner_gradients(form, moved))
    if "weights" in wanted:
        if form.lost:
            point.append("grad_weight = tl.where(finite, grad_weight, float('nan'))")
        point += _stored("grad_weights_here", "spot", "grad_weight")
    for i, a in enumerate(moved):
        value = f"grad_{a} * slope(raw_{a}, size_{a})"
        if form.lost:
            value = f"tl.where(finite, {value}, 0.0)"
        place = f"(spot * {rank}" + (f" + {i})" if i else ")")
        point += _stored("grad_locations_here", place, value)
    return [*lines, *levels(form, point)]


def _corner_gradients(form: Form, moved: tuple[str, ...]) -> list[str]:
    wanted = set(form.wanted)
    lines: list[str] = []
    if wanted & {"weights", "depth"} or moved:
        lines += [*value_rows(), "product = tl.sum(rows * grad, 1)"]
    if "weights" in wanted:
        lines.append(f"grad_weight += {scaled(form, 'product')}")
    if moved or "depth" in wanted:
        lines.append("weighted = product * weight")
    for i, a in enumerate(AXES[:form.axes]):
        if a not in moved:
            continue
        others = [f"part_{b}" for b in AXES[:form.axes] if b != a]
        factors = " * ".join(["weighted", *others, *(["score"] if form.depth else [])])
        lines += [f"sign = 1.0 if {side_of(i)} == 1 else -1.0", f"grad_{a} += {factors} * sign"]
    if LAYER in moved:
        lines.append(f"grad_{LAYER} += weighted * part * (upper - lower)")
    if "depth" in wanted:
        # Heads that share a depth have the number 0 of it.
        lines += ["layers_here = texel * depth_heads + tl.minimum(head, depth_heads - 1)",
                  f"cell = layers_here * layers + low_{LAYER}"]
        lines.append("layer_grad = weighted" + (" * part" if form.linear else ""))
        low = f" * (1.0 - far_{LAYER})" if form.linear else ""
        lines += _added("grad_depth_here + cell", "layer_grad" + low, "inside & has_low")
        if form.linear:
            lines += _added("grad_depth_here + cell + 1", f"layer_grad * far_{LAYER}",
                            "inside & has_high")
    if "value" in wanted:
        lines += _added("grad_value_here + (((texel * heads + head) * C)[:, None] + channel)",
                        f"grad * ({scaled(form, 'weight')})[:, None]", "mask")
    return lines


def _stored(name: str, place: str, value: str) -> list[str]:
    return [f"tl.store({name} + {place},", f"         {value}, mask=real)"]


def _added(place: str, value: str, mask: str) -> list[str]:
    return ["tl.atomic_add(", f"    {place},", f'    {value}, mask={mask}, sem="relaxed")']
