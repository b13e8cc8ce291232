"""Deformable attention in ATen: the corners of all points as bags of weighted rows.

Each point has 2, 4 or 8 corners; the corners of all points of a (batch, query, head) are one bag of
rows of `value`, whose weights are the point's weight times the share of the corner times its depth.
`embedding_bag` gathers and sums a bag without holding the rows.

A corner outside of the grid has weight 0 and a row that is inside. Where `value` or `depth` holds
NaN or infinity, that is no longer nothing: `careful` reads such rows as 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.kernels.deformable.sampling import Sampling

_HALF = (torch.float16, torch.bfloat16)
_EMPTY = -8
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


@dataclass(frozen=True)
class Levels:
    """Numbers of the level of each point: sizes and strides by axis, fastest first (each (T, axes)
    of int32 or int64), and its first texel (T)."""

    sizes: Tensor
    strides: Tensor
    first: Tensor


@functools.lru_cache(maxsize=256)
def _levels(sampling: Sampling, shapes: tuple[int, ...], device: torch.device,
            index: torch.dtype) -> Levels:
    sizes: list[list[int]] = []
    strides: list[list[int]] = []
    first: list[int] = []
    start = 0
    for grid, count in zip(sampling.grids(shapes), sampling.points, strict=True):
        own, step = [], 1
        for n in reversed(grid):
            own.append(step)
            step *= n
        # Nothing is between 0 and the last texel of an empty axis, however it is clamped.
        sizes += [[n or _EMPTY for n in reversed(grid)]] * count
        strides += [own] * count
        first += [start] * count
        start += step

    def tensor(numbers: list[list[int]] | list[int], *shape: int) -> Tensor:
        return torch.tensor(numbers, dtype=index, device=device).view(*shape)

    with torch.inference_mode(False):
        points = len(first)
        return Levels(tensor(sizes, points, sampling.axes), tensor(strides, points, sampling.axes),
                      tensor(first, points))


def result_dtype(value: Tensor, weights: Tensor) -> torch.dtype:
    return torch.promote_types(value.dtype, weights.dtype)


def working_dtype(*tensors: Tensor | None) -> torch.dtype:
    """In which everything is computed: at least float32."""
    dtype = torch.float32
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _HALF:
            dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def compose(sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
            depth: Tensor | None, shapes: Sequence[int], *, careful: bool = False,
            bags: bool = True) -> Tensor:
    """(B, Q, H, C), differentiable.

    careful: texels outside of the grid are not even read as a factor of 0
    bags:    sum by `embedding_bag`, whose gradient has none; otherwise rows are gathered and summed
    """
    b, s, h, c = value.shape
    queries, points = locations.shape[1], locations.shape[3]
    dtype, out = working_dtype(value, locations, weights, depth), result_dtype(value, weights)
    if 0 in (b, s, h, c, queries, points) or depth is not None and depth.shape[-1] == 0:
        anything = sum((t.sum() * 0 for t in (value, locations, weights, depth)
                        if t is not None and t.requires_grad), start=value.new_zeros((), dtype=out))
        return anything.to(out).expand(b, queries, h, c).clone()
    index = torch.int32 if b * s * h < 2**31 else torch.int64
    made = _levels if type(value) in _PLAIN else _levels.__wrapped__  # no fake one is kept
    level = made(sampling, tuple(shapes), value.device, index)
    locations, weights = locations.to(dtype), weights.to(dtype)
    apart = careful or not bags
    share = (torch.ones_like(weights) if apart else weights).unsqueeze(-1)
    inside, lost = None, None
    # The row of a texel of a head: ((batch * S) + texel) * H + head.
    batch = torch.arange(b, dtype=index, device=value.device).view(-1, 1, 1, 1, 1) * (s * h)
    head = torch.arange(h, dtype=index, device=value.device).view(-1, 1, 1)
    place = batch + level.first.unsqueeze(-1) * h + head
    for axis in range(sampling.axes):
        x = _coordinate(sampling, locations[..., axis], level.sizes[:, axis])
        texel, part, within = _neighbours(sampling, x, level.sizes[:, axis])
        # Combinations of this axis with those before, the fastest axis last.
        stepped = texel * (level.strides[:, axis, None] * h)
        place = (stepped.unsqueeze(-1) + place.unsqueeze(-2)).flatten(-2)
        share = (part.unsqueeze(-1) * share.unsqueeze(-2)).flatten(-2)
        if careful:
            inside = within if inside is None else (
                within.unsqueeze(-1) & inside.unsqueeze(-2)).flatten(-2)
        lost = _lost(sampling, x, lost)
    if min(shapes) == 0:  # there are no places in an empty level
        place = place.clamp(0, b * s * h - 1)
    if depth is not None:
        deep = locations[..., -1]
        z = _coordinate(sampling, deep, depth.shape[-1])
        lost = _lost(sampling, z, lost)
        layers = _neighbours(sampling, z, depth.shape[-1])
        if inside is not None:
            inside = inside & layers[2].any(-1, keepdim=True)
        row = place if depth.shape[2] > 1 else torch.div(place, h, rounding_mode="trunc")
        share = share * _depth_score(depth.to(dtype), layers, row, inside)
    if lost is not None:
        share = share.masked_fill(lost.unsqueeze(-1), torch.nan)
    rows = value.to(dtype).reshape(-1, c)
    if apart:
        found = rows[place.long()]
        if inside is not None:
            found = torch.where(inside.unsqueeze(-1), found, 0.0)
        samples = (found * share.unsqueeze(-1)).sum(-2)
        return (samples * weights.unsqueeze(-1)).sum(-2).to(out)
    bag, share = (t.reshape(b * queries * h, -1) for t in (place, share))
    total = F.embedding_bag(bag, rows, mode="sum", per_sample_weights=share)
    return total.view(b, queries, h, c).to(out)


def _coordinate(sampling: Sampling, at: Tensor, size: Tensor | int) -> Tensor:
    """In texels, 0 the centre of the first."""
    if sampling.range == "texels":
        return at
    unit = (at + 1) / 2 if sampling.range == "signed" else at
    return unit * (size - 1) if sampling.align_corners else unit * size - 0.5


def _neighbours(sampling: Sampling, x: Tensor, size: Tensor | int
                ) -> tuple[Tensor, Tensor, Tensor]:
    """The texels next to x along one axis: numbers within the grid, shares (0 outside), and whether
    they are within; all (…, 1 or 2)."""
    last = size - 1
    index = size.dtype if isinstance(size, Tensor) else torch.int32
    if sampling.padding == "reflection":
        x = _reflected(sampling, x, size)
    if sampling.padding != "zeros":
        fixed = _clamp(x.detach().nan_to_num(0.0), 0, last).clamp(min=0)
        # At the ends there is no gradient, as F.grid_sample has it.
        x = torch.where((x > 0) & (x < last), x, fixed)
    else:
        # Far outside nothing is; as whole numbers such places would overflow.
        x = _clamp(x.nan_to_num(-2.0), -2, size + 1)
    if sampling.mode == "nearest":
        texel = x.detach().round().to(index).unsqueeze(-1)
        part = torch.ones_like(x).unsqueeze(-1)
    else:
        low = x.detach().floor()
        texel = low.to(index).unsqueeze(-1)
        texel = torch.cat((texel, texel + 1), -1)
        part = x - low
        part = torch.stack((1 - part, part), -1)
    top = last.unsqueeze(-1) if isinstance(last, Tensor) else last
    near = _clamp(texel, 0, top)
    within = near == texel
    return near, part * within, within


def _reflected(sampling: Sampling, x: Tensor, size: Tensor | int) -> Tensor:
    """To and fro between the centres of the outermost texels, or their edges; where these are one
    place, and where x is not finite, NaN, which is the first texel."""
    first, length = (0.0, size - 1) if sampling.align_corners else (-0.5, size)
    far = (x - first).abs()
    turns = (far.detach() / length).floor()
    rest = far - turns * length
    return torch.where(turns.remainder(2) == 1, length - rest, rest) + first


def _clamp(x: Tensor, low: int, high: Tensor | int) -> Tensor:
    if isinstance(high, int):
        return x.clamp(low, high)
    return x.clamp(torch.full((), low, dtype=x.dtype, device=x.device), high.to(x.dtype))


def _lost(sampling: Sampling, x: Tensor, before: Tensor | None) -> Tensor | None:
    """Where a location gives NaN."""
    if sampling.not_finite != "nan" or sampling.padding != "zeros" or sampling.mode != "linear":
        return None
    own = ~torch.isfinite(x.detach())
    return own if before is None else own | before


def _depth_score(depth: Tensor, layers: tuple[Tensor, Tensor, Tensor], row: Tensor,
                 inside: Tensor | None) -> Tensor:
    """The depth of each corner's texel, between the depths next to a location: (…, corners)."""
    count = depth.shape[-1]
    layer, part, within = layers
    row = row.long()
    flat = depth.reshape(-1)
    total: Tensor | None = None
    for i in range(layer.shape[-1]):
        found = flat[row * count + layer[..., i, None]]
        if inside is not None:
            found = torch.where(within[..., i, None] & inside, found, 0.0)
        term = found * part[..., i, None]
        total = term if total is None else total + term
    assert total is not None
    return total
