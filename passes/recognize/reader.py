"""Reader: a score or weight tensor read backwards into an `Expr`, with the layout of every operand.

It follows only the nodes that a *target* (the raw scores, or a softmax) reaches; everything else is
an operand, taken whole. Row reductions met on the way (row sums, row maxima, log-sum-exp) become
markers that `attnopt.passes.recognize.normalizers` gives a meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloatTrueDiv, IntTrueDiv, ToFloat

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize import assignments
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    broadcast,
    product,
    resolve,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.recognize.contraction import reduced_dims
from attnopt.passes.recognize.heads import HeadMix, head_mix
from attnopt.passes.recognize.layout import back
from attnopt.passes.recognize.pointwise import apply, is_cast, is_pointwise
from attnopt.passes.recognize.program import REDUCTIONS, Program
from attnopt.rules import Decline

Terminal = Callable[[fx.Node, Layout], Expr]
#: kinds of markers that are a maximum
MAXIMA = ("amax", "max", "peak")


@dataclass
class Loaded:
    """An operand of a site: the tensor, its layout, and what it is used for.

    parts: it is 0 beside these parts of the scores, along which the tensor itself has the layout
        `own`
    """

    node: fx.Node
    layout: Layout
    role: str
    dtype: str
    parts: tuple[assignments.Part, ...] = ()
    own: Layout = ()


@dataclass
class Marker:
    """A reduction over the keys: `kind` is a member of REDUCTIONS, `of` what is reduced.

    "peak" is a maximum over the keys and other dimensions as well.
    """

    kind: str
    of: Expr
    node: fx.Node


@dataclass
class Reader:
    """Reads one tensor. `terminals` are the targets, and what each of them reads as.

    of_weights: what is read lies behind the normaliser, where dropout may be
    fixed: axes of which one index was selected on the way, and which
    """

    program: Program
    keys: frozenset[Axis]
    terminals: dict[fx.Node, Terminal]
    of_weights: bool = False
    operands: dict[str, Loaded] = field(default_factory=dict)
    markers: dict[Expr, Marker] = field(default_factory=dict)
    interior: list[fx.Node] = field(default_factory=list)
    #: floating types computed in on the way, and dropout probabilities met
    dtypes: set[torch.dtype] = field(default_factory=set)
    dropout: float = 0.0
    detached: bool = False
    fixed: dict[Axis, int] = field(default_factory=dict)
    #: the rows over which triangles were taken, or which were assigned in part; they must turn out
    #: to be the queries
    triangles: list[tuple[tuple[Axis, ...], fx.Node]] = field(default_factory=list)
    #: axes of blocks of the scores that were assigned
    parts: list[assignments.Part] = field(default_factory=list)
    _memo: dict[tuple[fx.Node, Layout], Expr] = field(default_factory=dict)

    # -- reading ----------------------------------------------------------------------------
    def read(self, node: Any, layout: Layout) -> Expr:
        """The Expr of `node`, whose dimensions are `layout`."""
        if not isinstance(node, fx.Node):
            if isinstance(node, (bool, int, float)):
                return E.const(node)
            raise Decline(f"an argument {node!r} is not understood")
        if not is_tensor(node):
            return self.symbolic(node)
        layout = settle(layout)
        known = self._memo.get((node, layout))
        if known is not None:
            return known
        try:
            found = self._read(node, layout)
        except Decline as no:
            raise no.at(node) from None
        self._memo[node, layout] = found
        return found

    def on_path(self, node: fx.Node) -> bool:
        if self.path is not None:
            return node in self.path
        return node in self.terminals or not self.program.sources[node].isdisjoint(self.terminals)

    def _read(self, node: fx.Node, layout: Layout) -> Expr:
        terminal = self.terminals.get(node)
        if terminal is not None:
            self.interior.append(node)
            return terminal(node, layout)
        if not self.on_path(node):
            return self.operand(node, layout)
        if node.meta.get("attnopt_opaque"):
            raise Decline("the tensor is written in place through memory that may be shared", node)
        self.interior.append(node)
        self.dtypes.add(node.meta["val"].dtype)
        name = op_name(node)
        if name == "dropout":
            return self._dropout(node, layout)
        if is_cast(node):
            return self.read(node.args[0], layout)
        step = back(node, layout)
        if step is not None:
            return self.read(*step)
        if name == "slice" and _same_along(node, node.args[0], node.args[1]):
            return self.read(node.args[0], layout)
        if name in ("tril", "triu"):
            return self._triangle(node, layout)
        part = assignments.behind_slice(self, node, layout) if name == "slice" else None
        if part is not None:
            return self.read(*part)
        if name == "index_put":
            return assignments.masked(self, node, layout)
        if name in ("select", "slice"):
            return self._select(node, layout)
        if name in ("select_scatter", "slice_scatter"):
            return assignments.scatter(self, node, layout)
        if name in ("fill", "copy"):
            self.interior += assignments.overwritten(node)
            return self.read(node.args[1], broadcast(layout, _shape(node.args[1])))
        if name in REDUCTIONS and not _is_binary(node):
            return self._reduction(node, layout)
        if name == "getitem" and op_name(node.args[0]) == "max" \
                and node.args[1] == 0:  # type: ignore[arg-type]
            return self._reduction(node.args[0], layout)  # type: ignore[arg-type]
        if name == "detach":
            found = self.read(node.args[0], layout)
            marker = self.markers.get(found)
            if marker is None or marker.kind not in MAXIMA:
                self.detached = True
            return found
        if _is_binary(node) and name in ("max", "min"):
            both = [self.argument(a, layout) for a in node.args]
            return E.call("maximum" if name == "max" else "minimum", *both)
        mix = head_mix(node)
        if mix is not None:
            return self._mix(mix, layout)
        if is_pointwise(node):
            args = [self.argument(a, layout) for a in node.args]
            kwargs = {k: self.argument(v, layout) for k, v in node.kwargs.items()
                      if k not in ("rounding_mode", "alpha", "value")}
            kwargs |= {k: v for k, v in node.kwargs.items()
                       if k in ("rounding_mode", "alpha", "value")}
            return apply(node, args, kwargs)
        raise Decline(f"{name} between the scores and the weights is not pointwise", node)

    def argument(self, arg: Any, layout: Layout) -> Any:
        if is_tensor(arg):
            return self.read(arg, broadcast(layout, _shape(arg)))
        if isinstance(arg, (bool, int, float)):
            return E.const(arg)
        if isinstance(arg, fx.Node):
            return self.symbolic(arg)
        if arg is None or isinstance(arg, (str, torch.dtype)):
            return arg
        raise Decline(f"an argument {arg!r} is not understood")

    def symbolic(self, node: fx.Node) -> Expr:
        """A symbolic number: the number of keys is one that a Spec can name."""
        value, keys = node.meta.get("val"), product(self.keys)
        if isinstance(value, torch.SymInt | torch.SymFloat) and not isinstance(keys, int):
            plain = _without_casts(value.node.expr)
            for op, factor in (("mul", sympy.cancel(plain / keys)),
                               ("div", sympy.cancel(plain * keys))):
                if factor.is_number:
                    whole = factor.is_Integer and isinstance(value, torch.SymInt)
                    number = E.const(int(factor) if whole else float(factor))
                    pair = (E.size("k"), number) if op == "mul" else (number, E.size("k"))
                    return E.call(op, *pair)
        raise Decline("a symbolic number enters the scores", node)

    # -- operands ---------------------------------------------------------------------------
    def operand(self, node: fx.Node, layout: Layout, role: str = "") -> Expr:
        """Take `node` whole, as an operand, or as a number where it is one."""
        number = self.program.constant(node)
        if number is not None:
            return E.const(number)
        dtype = node.meta["val"].dtype
        kind = E.BOOL if dtype == torch.bool else (
            E.FLOAT if dtype.is_floating_point else E.INT)
        if dtype.is_complex:
            raise Decline("a complex operand enters the scores", node)
        if node.meta.get("attnopt_opaque"):
            raise Decline("an operand is written in place through memory that may be shared", node)
        role = role or ("mask" if kind == E.BOOL else "bias")
        for slot, loaded in self.operands.items():
            if loaded.node is node and settle(loaded.own or loaded.layout) == layout:
                return E.load(slot, dtype=kind)
        slot = f"{role}{len(self.operands)}"
        parts = assignments.parts_in(layout, self.parts)
        self.operands[slot] = Loaded(node, layout, role, kind) if not parts else Loaded(
            node, assignments.whole(layout, parts), role, kind, parts, layout)
        return E.load(slot, dtype=kind)

    # -- operations that are not pointwise ---------------------------------------------------
    def _dropout(self, node: fx.Node, layout: Layout) -> Expr:
        _, p, train = node.args
        if train and p:
            if not self.of_weights:
                raise Decline("dropout on the scores", node)
            self.dropout = float(p)  # type: ignore[arg-type]
        return self.read(node.args[0], layout)

    def _triangle(self, node: fx.Node, layout: Layout) -> Expr:
        diagonal = node.args[1] if len(node.args) > 1 else 0
        inner = self.read(node.args[0], layout)
        self.need_square(layout, node)
        if not isinstance(diagonal, int):
            raise Decline("a triangle with a symbolic diagonal", node)
        q, k = E.index("q"), E.index("k")
        keep = k <= q + diagonal if op_name(node) == "tril" else k >= q + diagonal
        return E.where(keep, inner, 0.0)

    def need_square(self, layout: Layout, node: fx.Node) -> None:
        """The last two dimensions must be the queries and all the keys."""
        if frozenset(resolve(layout[-1])) != self.keys:
            raise Decline("a triangle over other axes than queries and keys", node)
        self.triangles.append((layout[-2], node))

    def _select(self, node: fx.Node, layout: Layout) -> Expr:
        """x[..., i, ...] or x[..., i:i + 1, ...] along another axis than the keys: everything is
        read at i there."""
        source, dim, number, *more = node.args
        assert isinstance(source, fx.Node) and isinstance(dim, int)
        shape = _shape(source)
        at, kept = dim % len(shape), int(op_name(node) == "slice")
        size = shape[at]
        if kept and _shape(node)[at] != 1 or more[1:] not in ([], [1]):
            if frozenset(resolve(layout[at])) == frozenset(resolve(self.keys)):
                raise Decline("only a part of the keys of the softmax meets these values", node)
            raise Decline("slice between the scores and the weights is not pointwise", node)
        number = number or 0
        if not isinstance(number, int) or not isinstance(size, int) and number < 0:
            raise Decline("a selection by a symbolic number", node)
        if size != 1:
            axis = Axis(size)
            self.fixed[axis] = number + size if number < 0 else number
            return self.read(source, (*layout[:at], (axis,), *layout[at + kept:]))
        return self.read(source, (*layout[:at], (), *layout[at + kept:]))

    def _reduction(self, node: fx.Node, layout: Layout) -> Expr:
        dims, keep = reduced_dims(node)
        source = node.args[0]
        rank = len(_shape(source))
        if len(dims) != 1 and op_name(node) in ("amax", "max"):
            return self._peak(node, dims)
        rows = iter(layout)
        inner: list[tuple[Axis, ...]] = []
        for i in range(rank):
            if i in dims:
                if keep:
                    next(rows)
                inner.append(())
            else:
                inner.append(next(rows))
        if len(dims) != 1:
            raise Decline("a reduction over several dimensions", node)
        dim = next(iter(dims))
        ordered = tuple(sorted(self.keys, key=lambda a: self.key_order.get(a, 0)))
        inner[dim] = ordered
        of = self.read(source, tuple(inner))
        self.interior.append(node)
        for known, reduced in self.markers.items():
            if reduced.kind == op_name(node) and reduced.of is of:
                return known
        marker = E.load(f"__reduced{len(self.markers)}")
        self.markers[marker] = Marker(op_name(node), of, node)
        return marker

    def _peak(self, node: fx.Node, dims: frozenset[int]) -> Expr:
        """A maximum over the keys and other dimensions; its layout says nothing of theirs, so
        what it is taken of must have been read."""
        for (known, layout), of in self._memo.items():
            if known is node.args[0]:
                reduced = {a for i in dims for a in resolve(layout[i])}
                if reduced.issuperset(resolve(self.keys)):
                    self.interior.append(node)
                    marker = E.load(f"__reduced{len(self.markers)}")
                    self.markers[marker] = Marker("peak", of, node)
                    return marker
        raise Decline("a maximum over all rows at once", node)

    def _mix(self, mix: HeadMix, layout: Layout) -> Expr:
        """A mixing of heads: a marker, whose inside `mixes` keeps, as it is not pointwise."""
        matrix = mix.matrix
        axes = settle(layout)[mix.dim]
        if len(axes) != 1 or axes[0] in self.keys:
            raise Decline("a product along another axis than the heads", matrix)
        if axes[0] in resolve(self.fixed):
            raise Decline("one head is selected of those that are mixed", matrix)
        inner = self.read(mix.source, layout)
        marker = E.load(f"__mixed{len(self.mixes)}")
        self.mixes[marker] = (inner, mix)
        return marker

    mixes: dict[Expr, tuple[Expr, HeadMix]] = field(default_factory=dict)
    key_order: dict[Axis, int] = field(default_factory=dict)
    #: the nodes to read through; by default those that a target reaches
    path: frozenset[fx.Node] | None = None


def _without_casts(e: sympy.Expr) -> sympy.Expr:
    """A symbolic number as torch has it, with true divisions and no conversions to float."""
    e = e.replace(ToFloat, lambda a: a)
    return e.replace(IntTrueDiv, lambda a, b: a / b).replace(FloatTrueDiv, lambda a, b: a / b)


def _same_along(a: Any, b: Any, dim: Any) -> bool:
    """Is a slice along `dim` the whole of what it is cut from?"""
    return same_length(_shape(a)[dim], _shape(b)[dim])


def _shape(node: Any) -> tuple[Any, ...]:
    return shape_of(node.meta["val"])


def _is_binary(node: fx.Node) -> bool:
    return len(node.args) == 2 and is_tensor(node.args[1])
