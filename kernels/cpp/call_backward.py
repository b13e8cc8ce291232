"""Calling a compiled kernel of gradients; see `attnopt.kernels.cpp.call`."""

from __future__ import annotations

import ctypes
import functools
import math
from array import array
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import leading_axes
from attnopt.kernels.aten.tile import broadcast
from attnopt.kernels.cpp.call import Lists, matrix, operand, table, tile_lists
from attnopt.kernels.cpp.isa import Isa, isa
from attnopt.kernels.cpp.template import Signature, Tile, is_table
from attnopt.kernels.cpp.template_backward import backward_source, loads_of
from attnopt.kernels.cpp.toolchain import compile_all, load

#: roles of leading axes, as in `backward.h`
SHARED, LOOPED, SPLIT = range(3)
#: copies of a gradient that tasks share: fewest and most, and elements of all of them that cost
#: nothing
FEWEST, MOST, FREE = 8, 64, 1 << 14


class Backward:
    """One compiled kernel of gradients; `wanted` are slots of operands."""

    def __init__(self, signature: Signature, wanted: tuple[str, ...], tile: Tile,
                 target: Isa | None = None) -> None:
        self.signature, self.wanted, self.tile = signature, wanted, tile
        self.source = backward_source(signature, wanted, tile, (target or isa()).width)
        self.path = compile_all([self.source], target)[0]
        self.tables = {
            slot: _places_of_axes(loads_of(signature.spec, slot), signature.rank)
            for slot in wanted if is_table(signature.spec.operand(slot))}
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
        learned = {o.slot: t for o, t in zip(spec.operands, operands, strict=True)
                   if o.slot in self.wanted}
        apart = [self.apart(slot, t, leads) for slot, t in learned.items()]
        roles = [_role(axis - rank, (key, value), apart) for axis in range(rank)]
        blocks = _blocks(math.prod(n for n, role in zip(leads, roles, strict=True)
                                   if role == LOOPED), learned.values(), query.numel())
        sums = {slot: torch.zeros((blocks, *t.shape), dtype=torch.float32, device="cpu")
                for slot, t in learned.items()}
        owned = tuple(1 if role == SHARED else n for n, role in zip(leads, roles, strict=True))
        found = [_empty(t, (*lead, *t.shape[-2:])) if want else None
                 for t, lead, want in zip(inputs, (leads, owned, owned), asked, strict=True)]
        words = [threads or torch.get_num_threads(), rows, keys, *leads, *roles]
        for tensor in (*inputs, out):
            words += matrix(tensor, rank)
        words.append(blocks)
        for asked_for in (grad, statistics, *found):
            words += matrix(asked_for, rank)
        words += tile_lists(lists, rank)
        for described, tensor in zip(spec.operands, operands, strict=True):
            words += operand(described, tensor, rank, (keys, value.shape[-1]))
        for slot in self.wanted:
            first = sums[slot][0]
            words += table(first) if slot in self.tables else matrix(first, rank)
            words.append(sums[slot].stride(0))
        arguments = array("q", words)
        self.function(arguments.buffer_info()[0])
        return [
            *(None if g is None else g if g.shape == t.shape else g.sum_to_size(t.shape)
              for g, t in zip(found, inputs, strict=True)),
            *(_total(sums[o.slot]).to(t.dtype) if o.slot in sums else None
              for o, t in zip(spec.operands, operands, strict=True))]

    def apart(self, slot: str, tensor: Tensor, leads: Sequence[int]) -> set[int]:
        """Leading axes, counted from the right of these, along which tasks add to other elements
        of an operand's gradient."""
        if slot in self.tables:
            own = self.tables[slot]
            return {i for i in own if -i <= len(leads) and any(
                tensor.shape[place] >= leads[i] for place in own[i])}
        return {i for i in range(-len(leads), 0)
                if tensor.dim() >= 2 - i and tensor.shape[i - 2] != 1}


def _places_of_axes(loads: Sequence[Expr], rank: int) -> dict[int, set[int]]:
    """Which axes of a table follow a leading axis of the scores, in every load of it."""
    found = {}
    for i, axis in enumerate(leading_axes(rank), -rank):
        found[i] = set.intersection(*(
            {place for place, e in enumerate(load.args) if e is E.index(axis)} for load in loads))
    return found


def _role(axis: int, owners: Sequence[Tensor], apart: Sequence[set[int]]) -> int:
    """What tasks do with a leading axis, counted from the right of these."""
    if not any(t.dim() >= 2 - axis and t.shape[axis - 2] != 1 for t in owners):
        return SHARED
    return SPLIT if all(axis in axes for axes in apart) else LOOPED


def _blocks(looped: int, learned: Iterable[Tensor], most: int) -> int:
    """Into how many blocks tasks are split that add to the same elements: some, which keeps threads
    busy and sums short, as far as their copies are no larger than `most` elements."""
    size = max(1, sum(t.numel() for t in learned))
    wanted = min(looped, max(FEWEST, min(MOST, FREE // size)))
    return max(1, min(wanted, max(most, FREE) // size))


def _total(copies: Tensor) -> Tensor:
    return copies.sum(0) if len(copies) > 1 else copies[0]


def _empty(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Memory for a gradient, in the layout of the tensor where that has the same shape."""
    return torch.empty_like(tensor) if tensor.shape == shape else tensor.new_empty(shape)


@functools.lru_cache(maxsize=512)
def backward(signature: Signature, wanted: tuple[str, ...], tile: Tile,
             target: Isa | None = None) -> Backward:
    """The kernel of gradients, compiled once."""
    return Backward(signature, wanted, tile, target)
