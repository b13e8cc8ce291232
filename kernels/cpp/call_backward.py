"""Calling a compiled kernel of gradients; see `attnopt.kernels.cpp.call`."""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.kernels.aten.tile import broadcast
from attnopt.kernels.cpp.call import Lists, matrix, operand, tile_lists
from attnopt.kernels.cpp.isa import Isa, isa
from attnopt.kernels.cpp.template import Signature, Tile
from attnopt.kernels.cpp.template_backward import backward_source
from attnopt.kernels.cpp.toolchain import compile_all, load

#: roles of leading axes, as in `backward.h`
SHARED, LOOPED, SPLIT = range(3)


class Backward:
    """One compiled kernel of gradients; `wanted` are slots of operands."""

    def __init__(self, signature: Signature, wanted: tuple[str, ...], tile: Tile,
                 target: Isa | None = None) -> None:
        self.signature, self.wanted, self.tile = signature, wanted, tile
        self.source = backward_source(signature, wanted, tile, (target or isa()).width)
        self.path = compile_all([self.source], target)[0]
        self.function = load(self.path).gradients
        self.function.argtypes, self.function.restype = [ctypes.c_void_p], None

    def __call__(self, inputs: Sequence[Tensor], operands: Sequence[Tensor], out: Tensor,
                 statistics: Tensor, grad: Tensor, asked: Sequence[bool] = (True, True, True), *,
                 lists: Lists | None = None, threads: int | None = None) -> list[Tensor | None]:
        """The gradients of query, key, value and of all operands, None where they are not asked
        for.

        inputs: query (*L, Q, D), key (*L, K, D), value (*L, K, Dv); out and grad: (*L, Q, Dv);
        statistics: of the forward kernel, (*L, Q, 2) in float32; asked: of the inputs
        """
        spec = self.signature.spec
        query, key, value = inputs
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        rank, rows, keys = len(leads), query.shape[-2], key.shape[-2]
        sums = {slot: torch.zeros(t.shape, dtype=torch.float32, device="cpu")
                for o, t in zip(spec.operands, operands, strict=True)
                if (slot := o.slot) in self.wanted}
        roles = [_role(axis - rank, (key, value), tuple(sums.values())) for axis in range(rank)]
        owned = tuple(1 if role == SHARED else n for n, role in zip(leads, roles, strict=True))
        found = [_empty(t, (*lead, *t.shape[-2:])) if want else None
                 for t, lead, want in zip(inputs, (leads, owned, owned), asked, strict=True)]
        words = [threads or torch.get_num_threads(), rows, keys, *leads, *roles]
        for tensor in (*inputs, out, grad, statistics, *found):
            words += matrix(tensor, rank)
        words += tile_lists(lists, rank)
        for described, tensor in zip(spec.operands, operands, strict=True):
            words += operand(described, tensor, rank, (keys, value.shape[-1]))
        for slot in self.wanted:
            words += matrix(sums[slot], rank)
        arguments = array("q", words)
        self.function(arguments.buffer_info()[0])
        return [
            *(None if g is None else g if g.shape == t.shape else g.sum_to_size(t.shape)
              for g, t in zip(found, inputs, strict=True)),
            *(sums[o.slot].to(t.dtype) if o.slot in sums else None
              for o, t in zip(spec.operands, operands, strict=True))]


def _role(axis: int, owners: Sequence[Tensor], sums: Sequence[Tensor]) -> int:
    """What tasks do with a leading axis, counted from the right of these."""
    def varies(tensor: Tensor) -> bool:
        return tensor.dim() >= 2 - axis and tensor.shape[axis - 2] != 1

    if not any(map(varies, owners)):
        return SHARED
    return SPLIT if all(map(varies, sums)) else LOOPED


def _empty(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for a gradient, in the layout of the tensor where that has the same shape."""
    return torch.empty_like(tensor) if tensor.shape == shape else tensor.new_empty(shape)


@functools.lru_cache(maxsize=512)
def backward(signature: Signature, wanted: tuple[str, ...], tile: Tile,
             target: Isa | None = None) -> Backward:
    """The kernel of gradients, compiled once."""
    return Backward(signature, wanted, tile, target)
