"""Deformable attention whose levels are told by tensors, as compiled extensions are called.

    deformable_attention_of_levels(Tensor value, Tensor locations, Tensor weights, Tensor? depth,
                                   Tensor shapes, Tensor starts, str sampling) -> Tensor

is `deformable_attention` with the sizes of the grids, the slowest axis first, in `shapes` (L, axes)
and the first texel of each level in `starts` (L). They are read when the op runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.kernels.deformable import ops
from attnopt.kernels.deformable.corners import result_dtype
from attnopt.kernels.deformable.sampling import Sampling

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "deformable_attention_of_levels(Tensor value, Tensor locations, Tensor weights, Tensor? depth, "
    "Tensor shapes, Tensor starts, str sampling) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


def in_order(grids: Sequence[Sequence[int]], starts: Sequence[int]) -> bool:
    """Does each level begin where the one before ends?"""
    counts = [math.prod(grid) for grid in grids]
    return list(starts) == [sum(counts[:i]) for i in range(len(counts))]


def _forward(value: Tensor, locations: Tensor, weights: Tensor, depth: Tensor | None,
             shapes: Tensor, starts: Tensor, sampling: str) -> Tensor:
    grids, first = shapes.tolist(), starts.tolist()
    value, depth = (_ordered(t, grids, first) for t in (value, depth))  # type: ignore[assignment]
    sizes = [n for grid in grids for n in grid]
    out: Tensor = torch.ops.attnopt.deformable_attention.default(
        value, locations, weights, depth, sizes, sampling)
    return out


def _ordered(tensor: Tensor | None, grids: Sequence[Sequence[int]], starts: Sequence[int]
             ) -> Tensor | None:
    """The texels of all levels, one level after another and nothing else."""
    if tensor is None or in_order(grids, starts) \
            and tensor.shape[1] == sum(math.prod(grid) for grid in grids):
        return tensor
    return torch.cat([tensor[:, start:start + math.prod(grid)]
                      for grid, start in zip(grids, starts, strict=True)], 1)


def _fake(value: Tensor, locations: Tensor, weights: Tensor, depth: Tensor | None, shapes: Tensor,
          starts: Tensor, sampling: str) -> Tensor:
    Sampling.parse(sampling)
    b, queries, h = locations.shape[:3]
    return value.new_empty(b, queries, h, value.shape[-1], dtype=result_dtype(value, weights))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, sampling = inputs
    ctx.save_for_backward(*tensors)
    ctx.sampling = sampling


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, shapes, starts = ctx.saved_tensors
    wanted = [i for i, need in enumerate(ctx.needs_input_grad[:4]) if need]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # One tensor may be in two roles.
        own: list[Any] = [None if t is None else t.view_as(t) for t in tensors]
        value, locations, weights, depth = own
        out = _forward(value, locations, weights, depth, shapes, starts, ctx.sampling)
        parts = torch.autograd.grad(out, [own[i] for i in wanted], grad, allow_unused=True,
                                    create_graph=again)
    found: list[Tensor | None] = [None] * 7
    for i, part in zip(wanted, parts, strict=True):
        found[i] = part
    return tuple(found)


_library.impl("deformable_attention_of_levels", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::deformable_attention_of_levels", _fake, lib=_library)
torch.library.register_autograd("attnopt::deformable_attention_of_levels", _backward,
                                setup_context=_setup, lib=_library)
assert ops  # it registers the op that this one calls
