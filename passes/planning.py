"""The plan of an attention site: its canonical form, what is proven of it, the rule's answer."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import fx

from attnopt.ir.captured import Captured
from attnopt.ir.site import SiteRecord, module_path, source_line
from attnopt.passes import approximate
from attnopt.passes.analyze.inline_bias import Inlined, inline
from attnopt.passes.analyze.local_keys import FORMS, analyze_local
from attnopt.passes.analyze.provenance import Analysis
from attnopt.passes.analyze.regather_tokens import NotLocal
from attnopt.passes.analyze.structure import Facts, words
from attnopt.passes.canonical import Canonical, canonicalize
from attnopt.passes.custom import ask, restated
from attnopt.passes.examples import mask_examples
from attnopt.passes.freeze import frozen_operands
from attnopt.passes.lengths import example_shapes
from attnopt.passes.normalize import op_name
from attnopt.passes.options import Options
from attnopt.passes.recognize.attention import Attention
from attnopt.passes.recognize.axes import product, resolve
from attnopt.passes.recognize.program import PARAMETER, Program, carries
from attnopt.passes.rules import BUILT_IN, REGISTRY
from attnopt.passes.substitute import written_later
from attnopt.rules import Decline, Match, Region, Rule


@dataclass
class Planned:
    """A site on its way: its record, its canonical form, and what a rule made of it."""

    site: Attention
    record: SiteRecord
    canonical: Canonical | None = None
    facts: Facts = field(default_factory=Facts)
    match: Match | None = None


def plan_attention(captured: Captured, program: Program, analysis: Analysis, site: Attention,
          options: Options) -> Planned:
    """The plan of the first form of the site that a rule takes, or else of its first form."""
    plans: list[Planned] = []
    for form in FORMS:
        plans.append(_plan_form(captured, program, analysis, site, options, form))
        first = plans[0].canonical
        if plans[-1].match is not None or first is None or not first.copies:
            return plans[-1]
    return plans[0]


def _plan_form(captured: Captured, program: Program, analysis: Analysis, site: Attention,
               options: Options, form: str) -> Planned:
    """Canonical form, facts, and the first rule that takes the site."""
    plan = Planned(site, _record(program, site))
    record = plan.record
    try:
        _admissible(program, site, options, record.path)
        plan.canonical = canonicalize(program, site)
        plan.canonical, plan.facts = analyze_local(
            program, analysis, plan.canonical, record.tried, form)
    except NotLocal:
        raise
    except Decline as no:
        record.status, record.reason = "kept", explain(no, program)
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
        plan.match = _first_match(
            REGISTRY.pick(options.exact_rules), region, record, options.strict)
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
        record.reason = record.reason or explain(no, program)
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
                  tuple(v.dtype for v in values), values[2].device.type, in_training(captured),
                  operand_grad, shapes, all(isinstance(n, int) for n in lengths),
                  options.lowerings, inlined.canonical.spec if inlined is not None else None,
                  () if inlined is None or frozen_operands(captured, options, program, canonical)
                  else inlined.saved, canonical.copies,
                  prefer=options.prefer, rank=inlined.rank if inlined is not None else 0)


def in_training(captured: Captured) -> bool:
    """By the modules' flags, or, where they are not known, by an active dropout or batch norm."""
    flags = {"dropout": 2, "batch_norm": 5}
    return captured.training or any(
        n.args[flags[op_name(n)]] is True for n in captured.graph.nodes
        if n.op == "call_function" and op_name(n) in flags)


def _first_match(rules: Sequence[Rule], region: Region, record: SiteRecord,
                 strict: bool) -> Match | None:
    """The answer of the first rule that takes the region."""
    for rule in rules:
        if getattr(rule, "kind", "attention") != "attention":
            continue
        try:
            answer = ask(rule, region, strict)
        except Decline as no:
            record.tried.append(f"{rule.name}: {no.reason}")
            continue
        assumes = getattr(rule, "assumes", "")
        name = f"{rule.name} (assumes {assumes})" if assumes else rule.name
        if isinstance(answer, Match):
            record.rule = name
            return answer
        said = restated(region, answer, rule.name)
        match = _first_match(BUILT_IN, said, record, strict)
        if match is not None:
            record.rule = f"{name}, {record.rule}"
            if answer.mask != region.spec.mask:
                record.mask = answer.mask.describe()
            return match
        record.tried[-1] = f"{rule.name}: its Spec: {record.tried[-1]}"
    name, _, reason = record.tried[-1].partition(": ") if record.tried else (
        "", "", "no rule is active")
    record.reason = f"the rule {name} {reason}" if reason.startswith("raised ") else reason
    return None


def explain(no: Decline, program: Program) -> str:
    where = ""
    if isinstance(no.node, fx.Node):
        author = program.view.author.get(no.node, no.node)
        line = source_line(author)
        where = f" ({author.name}{', ' + line if line else ''})"
    return no.reason + where
