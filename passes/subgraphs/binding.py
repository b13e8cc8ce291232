"""Which axis of a model is which of a pattern, and so the layout of every argument.

An axis is known by where it is met: in which arguments, each time that these occur, and in which
reductions. Axes of the pattern that are met in the same places cannot be told apart by what is
computed, so axes of the model that are met there may be dealt out to them in any way: the last to
the last, what is left over to the first. An axis of the model that is met in fewer arguments is
broadcast over the others. What no axis falls to has length 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnopt.passes.canonical import Target, Tensor
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    product,
    resolve,
    same_length,
    settle,
)
from attnopt.passes.subgraphs.match import State
from attnopt.rules import Decline

Places = frozenset[tuple[str, int]]


@dataclass
class Binding:
    """Tensors of the model in the layouts of the pattern's arguments.

    results: for each result of the pattern the axes of its dimensions, and the layout of the node
             of the model that it is
    """

    arguments: dict[str, Tensor]
    results: list[tuple[Target, Layout]]
    lengths: dict[str, Any] = field(default_factory=dict)


def bind(state: State, inputs: Mapping[str, Sequence[str]],
         roots: Sequence[tuple[Layout, Layout]]) -> Binding:
    """The Binding of a match. inputs: the words of each argument's dimensions; roots: the layouts
    of each result in the pattern and in the model. Raises Decline."""
    axes = _assign(state, roots)

    def of(layout: Layout) -> Target:
        return tuple(tuple(m for a in dim for m in axes.get(a, ())) for dim in settle(layout))

    found = Binding({}, [(of(mine), settle(theirs)) for mine, theirs in roots])
    for target, layout in found.results:
        held = {a for dim in layout for a in dim}
        if held != {a for dim in target for a in dim}:
            raise Decline("its result varies along other axes than that of its pattern")
    for name, mine, theirs in state.met:
        tensor = Tensor(state.bound[name], settle(theirs), of(mine))
        known = found.arguments.setdefault(name, tensor)
        if _positions(known) != _positions(tensor):
            raise Decline(f"{name} of its pattern is one tensor in two layouts here")
    for name, words in inputs.items():
        for word, dim in zip(words, found.arguments[name].target, strict=True):
            length = product(dim)
            if word == "1":
                if dim:
                    raise Decline(f"a dimension of {name} has length 1 in its pattern, here "
                                  f"{length}")
            elif not same_length(found.lengths.setdefault(word, length), length):
                raise Decline(f"{word} is one length in its pattern, here "
                              f"{found.lengths[word]} and {length}")
    return found


def _positions(tensor: Tensor) -> list[list[Any]]:
    """For each dimension of the target where its axes are in the tensor; None for those that it
    does not vary along."""
    where = {a: (i, j) for i, dim in enumerate(tensor.layout) for j, a in enumerate(dim)}
    return [[where.get(a) for a in dim] for dim in tensor.target]


def _assign(state: State, roots: Sequence[tuple[Layout, Layout]]) -> dict[Axis, tuple[Axis, ...]]:
    mine = _places([p for _, p, _ in state.met], [p for p, _ in state.reduced],
                   [p for p, _ in roots])
    theirs = _places([m for _, _, m in state.met], [m for _, m in state.reduced],
                     [m for _, m in roots])
    classes: dict[Places, list[Axis]] = {}
    for axis, places in mine.items():
        classes.setdefault(places, []).append(axis)
    dealt: dict[Places, list[Axis]] = {}
    for axis, places in theirs.items():
        dealt.setdefault(_class_of(places, classes), []).append(axis)
    axes: dict[Axis, tuple[Axis, ...]] = {}
    for places, given in dealt.items():
        own = classes[places]
        spare = max(0, len(given) - len(own))
        groups = [given[:spare + 1], *([a] for a in given[spare + 1:])]
        axes |= {a: tuple(group) for a, group in zip(own[len(own) - len(groups):], groups,
                                                     strict=True)}
    return axes


def _places(met: Sequence[Layout], reduced: Sequence[Sequence[Axis]], roots: Sequence[Layout]
            ) -> dict[Axis, Places]:
    """For each axis, in the order of the results and then of the arguments, where it is met."""
    found: dict[Axis, set[tuple[str, int]]] = {}
    for layout in roots:
        for dim in settle(layout):
            for axis in dim:
                found.setdefault(axis, set())
    for i, layout in enumerate(met):
        for dim in settle(layout):
            for axis in dim:
                found.setdefault(axis, set()).add(("argument", i))
    for i, axes in enumerate(reduced):
        for axis in resolve(axes):
            found.setdefault(axis, set()).add(("reduced", i))
    for i, layout in enumerate(roots):
        for dim in settle(layout):
            for axis in dim:
                found[axis].add(("result", i))
    return {axis: frozenset(places) for axis, places in found.items()}


def _class_of(places: Places, classes: Mapping[Places, Sequence[Axis]]) -> Places:
    """The places of the pattern's axes that an axis of the model is one of."""
    if places in classes:
        return places
    fixed = {p for p in places if p[0] != "argument"}
    wider = sorted((c for c in classes if places <= c and fixed == {
        p for p in c if p[0] != "argument"}), key=len)
    if not wider or len(wider) > 1 and len(wider[0]) == len(wider[1]):
        raise Decline("it varies along an axis that its pattern does not have")
    return wider[0]


