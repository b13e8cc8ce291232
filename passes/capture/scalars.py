"""Numbers that a program reads out of tensors made of sizes, as arithmetic on the sizes.

    span = torch.tensor(min(x.size(1), 512));  table[512 - span : 512 + span]       (DeBERTa)

asks a tensor for its number (`item`), of which a tracer knows nothing when sizes are symbols: every
shape after it is a symbol of its own. `settle_numbers` follows whole-number arithmetic of small
tensors back to sizes, puts that arithmetic on the sizes in the place of `item`, and infers what
comes after it anew. Only int64 is followed, in which no size overflows; what is written to is
followed through the functional view of the graph. A graph stays as it is where a shape could be
inferred only for some sizes.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from attnopt.passes.normalize import View, functional_view, is_tensor, op_name

#: elements of a tensor that is followed, and steps
_SMALL, _DEEPEST = 64, 64
#: the position of the number that fills a new tensor
_MADE = {"scalar_tensor": 0, "full": 1, "new_full": 2, "full_like": 1}
_SAME = frozenset((
    "to", "_to_copy", "lift_fresh", "lift_fresh_copy", "detach", "alias", "clone", "contiguous",
    "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze", "flatten", "expand", "type_as",
    "long",
))
_ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "rsub": operator.sub, "mul": operator.mul,
    "neg": operator.neg, "minimum": torch.sym_min, "maximum": torch.sym_max,
    "floor_divide": operator.floordiv, "remainder": operator.mod,
}
_DIVIDES = (operator.floordiv, operator.mod)
_SHAPES = logging.getLogger("torch.fx.experimental.symbolic_shapes")
_EXTREMES = (torch.sym_min, torch.sym_max)
_SIZES = (bool, int, torch.SymInt, torch.SymBool)


@dataclass(frozen=True)
class _Term:
    """function(*args) of numbers: ints, Terms, and nodes of the author's graph that are sizes."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


def settle_numbers(module: fx.GraphModule) -> bool:
    """Put arithmetic on sizes in the place of numbers read out of tensors; False where none is."""
    graph = module.graph
    asked = [n for n in graph.nodes if n.op == "call_function" and op_name(n) in (
        "item", "_local_scalar_dense") and _unknown(n.meta.get("val"))]
    if not asked:
        return False
    view = functional_view(graph)
    terms = {view.author[n]: _number(view, n.args[0]) for n in view.graph.nodes
             if n in view.author and view.author[n] in asked and n.args}
    known = {node: term for node, term in terms.items() if term is not None}
    if not known:
        return False
    made: list[fx.Node] = []
    fresh = {node: _emit(graph, node, term, made) for node, term in known.items()}
    if not _infer(graph, fresh, made):
        for node in reversed(made):
            graph.erase_node(node)
        return False
    for node, new in fresh.items():
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    _drop_checks(graph)
    return True


def _unknown(val: Any) -> bool:
    return isinstance(val, torch.SymInt) and val.node.hint is None


# -- what a small tensor holds ---------------------------------------------------------------------
def _number(view: View, node: Any, at: int = 0, depth: int = 0) -> Any:
    """The number in an int64 tensor at a row-major place, or the one that an argument is; None
    where it is not known."""
    if isinstance(node, int) and not isinstance(node, bool):
        return node
    if not isinstance(node, fx.Node) or depth > _DEEPEST or node.meta.get("attnopt_opaque"):
        return None
    val = node.meta.get("val")
    if isinstance(val, torch.SymInt):
        return None if _unknown(val) else view.author.get(node)
    shape = _shape(node)
    if shape is None or node.op != "call_function":
        return None
    name, source = op_name(node), node.args[0] if node.args else None
    if name in _MADE:
        given = node.args[_MADE[name]] if len(node.args) > _MADE[name] \
            else node.kwargs.get("fill_value")
        return None if is_tensor(given) else _number(view, given, 0, depth + 1)
    if name == "stack" and (node.args[1:] or node.kwargs.get("dim", 0)) in (0, (0,)):
        part, rest = divmod(at, math.prod(shape[1:]))
        return _number(view, source[part], rest, depth + 1)  # type: ignore[index]
    inner = _shape(source) if is_tensor(source) else None
    if name == "select" and inner is not None and len(node.args) == 3:
        dim, index = node.args[1] % len(inner), node.args[2]
        after = math.prod(inner[dim + 1 :])
        lead, rest = divmod(at, after)
        return _number(view, source, (lead * inner[dim] + index % inner[dim]) * after + rest,
                       depth + 1) if isinstance(index, int) else None
    if name in _SAME:
        return _number(view, source, at, depth + 1) if inner is not None and (
            math.prod(inner) == math.prod(shape)) else None
    return _combined(view, node, name, at, depth)


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    """The shape of a small tensor of int64."""
    val = node.meta["val"]
    if not isinstance(val, torch.Tensor) or val.dtype != torch.int64 or any(
            not isinstance(n, int) for n in val.shape) or not 0 < val.numel() <= _SMALL:
        return None
    return tuple(val.shape)


def _operand(view: View, node: fx.Node, x: Any, at: int, depth: int) -> Any:
    """The number of an operand that is broadcast to the result."""
    if is_tensor(x):
        own = _shape(x)
        if own is None or math.prod(own) != 1 and own != _shape(node):
            return None
        at = at if math.prod(own) > 1 else 0
    return _number(view, x, at, depth + 1)


