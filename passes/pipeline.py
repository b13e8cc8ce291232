"""The passes in order: from a captured graph to the rewritten one and a record of every site."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

import torch
from torch import fx

from attnopt.ir.captured import Captured
from attnopt.ir.graph_record import GraphRecord, compared, nodes_of
from attnopt.ir.site import SiteRecord, module_path, source_code, source_line
from attnopt.ir.spec import Schedule
from attnopt.passes.analyze.provenance import Analysis
from attnopt.passes.analyze.regather import regathered
from attnopt.passes.analyze.regather_tokens import NotLocal
from attnopt.passes.capture.guards import ValueGuard
from attnopt.passes.capture.turns import settle_turns
from attnopt.passes.clock import Clock
from attnopt.passes.compiling import attention_calls, compile_kernels, kernel_texts
from attnopt.passes.depict import depict
from attnopt.passes.fold_windows import fold_windows
from attnopt.passes.freeze import asks_for_gradients, freeze
from attnopt.passes.locations import run_together
from attnopt.passes.normalize import View, functional_view, op_name
from attnopt.passes.options import Options
from attnopt.passes.parameters import share
from attnopt.passes.planning import Planned, in_training, plan_attention
from attnopt.passes.readable import readable
from attnopt.passes.recognize.attention import Miss
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.sites import recognize
from attnopt.passes.sampling import (
    SamplingPlan,
    emit_samplings,
    plan_samplings,
    settle_sampling,
    softmaxes,
)
from attnopt.passes.settling import emit, settle
from attnopt.passes.site_times import note_times, time_sites
from attnopt.passes.subgraphs.rewriting import replace_patterns
from attnopt.passes.substitute import sweep
from attnopt.passes.verify import verify
from attnopt.rules import Match

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
    record: GraphRecord = field(default_factory=GraphRecord)
    kernels: dict[str, str] = field(default_factory=dict)
    #: what `freeze` computed values from, and whether any of it wanted a gradient then
    frozen: tuple[str, ...] = ()
    frozen_grad: bool = False


def rewrite(captured: Captured, options: Options) -> Rewritten:
    """Find, prove, rewrite and verify. `captured.graph_module` is rewritten in place."""
    clock = Clock()
    module, graph = captured.graph_module, captured.graph
    before, nodes_before = readable(graph), nodes_of(graph, op_name)
    replaced = replace_patterns(captured, options, clock)
    view, program, analysis, plans, sampled, misses = _read(captured, options, clock)
    with clock("substitute"):
        candidates = emit(graph, view, plans, trials=options.verify)
        samplings = emit_samplings(graph, view, sampled)
    with clock("compile"):
        calls = [(p.record, p.match, node) for c, members in candidates for p, node in zip(
            [p for p in members if p.match is None or p.match.compute is None],
            attention_calls(c.done.emitted), strict=False) if p.match]
        compile_kernels([(match, node) for _, match, node in calls], in_training(captured))
    if options.verify and (candidates or samplings):
        with clock("verify"):
            verify(captured, view, [c for c, _ in (*candidates, *samplings)],
                   (options.approximate or {}).get("output"))
    times = time_sites(captured, view, [
        *(([c], [p.record for p in members]) for c, members in candidates),
        *(([c], [p.record]) for c, p in samplings)])
    guards: set[str] = set()
    touched: set[fx.Node] = set()
    for candidate, members in candidates:
        settle(graph, view, candidate, members, guards, touched)
    for candidate, sampling in samplings:
        settle_sampling(graph, view, candidate, sampling, touched)
    texts = kernel_texts(calls)
    for plan in plans:
        if plan.canonical is not None:
            chosen = plan.match or Match(plan.canonical.spec, Schedule())
            depict(plan.record, plan.canonical, chosen, analysis.values)
    note_times(times)
    sweep(graph, touched)
    if touched:
        fold_windows(captured)
        run_together(graph)
        share(captured, options.prefer)
    frozen = freeze(captured, options)
    graph.lint()
    module.recompile()
    records = [*replaced.records, *_records(graph, view, program, plans, sampled, misses)]
    site = {id(record): i for i, record in enumerate(records)}
    author = {n.name: view.author.get(n, n).name for n in program.nodes}
    taken = {author.get(r.node, r.node): i for i, r in enumerate(records)}
    emitted = {n.name: site[id(p.record)]
               for c, members in candidates for p in members for n in c.done.emitted}
    emitted |= {n.name: site[id(p.record)] for c, p in samplings for n in c.done.emitted}
    emitted |= {name: site[id(record)] for record, names in replaced.emitted for name in names}
    held = tuple(ValueGuard.of(captured, name) for name in sorted(guards)) + frozen
    return Rewritten(module, records, held, before, readable(graph), clock.seconds,
                     compared(nodes_before, nodes_of(graph, op_name), taken, emitted), texts,
                     tuple(g.path for g in frozen), asks_for_gradients(captured, frozen))


# -- planning -----------------------------------------------------------------------------------
def _read(captured: Captured, options: Options, clock: Clock, *, put_back: bool = True
          ) -> tuple[View, Program, Analysis, list[Planned], list[SamplingPlan], list[Miss]]:
    """What is in a graph. Moved scores are put back only where all are local attentions then."""
    with clock("normalize"):
        settle_turns(captured.graph)
        view = functional_view(captured.graph)
    with clock("recognize"):
        kinds = {name: origin.kind for name, origin in captured.origins.items()}

        def value_of(name: str) -> torch.Tensor | None:
            origin = captured.origins.get(name)
            held = origin is not None and origin.kind in ("buffer", "constant")
            return captured.values.get(name) if held else None

        program = Program(view, kinds, value_of)
        sampled, unsampled = plan_samplings(captured, program, options)
        owned = softmaxes(sampled)
        program = regathered(program, owned) if put_back else program
        found, misses = recognize(program)
        found = [site for site in found if site.anchor not in owned]
        misses = [m for m in misses if m.anchor not in owned] + unsampled
    with clock("analyze"):
        analysis = Analysis(view.graph, kinds, value_of, captured.values.get)
        try:
            plans = [plan_attention(captured, program, analysis, site, options) for site in found]
        except NotLocal as no:
            log.info("%s: read as it is written", no.reason)
            return _read(captured, options, clock, put_back=False)
    return view, program, analysis, plans, sampled, misses


def _records(graph: fx.Graph, view: View, program: Program, plans: list[Planned],
             sampled: list[SamplingPlan], misses: list[Miss]) -> list[SiteRecord]:
    """Of all sites in the order of the program, with the text of their source lines."""
    records = [p.record for p in plans] + [p.record for p in sampled]
    present = set(graph.nodes)  # a sampling that an attention took in is told by that attention
    records += [_missed(m, view) for m in misses
                if m.kind != "sampling" or view.author.get(m.anchor, m.anchor) in present]
    order = {n.name: i for i, n in enumerate(program.nodes)}
    records.sort(key=lambda r: order.get(r.node, 0))
    authors = {n.name: view.author.get(n, n) for n in program.nodes}
    for record in records:
        if record.node in authors:
            record.code = source_code(authors[record.node])
    return records


def _missed(miss: Miss, view: View) -> SiteRecord:
    author = view.author.get(miss.anchor, miss.anchor)
    culprit = view.author.get(miss.node, miss.node) if miss.node is not None else author
    line = source_line(culprit)
    nearest = "deformable" if miss.kind == "sampling" else "attention"
    where = f" ({culprit.name}{', ' + line if line else ''})"
    return SiteRecord(path=module_path(author), source=source_line(author), kind=miss.kind,
                      status="kept", node=miss.anchor.name, reason=miss.reason + where,
                      tried=[f"{nearest}: {miss.reason}"])
