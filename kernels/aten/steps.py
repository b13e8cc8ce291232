"""The normal form step by step on one Tile: logits, mask, normaliser, weights, output.

`steps(spec)` holds what can be known from the Spec alone. `weigh` turns the raw scores of a tile
into weights; the lowerings differ in the tiles they cut and in the mode they run it in (see
`attnopt.kernels.aten.codegen`). In mode "all" it is fast rather than exact where a hidden key has a
NaN score or a row has no key: the caller then finds NaN in the output and repeats the tile in mode
"none". `masked_fill` and `where` on a full-size float tensor take 7 times as long on a CPU as an
addition, so a mask that is smaller than the scores is applied by minimum or addition.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels.aten.codegen import compiled, fits_into
from attnopt.kernels.aten.scores import mix
from attnopt.kernels.aten.tile import Tile

#: Largest mask of index arithmetic that is kept, in rows times keys.
_KEPT = 1 << 18


@dataclass(frozen=True)
class Steps:
    """A Spec with what follows from it.

    alpha:      a number that multiplies the raw score, taken out of `scaled` for the GEMM
    scaled:     the logits without alpha
    predicate:  the mask as a bool Expr, None where every key is kept
    row_kept:   every row keeps a key, for all lengths
    hides:      a term of the logits may be -inf, so that it may hide keys as a mask does
    statistics: row statistics that the epilogues ask for; masses: those that are masses of groups
    total:      the row sum of the edited weights is asked for
    own_scores: the logits are made from the scores, so that their memory is ours
    fixed:      the mask reads no operand; flat: nor any axis but q and k
    recheck:    NaN in the output of the fast steps may be a hidden key's, or an empty row
    """

    spec: Spec
    alpha: float
    scaled: Expr
    predicate: Expr | None
    row_kept: bool
    hides: bool
    statistics: frozenset[Expr]
    masses: tuple[Expr, ...]
    total: bool
    own_scores: bool
    fixed: bool
    flat: bool
    recheck: bool


@functools.lru_cache(maxsize=1024)
def steps(spec: Spec) -> Steps:
    alpha, scaled = split_scale(spec.logits)
    predicate = spec.mask.predicate()
    statistics = frozenset(leaf for e in (spec.weights, spec.output) for leaf in e.leaves
                           if leaf.op == "stat")
    hides = may_be_infinite(spec.logits)
    return Steps(
        spec, alpha, scaled, None if predicate is E.TRUE else predicate,
        spec.mask.row_always_kept(), hides, statistics,
        masses=tuple(leaf for leaf in statistics if leaf.value.startswith("mass:")),
        total=E.stat("total") in statistics, own_scores=E.score in spec.logits.leaves,
        fixed=not predicate.slots,
        flat=all(leaf.value in ("q", "k") for leaf in predicate.leaves
                 if leaf.op in ("index", "size")),
        recheck=predicate is not E.TRUE or hides and spec.empty_row == "zero")


def split_scale(logits: Expr) -> tuple[float, Expr]:
    """(c, rest) with logits(score) = rest(c * score), where the score occurs only times c."""
    alpha = 1.0
    while True:
        parents = [node for node in logits.walk() if E.score in node.args]
        if len(parents) != 1 or parents[0].op not in ("mul", "div"):
            return alpha, logits
        left, right = parents[0].args
        if left is not E.score or right.op != "const" or not math.isfinite(right.value):
            return alpha, logits
        if parents[0].op == "div" and right.value == 0:
            return alpha, logits
        alpha = alpha * right.value if parents[0].op == "mul" else alpha / right.value
        logits = logits.replace({parents[0]: E.score})


def may_be_infinite(logits: Expr) -> bool:
    """Whether a term may be -inf although the scores are finite."""
    return any(leaf.op in ("load", "inner") and leaf.dtype == E.FLOAT
               or leaf.op == "const" and not math.isfinite(leaf.value) for leaf in logits.leaves)


# -- weights --------------------------------------------------------------------------------------
def weigh(s: Steps, tile: Tile, scores: Tensor, mode: str, scaled: bool = False
          ) -> Tensor:
    """What meets the values.

    scores: raw scores of the tile, overwritten unless mode is "none"; already times alpha when
    `scaled`. Row statistics are left in `tile.leaves`.
    """
    spec = s.spec
    tile.leaves[E.score] = scores
    x = _tensor(compiled(s.scaled if scaled else spec.logits, mode)(tile), tile)
    if spec.mix_logits:
        x = mix(x, tile.operand(spec.mix_logits))
        tile.shape = tile.full = tuple(x.shape)
    if spec.compute:
        tile.dtype = torch.promote_types(x.dtype, getattr(torch, spec.compute))
        x = x.to(tile.dtype)
    if x.shape[-1] != tile.shape[-1]:
        x = x.expand(*x.shape[:-1], tile.shape[-1])
    # What does not come from the scores is an operand's own memory.
    own = mode if s.own_scores else "none"
    keep = None
    if s.predicate is not None:
        keep = _fixed(s, tile) if s.fixed and mode != "none" and _small(tile) else (
            _keep(s.predicate, tile))
    if spec.normalizer == "softmax":
        weight = _softmax(s, tile, x, keep, own)
    else:
        weight = _other_normalizer(s, tile, x, keep, own)
    if spec.weights is not E.weight or spec.groups is not None or spec.renormalize:
        weight = _edited(s, tile, weight, mode)
    if spec.mix_weights:
        weight = mix(weight, tile.operand(spec.mix_weights))
    if spec.mix_bias:
        weight = weight + tile.operand(spec.mix_bias)[:, None, None]
    if spec.dropout:
        weight = torch.dropout(weight, spec.dropout, train=True)
    return weight


def _tensor(value: Any, tile: Tile) -> Tensor:
    """A float tensor of at least two axes."""
    x = torch.as_tensor(value, device=tile.device)
    x = x if x.is_floating_point() else x.to(tile.dtype)
    return x if x.dim() >= 2 else x.expand(1, tile.shape[-1])


def _keep(predicate: Expr, tile: Tile) -> Tensor:
    keep = torch.as_tensor(compiled(predicate)(tile), device=tile.device)
    return keep.expand(*keep.shape[:-1], tile.shape[-1])


def _hide(s: Steps, tile: Tile, x: Tensor, keep: Tensor, fill: float, mode: str) -> Tensor:
    """x where keep, `fill` elsewhere; see the module docstring for mode "all"."""
    over = mode == "all" and fits_into(x.shape, keep.shape)
    # A sum passes the gradient of a row without a key on; the author's selection stops it.
    leaks = mode == "safe" and not s.row_kept
    if mode == "none" or leaks or not x.is_cpu or 2 * keep.numel() > x.numel() \
            or over != (mode == "all"):
        hidden = ~keep
        return x.masked_fill_(hidden, fill) if over else torch.where(hidden, fill, x)
    top = math.inf if mode == "all" else 0.0
    bound = _fixed(s, tile, (x.dtype, top, fill)) if s.fixed and _small(tile) else (
        _bound(keep, x.dtype, top, fill))
    return torch.minimum(x, bound, out=x) if mode == "all" else x + bound


def _bound(keep: Tensor, dtype: torch.dtype, top: float, fill: float) -> Tensor:
    high, low = _numbers(dtype, top, fill)
    return torch.where(keep, high, low)


def _small(tile: Tile) -> bool:
    return tile.shape[-2] * tile.shape[-1] <= _KEPT


def _fixed(s: Steps, tile: Tile, bound: tuple[torch.dtype, float, float] | None = None) -> Tensor:
    """A mask of index arithmetic alone, kept for the next layers and calls."""
    rank = 2 if s.flat else len(tile.shape)
    starts = None if tile.starts is None else tile.starts[-rank:]
    return _fixed_once(s.predicate, tile.shape[-rank:], tile.full[-rank:], starts,
                       str(tile.device), bound)


@functools.lru_cache(maxsize=32)
def _fixed_once(predicate: Expr, shape: tuple[int, ...], full: tuple[int, ...],
                starts: tuple[int, ...] | None, device: str,
                bound: tuple[torch.dtype, float, float] | None) -> Tensor:
    with torch.inference_mode(False):
        keep = _keep(predicate, Tile(shape, {}, torch.float32, torch.device(device), full, starts))
        return keep if bound is None else _bound(keep, *bound)


@functools.lru_cache(maxsize=16)
def _numbers(dtype: torch.dtype, top: float, fill: float) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        high, low = torch.tensor([top, fill], dtype=dtype, device="cpu").unbind()
        return high, low


def _softmax(s: Steps, tile: Tile, x: Tensor, keep: Tensor | None, mode: str) -> Tensor:
    spec, asked = s.spec, s.statistics
    sink = None
    if spec.sinks is not None:
        sink = torch.as_tensor(compiled(spec.sinks)(tile), dtype=x.dtype, device=x.device)
    exact = sink is not None or bool(asked)
    uniform = keep is not None and spec.empty_row == "uniform" and sink is None and not s.row_kept
    if keep is not None:
        # Where all are the lowest number alike, the row is uniform; next to a score it is 0.
        lowest = -math.inf if exact or not uniform else torch.finfo(x.dtype).min
        x = _hide(s, tile, x, keep, lowest, mode)
    if x.shape[-1] == 0:
        return x
    if asked:
        _statistics(tile, x, keep, sink)
    if sink is not None:
        # As the authors do it; exp() by itself is slow where it gives 0, which a softmax is not.
        every = torch.cat([x, sink.expand(*x.shape[:-1], 1)], -1)
        weight = torch.softmax(every, -1, out=every if mode == "all" else None)[..., :-1]
    elif mode == "all":
        weight = torch.softmax(x, -1, out=x)
    elif spec.empty_row == "zero" and not (s.row_kept and not s.hides) and (
            keep is not None or s.hides):
        # The row must be finite before the softmax, or its NaN would come back in the gradient.
        empty = x.detach().amax(-1, keepdim=True) == -math.inf
        weight = torch.softmax(x.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    else:
        weight = torch.softmax(x, -1)
    if uniform and exact and keep is not None:
        weight = torch.where(keep.any(-1, keepdim=True), weight, 1 / x.shape[-1])
    return weight


def _statistics(tile: Tile, x: Tensor, keep: Tensor | None, sink: Tensor | None) -> None:
    """Row statistics of a softmax over x, which is -inf where nothing is kept."""
    lse = torch.logsumexp(x, -1, keepdim=True)
    tile.leaves[E.stat("lse")] = lse if sink is None else torch.logaddexp(lse, sink)
    tile.leaves[E.stat("sum")] = tile.leaves[E.stat("lse")].exp()
    tile.leaves[E.stat("max")] = x.amax(-1, keepdim=True)
    tile.leaves[E.stat("count")] = _count(x, keep)


def _count(x: Tensor, keep: Tensor | None) -> Tensor:
    if keep is None:
        return torch.full((1,), x.shape[-1], device=x.device)
    return keep.sum(-1, keepdim=True)


def _function(name: str, x: Tensor, mode: str) -> Tensor:
    if name == "softplus":
        return F.softplus(x, threshold=40)
    if name == "identity":
        return x
    function = getattr(torch, f"{name}_" if mode == "all" else name)
    return function(x)  # type: ignore[no-any-return]


def _other_normalizer(s: Steps, tile: Tile, x: Tensor, keep: Tensor | None, mode: str) -> Tensor:
    spec = s.spec
    if s.statistics and x.shape[-1]:
        kept = x if keep is None else x.masked_fill(~keep, -math.inf)
        tile.leaves[E.stat("max")] = kept.amax(-1, keepdim=True)
        tile.leaves[E.stat("count")] = _count(x, keep)
    weight = _function(spec.normalizer, x, mode)
    if keep is not None:
        fast = mode != "none" and 2 * keep.numel() <= x.numel()
        weight = weight * keep.to(x.dtype) if fast else weight.masked_fill(~keep, 0.0)
    if spec.l1 or s.statistics:
        total = weight.sum(-1, keepdim=True)
        if spec.sinks is not None:
            sink = torch.as_tensor(compiled(spec.sinks)(tile), dtype=x.dtype, device=x.device)
            total = total + _function(spec.normalizer, sink, "none")
        tile.leaves[E.stat("sum")], tile.leaves[E.stat("lse")] = total, total.log()
        weight = weight / total if spec.l1 else weight
    return weight


def _edited(s: Steps, tile: Tile, weight: Tensor, mode: str) -> Tensor:
    """The weights after their own epilogue."""
    tile.leaves[E.weight] = weight
    if s.masses:
        if s.spec.groups is None:
            raise ValueError(f"groups must be set for {sorted(map(str, s.masses))}")
        group = compiled(s.spec.groups)(tile)
        for leaf in s.masses:
            belongs = torch.as_tensor(group == int(leaf.value[5:]), device=weight.device)
            tile.leaves[leaf] = torch.where(belongs, weight, 0.0).sum(-1, keepdim=True)
    weight = _tensor(compiled(s.spec.weights, mode)(tile), tile)
    if s.spec.renormalize or s.total:
        total = weight.sum(-1, keepdim=True)
        tile.leaves[E.stat("total")] = total
        weight = weight / total if s.spec.renormalize else weight
    return weight


# -- output ---------------------------------------------------------------------------------------
def finish(s: Steps, out: Tensor, value: Tensor, tile: Tile, mode: str) -> Tensor:
    """The output after its epilogue; `tile` is of the axes (…, q, d)."""
    if s.spec.output is E.out:
        return out
    tile.leaves[E.out], tile.leaves[E.value] = out, value
    result = _tensor(compiled(s.spec.output, mode)(tile), tile)
    return result.expand(torch.broadcast_shapes(result.shape, out.shape))
