"""ONNX operators in torch, as far as attention and its masks and biases are made of them.

`OPS[name](node, args)` computes one node. A size is a `Sizes`, an object array of ints or symbolic
ints, so that shape arithmetic (Shape, Gather, Concat, Mul, ...) stays exact for dynamic sizes; all
else is a Tensor. Semantics: the operators' specification, opsets 13 to 25.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.errors import AttnOptError

#: what an argument can be: a tensor, sizes, or None where it is left out
Argument = Any
#: sizes up to which a constant of integers may stand for sizes
_MOST_SIZES = 32


class Unknown(AttnOptError):
    """An operator or one of its forms that has no counterpart here."""


def is_sizes(value: Argument) -> bool:
    """Whether a value is an array of sizes."""
    return isinstance(value, np.ndarray)


def tensor(value: Argument, device: Any = None) -> Tensor:
    """A value as a tensor."""
    if not is_sizes(value):
        assert isinstance(value, Tensor)
        return value
    flat = [x if isinstance(x, (int, torch.SymInt)) else int(x) for x in value.flatten()]
    if all(isinstance(x, int) for x in flat):
        return torch.tensor(flat, dtype=torch.int64, device=device).reshape(value.shape)
    return torch.stack([torch.scalar_tensor(x, dtype=torch.int64)  # type: ignore[arg-type]
                        for x in flat]).reshape(
        value.shape)


def numbers(value: Argument) -> list[Any]:
    """The sizes that a value stands for."""
    if is_sizes(value):
        return list(value.flatten())
    raise Unknown("sizes must follow from sizes, got data")


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """The value of an attribute."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def dtype_of(code: int) -> torch.dtype:
    """The torch dtype of ONNX's number for it."""
    found = getattr(torch, _DTYPES.get(int(code), ""), None)
    if not isinstance(found, torch.dtype):
        raise Unknown(f"dtype {code} is unknown")
    return found


_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool",
           10: "float16", 11: "float64", 16: "bfloat16"}


def _axes(node: ir.Node, args: Sequence[Argument], place: int) -> list[int] | None:
    """Axes as an attribute (older opsets) or as an input."""
    if attribute(node, "axes") is not None:
        return [int(a) for a in attribute(node, "axes")]
    if len(args) > place and args[place] is not None:
        return [int(a) for a in numbers(args[place])]
    return None


