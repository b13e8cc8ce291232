"""Where a pattern is in a graph.

Every result of a pattern is matched with a node of the graph; the region is what lies between these
nodes and the tensors that the pattern's arguments are. It is left alone where something else
reads what the region computes inside, where memory is written in between, where it spans two
gradient modes, or where it is part of a region that is taken.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.ir.captured import Captured
from attnopt.ir.site import SiteRecord, module_path, source_line
from attnopt.passes.normalize import is_tensor
from attnopt.passes.options import Options
from attnopt.passes.recognize.axes import Axis, product, shape_of
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import Program
from attnopt.passes.subgraphs.binding import Binding, bind
from attnopt.passes.subgraphs.match import Matcher, State
from attnopt.passes.subgraphs.reading import Pattern, constants_of
from attnopt.passes.subgraphs.terms import Ref, expand, strip
from attnopt.passes.substitute import written_later
from attnopt.passes.verify import Candidate
from attnopt.rules import Decline

if TYPE_CHECKING:
    from attnopt.passes.patterns import PatternRule

log = logging.getLogger("attnopt.passes")
#: solutions of one place, and places of the further results of a pattern, that are looked at
_MOST_SOLUTIONS, _MOST_PLACES = 16, 400


@dataclass(eq=False)
class Place:
    """Where a pattern was found.

    ends: the nodes of the view that are its results; inside: everything between them and the
    arguments, the ends included
    """

    rule: PatternRule
    pattern: Pattern
    binding: Binding
    ends: list[fx.Node]
    inside: set[fx.Node]
    record: SiteRecord
    candidates: list[Candidate] = field(default_factory=list)


class Search:
    """All places of one rule."""

    def __init__(self, captured: Captured, program: Program, rule: PatternRule, options: Options,
                 taken: dict[fx.Node, Place]) -> None:
        self.captured, self.program, self.rule = captured, program, rule
        self.options, self.taken = options, taken
        self.constant = constants_of(captured, program)
        self.nearest: tuple[int, str, fx.Node | None] = (0, "", None)

    def run(self, records: list[SiteRecord]) -> list[Place]:
        """The places; `records` gets one of each, and of those that must be left alone."""
        places: list[Place] = []
        declined = 0
        for node in self.program.nodes:
            if node not in self.program.live or node.op != "call_function" or not is_tensor(node) \
                    or strip(Ref(node, _layout(node))).node is not node:
                continue
            end = self.end(node)
            other = self.taken.get(end)
            if other is not None and other.rule is self.rule and end in other.ends:
                continue  # another result of a place
            for pattern in self.rule.graph_patterns():
                place = self.at(pattern, node)
                if isinstance(place, SiteRecord):
                    records.append(place)
                    declined += 1
                    break
                if place is not None:
                    places.append(place)
                    records.append(place.record)
                    self.taken |= dict.fromkeys(place.inside, place)
                    break
        if not places and not declined:
            self.note()
        return places

    def note(self) -> None:
        _, reason, node = self.nearest
        where = source_line(self.program.view.author.get(node, node)) if node is not None else ""
        told = f"; nearest: {reason}{f' ({where})' if where else ''}" if reason else ""
        text = f"the rewrite {self.rule.name} fits nowhere{told}"
        self.captured.notes = (*self.captured.notes, text)

    def at(self, pattern: Pattern, node: fx.Node) -> Place | SiteRecord | None:
        """The place whose first result is this node; a record where it must be left alone."""
        refused: SiteRecord | None = None
        for own, states in self.readings(pattern, node):
            for state, ends, roots in islice(states, _MOST_SOLUTIONS):
                record = self.record(ends[0])
                try:
                    binding = bind(state, self.rule.inputs, roots)
                    if not self.types(binding):
                        continue
                    place = Place(self.rule, own, binding, ends, set(), record)
                    record.shapes = shapes_of(binding)
                    self.admissible(place)
                    return place
                except Decline as no:
                    self.nearest = max(self.nearest, (state.terms + 1, no.reason, node),
                                       key=lambda n: n[0])
                    if record.shapes:  # it fits, but must stay
                        record.reason = _explained(no)
                        record.tried.append(f"{self.rule.name}: {no.reason}")
                        refused = refused or record
        return refused

    def record(self, node: fx.Node) -> SiteRecord:
        author = self.program.view.author[node]
        return SiteRecord(path=module_path(author), source=source_line(author), kind="pattern",
                          node=node.name, rule="", status="kept")

    def readings(self, pattern: Pattern, node: fx.Node) -> Iterator[tuple[Pattern, Any]]:
        """The pattern as it is, and at the lengths of this place where its numbers depend on them.
        """
        if not pattern.sized:
            yield pattern, self.solutions(pattern, node)
            return
        seen = set()
        for state, _, roots in islice(self.solutions(pattern, node, loose=True), _MOST_SOLUTIONS):
            try:
                lengths = {word: n for word, n in bind(
                    state, self.rule.inputs, roots).lengths.items()
                    if isinstance(n, int) and n > 1}
            except Decline:
                continue
            key = tuple(sorted(lengths.items()))
            if key not in seen:
                seen.add(key)
                own = self.rule.graph_pattern_at(pattern.tags, key)
                yield own, self.solutions(own, node)

    def solutions(self, pattern: Pattern, node: fx.Node, loose: bool = False
                  ) -> Iterator[tuple[State, list[fx.Node], list[Any]]]:
        """(state, ends, layouts of the results) of each way to match all results."""
        matcher = Matcher(pattern.names, pattern.constant, self.constant, loose)
        first = Ref(node, _layout(node))
        if _kind(pattern.roots[0], pattern.constant) - _kind(first, self.constant):
            return
        try:
            for state in matcher.roots(pattern.roots[0], first, State()):
                yield from self.further(matcher, pattern, 1, state, [self.end(node)],
                                        [(pattern.roots[0].layout, first.layout)])
        except (ArithmeticError, RecursionError):  # numbers without end, or a very long sum
            log.info("%s cannot be compared with %s", node.name, self.rule.name, exc_info=True)
        if matcher.nearest[0] > self.nearest[0]:
            self.nearest = matcher.nearest

    def further(self, matcher: Matcher, pattern: Pattern, at: int, state: State,
                ends: list[fx.Node], roots: list[Any]
                ) -> Iterator[tuple[State, list[fx.Node], list[Any]]]:
        if at == len(pattern.roots):
            yield state, ends, roots
            return
        for node in self.downstream(state):
            end = self.end(node)
            if end in ends:
                continue
            ref = Ref(node, _layout(node))
            if _kind(pattern.roots[at], pattern.constant) - _kind(ref, self.constant):
                continue
            for found in matcher.roots(pattern.roots[at], ref, state):
                yield from self.further(
                    matcher, pattern, at + 1, found, [*ends, end],
                    [*roots, (pattern.roots[at].layout, ref.layout)])

    def downstream(self, state: State) -> list[fx.Node]:
        """Nodes that are computed from arguments which depend on an input, in program order."""
        found: dict[fx.Node, None] = {}
        stack = [n for n in state.bound.values() if self.program.on_input(n)] or list(
            state.bound.values())
        while stack and len(found) < _MOST_PLACES:
            node = stack.pop(0)
            for user in self.program.users(node):
                if user not in found and is_tensor(user):
                    found[user] = None
                    stack.append(user)
        return sorted((n for n in found if strip(Ref(n, _layout(n))).node is n),
                      key=self.program.order.__getitem__)

    def end(self, node: fx.Node) -> fx.Node:
        """Past casts that alone read the node: what is rounded there may be rounded inside."""
        while len(users := self.program.users(node)) == 1 and is_cast(users[0]):
            node = users[0]
        return node

    # -- what must hold -----------------------------------------------------------------------
    def types(self, binding: Binding) -> bool:
        return all((t.node.meta["val"].dtype == torch.bool) == (name in self.rule.masks) and (
            name in self.rule.masks or t.node.meta["val"].is_floating_point())
            for name, t in binding.arguments.items())

    def admissible(self, place: Place) -> None:
        program, record = self.program, place.record
        view = program.view
        if self.options.only is not None and not fnmatch.fnmatch(record.path, self.options.only):
            raise Decline(f"outside only={self.options.only!r}")
        given = {t.node for t in place.binding.arguments.values()}
        if given & set(place.ends):
            raise Decline("its result is one of its arguments")
        place.inside = _between(place.ends, given, self.constant)
        ends = set(place.ends)
        plain = _rearranged(place.inside, given, self.constant)
        for node in place.inside:
            other = self.taken.get(node)
            if other is not None and node not in plain:
                raise Decline(f"part of a place of {other.rule.name}, at "
                              f"{other.record.source or other.record.path}", node)
            used = [u for u in program.users(node) if u not in place.inside]
            if used and node not in ends and node not in plain:
                raise Decline(f"what it computes inside is also used by {used[0].name}", used[0])
        authors = [view.author[e] for e in place.ends]
        region = authors[0].meta.get("attnopt_region")
        if any(view.author[n].meta.get("attnopt_region") != region for n in place.inside - plain):
            raise Decline("it spans a no_grad or autocast region")
        if any(written_later(view, a) for a in authors):
            raise Decline("its result is written in place later")
        first = min(authors, key=view.position.__getitem__)
        for name, tensor in place.binding.arguments.items():
            author = view.author[tensor.node]
            if view.position[author] >= view.position[first]:
                raise Decline(f"{name} is made after its first result")
            if not view.readable_at(tensor.node, first):
                raise Decline(f"{name} is overwritten in place before its result is made")


def _layout(node: fx.Node) -> Any:
    return tuple(() if n == 1 else (Axis(n),) for n in shape_of(node.meta["val"]))


_LINEAR = frozenset(("sum", "product", "number"))


def _kind(ref: Ref, constant: Any) -> frozenset[str]:
    """Operations of the outermost term, where it is none that is opened further."""
    term = expand(ref, constant)
    if isinstance(term, Ref):
        return frozenset(("tensor",))
    return frozenset() if term.op in _LINEAR else frozenset((term.op,))


def _between(ends: Sequence[fx.Node], given: set[fx.Node], constant: Any) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(ends)
    while stack:
        node = stack.pop()
        if node in given or node in found:
            continue
        if not isinstance(node.meta.get("val"), (torch.Tensor, list, tuple)):
            continue  # sizes
        if node.op == "placeholder" and constant(node) is None:
            raise Decline(f"{node.name} is none of its pattern's arguments", node)
        found.add(node)
        stack.extend(node.all_input_nodes)
    return found


def _rearranged(inside: set[fx.Node], given: set[fx.Node], constant: Any) -> set[fx.Node]:
    """Those of the nodes inside that only rearrange an argument, or are numbers."""
    return {n for n in inside if constant(n) is not None
            or strip(Ref(n, _layout(n))).node in given or n.op != "call_function"
            or not is_tensor(n)}


def shapes_of(binding: Binding) -> str:
    return " ".join("x".join(str(product(dim)) for dim in t.target)
                    for t in binding.arguments.values())


def _explained(no: Decline) -> str:
    line = source_line(no.node) if isinstance(no.node, fx.Node) else ""
    return f"{no.reason}{f' ({line})' if line else ''}"
