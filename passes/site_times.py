"""Seconds of each rewritten site alone, on the tensors that the example brings to it.

While `timing(...)` is entered, every graph that is rewritten is run once more as its author wrote
it. Where the end of a region has run, two programs of the region's inputs are timed in turns: the
author's operations (writes in place as new values) and what was put in for them, both under no_grad
and with direct calls, as a variant runs them. What a site shares with others, such as a table of
tiles, is part of its own time; what a whole graph gains (rolls and partitions that become part of a
call, tables made once for all layers) is not. Sites with one program and one set of shapes are
timed once, sites with one result together.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt import kernels
from attnopt.cost.roofline import roof
from attnopt.cost.work import ITEM_SIZE, work_of
from attnopt.direct_calls import with_direct_calls
from attnopt.ir.captured import Captured
from attnopt.ir.site import SiteRecord
from attnopt.passes.canonical import Canonical
from attnopt.passes.lengths import example_shapes
from attnopt.passes.normalize import View
from attnopt.passes.verify import Candidate, boundary, given, signature, walk
from attnopt.timing import Comparison, compare

log = logging.getLogger("attnopt.passes")


@dataclass(frozen=True)
class Timer:
    """How often, and with how many threads."""

    repeats: int = 30
    threads: int = 1


@dataclass(frozen=True)
class Timed:
    """What was found of a site: times, bytes of its inputs and its result, and its dtype."""

    record: SiteRecord
    candidate: Candidate
    times: Comparison
    nbytes: float
    dtype: str


_timer: contextvars.ContextVar[Timer | None] = contextvars.ContextVar("timer", default=None)


@contextlib.contextmanager
def timing(timer: Timer) -> Iterator[None]:
    """While it is entered, the sites of every graph that is rewritten are timed."""
    token = _timer.set(timer)
    try:
        yield
    finally:
        _timer.reset(token)


def time_sites(captured: Captured, view: View,
               groups: Sequence[tuple[Sequence[Candidate], Sequence[SiteRecord]]]) -> list[Timed]:
    """The times of accepted candidates, those of a group (the results of one replacement) together,
    which `note_times` writes into the records once these say
    everything else; empty where none are asked for."""
    timer = _timer.get()
    taken = [(group, records) for group, records in groups
             if all(c.accepted and not c.trial for c in group)]
    if timer is None or not taken:
        return []
    last = {id(group[-1]): (group, records) for group, records in taken}
    known: dict[Any, tuple[Comparison, float, str]] = {}
    times: list[Timed] = []
    for group, _ in taken:
        for c in group:
            c.boundary = c.boundary or boundary(view, c.parts)

    def visit(c: Candidate, env: Mapping[fx.Node, Any]) -> None:
        group, records = last[id(c)]
        same = signature(c)
        if same not in known:
            try:
                known[same] = _time(captured, view, group, env, timer)
            except Exception:  # the report then says that it is not measured
                log.warning("%s cannot be timed", c.done.end.name, exc_info=True)
                return
        times.extend(Timed(record, c, *known[same]) for record in records)

    walk(captured, view, [group[-1] for group, _ in taken], visit)
    return times


def _time(captured: Captured, view: View, group: Sequence[Candidate], env: Mapping[fx.Node, Any],
          timer: Timer) -> tuple[Comparison, float, str]:
    """Times of both, bytes of the inputs and of the result, and the result's dtype."""
    c = group[-1]
    unreadable = [n for n in c.boundary if not view.readable_at(n, c.done.end)]
    if unreadable:
        raise RuntimeError(f"{unreadable[0].name} is overwritten in place before the site ends")
    held = {n: env[view.author[n]] for n in c.boundary}

    def number(node: fx.Node) -> Any:  # sizes, and what a module holds
        if node.op == "get_attr":
            return getattr(captured.graph_module, str(node.target))
        return env[view.author.get(node, node)]

    original, args = _program([c.parts[0].site.end for c in group], held, number)
    values = given(c, view, held, env)
    emitted = set(c.done.emitted)
    rewritten, own = _program([c.done.result for c in group], values, env.__getitem__, emitted)
    tensors = {id(t): t for t in own if isinstance(t, torch.Tensor)}
    results = rewritten(*own)
    result = results[-1]
    nbytes = sum(t.numel() * t.element_size() for t in (*tensors.values(), *results))
    found = compare(lambda: original(*args), lambda: rewritten(*own), timer.repeats,
                    threads=timer.threads, device=str(result.device))
    return found, float(nbytes), str(result.dtype).removeprefix("torch.")