# -- elementwise ---------------------------------------------------------------------------------
def _divide(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and not a.is_floating_point():
        return torch.div(a, b, rounding_mode="trunc")
    return a / b


def _elementwise(fn: Callable[..., Tensor], of_sizes: Callable[..., Any] | None = None
                 ) -> Callable[..., Any]:
    def run(node: ir.Node, args: Sequence[Argument]) -> Any:
        if of_sizes is not None and all(is_sizes(a) for a in args):
            return np.asarray(of_sizes(*args), dtype=object)
        return fn(*(tensor(a) for a in args))

    return run


def _variadic(fn: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    def run(node: ir.Node, args: Sequence[Argument]) -> Any:
        found = tensor(args[0])
        for other in args[1:]:
            found = fn(found, tensor(other))
        return found

    return run


def _where(node: ir.Node, args: Sequence[Argument]) -> Any:
    if all(is_sizes(a) for a in args):
        return np.asarray(np.where(args[0].astype(bool), args[1], args[2]), dtype=object)
    return torch.where(tensor(args[0]).bool(), tensor(args[1]), tensor(args[2]))


def _cast(node: ir.Node, args: Sequence[Argument]) -> Any:
    dtype = dtype_of(attribute(node, "to"))
    if is_sizes(args[0]) and dtype in (torch.int64, torch.int32):
        return args[0]
    return tensor(args[0]).to(dtype)


def _clip(node: ir.Node, args: Sequence[Argument]) -> Any:
    low, high = ((tensor(args[i]) if len(args) > i and args[i] is not None else None)
                 for i in (1, 2))
    found = tensor(args[0])
    found = found if low is None else torch.maximum(found, low)
    return found if high is None else torch.minimum(found, high)


# -- shapes and data movement --------------------------------------------------------------------
def _shape(node: ir.Node, args: Sequence[Argument]) -> Any:
    shape = list(args[0].shape)[attribute(node, "start", 0):attribute(node, "end")]
    return np.array([*shape, None], dtype=object)[:-1]


def _reshape(node: ir.Node, args: Sequence[Argument]) -> Any:
    sizes = numbers(args[1])
    if is_sizes(args[0]):
        return args[0].reshape([int(s) for s in sizes])
    if not attribute(node, "allowzero", 0):
        sizes = [args[0].shape[i] if isinstance(s, int) and s == 0 else s
                 for i, s in enumerate(sizes)]
    return tensor(args[0]).reshape(sizes)


def _transpose(node: ir.Node, args: Sequence[Argument]) -> Any:
    x = tensor(args[0])
    return x.permute(*(attribute(node, "perm") or reversed(range(x.dim()))))


def _unsqueeze(node: ir.Node, args: Sequence[Argument]) -> Any:
    axes = _axes(node, args, 1) or []
    rank = args[0].ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        args = [np.expand_dims(args[0], axis) if is_sizes(args[0]) else args[0].unsqueeze(axis)]
    return args[0]


def _squeeze(node: ir.Node, args: Sequence[Argument]) -> Any:
    axes = _axes(node, args, 1)
    x = args[0]
    if axes is None:
        axes = [i for i, n in enumerate(x.shape) if isinstance(n, int) and n == 1]
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = np.asarray(np.squeeze(x, axis), dtype=object) if is_sizes(x) else x.squeeze(axis)
    return x


def _expand(node: ir.Node, args: Sequence[Argument]) -> Any:
    x, sizes = tensor(args[0]), numbers(args[1])
    rank = max(x.dim(), len(sizes))
    own = [1] * (rank - x.dim()) + list(x.shape)
    wanted = [1] * (rank - len(sizes)) + sizes
    return x.expand([a if isinstance(b, int) and b == 1 else b
                     for a, b in zip(own, wanted, strict=True)])


def _concat(node: ir.Node, args: Sequence[Argument]) -> Any:
    if all(is_sizes(a) for a in args):
        return np.concatenate(list(args), axis=attribute(node, "axis"))
    return torch.cat([tensor(a) for a in args], attribute(node, "axis"))


def _split(node: ir.Node, args: Sequence[Argument]) -> Any:
    x, axis = tensor(args[0]), attribute(node, "axis", 0)
    if len(args) > 1 and args[1] is not None:
        return x.split(numbers(args[1]), axis)
    parts = attribute(node, "num_outputs", len(node.outputs))
    return x.split(-(-x.shape[axis] // parts), axis)


def _slice(node: ir.Node, args: Sequence[Argument]) -> Any:
    x, starts, ends = args[0], numbers(args[1]), numbers(args[2])
    axes = numbers(args[3]) if len(args) > 3 and args[3] is not None else range(len(starts))
    steps = numbers(args[4]) if len(args) > 4 and args[4] is not None else [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = int(axis) % x.ndim
        if int(step) > 0:
            end = x.shape[axis] if isinstance(end, int) and end >= 1 << 31 else end
            index = (slice(None),) * axis + (slice(start, end, int(step)),)
            x = x[index]
        elif step == -1 and start == -1 and isinstance(end, int) and end < -(1 << 30):
            x = np.flip(x, axis) if is_sizes(x) else x.flip(axis)
        else:
            raise Unknown("a Slice that goes back must be of a whole axis")
    return x


def _gather(node: ir.Node, args: Sequence[Argument]) -> Any:
    axis = attribute(node, "axis", 0)
    if is_sizes(args[0]) and is_sizes(args[1]):
        return np.asarray(np.take(args[0], args[1].astype(int), axis=axis), dtype=object)
    x, axis = tensor(args[0]), axis % args[0].ndim
    if is_sizes(args[1]) and args[1].ndim == 0:
        return x.select(axis, args[1].item())
    index = tensor(args[1]).long()
    index = torch.where(index < 0, index + x.shape[axis], index)
    found = x.index_select(axis, index.flatten())
    return found.reshape([*x.shape[:axis], *index.shape, *x.shape[axis + 1:]])


def _gather_elements(node: ir.Node, args: Sequence[Argument]) -> Any:
    x, axis = tensor(args[0]), attribute(node, "axis", 0)
    index = tensor(args[1]).long()
    return x.gather(axis, torch.where(index < 0, index + x.shape[axis], index))


def _pad(node: ir.Node, args: Sequence[Argument]) -> Any:
    if attribute(node, "mode", "constant") != "constant":
        raise Unknown("the mode of a Pad must be constant")
    x, pads = tensor(args[0]), numbers(args[1])
    axes = numbers(args[3]) if len(args) > 3 and args[3] is not None else list(range(x.dim()))
    value = 0.0
    if len(args) > 2 and args[2] is not None:
        given = args[2]
        value = given.item() if is_sizes(given) or given.numel() == 1 else 0.0
    around = [0] * (2 * x.dim())
    for i, axis in enumerate(axes):
        place = 2 * (x.dim() - 1 - int(axis) % x.dim())
        around[place], around[place + 1] = pads[i], pads[i + len(axes)]
    return F.pad(x, around, value=value)


def _constant_of_shape(node: ir.Node, args: Sequence[Argument]) -> Any:
    value = attribute(node, "value")
    numpy = np.zeros(1, np.float32) if value is None else value.numpy()
    return torch.full(numbers(args[0]), numpy.item(), dtype=torch.from_numpy(numpy.copy()).dtype)


def _range(node: ir.Node, args: Sequence[Argument]) -> Any:
    return torch.arange(*(a.item() if is_sizes(a) else _number(a) for a in args))


def _number(value: Tensor) -> Any:
    raise Unknown("the ends of a Range must be sizes")


def _trilu(node: ir.Node, args: Sequence[Argument]) -> Any:
    k = 0 if len(args) < 2 or args[1] is None else int(numbers(args[1])[0])
    return (torch.triu if attribute(node, "upper", 1) else torch.tril)(tensor(args[0]), k)


# -- sums and products ---------------------------------------------------------------------------
def _reduce(fn: Callable[..., Tensor]) -> Callable[..., Any]:
    def run(node: ir.Node, args: Sequence[Argument]) -> Any:
        axes, x = _axes(node, args, 1), tensor(args[0])
        if axes is None and attribute(node, "noop_with_empty_axes", 0):
            return x
        return fn(x, axes or list(range(x.dim())), bool(attribute(node, "keepdims", 1)))

    return run


def _gemm(node: ir.Node, args: Sequence[Argument]) -> Any:
    a, b = (tensor(x) for x in args[:2])
    a, b = (x.t() if attribute(node, t, 0) else x for x, t in ((a, "transA"), (b, "transB")))
    out = attribute(node, "alpha", 1.0) * (a @ b)
    return out if len(args) < 3 or args[2] is None else (
        out + attribute(node, "beta", 1.0) * tensor(args[2]))


def _softmax(node: ir.Node, args: Sequence[Argument]) -> Any:
    return tensor(args[0]).softmax(attribute(node, "axis", -1))


def _dropout(node: ir.Node, args: Sequence[Argument]) -> Any:
    if len(args) > 2 and args[2] is not None:
        raise Unknown("a Dropout must not be told that it trains")
    return args[0]


def _attention(node: ir.Node, args: Sequence[Argument]) -> Any:
    if len([o for o in node.outputs if o.name]) > 1 or any(a is not None for a in args[4:]) or any(
            attribute(node, n, d) not in (d, None) for n, d in (
                ("left_window_size", -1), ("right_window_size", -1))):
        raise Unknown("an Attention with a cache, windows or more outputs is left as it is")
    q, k, v = (tensor(a) for a in args[:3])
    flat = q.dim() == 3
    if flat:
        counts = (attribute(node, "q_num_heads"), *[attribute(node, "kv_num_heads")] * 2)
        q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2)
                   for x, n in zip((q, k, v), counts, strict=True))
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scale = attribute(node, "scale") or 1.0 / math.sqrt(q.shape[-1])
    cap = attribute(node, "softcap", 0.0)
    given = tensor(args[3]) if len(args) > 3 and args[3] is not None else None
    if not cap and not attribute(node, "is_causal", 0) and given is not None:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=given, scale=scale)
        return out.transpose(1, 2).flatten(-2) if flat else out
    scores = (q @ k.transpose(-1, -2)) * scale
    scores = (scores / cap).tanh() * cap if cap else scores
    rows, keys = scores.shape[-2:]
    seen: Tensor | None = None
    if given is not None:
        mask = given
        if mask.dtype == torch.bool:
            seen = mask
        else:
            scores = scores + mask
    if attribute(node, "is_causal", 0):
        below = torch.arange(keys) <= torch.arange(rows)[:, None]
        seen = below if seen is None else seen & below
    if seen is not None:
        scores = scores.masked_fill(~seen, -math.inf)
    weights = scores.softmax(-1)
    if seen is not None:
        weights = torch.where(weights.isnan(), 0.0, weights)
    out = weights @ v
    return out.transpose(1, 2).flatten(-2) if flat else out


def _einsum(node: ir.Node, args: Sequence[Argument]) -> Any:
    return torch.einsum(attribute(node, "equation"), *(tensor(a) for a in args))


OPS: dict[str, Callable[[ir.Node, Sequence[Argument]], Any]] = {
    "Add": _elementwise(torch.add, lambda a, b: a + b),
    "Sub": _elementwise(torch.sub, lambda a, b: a - b),
    "Mul": _elementwise(torch.mul, lambda a, b: a * b),
    "Div": _elementwise(_divide, lambda a, b: a // b),
    "Equal": _elementwise(torch.eq, lambda a, b: a == b),
    **{name: _elementwise(getattr(torch, fn)) for name, fn in (
        ("Pow", "pow"), ("Neg", "neg"), ("Abs", "abs"), ("Exp", "exp"), ("Log", "log"),
        ("Sqrt", "sqrt"), ("Reciprocal", "reciprocal"), ("Tanh", "tanh"), ("Sigmoid", "sigmoid"),
        ("Floor", "floor"), ("Ceil", "ceil"), ("Erf", "erf"), ("Relu", "relu"),
        ("Not", "logical_not"),
        ("Greater", "gt"), ("GreaterOrEqual", "ge"), ("Less", "lt"), ("LessOrEqual", "le"),
        ("IsNaN", "isnan"), ("And", "logical_and"), ("Or", "logical_or"), ("Xor", "logical_xor"),
        ("Sign", "sign"))},
    "Mod": lambda node, args: (torch.fmod if attribute(node, "fmod", 0) else torch.remainder)(
        tensor(args[0]), tensor(args[1])),
    "Min": _variadic(torch.minimum), "Max": _variadic(torch.maximum), "Sum": _variadic(torch.add),
    "Where": _where, "Cast": _cast, "Clip": _clip,
    "Identity": lambda node, args: args[0], "Dropout": _dropout,
    "Shape": _shape, "Reshape": _reshape, "Transpose": _transpose, "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze, "Expand": _expand, "Concat": _concat, "Split": _split, "Slice": _slice,
    "Gather": _gather, "GatherElements": _gather_elements, "Pad": _pad,
    "ConstantOfShape": _constant_of_shape, "Range": _range, "Trilu": _trilu,
    "ReduceSum": _reduce(lambda x, axes, keep: x.sum(axes, keep)),
    "ReduceMean": _reduce(lambda x, axes, keep: x.mean(axes, keep)),
    "ReduceMax": _reduce(lambda x, axes, keep: x.amax(axes, keep)),
    "ReduceMin": _reduce(lambda x, axes, keep: x.amin(axes, keep)),
    "MatMul": _elementwise(torch.matmul), "Gemm": _gemm, "Einsum": _einsum, "Softmax": _softmax,
    "Attention": _attention,
}


def sizes_of(value: Tensor) -> np.ndarray[Any, Any] | None:
    """A constant as sizes, if it can be."""
    if value.dtype != torch.int64 or value.dim() > 1 or value.numel() > _MOST_SIZES:
        return None
    found = np.empty(value.shape, dtype=object)
    found[...] = np.array(value.tolist(), dtype=object)
    return found
