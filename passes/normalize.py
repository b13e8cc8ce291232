"""The functional view of a captured graph: the same program with all in-place writes explicit.

A captured graph is the author's own, in-place operations and all. To read it, recognition needs
values instead of memory. `functional_view` copies the graph; each write `x.op_(…)` becomes a new
value, and later reads of x, of its base and of other views of that base read the new value through
`*_scatter` and the view chain. Nothing is re-traced, so each node of the view belongs to one node
of the author's graph (`View.author`). The view is read and lifted, never run as the model.

Where memory may be shared in a way that strides do not decide, the values are marked
`meta["attnopt_opaque"]`: recognition does not look through them.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

#: Return their first argument, or a view of it, without saying so in their schema.
_SILENT_ALIAS = frozenset((
    aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default,
    aten.type_as.default,
))
#: Views that a write can be carried back through, by changing shape only.
_RESHAPING = frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "unsqueeze", "squeeze", "view_as",
    "reshape_as",
))
_IDENTITY = frozenset((
    "alias", "detach", "contiguous", "to", "dropout", "type_as", "lift_fresh", "feature_dropout",
    "alpha_dropout", "positive",
))
_MULTI = frozenset(("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_chunk"))


def op_name(node: fx.Node) -> str:
    """"matmul" of aten.matmul.default; the function's name for other callables."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return getattr(target, "__name__", str(target))


def is_tensor(node: Any) -> bool:
    return isinstance(node, fx.Node) and isinstance(node.meta.get("val"), torch.Tensor)


def writes(node: fx.Node) -> list[int]:
    """Positions of the arguments that the node writes to."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return []
    arguments = node.target._schema.arguments
    return [i for i, a in enumerate(arguments)
            if a.alias_info is not None and a.alias_info.is_write]


@dataclass
class View:
    """A functional graph and what its nodes are in the author's graph.

    author:    view node -> author node that holds this value when it is made
    birth:     view node -> position of that author node in the author's graph
    roots:     author node -> author node that owns its memory
    writes_to: root -> positions at which it is written
    position: author node -> its place in the author's graph
    """

    graph: fx.Graph
    author: dict[fx.Node, fx.Node] = field(default_factory=dict)
    birth: dict[fx.Node, int] = field(default_factory=dict)
    roots: dict[fx.Node, fx.Node] = field(default_factory=dict)
    writes_to: dict[fx.Node, list[int]] = field(default_factory=dict)
    position: dict[fx.Node, int] = field(default_factory=dict)
    #: last values of inputs and buffers that the program writes to
    left_behind: list[fx.Node] = field(default_factory=list)

    def root_of(self, node: fx.Node) -> fx.Node:
        """The author node that owns the memory of a view node."""
        author = self.author[node]
        return self.roots.get(author, author)

    def readable_at(self, node: fx.Node, at: fx.Node) -> bool:
        """Does the author's tensor of `node` still hold this value when author node `at` runs?"""
        if node not in self.author or node.meta.get("attnopt_opaque"):
            return False
        written = self.writes_to.get(self.roots.get(self.author[node], self.author[node]), ())
        return not any(self.birth[node] < w <= self.position[at] for w in written)


def functional_view(author: fx.Graph) -> View:
    """Copy `author` without in-place operations. Metadata is shared, names are kept."""
    return _Functionaliser(author).run()


