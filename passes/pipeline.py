"""The passes in order: from a captured graph to the rewritten one and a record of every site."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from attnopt.ir.captured import Captured
from attnopt.ir.site import SiteRecord, module_path, source_line
from attnopt.ir.spec import Schedule, Spec
from attnopt.passes import approximate
from attnopt.passes.analyze.inline_bias import Inlined, inline
from attnopt.passes.analyze.local_keys import FORMS, analyze_local
from attnopt.passes.analyze.provenance import Analysis
from attnopt.passes.analyze.regather import regathered
from attnopt.passes.analyze.regather_tokens import NotLocal
from attnopt.passes.analyze.structure import Facts, words
from attnopt.passes.canonical import Canonical, canonicalize
from attnopt.passes.capture.guards import ValueGuard
from attnopt.passes.clock import Clock
from attnopt.passes.compiling import attention_calls, compile_kernels
from attnopt.passes.depict import depict
from attnopt.passes.examples import mask_examples
from attnopt.passes.freeze import asks_for_gradients, freeze, frozen_operands
from attnopt.passes.lengths import example_shapes
from attnopt.passes.normalize import View, functional_view, op_name
from attnopt.passes.options import Options
from attnopt.passes.parameters import share
from attnopt.passes.readable import readable
from attnopt.passes.recognize.attention import Attention, Miss
from attnopt.passes.recognize.axes import product, resolve
from attnopt.passes.recognize.program import PARAMETER, Program, carries
from attnopt.passes.recognize.sites import recognize
from attnopt.passes.rules import REGISTRY
from attnopt.passes.substitute import discard, rewire, substitute, sweep, written_later
from attnopt.passes.verify import Candidate, verify
from attnopt.rules import Decline, Match, Region, Rule

log = logging.getLogger("attnopt.passes")


@dataclass
class Rewritten:
    """What the passes made of one captured graph; the captured graph module itself is changed."""

    graph_module: fx.GraphModule
    sites: list[SiteRecord]
    guards: tuple[ValueGuard, ...] = ()
    text_before: str = ""
    text_after: str = ""
    timings: dict[str, float] = field(default_factory=dict)
    #: what `freeze` computed values from, and whether any of it wanted a gradient then
    frozen: tuple[str, ...] = ()
    frozen_grad: bool = False


@dataclass
class _Planned:
    """A site on its way: its record, its canonical form, and what a rule made of it."""

    site: Attention
    record: SiteRecord
    canonical: Canonical | None = None
    facts: Facts = field(default_factory=Facts)
    match: Match | None = None


def rewrite(captured: Captured, options: Options) -> Rewritten:
    """Find, prove, rewrite and verify. `captured.graph_module` is rewritten in place."""
    clock = Clock()
    module, graph = captured.graph_module, captured.graph
    before = readable(graph)
    view, program, analysis, plans, misses = _read(captured, options, clock)
    with clock("substitute"):
        candidates = _substitute(graph, view, plans, trials=options.verify)
    with clock("compile"):
        compile_kernels([(p.match, node) for c, members in candidates for p, node in zip(
            members, attention_calls(c.done.emitted), strict=False) if p.match],
            _in_training(captured))
    if options.verify and candidates:
        with clock("verify"):
            verify(captured, view, [c for c, _ in candidates],
                   (options.approximate or {}).get("output"))
    guards: set[str] = set()
    touched: set[fx.Node] = set()
    for candidate, members in candidates:
        _settle(graph, view, candidate, members, guards, touched)
    for plan in plans:
        if plan.canonical is not None:
            chosen = plan.match or Match(plan.canonical.spec, Schedule())
            depict(plan.record, plan.canonical, chosen, analysis.values)
    sweep(graph, touched)
    if touched:
        share(captured, options.prefer)
    frozen = freeze(captured, options)
    graph.lint()
    module.recompile()
    records = [p.record for p in plans] + [_missed(m, view) for m in misses]
    order = {n.name: i for i, n in enumerate(program.nodes)}
    records.sort(key=lambda r: order.get(r.node, 0))
    held = tuple(ValueGuard.of(captured, name) for name in sorted(guards)) + frozen
    return Rewritten(module, records, held, before, readable(graph), clock.seconds,
                     tuple(g.path for g in frozen), asks_for_gradients(captured, frozen))


# -- planning -----------------------------------------------------------------------------------
def _read(captured: Captured, options: Options, clock: Clock, *, put_back: bool = True
          ) -> tuple[View, Program, Analysis, list[_Planned], list[Miss]]:
    """What is in a graph. Moved scores are put back only where all are local attentions then."""
    with clock("normalize"):
        view = functional_view(captured.graph)
    with clock("recognize"):
        kinds = {name: origin.kind for name, origin in captured.origins.items()}

        def value_of(name: str) -> torch.Tensor | None:
            origin = captured.origins.get(name)
            held = origin is not None and origin.kind in ("buffer", "constant")
            return captured.values.get(name) if held else None

        program = Program(view, kinds, value_of)
        program = regathered(program) if put_back else program
        found, misses = recognize(program)
    with clock("analyze"):
        analysis = Analysis(view.graph, kinds, value_of)
        try:
            plans = [_plan(captured, program, analysis, site, options) for site in found]
        except NotLocal as no:
            log.info("%s: read as it is written", no.reason)
            return _read(captured, options, clock, put_back=False)
    return view, program, analysis, plans, misses


def _plan(captured: Captured, program: Program, analysis: Analysis, site: Attention,
          options: Options) -> _Planned:
    """The plan of the first form of the site that a rule takes, or else of its first form."""
    plans: list[_Planned] = []
    for form in FORMS:
        plans.append(_plan_form(captured, program, analysis, site, options, form))
        first = plans[0].canonical
        if plans[-1].match is not None or first is None or not first.copies:
            return plans[-1]
    return plans[0]


def _plan_form(captured: Captured, program: Program, analysis: Analysis, site: Attention,
               options: Options, form: str) -> _Planned:
    """Canonical form, facts, and the first rule that takes the site."""
    plan = _Planned(site, _record(program, site))
    record = plan.record
    try:
        _admissible(program, site, options, record.path)
        plan.canonical = canonicalize(program, site)
        plan.canonical, plan.facts = analyze_local(
            program, analysis, plan.canonical, record.tried, form)
    except NotLocal:
        raise
    except Decline as no:
        record.status, record.reason = "kept", _explain(no, program)
        return plan
    canonical = plan.canonical
    roles = {o.slot: o.role for o in canonical.spec.operands} | {
        s: o.role for s, o in site.operands.items()}
    record.mask, record.bias = words(plan.facts, canonical.spec, roles)
    record.spec, record.shapes = str(canonical.spec), canonical.shapes()
    record.status, record.lowering = "canonical", "author"
    try:
        _replaceable(program, site)
        inlined = inline(analysis, program, canonical)
        region = _region(captured, program, canonical, plan.facts, options, inlined)
        reduction = approximate.choose(options.approximations, region, record, analysis, canonical)
        if reduction is not None:
            canonical, inlined, region = approximate.reduce_forms(
                reduction, canonical, inlined, region)
        region = replace(region, tables=mask_examples(captured, analysis, canonical, inlined))
        plan.match = _first_match(REGISTRY.pick(options.exact_rules), region, record)
        if inlined is not None and plan.match is not None \
                and plan.match.spec == inlined.canonical.spec:
            plan.canonical = inlined.canonical
            plan.facts.guards |= inlined.guards
            plan.facts.words |= {s: f"{plan.facts.words.get(s) or 'index'}, {how}"
                                 for s, how in inlined.slots.items()}
            record.mask, record.bias = words(plan.facts, plan.canonical.spec, roles)
        elif plan.match is not None:
            plan.canonical = canonical
        if reduction is not None and plan.match is not None:
            approximate.note(reduction, record, plan.facts, analysis, plan.canonical)
    except Decline as no:
        record.reason = record.reason or _explain(no, program)
    return plan


def _record(program: Program, site: Attention) -> SiteRecord:
    author = program.view.author[site.anchor]
    return SiteRecord(path=module_path(author), source=source_line(author), kind="attention",
                      node=site.anchor.name)


def _admissible(program: Program, site: Attention, options: Options, path: str) -> None:
    if options.only is not None and not fnmatch.fnmatch(path, options.only):
        raise Decline(f"outside only={options.only!r}")
    others = [u for u in site.escapes if not _only_returned(program, u)]
    if others:
        raise Decline(f"its scores or weights are also used by {op_name(others[0])}", others[0])
    if site.detached:
        raise Decline("a detach between the scores and the result", site.anchor)


def _replaceable(program: Program, site: Attention) -> None:
    """What must hold for the author's nodes to go, besides that a rule takes the site."""
    if site.kind == "key":
        raise Decline("key-only logits: no scores to fuse, the author's composition is as good")
    view = program.view
    end = view.author[site.end]
    region = end.meta.get("attnopt_region")
    for node in site.interior:
        if view.author[node].meta.get("attnopt_region") != region:
            raise Decline("the site spans a no_grad or autocast region", node)
    if site.mix_logits is not None or site.mix_weights is not None:
        raise Decline("heads are mixed: all of them are needed at once, as the author has it")
    if site.escapes:
        raise Decline("its weights are also returned", site.escapes[0])
    if site.dropout:
        raise Decline("dropout draws on the weights: kept, so that the random stream stays the "
                      "author's", site.anchor)
    if not site.keys or all(a.size == 1 for a in site.keys):
        raise Decline("a single key: nothing to fuse")
    if written_later(view, end):
        raise Decline("its result is written in place later", end)


