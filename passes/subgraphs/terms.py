"""Terms: what an operation computes, as a formula over axes instead of tensors.

A tensor is read with a layout (`attnopt.passes.recognize.axes`): the axes that its dimensions are
made of. Views, copies, repetitions, casts between floating types and inactive dropout only change
the layout. What is left are linear combinations, products of powers, reductions over axes,
softmaxes and pointwise functions:

    matmul, einsum, linear    sum over an axis of a product
    x / y, rsqrt(x), x * x    x^1 y^-1, x^-1/2, x^2
    silu, gelu, RMS norm, layer norm, SDPA without a causal flag    what they are made of

`expand` opens one operation; what it does not know stays a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    broadcast,
    meet,
    resolve,
    settle,
    shape_of,
)
from attnopt.passes.recognize.contraction import contraction, reduced_dims
from attnopt.passes.recognize.layout import back
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.rules import Decline


@dataclass(frozen=True, eq=False)
class Ref:
    """A tensor of a program with the axes of its dimensions."""

    node: fx.Node
    layout: Layout

    def same(self, other: Item) -> bool:
        """Is it one tensor, element for element?"""
        return isinstance(other, Ref) and self.node is other.node and (
            settle(self.layout) == settle(other.layout))


@dataclass(frozen=True, eq=False)
class Term:
    """op of args.

    number:  value
    sum:     value (coefficients, constant)
    product: value (exponents, factor)
    reduce:  over axes; value is its kind: sum, mean, amax, amin or logsumexp
    softmax, log_softmax: over axes
    others:  pointwise functions; value are their literals
    """

    op: str
    args: tuple[Item, ...] = ()
    value: Any = None
    axes: tuple[Axis, ...] = ()


Item = Ref | Term
#: the number that a node is everywhere, or None
Constant = Callable[[fx.Node], Any]
_SOFTMAX = {"softmax": "softmax", "_softmax": "softmax", "special_softmax": "softmax",
            "log_softmax": "log_softmax", "_log_softmax": "log_softmax",
            "special_log_softmax": "log_softmax"}
_REDUCE = {"sum": "sum", "mean": "mean", "amax": "amax", "amin": "amin", "logsumexp": "logsumexp"}
_POWERS = {"sqrt": 0.5, "rsqrt": -0.5, "square": 2.0, "reciprocal": -1.0}
#: one operand, and whether numbers among the arguments are part of it
_POINTWISE = frozenset((
    "abs", "exp", "exp2", "log", "log1p", "log2", "tanh", "sigmoid", "relu", "cos", "sin", "sign",
    "erf", "floor", "ceil", "round", "isnan", "logical_not", "softplus", "elu", "leaky_relu",
    "hardswish", "hardsigmoid", "relu6", "mish", "logsigmoid", "log_sigmoid", "tan", "atan",
    "expm1", "sinh", "cosh", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "where",
    "lt", "le", "gt", "ge", "eq", "ne", "logical_and", "logical_or", "bitwise_and", "bitwise_or",
))
_ALIASES = {"multiply": "mul", "divide": "div", "true_divide": "div", "subtract": "sub",
            "special_expit": "sigmoid", "clip": "clamp", "bitwise_not": "logical_not",
            "__and__": "bitwise_and", "__or__": "bitwise_or"}
COMMUTATIVE = frozenset(("maximum", "minimum", "eq", "ne", "logical_and", "logical_or",
                         "bitwise_and", "bitwise_or"))


def number(value: Any) -> Term:
    return Term("number", value=value)


def product(*entries: tuple[Item, float], factor: float = 1.0) -> Term:
    """Product of powers."""
    return Term("product", tuple(i for i, _ in entries), (tuple(e for _, e in entries), factor))


def total(*entries: tuple[float, Item], constant: float = 0.0) -> Term:
    """Linear combination."""
    return Term("sum", tuple(i for _, i in entries), (tuple(c for c, _ in entries), constant))


def strip(ref: Ref) -> Ref:
    """Back over everything that only rearranges, copies, repeats or rounds."""
    node, layout = ref.node, ref.layout
    while node.op == "call_function" and not node.meta.get("attnopt_opaque"):
        if is_cast(node) or _does_nothing(node):
            node = node.args[0]  # type: ignore[assignment]
            continue
        try:
            step = back(node, layout)
        except Decline:
            break
        if step is None:
            break
        node, layout = step
    return Ref(node, layout)


def _does_nothing(node: fx.Node) -> bool:
    if op_name(node) == "dropout":
        return len(node.args) > 2 and not (node.args[1] and node.args[2])
    return op_name(node) == "to" and is_tensor(node.args[0]) and (
        node.args[0].meta["val"].dtype == node.meta["val"].dtype  # type: ignore[union-attr]
        and node.args[0].meta["val"].device == node.meta["val"].device)  # type: ignore[union-attr]


def expand(item: Item, constant: Constant) -> Item:
    """One step: the operation that makes a tensor, or the (stripped) tensor itself."""
    if isinstance(item, Term):
        return item
    ref = strip(item)
    found = constant(ref.node)
    if found is not None:
        return number(found)
    node = ref.node
    if node.op != "call_function" or node.meta.get("attnopt_opaque") or not is_tensor(node):
        return ref
    try:
        return _Opener(ref, constant).open() or ref
    except Decline:
        return ref


class _Opener:
    """Opens one node."""

    def __init__(self, ref: Ref, constant: Constant) -> None:
        self.node, self.layout, self.constant = ref.node, settle(ref.layout), constant
        self.name = _ALIASES.get(op_name(ref.node), op_name(ref.node))

    def of(self, argument: Any, layout: Layout | None = None) -> Item:
        """An argument that is broadcast against the result."""
        if isinstance(argument, (bool, int, float)):
            return number(argument)
        if not is_tensor(argument):
            raise Decline("an argument that is no tensor", self.node)
        shape = shape_of(argument.meta["val"])
        return Ref(argument, broadcast(self.layout if layout is None else layout, shape))

    def open(self) -> Item | None:
        node, name = self.node, self.name
        own = getattr(self, f"_{name}", None)
        if own is not None:
            found: Item | None = own(*node.args, **node.kwargs)
            return found
        if name in _POWERS:
            return product((self.of(node.args[0]), _POWERS[name]))
        if name in _SOFTMAX:
            return self._over(_SOFTMAX[name], node.args[1])
        pair = contraction(node)
        if pair is not None:
            return self._contracted(pair)
        if name in _REDUCE:
            return self._reduced()
        if name in _POINTWISE:
            return self._pointwise()
        return None

    # -- arithmetic -------------------------------------------------------------------------
    def _add(self, a: Any, b: Any, alpha: float = 1) -> Item:
        return total((1.0, self.of(a)), (float(alpha), self.of(b)))

    def _sub(self, a: Any, b: Any, alpha: float = 1) -> Item:
        return total((1.0, self.of(a)), (-float(alpha), self.of(b)))

    def _rsub(self, a: Any, b: Any, alpha: float = 1) -> Item:
        return total((-float(alpha), self.of(a)), (1.0, self.of(b)))

    def _neg(self, a: Any) -> Item:
        return product((self.of(a), 1.0), factor=-1.0)

    def _mul(self, a: Any, b: Any) -> Item:
        return product((self.of(a), 1.0), (self.of(b), 1.0))

    def _div(self, a: Any, b: Any, *, rounding_mode: Any = None) -> Item | None:
        return None if rounding_mode is not None else product((self.of(a), 1.0), (self.of(b), -1.0))

    def _pow(self, a: Any, b: Any) -> Item | None:
        return product((self.of(a), float(b))) if isinstance(b, (int, float)) and is_tensor(a) \
            else None

    def _addcmul(self, a: Any, b: Any, c: Any, *, value: float = 1) -> Item:
        return total((1.0, self.of(a)), (float(value), product(
            (self.of(b), 1.0), (self.of(c), 1.0))))

    def _masked_fill(self, a: Any, keep: Any, value: Any) -> Item:
        return Term("where", (self.of(keep), self.of(value), self.of(a)), ())

    def _to(self, x: Any, *_: Any, **__: Any) -> Item | None:
        """A mask as numbers."""
        mask = is_tensor(x) and x.meta["val"].dtype == torch.bool
        return Term("to", (self.of(x),), ()) if mask and (
            self.node.meta["val"].is_floating_point()) else None

    def _pointwise(self) -> Item:
        node = self.node
        args = [a for a in node.args if a is not None]
        kinds = tuple((i, a) for i, a in enumerate(node.args) if a is None) + tuple(
            sorted((k, v) for k, v in node.kwargs.items() if v is not None))
        name = "logical_" + self.name[8:] if self.name.startswith("bitwise") and (
            node.meta["val"].dtype == torch.bool) else self.name
        if name in ("gt", "ge"):
            name, args = {"gt": "lt", "ge": "le"}[name], args[::-1]
        return Term(name, tuple(map(self.of, args)), kinds)

    # -- reductions -------------------------------------------------------------------------
    def _over(self, op: str, dim: Any) -> Item:
        axes = resolve(self.layout[dim])
        return Term(op, (self.of(self.node.args[0]),), axes=axes)

    def _reduced(self) -> Item | None:
        dtype = self.node.kwargs.get("dtype")
        if dtype is not None and not dtype.is_floating_point:
            return None
        source = self.node.args[0]
        shape = shape_of(source.meta["val"])  # type: ignore[union-attr]
        dims, keep = reduced_dims(self.node)
        rest = iter([axes for i, axes in enumerate(self.layout) if not (keep and i in dims)])
        axes = {i: Axis(shape[i]) for i in dims}
        layout = tuple((axes[i],) if i in dims else next(rest) for i in range(len(shape)))
        return Term("reduce", (Ref(source, layout),), _REDUCE[self.name],  # type: ignore[arg-type]
                    tuple(axes.values()))

    def _contracted(self, pair: Any) -> Item:
        meet(pair.out_layout, self.layout)
        shared = tuple(pair.contracted)
        inside = product((Ref(pair.left, pair.left_layout), 1.0),
                         (Ref(pair.right, pair.right_layout), 1.0))
        found: Item = Term("reduce", (inside,), "sum", shared) if shared else inside
        if pair.alpha != 1:
            found = product((found, 1.0), factor=float(pair.alpha))
        if pair.addend is None:
            return found
        return total((1.0, found), (float(pair.beta), self.of(pair.addend)))

    def _linear(self, x: Any, weight: Any, bias: Any = None) -> Item:
        inner = Axis(shape_of(x.meta["val"])[-1])
        matrix = weight.meta["val"].dim() == 2
        lead, last = (self.layout[:-1], (self.layout[-1],)) if matrix else (self.layout, ())
        found = Term("reduce", (product(
            (Ref(x, (*lead, (inner,))), 1.0), (Ref(weight, (*last, (inner,))), 1.0)),), "sum",
            (inner,))
        return found if bias is None else total((1.0, found), (1.0, self.of(bias)))

    # -- what others are made of --------------------------------------------------------------
    def _silu(self, x: Any) -> Item:
        own = self.of(x)
        return product((own, 1.0), (Term("sigmoid", (own,), ()), 1.0))

    def _gelu(self, x: Any, *, approximate: str = "none") -> Item:
        own = self.of(x)
        if approximate == "none":
            inner: Item = Term("erf", (product((own, 1.0), factor=math.sqrt(0.5)),), ())
        else:
            cubic = total((1.0, own), (0.044715, product((own, 3.0))))
            inner = Term("tanh", (product((cubic, 1.0), factor=math.sqrt(2 / math.pi)),), ())
        return product((own, 1.0), (total((1.0, inner), constant=1.0), 1.0), factor=0.5)

    def _norm(self, x: Any, shape: Sequence[Any], weight: Any, bias: Any, eps: float,
              center: bool) -> Item:
        axes = tuple(a for dim in self.layout[len(self.layout) - len(shape):] for a in dim)

        def mean(value: Item) -> Item:
            """Over axes of its own, so that it is constant along the others."""
            fresh = {a: Axis(a.size) for a in axes}
            return Term("reduce", (_renamed(value, fresh),), "mean", tuple(fresh.values()))

        own = self.of(x)
        centred = total((1.0, own), (-1.0, mean(own))) if center else own
        found = product((centred, 1.0), (total(
            (1.0, mean(product((centred, 2.0)))), constant=eps), -0.5))
        if weight is not None:
            found = product((found, 1.0), (self.of(weight), 1.0))
        return found if bias is None else total((1.0, found), (1.0, self.of(bias)))

    def _rms_norm(self, x: Any, shape: Any, weight: Any = None, eps: float | None = None) -> Item:
        dtype = x.meta["val"].dtype
        return self._norm(x, shape, weight, None, torch.finfo(dtype).eps if eps is None else eps,
                          False)

    def _layer_norm(self, x: Any, shape: Any, weight: Any = None, bias: Any = None,
                    eps: float = 1e-5, cudnn_enable: bool = True) -> Item:
        return self._norm(x, shape, weight, bias, eps, True)

    def _var(self, x: Any, dim: Any = None, *, correction: Any = None, keepdim: bool = False
             ) -> Item | None:
        shape = shape_of(x.meta["val"])
        dims = {d % len(shape) for d in ([dim] if isinstance(dim, int) else dim or ())}
        if correction != 0 or not dims:
            return None
        rest = iter([a for i, a in enumerate(self.layout) if not (keepdim and i in dims)])
        outer = [None if i in dims else next(rest) for i in range(len(shape))]

        def at() -> tuple[Ref, tuple[Axis, ...]]:
            axes = {i: Axis(shape[i]) for i in dims}
            return Ref(x, tuple((axes[i],) if i in dims else outer[i] or () for i in
                                range(len(shape)))), tuple(axes.values())

        (value, axes), (inner, others) = at(), at()
        mean = Term("reduce", (inner,), "mean", others)
        return Term("reduce", (product((total((1.0, value), (-1.0, mean)), 2.0)),), "mean", axes)

    def _scaled_dot_product_attention(self, q: Any, k: Any, v: Any, mask: Any = None,
                                      dropout: float = 0.0, causal: bool = False, *,
                                      scale: float | None = None, enable_gqa: bool = False
                                      ) -> Item | None:
        shapes = [shape_of(t.meta["val"]) for t in (q, k, v)]
        if dropout or causal or enable_gqa or not isinstance(shapes[0][-1], int):
            return None
        keys, inner = Axis(shapes[1][-2]), Axis(shapes[0][-1])
        lead, rows, columns = self.layout[:-2], self.layout[-2], self.layout[-1]

        def of(t: Any, *last: Any) -> Ref:
            shape = shape_of(t.meta["val"])
            return Ref(t, (*broadcast(lead, shape[:-2]), *last))

        scores: Item = product((Term("reduce", (product(
            (of(q, rows, (inner,)), 1.0), (of(k, (keys,), (inner,)), 1.0)),), "sum", (inner,)),
            1.0), factor=scale if scale is not None else shapes[0][-1] ** -0.5)
        if mask is not None:
            whole = (*lead, rows, (keys,))
            added = self.of(mask, whole)
            hidden = mask.meta["val"].dtype == torch.bool
            scores = Term("where", (added, scores, number(-math.inf)), ()) if hidden else total(
                (1.0, scores), (1.0, added))
        weights = Term("softmax", (scores,), axes=(keys,))
        return Term("reduce", (product((weights, 1.0), (of(v, (keys,), columns), 1.0)),), "sum",
                    (keys,))


def _renamed(item: Item, names: dict[Axis, Axis]) -> Item:
    """The same over other axes."""
    def dim(axes: tuple[Axis, ...]) -> tuple[Axis, ...]:
        return tuple(names.get(a, a) for a in resolve(axes))

    if isinstance(item, Ref):
        return Ref(item.node, tuple(map(dim, item.layout)))
    return Term(item.op, tuple(_renamed(a, names) for a in item.args), item.value, dim(item.axes))


def varies(item: Item) -> frozenset[Axis]:
    """Axes along which it varies, as far as its tensors tell."""
    if isinstance(item, Ref):
        return axes_of(item.layout)
    inside = frozenset().union(*(varies(a) for a in item.args)) if item.args else frozenset()
    return inside - set(resolve(item.axes)) if item.op == "reduce" else inside
