"""Attention to keys that a choice of the model keeps for all rows: the kept keys, gathered.

A model that keeps the w best of all keys for a whole head (Dynamic Mask Attention in its shared
form, arXiv 2508.02124), or drops tokens, hides scattered keys by a condition of the key alone:

    a mask,  keep[k] and ...                    logits + bias[k],  -inf where it is hidden
    where(keep[k] and k <= q, logits, low)      low so that its weight is 0 beside any other

Which keys are kept is looked up at each call, and if they are few and lie scattered, each block of
rows reads the kept ones (`living_keys`). With a low number that is finite, a row that sees no kept
key has uniform weights over all keys: blocks with such rows take all of them. Nor may a bias be as
low, or it hides the kept keys beside the others.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Where
from attnopt.ir.spec import Operand, Spec, leading_axes
from attnopt.kernels import living_keys
from attnopt.kernels.living_keys import LENGTHS, MOST, PLACES, Living, blockwise, of_gathered

#: weights of a fill so low are 0 beside any other
LOW = -1e8
#: keys of a tile, which a kernel leaves out if all of them are hidden
TILE = 64
#: how many times the kept keys those in tiles with a kept one must be
SCATTERED = 1.5


@dataclass(frozen=True)
class Kept:
    """keep: bool Expr of keys that are seen at all; causal: and of those up to the row;
    finite: others have a low logit; masked: a kernel would leave out tiles of hidden keys;
    beside: operands that are added where a low logit is not."""

    keep: Expr
    causal: bool = False
    finite: bool = False
    masked: bool = False
    beside: tuple[str, ...] = ()


@functools.lru_cache(maxsize=1024)
def kept_of(spec: Spec) -> Kept | None:
    """What says which keys are kept for all rows, None where nothing does."""
    if not blockwise(spec) or spec.normalizer != "softmax" or spec.score == "additive":
        return None
    parts = _literals(spec.mask.predicate())
    causal = any(p is _CAUSAL for p in parts)
    found = [p for p in parts if _of_key(spec, p)]
    if found:
        return Kept(functools.reduce(lambda a, b: a & b, found), causal, masked=True)
    for term in _terms(spec.logits):
        if term.op == "load" and _of_key(spec, term) and term.dtype == E.FLOAT:
            return Kept(~term.eq(-math.inf), causal)
    e = spec.logits
    if e.op == "where" and e.args[2].op == "const" and e.args[2].value <= LOW:
        parts = _literals(e.args[0])
        found = [p for p in parts if _of_key(spec, p)]
        rest = [p for p in parts if p not in found]
        finite = e.args[2].value > -math.inf
        leaves = e.args[1].leaves if finite else ()
        if any(n.op == "const" and n.dtype == E.FLOAT and n.value <= LOW for n in leaves):
            return None
        if found and (not finite or spec.mask is ALL and rest in ([], [_CAUSAL])):
            beside = {str(n.value) for n in leaves if n.op == "load" and n.dtype == E.FLOAT}
            return Kept(functools.reduce(lambda a, b: a & b, found),
                        causal or _CAUSAL in rest, finite, beside=tuple(sorted(beside)))
    return None


_CAUSAL = E.index("k") <= E.index("q")


def _literals(e: Expr) -> list[Expr]:
    return [x for a in e.args for x in _literals(a)] if e.op == "and" else [e]


def _terms(e: Expr) -> list[Expr]:
    return [x for a in e.args for x in _terms(a)] if e.op == "add" else [e]


def _of_key(spec: Spec, e: Expr) -> bool:
    """Does it vary along the keys, by operands, and not along the rows?"""
    along: set[str] = set()
    for n in e.leaves:
        if n.op == "load":
            along |= set(spec.operand(str(n.value)).axes or ())
        elif n.op not in ("const", "index") or n.op == "index" and n.value == "q":
            return False
    return "k" in along and "q" not in along


@functools.lru_cache(maxsize=256)
def _of_kept(spec: Spec, rank: int) -> Spec:
    """Likewise, with nothing seen at the places that fill a list up."""
    made = of_gathered(spec, rank)
    inside = Where(E.load(PLACES, dtype=E.INT) < E.load(LENGTHS, 1, dtype=E.INT))
    own = [o for o in (Operand(PLACES, (*leading_axes(rank - 2), "k"), E.INT),
                       Operand(LENGTHS, None, E.INT)) if o.slot not in made.slots]
    return made.with_(own, mask=made.mask & inside)


class Keeping(Living):
    """`whole`, or blocks of rows with the kept keys where these are few and scattered."""

    __slots__ = ()

    def compact(self, rank: int) -> Spec:
        return _of_kept(self.spec, rank)

    def find(self, query: Tensor, key: Tensor, given: Mapping[str, Tensor]) -> Tensor | None:
        """bool (blocks, *L, K): the keys that a block of rows reads; None for all at once."""
        rows = living_keys.ROWS
        kept = kept_of(self.spec)
        queries, keys = query.shape[-2], key.shape[-2]
        if kept is None or queries < 2 * rows or query.numel() * keys == 0 \
                or torch.compiler.is_compiling():
            return None
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2])
        env = Env((*lead, queries, keys), given, device=query.device)
        keep = torch.as_tensor(evaluate(kept.keep, env))
        if keep.dim() < 2 or keep.shape[-2:] != (1, keys) or keep.dim() > query.dim():
            return None
        keep = keep[(None,) * (query.dim() - keep.dim())]
        most = int(keep.sum(-1).max())
        if most > MOST * keys or kept.masked and not self._scattered(keep, most):
            return None
        starts = torch.arange(0, queries, rows, device=keep.device)
        starts = starts.view(-1, *[1] * (keep.dim() - 1))
        places = torch.arange(keys, device=keep.device)
        lives = keep.squeeze(-2).expand(starts.shape[0], *keep.shape[:-2], keys)
        if kept.causal:
            lives = lives & (places < starts + rows)
        if any(given[s].numel() and not bool(given[s].amin() > LOW / 8) for s in kept.beside):
            return None
        if kept.finite:
            first = torch.where(keep.squeeze(-2), places, keys + queries).amin(-1, keepdim=True)
            blind = starts < first if kept.causal else first >= keys
            lives = lives | blind
        return lives

    @staticmethod
    def _scattered(keep: Tensor, most: int) -> bool:
        """Are there far more keys in tiles that a kernel reads than kept ones?"""
        padded = torch.nn.functional.pad(keep.squeeze(-2), (0, -keep.shape[-1] % TILE))
        tiles = padded.unflatten(-1, (-1, TILE)).any(-1).sum(-1).max()
        return int(tiles) * TILE > SCATTERED * most
