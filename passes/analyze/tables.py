"""Table: which keys each row keeps, as truth values that are looked at a block of rows at a time.

A table is a tensor (the values of a constant mask) or a predicate at known lengths. Nothing of its
size is ever made: `take` gives some rows, `blocks` all of them, one block after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.mask import Mask

#: Elements of a block of rows, and of a table that is looked at as a whole.
BLOCK, LARGEST = 2**22, 2**28


@dataclass(frozen=True)
class Table:
    """`take` gives the rows at some places as a bool tensor (places, keys)."""

    queries: int
    keys: int
    take: Callable[[Tensor], Tensor]

    @staticmethod
    def of_values(values: Tensor, value: Tensor) -> Table:
        """Where a (Q, K) tensor is `value`."""
        return Table(values.shape[0], values.shape[1],
                     lambda rows: values.index_select(0, rows.to(values.device)).eq(value).cpu())

    @staticmethod
    def of_predicate(keep: Expr, queries: int, keys: int, sizes: dict[str, int]) -> Table:
        """Where a predicate of q, k and sizes holds."""
        at_rows = keep.replace({E.index("q"): E.load("rows", E.index("q"), dtype=E.INT)})

        def take(rows: Tensor) -> Tensor:
            shape = (len(rows), keys)
            env = Env(shape, {"rows": rows}, sizes=sizes | {"q": queries, "k": keys})
            return torch.as_tensor(evaluate(at_rows, env), dtype=torch.bool).expand(shape)
        return Table(queries, keys, take)

    def part(self, rows: range, columns: range) -> Table:
        """The sub-table of some rows and columns."""
        return Table(len(rows), len(columns), lambda places: self.take(
            places + rows.start)[:, columns.start : columns.stop])

    def inverted(self) -> Table:
        return Table(self.queries, self.keys, lambda rows: ~self.take(rows))

    def blocks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(places, rows) of all rows, in order."""
        step = max(1, BLOCK // max(1, self.keys))
        for start in range(0, self.queries, step):
            places = torch.arange(start, min(start + step, self.queries))
            yield places, self.take(places)

    def equals(self, mask: Mask) -> bool:
        """Is `mask`, at these lengths, this very table?"""
        other = Table.of_predicate(mask.predicate(), self.queries, self.keys, {})
        return all(torch.equal(rows, other.take(places)) for places, rows in self.blocks())


@dataclass(frozen=True)
class Runs:
    """Rows that each keep `count` keys from `first` to `last` in steps of `step`, at least one."""

    first: Tensor
    last: Tensor
    step: int

    @property
    def count(self) -> Tensor:
        return (self.last - self.first) // self.step + 1


def runs_of(table: Table) -> Runs | None:
    """The runs of all rows; None where a row keeps nothing, or keys at uneven distances."""
    firsts, lasts, step = [], [], 0
    columns = torch.arange(table.keys)
    for _, rows in table.blocks():
        first = rows.to(torch.uint8).argmax(1)
        last = table.keys - 1 - rows.flip(1).to(torch.uint8).argmax(1)
        if not bool(rows.gather(1, first[:, None]).all()):
            return None
        longest = int((last - first).argmax())
        places = rows[longest].nonzero().flatten()
        if len(places) > 1:
            own = int(places[1] - places[0])
            if step not in (0, own):
                return None
            step = own
        inside = (first[:, None] <= columns) & (columns <= last[:, None])
        if step > 1:
            inside &= (columns - first[:, None]) % step == 0
        if not torch.equal(rows, inside):
            return None
        firsts.append(first)
        lasts.append(last)
    return Runs(torch.cat(firsts), torch.cat(lasts), max(step, 1)) if firsts else None