def _program(ends: Sequence[fx.Node], held: Mapping[fx.Node, Any], value: Callable[[fx.Node], Any],
             inside: set[fx.Node] | None = None) -> tuple[fx.GraphModule, list[Any]]:
    """What computes `ends` from the nodes in `held`, and those values; `value` gives that of sizes
    and attributes, and of every node that is not `inside` where that is given."""
    graph, copies = fx.Graph(), dict[fx.Node, Any]()
    args: list[Any] = []
    stack = list(ends)
    while stack:
        node = stack[-1]
        if node in copies:
            stack.pop()
            continue
        outside = node in held or node.op != "call_function" or (
            node not in inside if inside is not None else
            not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)))
        if outside:
            found = held[node] if node in held else value(node)
            if isinstance(found, torch.Tensor):
                copies[node] = graph.placeholder(f"input_{len(args)}")
                args.append(found)
            else:
                copies[node] = found
            stack.pop()
            continue
        missing = [n for n in node.all_input_nodes if n not in copies]
        if missing:
            stack.extend(missing)
            continue
        copies[node] = graph.call_function(
            node.target, *fx.node.map_arg((node.args, dict(node.kwargs)), copies.__getitem__))
        stack.pop()
    graph.output(tuple(copies[end] for end in ends))
    return with_direct_calls(fx.GraphModule(torch.nn.Module(), _sorted(graph))), args


def _sorted(graph: fx.Graph) -> fx.Graph:
    """The same with placeholders first."""
    first = next((n for n in graph.nodes if n.op != "placeholder"), None)
    for node in list(graph.nodes):
        if node.op == "placeholder" and first is not None:
            first.prepend(node)
    return graph


def note_times(times: Sequence[Timed]) -> None:
    """Write measured seconds and the share of the roofline into the records."""
    for timed in times:
        record, found = timed.record, timed.times
        record.measured_original, record.measured_seconds = found.medians
        record.measured_speedup = found.speedup
        record.measured_low, record.measured_high = found.interval
        flops = [_flops(part, record) for part in timed.candidate.parts]
        known = [n for n in flops if n is not None]
        if len(known) < len(flops):
            continue
        device = kernels.device("cpu" if found.device == "cpu" else "cuda")
        best = roof(device, sum(known), timed.nbytes, timed.dtype, found.threads)
        if best is not None and record.measured_seconds > 0:
            record.roofline, record.roofline_bound = (
                best.seconds / record.measured_seconds, best.bound)


def _flops(part: Any, record: SiteRecord) -> float | None:
    """Multiply-adds, as two each: of the visible scores, or of the corners of samples; None where
    they are not known."""
    if isinstance(part, Canonical):
        dtype = str(part.query.node.meta["val"].dtype).removeprefix("torch.")
        query, key, value = example_shapes(part)
        work = work_of(part.spec, query, key, value, dtype if dtype in ITEM_SIZE else "float32")
        return work.flops * (1.0 if record.density is None else record.density)
    lengths: tuple[Any, ...] = part.lengths() if hasattr(part, "lengths") else ()
    if len(lengths) != 6 or not all(isinstance(n, int) for n in lengths):
        return None
    batch, _, heads, channels, queries, points = lengths
    corners = 2 ** part.spec.axes if part.spec.mode == "linear" else 1
    return 2.0 * corners * batch * heads * channels * queries * points
