"""Deformable attention as people write it, and programs that look like it and are not.

    out[b,q,h,:] = sum over t of weight[b,q,h,t] * sample(value of level l(t), location[b,q,h,t])

`TABLE` has spellings: functions of value (B, S, H, C), locations (B, Q, H, T, 2) in 0 to 1 and
weights (B, Q, H, T) with a result (B, Q, H * C). `NEAR` has near misses.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

B, Q, H, C = 2, 7, 4, 8
GRIDS = ((6, 5), (3, 4), (2, 2))
L = len(GRIDS)
S = sum(h * w for h, w in GRIDS)
EQUAL, UNEQUAL = (2, 2, 2), (2, 1, 3)

Form = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Spelling:
    """A spelling: number of points of each level, and what F.grid_sample is told."""

    form: Form
    points: tuple[int, ...] = EQUAL
    mode: str = "linear"
    padding: str = "zeros"
    align_corners: bool = False
    #: cannot be read without cutting: parts are put together again
    parts: bool = False

    @property
    def name(self) -> str:
        return self.form.__name__

    def module(self) -> nn.Module:
        return Sampler(self.form)

    def inputs(self, batch: int = B, queries: int = Q, dtype: torch.dtype = torch.float32
               ) -> tuple[Tensor, Tensor, Tensor]:
        points = sum(self.points)
        return (torch.randn(batch, S, H, C, dtype=dtype),
                torch.rand(batch, queries, H, points, 2, dtype=dtype) * 1.2 - 0.1,
                torch.randn(batch, queries, H, points, dtype=dtype))


class Sampler(nn.Module):
    """A spelling as a module, with the softmax of the weights in front."""

    def __init__(self, form: Form, softmax: bool = True) -> None:
        super().__init__()
        self.form, self.softmax = form, softmax

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return self.form(value, locations, weights.softmax(-1) if self.softmax else weights)


# -- pieces ----------------------------------------------------------------------------------------
def maps(value: Tensor) -> list[Tensor]:
    """The levels as (B * H, C, h, w)."""
    b = value.shape[0]
    pieces = value.split([h * w for h, w in GRIDS], 1)
    return [v.permute(0, 2, 3, 1).reshape(b * H, C, h, w)
            for v, (h, w) in zip(pieces, GRIDS, strict=True)]


def grids(locations: Tensor) -> list[Tensor]:
    """Of each of equal levels (B * H, Q, P, 2), from -1 to 1."""
    b, q = locations.shape[:2]
    at = (2 * locations - 1).view(b, q, H, L, locations.shape[3] // L, 2)
    return [at[:, :, :, i].transpose(1, 2).flatten(0, 1) for i in range(L)]


def sampled(value: Tensor, locations: Tensor, **how: object) -> list[Tensor]:
    """(B * H, C, Q, P) of each level."""
    how = {"align_corners": False, **how}
    return [F.grid_sample(v, g, **how)  # type: ignore[arg-type]
            for v, g in zip(maps(value), grids(locations), strict=True)]


def by_head(weights: Tensor) -> Tensor:
    """(B * H, 1, Q, T)"""
    b, q = weights.shape[:2]
    return weights.transpose(1, 2).reshape(b * H, 1, q, weights.shape[-1])


def queries_first(out: Tensor) -> Tensor:
    """(B * H, C, Q) as (B, Q, H * C)"""
    return out.reshape(out.shape[0] // H, H * C, out.shape[-1]).transpose(1, 2)


# -- spellings -------------------------------------------------------------------------------------
def stacked_levels(value, locations, weights):
    """Deformable DETR's own check of its kernel."""
    samples = torch.stack(sampled(value, locations), dim=-2).flatten(-2)
    return queries_first((samples * by_head(weights)).sum(-1)).contiguous()


def points_before_levels(value, locations, weights):
    samples = torch.stack(sampled(value, locations), dim=-1).flatten(-2)
    weights = weights.unflatten(-1, (L, -1)).transpose(-1, -2).flatten(-2)
    return queries_first((samples * by_head(weights)).sum(-1))


def einsum(value, locations, weights):
    samples = torch.stack(sampled(value, locations))
    weights = weights.transpose(1, 2).reshape(samples.shape[1], -1, L, samples.shape[-1])
    return queries_first(torch.einsum("lncqp,nqlp->ncq", samples, weights))


def matrix_product(value, locations, weights):
    samples = torch.cat(sampled(value, locations), -1).permute(0, 2, 1, 3)
    weights = by_head(weights).permute(0, 2, 3, 1)
    out = (samples @ weights).squeeze(-1)
    return out.view(-1, H, *out.shape[1:]).transpose(1, 2).flatten(2)


def added_levels(value, locations, weights):
    weights = by_head(weights).unflatten(-1, (L, -1))
    out = 0
    for level, samples in enumerate(sampled(value, locations)):
        out = out + (samples * weights[..., level, :]).sum(-1)
    return queries_first(out)


