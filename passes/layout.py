"""Layout operations: reading them backwards, stripping them off, and putting a tensor in order.

`back` answers, for an operation that only moves or repeats elements, which tensor it reads and
with which layout. `strip` walks an operand back over permutations, copies and repetitions, so that
the kernel gets the projection itself: K stored transposed, `repeat_kv`, `.contiguous()` and
expanded biases all vanish here. `arrange` is the inverse: it emits the view operations that bring
a tensor with a known layout to the dimensions a Spec wants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from attnopt.passes.axes import (
    Axis,
    Layout,
    axes_of,
    broadcast,
    length,
    product,
    reshape,
    resolve,
    same_length,
    settle,
    shape_of,
)
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.rules import Decline

aten = torch.ops.aten
Step = tuple[fx.Node, Layout]

_RESHAPES = frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as",
    "reshape_as",
))
_COPIES = frozenset(("contiguous", "clone", "alias", "lift_fresh", "positive"))
_TRANSPOSES = frozenset(("transpose", "swapaxes", "swapdims", "t", "mT", "numpy_T", "adjoint"))
_EXPANDS = frozenset(("expand", "expand_as", "broadcast_to"))


def source(node: fx.Node) -> fx.Node:
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def back(node: fx.Node, layout: Layout) -> Step | None:
    """The tensor that `node` rearranges and its layout; None if `node` does more than that."""
    reader = _BACK.get(op_name(node)) if node.op == "call_function" else None
    if reader is None or not node.args or not is_tensor(node.args[0]):
        return None
    return source(node), reader(node, layout)


def _back_reshape(node: fx.Node, layout: Layout) -> Layout:
    return reshape(layout, shape_of(source(node).meta["val"]))


def _back_same(node: fx.Node, layout: Layout) -> Layout:
    return layout


def _back_permute(node: fx.Node, layout: Layout) -> Layout:
    order = [d % len(layout) for d in node.args[1]]  # type: ignore[union-attr]
    return tuple(layout[order.index(i)] for i in range(len(layout)))


def _back_transpose(node: fx.Node, layout: Layout) -> Layout:
    rank = len(layout)
    if rank < 2:
        return layout
    a, b = (-2, -1) if op_name(node) in ("mT", "adjoint") else node.args[1:3] or (0, 1)
    found = list(layout)
    found[a], found[b] = found[b], found[a]  # type: ignore[index]
    return tuple(found)


def _back_movedim(node: fx.Node, layout: Layout) -> Layout:
    probe = torch.empty(tuple(range(1, len(layout) + 1)), device="meta")
    moved = torch.movedim(probe, *node.args[1:3])  # type: ignore[arg-type]
    return tuple(layout[list(moved.shape).index(n)] for n in probe.shape)


def _back_expand(node: fx.Node, layout: Layout) -> Layout:
    return broadcast(layout, shape_of(source(node).meta["val"]))


def _back_repeat(node: fx.Node, layout: Layout) -> Layout:
    """x.repeat(r): output index = repetition * n + i."""
    shape = shape_of(source(node).meta["val"])
    layout = layout[len(layout) - len(shape):]
    return _unrepeat(layout, shape, repeats_first=True)


def _back_repeat_interleave(node: fx.Node, layout: Layout) -> Layout:
    """x.repeat_interleave(r, dim): output index = i * r + repetition."""
    if not isinstance(node.args[1], int) or len(node.args) < 3 or node.args[2] is None:
        raise Decline("repeat_interleave by a tensor, or of a flattened tensor", node)
    return _unrepeat(layout, shape_of(source(node).meta["val"]), repeats_first=False)


def _unrepeat(layout: Layout, shape: Sequence[Any], *, repeats_first: bool) -> Layout:
    found = []
    for axes, size in zip(settle(layout), shape, strict=True):
        if size == 1:
            found.append(())
        elif same_length(product(axes), size):
            found.append(axes)
        else:
            whole = Axis(product(axes))
            whole.become(axes)
            from attnopt.passes.axes import quotient
            count = quotient(product(axes), size)
            if count is None:
                raise Decline("a repetition does not divide its axis")
            both = (count, size) if repeats_first else (size, count)
            split = reshape((axes,), both)
            found.append(split[1] if repeats_first else split[0])
    return tuple(found)


_BACK: dict[str, Callable[[fx.Node, Layout], Layout]] = {
    **dict.fromkeys(_RESHAPES, _back_reshape),
    **dict.fromkeys(_COPIES, _back_same),
    **dict.fromkeys(_TRANSPOSES, _back_transpose),
    **dict.fromkeys(_EXPANDS, _back_expand),
    "permute": _back_permute,
    "movedim": _back_movedim,
    "moveaxis": _back_movedim,
    "repeat": _back_repeat,
    "tile": _back_repeat,
    "repeat_interleave": _back_repeat_interleave,
}
LAYOUT_OPS = frozenset(_BACK)


def strip(node: fx.Node, layout: Layout, allowed: Callable[[fx.Node], bool]) -> Step:
    """Walk back over layout operations as far as it saves something.

    Permutations and copies are dropped; a reshape only on the way to a dropped copy or repetition.
    `allowed` says whether a tensor may be read in place of `node`.
    """
    best = here = (node, layout)
    pending = False
    while True:
        name = op_name(here[0])
        try:
            step = back(*here)
        except Decline:
            return best
        if step is None or here[0].meta.get("attnopt_opaque"):
            return best
        pending = pending or name in _RESHAPES
        saves = name in _COPIES or name in _EXPANDS or "repeat" in name or name == "tile"
        here = step
        if (saves or not pending) and allowed(here[0]):
            best, pending = here, False


class Arranger:
    """Emits view operations in front of a node of the author's graph."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.emitted: list[fx.Node] = []
        self.lengths: dict[Any, fx.Node] = {}  # symbolic length -> node that computes it

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        self.emitted.append(node)
        return node

    def learn(self, node: fx.Node, layout: Layout) -> None:
        """Note where symbolic lengths can be read off."""
        for dim, axes in enumerate(settle(layout)):
            for size in {product(axes)} if axes else ():
                if not isinstance(size, int) and size not in self.lengths:
                    self.lengths[size] = self.call(aten.sym_size.int, node, dim)

    def length(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        if size not in self.lengths:
            raise Decline(f"the length {size} cannot be computed from the operands")
        return self.lengths[size]

    def sizes(self, groups: Sequence[Sequence[Axis]]) -> list[Any]:
        """Dimension lengths; one symbolic length may be left to torch as -1."""
        wanted = [product(g) for g in groups]
        unknown = [i for i, w in enumerate(wanted) if not isinstance(w, int)]
        if len(unknown) == 1:
            wanted[unknown[0]] = -1
            return wanted
        return [self.length(w) for w in wanted]

    def arrange(self, node: fx.Node, layout: Layout, target: Sequence[tuple[Axis, ...]],
                keep: Sequence[bool] | None = None) -> fx.Node:
        """A view of `node` whose dimensions are `target`; axes it lacks get length 1.

        Where `node` holds only some axes of a target dimension the others are expanded.
        """
        layout, goal = settle(layout), [resolve(t) for t in target]
        have = axes_of(layout)
        extra = have - {a for dim in goal for a in dim}
        if extra:
            raise Decline(f"an operand varies along axes {sorted(map(str, extra))} "
                          "that the scores do not have")
        atoms = [a for dim in layout for a in dim]
        if any(len(dim) > 1 for dim in layout):
            node = self.call(aten.reshape.default, node, self.sizes([(a,) for a in atoms]))
            dims: list[Axis | None] = list(atoms)
        else:
            dims = [dim[0] if dim else None for dim in layout]
        for i in reversed([i for i, axis in enumerate(dims) if axis is None]):
            node = self.call(aten.squeeze.dim, node, i)
            del dims[i]
        order = [dims.index(a) for dim in goal for a in dim if a in have]
        if order != sorted(order):
            node = self.call(aten.permute.default, node, order)
        present = [[a for a in dim if a in have] for dim in goal]
        position = 0
        for full, held in zip(goal, present, strict=True):
            if not held:
                node = self.call(aten.unsqueeze.default, node, position)
                position += 1
            elif len(held) == len(full):
                position += len(held)
            else:
                for axis in full:
                    if axis not in have:
                        node = self.call(aten.unsqueeze.default, node, position)
                    position += 1
        partial = [h for f, h in zip(goal, present, strict=True) if h and len(h) < len(f)]
        if partial:
            shape: list[Any] = []
            for full, held in zip(goal, present, strict=True):
                shape += [1] if not held else [self.length(a.size) for a in full]
            node = self.call(aten.expand.default, node, shape)
        if any(len(h) > 1 or (h and len(h) < len(f))
               for f, h in zip(goal, present, strict=True)):
            groups = [f if h else () for f, h in zip(goal, present, strict=True)]
            node = self.call(aten.reshape.default, node, self.sizes(groups))
        return node
