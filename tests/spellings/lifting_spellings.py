"""Deformable lifting (DFA3D, Li et al., ICCV 2023) with its volume built, in many spellings.

    volume[b, h, c, z, y, x] = value[b, h, c, y, x] * depth[b, (h,) z, y, x]
    out[b, q, h, :] = sum over levels and points of  weight * sample(volume of the level, location)

`Lifting` takes (value, depth, locations, weights) as the op has them: (B, S, H, C), (B, S, D) or
(B, S, H, D), (B, Q, H, L, P, 3) in 0 to 1, (B, Q, H, L, P). A `Volume` makes the volume of a level,
(B*H, C, D, h, w), from (B, h, w, H, C) and (B, h, w, H or 1, D).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Volume = Callable[[Tensor, Tensor], Tensor]


# -- volumes ---------------------------------------------------------------------------------------
def by_multiplication(value: Tensor, depth: Tensor) -> Tensor:
    """Texels first, then permuted, as DFA3D's formula reads."""
    volume = value.unsqueeze(-1) * depth.unsqueeze(-2)
    return volume.permute(0, 3, 4, 5, 1, 2).flatten(0, 1)


def depth_first(value: Tensor, depth: Tensor) -> Tensor:
    """Heads folded into the batch before the product; the depth is the left factor."""
    b, h, w, heads, c = value.shape
    features = value.permute(0, 3, 4, 1, 2).reshape(b * heads, c, h, w)
    depth = depth.expand(b, h, w, heads, -1).permute(0, 3, 4, 1, 2).flatten(0, 1)
    return depth[:, None] * features[:, :, None]


def by_repeat(value: Tensor, depth: Tensor) -> Tensor:
    """The depth repeated over heads, as DFA3D's fork of BEVFormer does."""
    b, h, w, heads, c = value.shape
    if depth.shape[3] == 1:
        depth = depth.repeat(1, 1, 1, heads, 1)
    features = value.permute(0, 3, 4, 1, 2).contiguous().view(b * heads, c, h, w)
    depth = depth.permute(0, 3, 4, 1, 2).contiguous().view(b * heads, -1, h, w)
    return features.unsqueeze(2) * depth.unsqueeze(1)


def by_einsum(value: Tensor, depth: Tensor) -> Tensor:
    if depth.shape[3] == 1:
        return torch.einsum("byxhc,byxd->bhcdyx", value, depth.squeeze(3)).flatten(0, 1)
    return torch.einsum("byxhc,byxhd->bhcdyx", value, depth).flatten(0, 1)


def by_expansion(value: Tensor, depth: Tensor) -> Tensor:
    b, h, w, heads, c = value.shape
    full = b, heads, c, depth.shape[-1], h, w
    volume = value.permute(0, 3, 4, 1, 2).unsqueeze(3).expand(full) * depth.permute(
        0, 3, 4, 1, 2).unsqueeze(2).expand(full)
    return volume.reshape(b * heads, c, -1, h, w)


def by_matmul(value: Tensor, depth: Tensor) -> Tensor:
    """A column times a row for each texel."""
    b, h, w, heads, c = value.shape
    depth = depth.expand(b, h, w, heads, -1)
    volume = value.reshape(-1, c, 1) @ depth.reshape(b * h * w * heads, 1, -1)
    return volume.view(b, h, w, heads, c, -1).permute(0, 3, 4, 5, 1, 2).flatten(0, 1)


def stacked(value: Tensor, depth: Tensor) -> Tensor:
    """A product for each depth."""
    slices = [value * depth[..., i:i + 1] for i in range(depth.shape[-1])]
    return torch.stack(slices, -1).permute(0, 3, 4, 5, 1, 2).flatten(0, 1)


def by_cat(value: Tensor, depth: Tensor) -> Tensor:
    """A slab for each depth."""
    b, h, w, heads, c = value.shape
    features = value.permute(0, 3, 4, 1, 2).unsqueeze(3)
    slabs = [features * depth[..., i].permute(0, 3, 1, 2)[:, :, None, None]
             for i in range(depth.shape[-1])]
    return torch.cat(slabs, 3).flatten(0, 1)


VOLUMES: dict[str, Volume] = {
    "multiplication": by_multiplication, "depth_first": depth_first, "repeat": by_repeat,
    "einsum": by_einsum, "expansion": by_expansion, "matmul": by_matmul, "stacked": stacked,
    "cat": by_cat,
}


