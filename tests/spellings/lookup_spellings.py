"""Relative positions that meet the query or the key, spelled as published models spell them.

Every function is `f(s, q, k, v)` of (B, H, N, D) tensors; `s` is a `Rows` with what a module of
that kind holds. The score of a pair has T[b, h, q, f(q, k)] or T[b, h, k, f(q, k)] added to it,
where T is a product of the queries or keys and a small table.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Spelling = Callable[["Rows", Tensor, Tensor, Tensor], Tensor]


class Rows(nn.Module):
    """What the spellings read: tables of `2 * longest - 1` distances."""

    def __init__(self, heads: int, longest: int, width: int = 8) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def drawn(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.5 * torch.randn(*shape, generator=generator))
        self.longest, self.heads = longest, heads
        self.distance_embedding = nn.Embedding(2 * longest - 1, width)
        self.distance_embedding.weight = drawn(2 * longest - 1, width)
        self.short = drawn(17, width)
        self.by_head = drawn(heads, 2 * longest - 1, width)
        self.u, self.w = drawn(heads, width), drawn(heads, width)
        self.linear_pos = nn.Linear(heads * width, heads * width, bias=False)
        self.linear_pos.weight = drawn(heads * width, heads * width)


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def dot(q: Tensor, k: Tensor) -> Tensor:
    return torch.matmul(q, k.transpose(-1, -2))


def distances(q: Tensor, k: Tensor) -> Tensor:
    rows = torch.arange(q.shape[-2], dtype=torch.long).view(-1, 1)
    keys = torch.arange(k.shape[-2], dtype=torch.long).view(1, -1)
    return rows - keys


# -- Shaw (arXiv 1803.02155) ----------------------------------------------------------------------
def relative_key(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BERT's position_embedding_type="relative_key"."""
    embedded = s.distance_embedding(distances(q, k) + s.longest - 1)
    scores = dot(q, k) + torch.einsum("bhld,lrd->bhlr", q, embedded)
    return attend(scores / math.sqrt(q.shape[-1]), v)