def added_in_place(value, locations, weights):
    out = value.new_zeros(value.shape[0] * H, C, locations.shape[1])
    for samples, weight in zip(sampled(value, locations), by_head(weights).chunk(L, -1),
                               strict=True):
        out += torch.einsum("ncqp,noqp->ncq", samples, weight)
    return queries_first(out)


def sums_of_levels(value, locations, weights):
    parts = [(s * w).sum(-1) for s, w in zip(
        sampled(value, locations), by_head(weights).unflatten(-1, (L, -1)).unbind(-2),
        strict=True)]
    return queries_first(torch.stack(parts).sum(0))


def concatenated(value, locations, weights):
    """RT-DETRv2: levels may have different numbers of points."""
    at = (2 * locations - 1).permute(0, 2, 1, 3, 4).flatten(0, 1).split(UNEQUAL, -2)
    b = value.shape[0]
    pieces = value.permute(0, 2, 3, 1).flatten(0, 1).split([h * w for h, w in GRIDS], -1)
    samples = [F.grid_sample(v.reshape(b * H, C, h, w), g, align_corners=False)
               for v, (h, w), g in zip(pieces, GRIDS, at, strict=True)]
    return queries_first((torch.cat(samples, -1) * by_head(weights)).sum(-1))


def channels_last(value, locations, weights):
    """The samples are put in order before they are weighted, in place."""
    b, q = locations.shape[:2]
    samples = torch.stack(sampled(value, locations), 3).view(b, H, C, q, -1)
    samples = samples.permute(0, 3, 1, 4, 2).contiguous()
    samples.mul_(weights.unsqueeze(-1))
    return samples.sum(3).flatten(2)


def rows_of_points(value, locations, weights):
    """Queries and points are one dimension of the grid, the other has length 1."""
    b, q = locations.shape[:2]
    parts = []
    for v, g in zip(maps(value), grids(locations), strict=True):
        flat = F.grid_sample(v, g.flatten(1, 2).unsqueeze(2), align_corners=False)
        parts.append(flat.squeeze(-1).view(b * H, C, q, -1))
    return queries_first((torch.cat(parts, -1) * by_head(weights)).sum(-1))


def other_range(value, locations, weights):
    """The range is changed level by level, and in another way."""
    b, q = locations.shape[:2]
    parts = []
    for level, v in enumerate(maps(value)):
        at = (locations.view(b, q, H, L, 2, 2).select(3, level) - 0.5) * 2.0
        parts.append(F.grid_sample(v, at.transpose(1, 2).flatten(0, 1), align_corners=False))
    samples = torch.stack(parts, -2).flatten(-2)
    return queries_first((samples * by_head(weights)).sum(-1))


def border(value, locations, weights):
    samples = sampled(value, locations, padding_mode="border", align_corners=True)
    samples = torch.stack(samples, dim=-2).flatten(-2)
    return queries_first((samples * by_head(weights)).sum(-1))


def nearest(value, locations, weights):
    samples = torch.stack(sampled(value, locations, mode="nearest"), dim=-2).flatten(-2)
    return queries_first((samples * by_head(weights)).sum(-1))


def looked_up(value, locations, weights):
    """RT-DETRv2's discrete sampling: rounded, clamped, and read by an index."""
    b, q = locations.shape[:2]
    at = locations.permute(0, 2, 1, 3, 4).flatten(0, 1).split(UNEQUAL, -2)
    parts = []
    for v, (h, w), g, n in zip(maps(value), GRIDS, at, UNEQUAL, strict=True):
        place = (g * torch.tensor([[w, h]]) + 0.5).to(torch.int64)
        place = torch.stack([place[..., 0].clamp(0, w - 1), place[..., 1].clamp(0, h - 1)], -1)
        place = place.reshape(b * H, q * n, 2)
        rows = torch.arange(b * H).unsqueeze(-1).repeat(1, q * n)
        found = v[rows, :, place[..., 1], place[..., 0]]
        parts.append(found.transpose(1, 2).reshape(b * H, C, q, n))
    return queries_first((torch.cat(parts, -1) * by_head(weights)).sum(-1))


def other_order(value, locations, weights):
    """The coarsest level first."""
    samples = torch.stack(sampled(value, locations)[::-1], dim=-2).flatten(-2)
    weights = by_head(weights).unflatten(-1, (L, -1)).flip(-2).flatten(-2)
    return queries_first((samples * weights).sum(-1))


def every_head_alike(value, locations, weights):
    """Locations of the first head serve all heads."""
    locations = locations[:, :, :1].expand(-1, -1, H, -1, -1)
    samples = torch.stack(sampled(value, locations), dim=-2).flatten(-2)
    return queries_first((samples * by_head(weights)).sum(-1))


def reflected(value, locations, weights):
    samples = sampled(value, locations, padding_mode="reflection")
    return queries_first((torch.stack(samples, -2).flatten(-2) * by_head(weights)).sum(-1))


def seen(locations):
    """Which points are on the map."""
    return ((locations > 0) & (locations < 1)).all(-1)


def seen_points(value, locations, weights):
    """Points outside of the map do not count, the others do for them."""
    weights = weights * seen(locations)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    return stacked_levels(value, locations, weights)