def _only_returned(program: Program, node: fx.Node, depth: int = 8) -> bool:
    """Does everything made from `node` end as a result of the model?"""
    if node.op == "output":
        return True
    users = program.users(node)
    carried = node.op == "call_function" and (carries(node) or op_name(node) in ("mean", "stack"))
    return depth > 0 and carried and bool(users) and all(
        _only_returned(program, u, depth - 1) for u in users)


def _region(captured: Captured, program: Program, canonical: Canonical, facts: Facts,
            options: Options, inlined: Inlined | None) -> Region:
    site = canonical.site
    values = [t.node.meta["val"] for t in (canonical.query, canonical.key, canonical.value)]
    gained = (*facts.gained, *(f"repeated {s}" for s in canonical.saved))
    lengths = tuple(product(resolve(dim)) for dim in canonical.result[:-1])
    lengths += (product(resolve(site.keys)), product(resolve(site.inner)),
                product(resolve(site.columns)))
    operand_grad = any(PARAMETER in program.depends[t.node] for t in canonical.operands.values())
    shapes = example_shapes(canonical)
    return Region(canonical.spec, "sdpa" if site.sdpa else "composition", gained, lengths,
                  tuple(v.dtype for v in values), values[2].device.type, _in_training(captured),
                  operand_grad, shapes, all(isinstance(n, int) for n in lengths),
                  options.lowerings, inlined.canonical.spec if inlined is not None else None,
                  () if inlined is None or frozen_operands(captured, options, program, canonical)
                  else inlined.saved, canonical.copies,
                  prefer=options.prefer, rank=inlined.rank if inlined is not None else 0)


