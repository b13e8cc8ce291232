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
from dataclasses import dataclass, replace

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


@dataclass(frozen=True)
class Corner:
    """One texel next to each location, along some axes: its number, its share of the sample (None
    is 1), and whether it is inside of the grid (None is everywhere); (B, Q, H, T) or broadcast."""

    place: Tensor
    share: Tensor | None
    inside: Tensor | None

    def beside(self, other: Corner) -> Corner:
        """Along the axes of both."""
        share = self.share if other.share is None or self.share is None \
            else self.share * other.share
        inside = self.inside if other.inside is None or self.inside is None \
            else self.inside & other.inside
        return Corner(self.place + other.place, share, inside)


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
        anything = sum((t.nan_to_num(0, 0, 0).sum() * 0 for t in (value, locations, weights, depth)
                        if t is not None and t.requires_grad), start=value.new_zeros((), dtype=out))
        return anything.to(out).expand(b, queries, h, c).clone()
    elements = max(b * s * h, 0 if depth is None else depth.numel())
    index = torch.int32 if elements < 2**31 else torch.int64
    made = _levels if type(value) in _PLAIN else _levels.__wrapped__  # no fake one is kept
    level = made(sampling, tuple(shapes), value.device, index)
    locations, weights = locations.to(dtype), weights.to(dtype)
    apart = careful or not bags
    # The row of a texel of a head: ((batch * S) + texel) * H + head.
    batch = torch.arange(b, dtype=index, device=value.device).view(-1, 1, 1, 1) * (s * h)
    head = torch.arange(h, dtype=index, device=value.device).view(-1, 1)
    corners = [Corner(batch + level.first * h + head, None if apart else weights, None)]
    lost = None
    for axis in range(sampling.axes):
        x = _coordinate(sampling, locations[..., axis], level.sizes[:, axis])
        step = level.strides[:, axis] * h
        near = [Corner(texel.place * step, texel.share, texel.inside)
                for texel in _neighbours(sampling, x, level.sizes[:, axis])]
        corners = [texel.beside(corner) for texel in near for corner in corners]
        lost = _lost(sampling, x, lost)
    if min(shapes) == 0:  # there are no places in an empty level
        corners = [replace(c, place=c.place.clamp(0, b * s * h - 1)) for c in corners]
    if depth is not None:
        z = _coordinate(sampling, locations[..., -1], depth.shape[-1])
        lost = _lost(sampling, z, lost)
        layers = _neighbours(sampling, z, depth.shape[-1])
        corners = [_at_depth(corner, layers, depth.to(dtype), h, careful) for corner in corners]
    place, share = (torch.stack([t for t in found if t is not None], -2)
                    for found in ([c.place for c in corners], [c.share for c in corners]))
    if lost is not None:
        share = share.masked_fill(lost.unsqueeze(-2), torch.nan)
    rows = value.to(dtype).reshape(-1, c)
    if apart:
        found = rows[place.long()]
        if careful:
            inside = torch.stack([c.inside for c in corners if c.inside is not None], -2)
            found = torch.where(inside.unsqueeze(-1), found, 0.0)
        samples = (found * share.unsqueeze(-1)).sum(-3)
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


def _neighbours(sampling: Sampling, x: Tensor, size: Tensor | int) -> list[Corner]:
    """The one or two texels next to x along one axis, by their numbers within the grid."""
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

    def corner(texel: Tensor, part: Tensor) -> Corner:
        near = _clamp(texel, 0, last)
        within = near == texel
        return Corner(near, torch.where(within, part, 0.0), within)

    if sampling.mode == "nearest":
        return [corner(x.detach().round().to(index), torch.ones_like(x))]
    low = x.detach().floor()
    texel, part = low.to(index), x - low
    return [corner(texel, 1 - part), corner(texel + 1, part)]


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


def _at_depth(corner: Corner, layers: Sequence[Corner], depth: Tensor, heads: int, careful: bool
              ) -> Corner:
    """The corner, its share times the depth of its texel between the layers next to a location."""
    row = corner.place if depth.shape[2] > 1 else torch.div(
        corner.place, heads, rounding_mode="trunc")
    flat, row = depth.reshape(-1), row * depth.shape[-1]
    inside, any_layer = corner.inside, layers[0].inside
    assert inside is not None and any_layer is not None
    score: Tensor | None = None
    for layer in layers:
        at = row + layer.place
        found = flat.index_select(0, at.flatten()).view(at.shape)
        assert layer.share is not None and layer.inside is not None
        if careful:
            found = torch.where(layer.inside & inside, found, 0.0)
        any_layer = any_layer | layer.inside
        term = found * layer.share
        score = term if score is None else score + term
    assert score is not None
    share = score if corner.share is None else corner.share * score
    return Corner(corner.place, share, inside & any_layer)
