"""Layout operations: reading them backwards, stripping them off, and putting a tensor in order.

`back` answers, for an operation that only moves or repeats elements, which tensor it reads and
with which layout. `strip` walks an operand back over permutations, copies and repetitions, so that
the kernel gets the projection itself: K stored transposed, `repeat_kv`, `.contiguous()` and
expanded biases all vanish here. `arrange` is the inverse: it emits the view operations that bring
a tensor with a known layout to the dimensions a Spec wants.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    broadcast,
    product,
    quotient,
    reshape,
    resolve,
    same_length,
    settle,
    shape_of,
)
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
    if op_name(node) == "numpy_T":
        return tuple(reversed(layout))
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
    found: list[tuple[Axis, ...]] = []
    for axes, size in zip(settle(layout), shape, strict=True):
        if size == 1:
            found.append(())
        elif same_length(product(axes), size):
            found.append(axes)
        else:
            whole = Axis(product(axes))
            whole.become(axes)
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
    """Emits view operations and calls into a graph, each with a fake value of the right shape.

    The shapes are computed here. Running the operations on the capture's own fake tensors would
    let them ask questions about symbolic sizes, and an answer would fix a size for good.
    """

    def __init__(self, graph: fx.Graph, like: fx.Node, fixed: Mapping[Axis, int]) -> None:
        self.graph = graph
        self.like = like
        self.fixed = fixed
        self.emitted: list[fx.Node] = []
        self.lengths: dict[Any, fx.Node] = {}  # symbolic length -> node that computes it
        self.symbolic: dict[Any, torch.SymInt] = {}

    def call(self, target: Any, *args: Any, shape: Sequence[Any] | None = None,
             dtype: torch.dtype | None = None) -> fx.Node:
        node = self.graph.call_function(target, args)
        for name in ("stack_trace", "nn_module_stack", "attnopt_region"):
            if name in self.like.meta:
                node.meta[name] = self.like.meta[name]
        if shape is not None:
            node.meta["val"] = self._fake(shape, dtype)
        self.emitted.append(node)
        return node

    def _fake(self, shape: Sequence[Any], dtype: torch.dtype | None) -> torch.Tensor:
        like = self.like.meta["val"]
        sizes = [s if isinstance(s, int) else self._symint(s) for s in shape]
        with like.fake_mode:
            return like.new_empty(sizes, dtype=dtype or like.dtype)

    def _symint(self, size: Any) -> torch.SymInt:
        if size not in self.symbolic:
            env = self.like.meta["val"].fake_mode.shape_env
            self.symbolic[size] = env.create_symintnode(size, hint=None)
        return self.symbolic[size]

    def learn(self, node: fx.Node, layout: Layout) -> None:
        """Note where symbolic lengths can be read off."""
        for dim, (axes, raw) in enumerate(zip(settle(layout), node.meta["val"].shape,
                                              strict=True)):
            size = product(axes)
            if not isinstance(size, int) and size not in self.lengths:
                self.symbolic[size] = raw
                found = self.call(aten.sym_size.int, node, dim)
                found.meta["val"] = raw
                self.lengths[size] = found

    def sizes(self, wanted: Sequence[Any]) -> list[Any]:
        """Dimension lengths as arguments; one symbolic length may be left to torch as -1, unless
        there are no elements to tell it by."""
        unknown = [i for i, w in enumerate(wanted) if not isinstance(w, int)]
        if len(unknown) == 1 and 0 not in wanted:
            return [-1 if i in unknown else w for i, w in enumerate(wanted)]
        return [self.length(w) for w in wanted]

    def length(self, size: Any) -> Any:
        if isinstance(size, int):
            return size
        if size not in self.lengths:
            found = self._computed(size)
            if found is None:
                raise Decline(f"the length {size} cannot be computed from the operands")
            found.meta["val"] = self._symint(size)
            self.lengths[size] = found
        return self.lengths[size]

    def _computed(self, size: Any) -> fx.Node | None:
        """A length that is a whole part or a multiple of a known one, or a product of two."""
        for known, node in list(self.lengths.items()):
            if isinstance(parts := quotient(known, size), int):
                return self.call(operator.floordiv, node, parts)
        for known, node in list(self.lengths.items()):
            rest = quotient(size, known)
            if isinstance(rest, int) or rest in self.lengths:
                return self.call(operator.mul, node, self.length(rest))
        return None

    def arrange(self, node: fx.Node, layout: Layout,
                target: Sequence[tuple[Axis, ...]]) -> fx.Node:
        """A view of `node` whose dimensions are `target`; axes it lacks get length 1.

        Where `node` holds only some axes of a target dimension the others are expanded.
        """
        layout, goal = settle(layout), [resolve(t) for t in target]
        have = axes_of(layout)
        extra = have - {a for dim in goal for a in dim} - set(self.fixed)
        if extra:
            raise Decline("an operand varies along an axis that the scores do not have", node)
        dtype = node.meta["val"].dtype

        def emit(op: Any, *args: Any, dims: Sequence[Axis | None]) -> fx.Node:
            return self.call(op, node, *args, shape=[1 if a is None else a.size for a in dims],
                             dtype=dtype)

        dims: list[Axis | None] = [a for dim in layout for a in (dim or (None,))]
        if any(len(dim) > 1 for dim in layout):
            node = emit(aten.reshape.default,
                        self.sizes([1 if a is None else a.size for a in dims]), dims=dims)
        for i in reversed([i for i, a in enumerate(dims) if a in self.fixed]):
            number = self.fixed[dims.pop(i)]  # type: ignore[index]
            node = emit(aten.select.int, i, number, dims=dims)
        # Every target dimension as the atoms it is made of; None where `node` has length 1.
        parts = [[a if a in have else None for a in dim] if have & set(dim) else [None]
                 for dim in goal]
        wanted = [a for part in parts for a in part]
        for i in reversed([i for i, a in enumerate(dims) if a is None]):
            if dims.count(None) > wanted.count(None):
                del dims[i]
                node = emit(aten.squeeze.dim, i, dims=dims)
        spare = iter([i for i, a in enumerate(dims) if a is None])
        order = [dims.index(a) if a is not None else next(spare, None) for a in wanted]
        held = [i for i in order if i is not None]
        if held != sorted(held):
            dims = [dims[i] for i in held]
            node = emit(aten.permute.default, held, dims=dims)
        else:
            dims = [dims[i] for i in held]
        for i, source_dim in enumerate(order):
            if source_dim is None:
                dims.insert(i, None)
                node = emit(aten.unsqueeze.default, i, dims=dims)
        if any(None in part and len(part) > 1 for part in parts):
            dims = [a for dim, part in zip(goal, parts, strict=True)
                    for a in (dim if part != [None] else (None,))]
            node = emit(aten.expand.default, [1 if a is None else self.length(a.size)
                                              for a in dims], dims=dims)
        if any(len(part) > 1 for part in parts):
            shape = [product(dim) if part != [None] else 1
                     for dim, part in zip(goal, parts, strict=True)]
            node = self.call(aten.reshape.default, node, self.sizes(shape), shape=shape,
                             dtype=dtype)
        return node
