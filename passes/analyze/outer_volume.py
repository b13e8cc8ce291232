"""Volumes that are outer products of features and a distribution of depths.

    volume[b, c, z, y, x] = features[b, c, y, x] * depth[b, z, y, x]

(the lifting of DFA3D, Li et al., ICCV 2023). A linear sample of such a volume is a sample of the
features whose corners are weighted by depths, so that it need not be built:

    sample = sum over corners of  w_corner * s_corner * features[corner],
    s_corner = (1 - fz) * depth[corner, z0] + fz * depth[corner, z0 + 1]

The proof is one of axes: the volume is a product of two tensors, behind nothing but rearrangement;
one of them does not vary along one axis z of the grid, the other does, and has no channels but
heads. It may be spelled as a broadcast multiplication, an einsum, a matmul, or one product for each
depth, camera or head, stacked. Which axis of the grid z is, and which factor comes first, says
nothing. A factor that lacks other axes (depths that are the same for all rows) is broadcast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    broadcast,
    meet,
    resolve,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.recognize.contraction import contraction
from attnopt.passes.recognize.layout import LAYOUT_OPS, back, strip
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.sampling_parts import Levels, Step, join, trace
from attnopt.passes.recognize.sampling_sums import Operand, Sample
from attnopt.rules import Decline

Replaces = Callable[[fx.Node, fx.Node], bool]
_JOINS = frozenset(("stack", "cat", "concat"))


@dataclass(frozen=True)
class OuterVolume:
    """volume = features * depth, each with the axes of its dimensions.

    axis:  of the grid, along which the depth varies and the features do not
    space: the other axes of the grid, the slowest first
    inner: the nodes that make the volume
    """

    features: Operand
    depth: Operand
    axis: Axis
    space: tuple[Axis, ...]
    inner: tuple[fx.Node, ...]


def outer_volume(program: Program, sample: Sample, columns: Iterable[Axis], replaces: Replaces
                 ) -> OuterVolume:
    """What the grid of `sample` is the outer product of; raises Decline where it is none.

    columns:  channels of the grid along which neither locations nor weights vary
    replaces: may the first tensor be read in place of the second, which is made of it?
    """
    inner: list[fx.Node] = []
    sides = _factors(program, *sample.value, inner)
    author = program.view.author
    region = author[sample.node].meta.get("attnopt_region")
    for node in inner:
        if author[node].meta.get("attnopt_region") != region:
            raise Decline("the volume is made in another no_grad or autocast region", node)
        other = _other_use(program, node, frozenset(inner))
        if other is not None:
            raise Decline("the volume is also used elsewhere", other)
    sides = tuple(strip(*side, lambda source, own=side[0]: replaces(source, own))  # type: ignore
                  for side in sides)
    for node, _ in sides:
        if not replaces(node, node):
            raise Decline("a factor of the volume is overwritten in place", node)
    found = _split(sides, sample.space, tuple(columns))
    if found is None:
        raise Decline("the factors of the volume are not features and their depths", inner[-1])
    features, depth, axis = found
    return OuterVolume(features, depth, axis, tuple(a for a in sample.space if a is not axis),
                       tuple(inner))


# -- factors ---------------------------------------------------------------------------------------
def _factors(program: Program, node: fx.Node, layout: Layout, inner: list[fx.Node]
             ) -> tuple[Operand, Operand]:
    """The two tensors that `node` is the product of; `inner` learns what is walked over."""
    while True:
        layout = settle(layout)
        if node.op != "call_function":
            raise Decline("the volume is no product", node)
        if node.meta.get("attnopt_opaque"):
            raise Decline("the volume is written in place through shared memory", node)
        inner.append(node)
        moved = back(node, layout)
        if moved is not None:
            node, layout = moved
        elif is_cast(node):
            node = node.args[0]  # type: ignore[assignment]
        else:
            break
    name = op_name(node)
    if name in _JOINS:
        return _joined(program, node, layout, inner)
    if name == "mul" and not node.kwargs:
        left, right = node.args
        if is_tensor(left) and is_tensor(right) and left is not right:
            own = [(x, broadcast(layout, shape_of(x.meta["val"])))  # type: ignore[union-attr]
                   for x in (left, right)]
            return own[0], own[1]  # type: ignore[return-value]
        raise Decline("the volume is multiplied by a number, or a square", node)
    found = contraction(node)
    if found is None or found.addend is not None or found.alpha != 1:
        raise Decline(f"the volume is made by {name}, which is no product", node)
    meet(found.out_layout, layout)
    if found.contracted:
        raise Decline("the volume is a sum of products", node)
    left, right = found.sides()
    return left, right


def _joined(program: Program, node: fx.Node, layout: Layout, inner: list[fx.Node]
            ) -> tuple[Operand, Operand]:
    """One product for each entry of an axis, put together: of tensors cut along it, or the same."""
    parts: Any = node.args[0]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    at = dim % len(layout)  # type: ignore[operator]
    if len(layout[at]) != 1 or not same_length(layout[at][0].size, len(parts)):
        raise Decline("parts of a volume are put together that are longer than 1", node)
    axis = layout[at][0]
    own = layout[:at] + layout[at + 1:] if op_name(node) == "stack" \
        else (*layout[:at], (), *layout[at + 1:])
    sides = [_factors(program, part, own, inner) for part in parts]
    levels = Levels((axis,), ((),) * len(parts), tuple(range(len(parts))), axis)
    found: list[Operand] = []
    for which in (0, 1):
        step = join([trace(program, Step(*side[which])) for side in sides], levels)
        if step is None:
            raise Decline("parts of a volume are put together that are not cut from one", node)
        found.append((step.node, step.layout))
    return found[0], found[1]


def _other_use(program: Program, node: fx.Node, inner: frozenset[fx.Node]) -> fx.Node | None:
    """A use of `node` that is no sampling of it."""
    for user in program.users(node):
        if user in inner or op_name(user) == "grid_sampler" and user.args[0] is node:
            continue
        moves = op_name(user) in LAYOUT_OPS or is_cast(user) or op_name(user) in _JOINS
        other = _other_use(program, user, inner) if moves else user
        if other is not None:
            return other
    return None


# -- roles -----------------------------------------------------------------------------------------
def _split(sides: Sequence[Operand], space: Sequence[Axis], columns: Sequence[Axis]
           ) -> tuple[Operand, Operand, Axis] | None:
    """(features, depth, axis of the depth); an axis of length 1 where there is no longer one."""
    channels = set(resolve(columns))
    for short in (False, True):
        for features, depth in (sides, sides[::-1]):
            have, lacks = axes_of(depth[1]), axes_of(features[1])
            if channels and channels <= have:
                continue
            for axis in space:
                own = set(resolve((axis,)))
                if short == (not own) and own <= have and not own & lacks:
                    return features, depth, axis
    return None


def lifted(program: Program, samples: Sequence[Sample], columns: Sequence[Axis], replaces: Replaces
           ) -> tuple[list[Sample], frozenset[Axis], tuple[fx.Node, ...]]:
    """The samples of features with depths, the channels along which depths vary, and the nodes that
    made the volumes; raises Decline where one of the grids is no outer product."""
    volumes = [outer_volume(program, s, columns, replaces) for s in samples]
    first = volumes[0]
    where = samples[0].space.index(first.axis)
    for sample, volume in zip(samples, volumes, strict=True):
        if sample.space.index(volume.axis) != where:
            raise Decline("levels have their depths along several axes", sample.node)
        if not same_length(volume.axis.size, first.axis.size):
            raise Decline("levels have several numbers of depths", sample.node)
    for volume in volumes[1:]:
        if volume.axis is not first.axis:
            volume.axis.become((first.axis,))
    channels = set(resolve(columns))
    varied = frozenset(a for v in volumes for a in axes_of(v.depth[1]) if a in channels)
    last = len(samples[0].space) - 1  # coordinates have the fastest axis first
    order = (*(last - i for i in range(last, -1, -1) if i != where), last - where)
    made = [replace(s, value=v.features, space=v.space, depth=v.depth, depth_axis=v.axis,
                    order=order) for s, v in zip(samples, volumes, strict=True)]
    return made, varied, tuple(dict.fromkeys(n for v in volumes for n in v.inner))
