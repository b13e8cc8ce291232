"""Which tiles of a mask are empty, partly kept or full, for all tiles at once.

    tile_states(predicate, queries, keys, block_q, block_k)   EMPTY / PARTIAL / FULL by tile
    tile_lists(states)                                        the key tiles that each row visits

The predicate is walked once, with tensors over tiles in place of numbers (`attnopt.ir.bounds`).
What depends on q alone or on k alone is evaluated token by token first and then reduced over each
tile, so that it is exact: O(tokens). What joins both is interval arithmetic: O(tiles). Nothing of
tokens x tokens is made, except from an operand that is.

EMPTY and FULL are proofs. PARTIAL is the answer where nothing is shown; it is exact for causal
masks, bands, prefixes, globals, key padding, windows on a line, and on a grid with `GridTile`s.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.bounds import Bounds, Truth, exact, number, rounded, truth, unknown
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.extremes import box_extremes
from attnopt.ir.tiling import GridTile, Tiling, members, tile_count, tile_size

__all__ = ["EMPTY", "FULL", "PARTIAL", "GridTile", "TileLists", "Tiling", "tile_count",
           "tile_lists", "tile_size", "tile_states"]

EMPTY, PARTIAL, FULL = 0, 1, 2
#: values of a part that is evaluated token by token; a larger part goes by intervals
LARGEST = 1 << 24


def tile_states(predicate: Expr, queries: int, keys: int, block_q: Tiling, block_k: Tiling,
                leading: Sequence[int] = (), operands: Mapping[str, Tensor] | None = None,
                *, missing: bool = False) -> Tensor:
    """int8 (*leading or 1, query tiles, key tiles) of EMPTY, PARTIAL or FULL.

    predicate: bool Expr over q, k, leading axes, sizes and operands
    block_q, block_k: tokens of a tile, or a `GridTile` of the queries or the keys
    leading:   lengths of the leading axes in tensor order; along axes that the predicate does not
               vary with, the result has length 1
    operands:  tensors by slot, as the predicate loads them
    missing:   operands may be missing, and then hold anything

    A tile that the end of an axis cuts off is judged by the tokens that exist. Raises ValueError
    for a predicate that is not bool, blocks that do not fit and operands that must not be missing.
    """
    if predicate.dtype != E.BOOL:
        raise ValueError(f"predicate must be a bool Expr, got {predicate}")
    for block in (block_q, block_k):
        if isinstance(block, int) and block < 1:
            raise ValueError(f"block must be positive, got {block}")
    walk = _Walk(queries, keys, block_q, block_k, tuple(leading), operands or {}, missing)
    found = walk.run(predicate)
    assert isinstance(found, Truth)
    states = torch.where(found.may, torch.where(found.may_not, PARTIAL, FULL), EMPTY)
    states = states.to(torch.int8)
    states = states.view(*[1] * (len(leading) + 2 - states.dim()), *states.shape)
    return states.expand(*states.shape[:-2], tile_count(block_q, queries),
                         tile_count(block_k, keys)).contiguous()


class _Walk:
    """One predicate and its tiles."""

    def __init__(self, queries: int, keys: int, block_q: Tiling, block_k: Tiling,
                 leading: tuple[int, ...], operands: Mapping[str, Tensor], missing: bool) -> None:
        self.device = next((t.device for t in operands.values()), None)
        self.env = Env((*leading, queries, keys), operands, device=self.device)
        self.members = {-2: members(block_q, queries, self.device),
                        -1: members(block_k, keys, self.device)}
        self.shapes: dict[Expr, tuple[int, ...] | None] = {}
        self.missing = missing

    def run(self, predicate: Expr) -> Bounds | Truth:
        order = list(predicate.walk())
        for node in order:
            self.shapes[node] = self._shape(node)
        needed, stack = set(), [predicate]
        while stack:  # from the top, down to the parts that are evaluated token by token
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(() if self.shapes[node] is not None else node.args)
        done: dict[Expr, Bounds | Truth] = {}
        for node in order:
            if node in needed:
                done[node] = self._node(node, [done[a] for a in node.args if a in done])
        return done[predicate]

    def _shape(self, node: Expr) -> tuple[int, ...] | None:
        """The shape of a part that is made of ints along q or k alone, None for any other."""
        if node.dtype == E.FLOAT or node.op == "stat" or self._is_missing(node):
            return None
        shapes: list[Sequence[int]] = [(1, 1)]
        for argument in node.args:
            shape = self.shapes[argument]
            if shape is None:
                return None
            shapes.append(shape)
        if node.op == "index":
            place = self.env.axes.index(node.value) if node.value in self.env.axes else 0
            shapes.append((self.env.size(node.value), *[1] * (len(self.env.axes) - 1 - place)))
        if node.op == "load" and not node.args:
            shapes.append(self.env.operand(node.value).shape)
        found = _broadcast(shapes)
        return found if 1 in found[-2:] and math.prod(found) <= LARGEST else None

    def _is_missing(self, node: Expr) -> bool:
        return self.missing and node.op == "load" and node.value not in self.env.operands

    def _node(self, node: Expr, args: list[Bounds | Truth]) -> Bounds | Truth:
        if self.shapes[node] is not None:
            found = evaluate(node, self.env)
            if not torch.is_tensor(found):  # filled in where it is, not copied there
                found = torch.full((), found, device=self.device)
            return self._pooled(node, found.to(self.device))
        match node.op:
            case "load" if self._is_missing(node):
                return self._unknown(node)
            case "load" if node.args:
                return self._table(node, [a for a in args if isinstance(a, Bounds)])
            case "load":
                return self._pooled(node, self.env.operand(node.value))
            case "const":
                point = torch.full((1, 1), float(node.value), dtype=torch.float64,
                                   device=self.device)
                return self._unknown(node) if math.isnan(node.value) else (
                    rounded(Bounds.of(point, point)))
            case _ if node.dtype == E.BOOL:
                return truth(node, args)
            case _ if node.args:
                return number(node, args)
        return self._unknown(node)

    def _unknown(self, node: Expr) -> Bounds | Truth:
        if node.dtype == E.BOOL:
            either = torch.ones((1, 1), dtype=torch.bool, device=self.device)
            return Truth(either, either)
        return unknown(node, self.device)

    def _pooled(self, node: Expr, values: Tensor) -> Bounds | Truth:
        """Extremes over the tiles of a tensor that broadcasts against the scores."""
        if values.dim() < 2:
            values = values.view(*[1] * (2 - values.dim()), *values.shape)
        low, high, nan = _split(values)
        for axis in (-2, -1):
            if values.shape[axis] != 1:
                low = _reduce(low, axis, self.members[axis], torch.amin)
                high = _reduce(high, axis, self.members[axis], torch.amax)
                nan = nan if nan is None else _reduce(nan, axis, self.members[axis], torch.amax)
        return _bounds(node, low, high, nan, values.dtype)

    def _table(self, node: Expr, indices: list[Bounds]) -> Bounds | Truth:
        """Extremes of a gathered operand over the boxes that its indices span."""
        values = self.env.operand(node.value)
        if values.dim() != len(indices):
            raise ValueError(
                f"operand {node.value!r} must have {len(indices)} axes, got {values.dim()}")
        low, high, nan = _split(values)
        # Infinite bounds are clamped before they become ints.
        first = [i.lo.clamp(0, n - 1).long() for i, n in zip(indices, low.shape, strict=True)]
        last = [i.hi.clamp(0, n - 1).long() for i, n in zip(indices, low.shape, strict=True)]
        low, high = box_extremes(low, high, first, last)
        if nan is not None:
            nan = box_extremes(nan, nan, first, last)[1]
        return _bounds(node, low, high, nan, values.dtype)


def _broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """torch.broadcast_shapes, which takes longer than all else on a short sequence."""
    rank = max(map(len, shapes))
    columns = zip(*((1,) * (rank - len(s)) + tuple(s) for s in shapes), strict=True)
    return tuple(next((n for n in column if n != 1), 1) for column in columns)


def _split(values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """(for the minimum, for the maximum, whether nan): nan takes no part in the extremes."""
    if values.dtype == torch.bool:
        values = values.to(torch.int8)
    if not values.is_floating_point():
        return values, values, None
    nan = values.isnan()
    if not nan.any():
        return values, values, None
    low = torch.where(nan, math.inf, values)
    return low, torch.where(nan, -math.inf, values), nan.to(torch.int8)


def _reduce(values: Tensor, axis: int, tokens: Tensor,
            extreme: Callable[[Tensor, int], Tensor]) -> Tensor:
    taken = values.index_select(axis, tokens.flatten())
    return extreme(taken.unflatten(axis, tuple(tokens.shape)), axis)


def _bounds(node: Expr, low: Tensor, high: Tensor, nan: Tensor | None, dtype: torch.dtype,
            ) -> Bounds | Truth:
    if node.dtype == E.BOOL:  # a bool load of numbers means that they are not 0
        if dtype == torch.bool:
            return Truth(high > 0, low < 1)
        return Truth((low != 0) | (high != 0), (low <= 0) & (high >= 0))
    if node.dtype == E.INT:
        return exact(low.double(), high.double())
    missing = torch.zeros_like(low, dtype=torch.bool) if nan is None else nan > 0
    found = Bounds(low.double(), high.double(), missing)  # low > high where all of it is nan
    return rounded(found) if dtype == torch.float64 else found


@dataclass(frozen=True)
class TileLists:
    """The key tiles that each query tile visits: FULL ones first, each kind in ascending order.

    starts:  int32 (*L or 1, query tiles + 1). Query tile i visits tiles[starts[i] : starts[i + 1]]
    partial: int32 (*L or 1, query tiles): from here on, its tiles need the mask
    tiles:   int32 (n,) key tiles, of all leading entries one after the other
    kinds:   int8 (n,) FULL or PARTIAL
    """

    starts: Tensor
    partial: Tensor
    tiles: Tensor
    kinds: Tensor

    def row(self, *place: int) -> tuple[list[int], list[int]]:
        """(full, partial) key tiles of one query tile, by the place in (*L or 1, query tiles)."""
        a, b = int(self.starts[place]), int(self.partial[place])
        c = int(self.starts[(*place[:-1], place[-1] + 1)])
        return self.tiles[a:b].tolist(), self.tiles[b:c].tolist()


def tile_lists(states: Tensor) -> TileLists:
    """Compressed rows of `tile_states`; give it transposed states for the lists of key tiles."""
    *leading, rows, columns = states.shape
    flat = states.reshape(math.prod(leading) * rows, columns)
    full, visited = (flat == FULL).sum(-1), (flat != EMPTY).sum(-1)
    ends = visited.cumsum(0)
    first = ends - visited
    tiles = torch.empty(int(visited.sum()), dtype=torch.int32, device=states.device)
    kinds = torch.empty(len(tiles), dtype=torch.int8, device=states.device)
    for kind, begin, count in ((FULL, first, full), (PARTIAL, first + full, visited - full)):
        row, column = (flat == kind).nonzero(as_tuple=True)
        # What is found in row-major order moves on by what other kinds take up before it.
        place = torch.arange(len(row), device=states.device) + (
            begin - (count.cumsum(0) - count))[row]
        tiles[place] = column.int()
        kinds[place] = kind
    starts = first.view(*leading, rows)
    last = ends.view(*leading, rows)[..., -1:] if rows else starts.new_zeros(*leading, 1)
    return TileLists(torch.cat([starts, last], -1).int(), (first + full).view(*leading, rows).int(),
                     tiles, kinds)
