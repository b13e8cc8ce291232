"""Deformable attention in a program: weighted sums of samples, with the roles of their axes.

    out[b,q,h,:] = sum over levels and points of  weight[b,q,h,t] * sample(value, location)

The anchors are the operations that sample (`reader`: F.grid_sample in 4-D and 5-D, look-ups). From
each the sum over points is looked for downstream, and read backwards from there
(`sampling_sums.Sums`). What the axes are then says what they mean:

    lead      the batch of the value; and its channels where locations or weights vary along them
    columns   the other channels
    rows      where locations or weights vary, the result has it and the value has not: queries
    points    what is summed

A `SamplingSite` has the terms (one for each level) and the `Levels` of their points; the tensors to
call the op with, cut into levels or not, are found by `attnopt.passes.sampled`. An operation that
samples and is part of no weighted sum over points is recorded with the reason: losses at sampled
points, interpolated position embeddings.

To read one more operation that samples, add to `reader` a function from the node and the layout of
its result to a `Sample`. What a grid itself is made of (features times depths) is for
`passes.sampled` to see: `Sample.value` and `Sample.space` are the tensor with its axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import fx

from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.attention import Miss
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    fresh,
    product,
    resolve,
    settle,
    shape_of,
)
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.sampling_corners import corner_reads, corners
from attnopt.passes.recognize.sampling_gathers import is_lookup, lookup
from attnopt.passes.recognize.sampling_parts import Levels
from attnopt.passes.recognize.sampling_sums import (
    SUMS,
    Reader,
    Sample,
    Sums,
    Term,
    carries,
    grid_sampler,
    spatial,
)
from attnopt.rules import Decline


@dataclass
class SamplingSite:
    """One weighted sum of samples, by nodes of the functional view.

    terms:   one for each level, in the order of the points
    levels:  the axis of all points; None for one level
    lead, rows, columns: axes of the result; points: those of the first level's points
    scale:   what the sum is multiplied by
    """

    end: fx.Node
    out_layout: Layout
    terms: list[Term]
    levels: Levels | None
    lead: tuple[Axis, ...]
    rows: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    interior: list[fx.Node] = field(default_factory=list)
    scale: float = 1.0

    @property
    def starts(self) -> list[fx.Node]:
        """Tensors in front of the interior; `computed` has what is between."""
        return []

    @property
    def anchor(self) -> fx.Node:
        return self.terms[0].sample.node

    @property
    def samples(self) -> list[Sample]:
        return [t.sample for t in self.terms]

    @property
    def points(self) -> tuple[tuple[Axis, ...], ...]:
        """The axes of each level's points."""
        return (points_of(self.terms[0]),) if self.levels is None else self.levels.pieces


def find_samplings(program: Program) -> tuple[list[SamplingSite], list[Miss]]:
    """All weighted sums of samples, and the other operations that sample."""
    sums = Sums(program, reader)
    found: list[SamplingSite] = []
    misses: list[tuple[Miss, list[fx.Node]]] = []
    taken: set[fx.Node] = set()
    for node in program.nodes:
        if node in program.live and node.op == "call_function" and reader(node) is not None \
                and taken.isdisjoint((node, *corner_reads(node))):
            try:
                found.append(_site(program, sums, node))
                taken.update(n for s in found[-1].samples for n in (s.node, *s.inner))
            except Decline as no:
                alone = _alone(program, node)
                if alone is not None:
                    found.append(alone)
                elif op_name(node) == "grid_sampler" or corner_reads(node):
                    misses.append((Miss(node, no.reason, no.node, "sampling"),
                                   corner_reads(node) or [node]))
    left, told = [], set(taken)
    for miss, reads in misses:  # of all operations around the same look-ups, the first
        if told.isdisjoint(reads):
            left.append(miss)
        told.update(reads)
    return found, left


def _alone(program: Program, node: fx.Node) -> SamplingSite | None:
    """A sample without weights and sum, of a grid of three axes: worth a call if the grid need not
    be built (`passes.analyze.outer_volume`)."""
    out_layout = fresh(shape_of(node.meta["val"]))
    if op_name(node) != "grid_sampler" or len(out_layout) != 5:
        return None
    term = Term(grid_sampler(program, node, out_layout), None, frozenset(), {})
    return SamplingSite(node, out_layout, [term], None, *_roles(out_layout, [term]), [node])


def reader(node: fx.Node) -> Reader | None:
    """How an operation samples, None where it does not."""
    if op_name(node) == "grid_sampler":
        return grid_sampler
    if corner_reads(node):
        return corners
    return lookup if is_lookup(node) else None


def _site(program: Program, sums: Sums, anchor: fx.Node) -> SamplingSite:
    """The largest weighted sum that the samples of `anchor` are part of."""
    path = _downstream(program, anchor)
    why: Decline | None = None
    for end in reversed(path):
        try:
            return _read(program, sums, end)
        except Decline as no:
            if op_name(end) in SUMS:
                why = no.at(end)
    if why is not None:
        raise why
    users = program.users(path[-1] if path else anchor)
    raise Decline("no weighted sum over sampled points follows", users[0] if users else anchor)


def _downstream(program: Program, node: fx.Node) -> list[fx.Node]:
    """What reads `node`, as long as it is one operation that a weighted sum may have."""
    found: list[fx.Node] = []
    while True:
        users = program.users(node)
        if len(users) != 1 or not carries(users[0]):
            return found
        node = users[0]
        found.append(node)