def _combined(view: View, node: fx.Node, name: str, at: int, depth: int) -> Any:
    """The number that arithmetic makes."""
    if name in ("clamp", "clamp_min", "clamp_max"):
        return _clamped(view, node, name, at, depth)
    if name == "div" and node.kwargs.get("rounding_mode") == "floor":
        name = "floor_divide"
    function = _ARITHMETIC.get(name)
    numbers = [_operand(view, node, a, at, depth) for a in node.args]
    alpha = numbers.pop() if len(numbers) == 3 and name == "rsub" else node.kwargs.get("alpha", 1)
    if function is None or None in numbers or len(numbers) != (1 if name == "neg" else 2) \
            or alpha != 1 or set(node.kwargs) - {"alpha", "rounding_mode"}:
        return None
    if function in _DIVIDES and not (isinstance(numbers[1], int) and numbers[1] != 0):
        return None
    return _Term(function, tuple(reversed(numbers) if name == "rsub" else numbers))


def _clamped(view: View, node: fx.Node, name: str, at: int, depth: int) -> Any:
    source, *rest = node.args
    given = dict(zip({"clamp": ("min", "max")}.get(name, (name[-3:],)), rest, strict=False))
    total = _operand(view, node, source, at, depth)
    for side, function in (("min", torch.sym_max), ("max", torch.sym_min)):
        bound = given.get(side, node.kwargs.get(side))
        if bound is not None:
            limit = _operand(view, node, bound, at, depth)
            total = None if None in (total, limit) else _Term(function, (total, limit))
    return total


# -- arithmetic on sizes in the graph --------------------------------------------------------------
def _emit(graph: fx.Graph, near: fx.Node, term: Any, made: list[fx.Node]) -> Any:
    """A node, or an int, with the value of a term, before `near`."""
    if not isinstance(term, _Term):
        return term
    args = tuple(_emit(graph, near, a, made) for a in term.args)
    if all(isinstance(a, int) for a in args):
        return term.function(*args)
    with graph.inserting_before(near):
        node = graph.call_function(term.function, args)
    node.meta = {k: v for k, v in near.meta.items() if k not in ("val", "unbacked_bindings")}
    made.append(node)
    return node


def _infer(graph: fx.Graph, fresh: dict[fx.Node, Any], made: list[fx.Node]) -> bool:
    """Infer the nodes that depend on `made`; False, with nothing changed, where that fails."""
    values: dict[fx.Node, Any] = {}

    def value(node: fx.Node) -> Any:
        new = fresh.get(node, node)
        return new if not isinstance(new, fx.Node) else values.get(new, new.meta.get("val"))
    mode = next((v.fake_mode for n in graph.nodes
                 if isinstance(v := n.meta.get("val"), FakeTensor)), None)
    env: Any = mode and mode.shape_env
    if mode is None or env is None or not hasattr(env, "error_on_new_guards"):
        return False
    level = _SHAPES.level
    try:
        _SHAPES.setLevel(logging.CRITICAL)
        with mode, torch.no_grad(), env.error_on_new_guards(), \
                env.ignore_fresh_unbacked_symbols():
            for node in graph.nodes:
                changed = node in made or node.target in _EXTREMES or any(
                    a in values or a in fresh for a in node.all_input_nodes)
                if changed and node.op == "call_function" and node not in fresh \
                        and node.target is not torch.ops.aten._assert_scalar.default:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value)
                    values[node] = _extreme(node, args) if node.target in _EXTREMES \
                        else node.target(*args, **kwargs)
    except Exception:
        return False
    finally:
        _SHAPES.setLevel(level)
    if any(map(_loses, values, values.values())):
        return False
    for node, new in values.items():
        node.meta["val"] = new
        node.meta.pop("unbacked_bindings", None)
    return True


def _extreme(node: fx.Node, args: tuple[Any, ...]) -> Any:
    """The lesser or greater of two sizes, by their ranges where these tell which one it is."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    a, b = args
    least = node.target is torch.sym_min
    if statically_known_true(a <= b):
        return a if least else b
    if statically_known_true(b <= a):
        return b if least else a
    return node.target(a, b)


def _drop_checks(graph: fx.Graph) -> None:
    """Take out checks of sizes that were symbols of their own and hold by what is known of them."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for node in reversed(graph.nodes):
        checks = node.target is torch.ops.aten._assert_scalar.default and isinstance(
            node.args[0], fx.Node)
        if checks and statically_known_true(node.args[0].meta["val"]) or not node.users and (
                node.op == "call_function" and isinstance(node.meta.get("val"), _SIZES)):
            graph.erase_node(node)


def _loses(node: fx.Node, new: Any) -> bool:
    """Is a shape less known than before, or is it another kind of tensor?"""
    if "val" not in node.meta:
        return False
    olds, news = ([*v] if isinstance(v, (list, tuple)) else [v] for v in (node.meta["val"], new))
    return len(olds) != len(news) or any(map(_unlike, olds, news))


def _unlike(old: Any, new: Any) -> bool:
    if not isinstance(old, torch.Tensor):
        return _unknown(new) and not _unknown(old)
    return (old.dtype, old.device, old.dim()) != (new.dtype, new.device, new.dim()) or any(
        _unknown(n) and not _unknown(o) for o, n in zip(old.shape, new.shape, strict=True))
