"""Read a lifted truth value as a Mask: causal, band, windows, prefix, padding, segments.

The predicate is a canonical conjunction (`attnopt.passes.analyze.logic`), so that every idiom of a
mask arrives in one form: `k <= q + offset` is causal wherever it came from. What has no name
becomes `Where`. Loads whose indices are whole axes become operands that broadcast against the
score; other loads stay tables with explicit indices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import (
    ALL,
    And,
    Band,
    Causal,
    KeyKeep,
    Mask,
    Not,
    Or,
    Prefix,
    Segments,
    Where,
    Windows,
)
from attnopt.passes.analyze.by_value import cone
from attnopt.passes.analyze.lift import Index, Layout, Lifter
from attnopt.passes.analyze.logic import literals
from attnopt.passes.analyze.neighbourhoods import GridMask
from attnopt.passes.analyze.polynomials import Poly

_Q, _K = E.index("q"), E.index("k")


@dataclass(frozen=True)
class Load:
    """The operand behind a slot: a tensor node, or a SymInt node for a size that is no axis.

    layout: per dimension the score axis that it follows, None where its length is 1. `layout` is
    None for a table, which the mask indexes explicitly.
    """

    node: fx.Node
    layout: Layout | None


class Reader:
    """Reads predicates of one operand; `loads` collects what all the masks it made load.

    namer: finds a name for a predicate of q, k and lengths that the idioms here do not have
    """

    def __init__(self, lifter: Lifter, operand: fx.Node,
                 namer: Callable[[Expr], GridMask | None] | None = None) -> None:
        self.namer = namer
        self.lifter, self.logic = lifter, lifter.logic
        self.operand = operand
        self.loads: dict[str, Load] = {}
        self.patterns = lifter.values.patterns
        #: words for masks that their nodes cannot describe
        self.names: dict[Mask, str] = {}

    # -- operands ---------------------------------------------------------------------------
    def bind(self, e: Expr) -> Expr:
        """`e` with loads of whole axes as broadcast operands."""
        return e.replace(self._bind_load)

    def _bind_load(self, n: Expr) -> Expr | None:
        if n.op != "load":
            return None
        if n.value in self.patterns:
            return self.patterns.by_name[n.value].found.mask.predicate()
        node = self.lifter.nodes[n.value]
        layout = self.layout(node, n.args)
        if layout is None:
            self.loads[n.value] = Load(node, None)
            return None
        return E.load(self.slot(node, layout), dtype=n.dtype)

    def slot(self, node: fx.Node, layout: Layout) -> str:
        axes = [str(a) for a in layout if a is not None]
        name = "_".join([node.name, "".join(axes)]) if axes else node.name
        self.loads[name] = Load(node, layout)
        return name

    def layout(self, node: fx.Node, idx: Index) -> Layout | None:
        """The axes that a tensor's dimensions follow at `idx`, if each follows one as a whole."""
        val = node.meta["val"]
        if not isinstance(val, torch.Tensor):
            return ()
        layout: list[str | None] = []
        for n, i in zip(val.shape, idx, strict=True):
            if n == 1:
                layout.append(None)
            elif i.op == "index" and i.value not in layout and self.is_length(n, i.value):
                layout.append(i.value)
            else:
                return None
        return tuple(layout)

    def is_length(self, n: int | torch.SymInt, axis: str) -> bool:
        try:
            return self.logic.of_size(n) is self.logic.lengths.get(axis)
        except LookupError:
            return False

    # -- masks ------------------------------------------------------------------------------
    def mask(self, e: Expr) -> Mask:
        """The Mask whose predicate is `e`, with the facts of the site taken for granted."""
        plain = [p for p in literals(e, "and") if not p.slots]
        if not plain or self.namer is None:
            return self.spelled(e)
        own = functools.reduce(Expr.__and__, plain)
        found = self.spelled(own)
        if any(isinstance(m, Where) and {"q", "k"} <= m.axes for m in found.walk()):
            named = self.namer(own)
            found = found if named is None else self.named(named)
        rest = [p for p in literals(e, "and") if p.slots]
        return found & self.spelled(functools.reduce(Expr.__and__, rest)) if rest else found

    def spelled(self, e: Expr) -> Mask:
        """The Mask by what the predicate says, idiom by idiom."""
        if e.op == "or":
            return functools.reduce(Mask.__or__, map(self.mask, literals(e, "or")))
        parts = literals(e, "and")
        upper = [c for p in parts if (c := self.beyond(p, 1)) is not None]
        lower = [c for p in parts if (c := self.beyond(p, -1)) is not None]
        found: Mask = ALL
        if len(upper) == len(lower) == 1:
            found, upper = Band(self.logic.neg(lower[0]), upper[0]), []
            parts = [p for p in parts if self.beyond(p, -1) is None]
        for offset in upper:
            found = found & Causal(offset)
        for p in parts:
            if self.beyond(p, 1) is None:
                found = found & self.literal(p)
        return found

    def slack(self, p: Expr) -> Poly | None:
        """The polynomial that is >= 0 where an integer comparison holds."""
        if p.op != "le" or p.args[0].dtype != E.INT:
            return None
        return self.logic.poly(self.logic.sub(p.args[1], p.args[0]))

    def beyond(self, p: Expr, sign: int) -> Expr | None:
        """c where `p` says sign * (q - k) + c >= 0 and c is made of lengths."""
        poly = self.slack(p)
        if poly is None or poly.get((_Q,)) != sign or poly.get((_K,)) != -sign:
            return None
        rest = {m: c for m, c in poly.items() if m not in ((_Q,), (_K,))}
        if any(a.op != "size" for m in rest for a in m):
            return None
        return self.logic.build(rest)

    def literal(self, p: Expr) -> Mask:
        """One conjunct."""
        if p.op == "or":
            return self.mask(p)
        if p.slots:
            return self.of_operands(p)
        poly = self.slack(p)
        if poly is not None and poly.get((_K,)) == -1 and "q" not in p.indices:
            count = {m: c for m, c in poly.items() if m != (_K,)}
            if all(a.op == "size" for m in count for a in m):
                return Prefix(self.logic.add(self.logic.build(count), E.const(1)))
        if p.op == "eq":
            a, b = p.args
            if {a.op, b.op} == {"floordiv"} and {a.args[0], b.args[0]} == {_Q, _K} \
                    and a.args[1] is b.args[1] and a.args[1].op == "const":
                return Windows((a.args[1],))
        return Where(p)

    def of_operands(self, p: Expr) -> Mask:
        """A conjunct that loads: a constant table, padding, segments, or what it says."""
        base = self.logic.negate(p) if p.op == "not" else p
        if base.op == "load" and base.value in self.patterns:
            mask = self.named(self.patterns.by_name[base.value].found)
            return mask if base is p else ~mask
        if "q" not in p.indices:
            for e, keep in ((p, True), (self.logic.negate(p), False)):
                slot = self.key_vector(e)
                if slot is not None:
                    return KeyKeep(slot) if keep else ~KeyKeep(slot)
        if p.op == "eq" and all(a.op == "load" and a.dtype == E.INT for a in p.args):
            sides = [(a, self.layout(self.lifter.nodes[a.value], a.args)) for a in p.args]
            sides.sort(key=lambda s: "k" in s[0].indices)
            (rows, own), (keys, other) = sides
            if own and other and "q" in own and "k" not in own and "k" in other \
                    and "q" not in other:
                return Segments(self.slot(self.lifter.nodes[rows.value], own),
                                self.slot(self.lifter.nodes[keys.value], other))
        return Where(self.bind(p))

    def named(self, found: GridMask) -> Mask:
        """The mask of a reading, whose words are remembered."""
        self.names[found.mask] = found.text
        return found.mask

    def text(self, mask: Mask) -> str:
        """Words for a mask of this reader."""
        if mask in self.names:
            return self.names[mask]
        if isinstance(mask, And | Or):
            joint = " & " if isinstance(mask, And) else " | "
            parts = [self.text(m) for m in mask.masks]
            return joint.join(f"({t})" if " & " in t or " | " in t else t for t in parts)
        if isinstance(mask, Not) and mask.mask in self.names:
            return f"not ({self.names[mask.mask]})"
        return mask.describe()

    def key_vector(self, e: Expr) -> str | None:
        """A slot for a bool tensor of the graph whose element `e` is."""
        for node, layout in self.nodes_of(e):
            if node.meta["val"].dtype == torch.bool and "k" in layout:
                return self.slot(node, layout)
        return None

    def nodes_of(self, e: Expr) -> Iterator[tuple[fx.Node, Layout]]:
        """Nodes of the operand's own cone whose element `e` is, outermost first, with layouts."""
        found = list(self.lifter.found_at.get(e, {}).items())
        if e.op == "load":
            found.insert(0, (self.lifter.nodes[e.value], e.args))
        for node, idx in reversed(found):
            layout = self.layout(node, idx)
            if layout is not None and node in self.cone:
                yield node, layout

    @functools.cached_property
    def cone(self) -> frozenset[fx.Node]:
        return frozenset(cone(self.operand, {}))
