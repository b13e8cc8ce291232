"""One call as a kernel sees it: axes, sizes, strides, and whether it is taken at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.spec import Spec, leading_axes
from attnopt.kernels.aten.tile import broadcast
from attnopt.kernels.triton.layout import Argument, Signature
from attnopt.kernels.triton.scores import WEIGHT
from attnopt.kernels.triton.tiles import widest
from attnopt.kernels.triton.widths import inner_slots, needs_wide

#: a step of a tile's rows may be this long before 32 bits do not hold its offsets
_LONGEST_STRIDE = 2**31 // 256
_INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, eq=False)
class Problem:
    """A call that the kernels take.

    tensors: query, key, value, and operands as "op_<slot>"; sizes: by axis name
    dims:    the axis of each tensor that a name means, counted from the right
    """

    signature: Signature
    tensors: dict[str, Tensor]
    sizes: dict[str, int]
    dims: dict[str, dict[str, int]]
    leading: tuple[int, ...]

    @property
    def programs(self) -> int:
        """Entries of the leading axes."""
        count = 1
        for n in self.leading:
            count *= n
        return count

    def axes_of(self, name: str) -> tuple[str, ...]:
        """Leading axes along which a matrix varies."""
        return getattr(self.signature, name, self.signature.axes)  # type: ignore[no-any-return]

    def value_of(self, argument: Argument, more: Mapping[str, Tensor],
                 numbers: Mapping[str, float] | None = None) -> object:
        """What is passed for an argument; `more` are outputs and lists by name."""
        of, axis = argument.of, argument.axis
        if argument.kind == "size":
            return self.sizes[axis]
        if argument.kind == "list":
            return more[of]
        if argument.kind == "number":
            return (numbers or {})[of]
        tensor = more[of] if of in more else self.tensors.get(of)
        if tensor is None:
            tensor = self.tensors[f"op_{of}"]
            of = f"op_{of}"
        if argument.kind == "pointer":
            return as_bytes(tensor)
        place = int(axis) if axis.isdigit() else self.dims[of][axis]
        if place < -tensor.dim():
            return 0
        length = tensor.shape[place]
        if argument.kind == "length":
            return length
        return tensor.stride(place) if length != 1 else 0


def as_bytes(tensor: Tensor) -> Tensor:
    """A bool tensor as the bytes that it is made of: a mask in memory is no int1."""
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor


def describe(spec: Spec, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
             lse: bool = False) -> Problem | str:
    """The call as a Problem, or why the kernels do not take it."""
    given = (query, key, value)
    if len({t.dtype for t in given}) != 1 or query.dtype not in _FLOATS:
        return "query, key and value must be of one dtype, float16, bfloat16 or float32"
    if len({t.device for t in (*given, *operands)}) != 1:
        return "all tensors must be on one device"
    if min(t.dim() for t in given) < 2 or any(0 in t.shape for t in given):
        return "query, key and value must have two axes or more, none of them empty"
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        return "query, key and value must fit each other"
    if max(query.shape[-1], value.shape[-1]) > widest(query.element_size()):
        return f"head_dim must be {widest(query.element_size())} or less for {query.dtype}"
    try:
        leading = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    except ValueError as error:
        return str(error)
    axes = leading_axes(len(leading))
    sizes = dict(zip(axes, leading, strict=True)) | {
        "q": query.shape[-2], "k": key.shape[-2], "d": value.shape[-1]}
    if E.value in spec.output.leaves and sizes["q"] != sizes["k"]:
        return "an output that reads the row of the values must have as many queries as keys"
    query, key, value = (_walkable(t) for t in given)
    tensors = {"query": query, "key": key, "value": value}
    dims = {name: _dims(axes, rows) for name, rows in (
        ("query", "q"), ("key", "k"), ("value", "k"), ("out", "q"))}
    dims["lse"] = {"q": -1} | {a: i - len(axes) - 1 for i, a in enumerate(axes)}
    factors = inner_slots((spec.logits, spec.weights))
    for described, tensor in zip(spec.operands, operands, strict=True):
        if tensor.dtype not in (*_INTEGERS, *_FLOATS):
            return f"operand {described.slot} must not be of {tensor.dtype}"
        if 0 in tensor.shape:
            return f"operand {described.slot} must not be empty"
        name = f"op_{described.slot}"
        tensors[name] = tensor
        if described.slot == WEIGHT and spec.score == "additive":
            dims[name] = {a: i - len(axes) - 1 for i, a in enumerate(axes)} | {"d": -1}
            if tensor.shape[-1] != query.shape[-1] or not _fits(
                    tensor, dims[name], sizes | {"d": query.shape[-1]}, (*axes, "d")):
                return f"operand {WEIGHT} must be of shape (D,) or (*L, D)"
            continue
        dims[name] = _operand_dims(axes, described.axes or (), described.slot in factors)
        if described.axes is not None and not _fits(
                tensor, dims[name], sizes, described.axes):
            return f"operand {described.slot} must vary along {described.axes} only"
    def varying(tensor: Tensor) -> tuple[str, ...]:
        return tuple(a for i, (a, n) in enumerate(zip(axes, leading, strict=True))
                     if _varies(tensor, i - len(axes) - 2, n))

    named = {d.slot: t for d, t in zip(spec.operands, operands, strict=True)}
    signature = Signature(
        axes, varying(query), varying(key), varying(value), wide=needs_wide(spec, sizes, named),
        lse=lse, two_passes=spec.l1 and query.dtype == torch.float16)
    return Problem(signature, tensors, sizes, dims, leading)


def _walkable(tensor: Tensor) -> Tensor:
    far = max(abs(tensor.stride(-1)), abs(tensor.stride(-2))) > _LONGEST_STRIDE
    return tensor.contiguous() if far else tensor


def _dims(axes: Sequence[str], rows: str) -> dict[str, int]:
    return {rows: -2, "d": -1} | {a: i - len(axes) - 2 for i, a in enumerate(axes)}


def _operand_dims(axes: Sequence[str], own: Sequence[str], factor: bool) -> dict[str, int]:
    dims = {a: i - len(axes) - 2 for i, a in enumerate(axes)}
    if factor:
        return dims | {"q": -2, "k": -2, "r": -1}
    return dims | {"q": -2, "d" if "d" in own else "k": -1}


def _fits(tensor: Tensor, dims: Mapping[str, int], sizes: Mapping[str, int],
          own: Sequence[str]) -> bool:
    """Whether the operand's lengths are those of its own axes, or 1."""
    names: dict[int, set[str]] = {}
    for name, place in dims.items():
        if name in own or name == "r":
            names.setdefault(place, set()).add(name)
    for place in range(-tensor.dim(), 0):
        length = tensor.shape[place]
        if length == 1 or "r" in names.get(place, ()):
            continue
        if not any(sizes.get(name) == length for name in names.get(place, ())):
            return False
    return True


def _varies(tensor: Tensor, place: int, length: int) -> bool:
    if place < -tensor.dim():
        return False
    return length == 1 or tensor.shape[place] != 1 and tensor.stride(place) != 0
