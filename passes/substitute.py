"""Substitution: a rewritten site becomes one call of the op in the author's graph.

The call is put right before the node whose value it replaces, so that it reads the author's
tensors when they hold what recognition saw. The views around it are emitted by `Arranger`; what
nobody reads any more is removed afterwards, in-place writes included when the memory they touch
belongs to the site alone.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.ir.spec import Schedule, Spec
from attnopt.passes.canonical import Canonical, Tensor
from attnopt.passes.custom import CUSTOM, inline_function
from attnopt.passes.normalize import View, _aliased, op_name, writes
from attnopt.passes.recognize.axes import axes_of, product, resolve, settle
from attnopt.passes.recognize.layout import Arranger

aten = torch.ops.aten


@dataclass
class Substitution:
    """The nodes put in for a site: its inputs in the author's graph, the calls, and the result."""

    end: fx.Node
    inputs: list[fx.Node]
    emitted: list[fx.Node]
    result: fx.Node


Part = tuple[Canonical, Spec, Schedule, Callable[..., Any] | None]


def substitute(graph: fx.Graph, view: View, parts: Sequence[Part]) -> Substitution:
    """Emit the calls for sites that share one end (their results are added), without re-wiring.

    A part with a function has that traced in place of the op.
    """
    site = parts[0][0].site
    end = view.author[site.end]
    dtype = end.meta["val"].dtype
    with graph.inserting_before(end):
        arranger = Arranger(graph, end, dict(parts[0][0].site.fixed))
        results = []
        for part in parts:
            arranger.fixed = part[0].site.fixed
            results.append(_call(arranger, view, *part))
        total = results[0]
        shape = [product(dim) for dim in map(resolve, parts[0][0].result)]
        for other in results[1:]:
            total = arranger.call(aten.add.Tensor, total, other, shape=shape,
                                  dtype=total.meta["val"].dtype)
        result = arranger.arrange(total, parts[0][0].result, settle(site.out_layout))
        if result.meta["val"].dtype != dtype:
            result = arranger.call(aten.to.dtype, result, dtype,
                                   shape=[product(dim) for dim in settle(site.out_layout)])
        if needs_strides(end):
            result = arranger.call(aten.contiguous.default, result, dtype=dtype,
                                   shape=[product(dim) for dim in settle(site.out_layout)])
        if not site.sdpa and _returned(view, end) and any(
                schedule.lowering in ("aten:sdpa", CUSTOM) for _, _, schedule, _ in parts):
            # Fused attention saves its result for the backward pass: who gets it may write to it.
            result = arranger.call(aten.clone.default, result, dtype=dtype,
                                   shape=[product(dim) for dim in settle(site.out_layout)])
    inputs = list(dict.fromkeys(
        view.author[t.node] for c, *_ in parts for t in c.tensors))
    return Substitution(end, inputs, arranger.emitted, result)


def _call(arranger: Arranger, view: View, canonical: Canonical, spec: Spec,
          schedule: Schedule, compute: Callable[..., Any] | None) -> fx.Node:
    def bring(tensor: Tensor) -> fx.Node:
        if tensor.recipe is not None:
            return _made(arranger, tensor, [bring(t) for t in tensor.recipe.inputs])
        node = view.author[tensor.node]
        arranger.learn(node, tensor.layout)
        return arranger.arrange(node, tensor.layout, tensor.target)

    query, key, value = map(bring, (canonical.query, canonical.key, canonical.value))
    operands = [bring(canonical.operands[o.slot]) for o in spec.operands]
    shape = [product(dim) for dim in map(resolve, canonical.result)]
    if compute is not None:
        slots = {o.slot: node for o, node in zip(spec.operands, operands, strict=True)}
        return inline_function(arranger, compute, (query, key, value), slots, shape)
    call = arranger.call(torch.ops.attnopt.attention.default, query, key, value, operands,
                         str(spec), str(schedule))
    return arranger.call(operator.getitem, call, 0, shape=shape,
                         dtype=query.meta["val"].dtype)


