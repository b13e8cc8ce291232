"""The tensor that a moved operand copies, with the role of each of its dimensions.

K[b, h, n, t, d] that data movement makes of k has dimensions of two kinds: *ordinary* ones follow
axes of the site as they are (batch, head, head_dim), the others are the *tokens*, whose index
depends on the query and on the place t in its window. Together they are the grid of keys, and
their row-major index j(n, t) is the neighbour table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from attnopt.passes.analyze.movement import Index, Mover, Piece, shape_of, squeezed
from attnopt.passes.recognize.axes import Axis, Layout, resolve, settle
from attnopt.rules import Decline

#: indices at which an axis of unknown length is looked at
_PROBES = (0, 1, 2, 1009)


@dataclass
class Space:
    """The axes of a site, each a dimension of its own for index tensors."""

    axes: tuple[Axis, ...]

    def along(self, dim: Iterable[Axis]) -> Tensor:
        """The row-major index of a product of axes."""
        total = torch.zeros([1] * len(self.axes), dtype=torch.int64)
        for axis in resolve(dim):
            shape = [1] * len(self.axes)
            shape[self.axes.index(axis)] = -1
            if isinstance(axis.size, int):
                total = total * axis.size + torch.arange(axis.size).view(shape)
            elif bool(total.any()):
                raise Decline("an axis of unknown length inside a product")
            else:
                total = torch.tensor(_PROBES).view(shape)
        return total

    def index(self, layout: Layout) -> Index:
        return tuple(map(self.along, settle(layout)))

    def varies(self, x: Tensor) -> frozenset[Axis]:
        """The axes along which an index tensor has more than one entry."""
        return frozenset(a for a, n in zip(self.axes, x.shape, strict=True) if n > 1)

    def over(self, x: Tensor, axes: Sequence[Axis]) -> Tensor:
        """`x` as a tensor over `axes`, which are in the order of the space and hold all that it
        varies along."""
        shape = [a.size if a in axes else 1 for a in self.axes]
        return x.expand(shape).reshape([a.size for a in axes])


@dataclass
class Base:
    """A tensor that an operand copies.

    dims:  layout of each dimension, None for tokens
    grid:  lengths of the token dimensions; `flat` is the row-major index over them
    where: where the operand is an element of it; elsewhere it is `fill`
    pieces: of the operand, as they were pulled
    fixed: axes of the layout of which one index is read
    """

    node: fx.Node
    dims: tuple[tuple[Axis, ...] | None, ...]
    grid: tuple[int, ...]
    flat: Tensor
    where: Tensor
    fill: tuple[float, ...] = ()
    fixed: dict[Axis, int] = field(default_factory=dict)
    pieces: list[Piece] = field(default_factory=list)

    def layout(self, tokens: tuple[Axis, ...]) -> Layout:
        """The layout when the tokens are the product of `tokens`."""
        from attnopt.passes.recognize.axes import reshape

        own = iter(reshape((tokens,), self.grid))
        return tuple(next(own) if dim is None else dim for dim in self.dims)


def pulled(mover: Mover, space: Space, node: fx.Node, layout: Layout,
           moving: frozenset[Axis]) -> tuple[Base, frozenset[Axis]]:
    """The base of an operand, and the axes of the site that its tokens depend on.

    moving: axes that make a dimension a token: keys and rows
    """
    pieces = mover.pull(node, space.index(layout))
    tensors = [p for p in pieces if p.node is not None]
    if len(tensors) != 1:
        raise Decline("the keys of a query come from several tensors", node)
    piece = replace(tensors[0], where=squeezed(tensors[0].where))
    assert piece.node is not None
    inner = frozenset().union(*(space.varies(x) for x in piece.index))
    shape = shape_of(piece.node)
    uses = [space.varies(x) for x in piece.index]
    tokens: set[int] = set()
    before = -1
    while before != len(tokens):  # what a token depends on makes other dimensions tokens too
        before = len(tokens)
        tokens |= {i for i, used in enumerate(uses) if used & moving}
        moving = moving | frozenset().union(*(uses[i] for i in tokens))
    dims: list[tuple[Axis, ...] | None] = []
    fixed: dict[Axis, int] = {}
    flat = torch.zeros([1] * len(space.axes), dtype=torch.int64)
    grid = []
    for i, (x, n) in enumerate(zip(piece.index, shape, strict=True)):
        if i in tokens:
            if not isinstance(n, int):
                raise Decline("a number of tokens that is not known", piece.node)
            grid.append(n)
            flat = flat * n + x
            dims.append(None)
        else:
            dims.append(_ordinary(space, x, n, fixed, piece.node))
    flat_uses = frozenset().union(*(uses[i] for i in tokens)) if tokens else frozenset()
    flat = torch.where(piece.where, flat, 0) if tokens else flat
    fills = tuple(p.value for p in pieces if p.node is None)
    base = Base(piece.node, tuple(dims), tuple(grid), flat, piece.where, fills, fixed,
                pieces)
    return base, flat_uses & inner


def _ordinary(space: Space, x: Tensor, size: object, fixed: dict[Axis, int],
              node: fx.Node) -> tuple[Axis, ...]:
    """The layout of a dimension whose index is a row-major product of whole axes, perhaps with a
    place of its own (one of q, k and v, say), which becomes a fixed axis."""
    axes = [a for a in space.axes if a in space.varies(x)]
    if not isinstance(size, int):
        if len(axes) == 1 and axes[0].size == size and torch.equal(x, space.along(axes)):
            return tuple(axes)
        raise Decline("an axis of unknown length that is moved", node)
    if size == 1:
        return ()
    origin = int(x[(0,) * x.dim()])
    strides = {}
    total = torch.full([1] * x.dim(), origin)
    for a in axes:
        place = space.axes.index(a)
        at = tuple(1 if i == place else 0 for i in range(x.dim()))
        strides[a] = int(x[at]) - origin
        total = total + strides[a] * space.along((a,))
    if any(not isinstance(a.size, int) for a in axes) or not torch.equal(
            x, total.expand(x.shape)):
        raise Decline("features or heads that are moved with the tokens", node)
    found: list[Axis] = []
    span = 1
    for a in sorted(axes, key=lambda a: strides[a]):
        if strides[a] < span or strides[a] % span:
            raise Decline("features or heads that overlap", node)
        if strides[a] != span:
            span = _hold(found, fixed, strides[a] // span, origin, span)
        found.append(a)
        span *= a.size
    if size % span or origin >= size:
        raise Decline("features or heads that are cut", node)
    if size != span:
        span = _hold(found, fixed, size // span, origin, span)
    check = sum(fixed[a] * math.prod(b.size for b in found[:i])
                for i, a in enumerate(found) if a in fixed)
    if check != origin:
        raise Decline("features or heads that are cut", node)
    return tuple(reversed(found))


def _hold(found: list[Axis], fixed: dict[Axis, int], count: int, origin: int, span: int) -> int:
    """Add an axis of `count` of which one index is read."""
    axis = Axis(count)
    fixed[axis] = origin // span % count
    found.append(axis)
    return span * count
