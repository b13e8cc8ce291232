"""Sampling sites on their way: planned, put into the graph, and kept or taken out again."""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

import attnopt.kernels.deformable.levels  # noqa: F401 - registers the op
import attnopt.kernels.deformable.two_stage  # noqa: F401 - registers its ops
from attnopt.ir.captured import Captured
from attnopt.ir.site import SiteRecord, module_path, source_line
from attnopt.kernels.deformable.lowering import lowering
from attnopt.passes.normalize import View
from attnopt.passes.options import Options
from attnopt.passes.planning import explain, in_training
from attnopt.passes.recognize.attention import Miss
from attnopt.passes.recognize.axes import fresh, shape_of
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.sampling import SamplingSite, find_samplings
from attnopt.passes.rules import REGISTRY
from attnopt.passes.rules.deformable import SamplingMatch, SamplingRegion
from attnopt.passes.sampled import Sampled, canonicalize_sampling, softmax_for
from attnopt.passes.substitute import discard, rewire, written_later
from attnopt.passes.substitute_sampling import substitute_sampling
from attnopt.passes.verify import Candidate
from attnopt.rules import Decline

#: what the capture puts in the place of opaque autograd.Functions (passes.capture.opaque)
OPAQUE = (torch.ops.attnopt.deformable_attention.default,
          torch.ops.attnopt.deformable_attention_of_levels.default,
          torch.ops.attnopt.scored_attention.default)
log = logging.getLogger("attnopt.passes")


@dataclass
class SamplingPlan:
    """A sampling site: its record, its tensors, and what a rule made of it.

    softmax: that of the weights of an opaque Function, where it is for them alone
    """

    site: SamplingSite | None
    record: SiteRecord
    sampled: Sampled | None = None
    match: SamplingMatch | None = None
    softmax: fx.Node | None = None


def plan_samplings(captured: Captured, program: Program, options: Options
                   ) -> tuple[list[SamplingPlan], list[Miss]]:
    """A plan for every weighted sum of samples, and the samples that are none."""
    found, misses = find_samplings(program)
    plans = [_plan(captured, program, site, options) for site in found]
    return [*plans, *(_captured(program, n) for n in program.nodes if n.target in OPAQUE)], misses


def _captured(program: Program, node: fx.Node) -> SamplingPlan:
    """An opaque autograd.Function, which the capture has put the op for."""
    values = [n.meta["val"] for n in node.args[:4] if isinstance(n, fx.Node)]
    record = SiteRecord(
        path=module_path(node), source=source_line(node), kind="sampling", node=node.name,
        status="rewritten", rule="deformable (autograd.Function)", spec=str(node.args[-1]),
        shapes=" ".join("x".join(map(str, v.shape)) for v in values[:3]),
        lowering="aten" if node.target is OPAQUE[2] else lowering(
            tuple(v.dtype for v in values), values[0].device.type))
    weights: Any = node.args[2]
    layout = fresh(shape_of(weights.meta["val"]))
    return SamplingPlan(None, record, softmax=softmax_for(
        program, node, weights, layout, layout[-1]))


def softmaxes(plans: Sequence[SamplingPlan]) -> set[fx.Node]:
    """Those over points, which belong to sampling sites and are no attention of their own."""
    own = (p.sampled.softmax if p.sampled else p.softmax for p in plans)
    return {softmax for softmax in own if softmax is not None}


def _plan(captured: Captured, program: Program, site: SamplingSite, options: Options
          ) -> SamplingPlan:
    author = program.view.author[site.anchor]
    record = SiteRecord(path=module_path(author), source=source_line(author), kind="sampling",
                        node=site.anchor.name)
    plan = SamplingPlan(site, record)
    try:
        plan.sampled = sampled = canonicalize_sampling(program, site)
        record.spec, record.shapes = str(sampled.spec), sampled.shapes()
        record.mask = _words(sampled)
        if sampled.not_lifted:
            record.tried.append(f"lifting: {sampled.not_lifted}")
        if options.only is not None and not fnmatch.fnmatch(record.path, options.only):
            raise Decline(f"outside only={options.only!r}")
        _replaceable(program, sampled)
        record.status, record.lowering = "canonical", "author"
        plan.match = _first_match(captured, sampled, options, record)
    except Decline as no:
        record.reason = explain(no, program)
    return plan


