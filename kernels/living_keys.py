"""Attention whose keys live for a run of rows: each block of rows reads its living keys only.

With `KeyLifetime` (k <= q < death[k]) the keys of neighbouring rows are nearly the same: a block of
R rows sees at most as many keys as one row, and R more that come or go within the block. They lie
scattered over the sequence, so that no tile of keys is empty; gathered, they are a dense problem of
R rows and few keys. The places of the gathered keys are an operand, from which the Spec reads the
index k. Any lowering computes the blocks, and gradients pass through the gather.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import And, KeyLifetime, Mask, Or, Where
from attnopt.ir.spec import Operand, Spec, leading_axes

PLACES, FIRST, LENGTHS = "key_places", "first_row", "all_lengths"
#: rows that are computed together
ROWS = 128
#: share of the scores under the diagonal from which on gathering does not pay
MOST = 0.7
#: bytes of keys and values that are gathered at a time
LARGEST = 1 << 24
#: the place of an entry that fills a list up: no row sees it
NOWHERE = 2**29

Attention = Callable[..., Tensor]


@functools.lru_cache(maxsize=1024)
def slots_of(spec: Spec) -> tuple[str, str] | None:
    """The operand with the death of the keys and, or "", that with the number of first rows that
    see all keys; None where blocks of rows cannot be computed with their own keys."""
    mask, blind = spec.mask, ""
    if isinstance(mask, Or) and len(mask.masks) == 2:
        for part, other in (mask.masks, mask.masks[::-1]):
            first = _first_rows(part)
            if first:
                mask, blind = other, first
    parts = mask.masks if isinstance(mask, And) else (mask,)
    lives = [m.slot for m in parts if isinstance(m, KeyLifetime)]
    return (lives[0], blind) if len(lives) == 1 and blockwise(spec) else None


def blockwise(spec: Spec) -> bool:
    """Can blocks of rows be computed with keys of their own?"""
    exprs = (spec.logits, spec.weights, spec.output, spec.groups, spec.sinks)
    whole = all(e is None or not any(n.op in ("stat", "inner", "value") for n in e.leaves)
                for e in exprs)
    return whole and spec.weights is E.weight and spec.groups is None and not spec.dropout and not (
        spec.mix_logits or spec.mix_weights) and spec.empty_row != "uniform" and all(
            o.axes is not None for o in spec.operands)


def _first_rows(mask: Mask) -> str:
    """The slot n of a mask q < n, or ""."""
    e = mask.expr if isinstance(mask, Where) else E.TRUE
    found = e.op == "le" and e.args[0] is E.index("q") + 1 and e.args[1].op == "load" \
        and not e.args[1].args
    return str(e.args[1].value) if found else ""


@functools.lru_cache(maxsize=1024)
def of_gathered(spec: Spec, rank: int) -> Spec:
    """The Spec of blocks of rows with gathered keys; `rank` of the scores, the blocks included."""
    leads = leading_axes(rank - 2)
    place = {E.index("k"): E.load(PLACES, dtype=E.INT),
             E.index("q"): E.index("q") + E.load(FIRST, dtype=E.INT),
             E.size("q"): E.load(LENGTHS, 0, dtype=E.INT),
             E.size("k"): E.load(LENGTHS, 1, dtype=E.INT)}

    def moved(e: Expr | None) -> Expr | None:
        return None if e is None else e.replace(place)

    return spec.with_(
        [Operand(PLACES, (*leads, "k"), E.INT), Operand(FIRST, leads[:1], E.INT),
         Operand(LENGTHS, None, E.INT)], mask=Where(spec.mask.predicate().replace(place)),
        **{name: moved(getattr(spec, name)) for name in ("logits", "output", "sinks")})


class Living:
    """`whole`, or the same block by block where that is less."""

    __slots__ = ("spec", "slots", "whole", "schedule", "bind")

    def __init__(self, spec: Spec, slots: tuple[str, str], schedule: str, whole: Attention,
                 bind: Callable[[str, str], Attention]) -> None:
        self.spec, self.slots, self.schedule = spec, slots, schedule
        self.whole, self.bind = whole, bind

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Tensor:
        if len(operands) == len(self.spec.operands) and not torch.is_autocast_enabled("cpu"):
            given = dict(zip((o.slot for o in self.spec.operands), operands, strict=True))
            lists = self.find(query, key, given)
            if lists is not None:
                return self.gathered(query, key, value, given, lists)
        return self.whole(query, key, value, *operands)

    def compact(self, rank: int) -> Spec:
        """The Spec of blocks of rows, of a call whose scores are of `rank` with the blocks."""
        return of_gathered(self.spec, rank)

    def find(self, query: Tensor, key: Tensor, given: Mapping[str, Tensor]) -> Tensor | None:
        return self.lists(query, key, *(given.get(slot) for slot in self.slots))

    def lists(self, query: Tensor, key: Tensor, death: Tensor | None, blind: Tensor | None
              ) -> Tensor | None:
        """bool (blocks, *L, K): the keys that live in a block of rows; None for all at once."""
        queries, keys = query.shape[-2], key.shape[-2]
        if death is None or death.dim() != query.dim() or death.shape[-2:] != (1, keys) \
                or queries < 2 * ROWS or query.numel() * keys == 0 or torch.compiler.is_compiling():
            return None
        starts = torch.arange(0, queries, ROWS, device=death.device)
        starts = starts.view(-1, *[1] * (death.dim() - 1))
        places = torch.arange(keys, device=death.device)
        lives = (death.squeeze(-2) > starts) & (places < starts + ROWS)
        if blind is not None:
            lives = lives | (blind.squeeze(-1) > starts)
        most = int(lives.sum(-1).amax(tuple(range(1, lives.dim() - 1))).sum()) * ROWS
        under = sum(min(q + ROWS, keys) for q in range(0, queries, ROWS)) * ROWS
        return lives if most < MOST * under else None

    def gathered(self, query: Tensor, key: Tensor, value: Tensor, given: dict[str, Tensor],
                 lists: Tensor) -> Tensor:
        """The blocks, many at once: they are a leading axis of their own."""
        spec = self.compact(query.dim() + 1)
        run = self.bind(str(spec), self.schedule)
        queries, keys = query.shape[-2], key.shape[-2]
        lead = torch.broadcast_shapes(lists.shape[1:-1], key.shape[:-2], value.shape[:-2])
        own = {LENGTHS: torch.tensor([queries, keys], dtype=torch.int32, device=query.device)}
        # What varies along the keys is gathered with them, all of it flat by leading entries.
        flat = {"": key.expand(*lead, *key.shape[-2:]), " ": value.expand(*lead, *value.shape[-2:])}
        flat |= {o.slot: given[o.slot].mT.expand(*lead, keys, 1) for o in self.spec.operands
                 if given[o.slot].dim() >= 2 and given[o.slot].shape[-1] == keys
                 and "k" in (o.axes or ())}
        flat = {name: t.reshape(-1, t.shape[-1]) for name, t in flat.items()}
        counts = lists.sum(-1).amax(tuple(range(1, lists.dim() - 1))).tolist()
        entry = math.prod(lead) * (key.shape[-1] + value.shape[-1]) * key.element_size()
        found = []
        for start, stop in _chunks(counts, queries // ROWS, entry):
            first, last = start * ROWS, min(stop * ROWS, queries)
            blocks, rows = stop - start, min(ROWS, last - first)
            index, places = _padded(lists[start:stop].expand(blocks, *lead, keys))
            near = (blocks, *lead, places.shape[-1])
            at = torch.arange(first, last, ROWS, dtype=torch.int32, device=query.device)
            own |= {PLACES: places.unsqueeze(-2), FIRST: at.view(-1, *[1] * query.dim())}
            parts = {name: t.index_select(0, index).view(*near, t.shape[-1])
                     for name, t in flat.items()}

            def cut(t: Tensor, first: int = first, last: int = last, rows: int = rows) -> Tensor:
                return t[..., first:last, :].unflatten(-2, (-1, rows)).movedim(-3, 0)

            operands = []
            for o in spec.operands:
                t = own[o.slot] if o.slot in own else parts[o.slot].mT if o.slot in parts else (
                    given[o.slot])
                varies = t.dim() >= 2 and "q" in (o.axes or ()) and t.shape[-2] == queries
                operands.append(cut(t) if varies and o.slot not in parts else t)
            out = run(cut(query), parts[""], parts[" "], *operands)
            found.append(out.movedim(0, -3).flatten(-3, -2))
        return torch.cat(found, -2)


def _chunks(counts: Sequence[int], whole: int, entry: int) -> list[tuple[int, int]]:
    """Runs [start, stop) of blocks whose gathered keys and values stay small; a last block that
    is cut off is alone. `entry` is the bytes of one key and value in all leading entries."""
    found, start = [], 0
    for i, count in enumerate(counts):
        most = max(counts[start : i + 1])
        if i > start and (i == whole or most * (i + 1 - start) * entry > LARGEST
                          or min(counts[start : i + 1]) < count // 2):
            found.append((start, i))
            start = i
    return [*found, (start, len(counts))]


def _padded(lives: Tensor) -> tuple[Tensor, Tensor]:
    """(flat index, places (blocks, *L, most) int32) of what is true in (blocks, *L, K), filled up
    at the ends; the index is into (*L, K)."""
    *shape, keys = lives.shape
    lives = lives.reshape(-1, keys)
    counts = lives.sum(-1)
    owner, place = lives.nonzero(as_tuple=True)
    at = torch.arange(owner.numel(), device=lives.device)
    at -= (counts.cumsum(0) - counts).index_select(0, owner)
    places = torch.full((lives.shape[0], max(int(counts.max()), 1)), NOWHERE, device=lives.device)
    places[owner, at] = place
    source = torch.arange(lives.shape[0], device=lives.device) % math.prod(shape[1:])
    index = places.clamp(max=keys - 1) + source[:, None] * keys
    return index.flatten(), places.int().view(*shape, -1)