def _made(arranger: Arranger, tensor: Tensor, inputs: list[fx.Node]) -> fx.Node:
    """The call that makes a tensor by its recipe."""
    recipe = tensor.recipe
    assert recipe is not None
    have = axes_of(tensor.layout)
    shape = [product(dim) if have & set(dim) else 1 for dim in map(resolve, tensor.target)]
    if recipe.blocks:
        shape = [-(-n // b) for n, b in zip(shape, recipe.blocks, strict=True)]
    lengths = [arranger.length(product(dim)) for dim in map(resolve, recipe.lengths)]
    return arranger.call(recipe.op, inputs, lengths, recipe.text, shape=shape,
                         dtype=recipe.dtype)


def rewire(graph: fx.Graph, done: Substitution) -> None:
    """Let every reader of the end read the result instead; views behind it may need a copy now."""
    _loosen_views(done.end)
    done.end.replace_all_uses_with(done.result)


def discard(graph: fx.Graph, done: Substitution) -> None:
    """Take the emitted nodes out again."""
    for node in reversed(done.emitted):
        graph.erase_node(node)


def _loosen_views(node: fx.Node) -> None:
    """`view` of the end demanded the author's strides; `reshape` copies where ours differ."""
    for user in list(node.users):
        if user.op != "call_function" or user.args[:1] != (node,):
            continue
        if user.target in (aten.view.default, aten._unsafe_view.default):
            user.target = aten.reshape.default
        if _aliased(user) is node:
            _loosen_views(user)


_BY_STRIDE = frozenset(("view_as_complex", "view_as_real", "as_strided"))


def needs_strides(node: fx.Node) -> bool:
    """Does a view behind the node ask for strides, or for another dtype of the same bytes?"""
    for user in node.users:
        if user.op == "call_function" and user.args[:1] == (node,):
            by_dtype = op_name(user) == "view" and isinstance(user.args[1], torch.dtype)
            if by_dtype or op_name(user) in _BY_STRIDE:
                return True
            if _aliased(user) is node and needs_strides(user):
                return True
    return False


def written_later(view: View, site_end: fx.Node) -> bool:
    """Is the memory of the end written in place after it is made?"""
    root = view.roots.get(site_end, site_end)
    made = view.position[site_end]
    return any(at > made for at in view.writes_to.get(root, ()))


def _returned(view: View, end: fx.Node) -> bool:
    """Is the memory of the end a result of the graph?"""
    root = view.roots.get(end, end)
    returned = next(n for n in reversed(end.graph.nodes) if n.op == "output").all_input_nodes
    return any(view.roots.get(n, n) is root for n in returned)


def sweep(graph: fx.Graph, candidates: set[fx.Node]) -> None:
    """Remove what is dead among `candidates`, in-place writes to dead memory included."""
    owner: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        parent = node.args[0] if node.op == "call_function" and writes(node) == [0] \
            else _aliased(node)
        owner[node] = owner.get(parent, parent) if isinstance(parent, fx.Node) else node
    family: dict[fx.Node, list[fx.Node]] = {}
    for node, root in owner.items():
        family.setdefault(root, []).append(node)
    dead: set[fx.Node] = set()
    pool = _upstream(candidates)
    pool |= {u for n in pool for u in n.users if u.target is operator.getitem and not u.users}
    changed = True
    while changed:
        changed = False
        for root, members in family.items():
            fresh = [m for m in members if m not in dead]
            group = set(fresh)
            whole = root.op == "call_function" and all(m in pool and _removable(m) for m in fresh)
            if whole and all(u in dead or u in group for m in fresh for u in m.users):
                gone = group
            else:  # memory that lives on: only views of it may go
                gone = {m for m in fresh if m in pool and _removable(m) and not writes(m)
                        and all(u in dead for u in m.users)}
            dead |= gone
            changed = changed or bool(gone)
    for node in reversed(list(graph.nodes)):
        if node in dead:
            graph.erase_node(node)


def _upstream(nodes: set[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    stack = list(nodes)
    while stack:
        node = stack.pop()
        if node not in found and node.op == "call_function":
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _draws(node: fx.Node) -> bool:
    """Does an operation with a dropout in it draw random numbers?"""
    if op_name(node) == "dropout":
        return bool(node.args[1] and node.args[2])
    if op_name(node) == "scaled_dot_product_attention":
        return bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0))
    return True


def _removable(node: fx.Node) -> bool:
    """Pure, or a write to memory that is judged with its family; never random or a switch."""
    if isinstance(node.target, torch._ops.OpOverload):
        random = torch.Tag.nondeterministic_seeded in node.target.tags
        return not (random and _draws(node)) and writes(node) in ([], [0])
    return node.target is operator.getitem or not node.is_impure()
