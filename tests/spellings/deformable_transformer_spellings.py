"""Deformable transformers: keys and values sampled where learned offsets say, then attention.

`Sampled2D` is the deformable attention of DAT (arXiv 2201.00520) with each of its position biases,
by its formula:

    p = tanh(offsets(q)) * range * factor + reference      or  clamp(offsets(q) + reference, -1, 1)
    x' = x sampled at p, k = Wk x', v = Wv x'
    s = q k^T / sqrt(d) + bias,     bias = table sampled at (grid(q) - p) / 2

`Sampled1D` and `Sampled3D` normalise their offset grid, sample with the axes in the order of the
grid, and have a bias that a small network makes of signed logarithms of displacements (the
continuous position bias of Swin v2, arXiv 2111.09883).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Bias = Callable[["Sampled2D", Tensor, Tensor], Tensor]


def grid_of(module: Sampled2D) -> Tensor:
    """The places (y, x) of the queries in [-1, 1], by arithmetic in place."""
    h, w = module.size
    y, x = torch.meshgrid(torch.arange(h, dtype=torch.float32),
                          torch.arange(w, dtype=torch.float32), indexing="ij")
    places = torch.stack((y, x), -1)
    places[..., 1].div_(w - 1.0).mul_(2.0).sub_(1.0)
    places[..., 0].div_(h - 1.0).mul_(2.0).sub_(1.0)
    return places


@torch.no_grad()
def grid_without_gradients(module: Sampled2D) -> Tensor:
    return grid_of(module)


def grid_by_linspace(module: Sampled2D) -> Tensor:
    h, w = module.size
    lines = (torch.linspace(-1.0, 1.0, h), torch.linspace(-1.0, 1.0, w))
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)


def grid_buffer(module: Sampled2D) -> Tensor:
    return module.places


def grid_of_centres(module: Sampled2D) -> Tensor:
    """Between the entries of the table: no steps of one."""
    h, w = module.size
    lines = [(torch.arange(n) + 0.5) / n * 2 - 1 for n in (h, w)]
    return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)


# -- the bias (B * heads, H * W, samples) ---------------------------------------------------------
def displaced(module: Sampled2D, positions: Tensor, factor: float) -> Tensor:
    """(grid(q) - p) * factor as (B * groups, H * W, samples, 2)."""
    n = positions.shape[0]
    grid = module.grid(module).to(positions)[None].expand(n, -1, -1, -1)
    queries = grid.reshape(n, -1, 2).unsqueeze(2)
    return (queries - positions.reshape(n, -1, 2).unsqueeze(1)).mul(factor)


def per_group(module: Sampled2D, batch: int) -> Tensor:
    """The table as (B * groups, heads of a group, 2H - 1, 2W - 1)."""
    whole = module.table[None].expand(batch, -1, -1, -1)
    return whole.reshape(batch * module.groups, module.heads // module.groups,
                         *module.table.shape[-2:])


def by_table(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    batch = positions.shape[0] // module.groups
    found = F.grid_sample(per_group(module, batch), displaced(module, positions, 0.5)[..., (1, 0)],
                          mode="bilinear", align_corners=True)
    return found.reshape(batch * module.heads, q.shape[-1], -1)


def by_flipped_table(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    """The coordinates turned by flip, sums in another order, a table for all groups at once."""
    n, h, w = positions.shape[0], *module.size
    batch = n // module.groups
    places = module.grid(module).to(positions).reshape(1, h * w, 1, 2)
    apart = 0.5 * places - positions.reshape(n, 1, -1, 2) / 2
    table = module.table.unflatten(0, (module.groups, -1)).repeat(batch, 1, 1, 1)
    found = F.grid_sample(table, apart.flip(-1), align_corners=True)
    return found.flatten(0, 1)


def by_table_of_centres(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    """align_corners=False: a step of the grid is one entry where the grid says so."""
    batch, (h, w) = positions.shape[0] // module.groups, module.size
    y, x = displaced(module, positions, 1.0).unbind(-1)
    apart = torch.stack((x * ((w - 1) / (2 * w - 1)), y * ((h - 1) / (2 * h - 1))), -1)
    found = F.grid_sample(per_group(module, batch), apart, align_corners=False)
    return found.reshape(batch * module.heads, q.shape[-1], -1)


def by_table_with_border(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    batch = positions.shape[0] // module.groups
    found = F.grid_sample(per_group(module, batch), displaced(module, positions, 0.5)[..., (1, 0)],
                          padding_mode="border", align_corners=True)
    return found.reshape(batch * module.heads, q.shape[-1], -1)


def by_fixed_table(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    batch = positions.shape[0] // module.groups
    whole = module.fixed[None].expand(batch, -1, -1, -1)
    return whole.reshape(batch * module.heads, q.shape[-1], -1)


def by_network(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    """log-CPB: a network of signed logarithms of displacements."""
    apart = displaced(module, positions, 4.0)
    apart = torch.sign(apart) * torch.log2(torch.abs(apart) + 1.0) / math.log2(8.0)
    found = module.network(apart)  # (B * groups, queries, samples, heads of a group)
    return found.permute(0, 3, 1, 2).flatten(0, 1)


# -- near misses: no integer grid, or no one fraction for a key -----------------------------------
def by_another_step(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    batch = positions.shape[0] // module.groups
    found = F.grid_sample(per_group(module, batch), displaced(module, positions, 0.4)[..., (1, 0)],
                          align_corners=True)
    return found.reshape(batch * module.heads, q.shape[-1], -1)


def by_corners_of_centres(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    """The other align_corners: steps of (2 H - 1) / (2 H - 2)."""
    batch = positions.shape[0] // module.groups
    found = F.grid_sample(per_group(module, batch), displaced(module, positions, 0.5)[..., (1, 0)],
                          align_corners=False)
    return found.reshape(batch * module.heads, q.shape[-1], -1)


def by_bent_displacements(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    """tanh of a displacement is no difference of a query and a key."""
    batch = positions.shape[0] // module.groups
    apart = displaced(module, positions, 0.5).tanh()
    found = F.grid_sample(per_group(module, batch), apart[..., (1, 0)], align_corners=True)
    return found.reshape(batch * module.heads, q.shape[-1], -1)


def by_scaled_queries(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    """Displacements scaled by what a query says."""
    batch = positions.shape[0] // module.groups
    apart = displaced(module, positions, 0.5)
    scale = q.unflatten(0, (batch * module.groups, -1)).mean((1, 2)).sigmoid()
    apart = apart * scale[:, :, None, None]
    found = F.grid_sample(per_group(module, batch), apart[..., (1, 0)], align_corners=True)
    return found.reshape(batch * module.heads, q.shape[-1], -1)


def by_nearest(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    batch = positions.shape[0] // module.groups
    found = F.grid_sample(per_group(module, batch), displaced(module, positions, 0.5)[..., (1, 0)],
                          mode="nearest", align_corners=True)
    return found.reshape(batch * module.heads, q.shape[-1], -1)


def by_reflection(module: Sampled2D, positions: Tensor, q: Tensor) -> Tensor:
    batch = positions.shape[0] // module.groups
    found = F.grid_sample(per_group(module, batch), displaced(module, positions, 0.5)[..., (1, 0)],
                          padding_mode="reflection", align_corners=True)
    return found.reshape(batch * module.heads, q.shape[-1], -1)


TABLES: list[Bias] = [by_table, by_flipped_table, by_table_of_centres, by_table_with_border]
OTHERS: list[Bias | None] = [by_fixed_table, by_network, None]
NEAR_MISSES: list[Bias] = [by_another_step, by_corners_of_centres, by_bent_displacements,
                           by_scaled_queries, by_nearest, by_reflection]
GRIDS = [grid_of, grid_without_gradients, grid_by_linspace, grid_buffer]


class Sampled2D(nn.Module):
    """x (B, C, H, W) -> (B, C, H, W).

    factor: of the range of offsets; negative: no range, positions clamped
    """

    places: Tensor

    def __init__(self, size: tuple[int, int], heads: int = 4, groups: int = 2, head_dim: int = 8,
                 stride: int = 2, bias: Bias | None = by_table, factor: float = 2.0,
                 grid: Callable[[Sampled2D], Tensor] = grid_of, kernel: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        channels = heads * head_dim
        own = channels // groups
        self.size, self.heads, self.groups, self.factor = size, heads, groups, factor
        self.scale, self.bias, self.grid = head_dim**-0.5, bias, grid
        self.offsets = nn.Sequential(
            nn.Conv2d(own, own, kernel, stride, kernel // 2, groups=own), nn.GELU(),
            nn.Conv2d(own, 2, 1, bias=False))
        self.query, self.key, self.value, self.out = (
            nn.Conv2d(channels, channels, 1) for _ in range(4))
        h, w = size
        samples = math.prod((n + 2 * (kernel // 2) - kernel) // stride + 1 for n in size)
        self.network = nn.Sequential(nn.Linear(2, 8), nn.ReLU(),
                                     nn.Linear(8, heads // groups, bias=False))
        for p in self.parameters():
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) / max(
                    1.0, p[0].numel() ** 0.5))
        self.table = nn.Parameter(torch.randn(heads, 2 * h - 1, 2 * w - 1, generator=generator))
        self.fixed = nn.Parameter(torch.randn(heads, h * w, samples, generator=generator))
        self.register_buffer("places", grid_of(self), persistent=False)

    @torch.no_grad()
    def reference(self, h: int, w: int, like: Tensor) -> Tensor:
        """Centres of cells, over h - 1 and w - 1: beyond -1 and 1 at the rim."""
        lines = [torch.linspace(0.5, n - 0.5, n, dtype=like.dtype, device=like.device)
                 .div(max(n - 1.0, 1.0)).mul(2.0).sub(1.0) for n in (h, w)]
        return torch.stack(torch.meshgrid(*lines, indexing="ij"), -1)

    def positions(self, q: Tensor) -> Tensor:
        """(B * groups, h, w, 2) in the order (y, x)."""
        offsets = self.offsets(q.reshape(-1, q.shape[1] // self.groups, *self.size)).contiguous()
        h, w = offsets.shape[2:]
        if self.factor >= 0:
            reach = torch.tensor([1.0 / max(h - 1.0, 1.0), 1.0 / max(w - 1.0, 1.0)])
            offsets = offsets.tanh().mul(reach.reshape(1, 2, 1, 1).to(offsets)).mul(self.factor)
        offsets = offsets.permute(0, 2, 3, 1)
        reference = self.reference(h, w, offsets)[None].expand(offsets.shape[0], -1, -1, -1)
        found = offsets + reference
        return found if self.factor >= 0 else found.clamp(-1.0, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        q = self.query(x)
        positions = self.positions(q)
        samples = positions.shape[1] * positions.shape[2]
        sampled = F.grid_sample(x.reshape(b * self.groups, -1, h, w), positions[..., (1, 0)],
                                mode="bilinear", align_corners=True).reshape(b, c, 1, samples)
        q = q.reshape(b * self.heads, -1, h * w)
        k, v = (f(sampled).reshape(b * self.heads, -1, samples) for f in (self.key, self.value))
        scores = torch.einsum("bcm,bcn->bmn", q, k).mul(self.scale)
        if self.bias is not None:
            scores = scores + self.bias(self, positions, q)
        weights = F.softmax(scores, dim=2)
        out = torch.einsum("bmn,bcn->bcm", weights, v).reshape(b, c, h, w)
        return self.out(out)


# -- one and three axes ---------------------------------------------------------------------------
def normalised(grid: Tensor, dim: int = 1) -> Tensor:
    """Places of a grid in [-1, 1], axis by axis in their own order, which comes last then."""
    parts = [2.0 * g / max(n - 1, 1) - 1.0
             for g, n in zip(grid.unbind(dim), grid.shape[2:], strict=True)]
    return torch.stack(parts, -1)


class Displacements(nn.Module):
    """(B * groups, heads of a group, queries, samples) of places of queries and of samples."""

    def __init__(self, axes: int, width: int, heads: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(axes, width), nn.ReLU(), nn.Linear(width, heads))

    def forward(self, queries: Tensor, samples: Tensor) -> Tensor:
        apart = queries[None, :, None] - samples[:, None]
        return self.layers(apart.sign() * (apart.abs() + 1).log()).permute(0, 3, 1, 2)


class _Sampled(nn.Module):
    """What `Sampled1D` and `Sampled3D` share: x (B, C, *size) -> (B, C, *size)."""

    axes: int

    def __init__(self, channels: int = 16, heads: int = 4, groups: int = 2, stride: int = 2,
                 reach: float = 2.0, shifted: bool = True) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(9)
        conv: Any = {1: nn.Conv1d, 3: nn.Conv3d}[self.axes]
        self.heads, self.groups, self.stride, self.reach = heads, groups, stride, reach
        self.shifted, self.scale = shifted, (channels // heads) ** -0.5
        own = channels // groups
        self.offsets = nn.Sequential(conv(own, own, stride + 2, stride, 1, groups=own), nn.GELU(),
                                     conv(own, self.axes, 1, bias=False), nn.Tanh())
        self.query, self.key, self.value = (
            conv(channels, channels, 1, groups=groups, bias=False) for _ in range(3))
        self.out = conv(channels, channels, 1)
        self.distances = Displacements(self.axes, 8, heads // groups)
        for p in self.parameters():
            with torch.no_grad():
                p.copy_(torch.randn(p.shape, generator=generator) / max(1.0, p[0].numel() ** 0.5))

    def sample(self, features: Tensor, places: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        b, c, *size = x.shape
        q = self.query(x)
        offsets = self.offsets(q.reshape(b * self.groups, -1, *size)) * self.reach
        lines = [torch.arange(n, dtype=x.dtype, device=x.device) for n in offsets.shape[2:]]
        grid = torch.stack(torch.meshgrid(*lines, indexing="ij"))
        places = normalised(grid + offsets)  # (B * groups, *samples, axes)
        features = self.sample(x.reshape(b * self.groups, -1, *size), places)
        features = features.reshape(b, c, *places.shape[1:-1])
        k, v = self.key(features), self.value(features)
        q = q * self.scale
        q, k, v = (t.reshape(b, self.heads, c // self.heads, -1).transpose(-1, -2)
                   for t in (q, k, v))
        scores = torch.einsum("bhid,bhjd->bhij", q, k)
        rows = normalised(torch.stack(torch.meshgrid(*(
            torch.arange(n, dtype=x.dtype) for n in size), indexing="ij"))[None])[0]
        bias = self.distances(rows.reshape(-1, self.axes), places.flatten(1, -2))
        scores = scores + bias.reshape(b, self.heads, *bias.shape[-2:])
        if self.shifted:
            scores = scores - scores.amax(dim=-1, keepdim=True).detach()
        out = torch.einsum("bhij,bhjd->bhid", scores.softmax(dim=-1), v)
        return self.out(out.transpose(-1, -2).reshape(b, c, *size))


class Sampled1D(_Sampled):
    """A line, sampled as an image of one row."""

    axes = 1

    def sample(self, features: Tensor, places: Tensor) -> Tensor:
        grid = torch.cat([places, torch.zeros_like(places)], -1)[:, None]
        return F.grid_sample(features[:, :, None], grid, mode="bilinear", padding_mode="zeros",
                             align_corners=False)


class Sampled3D(_Sampled):
    """A volume, sampled at (f, h, w) where grid_sample reads (x, y, z) = (w, h, f)."""

    axes = 3

    def sample(self, features: Tensor, places: Tensor) -> Tensor:
        return F.grid_sample(features, places, mode="bilinear", padding_mode="zeros",
                             align_corners=False)
