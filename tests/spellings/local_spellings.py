"""Local attention as model authors spell it by moving data, and near misses that look like it.

A `Local` is a function of projected tokens q, k, v: maps (b, channels, height, width), or sequences
(b, heads, tokens, head_dim), as `inputs` says. `mask` is what the report must say of its
neighbourhood; near misses have none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

B, H, D = 2, 2, 4
HEIGHT, WIDTH, TOKENS = 6, 7, 24
R = 1
K = 2 * R + 1
MAP, SEQUENCE = (B, H * D, HEIGHT, WIDTH), (B, H, TOKENS, D)


@dataclass(frozen=True)
class Local:
    """One spelling. `more` are shapes of inputs behind q, k and v; `near` are near misses."""

    forward: Callable[..., Any]
    mask: str = ""
    shape: tuple[int, ...] = SEQUENCE
    setup: Callable[[nn.Module], None] | None = None
    more: tuple[tuple[int, ...], ...] = ()
    reason: str = ""

    @property
    def name(self) -> str:
        return self.forward.__name__

    def module(self) -> nn.Module:
        made = type("Local", (nn.Module,), {"forward": self.forward})()
        if self.setup is not None:
            self.setup(made)
        return made.eval()

    def inputs(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        rng = torch.Generator().manual_seed(3)
        shapes = [self.shape] * 3 + list(self.more)
        return [torch.randn(s, generator=rng).to(dtype) for s in shapes]


def heads(x: Tensor) -> Tensor:
    """(b, h d, y, x) as (b, h, y x, d)."""
    return x.reshape(B, H, D, HEIGHT * WIDTH).transpose(2, 3)


def columns(x: Tensor, size: int = K, **more: Any) -> Tensor:
    """F.unfold as (b, h, n, t, d)."""
    found = F.unfold(x, size, padding=size // 2, **more)
    return found.view(B, H, D, size * size, -1).permute(0, 1, 4, 3, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Any = 0.0) -> Tensor:
    scores = torch.einsum("bhnd,bhntd->bhnt", q, k) * D**-0.5 + bias
    return torch.einsum("bhnt,bhntd->bhnd", scores.softmax(-1), v)


def inside(size: int = K, **more: Any) -> Tensor:
    """Which places of a window lie on the map, as ones: (1, 1, n, t)."""
    found = F.unfold(torch.ones(1, 1, HEIGHT, WIDTH), size, padding=size // 2, **more)
    return found.view(1, 1, size * size, -1).transpose(2, 3)


# -- F.unfold -------------------------------------------------------------------------------------
def unfolded(self, q, k, v):
    return attend(heads(q), columns(k), columns(v))


def unfolded_masked(self, q, k, v):
    bias = torch.zeros_like(inside()).masked_fill(inside() == 0, -math.inf)
    return attend(heads(q), columns(k), columns(v), bias)


def unfolded_together(self, q, k, v):
    both = F.unfold(torch.cat([k, v], 1), K, padding=R).view(B, 2, H, D, K * K, -1)
    k, v = both.permute(1, 0, 2, 5, 4, 3)
    return attend(heads(q), k, v)


def split_projection(self, q, k, v):
    q, k, v = torch.cat([q, k, v], 1).chunk(3, 1)
    return attend(heads(q), columns(k), columns(v))


def unfolded_dilated(self, q, k, v):
    scores = (heads(q).unsqueeze(-2) @ F.unfold(k, K, dilation=2, padding=2).view(
        B, H, D, K * K, -1).permute(0, 1, 4, 2, 3)).squeeze(-2)
    values = F.unfold(v, K, dilation=2, padding=2).view(B, H, D, K * K, -1)
    return torch.einsum("bhnt,bhdtn->bhnd", scores.softmax(-1), values)


def unfolded_finite(self, q, k, v):
    return attend(heads(q), columns(k), columns(v), (1 - inside()) * -100.0)


def strided_queries(self, q, k, v):
    """Every second query of the map, as a local down-sampling does."""
    q = heads(q).view(B, H, HEIGHT, WIDTH, D)[:, :, ::2, ::2].flatten(2, 3)
    return attend(q, columns(k, stride=2), columns(v, stride=2))


def padding_mask(self, q, k, v, keep):
    seen = F.unfold((keep > -1.0).float(), K, padding=R).view(B, 1, K * K, -1).transpose(2, 3)
    scores = torch.einsum("bhnd,bhntd->bhnt", heads(q), columns(k)) * 0.5
    weights = scores.masked_fill(seen == 0, self.fill).softmax(-1)
    return torch.einsum("bhnt,bhntd->bhnd", weights, columns(v))


def filling(fill: float) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, "fill", fill)


def learned_bias(self, q, k, v):
    bias = self.bias[:, None].masked_fill(inside() == 0, -math.inf)
    return attend(heads(q), columns(k), columns(v), bias)


def with_bias(module: nn.Module) -> None:
    rng = torch.Generator().manual_seed(5)
    module.bias = nn.Parameter(torch.randn(H, K * K, generator=rng))


# -- Tensor.unfold --------------------------------------------------------------------------------
def windows(x: Tensor, mode: str = "constant") -> Tensor:
    """(b, h, d, y, x, i, j)."""
    padded = F.pad(x, (R, R, R, R), mode=mode)
    return padded.view(B, H, D, HEIGHT + 2 * R, -1).unfold(3, K, 1).unfold(4, K, 1)


def attend_windows(q: Tensor, k: Tensor, v: Tensor, bias: Any = 0.0) -> Tensor:
    q = q.view(B, H, D, HEIGHT, WIDTH)
    scores = torch.einsum("bhdyx,bhdyxij->bhyxij", q, k).flatten(-2) + bias
    weights = scores.softmax(-1).view(B, H, HEIGHT, WIDTH, K, K)
    return torch.einsum("bhyxij,bhdyxij->bhdyx", weights, v)


def tensor_unfold(self, q, k, v):
    return attend_windows(q, windows(k), windows(v))


def tensor_unfold_biased(self, q, k, v):
    """A bias on padded places too: the padded map has the keys then."""
    return attend_windows(q, windows(k), windows(v), self.bias[:, None, None])


def reflected(self, q, k, v):
    return attend_windows(q, windows(k, "reflect"), windows(v, "reflect"))


def causal_sequence(self, q, k, v):
    k, v = (F.pad(x, (0, 0, 4, 0)).unfold(2, 5, 1) for x in (k, v))
    place = torch.arange(TOKENS)[:, None] + torch.arange(5) - 4
    scores = torch.einsum("bhnd,bhndt->bhnt", q, k).masked_fill(place < 0, -math.inf)
    return torch.einsum("bhnt,bhndt->bhnd", scores.softmax(-1), v)


def matched(self, q, k, v):
    """Negative squared distances without the query's norm, invalid places at a fill (XRAVOS)."""
    def sample(x):
        found = F.pad(x, (R, R, R, R)).unfold(2, K, 1).unfold(3, K, 1)
        return found.permute(0, 1, 4, 5, 2, 3).reshape(B, -1, K * K, HEIGHT * WIDTH)
    plane = F.pad(torch.ones(1, 1, HEIGHT, WIDTH), (R, R, R, R), value=-1.0)
    plane = plane.unfold(2, K, 1).unfold(3, K, 1).permute(0, 1, 4, 5, 2, 3)
    invalid = torch.where(plane.reshape(1, K * K, -1) < 0, self.fill, 0.0)
    k, v, q = sample(k), sample(v), q.reshape(B, H * D, 1, -1)
    affinity = (2 * (k * q).sum(1) - k.pow(2).sum(1)) / math.sqrt(H * D) + invalid
    raised = torch.exp(affinity - affinity.amax(1, keepdim=True))
    return (v * (raised / raised.sum(1, keepdim=True)).unsqueeze(1)).sum(2)