class _Functionaliser:
    def __init__(self, author: fx.Graph) -> None:
        self.source = author
        self.view = View(fx.Graph())
        self.at = 0
        self.current: dict[fx.Node, fx.Node] = {}  # author node -> view node, as of its version
        self.seen: dict[fx.Node, int] = {}  # author node -> version of its root in `current`
        self.version: dict[fx.Node, int] = {}  # root -> number of writes so far
        self.parent: dict[fx.Node, fx.Node | None] = {}  # author node -> whose memory it shares
        self.undecided: set[fx.Node] = set()  # roots with a reshape that may or may not copy

    def run(self) -> View:
        for position, node in enumerate(self.source.nodes):
            self.at = position
            self.view.position[node] = self.at
            written = writes(node) if node.op == "call_function" else []
            if written:
                self.write(node, written)
            else:
                self.copy(node)
        self.view.left_behind = [self.current[root] for root in self.view.writes_to
                                 if root.op in ("placeholder", "get_attr")]
        return self.view

    def root(self, node: fx.Node) -> fx.Node:
        return self.view.roots.get(node, node)

    # -- reading ----------------------------------------------------------------------------
    def read(self, node: fx.Node) -> fx.Node:
        """The view node for `node`'s value now."""
        now = self.version.get(self.root(node), 0)
        parent = self.parent.get(node)
        if self.seen.get(node, 0) == now or parent is None:
            return self.current[node]
        if writes(node):
            fresh = self.read(parent)
        else:
            args, kwargs = self.arguments(node)
            fresh = self.emit(node, node.target, args, kwargs)
            _settle_select(fresh)
        self.current[node], self.seen[node] = fresh, now
        return fresh

    def arguments(self, node: fx.Node) -> tuple[Any, Any]:
        return fx.node.map_arg((node.args, node.kwargs), self.read)

    def emit(self, author: fx.Node, target: Any, args: Any, kwargs: Any | None = None) -> fx.Node:
        """A new view node whose value `author`'s tensor holds from here on."""
        made = self.view.graph.create_node("call_function", target, args, kwargs or {}, author.name)
        return self.record(made, author)

    def record(self, made: fx.Node, author: fx.Node, **marks: bool) -> fx.Node:
        made.meta = {**author.meta, **marks}
        self.view.author[made], self.view.birth[made] = author, self.at
        return made

    def copy(self, node: fx.Node) -> None:
        made = self.record(self.view.graph.node_copy(node, self.read), node)
        _settle_select(made)
        parent = _aliased(node)
        root = node if parent is None else self.root(parent)
        self.view.roots[node], self.parent[node] = root, parent
        self.current[node], self.seen[node] = made, self.version.get(root, 0)
        if parent is not None and _undecided(node):
            self.undecided.add(root)
        self.undecided.update(map(self.root, hidden_sources(node)))

    # -- writing ----------------------------------------------------------------------------
    def write(self, node: fx.Node, positions: list[int]) -> None:
        target = node.args[0] if node.args else None
        functional = _functional_overload(node) if positions == [0] else None
        if isinstance(target, fx.Node) and _turns(node):
            # Views of it keep their shape, so no shape is that of the memory from here on.
            root = self.root(target)
            self.opaque_write(node, positions)
            self.view.roots[node] = root
            self.undecided.add(root)
            return
        if functional is None or not isinstance(target, fx.Node) \
                or self.root(target) in self.undecided:
            self.opaque_write(node, positions)
            return
        args, kwargs = self.arguments(node)
        value = self.emit(node, functional, args, kwargs)
        if _changes_dtype(node):
            value = self.emit(node, aten.to.dtype, (value, node.meta["val"].dtype))
        whole: fx.Node | None = value
        step = target
        while whole is not None and (parent := self.parent.get(step)) is not None:
            whole = self.carry_back(step, parent, whole)
            step = parent
        if whole is None:
            self.opaque_write(node, positions)
            return
        root = self.root(target)
        self.version[root] = now = self.version.get(root, 0) + 1
        self.view.writes_to.setdefault(root, []).append(self.at)
        self.view.roots[node], self.parent[node] = root, target
        for holder, content in ((root, whole), (target, value), (node, value)):
            self.current[holder], self.seen[holder] = content, now

    def carry_back(self, step: fx.Node, base: fx.Node, value: fx.Node) -> fx.Node | None:
        """The value of `base` after its view `step` took `value`; None where that is not known."""
        name = op_name(step)
        if name in _MULTI:  # its piece has already been put into the source
            return value
        if writes(step) or name in _IDENTITY:
            return value
        if step.target is operator.getitem:
            return self.carry_back_part(step, base, value) if op_name(base) in _MULTI else None
        if name in _RESHAPING:
            return self.emit(base, aten.reshape.default, (value, list(base.meta["val"].shape)))
        if name in ("t", "numpy_T"):  # their own inverses
            return self.emit(base, step.target, (value,))
        if name in ("transpose", "swapaxes", "swapdims", "mT"):
            return self.emit(base, aten.transpose.int, (value, *(step.args[1:3] or (-2, -1))))
        if name == "permute":
            order = [d % len(step.args[1]) for d in step.args[1]]  # type: ignore[arg-type]
            inverse = [order.index(i) for i in range(len(order))]
            return self.emit(base, aten.permute.default, (value, inverse))
        rest = fx.node.map_arg(step.args[1:], self.read)
        if name == "narrow":
            dim, start, length = rest
            rest, name = (dim, start, start + length), "slice"
        scatter = {"select": aten.select_scatter.default, "slice": aten.slice_scatter.default,
                   "diagonal": aten.diagonal_scatter.default}.get(name)
        return scatter and self.emit(base, scatter, (self.read(base), value, *rest))

    def carry_back_part(self, piece: fx.Node, parts: fx.Node, value: fx.Node) -> fx.Node | None:
        """The value of the tensor that `parts` split, after one piece of it took `value`."""
        source, number = parts.args[0], piece.args[1]
        assert isinstance(source, fx.Node) and isinstance(number, int)
        if op_name(parts) == "unbind":
            dim = parts.args[1] if len(parts.args) > 1 else parts.kwargs.get("dim", 0)
            return self.emit(source, aten.select_scatter.default,
                             (self.read(source), value, dim, number))
        dim = parts.args[2] if len(parts.args) > 2 else parts.kwargs.get("dim", 0)
        lengths = [p.shape[dim] for p in parts.meta["val"]]
        if not all(isinstance(n, int) for n in lengths):
            return None
        start = sum(lengths[:number])
        return self.emit(source, aten.slice_scatter.default,
                         (self.read(source), value, dim, start, start + lengths[number]))

    def opaque_write(self, node: fx.Node, positions: list[int]) -> None:
        """Keep the write as it is; what it wrote to is unknown to recognition from here on."""
        made = self.view.graph.node_copy(node, self.read)
        self.record(made, node, attnopt_opaque=True)
        self.view.roots[node], self.parent[node] = node, None
        self.current[node], self.seen[node] = made, 0
        written = [node.args[i] for i in positions if i < len(node.args)]
        written += [node.kwargs[a.name] for a in node.target._schema.arguments  # type: ignore
                    if a.alias_info and a.alias_info.is_write and a.name in node.kwargs]
        for holder in written:
            for tensor in holder if isinstance(holder, (list, tuple)) else (holder,):
                if isinstance(tensor, fx.Node):
                    self.forget(self.root(tensor))

    def forget(self, root: fx.Node) -> None:
        """Every tensor in the memory of `root` holds something unknown now."""
        self.view.writes_to.setdefault(root, []).append(self.at)
        for author in [a for a, owner in self.view.roots.items() if owner is root]:
            if author in self.current and is_tensor(author):
                unknown = self.emit(author, aten.alias.default, (self.current[author],))
                unknown.meta["attnopt_opaque"] = True
                self.current[author] = unknown


