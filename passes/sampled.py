"""A sampling site as a call of `attnopt::deformable_attention`: its Sampling and its tensors.

`canonicalize_sampling` finds for value, locations and weights the tensor of the author's program
that all levels have been cut from, or else the parts to be put together; 2 * location - 1 in front
of F.grid_sample becomes the range of the locations. The call is emitted by `substitute_sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

import attnopt.kernels.deformable  # noqa: F401 - registers the op
from attnopt.kernels.deformable import Sampling
from attnopt.passes.analyze.outer_volume import lifted
from attnopt.passes.canonical import Target, Tensor, may_read
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    broadcast,
    product,
    resolve,
    settle,
    shape_of,
)
from attnopt.passes.recognize.layout import LAYOUT_OPS, back
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import SOFTMAX, Program
from attnopt.passes.recognize.sampling import SamplingSite
from attnopt.passes.recognize.sampling_parts import Levels, Step, furthest, join, trace
from attnopt.passes.recognize.sampling_sums import Pick
from attnopt.rules import Decline

aten = torch.ops.aten
Axes = tuple[Axis, ...]
#: scale and offset from a range of locations to F.grid_sample's, the best first
RANGES = {"unit": (2.0, -1.0), "signed": (1.0, 0.0)}
#: the places that F.grid_sample of three axes has on a CPU for NaN, inf and -inf: the last texel
#: for what the op, as F.grid_sample of two axes, takes for the first
_NOT_PLACES = {"border": (math.inf, math.inf, -math.inf), "reflection": (1.0, 1.0, 1.0)}
#: what weights meet between their softmax and the samples
_MASKS = frozenset(("mul", "div", "masked_fill", "where"))


@dataclass
class Sampled:
    """A sampling site with its Sampling and tensors.

    value, weights: one tensor, or one for each level, to be put together along texels or points;
                    no weights where all are 1
    locations:      so for each tensor of coordinates: one of all, or one of each
    grids:          sizes of the levels' grids, the slowest axis first
    result:         (B, Q, H, C)
    depth:          of a grid that is an outer product with depths, which is not built then
    not_lifted:     why a grid of three axes is built
    order:          of the coordinates, where the depth's is not the last
    not_places:     what locations that are NaN, infinite and -infinite are read as, if not as they
                    are
    sized:          views of the value that only tell the sizes of grids
    softmax:        that of the weights, where it is for them alone
    """

    site: SamplingSite
    spec: Sampling
    grids: tuple[int, ...]
    value: list[Tensor]
    locations: list[list[Tensor]]
    weights: list[Tensor]
    result: Target
    depth: list[Tensor] = field(default_factory=list)
    not_lifted: str = ""
    order: tuple[int, ...] = ()
    not_places: tuple[float, float, float] | None = None
    sized: list[Tensor] = field(default_factory=list)
    softmax: fx.Node | None = None
    computed: frozenset[fx.Node] = frozenset()
    exact: None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the author's program that the call reads."""
        return [*self.value, *(t for each in self.locations for t in each), *self.weights,
                *self.depth, *self.sized]

    def lengths(self) -> tuple[Any, ...]:
        """(B, S, H, C, Q, T)"""
        batch, rows, heads, columns = (product(resolve(dim)) for dim in self.result)
        texels = sum(math.prod(grid) for grid in self.spec.grids(self.grids))
        return batch, texels, heads, columns, rows, sum(self.spec.points)

    def shapes(self) -> str:
        b, s, h, c, q, t = self.lengths()
        return f"{b}x{s}x{h}x{c} {b}x{q}x{h}x{t}x{self.spec.axes} {b}x{q}x{h}x{t}"