def relative_key_query(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """BERT's position_embedding_type="relative_key_query" (arXiv 2009.13658)."""
    embedded = s.distance_embedding(distances(q, k) + s.longest - 1).to(dtype=q.dtype)
    by_query = torch.einsum("bhld,lrd->bhlr", q, embedded)
    by_key = torch.einsum("bhrd,lrd->bhlr", k, embedded)
    scores = dot(q, k) + by_query + by_key
    return attend(scores / math.sqrt(q.shape[-1]), v)


def clipped(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Distances clipped at 8, the table indexed."""
    embedded = s.short[distances(k, q).mT.clamp(-8, 8) + 8]
    scores = dot(q, k) + torch.einsum("bhld,lrd->bhlr", q, embedded)
    return attend(scores / math.sqrt(q.shape[-1]), v)


def clipped_on_one_side(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """wav2vec2-bert: 13 to the left, 3 to the right."""
    embedded = s.short[(-distances(q, k)).clamp(-13, 3) + 13]
    scores = dot(q, k) / math.sqrt(q.shape[-1])
    far = torch.einsum("bhld,lrd->bhlr", q, embedded)
    return attend(scores + far / math.sqrt(q.shape[-1]), v)


def shaw_by_matmul(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Queries first, so that a row of distances is one batch of a product."""
    b, h, n, d = q.shape
    embedded = s.short[(-distances(q, k)).clamp(-8, 8) + 8]
    rows = q.permute(2, 0, 1, 3).reshape(n, b * h, d)
    far = torch.matmul(rows, embedded.transpose(1, 2))
    far = far.transpose(0, 1).contiguous().view(b, h, n, k.shape[-2])
    return attend((dot(q, k) + far) / math.sqrt(d), v)


def shaw_by_product(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A product of one row each."""
    embedded = s.short[(-distances(q, k)).clamp(-8, 8) + 8]
    far = torch.matmul(q.unsqueeze(-2), embedded.transpose(-1, -2)).squeeze(-2)
    return attend((dot(q, k) + far) / math.sqrt(q.shape[-1]), v)


def shaw_by_head(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A table for each head."""
    embedded = s.by_head[:, distances(q, k) + s.longest - 1]
    far = torch.einsum("bhld,hlrd->bhlr", q, embedded)
    return attend((dot(q, k) + far) / math.sqrt(q.shape[-1]), v)


# -- the relative shift (Transformer-XL, arXiv 1901.02860) ----------------------------------------
def sinusoids(positions: Tensor, width: int) -> Tensor:
    steps = 1 / 10000 ** (torch.arange(0.0, width, 2.0) / width)
    angles = positions[:, None] * steps
    return torch.cat([angles.sin(), angles.cos()], -1)


def positions_of(s: Rows, places: Tensor, width: int) -> Tensor:
    """Projected sinusoids of distances as (H, places, D)."""
    embedded = s.linear_pos(sinusoids(places, s.heads * width).to(s.linear_pos.weight.dtype))
    return embedded.view(-1, s.heads, width).transpose(0, 1)


def conformer(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """ESPnet, wav2vec2-conformer: zeros before, view, slice, view, half (arXiv 2005.08100)."""
    n, d = q.shape[-2:]
    places = positions_of(s, torch.arange(n - 1.0, -n, -1.0), d)
    by_key = torch.matmul(q + s.u.unsqueeze(1), k.transpose(-2, -1))
    far = torch.matmul(q + s.w.unsqueeze(1), places.transpose(-2, -1))
    zeros = torch.zeros((*far.size()[:3], 1), device=far.device, dtype=far.dtype)
    padded = torch.cat([zeros, far], dim=-1)
    padded = padded.view(*far.shape[:2], far.shape[3] + 1, far.shape[2])
    far = padded[:, :, 1:].view_as(far)[:, :, :, : far.size(-1) // 2 + 1]
    return attend((by_key + far) / math.sqrt(d), v)


def padded_shift(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by F.pad, behind the scale, with a table of its own for each head."""
    b, h, n, d = q.shape
    far = q @ s.by_head[:, s.longest - n : s.longest + n - 1].mT
    far = F.pad(far, (1, 0)).reshape(b, h, 2 * n, n)[:, :, 1:].reshape(b, h, n, 2 * n - 1)
    return attend(dot(q, k) * d**-0.5 + far[..., :n] * d**-0.5, v)


def flat_shift(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Padding behind, one flat row, padding again (Bello et al., arXiv 1904.09925)."""
    b, h, n, d = q.shape
    far = q @ s.by_head[:, s.longest - n : s.longest + n - 1].mT
    flat = F.pad(far, (0, 1)).reshape(b, h, 2 * n * n)
    flat = F.pad(flat, (0, n - 1)).reshape(b, h, n + 1, 2 * n - 1)
    return attend((dot(q, k) + flat[:, :, :n, n - 1 :]) * d**-0.5, v)


def strided_shift(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One row shorter by one step of the stride."""
    b, h, n, d = q.shape
    far = (q @ s.by_head[:, s.longest - n : s.longest + n - 1].mT).contiguous()
    long = 2 * n - 1
    far = far.as_strided((b, h, n, n), (h * n * long, n * long, long - 1, 1), n - 1)
    return attend((dot(q, k) + far) * d**-0.5, v)


def gathered_shift(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, n, d = q.shape
    far = q @ s.by_head[:, s.longest - n : s.longest + n - 1].mT
    index = (n - 1 - distances(q, k)).expand(b, h, n, n)
    return attend((dot(q, k) + torch.gather(far, -1, index)) * d**-0.5, v)


def indexed_shift(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, d = q.shape[-2:]
    far = q @ s.by_head[:, s.longest - n : s.longest + n - 1].mT
    rows = torch.arange(n)[:, None]
    far = far[:, :, rows, n - 1 - distances(q, k)]
    return attend((dot(q, k) + far) * d**-0.5, v)


def xlnet(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """2N distances, no padding, a choice of keys (XLNet, arXiv 1906.08237)."""
    n, d = q.shape[-2:]
    m = k.shape[-2]
    head_q, head_k, head_v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    places = positions_of(s, torch.arange(m, -n, -1.0), d).transpose(0, 1)
    ac = torch.einsum("ibnd,jbnd->bnij", head_q + s.u, head_k)
    bd = torch.einsum("ibnd,jnd->bnij", head_q + s.w, places)
    shape = bd.shape
    bd = bd.reshape(shape[0], shape[1], shape[3], shape[2])[:, :, 1:, :]
    bd = bd.reshape(shape[0], shape[1], shape[2], shape[3] - 1)
    bd = torch.index_select(bd, 3, torch.arange(m))
    weights = ((ac + bd) * d**-0.5).softmax(-1)
    return torch.einsum("bnij,jbnd->ibnd", weights, head_v).permute(1, 2, 0, 3)


def transformer_xl(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """N distances only: what the shift brings in from the next row is hidden."""
    n, d = q.shape[-2:]
    m = k.shape[-2]
    places = positions_of(s, torch.arange(m - 1.0, -1.0, -1.0), d)
    head_q, head_k, head_v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    ac = torch.einsum("ibnd,jbnd->ijbn", head_q + s.u, head_k)
    bd = torch.einsum("ibnd,njd->ijbn", head_q + s.w, places)
    zeros = torch.zeros((n, 1, *bd.size()[2:]))
    padded = torch.cat([zeros, bd], dim=1).view(m + 1, n, *bd.size()[2:])
    scores = (ac + padded[1:].view_as(bd)) * d**-0.5
    hidden = torch.triu(torch.ones(n, m, dtype=torch.bool), 1 + m - n)
    scores = scores.masked_fill(hidden[:, :, None, None], -float("inf"))
    return torch.einsum("ijbn,jbnd->ibnd", scores.softmax(1), head_v).permute(1, 2, 0, 3)


def skewed(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Music Transformer's skewing (arXiv 1809.04281), causal."""
    b, h, n, d = q.shape
    far = q @ s.by_head[:, :n].mT
    far = F.pad(far, (1, 0)).reshape(b, h, n + 1, n)[:, :, 1:, :]
    scores = (dot(q, k) + far) / math.sqrt(d)
    return attend(scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf")), v)


# -- DeBERTa (arXiv 2006.03654) -------------------------------------------------------------------
def log_bucket(far: Tensor, buckets: int, longest: int) -> Tensor:
    """DeBERTa-v2's buckets: exact to the middle, logarithmic above."""
    sign, middle = torch.sign(far), buckets // 2
    near = torch.where((far < middle) & (far > -middle), torch.tensor(middle - 1).type_as(far),
                       torch.abs(far))
    log = torch.ceil(torch.log(near / middle) / torch.log(torch.tensor((longest - 1) / middle))
                     * (middle - 1)) + middle
    return torch.where(near <= middle, far.type_as(log), log * sign).to(torch.long)


def disentangled(s: Rows, q: Tensor, k: Tensor, v: Tensor, far: Tensor, span: int) -> Tensor:
    b, h, n, d = q.shape
    m = k.shape[-2]
    scale = math.sqrt(3 * d)
    table = s.by_head[:, : 2 * span]
    places = torch.clamp(far + span, 0, 2 * span - 1)[None, None]
    c2p = torch.matmul(q, table.transpose(-1, -2))
    c2p = torch.gather(c2p, dim=-1, index=places.expand(b, h, n, m))
    p2c = torch.matmul(k, table.flip(1).transpose(-1, -2))
    back = torch.clamp(-far + span, 0, 2 * span - 1)[None, None]
    p2c = torch.gather(p2c, dim=-1, index=back.expand(b, h, m, n)).transpose(-1, -2)
    return attend(dot(q, k) / scale + (c2p + p2c) / scale, v)


def deberta(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return disentangled(s, q, k, v, distances(q, k), 12)


def deberta_v2(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return disentangled(s, q, k, v, log_bucket(distances(q, k), 16, 64), 8)


def deberta_taken(s: Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by `take_along_dim`, whose places are broadcast to batch and heads."""
    places = (distances(q, k) + 12).clamp(0, 23)[None, None]
    c2p = torch.take_along_dim(q @ s.by_head[:, :24].mT, places, -1)
    p2c = torch.take_along_dim(k @ s.by_head[:, 24:48].mT, 23 - places.mT, dim=3).mT
    return attend((dot(q, k) + c2p + p2c) / math.sqrt(3 * q.shape[-1]), v)


SHAW: list[Spelling] = [relative_key, relative_key_query, clipped, clipped_on_one_side,
                        shaw_by_matmul, shaw_by_product, shaw_by_head]
SHIFTS: list[Spelling] = [conformer, padded_shift, flat_shift, strided_shift, gathered_shift,
                          indexed_shift, xlnet]
SKEWS: list[Spelling] = [transformer_xl, skewed]
DISENTANGLED: list[Spelling] = [deberta, deberta_v2, deberta_taken]