def _read(program: Program, sums: Sums, end: fx.Node) -> SamplingSite:
    out_layout = fresh(shape_of(end.meta["val"]))
    terms = sums.read(end, out_layout)
    inside = set(sums.interior)
    for node in sums.interior:
        others = [u for u in program.users(node) if u not in inside]
        if node is not end and others:
            raise Decline("its samples are also used elsewhere", others[0])
    within = {n for t in terms for n in t.sample.inner}
    if len(terms) == 1 and not any(op_name(n) in SUMS for n in inside - within):
        raise Decline("no weighted sum over sampled points follows", end)
    terms, levels = _levels(terms)
    site = SamplingSite(end, out_layout, terms, levels, *_roles(out_layout, terms),
                        list(dict.fromkeys(sums.interior)), sums.scale)
    if len({t.weights is None for t in terms}) > 1:
        raise Decline("some levels are added without weights", site.anchor)
    if len({(s.mode, s.padding, s.align_corners, s.range, s.order, s.coordinate is None,
             s.hidden) for s in site.samples}) > 1:
        raise Decline("levels are sampled in several ways", site.anchor)
    return site


def points_of(term: Term) -> tuple[Axis, ...]:
    """The axes of a term's points, in the order of its locations."""
    return tuple(a for a in spatial(term) if a in resolve(term.summed))


# -- levels ----------------------------------------------------------------------------------------
def _levels(terms: list[Term]) -> tuple[list[Term], Levels | None]:
    """The terms in order, and one axis for the points of all."""
    if len(terms) == 1:
        return terms, None
    if len({next(iter(t.picks), None) for t in terms}) > 1:
        raise Decline("some levels are put together, others are added", terms[0].sample.node)
    if not terms[0].picks:
        return terms, _renamed([points_of(t) for t in terms])
    axis = next(iter(terms[0].picks))
    terms = sorted(terms, key=lambda t: t.picks[axis].start)
    picks = [t.picks[axis] for t in terms]
    starts = [p.start for p in picks]
    levels = _renamed([points_of(t) for t in terms])
    if not any(p.axes for p in picks):  # a stack
        if axis.parts is not None or starts != list(range(len(terms))) or axis.size != len(terms):
            raise Decline("levels that are stacked are not one of each", terms[0].sample.node)
        if levels.level is not None:
            axis.become((levels.level,))
        elif any(t.weights is not None and axis in axes_of(t.weights[1]) for t in terms):
            raise Decline("levels of unequal size share their weights", terms[0].sample.node)
        return terms, levels
    if tuple(starts) != levels.starts or axis.parts is not None:
        raise Decline("points that are put together are not all there", terms[0].sample.node)
    axis.become(levels.whole)
    return terms, levels


def _renamed(pieces: Sequence[tuple[Axis, ...]]) -> Levels:
    """One axis of all points; where all levels have as many, these are one axis for all of them."""
    if not all(isinstance(product(p), int) for p in pieces):
        raise Decline("a number of points that is not known")
    sizes = [tuple(a.size for a in p) for p in pieces]
    starts = tuple(sum(product(p) for p in pieces[:i]) for i in range(len(pieces)))
    if len(set(sizes)) == 1:
        for piece in pieces[1:]:
            for mine, first in zip(piece, pieces[0], strict=True):
                mine.become((first,))
        level = Axis(len(pieces))
        return Levels((level, *pieces[0]), (pieces[0],) * len(pieces), starts, level)
    whole = Axis(sum(product(p) for p in pieces))
    return Levels((whole,), tuple(pieces), starts, None)


# -- roles -----------------------------------------------------------------------------------------
def _roles(out_layout: Layout, terms: Sequence[Term]
           ) -> tuple[tuple[Axis, ...], tuple[Axis, ...], tuple[Axis, ...]]:
    """(lead, rows, columns), the same for every term."""
    out = axes_of(out_layout)
    roles = [_term_roles(out, t) for t in terms]
    if len({tuple(map(frozenset, r)) for r in roles}) != 1:
        raise Decline("levels have different axes", terms[0].sample.node)
    return roles[0]


def _term_roles(out: frozenset[Axis], term: Term
                ) -> tuple[tuple[Axis, ...], tuple[Axis, ...], tuple[Axis, ...]]:
    sample = term.sample
    batch, channels, *_ = settle(sample.value[1])
    if sample.inner:  # the dimensions of a map that is read by index are in any order
        held = [a for dim in settle(sample.value[1]) for a in dim]
        batch, channels = (), tuple(a for a in held if a not in resolve(sample.space))
    points, summed = points_of(term), resolve(term.summed)
    levels = {x for a in term.picks for x in resolve((a,))}
    weights = () if term.weights is None else settle(term.weights[1])
    varied = axes_of(weights).union(*(axes_of(x) for _, x in sample.locations))
    lead = (*batch, *(a for a in channels if a in varied))
    rows = tuple(a for a in spatial(term) if a not in points)
    rows += tuple(a for dim in weights for a in dim
                  if a in out and a not in (*lead, *rows, *channels))
    if not set(summed) <= {*points, *levels}:
        raise Decline("the sum runs over more than levels and points", sample.node)
    if not set((*lead, *rows, *channels)) <= out:
        raise Decline("an axis of the samples is not in the result", sample.node)
    columns = tuple(a for a in channels if a not in varied)
    if channels and not columns and not sample.inner:  # whose channels may be a batch alone
        raise Decline("every channel has weights or locations of its own", sample.node)
    return lead, rows, columns
