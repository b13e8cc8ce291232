"""Deformable attention whose levels are told by tensors, as compiled extensions are called.

    deformable_attention_of_levels(Tensor value, Tensor locations, Tensor weights, Tensor? depth,
                                   Tensor shapes, Tensor starts, str sampling) -> Tensor

is `deformable_attention` with the sizes of the grids, the slowest axis first, in `shapes` (L, axes)
and the first texel of each level in `starts` (L). They are read when the op runs.

    depth_score(Tensor depth, Tensor locations, Tensor shapes, Tensor starts) -> Tensor

is the other result of DFA3D's function (Li et al., ICCV 2023): the depth at each corner of a point,

    s_corner = (1 - fz) * depth[corner, z0] + fz * depth[corner, z0 + 1],

which has no gradient, as theirs has none.
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
_library.define(
    "depth_score(Tensor depth, Tensor locations, Tensor shapes, Tensor starts) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,))


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


def _depth_score(depth: Tensor, locations: Tensor, shapes: Tensor, starts: Tensor) -> Tensor:
    """(B, Q, H, L, P, 4): the depths at the corners (low y, low x), (low, high), (high, low),
    (high, high) of locations (B, Q, H, L, P, 3) in 0 to 1; 0 for a corner outside of the grid.

    depth: (B, S, H, D); shapes: (L, 3), the slowest axis first and the number of depths last
    """
    b, _, h, count = depth.shape
    sizes = shapes.flip(-1)[:, [1, 2, 0]].to(locations.dtype).view(-1, 1, 3)  # x, y, depth
    at = (locations * sizes - 0.5).nan_to_num(-2.0).clamp(min=-2.0).minimum(sizes + 1)
    low = at.floor()
    part = at - low
    z, fz = low[..., 2].long(), part[..., 2]
    width, height = sizes[..., 0].long(), sizes[..., 1].long()
    batch = torch.arange(b, device=depth.device).view(-1, 1, 1, 1, 1)
    head = torch.arange(h, device=depth.device).view(-1, 1, 1)
    corners = []
    for dy in (0, 1):
        for dx in (0, 1):
            x, y = low[..., 0].long() + dx, low[..., 1].long() + dy
            inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
            row = torch.where(inside, starts.view(-1, 1) + y * width + x, 0)
            score = torch.zeros_like(fz)
            for layer, share in ((z, 1 - fz), (z + 1, fz)):
                found = depth[batch, row, head, layer.clamp(0, count - 1)].to(fz.dtype)
                score = score + found * share * (inside & (layer >= 0) & (layer < count))
            corners.append(score)
    return torch.stack(corners, -1).to(depth.dtype)


def _fake_score(depth: Tensor, locations: Tensor, shapes: Tensor, starts: Tensor) -> Tensor:
    return depth.new_empty(*locations.shape[:-1], 4)


_library.impl("deformable_attention_of_levels", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::deformable_attention_of_levels", _fake, lib=_library)
torch.library.register_autograd("attnopt::deformable_attention_of_levels", _backward,
                                setup_context=_setup, lib=_library)
_library.impl("depth_score", _depth_score, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::depth_score", _fake_score, lib=_library)
torch.library.register_autograd("attnopt::depth_score", lambda ctx, grad: (None,) * 4,
                                lib=_library)
assert ops  # it registers the op that this one calls