def _in_training(captured: Captured) -> bool:
    """By the modules' flags, or, where they are not known, by an active dropout or batch norm."""
    flags = {"dropout": 2, "batch_norm": 5}
    return captured.training or any(
        n.args[flags[op_name(n)]] is True for n in captured.graph.nodes
        if n.op == "call_function" and op_name(n) in flags)


def _first_match(rules: Sequence[Rule], region: Region, record: SiteRecord) -> Match | None:
    for rule in rules:
        try:
            match = rule.match(region)
        except Decline as no:
            record.tried.append(f"{rule.name}: {no.reason}")
            continue
        record.rule = rule.name
        return match
    record.reason = record.tried[-1].partition(": ")[2] if record.tried else "no rule is active"
    return None


def _explain(no: Decline, program: Program) -> str:
    where = ""
    if isinstance(no.node, fx.Node):
        author = program.view.author.get(no.node, no.node)
        line = source_line(author)
        where = f" ({author.name}{', ' + line if line else ''})"
    return no.reason + where


def _missed(miss: Miss, view: View) -> SiteRecord:
    author = view.author.get(miss.anchor, miss.anchor)
    culprit = view.author.get(miss.node, miss.node) if miss.node is not None else author
    line = source_line(culprit)
    where = f" ({culprit.name}{', ' + line if line else ''})"
    return SiteRecord(path=module_path(author), source=source_line(author), kind=miss.kind,
                      status="kept", node=miss.anchor.name, reason=miss.reason + where,
                      tried=[f"attention: {miss.reason}"])


