"""`freeze=True`: what a graph computes from parameters and buffers alone, computed once for all.

The values on the border of that part of the graph, such as the bias that an MLP over coordinates
gives, or weights that are normalised at each call, become constants of the rewritten graph. Every
parameter and buffer that they were computed from is then compared at each call with what it held,
byte by byte (`ValueGuard`): an optimiser's step, `load_state_dict` or a write through `.data` is
noticed, and that call computes everything again.

A constant has no gradient, so a graph with frozen values is never used where one of these tensors
asks for a gradient, and nothing is frozen in training. Views and casts alone are left as they are:
a second copy of a weight is not worth the memory.
"""

from __future__ import annotations

import logging

import torch
from torch import fx

from attnopt.ir.captured import Captured
from attnopt.passes.canonical import Canonical
from attnopt.passes.capture.guards import ValueGuard, private_copy
from attnopt.passes.normalize import _aliased, op_name
from attnopt.passes.options import Options
from attnopt.passes.parameters import FEW_BYTES, ParameterCone
from attnopt.passes.recognize.program import INPUT, Program

log = logging.getLogger("attnopt.passes")

#: bytes of parameters above which to compare them is no cheaper than to compute with them
MOST_COMPARED = 1 << 26
_COPIES = frozenset(("to", "_to_copy", "clone", "contiguous", "lift_fresh_copy"))


def why_not(captured: Captured, options: Options) -> str | None:
    """Why nothing of a graph is frozen, None where that is asked for and possible."""
    if not options.freeze:
        return "not asked for"
    if captured.training:
        return "freeze: nothing is frozen of a model in training mode, its parameters change"
    return None


def frozen_operands(captured: Captured, options: Options, program: Program,
                    canonical: Canonical) -> bool:
    """Whether the tensors of queries x keys of a site will be constants, so that making them costs
    nothing."""
    both = [t for o in canonical.spec.operands if {"q", "k"} <= set(o.axes or ())
            for t in (canonical.operands.get(o.slot),) if t is not None]
    if not both or options.prefer == "memory" or why_not(captured, options) is not None:
        return False
    return all(INPUT not in program.depends[t.node]
               and all(isinstance(n, int) for n in t.node.meta["val"].shape) for t in both)


def freeze(captured: Captured, options: Options) -> tuple[ValueGuard, ...]:
    """Freeze in place; guards of what the frozen values were computed from."""
    reason = why_not(captured, options)
    if reason is not None:
        if options.freeze:
            captured.notes += (reason,)
        return ()
    cone = ParameterCone(captured)
    border = _border(captured, cone, options.prefer == "memory")
    if not border:
        return ()
    values = _values(captured, border)
    graph, module = captured.graph, captured.graph_module
    place = next(n for n in graph.nodes if n.op != "placeholder")
    for node, value in values.items():
        name = f"frozen_{node.name}"
        module.register_buffer(name, value, persistent=False)
        with graph.inserting_before(place):
            constant = graph.get_attr(name)
        constant.meta = dict(node.meta)
        node.replace_all_uses_with(constant)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and node in cone.leaves:
            graph.erase_node(node)
    names = sorted(frozenset[str]().union(*(cone.leaves[n] for n in border)))
    held = "".join(", " + captured.origins[n].path for n in names[:3])[2:]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    captured.notes += (
        f"frozen: {len(border)} value{'s' if len(border) > 1 else ''} computed once, from {held}"
        f"{more}; a change of these is noticed" if names else
        f"frozen: {len(border)} value{'s' if len(border) > 1 else ''} computed once",)
    return tuple(ValueGuard(n, captured.origins[n].path, private_copy(captured.values[n]))
                 for n in names)


def asks_for_gradients(captured: Captured, guards: tuple[ValueGuard, ...]) -> bool:
    """Whether any tensor that frozen values were computed from wants a gradient now."""
    return any(captured.values[g.placeholder].requires_grad for g in guards)


def _border(captured: Captured, cone: ParameterCone, small: bool) -> list[fx.Node]:
    """Nodes whose values become constants; `small`: none that is much larger than what it is
    computed from."""
    inside = {n for n in cone.leaves if n.op == "call_function" and n not in cone.sized}
    found = []
    for node in reversed(list(captured.graph.nodes)):
        if node not in inside or all(u in inside for u in node.users):
            continue
        if _worth(captured, cone, node, small):
            found.append(node)
        else:
            inside.discard(node)
    return found[::-1]


def _worth(captured: Captured, cone: ParameterCone, node: fx.Node, small: bool) -> bool:
    val = node.meta.get("val")
    if not node.users or not isinstance(val, torch.Tensor) or not cone.leaves[node]:
        return False
    if not _computes(node):
        return False
    read = sum(captured.values[n].nbytes for n in cone.leaves[node])
    size = val.numel() * val.element_size()
    return read <= MOST_COMPARED and not (small and size > max(read, FEW_BYTES))


def _computes(node: fx.Node) -> bool:
    """Is there more to a value than views and casts of one tensor?"""
    while node.op == "call_function":
        if _aliased(node) is None and op_name(node) not in _COPIES:
            return True
        node = node.all_input_nodes[0]
    return False


def _values(captured: Captured, border: list[fx.Node]) -> dict[fx.Node, torch.Tensor]:
    """What the nodes compute from the values that the placeholders hold."""
    needed: set[fx.Node] = set()
    stack = list(border)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    values: dict[fx.Node, torch.Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for node in (n for n in captured.graph.nodes if n in needed):
            if node.op == "placeholder":
                values[node] = captured.values[node.name].detach()
                continue
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            assert callable(node.target)
            values[node] = node.target(*args, **kwargs)
        # A copy of its own: a view of a parameter would change with it.
        return {n: private_copy(values[n]) if _shares(values[n], captured) else values[n]
                for n in border}


def _shares(value: torch.Tensor, captured: Captured) -> bool:
    own = value.untyped_storage().data_ptr()
    return any(isinstance(v, torch.Tensor) and v.layout is torch.strided
               and v.untyped_storage().data_ptr() == own for v in captured.values.values())
