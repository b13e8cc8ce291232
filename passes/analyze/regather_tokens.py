"""gathered_tokens: rows of a tensor, each where a window wants it, as one operation of a view.

It stands in functional views only, where `regather` puts it; what is local attention is then read
over the tokens themselves, and nothing is ever gathered.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.passes.analyze.movement import Index, Mover, Piece, checked, shape_of, squeezed
from attnopt.rules import Decline

NAME = "gathered_tokens"
#: elements of a gathered tensor up to which both programs are tried on random numbers
LARGEST = 1 << 27
LETTERS = "abcdefghijklmnopqrsuvwxyz"


class NotLocal(Decline):
    """Moved scores were put back, but make no local attention: nobody may gather these keys."""


@dataclass(frozen=True, eq=False, repr=False)
class Gathered:
    """x[tables] of the given shape, or numbers where `fills` say so.

    tables: an index tensor per dimension of x; like the masks of `fills` they broadcast to `shape`
    """

    tables: Index
    fills: tuple[tuple[Tensor, float], ...]
    shape: tuple[int, ...]

    @property
    def __name__(self) -> str:
        return NAME

    def __repr__(self) -> str:
        return NAME

    def __call__(self, x: Tensor) -> Tensor:
        places = tuple(t.clamp(0, n - 1) for t, n in zip(self.tables, x.shape, strict=True))
        found = x[places].expand(self.shape)
        for where, value in self.fills:
            found = torch.where(where, value, found)
        return found

    def pull(self, m: Mover, source: fx.Node, index: Index, where: Tensor) -> list[Piece]:
        """The rule of `movement`."""
        def at(table: Tensor) -> Tensor:
            places = tuple(i if n > 1 else torch.zeros_like(i)
                           for i, n in zip(index, table.shape, strict=True))
            used = [p for p, n in zip(places, table.shape, strict=True) if n > 1]
            if not used:
                return table.reshape([1] * index[0].dim())
            checked(torch.empty(torch.broadcast_shapes(*(u.shape for u in used)), device="meta"))
            return squeezed(table[tuple(p if n > 1 else torch.zeros(
                [1] * index[0].dim(), dtype=torch.int64) for p, n in zip(
                    places, table.shape, strict=True))])

        pieces, rest = [], where
        for mask, value in self.fills:
            here = at(mask)
            pieces.append(Piece(None, (), rest & here, value))
            rest = rest & ~here
        return [*m.pull(source, tuple(map(at, self.tables)), rest), *pieces]


def rule(m: Mover, node: fx.Node, index: Index, where: Tensor) -> list[Piece]:
    made, source = node.target, node.args[0]
    assert isinstance(made, Gathered) and isinstance(source, fx.Node)
    return made.pull(m, source, index, where)


def tried(made: Gathered, node: fx.Node) -> None:
    if math.prod(made.shape) > LARGEST:
        raise Decline("moved scores that are too large to be tried out", node)


def random_values(*nodes: fx.Node) -> dict[fx.Node, Any]:
    """Random numbers, in memory as the values of the nodes are, which `as_strided` relies on."""
    generator = torch.Generator().manual_seed(0)
    found: dict[fx.Node, Any] = {}
    for n in dict.fromkeys(nodes):
        shape, steps = shape_of(n), n.meta["val"].stride()
        found[n] = torch.randn(shape, generator=generator, dtype=torch.float64)
        if all(step or size == 1 for step, size in zip(steps, shape, strict=True)):
            found[n] = torch.empty_strided(shape, steps, dtype=torch.float64).copy_(found[n])
    return found


def emit(view: Any, target: Any, args: tuple[Any, ...], like: fx.Node, shape: Sequence[int],
         typed: fx.Node) -> fx.Node:
    """A node of the view that stands for the author's `like`."""
    node: fx.Node = view.graph.call_function(target, args)
    node.meta = {k: v for k, v in like.meta.items() if k != "val"}
    value = typed.meta["val"]
    with value.fake_mode:
        node.meta["val"] = value.new_empty(tuple(shape))
    view.author[node], view.birth[node] = view.author[like], view.birth[like]
    return node