# -- sums ------------------------------------------------------------------------------------------
class Lifting(nn.Module):
    """A loop over levels with a volume each.

    mean_like: how samples are summed: "stack" (Deformable-DETR's), "levels" (a sum for each level,
    added) or "einsum"
    """

    def __init__(self, shapes: Sequence[tuple[int, int]], volume: Volume = by_multiplication,
                 sums: str = "stack", **sampling: object) -> None:
        super().__init__()
        self.shapes, self.volume, self.sums = list(shapes), volume, sums
        self.sampling = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False,
                         **sampling}

    def forward(self, value: Tensor, depth: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        b, _, heads, c = value.shape
        queries, levels, points = locations.shape[1], locations.shape[3], locations.shape[4]
        if depth.dim() == 3:
            depth = depth.unsqueeze(2)
        counts = [h * w for h, w in self.shapes]
        samples = []
        for i, (own, deep) in enumerate(zip(value.split(counts, 1), depth.split(counts, 1),
                                            strict=True)):
            h, w = self.shapes[i]
            volume = self.volume(own.reshape(b, h, w, heads, c),
                                 deep.reshape(b, h, w, *deep.shape[2:]))
            grid = 2 * locations[:, :, :, i].transpose(1, 2).flatten(0, 1).unsqueeze(1) - 1
            samples.append(F.grid_sample(volume, grid, **self.sampling).squeeze(2))
        if self.sums == "levels":
            out: Tensor | int = 0
            for i, sample in enumerate(samples):
                own = weights[:, :, :, i].transpose(1, 2).reshape(b * heads, 1, queries, points)
                out = out + (sample * own).sum(-1)
            return out.view(b, heads * c, queries).transpose(1, 2)
        if self.sums == "einsum":
            return torch.einsum("bhcqlp,bqhlp->bqhc", torch.stack(samples, -2).view(
                b, heads, c, queries, levels, points), weights).flatten(2)
        weights = weights.transpose(1, 2).reshape(b * heads, 1, queries, levels * points)
        out = (torch.stack(samples, -2).flatten(-2) * weights).sum(-1)
        return out.view(b, heads * c, queries).transpose(1, 2).contiguous()


def inputs(shapes: Sequence[tuple[int, int]], *, batch: int = 2, queries: int = 7, heads: int = 3,
           channels: int = 4, points: int = 2, depths: int = 5, own_depths: bool = False,
           dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, ...]:
    """(value, depth, locations, weights); locations reach outside of the grid and of the depths."""
    generator = torch.Generator().manual_seed(seed)
    texels = sum(h * w for h, w in shapes)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    value = draw(batch, texels, heads, channels)
    depth = draw(batch, texels, *([heads] if own_depths else []), depths).softmax(-1)
    locations = draw(batch, queries, heads, len(shapes), points, 3) * 0.5 + 0.5
    weights = draw(batch, queries, heads, len(shapes) * points).softmax(-1).unflatten(
        -1, (len(shapes), points))
    return tuple(t.to(dtype) for t in (value, depth, locations, weights))


# -- other products --------------------------------------------------------------------------------
def by_depths_alone(value: Tensor, depth: Tensor) -> Tensor:
    """The same distribution for every texel."""
    return by_multiplication(value, depth.mean((1, 2), keepdim=True))


def by_rows(value: Tensor, depth: Tensor) -> Tensor:
    """Depths of a texel's row, and features of its column."""
    return by_multiplication(value.mean(1, keepdim=True).expand_as(value), depth[:, :, :1])


def of_other_texels(value: Tensor, depth: Tensor) -> Tensor:
    """Depths that belong to the texels of another column."""
    return by_multiplication(value, depth.roll(1, 2))


def transposed(value: Tensor, depth: Tensor) -> Tensor:
    """Depths with rows and columns exchanged; for square grids."""
    return by_multiplication(value, depth.transpose(1, 2))


def of_constants(value: Tensor, depth: Tensor) -> Tensor:
    """No gradient to the depths."""
    return by_multiplication(value, depth.detach())


OTHER: dict[str, Volume] = {
    "depths_alone": by_depths_alone, "rows": by_rows, "other_texels": of_other_texels,
    "transposed": transposed, "constants": of_constants,
}


# -- volumes that are no outer products ------------------------------------------------------------
def clipped(value: Tensor, depth: Tensor) -> Tensor:
    return by_multiplication(value, depth).relu()


def shifted(value: Tensor, depth: Tensor) -> Tensor:
    return by_multiplication(value, depth) + 0.25


def emptied(value: Tensor, depth: Tensor) -> Tensor:
    """Written to after it was made: nothing is at the first depth."""
    volume = by_multiplication(value, depth).contiguous()
    volume[:, :, 0] = 0.0
    return volume


def doubled(value: Tensor, depth: Tensor) -> Tensor:
    """Multiplied in place by what varies along everything."""
    volume = by_multiplication(value, depth).contiguous()
    volume.mul_(volume.detach().sigmoid())
    return volume


def of_channels(value: Tensor, depth: Tensor) -> Tensor:
    """Depths that differ by channel."""
    volume = value.unsqueeze(-1) * (depth.unsqueeze(-2) * value.unsqueeze(-1)).softmax(-1)
    return volume.permute(0, 3, 4, 5, 1, 2).flatten(0, 1)


def summed(value: Tensor, depth: Tensor) -> Tensor:
    """A sum of two outer products."""
    other = depth.flip(-1)
    return torch.einsum("byxhcr,byxhdr->bhcdyx", torch.stack((value, value.cos()), -1),
                        torch.stack((depth, other), -1).expand(*value.shape[:4], -1, -1)).flatten(
                            0, 1)


NEAR_MISSES: dict[str, Volume] = {
    "clipped": clipped, "shifted": shifted, "emptied": emptied, "doubled": doubled,
    "channels": of_channels, "summed": summed,
}


class UsedElsewhere(Lifting):
    """The volume is part of the result."""

    def forward(self, value: Tensor, depth: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        kept: list[Tensor] = []
        made = self.volume

        def volume(*parts: Tensor) -> Tensor:
            kept.append(made(*parts))
            return kept[-1]

        self.volume = volume
        try:
            out = super().forward(value, depth, locations, weights)
        finally:
            self.volume = made
        return out + sum(v.mean() for v in kept)


class FeaturesWritten(Lifting):
    """The features change between the product and the sampling."""

    def forward(self, value: Tensor, depth: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        def volume(features: Tensor, deep: Tensor) -> Tensor:
            features = features * 1.0
            made = by_multiplication(features, deep)
            features.mul_(3.0)
            return made

        other = Lifting(self.shapes, volume, self.sums, **self.sampling)
        return other(value, depth, locations, weights)


class WithoutGradient(Lifting):
    """The volume is made where no gradient is recorded."""

    def forward(self, value: Tensor, depth: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        other = Lifting(self.shapes, torch.no_grad()(self.volume), self.sums, **self.sampling)
        return other(value, depth, locations, weights)


# -- bird's-eye views ------------------------------------------------------------------------------
class DepthLast(nn.Module):
    """One level, no heads; the depth is the fastest axis of the volume."""

    def forward(self, value: Tensor, depth: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        volume = value[..., None] * depth.permute(0, 2, 3, 1)[:, None]  # (N, C, H, W, D)
        samples = F.grid_sample(volume, locations, align_corners=True, padding_mode="border")
        return (samples * weights[:, None]).sum(-1)  # (N, C, queries, Z)


class Pillars(nn.Module):
    """Static spatial cross-attention of BEVFormer over DFA3D's volume: every query looks at every
    camera, weights are 0 where a pillar is out of view, cameras are averaged over those that see.

    value (B, N, C, h, w), depth (B, N, D, h, w), anchors (B, N, Q, Z, 3) in -1 to 1 with far-away
    numbers behind a camera, seen (B, N, Q, Z), offsets (B, Q, H, P, Z, 3), scores (B, Q, H, P, Z)
    """

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, value: Tensor, depth: Tensor, anchors: Tensor, seen: Tensor,
                offsets: Tensor, scores: Tensor) -> Tensor:
        b, n, c, h, w = value.shape
        queries, points, z = offsets.shape[1], offsets.shape[3], offsets.shape[4]
        heads = self.heads
        features = value.view(b * n, heads, c // heads, 1, h, w)
        volume = (features * depth.view(b * n, 1, 1, -1, h, w)).flatten(0, 1)
        places = anchors[:, :, :, None, None] + offsets[:, None]  # (B, N, Q, H, P, Z, 3)
        grid = places.permute(0, 1, 3, 2, 4, 5, 6).reshape(b * n * heads, queries, points, z, 3)
        samples = F.grid_sample(volume, grid, align_corners=False)  # (B*N*H, C, Q, P, Z)
        weights = scores.flatten(3).softmax(-1).unflatten(3, (points, z))
        weights = weights[:, None] * seen[:, :, :, None, None].to(value.dtype)
        weights = weights.permute(0, 1, 3, 2, 4, 5).reshape(b * n * heads, 1, queries, points, z)
        lifted = (samples * weights).sum((-2, -1)).view(b, n, c, queries)
        count = seen.any(-1).sum(1).clamp(min=1)  # (B, Q)
        return (lifted.sum(1) / count[:, None]).transpose(1, 2)


class Unweighted(nn.Module):
    """Features lifted to voxels: (N, C, Z, Y, X) from places of voxels in the camera."""

    def forward(self, value: Tensor, depth: Tensor, voxels: Tensor) -> Tensor:
        volume = torch.einsum("nchw,ndhw->ncdhw", value, depth)
        return F.grid_sample(volume, voxels, align_corners=False)
