"""Samples that are written out: the four texels around a place, read by index, times their shares.

    f = floor(x), g = floor(y)
    sample = sum over i, j in {0, 1} of  v[g + j, f + i] * share_i(x) * share_j(y)
    share_0(x) = 1 - (x - f),  share_1(x) = x - f

which is F.grid_sample's linear sample with zeros outside, at (x, y) in texels, if a corner outside
of the map counts as 0. Exports without GridSample spell it so: the map is padded by zeros and
indices are clamped into what is padded (Pad, Gather, Mul, Add), or indices are clamped into the map
and a mask of the corners inside is a factor, or hides the others (torch.where); as in CUDA kernels
one more mask of the whole sample may say that x and y are near the map. The corners are summed, a
stack of them is, or torch.lerp mixes them. All of it is proved from the program: which texel a
corner is (`sampling_texels`), its share of it along each axis, and that nothing but 0 is read where
it is clamped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    broadcast,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.recognize.contraction import reduced_dims
from attnopt.passes.recognize.layout import LAYOUT_OPS
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.sampling_parts import moved
from attnopt.passes.recognize.sampling_places import (
    ORDER,
    Places,
    converts,
    fraction,
    gap,
    rounded,
    same,
)
from attnopt.passes.recognize.sampling_sums import Operand, Sample
from attnopt.passes.recognize.sampling_texels import READS, Affine, Corner, texel, unpadded
from attnopt.rules import Decline

#: nodes between the sum of the corners and the four look-ups
_MOST_NODES = 64
_AND = frozenset(("logical_and", "bitwise_and", "__and__"))
_OR = frozenset(("logical_or", "bitwise_or", "__or__"))
_NOT = frozenset(("logical_not", "bitwise_not"))
_MIXES = frozenset(("add", "mul", "sub", "lerp"))
_JOINS = frozenset(("stack", "cat", "concat"))
#: what a sample may end with
_ENDS = frozenset(("add", "lerp", "sum", "mul", "where", "masked_fill"))
_CONTRARY = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


class _Factor(NamedTuple):
    """A tensor that corners are multiplied by.

    flipped: 1 - the share, or the contrary of the mask
    hides:   a mask outside of which the product is 0, whatever the factors
    """

    node: Any
    layout: Layout
    flipped: bool = False
    hides: bool = False


def corner_reads(node: fx.Node) -> list[fx.Node]:
    """The look-ups at rounded places that `node` may be the sum of; empty for anything else."""
    if op_name(node) not in _ENDS or not is_tensor(node):
        return []
    path, reads = _between(node)
    some = len(reads) == 4 or len(reads) == 1 and any(op_name(n) == "sum" for n in path)
    return reads if some and all(map(_at_floor, reads)) else []


def _at_floor(read: fx.Node) -> bool:
    """Does an index come from a number that is rounded down?"""
    seen, stack = set[fx.Node](), list(read.all_input_nodes[1:])
    while stack and len(seen) < _MOST_NODES:
        node = stack.pop()
        if node in seen or node.op != "call_function" or not is_tensor(node):
            continue
        if rounded(node) is not None:
            return True
        seen.add(node)
        stack.extend(node.all_input_nodes)
    return False


def corners(program: Program, node: fx.Node, layout: Layout) -> Sample:
    """The linear sample that `node` is, of a grid of two axes."""
    read = _Corners(node, program.constant)
    sample = read.sample(layout)
    author = program.view.author
    region = author[node].meta.get("attnopt_region")
    if any(author[n].meta.get("attnopt_region") != region or n.meta.get("attnopt_opaque")
           for n in read.walked):
        raise Decline("the corners of a sample span a no_grad or autocast region", node)
    return sample


def _between(end: fx.Node) -> tuple[list[fx.Node], list[fx.Node]]:
    """What lies between `end` and the look-ups that are summed, and these."""
    seen, reads, stack = dict[fx.Node, None](), list[fx.Node](), [end]
    while stack and len(seen) < _MOST_NODES:
        node = stack.pop()
        if node in seen or node.op != "call_function" or not is_tensor(node) \
                or not node.meta["val"].is_floating_point():
            continue
        seen[node] = None
        name = op_name(node)
        if name in READS:
            reads.append(node)
        elif name in _MIXES or name in _JOINS:
            stack.extend(node.all_input_nodes)
        elif name == "where":
            stack.extend(x for x in node.args[1:] if isinstance(x, fx.Node))
        elif name == "masked_fill":
            stack.append(node.args[0])  # type: ignore[arg-type]
        elif name in LAYOUT_OPS or name in ("sum", "slice"):
            stack.append(node.args[0])  # type: ignore[arg-type]
    return list(seen), [] if stack else reads


class _Corners:
    """Reads one sum of corners."""

    def __init__(self, end: fx.Node, constant: Callable[[Any], Any]) -> None:
        self.end = end
        self.path, self.reads = _between(end)
        self.leads: set[fx.Node] = set()
        more = set(self.reads)
        while more:
            self.leads |= more
            more = {n for n in self.path if not self.leads.isdisjoint(n.all_input_nodes)}
            more -= self.leads
        self.places = Places(constant)
        self.summed: list[Axis] = []
        self.walked = self.places.walked

    # -- the sum ----------------------------------------------------------------------------
    def sample(self, layout: Layout) -> Sample:
        found: list[Corner] = []
        self._sum(self.end, layout, [], found)
        maps = [unpadded(c) for c in found]
        first, space, pads = maps[0]
        bases = tuple(p.base for p in found[0].places)
        seen = set()
        for corner, (own, axes, around) in zip(found, maps, strict=True):
            for mine, theirs in zip(axes, space, strict=True):
                if not same_length(mine.size, theirs.size):
                    raise Decline("corners of several maps", self.end)
                mine.become((theirs,))
            if own[0] is not first[0] or settle(own[1]) != settle(first[1]) or around != pads:
                raise Decline("corners of several maps", self.end)
            if corner.hidden is not found[0].hidden:
                raise Decline("corners that are hidden in several ways", self.end)
            if len(corner.shares) != 2:
                raise Decline("a corner has not one share for each axis", self.end)
            seen.add(tuple(_side(corner, i, base, space[i].size, pads[i])
                           for i, base in enumerate(bases)))
            if any(not any(same(b[0], base) for base in bases) for b in corner.bounds):
                raise Decline("a mask of something else", self.end)
            if not axes_of(own[1]).isdisjoint(self.summed):
                raise Decline("not each corner once", self.end)
        if len(found) != 4 or len(seen) != 4 or same(bases[0], bases[1]) or any(
                not axes_of(base[1]).isdisjoint(self.summed) for base in bases):
            raise Decline("not each corner once", self.end)
        locations, coordinate, order = self.places.locations(bases, self.end)
        return Sample(self.end, (first[0], settle(first[1])), space, locations, coordinate,
                      "linear", "zeros", False, "texels", order=order, hidden=found[0].hidden,
                      inner=tuple(n for n in self.path if n in self.leads))

    def _sum(self, node: Any, layout: Layout, factors: Sequence[_Factor],
             found: list[Corner]) -> None:
        layout = settle(layout)
        self.walked.append(node)
        name = op_name(node)
        step = moved(node, layout) or self.places.part(node, layout)
        if node in self.reads:
            found.append(self._corner(node, layout, factors))
        elif step is not None:
            self._sum(*step, factors, found)
        elif name == "sum":
            self._stack(node, layout, factors, found)
        elif (mix := _mix(node)) is not None:
            first, second, share = mix
            own = broadcast(layout, shape_of(share.meta["val"]))
            for part, flipped in ((first, True), (second, False)):
                self._sum(part, self._whole(part, layout), [*factors, _Factor(share, own, flipped)],
                          found)
        elif name in ("where", "masked_fill"):
            source, mask, flipped = self._hidden(node)
            own = broadcast(layout, shape_of(mask.meta["val"]))
            self._sum(source, self._whole(source, layout),
                      [*factors, _Factor(mask, own, flipped, hides=True)], found)
        elif name == "add" and node.args[1] == 0:
            self._sum(node.args[0], layout, factors, found)
        else:
            sides = [x for x in node.args if is_tensor(x)]
            leading = [x for x in sides if x in self.leads]
            if len(sides) != 2 or node.kwargs.get("alpha", 1) != 1:
                raise Decline("not a sum of weighted corners", node)
            if name == "add" and len(leading) == 2:
                for side in sides:
                    self._sum(side, self._whole(side, layout), factors, found)
            elif name == "mul" and len(leading) == 1:
                other = sides[1] if sides[0] is leading[0] else sides[0]
                own = broadcast(layout, shape_of(other.meta["val"]))
                self._sum(leading[0], self._whole(leading[0], layout),
                          [*factors, _Factor(other, own)], found)
            else:
                raise Decline("not a sum of weighted corners", node)

    def _stack(self, node: fx.Node, layout: Layout, factors: Sequence[_Factor],
               found: list[Corner]) -> None:
        """A sum over an axis of corners, one after another."""
        dims, keep = reduced_dims(node)
        source: Any = node.args[0]
        sizes = shape_of(source.meta["val"])
        if len(dims) != 1 or source.meta["val"].dtype != node.meta["val"].dtype or (
                sizes[at := min(dims)] != 4):
            raise Decline("not a sum of weighted corners", node)
        axis = Axis(4)
        self.summed.append(axis)
        for number in range(4):
            self.places.fixed[axis] = number
            self._sum(source, (*layout[:at], (axis,), *layout[at + keep:]), factors, found)
        del self.places.fixed[axis]

    def _whole(self, node: Any, layout: Layout) -> Layout:
        """The layout of a tensor that is not broadcast to `layout`."""
        if broadcast(layout, shape_of(node.meta["val"])) != layout:
            raise Decline("corners that are broadcast", node)
        return layout

    def _hidden(self, node: fx.Node) -> tuple[Any, Any, bool]:
        """(x, mask, whether it is the contrary) of a choice between x and 0."""
        if op_name(node) == "masked_fill":
            source, mask, zero = node.args[:3]
            pair = [(source, zero, True)]
        else:
            mask, one, other = (*node.args, None, None)[:3]
            pair = [(one, other, False), (other, one, True)]
        for source, zero, flipped in pair:
            if source in self.leads and self.places.number(zero) == 0:
                return source, mask, flipped
        raise Decline("corners are hidden by other numbers than 0", node)

    def _corner(self, node: fx.Node, layout: Layout, factors: Sequence[_Factor]) -> Corner:
        corner = texel(self.places, node, layout)
        hiding: list[tuple[Operand, int, Any]] = []
        for factor in factors:
            shares, bounds = len(corner.shares), len(corner.bounds)
            contrary = self._factor(factor, corner)
            if factor.hides and shares < 2:
                # Of all sides, a mask leaves nothing of shares that are NaN; the contrary does.
                if contrary or shares:
                    raise Decline("corners whose shares are hidden in part", node)
                hiding += corner.bounds[bounds:]
        corner.hidden = bool(hiding)
        if hiding and any({sign for b, sign, _ in hiding if same(b, p.base)} != {1, -1}
                          for p in corner.places):
            raise Decline("corners whose shares are hidden in part", node)
        return corner

    # -- factors ----------------------------------------------------------------------------
    def _factor(self, factor: _Factor, corner: Corner) -> bool:
        """Shares and masks that a corner is multiplied by; whether any mask is the contrary of a
        comparison."""
        node, layout, flipped, _ = factor
        while (step := moved(node, layout) or self.places.part(node, layout)) is not None:
            self.walked.append(node)
            node, layout = step
        layout, name = settle(layout), op_name(node) if node.op == "call_function" else ""
        source: Any = node.args[0] if node.args else None
        self.walked.append(node)
        if converts(node) and source.meta["val"].dtype.is_floating_point is False:
            return self._factor(_Factor(source, layout, flipped), corner)
        if name in _NOT and source.meta["val"].dtype is torch.bool:
            return self._factor(_Factor(source, layout, not flipped), corner)
        if name in (_OR if flipped else _AND) or name == "mul" and not flipped:
            found = []
            for part in node.args[:2]:
                if not is_tensor(part) or name != "mul" and (
                        part.meta["val"].dtype is not torch.bool):
                    raise Decline("a factor of a corner that is neither share nor mask", node)
                own = broadcast(layout, shape_of(part.meta["val"]))
                found.append(self._factor(_Factor(part, own, flipped), corner))
            return any(found)
        if name in ORDER:
            corner.bounds.append(self._bound(node, layout, name, flipped, corner))
            return flipped
        share = self._affine(node, layout, [p.base for p in corner.places])
        if flipped:
            share = Affine(share.base, -share.place, -share.floor, 1 - share.number)
        corner.shares.append(share)
        return False

    def _bound(self, node: Any, layout: Layout, name: str, flipped: bool, corner: Corner
               ) -> tuple[Operand, int, Any]:
        """floor(x) + number, or x, against a number, as the least or greatest floor(x)."""
        name = _CONTRARY[name] if flipped else name
        source, number = node.args[0], self.places.number(node.args[1])
        if not is_tensor(source) or number is None or type(number) is float and number % 1:
            raise Decline("a mask that is no comparison with a number", node)
        source = self.places.plain(source, broadcast(layout, shape_of(source.meta["val"])))
        sign = ORDER[name]
        known = next((p.base for p in corner.places if same(p.base, source)), None)
        # x >= n is floor(x) >= n and x < n is floor(x) < n. At x = -1, where x > -1 does not hold
        # and floor(x) >= -1 does, one corner is outside and the other has no share.
        if known is not None and (name in ("ge", "lt") or name == "gt" and number == -1):
            return known, sign, number - (name == "lt")
        place = self.places.place(*source)
        if (place.low, place.high) != (-math.inf, math.inf):
            raise Decline("a mask of what is clamped", node)
        return place.base, sign, number - place.behind + (sign if name in ("gt", "lt") else 0)

    def _affine(self, node: Any, layout: Layout, bases: Sequence[Operand]) -> Affine:
        if type(node) in (int, float):
            return Affine(None, 0, 0, node)
        if not is_tensor(node):
            raise Decline("a share of a corner that is not known", self.end)
        node, layout = self.places.plain(node, layout)
        for known in bases:
            if same(known, (node, layout)):
                return Affine(known, 1, 0, 0)
        name = op_name(node) if node.op == "call_function" else ""
        for source, part in ((rounded(node), (0, 1, 0)), (fraction(node), (1, -1, 0))):
            if source is None:
                continue
            inner = self._affine(source, layout, bases)
            if (inner.place, inner.floor, inner.number) == (1, 0, 0):
                return Affine(inner.base, *part)
        self.walked.append(node)
        if name in ("add", "sub", "rsub") and node.kwargs.get("alpha", 1) == 1 \
                and len(node.args) == 2:
            left, right = (self._affine(
                x, broadcast(layout, shape_of(x.meta["val"])) if is_tensor(x) else (), bases)
                for x in (node.args[::-1] if name == "rsub" else node.args))
            base = left.base or right.base
            if left.base is None or right.base is None or same(left.base, right.base):
                sign = 1 if name == "add" else -1
                return Affine(base, left.place + sign * right.place,
                               left.floor + sign * right.floor, left.number + sign * right.number)
        raise Decline("a share of a corner that is not known", node)


def _mix(node: fx.Node) -> tuple[Any, Any, Any] | None:
    """(a, b, w) of torch.lerp(a, b, w) or a + (b - a) * w; None for anything else."""
    name = op_name(node)
    if name == "lerp":
        return node.args[:3] if is_tensor(node.args[2]) else None  # type: ignore[return-value]
    if name != "add" or node.kwargs or len(node.args) != 2:
        return None
    for first, product in (node.args, node.args[::-1]):
        if not is_tensor(product) or op_name(product) != "mul":  # type: ignore[arg-type]
            continue
        for slope, share in (product.args, product.args[::-1]):  # type: ignore[union-attr]
            if is_tensor(slope) and is_tensor(share) and op_name(slope) == "sub" \
                    and not slope.kwargs and slope.args[1] is first:
                return first, slope.args[0], share
    return None


def _side(corner: Corner, at: int, base: Operand, size: Any, pad: tuple[int, int]) -> int:
    """0 or 1: which corner along an axis it is; nothing but 0 is added where it is outside."""
    place = corner.places[at]
    shares = [(s.place, s.floor, s.number) for s in corner.shares
              if s.base is not None and same(s.base, base)]
    if len(shares) != 1 or not same(place.base, base):
        raise Decline("a corner has not one share for each axis", base[0])
    side = {(-1.0, 1.0, 1.0): 0, (1.0, -1.0, 0.0): 1}.get(shares[0])
    moved = place.behind - pad[0]
    if side is None or place.before + moved != side:
        raise Decline("a share that belongs to another corner", base[0])
    limits = [[number for b, sign, number in corner.bounds if sign == way and same(b, base)]
              for way in (1, -1)]
    # How much less than they should the masks let through at either end, and the clamps beyond it.
    least = max((gap(n, -side) for n in limits[0]), default=-math.inf)
    most = max((gap(size - 1 - side, n) for n in limits[1]), default=-math.inf)
    low, high = gap(place.low, -moved), gap(place.high, size - 1 - moved)
    if max(least, most) > 0:
        raise Decline("a mask that is not that of the map", base[0])
    if max(least, most) < 0 and (low, high) == (0, 0):
        raise Decline("corners outside of the map count as its border", base[0])
    if not -pad[0] <= low <= (0 if least == 0 else -1) \
            or not (0 if most == 0 else 1) <= high <= pad[1]:
        raise Decline("a coordinate that is not clamped to the grid", base[0])
    return side
