"""Data movement read backwards, in numbers: which element of which tensor does each element copy?

`Mover.pull(node, index)` takes one int64 tensor per dimension of `node`, which broadcast against
each other, and walks back over operations that only move elements: views, slices, padding,
concatenation, rolls, gathers with a constant table, F.unfold (im2col), Tensor.unfold, as_strided.
What it finds are pieces: where the element is a constant, and where it is an element of a tensor
that no such operation makes. An index stays as small as the axes that it varies along, so that
K[b, h, n, t, d] = k[b, h, j(n, t), d] costs a table of n x t and never one of the whole K.

Constants and buffers that are read as index tables are named in `guards`; a table that depends on
an input ends the walk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.passes.analyze.by_value import Values
from attnopt.passes.analyze.lift import bind
from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.axes import length, quotient, same_length

Index = tuple[Tensor, ...]
#: elements of one index tensor
LARGEST = 1 << 25


class Unmoved(LookupError):
    """The operation does more than move elements, or it is not known how; the message says why."""


@dataclass(frozen=True)
class Piece:
    """Elements that are read from `node` at `index`, or are the number `value`, where `where`."""

    node: fx.Node | None
    index: Index
    where: Tensor
    value: float = 0.0
    reason: str = ""


def squeezed(x: Tensor) -> Tensor:
    """`x` without the axes along which it is the same."""
    for dim in range(x.dim()):
        if x.shape[dim] > 1 and bool((x == x.narrow(dim, 0, 1)).all()):
            x = x.narrow(dim, 0, 1)
    return x


def agreed(x: Tensor, where: Tensor) -> Tensor:
    """`x` without the axes along which it is the same wherever `where`; elsewhere it is anything.
    """
    for dim in range(x.dim()):
        if x.shape[dim] == 1:
            continue
        size = torch.broadcast_shapes(x.shape, where.shape)
        full, shown = checked(x.expand(size)), where.expand(size)
        first = torch.take_along_dim(full, shown.int().argmax(dim, keepdim=True), dim)
        if bool(((full == first) | ~shown).all()):
            x, where = squeezed(first), shown.any(dim, keepdim=True)
    return x


def merged(pieces: Sequence[Piece]) -> list[Piece]:
    """One piece for each tensor and each constant."""
    found: dict[Any, Piece] = {}
    for p in pieces:
        if not bool(p.where.any()):
            continue
        key: Any = p.node if p.node is not None else repr(p.value)
        have = found.get(key)
        if have is not None:
            index = tuple(_choose(have.where, a, b)
                          for a, b in zip(have.index, p.index, strict=True))
            p = Piece(p.node, index, have.where | p.where, p.value, have.reason or p.reason)
        found[key] = p
    return list(found.values())


def _choose(where: Tensor, a: Tensor, b: Tensor) -> Tensor:
    if a is b or (a.shape == b.shape and torch.equal(a, b)):
        return a
    return checked(torch.where(where, a, b))


def checked(x: Tensor) -> Tensor:
    if x.numel() > LARGEST:
        raise Unmoved(f"an index of {x.numel()} elements")
    return x


class Mover:
    """Pulls elements back through one functional graph.

    constant: the number that every element of a node is, or None
    ends:     names of operations at which the walk ends; "pad" is padding of every kind
    """

    def __init__(self, values: Values, constant: Callable[[fx.Node], Any], *,
                 ends: frozenset[str] = frozenset()) -> None:
        self.values, self.constant, self.ends = values, constant, ends
        self.guards: set[str] = set()
        self.passed: set[fx.Node] = set()

    def pull(self, node: fx.Node, index: Index, where: Tensor | None = None) -> list[Piece]:
        """The pieces that `node` is made of at `index`, where `where`."""
        if where is None:
            where = torch.ones([1] * (index[0].dim() if index else 0), dtype=torch.bool)
        number = self.constant(node)
        if number is not None:
            return [Piece(None, (), where, float(number))]
        from attnopt.passes.analyze.movement_rules import RULES

        reason = ""
        if node.op == "call_function" and not node.meta.get("attnopt_opaque"):
            rule = RULES.get(op_name(node))
            try:
                if rule is None or op_name(node) in self.ends:
                    raise Unmoved(op_name(node))
                found = rule(self, node, bind(node), index, where)
                self.passed.add(node)
                return merged(found)
            except LookupError as why:
                reason = str(why)
        return [Piece(node, index, where, reason=reason)]

    def table(self, node: fx.Node) -> Tensor:
        """The values of an index tensor."""
        sources = self.values.sources(node)
        if sources is None:
            raise Unmoved(f"{node.name} depends on an input")
        found = self.values.evaluate(node)
        self.guards |= sources
        return found.cpu()

    def lookup(self, node: fx.Node, index: Index) -> Tensor:
        """table[index] of an index tensor."""
        table = self.table(node)
        if not table.dim():
            return table.reshape([1] * (index[0].dim() if index else 0))
        places = tuple(i.clamp(0, n - 1) for i, n in zip(index, table.shape, strict=True))
        checked(torch.empty(torch.broadcast_shapes(*(p.shape for p in places)), device="meta"))
        return squeezed(table[places])


def shape_of(node: fx.Node) -> list[Any]:
    return [length(n) for n in node.meta["val"].shape]


def number(x: Any) -> int:
    if isinstance(x, fx.Node):
        x = x.meta.get("val")
    x = length(x)
    if not isinstance(x, int):
        raise Unmoved("a symbolic position")
    return x


def put(index: Index, dim: int, value: Tensor) -> Index:
    return (*index[:dim], value, *index[dim + 1:])


def zero(index: Index) -> Tensor:
    return torch.zeros([1] * (index[0].dim() if index else 0), dtype=torch.int64)


def from_end(position: Any, n: Any) -> int:
    at = number(position)
    if at < 0:
        return max(0, at + number(n))
    return at if not isinstance(n, int) else min(at, n)


def aligned(index: Index, node: fx.Node) -> Index:
    """The index into a tensor that is broadcast to what `index` is an index of."""
    shape = shape_of(node)
    own = index[len(index) - len(shape):]
    return tuple(zero(index) if n == 1 else i for n, i in zip(shape, own, strict=True))


def reshaped(index: Index, new: Sequence[Any], old: Sequence[Any]) -> Index:
    """The index into a tensor of lengths `old` of what a reshape to `new` has at `index`."""
    if 0 in new:
        raise Unmoved("an empty tensor")
    made: list[Tensor] = []
    i = j = 0
    while i < len(new) or j < len(old):
        first, start = i, j
        i, j = min(i + 1, len(new)), min(j + 1, len(old))
        while not same_length(n := math.prod(new[first:i]), m := math.prod(old[start:j])):
            if i < len(new) and (quotient(m, n) is not None or j == len(old)):
                i += 1
            elif j < len(old):
                j += 1
            else:
                raise Unmoved("lengths whose products do not match")
        if j - start == 1 and sum(k != 1 for k in new[first:i]) == 1:
            made.append(next(index[d] for d in range(first, i) if new[d] != 1))
            continue
        flat = zero(index)
        for d in range(first, i):
            if new[d] != 1:
                flat = checked(flat * (number(new[d]) if d > first else 1) + index[d])
        parts = []
        for d in range(j - 1, start - 1, -1):
            if all(k == 1 for k in old[start:d]):
                parts.append(squeezed(flat))
                flat = zero(index)
            else:
                parts.append(squeezed(flat % number(old[d])))
                flat = flat // number(old[d])
        made.extend(reversed(parts))
    return tuple(made)