def hidden_points(value, locations, weights):
    return concatenated(value, locations, weights.masked_fill(~seen(locations), 0.0))


def summed_cameras(value, locations, weights):
    """BEVFormer's spatial cross attention in its static form: the mean over the cameras, here the
    batch, that see a query."""
    visible = seen(locations).flatten(2).any(-1)[..., None]
    out = stacked_levels(value, locations, weights) * visible
    return out.sum(0) / visible.sum(0).clamp(min=1)


def without_weights(value, locations, weights):
    return queries_first(torch.stack(sampled(value, locations), -2).flatten(-2).sum(-1))


def averaged(value, locations, weights):
    samples = torch.stack(sampled(value, locations), -2)
    weights = by_head(weights).unflatten(-1, samples.shape[-2:])
    return queries_first((samples * weights).mean((-2, -1)))


def averaged_without_weights(value, locations, weights):
    return queries_first(torch.cat(sampled(value, locations), -1).mean(-1))


#: forms that compute something else than the sum over their inputs
OTHER = (looked_up, every_head_alike, seen_points, hidden_points, summed_cameras,
         without_weights, averaged, averaged_without_weights)

TABLE = [
    Spelling(stacked_levels), Spelling(points_before_levels), Spelling(einsum),
    Spelling(matrix_product), Spelling(added_levels), Spelling(added_in_place),
    Spelling(sums_of_levels), Spelling(concatenated, UNEQUAL), Spelling(channels_last),
    Spelling(rows_of_points), Spelling(other_range),
    Spelling(border, padding="border", align_corners=True), Spelling(nearest, mode="nearest"),
    Spelling(reflected, padding="reflection"),
    Spelling(looked_up, UNEQUAL, mode="nearest", padding="border", parts=True),
    Spelling(other_order, parts=True), Spelling(every_head_alike), Spelling(seen_points),
    Spelling(hidden_points, UNEQUAL), Spelling(summed_cameras), Spelling(without_weights),
    Spelling(averaged), Spelling(averaged_without_weights, UNEQUAL),
]


# -- near misses -----------------------------------------------------------------------------------
def greatest(value, locations, weights):
    samples = torch.stack(sampled(value, locations), -2).flatten(-2)
    return queries_first((samples * by_head(weights)).amax(-1))


def returned_as_well(value, locations, weights):
    samples = torch.stack(sampled(value, locations), -2).flatten(-2)
    return queries_first((samples * by_head(weights)).sum(-1)), samples


def squashed(value, locations, weights):
    samples = torch.stack(sampled(value, locations), -2).flatten(-2)
    return queries_first((samples.tanh() * by_head(weights)).sum(-1))


def weighted_channels(value, locations, weights):
    """The weights tell channels apart, too."""
    samples = torch.stack(sampled(value, locations), -2).flatten(-2)
    weights = by_head(weights) * torch.linspace(0, 1, C).view(C, 1, 1)
    return queries_first((samples * weights).sum(-1))


def over_the_batch(value, locations, weights):
    samples = torch.stack(sampled(value, locations), -2).flatten(-2)
    return (samples * by_head(weights)).sum((0, -1))


def bicubic(value, locations, weights):
    samples = sampled(value, locations, mode="bicubic")
    return queries_first((torch.stack(samples, -2).flatten(-2) * by_head(weights)).sum(-1))


def point_loss(value, locations, weights):
    """Logits at points, as losses of mask predictions have it."""
    first = maps(value)[0]
    at = grids(locations)[0].flatten(1, 2).unsqueeze(2)
    logits = F.grid_sample(first, at, align_corners=False).squeeze(3)
    return F.binary_cross_entropy_with_logits(logits, logits.detach().sigmoid())


def position_embedding(value, locations, weights):
    """A table that is interpolated at the places of tokens, and added to them."""
    table = maps(value)[0]
    at = grids(locations)[0]
    found = F.grid_sample(table, at, padding_mode="border", align_corners=False)
    return found.flatten(2).transpose(1, 2) + weights.mean()


def one_of_two_levels_counts(value, locations, weights):
    """A level that is added without weights: two sums."""
    first, second, _ = sampled(value, locations)
    weights = by_head(weights).unflatten(-1, (L, -1))[..., 0, :]
    return queries_first((first * weights).sum(-1) + second.sum(-1))


def unclamped(value, locations, weights):
    """A look-up whose indices may count from the other end."""
    b, q = locations.shape[:2]
    place = (locations[..., :2, :].permute(0, 2, 1, 3, 4).flatten(0, 1) * 2).to(torch.int64)
    rows = torch.arange(b * H)[:, None, None].expand(-1, q, 2)
    found = maps(value)[2][rows, :, place[..., 1] - 1, place[..., 0] - 1]
    weights = by_head(weights)[:, 0, :, :2].unsqueeze(-1)
    return queries_first((found * weights).sum(2).transpose(1, 2))


NEAR = [greatest, returned_as_well, squashed, weighted_channels, over_the_batch,
        bicubic, point_loss, position_embedding, one_of_two_levels_counts, unclamped]