# -- substitution -------------------------------------------------------------------------------
def _substitute(graph: fx.Graph, view: View, plans: Sequence[_Planned], *,
                trials: bool) -> list[tuple[Candidate, list[_Planned]]]:
    """Emit the calls. Sites with one end stand or fall together.

    With `trials`, canonical sites are emitted as well, for verification to see their Spec.
    """
    by_end: dict[fx.Node, list[_Planned]] = {}
    for plan in plans:
        by_end.setdefault(plan.site.end, []).append(plan)
    made = []
    for members in by_end.values():
        if any(p.canonical is None for p in members):
            for p in members:
                if p.canonical is not None:
                    _keep(p, "another softmax of the same result was declined")
            continue
        taken = all(p.match for p in members)
        if not taken:
            for p in members:
                p.match = None
            if not trials or not all(map(_can_be_tried, members)):
                continue
        before = set(graph.nodes)
        try:
            done = substitute(graph, view, [_part(p) for p in members])
        except Decline as no:
            for node in reversed([n for n in graph.nodes if n not in before]):
                graph.erase_node(node)
            for p in members:
                p.match = None
                if taken:
                    p.record.rule, p.record.reason = "", no.reason
            continue
        parts = [p.canonical for p in members if p.canonical is not None]
        made.append((Candidate(parts, done, trial=not taken), members))
    return made


def _part(plan: _Planned) -> tuple[Canonical, Spec, Schedule]:
    assert plan.canonical is not None
    if plan.match is not None:
        return plan.canonical, plan.match.spec, plan.match.schedule
    return plan.canonical, plan.canonical.spec.with_(dropout=0.0), Schedule("aten:dense")


def _can_be_tried(plan: _Planned) -> bool:
    site = plan.site
    local = plan.canonical is not None and plan.canonical.copies  # dense, it is far too large
    return site.kind != "key" and site.mix_logits is None and site.mix_weights is None and not local


def _keep(plan: _Planned, reason: str) -> None:
    plan.match = None
    plan.record.status, plan.record.rule, plan.record.lowering = "kept", "", ""
    plan.record.reason = reason


def _settle(graph: fx.Graph, view: View, candidate: Candidate, members: Sequence[_Planned],
            guards: set[str], touched: set[fx.Node]) -> None:
    """Put an accepted rewrite in, take a refused one out."""
    for plan in members:
        record = plan.record
        record.error, record.error_original = candidate.error, candidate.error_original
        record.error_bound, record.deviation = candidate.bound, candidate.deviation
    if candidate.trial and candidate.accepted:
        discard(graph, candidate.done)
        return
    if not candidate.accepted:
        discard(graph, candidate.done)
        for plan in members:
            _keep(plan, f"verification: {candidate.reason}")
            log.warning("%s is kept: %s", plan.record.path or plan.record.node, candidate.reason)
        return
    rewire(graph, candidate.done)
    touched.add(candidate.done.end)
    for plan in members:
        match = plan.match
        assert match is not None
        touched.update(view.author[n] for n in plan.site.interior)
        guards.update(plan.facts.guards)
        record = plan.record
        record.status, record.reason = "rewritten", ""
        record.lowering = match.schedule.lowering
        record.tile = "x".join(map(str, match.schedule.tile))
        record.predicted_speedup, record.memory = match.predicted_speedup, match.memory
        record.spec = str(match.spec)