# -- finding the tensors ---------------------------------------------------------------------------
def canonicalize_sampling(program: Program, site: SamplingSite) -> Sampled:
    """The Sampling and the tensors; raises Decline where the op does not have it."""
    site, not_lifted = _lifted(program, site)
    if site.end is site.anchor and not_lifted:
        raise Decline(f"no weighted sum over sampled points follows, and {not_lifted}", site.anchor)
    samples, first = site.samples, site.samples[0]
    sizes = [tuple(a.size for a in s.space) for s in samples]
    if first.mode == "bicubic":
        raise Decline("bicubic sampling: the op has linear and nearest", first.node)
    for other in samples[1:]:
        if first.coordinate is not None and other.coordinate is not None:
            other.coordinate.become((first.coordinate,))
    finder = _Finder(program, site)
    texels = _texels(site)
    value, _ = finder.find([Step(*s.value) for s in samples], texels)
    wanted = RANGES if first.range == "signed" and first.mode == "linear" else {
        first.range: (1.0, 0.0)}
    locations, where = [], first.range
    for at in range(len(first.locations)):
        found, where = finder.find([Step(*s.locations[at]) for s in samples], site.levels, wanted)
        locations.append(found)
    weights = finder.find([w for i in range(len(samples)) if (w := _weights(site, i))],
                          site.levels)[0] if site.terms[0].weights is not None else []
    depth = finder.find([Step(*s.depth) for s in samples if s.depth is not None], texels)[0] \
        if first.depth is not None else []
    batch, heads = _batch_and_heads(
        site, value[0], depth[:1], first.space if texels is None else texels.whole)
    points, pieces = _pieces(site.levels, site.points)
    if not all(isinstance(product(p), int) for p in pieces):
        raise Decline("a number of points that is not known", site.anchor)
    whole_texels, grids = _pieces(texels, [s.space for s in samples])
    last: Target = ((first.coordinate,),) if first.coordinate is not None else ()

    def bring(found: list[Step], whole: Axes, parts: Sequence[Axes], lead: Target, last: Target
              ) -> list[Tensor]:
        kept = [whole] if len(found) == 1 else parts
        return [Tensor(s.node, settle(s.layout), (*lead, resolve(p), *last))
                for s, p in zip(found, kept, strict=True)]

    lead: Target = (batch, site.rows, heads)
    on_cpu = first.node.meta["val"].device.type == "cpu"
    plane = len(first.order or first.space) == 2 and not first.depth
    as_nan = not first.hidden if first.inner else on_cpu  # F.grid_sample's is there
    not_finite = "nan" if plane and as_nan else "zero"
    made = Sampled(
        site, Sampling(tuple(product(p) for p in pieces), len(sizes[0]), first.mode, first.padding,
                       first.align_corners, where, not_finite),
        tuple(n for grid in sizes for n in grid),
        [Tensor(t.node, t.layout, (t.target[0], t.target[1], heads, site.columns)) for t in bring(
            value, whole_texels, grids, (batch,), ())],
        [bring(found, points, pieces, lead, last) for found in locations],
        bring(weights, points, pieces, lead, ()) if weights else [],
        (batch, site.rows, heads, site.columns),
        [Tensor(t.node, t.layout, (*t.target, heads, resolve((deep,))))
         for deep in (first.depth_axis,) if deep is not None
         for t in bring(depth, whole_texels, grids, (batch,), ())], not_lifted, first.order)
    if len(first.space) + bool(first.depth) == 3 and on_cpu and not first.inner:
        made.not_places = _NOT_PLACES.get(first.padding)
    made.sized = _sized(site, made.tensors)
    made.softmax = _softmax(program, site, made.weights)
    made.computed = frozenset(
        n for n in _between(site.end, {t.node for t in made.tensors}) if n.op == "call_function")
    return made


def _lifted(program: Program, site: SamplingSite) -> tuple[SamplingSite, str]:
    """The site with the factors of its grids, if these are outer products; else why not."""
    if len(site.samples[0].space) != 3:
        return site, ""
    try:
        samples, varied, inner = lifted(
            program, site.samples, site.columns, may_read(program, site.end)[1])
    except Decline as no:
        return site, no.reason
    terms = [replace(t, sample=s) for t, s in zip(site.terms, samples, strict=True)]
    columns = resolve(site.columns)
    return replace(
        site, terms=terms, lead=(*site.lead, *(a for a in columns if a in varied)),
        columns=tuple(a for a in columns if a not in varied),
        interior=[*site.interior, *inner]), ""


