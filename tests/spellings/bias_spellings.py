"""Biases that depend on where query and key are, spelled as published models spell them.

Every function is `f(s, q, k, v)` of (B, H, N, D) tensors; `s` is a `Tables` with what a module of
that kind holds. Image tokens form a `s.grid`; `s.extra` tokens before it are class tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

Spelling = Callable[["Tables", Tensor, Tensor, Tensor], Tensor]


def offsets(grid: tuple[int, ...]) -> Tensor:
    """Offsets (*axes, N, N) of the tokens of a grid, from 0 on."""
    at = torch.stack(torch.meshgrid(*map(torch.arange, grid), indexing="ij")).flatten(1)
    far = at[:, :, None] - at[:, None, :]
    return far + torch.tensor(grid).view(-1, 1, 1) - 1


def swin_index(grid: tuple[int, ...]) -> Tensor:
    """The place of every pair in a table of relative positions (Swin, arXiv 2103.14030)."""
    total = torch.zeros((), dtype=torch.int64)
    for far, n in zip(offsets(grid), grid, strict=True):
        total = total * (2 * n - 1) + far
    return total


def beit_index(grid: tuple[int, ...]) -> Tensor:
    """The same with a class token (BEiT, arXiv 2106.08254): three entries of its own."""
    inner = swin_index(grid)
    entries = math.prod(2 * n - 1 for n in grid)
    index = torch.zeros((len(inner) + 1,) * 2, dtype=torch.int64)
    index[1:, 1:] = inner
    index[0, :], index[:, 0], index[0, 0] = entries, entries + 1, entries + 2
    return index


def levit_index(grid: tuple[int, ...]) -> Tensor:
    """Places by distance along each axis, in order of appearance (LeViT, arXiv 2104.01136)."""
    points = list(itertools.product(*map(range, grid)))
    seen: dict[tuple[int, ...], int] = {}
    flat = [seen.setdefault(tuple(abs(a - b) for a, b in zip(p, o, strict=True)), len(seen))
            for p in points for o in points]
    return torch.tensor(flat).view(len(points), len(points))


def shift_mask(side: int, window: int) -> Tensor:
    """-100 between tokens of a shifted window that were no neighbours (Swin)."""
    image = torch.zeros(side, side)
    cuts = (slice(0, -window), slice(-window, -(window // 2)), slice(-(window // 2), None))
    for number, (rows, columns) in enumerate(itertools.product(cuts, cuts)):
        image[rows, columns] = number
    n = side // window
    tokens = image.view(n, window, n, window).transpose(1, 2).reshape(n * n, window * window)
    far = tokens[:, None, :] - tokens[:, :, None]
    return far.masked_fill(far != 0, -100.0).masked_fill(far == 0, 0.0)


class Tables(nn.Module):
    """What the spellings read."""

    def __init__(self, heads: int, grid: tuple[int, ...], width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.grid, self.heads = grid, heads
        entries = math.prod(2 * n - 1 for n in grid)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))
        self.buckets, self.table = drawn(32, heads), drawn(entries + 3, heads)
        self.by_head = drawn(heads, math.prod(grid))
        self.mlp = nn.Sequential(nn.Linear(len(grid), 16), nn.ReLU(), nn.Linear(16, heads))
        self.rel = nn.ParameterList([drawn(2 * n - 1, width) for n in grid])
        self.gate = nn.Linear(width, 1)
        self.register_buffer("swin", swin_index(grid))
        self.register_buffer("flat", swin_index(grid).flatten())
        self.register_buffer("beit", beit_index(grid))
        self.register_buffer("levit", levit_index(grid))
        places = torch.cartesian_prod(*(torch.arange(1.0 - n, n) for n in grid))
        self.register_buffer("places", places.view(-1, len(grid)).sign() * places.view(
            -1, len(grid)).abs().log1p())
        side = 2 * grid[0]
        if len(grid) == 2 and grid[0] == grid[1]:
            self.register_buffer("shifted", shift_mask(side, grid[0]))


def soft(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


def steps(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(k.shape[-2])[None, :] - torch.arange(q.shape[-2])[:, None]


# -- one axis -------------------------------------------------------------------------------------
def t5_bucket(far: Tensor, both: bool = True, buckets: int = 32, longest: int = 128) -> Tensor:
    """Exact for small distances, logarithmic above (T5, arXiv 1910.10683)."""
    found = torch.zeros_like(far)
    if both:
        buckets //= 2
        found = found + (far > 0).to(torch.long) * buckets
        far = torch.abs(far)
    else:
        far = -torch.min(far, torch.zeros_like(far))
    exact = buckets // 2
    large = exact + (torch.log(far.float() / exact) / math.log(longest / exact)
                     * (buckets - exact)).to(torch.long)
    large = torch.min(large, torch.full_like(large, buckets - 1))
    return found + torch.where(far < exact, far, large)


def t5(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = nn.functional.embedding(t5_bucket(steps(q, k)), s.buckets)
    return soft(q, k, v, bias.permute(2, 0, 1).unsqueeze(0))


def t5_decoder(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    far = steps(q, k)
    bias = nn.functional.embedding(t5_bucket(far, both=False), s.buckets).permute(2, 0, 1)[None]
    hidden = torch.zeros(far.shape).masked_fill(far > 0, torch.finfo(torch.float32).min)
    return soft(q, k, v, bias + hidden)


def t5_fused(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = nn.functional.embedding(t5_bucket(steps(q, k)), s.buckets).permute(2, 0, 1)[None]
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def one_hot(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A product with one-hot buckets (T5X's relative embeddings)."""
    picked = torch.nn.functional.one_hot(t5_bucket(steps(q, k)), 32).to(q.dtype)
    return soft(q, k, v, torch.einsum("qkn,nh->hqk", picked, s.buckets))


