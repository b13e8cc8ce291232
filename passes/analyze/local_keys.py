"""Local attention that is spelled by data movement, as ordinary attention over the tokens.

A model that unfolds its keys (F.unfold, Tensor.unfold, a neighbour table, shifted copies, chunks
with their neighbours) has K[b, h, n, t, d] = k[b, h, j(n, t), d]: every query n with a window of
keys of its own, copied T times. Here K and V are read back to the tensors that they copy
(`movement`), the table j(n, t) is read as a mask (`neighbours`), masks and biases over (n, t)
become structure, key operands or tables with indices (`local_logits`), and the site becomes

    softmax over j of x(q, j),  with the mask that keeps j(q, t) for some t,

exactly. Zero padding that is not masked takes part in the author's softmax with the logit x0 of a
score of 0 and adds nothing to the result: count(q) such places are one sink of logit
x0 + log(count(q)). Where that has no such form the padded tensor itself gives the keys.

Lengths of tokens must be known, and index tables must depend on no input. What is not proved stays
as it was, with the reason.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Mask
from attnopt.ir.spec import Operand, leading_axes
from attnopt.passes.analyze import structure
from attnopt.passes.analyze.local_bases import Base, Space, pulled
from attnopt.passes.analyze.local_interior import between, gated
from attnopt.passes.analyze.local_loads import Loads
from attnopt.passes.analyze.local_logits import Cells, Operands, classify
from attnopt.passes.analyze.local_norms import NORM, as_distance
from attnopt.passes.analyze.local_order import ordered
from attnopt.passes.analyze.movement import Mover
from attnopt.passes.analyze.neighbours import Structure
from attnopt.passes.analyze.neighbours import structure as read_structure
from attnopt.passes.analyze.provenance import Analysis
from attnopt.passes.analyze.regather_tokens import NAME as GATHERED
from attnopt.passes.analyze.regather_tokens import NotLocal
from attnopt.passes.analyze.structure import Facts
from attnopt.passes.canonical import Canonical, Target
from attnopt.passes.canonical import Tensor as Placed
from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.axes import Axis, Layout, axes_of, resolve, settle
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.reader import Loaded
from attnopt.rules import Decline

log = logging.getLogger("attnopt.passes")
#: forms of a site, in the order in which they are tried
FORMS = ("tokens", "padded tokens", "author")


@dataclass
class Local:
    """A site over its tokens, what guards it, and its neighbourhood in words."""

    canonical: Canonical
    guards: set[str] = field(default_factory=set)
    words: str = ""


def analyze_local(program: Program, analysis: Analysis, canonical: Canonical,
                  tried: list[str], form: str = FORMS[0]) -> tuple[Canonical, Facts]:
    """`structure.analyze`, of the form over tokens where the site is a local attention.

    form: "tokens", "padded tokens" (zero padding is keys of zeros, never a sink, which has no
          gradient), or "author" for the author's own form
    tried: a reason why it is none, although keys are copied for queries, is added to it
    """
    local: Local | None = None
    try:
        if form != "author":
            local = localize(program, analysis, canonical, sinks=form == "tokens")
    except Decline as no:
        tried.append(f"local-attention: {no.reason}")
    except Exception as error:  # what is not understood is no reason to fail
        log.warning("a local attention is left as it is: %s", error,
                    exc_info=log.isEnabledFor(logging.DEBUG))
        tried.append(f"local-attention: {type(error).__name__}: {error}")
    if local is None:
        found, facts = structure.analyze(analysis, canonical)
        if any(op_name(t.node) == GATHERED for t in found.tensors):
            raise NotLocal("moved scores that are no local attention: "
                           + (tried[-1] if tried else "keys are not copied"))
        if canonical.site.rows_share < 1:
            facts.gained.append("rows whose gate is 0")
        return found, facts
    found, facts = structure.analyze(analysis, local.canonical)
    facts.guards |= local.guards
    facts.gained.append("copies of the keys and values for every query")
    if local.canonical.spec.mask is not ALL:
        facts.phrases[0] = local.words
    return found, facts


def localize(program: Program, analysis: Analysis, canonical: Canonical, *,
             sinks: bool = True) -> Local | None:
    """The form over tokens; None where the keys are not those of a local attention."""
    site = canonical.site
    if site.kind == "key" or not resolve(site.keys) or not _movable(canonical.key.node):
        return None
    first: Decline | None = None
    for ends in ((), ("slice", "narrow"), ("pad",), ("pad", "slice", "narrow")):
        attempt = _Attempt(program, analysis, canonical, frozenset(ends))
        try:
            if attempt.copied():
                found = attempt.run()
                if sinks or found.canonical.spec.sinks is None:
                    return found
                first = first or Decline("padded places are a sink")
        except Decline as no:
            first = first or no
        if first is None:
            return None
    assert first is not None
    raise first


def _movable(node: fx.Node) -> bool:
    return node.op == "call_function"


class _Attempt:
    """One reading of one site, up to the operations that `ends` names."""

    def __init__(self, program: Program, analysis: Analysis, canonical: Canonical,
                 ends: frozenset[str]) -> None:
        self.program, self.analysis, self.canonical = program, analysis, canonical
        self.site = canonical.site
        self.mover = Mover(analysis.values, program.constant, ends=ends)

    # -- where keys and values come from --------------------------------------------------------
    def copied(self) -> bool:
        """Are keys of the same token copied for several queries? Splits merged axes on the way."""
        site = self.site
        for _ in range(4):
            lead = tuple(a for dim in settle(site.lead) for a in dim)
            self.rows, self.keys = resolve(site.rows), resolve(site.keys)
            space = self.space = Space((*lead, *self.rows, *self.keys, *resolve(site.inner),
                                        *resolve(site.columns)))
            if len(set(space.axes)) != len(space.axes):
                return False
            try:
                self.key, uses = pulled(self.mover, space, self.canonical.key.node,
                                        self.canonical.key.layout,
                                        frozenset((*self.keys, *self.rows)))
            except Decline:
                if not self._split_axis(lead):
                    return False
                continue
            own = [a for a in lead if a in uses]
            stop = next((p.reason for p in self.key.pieces if p.node is self.key.node), "")
            if "depends on an input" in stop and not self.rows:
                raise Decline(f"the neighbour table is not known: {stop}")
            if not own or not uses & frozenset(self.keys):
                return False
            if self._split_axis(own):
                continue
            self.own = tuple(own)
            self.cells = (*self.own, *self.rows, *self.keys)
            tokens = math.prod(self.key.grid)
            return bool(math.prod(a.size for a in (*own, *self.keys)) > tokens
                        or not bool(self.key.where.all()))
        return False

    def _split_axis(self, axes: tuple[Axis, ...] | list[Axis]) -> bool:
        """Split a leading axis that holds batch and tokens: some index is a // m or a % m of it.
        """
        pieces = self.mover.pull(self.canonical.key.node,
                                 self.space.index(self.canonical.key.layout))
        for p in pieces:
            for x in p.index:
                for a in axes:
                    if self.space.varies(x) != {a} or not isinstance(a.size, int):
                        continue
                    flat = x.reshape(-1)
                    line = (flat - flat[0]).tolist()
                    m = next((i for i, v in enumerate(line) if v != line[0]), 1)
                    wrap = next((i for i in range(1, len(line)) if line[i] == line[0]), 1)
                    for part in (m, wrap):
                        if 1 < part < a.size and a.size % part == 0 and a.parts is None:
                            a.become((Axis(a.size // part), Axis(part)))
                            return True
        return False

    # -- the reading ----------------------------------------------------------------------------
    def run(self) -> Local:
        spec = self.canonical.spec
        if spec.normalizer != "softmax" or spec.mask is not ALL or not gated(spec.weights) \
                or spec.renormalize or spec.dropout or spec.mix_logits or spec.mix_weights \
                or spec.sinks is not None:
            raise Decline("a local attention whose weights are more than a plain softmax")
        if spec.logits.indices or spec.output.indices:
            raise Decline("indices enter the scores of a local attention")
        if any(not isinstance(a.size, int) for a in self.cells):
            raise Decline("a number of tokens that is not known")
        space, moving = self.space, frozenset((*self.keys, *self.rows))
        value, uses = pulled(self.mover, space, self.canonical.value.node,
                             self.canonical.value.layout, moving)
        if not (uses & frozenset(self.own) or not self.own) or math.prod(value.grid) != math.prod(
                self.key.grid):
            raise Decline("keys and values come from different places")
        for base in (self.key, value):
            if not space.varies(base.where) <= frozenset(self.cells) or not space.varies(
                    base.flat) <= frozenset(self.cells):
                raise Decline("the neighbours differ between heads or batches")
        cells = self._cells(value)
        own = self._over(cells.visible)
        if not torch.equal(self._over(self.key.flat)[own], self._over(value.flat)[own]):
            raise Decline("keys and values come from different places")
        return self._rewritten(value, cells)

    def _cells(self, value: Base) -> Cells:
        """The classes of the cells, and what the logits are there."""
        frame = frozenset(self.cells)
        operands = Operands(self.space, self.mover, self.analysis.values, frame, self.key,
                            self.space.along(self.site.inner))
        along = frozenset(self.keys)
        cases = {slot: operands.cases(placed)
                 for slot, placed in self.canonical.operands.items()
                 if axes_of(placed.layout) & along and slot in self.canonical.spec.logits.slots}
        others = self.canonical.spec.slots - set(cases)
        if any(axes_of(self.canonical.operands[s].layout) & along for s in others
               if s in self.canonical.operands):
            raise Decline("an operand beside the logits varies along the window")
        for found in cases.values():
            if any(not self.space.varies(c.where) <= frame for c in found):
                raise Decline("masks that differ between heads or batches")
        zero = self.site.kind == "dot" and all(f == 0 for f in (*self.key.fill, *value.fill))
        valid = self.key.where & value.where
        both = self.key.where | value.where
        if not torch.equal(*torch.broadcast_tensors(valid, both)):
            zero = False
        made = classify(self.canonical.spec.logits, valid, cases,
                        score_of_padding=0.0 if zero else None,
                        row_only=lambda e: e.slots <= others)
        if bool(made.padded.any()) and not zero:
            raise Decline("padded places with values that are not zero take part in the softmax")
        if NORM in made.logits.leaves:
            if self.site.kind != "dot" or bool(made.padded.any()):
                raise Decline("a squared distance to padded places depends on the query")
            along = frozenset(self.keys)

            def constant(e: Expr) -> bool:
                leaves = [operands.leaves[s] for s in e.slots if s in operands.leaves]
                return "k" not in e.indices and not any(
                    self.space.varies(x) & along for leaf in leaves for x in leaf.index)
            made.logits, made.score = as_distance(made.logits, constant), "distance"
        made.leaves, made.passed = operands.leaves, operands.passed
        if made.finite and not self._unmasked(made):
            raise Decline("a row may lose all its keys, to a fill that is finite")
        made.guards = operands.guards | self.mover.guards
        return made

    def _unmasked(self, cells: Cells) -> bool:
        """Are the logits of visible cells never low? Masks may be in constants and inputs."""
        if any(leaf.op == "const" and leaf.value <= structure.LOW for leaf in cells.logits.leaves):
            return False
        nodes = [cells.leaves[s].node if s in cells.leaves else self.canonical.operands[s].node
                 for s in cells.logits.slots]
        return not any(map(self.analysis.hides, nodes))

    def _over(self, x: Tensor) -> Tensor:
        """A tensor over the cells as (N, T), queries in the author's order."""
        sizes = [math.prod(a.size for a in axes) for axes in ((*self.own, *self.rows), self.keys)]
        return self.space.over(x, self.cells).reshape(sizes)

    # -- the new site ------------------------------------------------------------------------------
    def _rewritten(self, value: Base, cells: Cells) -> Local:
        table, visible = self._over(self.key.flat), self._over(cells.visible)
        padded = self._over(cells.padded).sum(1)
        natural = tuple(a.size for a in (*self.own, *self.rows))
        rows, place, grid = ordered(self.mover, self.space, self.canonical.query,
                                    (*self.own, *self.rows))
        if place is not None:
            inverse = torch.empty_like(place)
            inverse[place] = torch.arange(len(place))
            table, visible, padded = table[inverse], visible[inverse], padded[inverse]
        number = len(table)
        grids = [g for g in (grid, natural if place is None else None, (number,)) if g is not None]
        tokens = math.prod(self.key.grid)
        found = read_structure(table, visible, [tuple(n for n in g if n != 1) or (1,)
                                                for g in grids],
                               [tuple(n for n in g if n != 1) or (1,)
                                for g in (self.key.grid, value.grid, (tokens,))])
        sinks = self._sinks(cells, found, visible, padded)
        axis = Axis(tokens)
        fixed = {**self.key.fixed, **value.fixed}
        key = (self.key.node, self.key.layout((axis,)))
        values = (value.node, value.layout((axis,)))
        for node, _ in (key, values):
            self._readable(node)
        return self._assemble(cells, found, sinks, rows, axis, key, values, fixed,
                              (table, visible, place))

    def _sinks(self, cells: Cells, found: Structure, visible: Tensor,
               padded: Tensor) -> Expr | None:
        """The logit of the padded places of a row together."""
        if cells.sink is None or not bool(padded.any()):
            return None
        places = padded + visible.sum(1)
        if not bool((places == places[0]).all()):
            raise Decline("the places that take part in the softmax differ between queries")
        count = E.const(int(places[0])) - found.count()
        return E.call("add", E.call("log", E.call("float", count)), cells.sink)

    def _stripped(self) -> set[fx.Node]:
        """What lies between the operands of the author's contractions and those of the Spec."""
        site, found = self.site, set[fx.Node]()
        pairs = [(site.query[0], self.canonical.query.node), (site.key[0], self.canonical.key.node),
                 (site.value[0], self.canonical.value.node)]
        pairs += [(o.node, self.canonical.operands[s].node) for s, o in site.operands.items()
                  if s in self.canonical.operands]
        for node, end in pairs:
            path: list[fx.Node] = []
            while node is not end and node.args and isinstance(node.args[0], fx.Node):
                path.append(node)
                node = node.args[0]
            if node is end:
                found.update(path)
        return found

    def _readable(self, node: fx.Node) -> None:
        view = self.program.view
        end = view.author[self.site.end]
        same = view.author[node].meta.get("attnopt_region") == end.meta.get("attnopt_region")
        later = any(at > view.position[end] for at in view.writes_to.get(view.root_of(node), ()))
        if not view.readable_at(node, end) or later or (not same and node.op != "placeholder"):
            raise Decline("the tokens are overwritten in place, or made in another region", node)

    def _assemble(self, cells: Cells, found: Structure, sinks: Expr | None,
                  rows: tuple[Axis, ...], axis: Axis, key: tuple[fx.Node, Layout],
                  values: tuple[fx.Node, Layout], fixed: dict[Axis, int],
                  tables: tuple[Tensor, Tensor, Tensor | None]) -> Local:
        site, spec = self.site, self.canonical.spec
        gone = frozenset(resolve(self.own))
        lead: Layout = tuple(part for dim in settle(site.lead)
                             for part in ([(a,) for a in dim if a not in gone] if dim else [()]))
        keys = resolve((axis,))
        names = (*leading_axes(len(lead)), "q", "k")
        scores: Target = (*lead, rows, keys)
        declared: list[Operand] = []
        tensors: dict[str, Placed] = {}
        for o in spec.operands:
            if o.slot in spec.logits.slots and o.slot not in cells.logits.slots and (
                    sinks is None or o.slot not in sinks.slots) and o.slot not in spec.output.slots:
                continue
            if o.axes is None:
                declared.append(o)
                if o.slot in self.canonical.operands:
                    tensors[o.slot] = self.canonical.operands[o.slot]
                continue
            placed = self.canonical.operands[o.slot]
            have = axes_of(placed.layout)
            along = tuple(n for n, dim in zip(names, scores, strict=True)
                          if have & frozenset(resolve(dim)))
            declared.append(replace(o, axes=along))
            tensors[o.slot] = Placed(placed.node, settle(placed.layout), scores)
        loads = Loads(self.space, found, self.cells, self._over, tables, scores, names, axis, fixed)
        logits = loads.bind(cells.logits, cells.leaves)
        declared += loads.declared
        tensors |= loads.tensors
        for placed in loads.tensors.values():
            self._readable(placed.node)
        mask: Mask = found.mask()
        new = spec.with_(score=cells.score or spec.score, logits=logits, mask=mask, sinks=sinks,
                         operands=tuple(declared)).with_()
        operands = {o.slot: tensors[o.slot] for o in new.operands if o.slot in tensors}
        kept = {s: replace(x, node=operands[s].node, layout=operands[s].layout)
                if s in operands else x for s, x in site.operands.items() if s in new.slots}
        kept |= {s: Loaded(p.node, p.layout, new.operand(s).role, new.operand(s).dtype)
                 for s, p in operands.items() if s not in kept}
        moved = replace(site, kind=new.score, key=key, value=values, lead=lead, rows=rows,
                        keys=keys, logits=logits, sinks=sinks, operands=kept,
                        fixed={**site.fixed, **fixed, **loads.fixed})
        query = self.canonical.query
        canonical = replace(
            self.canonical, site=moved, spec=new,
            query=Placed(query.node, settle(query.layout), (*lead, rows, query.target[-1])),
            key=Placed(key[0], settle(key[1]), (*lead, keys, self.canonical.key.target[-1])),
            value=Placed(values[0], settle(values[1]),
                         (*lead, keys, self.canonical.value.target[-1])),
            operands=operands, result=(*lead, rows, self.canonical.result[-1]), saved=(),
            computed=(self.canonical.computed | self.mover.passed | cells.passed | self._stripped()
                      | between(self.program, site.end, {
                          query.node, key[0], values[0], *(p.node for p in operands.values())})),
            copies=(math.prod(a.size for a in self.own), math.prod(a.size for a in self.keys)))
        return Local(canonical, cells.guards, found.describe())
