"""Patterns that are no single attention, replaced and verified before sites are looked for: what a
replacement puts in is read like any other code.

Rules of higher priority come first, then the order of the program; a region that overlaps one that
is taken is left alone. All results of a region are replaced, or none.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.ir.captured import Captured
from attnopt.ir.site import SiteRecord
from attnopt.passes.canonical import Tensor
from attnopt.passes.clock import Clock
from attnopt.passes.custom import CUSTOM, trace_into
from attnopt.passes.options import Options
from attnopt.passes.recognize.axes import Axis, product, resolve, same_length, settle, shape_of
from attnopt.passes.recognize.layout import Arranger
from attnopt.passes.recognize.program import Program
from attnopt.passes.rules import REGISTRY
from attnopt.passes.site_times import note_times, time_sites
from attnopt.passes.subgraphs.reading import program_of
from attnopt.passes.subgraphs.search import Place, Search, shapes_of
from attnopt.passes.substitute import (
    Substitution,
    _returned,
    discard,
    needs_strides,
    rewire,
    sweep,
)
from attnopt.passes.verify import Candidate, verify
from attnopt.rewrites import replacement_arguments
from attnopt.rules import Decline

if TYPE_CHECKING:
    pass

aten = torch.ops.aten
log = logging.getLogger("attnopt.passes")


@dataclass(eq=False)
class Region:
    """One result of a place, as verification takes it."""

    place: Place
    end: fx.Node
    spec: str
    starts: tuple[fx.Node, ...] = ()
    computed: frozenset[fx.Node] = frozenset()
    fixed: Mapping[Axis, int] = field(default_factory=dict)
    exact: None = None

    @property
    def site(self) -> Region:
        return self

    @property
    def interior(self) -> set[fx.Node]:
        return self.place.inside

    @property
    def tensors(self) -> list[Tensor]:
        return list(self.place.binding.arguments.values())

    @property
    def others(self) -> list[fx.Node]:
        """Arguments that this result need not depend on, but the replacement as a whole does."""
        return [t.node for t in self.tensors]

    def shapes(self) -> str:
        return shapes_of(self.place.binding)


@dataclass
class Replaced:
    """What became of the patterns in a graph: a record of each place, and the emitted nodes."""

    records: list[SiteRecord] = field(default_factory=list)
    emitted: list[tuple[SiteRecord, list[str]]] = field(default_factory=list)


def replace_patterns(captured: Captured, options: Options, clock: Clock) -> Replaced:
    """Find the patterns among the rules, and put their replacements in."""
    from attnopt.passes.patterns import PatternRule

    found = Replaced()
    if not any(isinstance(r, PatternRule) for r in REGISTRY.pick(options.exact_rules)):
        return found
    with clock("patterns"):
        given = [r for r in REGISTRY.pick(options.exact_rules) if isinstance(r, PatternRule)]
        rules = [r for r in given if r.kind == "graph"]
        captured.notes = (*captured.notes, *(
            f"the rewrite {r.name} is not used: {r.unread}" for r in given if r.unread))
        if not rules or "aten" not in options.lowerings:
            return found
        program = program_of(captured)
        places: list[Place] = []
        taken: dict[fx.Node, Place] = {}
        for rule in sorted(rules, key=lambda r: -r.priority):
            places += Search(captured, program, rule, options, taken).run(found.records)
        for place in places:
            _emit(captured, program, place)
        regions = [c for p in places for c in p.candidates]
        if options.verify and regions:
            verify(captured, program.view, regions)
        note_times(time_sites(captured, program.view, [
            (p.candidates, [p.record]) for p in places if p.candidates]))
        touched: set[fx.Node] = set()
        for place in places:
            _settle(captured.graph, program, place, touched, found)
        sweep(captured.graph, touched)
    found.records.sort(key=lambda r: {n.name: i for i, n in enumerate(program.nodes)}.get(
        r.node, 0))
    return found


# -- putting in ------------------------------------------------------------------------------------
def _emit(captured: Captured, program: Program, place: Place) -> None:
    """The replacement's operations, before the first result; a Decline goes to the record."""
    graph, view = captured.graph, program.view
    before = set(graph.nodes)
    authors = [view.author[e] for e in place.ends]
    first = min(authors, key=view.position.__getitem__)
    try:
        with graph.inserting_before(first):
            arranger = Arranger(graph, first, {})
            results = _results(arranger, view, place)
            results = [_finished(arranger, view, place, i, r, author)
                       for i, (r, author) in enumerate(zip(results, authors, strict=True))]
    except Decline as no:
        for node in reversed([n for n in graph.nodes if n not in before]):
            graph.erase_node(node)
        place.record.reason = no.reason
        place.record.tried.append(f"{place.rule.name}: {no.reason}")
        return
    inputs = list(dict.fromkeys(
        view.author[t.node] for t in place.binding.arguments.values()))
    tags = " ".join(f"{t}={n}" for t, n in place.pattern.tags.items())
    for i, (end, author, result) in enumerate(zip(place.ends, authors, results, strict=True)):
        region = Region(place, end, f"{place.rule.name} {tags} {i}")
        done = Substitution(author, inputs, arranger.emitted, result)
        place.candidates.append(Candidate([region], done, custom=True))  # type: ignore[list-item]


