"""Attention sites put into the graph: the calls are emitted, and kept or taken out again.

Sites with one end stand or fall together.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import fx

from attnopt.ir.spec import Schedule
from attnopt.passes.normalize import View
from attnopt.passes.planning import Planned
from attnopt.passes.substitute import Part, discard, rewire, substitute
from attnopt.passes.verify import Candidate
from attnopt.rules import Decline

log = logging.getLogger("attnopt.passes")


def emit(graph: fx.Graph, view: View, plans: Sequence[Planned], *,
                trials: bool) -> list[tuple[Candidate, list[Planned]]]:
    """Emit the calls. Sites with one end stand or fall together.

    With `trials`, canonical sites are emitted as well, for verification to see their Spec.
    """
    by_end: dict[fx.Node, list[Planned]] = {}
    for plan in plans:
        by_end.setdefault(plan.site.end, []).append(plan)
    made = []
    for members in by_end.values():
        if any(p.canonical is None for p in members):
            for p in members:
                if p.canonical is not None:
                    keep(p, "another softmax of the same result was declined")
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
                    p.record.tried.append(f"{p.record.rule}: {no.reason}")
                    p.record.rule, p.record.reason = "", f"{p.record.rule}: {no.reason}"
            continue
        parts = [p.canonical for p in members if p.canonical is not None]
        custom = any(p.match is not None and p.match.compute is not None for p in members)
        made.append((Candidate(parts, done, not taken, custom), members))
    return made


def _part(plan: Planned) -> Part:
    assert plan.canonical is not None
    if plan.match is not None:
        return plan.canonical, plan.match.spec, plan.match.schedule, plan.match.compute
    return plan.canonical, plan.canonical.spec.with_(dropout=0.0), Schedule("aten:dense"), None


def _can_be_tried(plan: Planned) -> bool:
    site = plan.site
    local = plan.canonical is not None and plan.canonical.copies  # dense, it is far too large
    return site.kind != "key" and site.mix_logits is None and site.mix_weights is None and not local


def keep(plan: Planned, reason: str) -> None:
    plan.match = None
    plan.record.status, plan.record.rule, plan.record.lowering = "kept", "", ""
    plan.record.reason = reason


def settle(graph: fx.Graph, view: View, candidate: Candidate, members: Sequence[Planned],
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
            record = plan.record
            if record.rule:
                record.tried.append(f"{record.rule}: {candidate.reason}")
            who = f"the rule {record.rule}: " if candidate.custom else ""
            keep(plan, f"verification: {who}{candidate.reason}")
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
        record.predicted_seconds = match.seconds
        record.spec = str(match.spec)