def _words(sampled: Sampled) -> str:
    """"4 points of each of 3 levels, softmax": what is sampled, and whose the softmax is."""
    points = sampled.spec.points
    each = f"{points[0]} points of each of {len(points)} levels" if len(set(points)) == 1 \
        else f"{' + '.join(map(str, points))} points of {len(points)} levels"
    if len(points) == 1:
        each = f"{points[0]} points"
    return each + (", softmax" if sampled.softmax is not None else "")


def _replaceable(program: Program, sampled: Sampled) -> None:
    """What must hold for the author's nodes to go."""
    view, site = program.view, sampled.site
    end = view.author[site.end]
    region = end.meta.get("attnopt_region")
    for node in site.interior:
        if view.author[node].meta.get("attnopt_region") != region:
            raise Decline("the site spans a no_grad or autocast region", node)
    if written_later(view, end):
        raise Decline("its result is written in place later", end)


def _first_match(captured: Captured, sampled: Sampled, options: Options, record: SiteRecord
                 ) -> SamplingMatch | None:
    values = [sampled.value[0].node.meta["val"], sampled.locations[0][0].node.meta["val"],
              (sampled.weights or sampled.locations[0])[0].node.meta["val"],
              *(t.node.meta["val"] for t in sampled.depth[:1])]
    dtypes = tuple(v.dtype if v.is_floating_point() else torch.float32 for v in values)
    device = values[0].device.type
    region = SamplingRegion(sampled.spec, dtypes, sampled.lengths(), device, in_training(captured),
                            lowering(dtypes, device), options.lowerings, options.prefer)
    for rule in REGISTRY.pick(options.exact_rules):
        if getattr(rule, "kind", "attention") != "sampling":
            continue
        try:
            match: SamplingMatch = rule.sample(region)  # type: ignore[attr-defined]
        except Decline as no:
            record.tried.append(f"{rule.name}: {no.reason}")
            continue
        record.rule = rule.name
        return match
    record.reason = record.tried[-1].partition(": ")[2] if record.tried else "no rule is active"
    return None


def emit_samplings(graph: fx.Graph, view: View, plans: Sequence[SamplingPlan]
                   ) -> list[tuple[Candidate, SamplingPlan]]:
    """Emit the calls of the plans that a rule took."""
    made = []
    for plan in plans:
        if plan.match is None or plan.sampled is None:
            continue
        before = set(graph.nodes)
        try:
            done = substitute_sampling(
                graph, view, plan.sampled, "aten" if plan.match.lowering == "aten" else "")
        except Decline as no:
            for node in reversed([n for n in graph.nodes if n not in before]):
                graph.erase_node(node)
            plan.match, plan.record.rule, plan.record.reason = None, "", no.reason
            continue
        made.append((Candidate([plan.sampled], done), plan))  # type: ignore[list-item]
    return made


def settle_sampling(graph: fx.Graph, view: View, candidate: Candidate, plan: SamplingPlan,
                    touched: set[fx.Node]) -> None:
    """Put an accepted rewrite in, take a refused one out."""
    record, match = plan.record, plan.match
    assert match is not None and plan.sampled is not None and plan.site is not None
    record.error, record.error_original = candidate.error, candidate.error_original
    record.error_bound = candidate.bound
    if not candidate.accepted:
        discard(graph, candidate.done)
        record.status, record.rule, record.lowering = "kept", "", ""
        record.reason = f"verification: {candidate.reason}"
        log.warning("%s is kept: %s", record.path or record.node, candidate.reason)
        return
    rewire(graph, candidate.done)
    touched.add(candidate.done.end)
    touched.update(view.author[n] for n in (*plan.site.interior, *plan.sampled.computed)
                   if n in view.author)
    record.status, record.reason, record.lowering = "rewritten", "", match.lowering
    record.predicted_speedup, record.predicted_seconds = match.predicted_speedup, match.seconds