def tiled(self, q, k, v):
    """Tiles of queries, keys of the tile and its surroundings, squared distances: local means."""
    side, wide = 2, 2 + 2 * R

    def tiles(x, size):
        padded = F.pad(x, ((size - side) // 2,) * 4, mode="reflect")
        return F.unfold(padded, size, stride=side).view(B, H * D, size * size, -1).permute(
            0, 3, 2, 1)
    q, k, v = tiles(q[..., :6], side), tiles(k[..., :6], wide), tiles(v[..., :6], wide)
    distance = q.pow(2).sum(-1, keepdim=True) + k.pow(2).sum(-1).unsqueeze(-2) \
        - 2 * q @ k.transpose(2, 3)
    own, place = torch.arange(side**2)[:, None], torch.arange(wide**2)
    down = (own // side + R - place // wide).abs() <= R
    across = (own % side + R - place % wide).abs() <= R
    weights = (-distance / 2).masked_fill(~(down & across), -math.inf).softmax(-1)
    return F.fold((weights @ v).permute(0, 3, 2, 1).reshape(B, -1, 9), (6, 6), side, stride=side)


# -- neighbour tables -----------------------------------------------------------------------------
def with_table(module: nn.Module) -> None:
    """The neighbours of NATTEN: windows pushed inward at the borders."""
    rows, cols = (((torch.arange(n) - R).clamp(0, n - K))[:, None] + torch.arange(K)
                  for n in (HEIGHT, WIDTH))
    table = rows[:, None, :, None] * WIDTH + cols[None, :, None, :]
    module.register_buffer("table", table.reshape(HEIGHT * WIDTH, K * K))
    offsets = [t - torch.arange(len(t))[:, None] + K - 1 for t in (rows, cols)]
    relative = offsets[0][:, None, :, None] * (2 * K - 1) + offsets[1][None, :, None, :]
    module.register_buffer("relative", relative.reshape(HEIGHT * WIDTH, K * K))
    rng = torch.Generator().manual_seed(5)
    module.rpb = nn.Parameter(torch.randn(H, (2 * K - 1) ** 2, generator=rng))


def table_indexed(self, q, k, v):
    q, k, v = map(heads, (q, k, v))
    return attend(q, k[:, :, self.table], v[:, :, self.table])


def table_selected(self, q, k, v):
    q, k, v = map(heads, (q, k, v))
    flat = self.table.flatten()
    k, v = (torch.index_select(x, 2, flat).view(B, H, -1, K * K, D) for x in (k, v))
    return attend(q, k, v)


def table_gathered(self, q, k, v):
    q, k, v = map(heads, (q, k, v))
    flat = self.table.flatten()[None, None, :, None].expand(B, H, -1, D)
    k, v = (torch.gather(x, 2, flat).unflatten(2, (-1, K * K)) for x in (k, v))
    scores = (q.unsqueeze(3) * k).sum(-1)
    return (scores.softmax(-1).unsqueeze(-1) * v).sum(3)


def table_biased(self, q, k, v):
    q, k, v = map(heads, (q, k, v))
    return attend(q, k[:, :, self.table], v[:, :, self.table], self.rpb[:, self.relative])


def clamped_and_masked(self, q, k, v):
    """Neighbours beyond the ends are clamped to them and masked."""
    place = torch.arange(TOKENS)[:, None] + torch.arange(-2, 3)
    table = place.clamp(0, TOKENS - 1)
    outside = (place < 0) | (place >= TOKENS)
    bias = torch.zeros(outside.shape).masked_fill(outside, -math.inf)
    return attend(q, k[:, :, table], v[:, :, table], bias)


# -- shifted copies -------------------------------------------------------------------------------
def shifted_slices(self, q, k, v):
    def copies(x):
        padded = F.pad(x, (R, R, R, R))
        return torch.stack([padded[:, :, i : i + HEIGHT, j : j + WIDTH]
                            for i in range(K) for j in range(K)], 1)
    scores = (q.unsqueeze(1) * copies(k)).sum(2)
    return (scores.softmax(1).unsqueeze(2) * copies(v)).sum(1)


def rolled(self, q, k, v):
    shifts = range(-2, 3)
    place = torch.arange(TOKENS)[:, None] - torch.tensor(list(shifts))
    outside = (place < 0) | (place >= TOKENS)
    k, v = (torch.stack([torch.roll(x, s, 2) for s in shifts], 3) for x in (k, v))
    scores = torch.einsum("bhnd,bhntd->bhnt", q, k).masked_fill(outside, -1e9)
    return torch.einsum("bhnt,bhntd->bhnd", scores.softmax(-1), v)


def joined_copies(self, q, k, v):
    def copies(x):
        gap = torch.zeros_like(x[:, :, :1])
        before = torch.cat([gap, x[:, :, :-1]], 2)
        after = torch.cat([x[:, :, 1:], gap], 2)
        return torch.cat([y.unsqueeze(3) for y in (before, x, after)], 3)
    return attend(q, copies(k), copies(v))


def assigned_copies(self, q, k, v):
    def copies(x):
        padded = torch.zeros(B, H, TOKENS + 2, D)
        padded[:, :, 1:-1] = x
        return torch.stack([padded[:, :, i : i + TOKENS] for i in range(3)], 3)
    return attend(q, copies(k), copies(v))


# -- chunks ---------------------------------------------------------------------------------------
WIDE = 6


def chunked(q: Tensor) -> Tensor:
    return q.reshape(B, H, TOKENS // WIDE, WIDE, D)


def attend_chunks(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = (chunked(q) @ k.transpose(-1, -2) / 2).masked_fill(~keep, -math.inf)
    return (scores.softmax(-1) @ v).flatten(2, 3)


def key_places() -> Tensor:
    return torch.arange(-WIDE, TOKENS + WIDE).unfold(0, 3 * WIDE, WIDE)


def chunks_joined(self, q, k, v):
    """Each chunk sees itself and both neighbours."""
    def around(x):
        x = F.pad(chunked(x), (0, 0, 0, 0, 1, 1))
        return torch.cat([x[:, :, :-2], x[:, :, 1:-1], x[:, :, 2:]], 3)
    place = key_places()
    return attend_chunks(q, around(k), around(v), ((place >= 0) & (place < TOKENS))[:, None])


def chunks_unfolded(self, q, k, v):
    """Overlapping chunks and a band, as in Longformer."""
    k, v = (F.pad(x, (0, 0, WIDE, WIDE)).unfold(2, 3 * WIDE, WIDE).transpose(3, 4)
            for x in (k, v))
    place, own = key_places()[:, None], torch.arange(TOKENS).view(-1, WIDE, 1)
    keep = (place >= 0) & (place < TOKENS) & ((place - own).abs() <= WIDE)
    return attend_chunks(q, k, v, keep)


def chunks_strided(self, q, k, v):
    def around(x):
        x = F.pad(x, (0, 0, WIDE, WIDE)).contiguous()
        size = (B, H, TOKENS // WIDE, 3 * WIDE, D)
        whole = (TOKENS + 2 * WIDE) * D
        return x.as_strided(size, (H * whole, whole, WIDE * D, D, 1))
    place = key_places()
    return attend_chunks(q, around(k), around(v), ((place >= 0) & (place < TOKENS))[:, None])


def look_back(self, q, k, v):
    """A chunk and the one before it, padded by -1 and masked, causal (local-attention)."""
    def around(x):
        x = F.pad(chunked(x), (0, 0, 0, 0, 1, 0), value=-1.0)
        return torch.cat([x[:, :, :-1], x[:, :, 1:]], 3)
    place = torch.arange(-WIDE, TOKENS).unfold(0, 2 * WIDE, WIDE)[:, None]
    own = torch.arange(TOKENS).view(-1, WIDE, 1)
    return attend_chunks(q, around(k), around(v), (place >= 0) & (place <= own))


def windows_of_heads(self, q, k, v):
    """Heads with windows of different size."""
    k, v = (F.pad(x, (0, 0, 2, 2)).unfold(2, 5, 1).transpose(3, 4) for x in (k, v))
    reach = (torch.arange(-2, 3).abs() <= torch.tensor([1, 2])[:, None])[:, None]
    bias = torch.zeros(reach.shape).masked_fill(~reach, -math.inf)
    return attend(q, k, v, bias)


# -- scores and weights that are moved ----------------------------------------------------------
OFFSETS = [(i, j) for i in range(K) for j in range(K)]


def shifted(x: Tensor, i: int, j: int) -> Tensor:
    return F.pad(x, (R, R, R, R))[:, :, i : i + HEIGHT, j : j + WIDTH]


def cost_volume(self, q, k, v):
    """Local matching: one correlation for each displacement, and a sum of shifted values."""
    cost = torch.stack([(q * shifted(k, i, j)).sum(1) for i, j in OFFSETS], 1) / math.sqrt(H * D)
    weights = cost.softmax(1)
    found = 0
    for n, (i, j) in enumerate(OFFSETS):
        found = found + weights[:, n : n + 1] * shifted(v, i, j)
    return found


def cost_volume_means(self, q, k, v):
    """Means, of heads, joined along a dimension of their own; values are stacked."""
    split = (B, H, D, HEIGHT, WIDTH)
    cost = torch.cat([(q.view(split) * shifted(k, i, j).view(split)).mean(2, keepdim=True)
                      for i, j in OFFSETS], 2)
    plane = F.unfold(torch.ones(1, 1, HEIGHT, WIDTH), K, padding=R).view(1, 1, -1, HEIGHT, WIDTH)
    weights = cost.masked_fill(plane == 0, -math.inf).softmax(2)
    values = torch.stack([shifted(v, i, j).view(split) for i, j in OFFSETS], 3)
    return (weights.unsqueeze(2) * values).sum(3)


def cost_volume_rolled(self, q, k, v):
    """Rolled sequences, each product scaled before they are stacked; a stack of results."""
    shifts = range(-2, 3)
    cost = torch.stack([torch.einsum("bhnd,bhnd->bhn", q, torch.roll(k, s, 2)) * D**-0.5
                        for s in shifts], -1)
    place = torch.arange(TOKENS)[:, None] - torch.tensor(list(shifts))
    weights = cost.masked_fill((place < 0) | (place >= TOKENS), -math.inf).softmax(-1)
    return torch.stack([weights[..., i, None] * torch.roll(v, s, 2)
                        for i, s in enumerate(shifts)]).sum(0)


def band_chunks(x: Tensor) -> Tensor:
    """(b, h, chunk, place, d) of a chunk and WIDE tokens on both of its sides."""
    return F.pad(x, (0, 0, WIDE, WIDE)).unfold(2, 3 * WIDE, WIDE).transpose(3, 4)


def beyond() -> Tensor:
    place = torch.arange(TOKENS)[:, None] + torch.arange(2 * WIDE + 1) - WIDE
    return (place < 0) | (place >= TOKENS)


def unskewed(weights: Tensor) -> Tensor:
    """Columns of a band as diagonals: (b, h, n, 2 w + 1) to (b, h, chunk, w, 3 w)."""
    padded = F.pad(weights.view(B, H, -1, WIDE, 2 * WIDE + 1), (0, WIDE)).flatten(3)
    return padded[..., :-WIDE].view(B, H, -1, WIDE, 3 * WIDE)


def skewed_chunks(self, q, k, v):
    """Diagonals of the scores of chunks as columns, by padding and viewing (Longformer)."""
    scores = chunked(q) @ band_chunks(k).transpose(-1, -2) / 2
    skewed = F.pad(scores.flatten(3), (0, WIDE)).view(B, H, -1, WIDE, 3 * WIDE + 1)
    band = skewed[..., : 2 * WIDE + 1].reshape(B, H, TOKENS, -1)
    weights = band.masked_fill(beyond(), -math.inf).softmax(-1)
    return (unskewed(weights) @ band_chunks(v)).flatten(2, 3)


def skewed_strides(self, q, k, v):
    """Likewise by strides, batch and heads in one dimension, an additive mask."""
    q, k, v = (x.reshape(B * H, 1, TOKENS, D) for x in (q, k, v))
    chunks = TOKENS // WIDE

    def around(x):
        return F.pad(x, (0, 0, WIDE, WIDE)).unfold(2, 3 * WIDE, WIDE).squeeze(1)
    scores = torch.einsum("acxd,acdy->acxy", q.view(-1, chunks, WIDE, D), around(k)).contiguous()
    size, row = (B * H, chunks, WIDE, 2 * WIDE + 1), 3 * WIDE
    band = scores.as_strided(size, (chunks * WIDE * row, WIDE * row, row + 1, 1))
    bias = torch.zeros(TOKENS, 2 * WIDE + 1).masked_fill(beyond(), -math.inf)
    weights = (band.reshape(B * H, TOKENS, -1) / 2 + bias).softmax(-1)
    padded = F.pad(weights.view(size), (0, WIDE)).flatten(2)[..., :-WIDE]
    found = torch.einsum("acxy,acdy->acxd", padded.view(-1, chunks, WIDE, row), around(v))
    return found.reshape(B, H, TOKENS, D)


def diagonals(self, q, k, v):
    """Diagonals of the whole score matrix, one after the other (no chunks, values unfolded)."""
    scores = q @ F.pad(k, (0, 0, 2, 2)).transpose(-1, -2)
    band = torch.stack([scores.diagonal(i, -2, -1)[..., :TOKENS] for i in range(5)], -1)
    place = torch.arange(TOKENS)[:, None] + torch.arange(5) - 2
    weights = band.masked_fill((place < 0) | (place >= TOKENS), -1e9).softmax(-1)
    return torch.einsum("bhnt,bhndt->bhnd", weights, F.pad(v, (0, 0, 2, 2)).unfold(2, 5, 1))


# -- near misses ----------------------------------------------------------------------------------
def window_over_channels(self, q, k, v):
    k, v = (F.pad(x, (1, 1)).unfold(3, 3, 1) for x in (k, v))
    scores = torch.einsum("bhnd,bhndt->bhnt", q, k)
    return torch.einsum("bhnt,bhndt->bhnd", scores.softmax(-1), v)


def other_values(self, q, k, v):
    """Values are those of the next window."""
    k = torch.stack([torch.roll(k, s, 2) for s in (-1, 0, 1)], 3)
    v = torch.stack([torch.roll(v, s, 2) for s in (0, 1, 2)], 3)
    return attend(q, k, v)


def twice_the_same(self, q, k, v):
    table = (torch.arange(TOKENS)[:, None] + torch.arange(-2, 3)).clamp(0, TOKENS - 1)
    return attend(q, k[:, :, table], v[:, :, table])


def table_of_the_user(self, q, k, v, places):
    table = (torch.arange(TOKENS)[:, None] + torch.arange(-2, 3) + places.long() * 0) % TOKENS
    return attend(q, k[:, :, table], v[:, :, table])


def random_table(self, q, k, v):
    return attend(q, k[:, :, self.table], v[:, :, self.table])


def with_random_table(module: nn.Module) -> None:
    rng = torch.Generator().manual_seed(9)
    module.register_buffer("table", torch.stack(
        [torch.randperm(TOKENS, generator=rng)[:5] for _ in range(TOKENS)]))


def values_of_others(self, q, k, v):
    """A cost volume whose values are shifted the other way."""
    weights = torch.stack([(q * shifted(k, i, j)).sum(1) for i, j in OFFSETS], 1).softmax(1)
    return sum(weights[:, n : n + 1] * shifted(v, j, i) for n, (i, j) in enumerate(OFFSETS))


def scales_that_differ(self, q, k, v):
    cost = [(q * shifted(k, i, j)).sum(1) / (1 + i) for i, j in OFFSETS]
    weights = torch.stack(cost, 1).softmax(1)
    return sum(weights[:, n : n + 1] * shifted(v, i, j) for n, (i, j) in enumerate(OFFSETS))


def skewed_and_open(self, q, k, v):
    """Other scores than those of the band stay visible: no mask hides the wrapped ones."""
    scores = chunked(q) @ band_chunks(k).transpose(-1, -2) / 2
    skewed = F.pad(scores.flatten(3), (0, WIDE)).view(B, H, -1, WIDE, 3 * WIDE + 1)
    weights = skewed[..., : 2 * WIDE + 3].reshape(B, H, TOKENS, -1).softmax(-1)
    band = weights[..., : 2 * WIDE + 1].reshape(B, H, TOKENS, -1)
    return (unskewed(band) @ band_chunks(v)).flatten(2, 3)


def two_queries(self, q, k, v):
    """Each displacement has a query of its own."""
    cost = [(torch.roll(q, n, 3) * shifted(k, i, j)).sum(1) for n, (i, j) in enumerate(OFFSETS)]
    weights = torch.stack(cost, 1).softmax(1)
    return sum(weights[:, n : n + 1] * shifted(v, i, j) for n, (i, j) in enumerate(OFFSETS))


CROPPED = "window 3x3 cropped at the borders"
TABLE = [
    Local(unfolded, CROPPED, MAP), Local(unfolded_masked, CROPPED, MAP),
    Local(unfolded_together, CROPPED, MAP), Local(split_projection, CROPPED, MAP),
    Local(unfolded_dilated, "window 3x3 dilation 2x2 cropped at the borders", MAP),
    Local(unfolded_finite, CROPPED, MAP),
    Local(strided_queries, "window 3x3 stride 2x2 cropped at the borders", MAP),
    Local(padding_mask, CROPPED, MAP, filling(-math.inf), ((B, 1, HEIGHT, WIDTH),)),
    Local(learned_bias, CROPPED, MAP, with_bias),
    Local(tensor_unfold, CROPPED, MAP),
    Local(tensor_unfold_biased, CROPPED, MAP, with_bias), Local(reflected, CROPPED, MAP),
    Local(matched, CROPPED, MAP, filling(-100.0)), Local(matched, CROPPED, MAP, filling(-math.inf)),
    Local(tiled, CROPPED, MAP),
    Local(causal_sequence, "window 5 cropped at the borders"),
    Local(table_indexed, "window 3x3", MAP, with_table),
    Local(table_selected, "window 3x3", MAP, with_table),
    Local(table_gathered, "window 3x3", MAP, with_table),
    Local(table_biased, "window 3x3", MAP, with_table),
    Local(clamped_and_masked, "window 5 cropped at the borders"),
    Local(shifted_slices, CROPPED, MAP), Local(rolled, "window 5 cropped at the borders"),
    Local(joined_copies, "window 3 cropped at the borders"),
    Local(assigned_copies, "window 3 cropped at the borders"),
    Local(chunks_joined, "window 18 of blocks 6 cropped at the borders"),
    Local(chunks_unfolded, "window 13 cropped at the borders"),
    Local(chunks_strided, "window 18 of blocks 6 cropped at the borders"),
    Local(look_back, "window 12 stride 6 causal"),
    Local(windows_of_heads, "window 5 cropped at the borders"),
    Local(cost_volume, CROPPED, MAP), Local(cost_volume_means, CROPPED, MAP),
    Local(cost_volume_rolled, "window 5 cropped at the borders"),
    Local(skewed_chunks, "window 13 cropped at the borders"),
    Local(skewed_strides, "window 13 cropped at the borders"),
    Local(diagonals, "window 5 cropped at the borders"),
]
NEAR = [
    Local(window_over_channels), Local(other_values, reason="different places"),
    Local(twice_the_same, reason="more than once"),
    Local(table_of_the_user, more=((1,),), reason="depends on an input"),
    Local(random_table, setup=with_random_table, reason="no window"),
    Local(padding_mask, "", MAP, filling(-1e9), ((B, 1, HEIGHT, WIDTH),), "lose all its keys"),
    Local(values_of_others, "", MAP), Local(scales_that_differ, "", MAP),
    Local(skewed_and_open), Local(two_queries, "", MAP),
]