def one_hot_layer(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as a layer without a bias."""
    picked = torch.nn.functional.one_hot(t5_bucket(steps(q, k)), 32).to(s.buckets.dtype)
    return soft(q, k, v, torch.nn.functional.linear(picked, s.buckets.T).movedim(-1, 0))


def clipped(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return soft(q, k, v, s.buckets[steps(q, k).clamp(-15, 16) + 15].permute(2, 0, 1))


def before_the_scale(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = s.buckets.t()[:, steps(q, k).abs().clamp(max=31)]
    return ((q @ k.mT + bias) * 0.25).softmax(-1) @ v


def gated(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A number per row times the bias (WavLM, arXiv 2110.13900)."""
    bias = nn.functional.embedding(t5_bucket(steps(q, k)), s.buckets).permute(2, 0, 1)
    return soft(q, k, v, torch.sigmoid(s.gate(q)) * bias)


def squashed(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = 16 * torch.sigmoid(s.buckets[t5_bucket(steps(q, k))])
    return soft(q, k, v, bias.permute(2, 0, 1))


# -- grids ----------------------------------------------------------------------------------------
def swin(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[-2]
    bias = s.table[s.flat].view(n, n, -1).permute(2, 0, 1).contiguous().unsqueeze(0)
    return soft(q, k, v, bias)


def swin_shifted(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The batch is (images, windows): windows of the mask are those of the batch."""
    b, h, n, _ = q.shape
    scores = q @ k.mT / math.sqrt(q.shape[-1]) + s.table[s.swin].permute(2, 0, 1)[None]
    windows = len(s.shifted)
    scores = scores.view(b // windows, windows, h, n, n) + s.shifted[None, :, None]
    return scores.view(b, h, n, n).softmax(-1) @ v


def swin_v2(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A table made by a network of log coordinates (arXiv 2111.09883)."""
    n, table = q.shape[-2], s.mlp(s.places)
    bias = table[s.flat].view(n, n, -1).permute(2, 0, 1).contiguous()
    return soft(q, k, v, 16 * torch.sigmoid(bias).unsqueeze(0))


def beit(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[-2]
    return soft(q, k, v, s.table[s.beit.view(-1)].view(n, n, -1).permute(2, 0, 1))


def levit(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return soft(q, k, v, s.by_head[:, s.levit])


def _decomposed(s: Tables, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    height, width = s.grid
    q3 = q.flatten(0, 1)
    scores = (q3 * q.shape[-1] ** -0.5) @ k.flatten(0, 1).transpose(-2, -1)
    rows = q3.reshape(-1, height, width, q.shape[-1])
    by_h, by_w = (
        r[torch.arange(n)[:, None] - torch.arange(n)[None] + n - 1]
        for r, n in zip(s.rel, s.grid, strict=True))
    rel_h = torch.einsum("bhwc,hkc->bhwk", rows, by_h)
    rel_w = torch.einsum("bhwc,wkc->bhwk", rows, by_w)
    return scores, rel_h, rel_w


def sam(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A term per row and one per column of the keys (SAM, arXiv 2304.02643)."""
    scores, rel_h, rel_w = _decomposed(s, q, k)
    far = (rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]).reshape_as(scores)
    return ((scores + far).softmax(-1) @ v.flatten(0, 1)).view(q.shape)


def sam_by_views(s: Tables, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same, as ViTDet spells it (arXiv 2203.16527)."""
    height, width = s.grid
    scores, rel_h, rel_w = _decomposed(s, q, k)
    scores = scores.view(-1, height, width, height, width)
    scores = scores + rel_h[:, :, :, :, None] + rel_w[:, :, :, None, :]
    scores = scores.view(-1, height * width, height * width)
    return (scores.softmax(-1) @ v.flatten(0, 1)).view(q.shape)


BY_DISTANCE: list[Spelling] = [t5, t5_decoder, t5_fused, clipped, before_the_scale, gated, squashed,
                               one_hot, one_hot_layer]
ON_A_GRID: list[Spelling] = [swin, swin_v2, levit]
BY_AXIS: list[Spelling] = [sam, sam_by_views]
