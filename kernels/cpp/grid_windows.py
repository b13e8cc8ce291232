"""Mask -> the window of every coordinate, axis by axis of a grid of tokens.

A mask over a row-major grid z x y x x separates when it is the conjunction of predicates that
relate the query's and the key's coordinate along one axis each:

    keep(q, k) = keep_z(z(q), z(k)) & keep_y(y(q), y(k)) & keep_x(x(q), x(k)) & rest(q, k)

and is a window when every row of every keep_a is an arithmetic progression start, start + step, …
of one step. Walked by (coordinate % step, coordinate), an axis then has windows [start, start +
count) without gaps. Neighbourhoods (arXiv 2504.16922), partitions, bands and windows cropped at
the borders are all of this kind. What is left, such as padding, stays a predicate.

Axes are tables, not formulas, so nothing about a mask is assumed: each is checked entry by entry.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.mask import And, Mask, Neighborhood, Windows
from attnopt.ir.mask_base import K, Q
from attnopt.ir.mask_grid import coordinates

#: entries of an axis' table of pairs that are evaluated
_PAIRS = 1 << 24
#: the coordinate of a query and of a key along the axis that is looked at
_QUERY, _KEY = E.load("query_coordinate", dtype=E.INT), E.load("key_coordinate", dtype=E.INT)


@dataclass(frozen=True, eq=False)
class Axis:
    """order: coordinates as they are walked; start, count: the window of each, in that walk (all
    int32). step: gap between keys before the walk."""

    order: Tensor
    start: Tensor
    count: Tensor
    step: int = 1

    @property
    def length(self) -> int:
        return len(self.order)


@dataclass(frozen=True, eq=False)
class Windows3d:
    """grid: axis lengths as the mask names them (1 to 3); axes: z, y, x, of length 1 where the grid
    has fewer; rest: what they do not say, TRUE if nothing."""

    grid: tuple[int, ...]
    axes: tuple[Axis, Axis, Axis]
    rest: Expr


@functools.lru_cache(maxsize=256)
def windows_of(mask: Mask, tokens: int) -> Windows3d | str:
    """The windows of a mask over `tokens` queries and as many keys, or why it has none."""
    grid = grid_shape(mask, tokens)
    if isinstance(grid, str):
        return grid
    parts: list[list[Expr]] = [[] for _ in grid]
    known: list[list[Neighborhood]] = [[] for _ in grid]
    rest = E.TRUE
    for node in mask.masks if isinstance(mask, And) else (mask,):
        whole = isinstance(node, Neighborhood) and lengths_of(node.length, tokens) == grid
        for part in _conjuncts(_sized(node.predicate(), tokens)):
            place = _axis_of(part, grid)
            if place is None:
                rest = rest & part
            elif isinstance(node, Neighborhood) and whole:
                if node not in known[place[0]]:
                    known[place[0]].append(node)
            else:
                parts[place[0]].append(place[1])
    axes = []
    with torch.inference_mode(False):
        for i, length in enumerate(grid):
            axis = _axis(i, length, known[i], parts[i])
            if isinstance(axis, str):
                return axis
            axes.append(axis)
        one = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
        axes = [Axis(one[0], one[0], one[1])] * (3 - len(axes)) + axes
    return Windows3d(grid, (axes[0], axes[1], axes[2]), rest)


def grid_shape(mask: Mask, tokens: int) -> tuple[int, ...] | str:
    """The lengths of the grid that a mask speaks of, or why there is none of 1 to 3 axes."""
    lengths: list[tuple[int | None, ...]] = [
        m.length for m in mask.walk() if isinstance(m, Neighborhood | Windows)]
    grid = lengths_of(max(lengths, key=len) if lengths else _divisors(mask), tokens)
    if not 1 <= len(grid) <= 3:
        return f"grid must have 1 to 3 axes, got {len(grid)}"
    if math.prod(grid) != tokens or not tokens:
        return f"grid must have {tokens} tokens, got {'x'.join(map(str, grid))}"
    return grid


def window_grid(mask: Mask, tokens: int) -> tuple[int, ...]:
    """The same, () where there is none."""
    grid = grid_shape(mask, tokens)
    return () if isinstance(grid, str) else grid


def lengths_of(length: tuple[int | None, ...], tokens: int) -> tuple[int, ...]:
    inside = math.prod(n for n in length[1:] if n is not None)
    first = tokens // inside if length[0] is None else length[0]
    return (first, *(n for n in length[1:] if n is not None))


def _divisors(mask: Mask) -> tuple[int | None, ...]:
    """Grid lengths by the numbers that the query index is divided by."""
    inside = set()
    for node in mask.predicate().walk():
        if node.op in ("floordiv", "mod") and node.args[1].op == "const":
            own, n = node.args[0], node.args[1].value
            if own is Q:
                inside.add(n)
            elif (node.op == "mod" and own.op == "floordiv" and own.args[0] is Q
                    and own.args[1].op == "const"):
                inside.add(n * own.args[1].value)
    steps, lengths = sorted(n for n in inside if n > 1), []
    for before, n in zip([1, *steps], steps, strict=False):
        if n % before:
            return (None,)
        lengths.append(n // before)
    return (None, *reversed(lengths))


def _sized(expr: Expr, tokens: int) -> Expr:
    return expr.replace({E.size("q"): E.const(tokens), E.size("k"): E.const(tokens)})


def _conjuncts(expr: Expr) -> list[Expr]:
    if expr.op == "and":
        return [part for a in expr.args for part in _conjuncts(a)]
    return [] if expr is E.TRUE else [expr]


@functools.lru_cache(maxsize=256)
def coordinate_names(grid: tuple[int, ...]) -> tuple[dict[Expr, int], dict[Expr, int]]:
    """Expressions that are a coordinate of the query, and of the key: which axis of the grid."""
    found: tuple[dict[Expr, int], dict[Expr, int]] = {}, {}
    for token, names in ((Q, found[0]), (K, found[1])):
        for i, (place, _) in enumerate(coordinates(token, grid)):
            inside = math.prod(grid[i + 1:])
            for same in (place, token // inside % grid[i], token % (inside * grid[i]) // inside):
                names.setdefault(same, i)
    return found


def _axis_of(part: Expr, grid: tuple[int, ...]) -> tuple[int, Expr] | None:
    """The axis that a predicate speaks of alone, and the predicate of its coordinates."""
    queries, keys = coordinate_names(grid)
    if part.slots or part.indices - {"q", "k"} or part.has("size"):
        return None
    for axis in range(len(grid)):
        own = part.replace({
            **{e: _QUERY for e, i in queries.items() if i == axis},
            **{e: _KEY for e, i in keys.items() if i == axis}})
        if not own.indices:
            return axis, own.replace({_QUERY: Q, _KEY: K})
    return None


def _axis(place: int, length: int, known: list[Neighborhood], parts: list[Expr]) -> Axis | str:
    """One axis; of a neighbourhood alone by its formula, else by the table of all pairs."""
    if len(known) == 1 and not parts:
        return neighborhood_axis(known[0], place, length)
    if length * length > _PAIRS:
        return f"an axis must have at most {math.isqrt(_PAIRS)} tokens, got {length}"
    table = torch.ones(length, length, dtype=torch.bool)
    for part in parts:
        table &= torch.as_tensor(evaluate(part, Env((length, length))))
    for node in known:
        table &= table_of(neighborhood_axis(node, place, length))
    return axis_of_table(table)


def neighborhood_axis(node: Neighborhood, place: int, length: int) -> Axis:
    """The window of each coordinate by the definition of `Neighborhood`."""
    w, s, d = node.window[place], node.stride[place], node.dilation[place]
    i = torch.arange(length)
    p, last = i // d, (length - i % d + (d - 1)) // d - 1
    if node.causal[place]:
        leader = torch.minimum(p // s * s + s - 1, last) if s > 1 else p
        first, end = (leader - w + 1).clamp(min=0), p + 1
    else:
        leader = torch.minimum(p // s * s + s // 2, last) if s > 1 else p
        first = torch.minimum((leader - w // 2).clamp(min=0), last - (w - 1))
        first, end = first.clamp(min=0), first + w  # negative where the axis is shorter
    return _walked(first * d + i % d, end - first, d)


def axis_of_table(table: Tensor) -> Axis | str:
    """The windows of a bool table (query, key) of coordinates."""
    count = table.sum(-1)
    if not count.all():
        return "every coordinate must keep a key"
    length = len(table)
    first = table.int().argmax(-1)
    last = length - 1 - table.flip(-1).int().argmax(-1)
    several = count > 1
    steps = ((last - first)[several] // (count - 1)[several]).unique()
    if len(steps) > 1:
        return "windows of an axis must have one step"
    axis = _walked(first, count, int(steps[0]) if len(steps) else 1)
    if not torch.equal(table_of(axis), table):
        return "windows of an axis must have no gaps"
    return axis


def table_of(axis: Axis) -> Tensor:
    """The bool table (query, key) of coordinates that an axis stands for."""
    walk = torch.arange(axis.length)
    kept = (walk >= axis.start[:, None]) & (walk < (axis.start + axis.count)[:, None])
    table = torch.zeros_like(kept)
    order = axis.order.long()
    table[order[:, None], order] = kept
    return table


def _walked(first: Tensor, count: Tensor, step: int) -> Axis:
    """first, count: of the window of each coordinate, with `step` between keys."""
    length = len(first)
    i = torch.arange(length)
    order = torch.argsort(i % step * length + i)
    place = torch.empty_like(order)
    place[order] = i
    return Axis(order.int(), place[first[order]].int(), count[order].int(), step)
