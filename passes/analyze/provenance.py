"""What a mask or bias operand of a site is: its provenance, and what is proved of it.

`Analysis.operand` lifts the operand to an index function and reads that as structure: an operand
that keeps every key vanishes, causal and window masks become `Causal` and `Band` for every length,
padding becomes a per-key vector. A sum splits into its terms and a conjunction into its parts, so
that what is proved of one is not lost to the other. Facts come from index arithmetic, or from the
values of buffers and constants, which are then named in `guards`; never from a Parameter, and a
user's input is never specialised. What is not proved is carried as it is (`mask` None).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor, fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Mask
from attnopt.passes.analyze.by_value import Values, number
from attnopt.passes.analyze.grid_check import agrees, captured_sizes
from attnopt.passes.analyze.hiding import may_hide
from attnopt.passes.analyze.lift import Layout, Lifted, Lifter, Unliftable
from attnopt.passes.analyze.lift_tables import Patterns
from attnopt.passes.analyze.logic import Logic, leaves_of, literals
from attnopt.passes.analyze.mask_reading import Load, Reader
from attnopt.passes.analyze.neighbourhoods import GridMask
from attnopt.passes.analyze.origins import Origins, Provenance
from attnopt.passes.analyze.symbolic_grids import read_symbolic
from attnopt.passes.analyze.table_reading import read, read_heads
from attnopt.passes.analyze.tables import Table
from attnopt.passes.normalize import is_tensor, op_name

__all__ = ["Analysis", "Finding", "Load", "Provenance", "Term"]
log = logging.getLogger("attnopt.passes")

ROLES = ("additive", "keep", "drop")
#: An additive constant at most this is a mask (Swin's -100 is not: it leaves weights above zero) …
MASKING = -1e4
#: … and at most this, its weights underflow to zero next to any finite score.
UNDERFLOWS = -1e8
Lengths = Mapping[str, int | torch.SymInt]
ValueOf = Callable[[str], Tensor | None]
AnyLifter = TypeVar("AnyLifter", bound=Lifter)


@dataclass(frozen=True)
class Term:
    """A node that is still to be added (role additive) or applied as a mask (keep, drop)."""

    node: fx.Node
    layout: Layout
    role: str


@dataclass(frozen=True)
class Finding:
    """What is known of one operand.

    mask:       its structure; None where nothing is proved. ALL: it has no effect
    fill:       the additive value at dropped keys (role additive): -inf, or finite
    rest:       what there is beside `mask`; the operand itself where mask is None
    exact:      mask and rest give the author's numbers: nothing finite is left at dropped keys, or
                so little that it underflows, and then every row provably keeps a key
    rows_kept:  every row provably keeps a key under `mask`
    guards:     placeholders whose values were used
    loads:      operands of `mask` by slot
    reason:     why mask is None
    expr:       the lifted element of the operand
    text:       words for `mask`
    """

    mask: Mask | None
    rest: tuple[Term, ...]
    provenance: Provenance
    fill: float | None = None
    exact: bool = False
    rows_kept: bool = False
    guards: tuple[str, ...] = ()
    loads: Mapping[str, Load] = field(default_factory=dict)
    reason: str = ""
    expr: Expr | None = None
    text: str = ""

    @property
    def structural(self) -> bool:
        """Nothing of the operand is needed when the site runs."""
        return self.mask is not None and not self.rest and not self.loads


class Analysis:
    """Findings for the operands of all sites of one functional graph.

    kind_of:  placeholder name -> "input", "parameter", "buffer" or "constant"
    value_of: placeholder name -> its tensor, or None; asked for buffers and constants only. `held`
              knows parameters too, of which nothing but whether they may be masks is asked
    """

    def __init__(self, graph: fx.Graph, kind_of: Mapping[str, str],
                 value_of: ValueOf, held: ValueOf | None = None) -> None:
        self.graph, self.kind_of, self.value_of = graph, kind_of, value_of
        self.held, self._hides = held or value_of, dict[fx.Node, bool]()
        self.values = Values(kind_of, value_of)
        self.origins = Origins(kind_of)
        self._lifters: dict[tuple[object, ...], Lifter] = {}
        self._found: dict[tuple[object, ...], Finding] = {}
        #: values on the example inputs, for the cost model; names of predicates at known lengths
        self.examples: Values | None = None
        self.names: dict[tuple[object, ...], GridMask | None] = {}

    def provenance(self, node: fx.Node) -> Provenance:
        return self.origins.of(node)

    def hides(self, node: fx.Node) -> bool:
        """Whether a tensor that is added to scores may hide keys, as far as the graph tells."""
        if node not in self._hides:
            model = self.provenance(node).parts <= {"parameter", "activation"}
            self._hides[node] = not model or may_hide(node, self.kind_of, self.held)
        return self._hides[node]

    def operand(self, node: fx.Node, layout: Layout, role: str, lengths: Lengths) -> Finding:
        """What is known of an operand of a site.

        layout:  one entry per dimension of `node`: the score axis it follows, a tuple of axes for
                 a product of them, an int Expr, or None where its length is 1
        role:    "additive", "keep" (true where a key is attended to) or "drop" (its opposite)
        lengths: of all axes of the site
        """
        if role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
        if len(layout) != node.meta["val"].dim():
            raise ValueError(f"layout must have {node.meta['val'].dim()} entries, got {layout}")
        sizes = tuple(sorted((axis, str(n)) for axis, n in lengths.items()))
        key = (node, layout, role, sizes)
        if key not in self._found:
            lifter = self.lifter(node, layout, lengths, Lifter)
            term = Term(node, layout, role)
            try:
                self._found[key] = _Study(self, lifter, lengths).whole(term)
            except Exception as error:  # a fact that is not found is no reason to fail
                log.warning("the operand %s is carried as it is: %s", node.name, error,
                            exc_info=log.isEnabledFor(logging.DEBUG))
                self._found[key] = self.carried(term, f"{type(error).__name__}: {error}")
        return self._found[key]

    def lifter(self, node: fx.Node, layout: Layout, lengths: Lengths,
               kind: type[AnyLifter]) -> AnyLifter:
        """The lifter of all operands whose sites have these lengths, told those of `node`."""
        key = (kind, *sorted((axis, str(n)) for axis, n in lengths.items()))
        found = self._lifters.get(key)
        if not isinstance(found, kind):
            found = self._lifters[key] = kind(
                self.graph, self.kind_of, self.value_of, lengths, self.values)
        for n, axis in zip(node.meta["val"].shape, layout, strict=True):
            if isinstance(axis, str):
                found.logic.alias(n, axis)
        return found

    def carried(self, term: Term, reason: str) -> Finding:
        return Finding(None, (term,), self.provenance(term.node), reason=reason)


class _Study:
    """One operand of one site."""

    def __init__(self, analysis: Analysis, lifter: Lifter, lengths: Lengths) -> None:
        self.analysis, self.lifter, self.lengths = analysis, lifter, lengths
        self.logic = lifter.logic

    def whole(self, term: Term) -> Finding:
        """The finding for a term: read as one, or else part by part."""
        found = self.single(term)
        if found.mask is not None:
            return found
        parts = parts_of(term)
        if len(parts) == 1:
            return found
        studies = [self.whole(p) for p in parts]
        proved = [s for s in studies if s.mask is not None]
        if not proved:
            return replace(found, rest=(term,))
        mask: Mask = ALL
        loads: dict[str, Load] = {}
        texts = [s.text for s in proved if s.mask is not ALL]
        for s in proved:
            assert s.mask is not None
            mask = mask & s.mask
            loads |= s.loads
        fills = [s.fill for s in proved if s.fill is not None]
        kept = rows_kept(self.logic, [s.mask for s in proved if s.mask is not None])
        return Finding(
            mask, tuple(t for s in studies for t in s.rest), self.analysis.provenance(term.node),
            max(fills, default=None), self.exact(fills, kept, term.node), kept,
            tuple(sorted({g for s in proved for g in s.guards})), loads,
            text=" & ".join(f"({t})" if " | " in t else t for t in dict.fromkeys(texts)))

    def single(self, term: Term) -> Finding:
        """The finding for a term as a whole."""
        try:
            idx = self.lifter.indices(term.layout)
            lifted = self.lifter.lift(term.node, idx)
        except Unliftable as why:
            return self.analysis.carried(term, str(why))
        exact = replace(lifted, expr=self.analysis.values.patterns.expand(lifted.expr))
        if agrees(exact, term.node, idx, self.analysis.values, self.lengths) is False:
            log.warning("the lift of %s is not what it evaluates to", term.node.name)
            return self.analysis.carried(term, "its lift does not equal its own values")
        if term.role == "additive":
            return self.additive(term, lifted)
        keep = lifted.expr if lifted.expr.dtype == E.BOOL else self.logic.compare(
            "ne", lifted.expr, E.const(0 if lifted.expr.dtype == E.INT else 0.0))
        return self.boolean(term, lifted, keep if term.role == "keep" else
                            self.logic.negate(keep))

    # -- truth values -----------------------------------------------------------------------
    def boolean(self, term: Term, lifted: Lifted, keep: Expr) -> Finding:
        """A keep mask: what varies with both q and k and is loaded whole stays an operand."""
        structure, dense = E.TRUE, []
        for p in literals(keep, "and"):
            rest = self.dense(p)
            if rest is None:
                structure = self.logic.conj(structure, p)
            else:
                dense.append(rest)
        if dense and structure is E.TRUE:
            return replace(self.analysis.carried(term, "a dense operand"), expr=lifted.expr)
        return self.finding(term, lifted, structure, tuple(dense), None)

    def dense(self, p: Expr) -> Term | None:
        """A conjunct that is one load over q and k, as a term."""
        load = self.logic.negate(p) if p.op == "not" else p
        if load.op != "load" or not {"q", "k"} <= load.indices \
                or load.value in self.analysis.values.patterns:
            return None
        node = self.lifter.nodes[load.value]
        layout = tuple(None if n == 1 else i
                       for n, i in zip(node.meta["val"].shape, load.args, strict=True))
        plain = tuple(i.value if i is not None and i.op == "index" else i for i in layout)
        return Term(node, plain, "keep" if load is p else "drop")

    def finding(self, term: Term, lifted: Lifted, keep: Expr, rest: tuple[Term, ...],
                fills: list[float] | None) -> Finding:
        reader = Reader(self.lifter, term.node, self.name)
        mask = reader.mask(keep)
        loads = {s: x for s, x in reader.loads.items() if s in mask.slots}
        kept = rows_kept(self.logic, [mask], keep, self.analysis.values.patterns) \
            or rows_kept(self.logic, [mask]) or not mask.slots and bool(reader.names) \
            and self.counted(mask)
        exact = fills is None or self.exact(fills, kept, term.node)
        return Finding(mask, rest, self.analysis.provenance(term.node),
                       max(fills, default=None) if fills else None, exact, kept,
                       tuple(sorted(lifted.guards)), loads, expr=lifted.expr,
                       text=reader.text(mask))

    def name(self, keep: Expr) -> GridMask | None:
        """A name for a predicate of q, k and known lengths, by what it keeps: each is read once."""
        sizes = {axis: n for axis, n in self.lengths.items() if isinstance(n, int)}
        leading = keep.indices - {"q", "k"}
        if not {"q", "k", *leading} <= sizes.keys() or leading - {"h"}:
            return self.name_symbolic(keep)
        key = (keep, *sorted(sizes.items()))
        if key not in self.analysis.names:
            heads = [keep.replace({E.index("h"): E.const(i)}) for i in range(sizes["h"])] \
                if leading else [keep]
            tables = [Table.of_predicate(e, sizes["q"], sizes["k"], sizes) for e in heads]
            self.analysis.names[key] = read_heads(tables, "h") if leading else read(tables[0])
        return self.analysis.names[key]

    def name_symbolic(self, keep: Expr) -> GridMask | None:
        """A name for a predicate of q and k whose lengths are symbols."""
        rows, keys = self.logic.lengths["q"], self.logic.lengths["k"]
        if keep.indices - {"q", "k"} or rows is not keys or rows.op == "const":
            return None
        if (keep, rows) not in self.analysis.names:
            try:
                captured = number(self.lengths["q"], captured_sizes(self.lengths, []))
            except LookupError:
                return None
            self.analysis.names[keep, rows] = read_symbolic(keep, captured, captured)
        return self.analysis.names[keep, rows]

    def counted(self, mask: Mask) -> bool:
        """Does every row of every head keep a key, at these lengths?"""
        sizes = {axis: n for axis, n in self.lengths.items() if isinstance(n, int)}
        if not {"q", "k", *mask.axes} <= sizes.keys() or mask.axes - {"q", "k", "h"}:
            return False
        heads = range(sizes["h"] if "h" in mask.axes else 1)
        return all(rows.any(1).all() for h in heads for _, rows in Table.of_predicate(
            mask.predicate().replace({E.index("h"): E.const(h)}), sizes["q"], sizes["k"],
            sizes).blocks())

    # -- additive ---------------------------------------------------------------------------
    def additive(self, term: Term, lifted: Lifted) -> Finding:
        """A case tree of 0 and of fills is a mask; one varying leaf beside fills stays a bias."""
        def carried(reason: str) -> Finding:
            return replace(self.analysis.carried(term, reason), expr=lifted.expr)

        leaves = leaves_of(lifted.expr)
        numbers = [x.value for x in leaves if x.op == "const"]
        varying = [x for x in leaves if x.op != "const"]
        if any(math.isnan(n) or n == math.inf for n in numbers):
            return carried("holds nan or +inf")
        fills = [float(n) for n in numbers if n <= MASKING]
        levels = [n for n in numbers if n > MASKING]
        if not varying and len(levels) == 1 and (levels[0] == 0 or not fills):
            keep = self.keeps(lifted.expr)
            return self.finding(term, lifted, keep, (), fills)
        if fills and not levels and len(varying) == 1:
            rest = self.term_of(varying[0], term.node)
            if rest is not None:
                return self.finding(term, lifted, self.keeps(lifted.expr), (rest,), fills)
        if len(numbers) == len(leaves):
            return carried("no mask: it adds " + ", ".join(f"{n:g}" for n in numbers[:4]))
        return carried("a bias that varies")

    def keeps(self, e: Expr) -> Expr:
        """Where a case tree is no fill."""
        if e.op == "where":
            condition, yes, no = e.args
            return self.logic.choose(condition, self.keeps(yes), self.keeps(no))
        return E.const(e.op != "const" or e.value > MASKING)

    def term_of(self, e: Expr, operand: fx.Node) -> Term | None:
        """The tensor that `operand` is made of whose element `e` is, as an additive term."""
        for node, layout in Reader(self.lifter, operand).nodes_of(e):
            if node.meta["val"].dtype.is_floating_point:
                return Term(node, layout, "additive")
        return None

    # -- what follows -----------------------------------------------------------------------
    def exact(self, fills: list[float], rows_kept: bool, node: fx.Node) -> bool:
        """Whether dropping keys is the same as adding the fills."""
        if all(f == -math.inf for f in fills):
            return True
        least = torch.finfo(node.meta["val"].dtype).min / 2 \
            if node.meta["val"].dtype.is_floating_point else UNDERFLOWS
        return rows_kept and max(fills) <= max(UNDERFLOWS, least)


def rows_kept(logic: Logic, masks: Sequence[Mask], keep: Expr | None = None,
              patterns: Patterns | None = None) -> bool:
    """Proves that every row keeps one key: the first, the last, its own, or its aligned one."""
    patterns = patterns or Patterns()
    last = logic.sub(logic.lengths["k"], E.const(1))
    q, lead = E.index("q"), logic.sub(logic.lengths["k"], logic.lengths["q"])
    places = [E.const(0), last]
    if logic.nonneg(lead):
        places += [q, logic.add(q, lead)]
    if keep is None:
        return any(all(m.keeps(at) or logic.canonical(
            m.predicate().replace({E.index("k"): at})) is E.TRUE for m in masks) for at in places)
    return any(logic.canonical(patterns.at_key(keep, at).replace(
        {E.index("k"): at})) is E.TRUE for at in places)


# -- parts ----------------------------------------------------------------------------------------
_PASS_THROUGH = frozenset(("clone", "contiguous", "alias", "detach", "expand", "expand_as",
                           "unsqueeze", "to", "_to_copy", "lift_fresh_copy", "type_as"))


def parts_of(term: Term) -> list[Term]:
    """The terms of a sum, or the conjuncts of a mask, through views that keep the layout plain."""
    node, layout, role = term.node, term.layout, term.role
    if node.op != "call_function" or node.meta.get("attnopt_opaque"):
        return [term]
    name = op_name(node)
    if name in _PASS_THROUGH:
        source = node.args[0]
        assert isinstance(source, fx.Node)
        if source.meta["val"].dtype != node.meta["val"].dtype:
            return [term]
        if name == "unsqueeze":
            dim = node.args[1] % len(layout)  # type: ignore[operator]
            layout = layout[:dim] + layout[dim + 1 :]
        inner = parts_of(Term(source, _aligned(layout, source), role))
        return inner if len(inner) > 1 else [term]
    if name in ("logical_not", "bitwise_not") and role != "additive" and is_tensor(node.args[0]):
        inner = parts_of(Term(node.args[0], layout, "drop" if role == "keep" else "keep"))  # type: ignore[arg-type]
        return inner if len(inner) > 1 else [term]
    joins = {"additive": ("add",), "keep": ("bitwise_and", "logical_and", "__and__", "mul"),
             "drop": ("bitwise_or", "logical_or", "__or__", "add")}[role]
    if name not in joins or len(node.args) < 2 or node.kwargs.get("alpha", 1) != 1:
        return [term]
    both = node.args[:2]
    if not all(is_tensor(x) for x in both):
        return [term]
    same_type = {x.meta["val"].dtype for x in (*both, node)}  # type: ignore[union-attr]
    if len(same_type) != 1 or (role != "additive") != (same_type == {torch.bool}):
        return [term]
    terms = [Term(x, _aligned(layout, x), role) for x in both]  # type: ignore[arg-type]
    return [part for t in terms for part in parts_of(t)]


def _aligned(layout: Layout, node: fx.Node) -> Layout:
    """The layout of an operand that is broadcast to a tensor with `layout`."""
    shape = node.meta["val"].shape
    own = layout[len(layout) - len(shape) :] if len(shape) else ()
    return tuple(None if n == 1 else axis for n, axis in zip(shape, own, strict=True))
