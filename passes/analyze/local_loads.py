"""Tensors that the logits of a local attention load at (n, t), loaded by (q, k) instead.

One whose tokens are those of the keys is a key operand: its element of key k. Any other is a table
whose indices are affine in the coordinates of query and key, or in the place of the key in the
window; the coefficients are fitted and then checked at every cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.mask_base import Q
from attnopt.ir.mask_grid import coordinates
from attnopt.ir.spec import Operand
from attnopt.passes.analyze.local_bases import Space, _ordinary
from attnopt.passes.analyze.local_logits import Leaf
from attnopt.passes.analyze.movement import shape_of
from attnopt.passes.analyze.neighbours import Structure
from attnopt.passes.canonical import Target
from attnopt.passes.canonical import Tensor as Placed
from attnopt.passes.recognize.axes import Axis, reshape, resolve
from attnopt.rules import Decline

_SAMPLE = 4096


def _typed(x: float, kind: str) -> bool | int | float:
    return bool(x) if kind == E.BOOL else int(x) if kind == E.INT else x


@dataclass
class Loads:
    """Loads by (q, k).

    over:   brings a tensor over cells to (N, T) in the author's order
    tables: the neighbour table and what is visible, in the order of the rows, and that order
    """

    space: Space
    found: Structure
    cells: tuple[Axis, ...]
    over: Callable[[Tensor], Tensor]
    tables: tuple[Tensor, Tensor, Tensor | None]
    scores: Target
    names: tuple[str, ...]
    axis: Axis
    given: dict[Axis, int]
    declared: list[Operand] = field(default_factory=list)
    tensors: dict[str, Placed] = field(default_factory=dict)
    fixed: dict[Axis, int] = field(default_factory=dict)

    def bind(self, e: Expr, leaves: Mapping[str, Leaf]) -> Expr:
        """`e` with its leaves as loads of operands."""
        used = {leaf.value: leaf for leaf in e.leaves if leaf.op == "load" and leaf.value in leaves}
        return e.replace({load: self._load(leaves[slot]) for slot, load in used.items()})

    def _load(self, leaf: Leaf) -> Expr:
        if leaf.levels is not None:
            return self._of_level(leaf)
        found = self._of_key(leaf)
        return found if found is not None else self._of_table(leaf)

    def _visible(self, x: Tensor) -> Tensor:
        """The values of a tensor over cells at the visible ones, rows in the order of the site."""
        _, visible, place = self.tables
        flat = self.over(x)
        if place is not None:
            ordered = torch.empty_like(flat)
            ordered[place] = flat
            flat = ordered
        return flat[visible]

    def _of_key(self, leaf: Leaf) -> Expr | None:
        """An operand whose tokens are the keys."""
        table, visible, _ = self.tables
        frame = frozenset(self.cells)
        shape = shape_of(leaf.node)
        uses = [self.space.varies(x) for x in leaf.index]
        tokens = [i for i, u in enumerate(uses) if u & frame]
        grid = [shape[i] for i in tokens]
        if any(not isinstance(n, int) or not uses[i] <= frame for n, i in zip(
                grid, tokens, strict=True)) or math.prod(grid) != self.axis.size:
            return None
        flat = torch.zeros([1] * len(self.space.axes), dtype=torch.int64)
        for i, n in zip(tokens, grid, strict=True):
            flat = flat * n + leaf.index[i]
        if not torch.equal(self._visible(flat), table[visible]):
            return None
        fixed: dict[Axis, int] = {}
        own = iter(reshape(((self.axis,),), grid))
        try:
            layout = tuple(next(own) if i in tokens else _ordinary(
                self.space, x, n, fixed, leaf.node)
                for i, (x, n) in enumerate(zip(leaf.index, shape, strict=True)))
        except Decline:
            return None
        self.fixed |= fixed
        have = {a for dim in layout for a in dim}
        along = tuple(n for n, dim in zip(self.names, self.scores, strict=True)
                      if have & set(resolve(dim)))
        role = "bias" if leaf.dtype == E.FLOAT else "mask"
        self.declared.append(Operand(leaf.slot, along, leaf.dtype, role))
        self.tensors[leaf.slot] = Placed(leaf.node, layout, self.scores)
        return E.load(leaf.slot, dtype=leaf.dtype)

    def _of_level(self, leaf: Leaf) -> Expr:
        """One of two numbers, by a box of keys: what padding of a plane of ones leaves."""
        table, visible, _ = self.tables
        assert leaf.levels is not None
        values = self._visible(leaf.levels).double()
        keys = table[visible]
        by_key = torch.full((self.axis.size,), math.nan, dtype=torch.float64)
        by_key[keys] = values
        if not torch.equal(by_key[keys], values):
            raise Decline("a mask of the window that is finite and not one of keys", leaf.node)
        grid = self.found.keys
        coordinates = [j for _, j, _ in self.found.coordinates()]
        numbers = by_key[~by_key.isnan()].unique().tolist()
        for number in numbers:
            held = (by_key == number).view(grid).nonzero()
            low, high = held.amin(0).tolist(), held.amax(0).tolist()
            inside, keep = torch.ones(grid, dtype=torch.bool), E.TRUE
            for a, (lo, hi, n, j) in enumerate(zip(low, high, grid, coordinates, strict=True)):
                at = torch.arange(n).view([-1 if i == a else 1 for i in range(len(grid))])
                inside = inside & (at >= lo) & (at <= hi)
                keep = keep & (j >= lo if lo else E.TRUE) & (j <= hi if hi < n - 1 else E.TRUE)
            others = [x for x in numbers if x != number]
            known = ~by_key.isnan()
            if torch.equal(inside.reshape(-1)[known], (by_key == number)[known]):
                pair = [E.const(_typed(x, leaf.dtype)) for x in (number, *(others or [number]))]
                return E.where(keep, pair[0], pair[1])
        raise Decline("a mask of the window that is finite and no box of keys", leaf.node)

    def _of_table(self, leaf: Leaf) -> Expr:
        """A table that is loaded at computed indices."""
        places = [self._place(x, leaf) for x in leaf.index]
        own = tuple((Axis(n),) for n in shape_of(leaf.node))
        self.declared.append(Operand(leaf.slot, None, leaf.dtype, "table"))
        self.tensors[leaf.slot] = Placed(leaf.node, own, own)
        return E.load(leaf.slot, *places, dtype=leaf.dtype)

    def _place(self, x: Tensor, leaf: Leaf) -> Expr:
        """An index of a table, by leading axes or by the coordinates of query and key."""
        uses = self.space.varies(x)
        if not uses & frozenset(self.cells):
            return self._leading(x, uses, leaf)
        if not uses <= frozenset(self.cells):
            raise Decline("a bias whose place depends on head and neighbour together", leaf.node)
        values = self._visible(x).double()
        for features in self._features():
            columns = [torch.ones_like(values), *(v for _, v in features)]
            pick = torch.linspace(0, len(values) - 1, min(len(values), _SAMPLE)).long()
            matrix = torch.stack([c[pick] for c in columns], 1)
            solved = torch.linalg.lstsq(matrix, values[pick, None], driver="gelsd").solution[:, 0]
            whole = solved.round()
            if bool(((solved - whole).abs() > 1e-3).any()):
                continue
            if torch.equal(sum(c * w for c, w in zip(columns, whole, strict=True)), values):
                total = E.const(int(whole[0]))
                for (e, _), w in zip(features, whole[1:].tolist(), strict=True):
                    if w:
                        total = total + e * int(w)
                return total
        raise Decline("a bias over the window that is no table of offsets", leaf.node)

    def _leading(self, x: Tensor, uses: frozenset[Axis], leaf: Leaf) -> Expr:
        total = E.const(int(x[(0,) * x.dim()]))
        rebuilt = torch.full([1] * x.dim(), int(total.value))
        for name, dim in zip(self.names, self.scores, strict=True):
            axes = resolve(dim)
            if len(axes) == 1 and axes[0] in uses:
                at = self.space.along(axes)
                first = tuple(1 if n > 1 else 0 for n in at.shape)
                step = int(x[first] - x[(0,) * x.dim()])
                total = total + E.index(name) * step
                rebuilt = rebuilt + at * step
        if not torch.equal(*torch.broadcast_tensors(rebuilt, x)):
            raise Decline("a bias that is moved along the heads", leaf.node)
        return total

    def _features(self) -> list[list[tuple[Expr, Tensor]]]:
        """Sets of expressions that an index may be affine in, with their values where visible."""
        table, visible, _ = self.tables
        number = len(table)
        inner, keys = math.prod(self.found.keys), []
        for n in self.found.keys:
            inner //= n
            keys.append(table // inner % n)
        expressions = [j for _, j, _ in self.found.coordinates()]
        of_key = list(zip(expressions, (k[visible].double() for k in keys), strict=True))
        starts, of_query = [], []
        for i, _, run in self.found.coordinates():
            if i is not None and run.family != "all":
                starts.append(self._row(run.start(i), number))
        for c, _ in coordinates(Q, self.found.rows):
            of_query.append(self._row(c, number))
        return [of_key, of_query, [*of_key, *starts], [*of_key, *of_query]]

    def _row(self, e: Expr, number: int) -> tuple[Expr, Tensor]:
        table, visible, _ = self.tables
        value = torch.as_tensor(evaluate(e, Env((number, math.prod(self.found.keys)))))
        return e, value.expand(number, 1).expand(visible.shape)[visible].double()
