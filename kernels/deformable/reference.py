"""Deformable attention in float64, point by point and corner by corner: the oracle.

Nothing is shared with the lowerings. Texels outside of the grid are never read, so that NaN in one
place cannot reach another.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.kernels.deformable.sampling import Sampling


def reference(sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
              depth: Tensor | None, shapes: Sequence[int]) -> Tensor:
    """(B, Q, H, C) in float64, differentiable; see `Sampling` for the tensors."""
    sampling.check(value, locations, weights, depth, shapes)
    value, locations, weights = value.double(), locations.double(), weights.double()
    depth = None if depth is None else depth.double()
    b, _, h, c = value.shape
    total = value.new_zeros(b, locations.shape[1], h, c)
    texel = point = 0
    for grid, count in zip(sampling.grids(shapes), sampling.points, strict=True):
        for _ in range(count):
            at = locations[:, :, :, point]
            total = total + weights[:, :, :, point, None] * _sample(
                sampling, value, depth, grid, texel, at)
            point += 1
        texel += _product(grid)
    return total


def _sample(sampling: Sampling, value: Tensor, depth: Tensor | None, grid: tuple[int, ...],
            first: int, at: Tensor) -> Tensor:
    """The sample of one level at locations (B, Q, H, R): (B, Q, H, C)."""
    b, _, h, c = value.shape
    sizes = [*reversed(grid)] + ([depth.shape[-1]] if depth is not None else [])
    options = [_texels(sampling, at[..., i], n) for i, n in enumerate(sizes)]
    batch = torch.arange(b, device=at.device).view(-1, 1, 1)
    head = torch.arange(h, device=at.device)
    total = value.new_zeros(*at.shape[:-1], c)
    for corner in itertools.product(*options):
        inside = torch.stack([(i >= 0) & (i < n) for (i, _), n in zip(
            corner, sizes, strict=True)]).all(0)
        factor = torch.stack([w for _, w in corner]).prod(0)
        place, stride = torch.zeros_like(corner[0][0]) + first, 1
        for (i, _), n in zip(corner[:sampling.axes], sizes, strict=False):
            place, stride = place + i * stride, stride * n
        place = place.where(inside, 0)
        if value.shape[1] == 0 or 0 in sizes:
            continue
        texel = value[batch, place, head].where(inside[..., None], 0.0)
        if depth is not None:
            which = head if depth.shape[2] > 1 else torch.zeros_like(head)
            texel = texel * depth[batch, place, which, corner[-1][0].where(inside, 0)].where(
                inside, 0.0)[..., None]
        total = total + texel * factor.where(inside, 0.0)[..., None]
    bad = ~torch.isfinite(torch.stack(
        [_coordinate(sampling, at[..., i], n) for i, n in enumerate(sizes)])).all(0)
    if sampling.padding == "zeros" and sampling.mode == "linear":
        total = total.masked_fill(
            bad[..., None], torch.nan if sampling.not_finite == "nan" else 0.0)
    return total


def _coordinate(sampling: Sampling, at: Tensor, size: int) -> Tensor:
    """In texels, 0 the centre of the first."""
    if sampling.range == "texels":
        return at
    unit = (at + 1) / 2 if sampling.range == "signed" else at
    return unit * (size - 1) if sampling.align_corners else unit * size - 0.5


def _texels(sampling: Sampling, at: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """The texels next to a location along one axis, with their weights."""
    x = _coordinate(sampling, at, size)
    if sampling.padding == "reflection":
        # To and fro between the centres of the outermost texels, or their edges.
        first = 0.0 if sampling.align_corners else -0.5
        length = size - 1 if sampling.align_corners else size
        x = (x - first).abs() % (2 * length) if length > 0 else torch.full_like(x, torch.nan)
        x = torch.where(x > length, 2 * length - x, x) + first
    if sampling.padding != "zeros":
        inside = (x > 0) & (x < size - 1)  # at the ends no gradient, as F.grid_sample has it
        fixed = x.detach().nan_to_num(0.0, torch.inf, -torch.inf).clamp(0, max(size - 1, 0))
        x = torch.where(inside, x, fixed)
    else:
        far = ~(x.detach().abs() < 2.0 ** 40)  # nothing is there, whatever its number
        x = torch.where(far, torch.full_like(x, -9.0), x)
    if sampling.mode == "nearest":
        return [(x.detach().round().long(), torch.ones_like(x))]
    low = x.detach().floor()
    return [(low.long(), 1 - (x - low)), (low.long() + 1, x - low)]


def _product(grid: tuple[int, ...]) -> int:
    total = 1
    for n in grid:
        total *= n
    return total
