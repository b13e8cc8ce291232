"""Constant tables of queries x keys in a lift: two values, split by a structure that has a name.

Where no plain index function is the table (`by_value.fit`), its truth values are read as a mask
(`table_reading`). In the lift that mask is one opaque literal, `load_bool(table, q, k)`, so that
arithmetic on it (`(1 - mask) * -1e9`, a conjunction with padding) stays the case tree that it is;
`Patterns` knows which mask each literal stands for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.analyze import table_reading
from attnopt.passes.analyze.block_tables import BlockTables
from attnopt.passes.analyze.neighbourhoods import GridMask
from attnopt.passes.analyze.tables import LARGEST, Table

_Q, _K = E.index("q"), E.index("k")
_FIRST = E.const(0)


@dataclass(frozen=True)
class Pattern:
    """A mask that a table was found to be, and the keys that every row keeps by it."""

    found: GridMask
    kept: frozenset[Expr]


@dataclass
class Patterns:
    """The named tables of one graph: by the literal's name, and by content."""

    by_name: dict[str, Pattern] = field(default_factory=dict)
    #: constant masks of blocks, for kernels that look blocks up
    blocks: BlockTables = field(default_factory=BlockTables)
    seen: list[tuple[Tensor, Pattern | None]] = field(default_factory=list)

    def __contains__(self, slot: object) -> bool:
        return slot in self.by_name

    def literal(self, table: Tensor) -> tuple[str, bool] | None:
        """(name, whether it is kept where `table` is true) for a bool table (H or 1, Q, K)."""
        for negated in (False, True):
            pattern = self._read(~table if negated else table)
            if pattern is not None:
                name = next((n for n, p in self.by_name.items() if p is pattern),
                            f"_table{len(self.by_name)}_")
                self.by_name[name] = pattern
                return name, not negated
        return None

    def _read(self, table: Tensor) -> Pattern | None:
        for other, pattern in self.seen:
            if other.shape == table.shape and torch.equal(other, table):
                return pattern
        tables = [Table.of_values(t, torch.tensor(True)) for t in table]
        found = table_reading.read(tables[0]) if len(tables) == 1 else \
            table_reading.read_heads(tables, "h")
        pattern = None if found is None else Pattern(found, _always(table))
        self.seen.append((table, pattern))
        return pattern

    # -- what a literal means ---------------------------------------------------------------
    def expand(self, e: Expr) -> Expr:
        """`e` with the predicates of the masks in place of the literals."""
        if not e.slots & self.by_name.keys():
            return e
        return e.replace(lambda n: self.by_name[n.value].found.mask.predicate()
                         if n.op == "load" and n.value in self.by_name else None)

    def at_key(self, e: Expr, key: Expr) -> Expr:
        """`e` where literals that keep the key `key` in every row are true."""
        if not e.slots & self.by_name.keys():
            return e
        return e.replace(lambda n: E.TRUE if n.op == "load" and n.value in self.by_name
                         and key in self.by_name[n.value].kept else None)


def _always(table: Tensor) -> frozenset[Expr]:
    """Which of the first key, the last one and the row's own are kept by all rows."""
    queries, keys = table.shape[-2:]
    kept = set()
    if bool(table[..., 0].all()):
        kept.add(_FIRST)
    if bool(table[..., -1].all()):
        kept.add(E.const(keys - 1))
    if queries <= keys and bool(table.diagonal(dim1=-2, dim2=-1).all()):
        kept.add(_Q)
    return frozenset(kept)


def fit(patterns: Patterns, table: Tensor, idx: tuple[Expr, ...],
        lengths: Mapping[str, Expr]) -> Expr | None:
    """The element of a table of two values at `idx` by a named mask; None where it has none."""
    cut = at_score(table, idx, lengths)
    if cut is None or cut.numel() > LARGEST:
        return None
    values = _two_values(cut)
    if values is None:
        return None
    low, high = values
    found = patterns.literal(cut == high)
    if found is None:
        return None
    axes = [E.index("h")] * (len(cut) > 1)
    literal = E.load(found[0], *axes, _Q, _K, dtype=E.BOOL)
    yes, no = (high, low) if found[1] else (low, high)
    if cut.dtype == torch.bool:
        return literal if found[1] else ~literal
    return E.where(literal, yes, no)


def fit_blocks(patterns: Patterns, table: Tensor, idx: tuple[Expr, ...],
               lengths: Mapping[str, Expr]) -> Expr | None:
    """The element of a table of two values at `idx` by look-up of its block; None where it is not
    made of blocks."""
    cut = at_score(table, idx, lengths)
    values = None if cut is None or cut.numel() > LARGEST else _two_values(cut)
    if cut is None or values is None:
        return None
    low, high = values
    kept = patterns.blocks.exact(cut if cut.dtype == torch.bool else cut == high)
    return kept if kept is None or cut.dtype == torch.bool else E.where(kept, high, low)


def _two_values(table: Tensor) -> tuple[Any, Any] | None:
    """(low, high) of a table that holds just these."""
    if table.dtype == torch.bool:
        return False, True
    low, high = (x.item() for x in table.aminmax())
    if low == high or math.isnan(low) or math.isnan(high):
        return None
    for part in table.flatten(0, 1).split(1024):
        if not bool(((part == low) | (part == high)).all()):
            return None
    return low + type(low)(0), high + type(high)(0)  # no negative zero


def at_score(table: Tensor, idx: tuple[Expr, ...], lengths: Mapping[str, Expr]) -> Tensor | None:
    """The table as (H or 1, Q, K), where its indices are these axes, from some place on."""
    axes: list[str] = []
    for e in idx:
        dim = len(axes)
        if table.shape[dim] == 1:
            table = table.select(dim, 0)
            continue
        if e.op == "const" and 0 <= e.value < table.shape[dim]:
            table = table.select(dim, e.value)
            continue
        base, start = (e.args[0], e.args[1]) if e.op == "add" else (e, _FIRST)
        length = lengths.get(base.value) if base.op == "index" else None
        if length is None or length.op != "const" or start.op != "const" or start.value < 0 \
                or start.value + length.value > table.shape[dim] or base.value in axes:
            return None
        table = table.narrow(dim, start.value, length.value)
        axes.append(base.value)
    if axes == ["k", "q"] or axes == ["h", "k", "q"]:
        table = table.transpose(-1, -2)
        axes[-2:] = ["q", "k"]
    if axes == ["q", "k"]:
        return table[None]
    return table if axes == ["h", "q", "k"] else None