def _settle_select(made: fx.Node) -> None:
    """x[:, 0] of an axis of length 1 is x.squeeze(1): it moves elements and leaves none out."""
    if made.target is aten.select.int:
        source, dim = made.args[:2]
        size = source.meta["val"].shape[dim]  # type: ignore[union-attr,index]
        if isinstance(size, int) and size == 1:
            made.target, made.args = aten.squeeze.dim, (source, dim)


def _aliased(node: fx.Node) -> fx.Node | None:
    """The argument whose memory the node's result shares, or None for a fresh result."""
    if node.op != "call_function" or not node.args:
        return None
    first = node.args[0]
    if node.target is operator.getitem:
        if not isinstance(first, fx.Node) or op_name(first) in _MULTI:
            return first if isinstance(first, fx.Node) else None
        return next(iter(hidden_sources(node)), None)
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if isinstance(first, fx.Node):
        if node.target in _SILENT_ALIAS and _returns_itself(node, first):
            return first
        returns = node.target._schema.returns
        if returns and returns[0].alias_info is not None:
            return first if _returns_view(node, first) else None
    return next(iter(hidden_sources(node)), None)


def hidden_sources(node: fx.Node) -> list[fx.Node]:
    """Nodes in whose memory the result lies though no schema says so: `einsum` of one tensor,
    `broadcast_tensors`, `meshgrid`, `atleast_3d`. What tracing computed with tells."""
    sources = node.all_input_nodes
    if node.op != "call_function":
        return []
    if node.target is operator.getitem:
        (parts,) = sources
        if op_name(parts) in _MULTI or not isinstance(parts.meta.get("val"), (list, tuple)):
            return []
        sources = parts.all_input_nodes
    elif not isinstance(node.target, torch._ops.OpOverload) or node.target in _SILENT_ALIAS or any(
            r.alias_info is not None for r in node.target._schema.returns):
        return []
    if op_name(node) == "lift_fresh_copy":  # a copy, of which tracing makes none
        return []
    own = _storages(node)
    return [s for s in sources if own & _storages(s)] if own else []