def _results(arranger: Arranger, view: Any, place: Place) -> list[fx.Node]:
    tensors = place.binding.arguments
    for tensor in tensors.values():
        arranger.learn(view.author[tensor.node], tensor.layout)
    nodes = []
    for tensor in tensors.values():
        node = arranger.arrange(view.author[tensor.node], tensor.layout, tensor.target)
        shape = [product(resolve(dim)) for dim in tensor.target]
        if not all(map(same_length, shape_of(node.meta["val"]), shape)):
            node = arranger.call(aten.expand.default, node, [arranger.length(n) for n in shape],
                                 shape=shape, dtype=node.meta["val"].dtype)
        nodes.append(node)

    def call(*given: Any) -> Any:
        named = dict(zip(tensors, given, strict=True))
        return place.rule.replacement(**replacement_arguments(
            place.rule.replacement, place.pattern.tags, named))

    _, results = trace_into(arranger, call, nodes)
    found = list(results) if isinstance(results, (tuple, list)) else [results]
    if len(found) != len(place.ends):
        raise Decline(f"its replacement must give {len(place.ends)} tensors, got {len(found)}")
    return found


def _finished(arranger: Arranger, view: Any, place: Place, number: int, result: Any,
              author: fx.Node) -> fx.Node:
    """One result in the layout, type and memory of the node that it stands for."""
    target, layout = place.binding.results[number]
    value = result.meta.get("val") if isinstance(result, fx.Node) else None
    shape = [product(resolve(dim)) for dim in target]
    if not isinstance(value, torch.Tensor) or len(value.shape) != len(shape) or not all(
            map(same_length, shape_of(value), shape)):
        got = tuple(value.shape) if isinstance(value, torch.Tensor) else type(result).__name__
        raise Decline(f"its replacement must give a tensor of shape {tuple(shape)}, got {got}")
    wanted = author.meta["val"].dtype
    if value.is_floating_point() != wanted.is_floating_point:
        raise Decline(f"its replacement must give {wanted}, got {value.dtype}")
    result = arranger.arrange(result, target, settle(layout))
    lengths = [product(dim) for dim in settle(layout)]
    if value.dtype != wanted:
        result = arranger.call(aten.to.dtype, result, wanted, shape=lengths, dtype=wanted)
    if needs_strides(author):
        result = arranger.call(aten.contiguous.default, result, shape=lengths, dtype=wanted)
    if _returned(view, author):  # memory that is handed out must be nobody else's
        result = arranger.call(aten.clone.default, result, shape=lengths, dtype=wanted)
    return result


def _settle(graph: fx.Graph, program: Program, place: Place, touched: set[fx.Node],
            found: Replaced) -> None:
    """All results of a place are taken, or none."""
    record = place.record
    if not place.candidates:
        return
    errors = [c for c in place.candidates if c.error is not None]
    if errors:
        worst = max(errors, key=lambda c: c.error or 0.0)
        record.error, record.error_original, record.error_bound = (
            worst.error, worst.error_original, worst.bound)
    refused = next((c for c in place.candidates if not c.accepted), None)
    if refused is not None:
        discard(graph, place.candidates[0].done)
        record.reason = f"verification: the rule {place.rule.name}: {refused.reason}"
        record.tried.append(f"{place.rule.name}: {refused.reason}")
        log.warning("%s is kept: %s", record.path or record.node, refused.reason)
        return
    record.status, record.rule, record.lowering = "rewritten", place.rule.name, CUSTOM
    for candidate in place.candidates:
        rewire(graph, candidate.done)
        touched.add(candidate.done.end)
    touched.update(a for n in place.inside if (a := program.view.author.get(n)) is not None)
    found.emitted.append((record, [n.name for n in place.candidates[0].done.emitted]))