def _sized(site: SamplingSite, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Grids whose sizes are not known and cannot be read off the tensors, which have them flat."""
    known = {product(dim) for t in tensors for dim in settle(t.layout)}
    read = {t.node for t in tensors}
    found = []
    for (node, layout), space in ((s.value, s.space) for s in site.samples):
        if not all(isinstance(a.size, int) or a.size in known for a in resolve(space)):
            at: Any = node
            while at not in read and at.op == "call_function" and op_name(at) in LAYOUT_OPS:
                at = at.args[0]
            if at not in read:
                raise Decline("the size of a grid is not known", node)
            found.append(Tensor(node, layout, ()))
    return found


def _texels(site: SamplingSite) -> Levels | None:
    """The axis of all texels, one grid after another."""
    if len(site.samples) == 1:
        return None
    counts = [product(s.space) for s in site.samples]
    return Levels((Axis(sum(counts)),), tuple(s.space for s in site.samples),
                  tuple(sum(counts[:i]) for i in range(len(counts))), None)


def _pieces(levels: Levels | None, own: Sequence[Axes]) -> tuple[Axes, Sequence[Axes]]:
    """The axes of all levels, and of each."""
    return (own[0], own) if levels is None else (levels.whole, levels.pieces)


def _weights(site: SamplingSite, number: int) -> Step | None:
    """The weights of a level, as a part of the tensor that they are in."""
    term, levels = site.terms[number], site.levels
    if term.weights is None:
        return None
    node, layout = term.weights
    layout, picks = settle(layout), {}
    if levels is not None and term.picks:
        axis = levels.whole[0] if levels.level is None else levels.level
        if axis in axes_of(layout):
            pick = Pick(number, ()) if levels.level is not None else Pick(
                levels.starts[number], levels.pieces[number])
            picks[axis] = pick
    return Step(node, layout, picks)


def _batch_and_heads(site: SamplingSite, value: Step, depth: Sequence[Step], texels: Axes
                     ) -> tuple[Axes, Axes]:
    """The leading axes as (B, H): heads are what the tensor of the value has behind its texels, or
    what depths are the same for."""
    order = [a for dim in settle(value.layout) for a in dim]
    first = min((order.index(a) for a in resolve(texels) if a in order), default=len(order))
    lead = resolve(site.lead)
    heads = tuple(a for a in order[first:] if a in lead)
    for step in depth:
        have = axes_of(step.layout)
        if not have >= set(lead):
            heads = tuple(a for a in lead if a not in have)
    if not heads and len(lead) > 1:
        heads = lead[-1:]
    return tuple(a for a in lead if a not in heads), heads


class _Finder:
    """Finds the author's tensors of which a site reads all."""

    def __init__(self, program: Program, site: SamplingSite) -> None:
        self.program = program
        self.allowed, self.replaces = may_read(program, site.end)

    def find(self, starts: Sequence[Step], levels: Levels | None,
             ranges: Mapping[str, tuple[float, float]] | None = None) -> tuple[list[Step], str]:
        """One tensor of all levels, or one of each, and its range.

        ranges: of locations, with the scale and offset that each may be behind
        """
        allowed = {"": (1.0, 0.0)} if ranges is None else ranges
        traces = [trace(self.program, s, affine=ranges is not None) for s in starts]
        whole = traces[0]
        if len(starts) > 1:
            assert levels is not None
            joined = join(traces, levels)
            whole = [] if joined is None else trace(
                self.program, joined, affine=ranges is not None)
        for name, (scale, offset) in allowed.items():
            best = furthest(whole, self._usable(starts[0], scale, offset))
            if best is not None:
                return [best], name
        for name, (scale, offset) in allowed.items():
            each = [furthest(steps, self._usable(start, scale, offset))
                    for steps, start in zip(traces, starts, strict=True)]
            found = [s for s in each if s is not None]
            if len(found) == len(starts):
                return found, name
        raise Decline("an operand is overwritten in place before the site ends", starts[0].node)

    def _usable(self, start: Step, scale: float, offset: float) -> Callable[[Step], bool]:
        return lambda step: (step.scale, step.offset) == (scale, offset) and (
            self.allowed(step.node) if step.node is start.node
            else self.replaces(step.node, start.node))


def _softmax(program: Program, site: SamplingSite, weights: Sequence[Tensor]) -> fx.Node | None:
    """The softmax over points whose result is only this site's weights, masked or not."""
    points = [a for p in site.points for a in p]
    points += [] if site.levels is None else site.levels.whole
    return softmax_for(program, site.end, weights[0].node, weights[0].layout, points) \
        if len(weights) == 1 else None


def softmax_for(program: Program, end: fx.Node, weights: fx.Node, layout: Layout,
                points: Iterable[Axis]) -> fx.Node | None:
    """The softmax over `points` that gives `weights` and nothing but what `end` is made of."""
    path = _to_softmax(weights, layout)
    if not path:
        return None
    node, layout = path[-1]
    dim = node.args[1]
    assert isinstance(dim, int)
    inside = _between(end, {node})
    alone = all(u in inside for n, _ in path for u in program.users(n))
    return node if alone and "log" not in op_name(node) \
        and set(resolve(settle(layout)[dim])) <= set(resolve(points)) else None


def _to_softmax(node: Any, layout: Layout) -> list[tuple[fx.Node, Layout]]:
    """From `node` back to a softmax through rearrangements and masks; [] where there is none."""
    if not is_tensor(node) or node.op != "call_function":
        return []
    name = op_name(node)
    if name in SOFTMAX:
        return [(node, layout)]
    step = back(node, layout)
    before: list[tuple[Any, Layout]] = [] if step is None else [step]
    if step is None and name in _MASKS:
        before = [(x, broadcast(layout, shape_of(x.meta["val"]))) for x in node.args
                  if is_tensor(x) and x.meta["val"].is_floating_point()]  # type: ignore[union-attr]
    elif step is None and (name in ("flip", "dropout") or is_cast(node)):
        before = [(node.args[0], layout)]
    rest = next(filter(None, (_to_softmax(*x) for x in before)), None)
    return [(node, layout), *rest] if rest else []


def _between(end: fx.Node, starts: set[fx.Node]) -> set[fx.Node]:
    """The nodes from `end` back to `starts`."""
    found: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node not in found and node not in starts:
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found