def _storages(node: fx.Node) -> set[int]:
    val = node.meta.get("val")
    return {t.untyped_storage()._cdata for t in (val if isinstance(val, (list, tuple)) else (val,))
            if isinstance(t, torch.Tensor) and t.layout is torch.strided}


def _returns_itself(node: fx.Node, first: fx.Node) -> bool:
    if op_name(node) == "type_as":
        return bool(node.meta["val"].dtype == first.meta["val"].dtype)
    _, p, train = node.args
    return not train or p == 0


def _returns_view(node: fx.Node, first: fx.Node) -> bool:
    """`reshape`, `contiguous` and `to` copy only when they must."""
    name, new, old = op_name(node), node.meta.get("val"), first.meta.get("val")
    if not isinstance(new, torch.Tensor) or not isinstance(old, torch.Tensor):
        return True
    if name == "to":
        copy = node.kwargs.get("copy") or any(a is True for a in node.args[3:])
        return new.dtype == old.dtype and new.device == old.device and not copy
    if name not in ("contiguous", "reshape", "flatten", "reshape_as", "unflatten"):
        return True
    if not _static(old) or not _static(new):
        return True  # asking strides with symbols would fix a length for good; see _undecided
    if name == "contiguous":
        return old.is_contiguous()
    try:
        torch.empty_strided(old.shape, old.stride(), device="meta").view(new.shape)
    except RuntimeError:
        return False
    return True


def _static(tensor: torch.Tensor) -> bool:
    return all(isinstance(n, int) for n in (*tensor.shape, *tensor.stride()))


def _undecided(node: fx.Node) -> bool:
    """May the node copy or share, depending on symbolic lengths?"""
    return op_name(node) in ("contiguous", "reshape", "flatten", "reshape_as", "unflatten") \
        and not (_static(node.meta["val"]) and _static(node.args[0].meta["val"]))  # type: ignore


def _functional_overload(node: fx.Node) -> Any:
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    name = op_name(node)
    if not name.endswith("_") or (torch.Tag.nondeterministic_seeded in target.tags
                                  and not _drops_nothing(node)):
        return None
    packet = getattr(aten, name[:-1], None)
    overload = getattr(packet, target._overloadname, None) if packet is not None else None
    if overload is None or any(a.alias_info and a.alias_info.is_write
                               for a in overload._schema.arguments):
        return None
    return overload


def _turns(node: fx.Node) -> bool:
    """Does it change the shape of a tensor in place?"""
    tags = getattr(node.target, "tags", ())
    return torch.Tag.inplace_view in tags and op_name(node) != "detach_"


def _drops_nothing(node: fx.Node) -> bool:
    """Is it a dropout outside of training, or of nothing?"""
    given = dict(zip(("input", "p", "train"), node.args, strict=False)) | node.kwargs
    return op_name(node) in ("dropout_", "feature_dropout_", "alpha_dropout_") and (
        given["train"] is False or given["p"] == 0)


def _changes_dtype(node: fx.Node) -> bool:
    """An in-place result keeps its own type, where the functional form may promote."""
    own = node.meta["val"].dtype
    others = [a.meta["val"].dtype for a in node.args[1:] if is_tensor(a)]  # type: ignore[union-attr]
    compares = op_name(node) in ("lt_", "le_", "gt_", "ge_", "eq_", "ne_", "logical_not_",
                                 "logical_and_", "logical_or_", "logical_xor_")
    floats_int = not own.is_floating_point and op_name(node) in ("div_", "true_divide_")
    return compares or floats_int or any(d != own for d in others)
