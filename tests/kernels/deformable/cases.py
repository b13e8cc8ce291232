"""Inputs of deformable attention, and the authors' spelling of it by F.grid_sample."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.kernels.deformable import Sampling

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def inputs(sampling: Sampling, shapes: Sequence[int], *, batch: int = 2, queries: int = 5,
           heads: int = 3, channels: int = 5, depths: int = 0, depth_heads: int = 1,
           dtype: torch.dtype = torch.float64, spread: float = 1.3) -> Inputs:
    """Tensors with locations in the range and somewhat outside."""
    texels = sum(math.prod(g) for g in sampling.grids(shapes))
    points = sum(sampling.points)
    rank = sampling.axes + bool(depths)
    value = torch.randn(batch, texels, heads, channels, dtype=dtype)
    unit = (torch.rand(batch, queries, heads, points, rank, dtype=dtype) - 0.5) * spread + 0.5
    at = unit
    if sampling.range == "signed":
        at = 2 * unit - 1
    elif sampling.range == "texels":
        at = unit * max(shapes)
    weights = torch.rand(batch, queries, heads, points, dtype=dtype)
    depth = torch.randn(batch, texels, depth_heads, depths, dtype=dtype).softmax(-1) \
        if depths else None
    return value, at, weights, depth


def by_grid_sample(sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
                   depth: Tensor | None, shapes: Sequence[int]) -> Tensor:
    """Level by level, with the volume of value x depth where there is one."""
    b, _, h, c = value.shape
    texel = point = 0
    total = value.new_zeros(b, locations.shape[1], h, c)
    for grid, count in zip(sampling.grids(shapes), sampling.points, strict=True):
        size = math.prod(grid)
        own = value[:, texel:texel + size].permute(0, 2, 3, 1).reshape(b * h, c, *grid)
        full = list(grid)
        if depth is not None:
            d = depth.shape[-1]
            dist = depth[:, texel:texel + size].expand(-1, -1, h, -1)
            dist = dist.permute(0, 2, 3, 1).reshape(b * h, 1, d, *grid)
            own, full = own.unsqueeze(2) * dist, [d, *grid]
        at = locations[:, :, :, point:point + count].permute(0, 2, 1, 3, 4).flatten(0, 1)
        sizes = torch.tensor([*reversed(grid), *full[:len(full) - len(grid)]], dtype=at.dtype)
        if sampling.range == "unit":
            at = 2 * at - 1
        elif sampling.range == "texels":
            at = (2 * at + 1) / sizes - 1 if not sampling.align_corners else (
                2 * at / (sizes - 1) - 1)
        while len(full) < 2:
            own, full = own.unsqueeze(-2), [1, *full]
            at = torch.cat((at, torch.zeros_like(at[..., :1])), -1)
        if len(full) == 3:
            at = at.unsqueeze(1)
        found = F.grid_sample(own, at, mode={"linear": "bilinear"}.get(sampling.mode, "nearest"),
                              padding_mode=sampling.padding, align_corners=sampling.align_corners)
        found = found.reshape(b, h, c, locations.shape[1], count)
        part = weights[:, :, :, point:point + count].permute(0, 2, 1, 3).unsqueeze(2)
        total = total + (found * part).sum(-1).permute(0, 3, 1, 2)
        texel, point = texel + size, point + count
    return total
