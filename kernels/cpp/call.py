"""Calling a compiled kernel: tensors as one array of words, nothing copied that has strides.

A kernel reads 64-bit words in the order of `forward.h`: threads, lengths, then every tensor as its
address and its strides in elements, 0 where it broadcasts.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.aten.tile import broadcast
from attnopt.kernels.cpp.isa import Isa, isa
from attnopt.kernels.cpp.template import ELEMENTS, Signature, Tile, is_table, source
from attnopt.kernels.cpp.toolchain import compile_all, load

#: names of torch dtypes that kernels read
DTYPES = {getattr(torch, name): name for name in ELEMENTS}
#: the key tiles of every query tile: where they begin, int32 (*L or 1, query tiles + 1), and key
#: tile * 2 + (1 where some of it may be hidden), int32
Lists = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Gathers:
    """Query tiles of any rows, whose keys are gathered: what a kernel with a box reads.

    lists:  as `Lists`, with the number of keys * 2 + (1 where some may be hidden) for each tile
    tokens: int32 (key tiles * keys of a tile): the keys of every tile, K where there is none
    order:  int32 (query tiles * rows of a tile): the rows of every query tile, then -1
    tiles:  number of query tiles
    """

    lists: Lists
    tokens: Tensor
    order: Tensor
    tiles: int


@dataclass(frozen=True)
class Places:
    """Windows of a map: which of its tokens each row is, for the kernel for few keys.

    tokens: int32 (windows of a map, rows of a window); length: tokens of a map; along: the leading
    axis that counts maps on the side of the tensors, and maps * windows on that of the Spec
    """

    tokens: Tensor
    length: int
    along: int


class Kernel:
    """One compiled kernel, ready to be called with tensors."""

    def __init__(self, signature: Signature, tile: Tile, target: Isa | None = None) -> None:
        self.signature, self.tile = signature, tile
        self.source = source(signature, tile, (target or isa()).width)
        self.path = compile_all([self.source], target)[0]
        self.function = load(self.path).attention
        self.function.argtypes, self.function.restype = [ctypes.c_void_p], None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor] = (),
                 *, lists: Lists | Gathers | None = None, statistics: Tensor | None = None,
                 threads: int | None = None, places: Places | None = None) -> Tensor:
        """query (*L, Q, D), key (*L, K, D), value (*L, K, Dv) -> (*L, Q, Dv); with `places` the
        rows of all of them are tokens of maps.

        statistics: float32 (*L, Q, 2), to be filled with what turns logits x of a row into weights:
        (shift, inverse) with weight = exp(x - shift) * inverse. Normalisers other than softmax have
        shift 0 and the inverse of their sum.
        """
        spec = self.signature.spec
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        rows, keys = query.shape[-2], key.shape[-2]
        out = empty_like_fused(query, (*leads, rows, value.shape[-1]))
        if out.numel() == 0:
            return out
        own = [int(_differs(t, i, leads)) for i in range(len(leads)) for t in [(key, value)]]
        if places is not None:
            windows, rows = places.tokens.shape
            keys = rows
            leads = tuple(n * windows if i == places.along else n for i, n in enumerate(leads))
        words = [threads or torch.get_num_threads(), rows, keys, *leads, *own]
        rank = len(leads)
        for tensor in (query, key, value, out):
            words += matrix(tensor, rank)
        words += matrix(statistics, rank)
        if self.tile.whole:
            words += [0, 0, 1] if places is None else [
                places.tokens.data_ptr(), places.along, len(places.tokens)]
        elif self.tile.box:
            if not isinstance(lists, Gathers):
                raise ValueError(f"lists must be Gathers for a box, got {type(lists).__name__}")
            words += tile_lists(lists.lists, rank)
            words += [lists.tokens.data_ptr(), lists.order.data_ptr(), lists.tiles]
        else:
            if isinstance(lists, Gathers):
                raise ValueError("lists must be of aligned tiles without a box, got Gathers")
            words += tile_lists(lists, rank)
        for described, tensor in zip(spec.operands, operands, strict=True):
            words += operand(described, tensor, rank, (keys, value.shape[-1]))
        arguments = array("q", words)
        self.function(arguments.buffer_info()[0])
        return out


def empty_like_fused(query: Tensor, shape: Sequence[int]) -> Tensor:
    """An output whose rows of all heads lie side by side, as torch's fused attention gives it: the
    transpose and reshape that follow it in most models then cost nothing."""
    if len(shape) != 4:
        return query.new_empty(shape)
    batch, heads, rows, width = shape
    return query.new_empty(batch, rows, heads, width).transpose(1, 2)


def log_sum_exp(statistics: Tensor) -> Tensor:
    """The log-sum-exp (*L, Q) of statistics (*L, Q, 2); -inf where a row has no key."""
    shift, inverse = statistics.unbind(-1)
    return torch.where(shift == -torch.inf, -torch.inf, shift - inverse.log())


def matrix(tensor: Tensor | None, rank: int) -> list[int]:
    """Address and strides (leading axes, row, column) of a tensor of at most rank + 2 axes."""
    if tensor is None:
        return [0] * (rank + 3)
    return [tensor.data_ptr(), *_strides(tensor, rank, 2)]


def tile_lists(lists: Lists | None, rank: int) -> list[int]:
    """The words of tile lists."""
    if lists is None:
        return [0] * (rank + 2)
    pointers, tiles = lists
    return [pointers.data_ptr(), tiles.data_ptr(), *_strides(pointers, rank, 1)[:-1]]


def _strides(tensor: Tensor, rank: int, last: int) -> list[int]:
    strides = [0 if n == 1 else s for n, s in zip(tensor.shape, tensor.stride(), strict=True)]
    return [0] * (rank + last - len(strides)) + strides


def operand(described: Operand, tensor: Tensor, rank: int, columns: tuple[int, int]) -> list[int]:
    """The words of an operand: a matrix and its number of columns, or a table."""
    if described.slot == "score_weight":
        tensor = tensor.unsqueeze(-2)  # (D,) or (*L, D): one row
    if is_table(described):
        return table(tensor)
    width = tensor.shape[-1] if tensor.dim() else 1
    return [*matrix(tensor, rank), columns[0] if width == 1 else width]


def table(tensor: Tensor) -> list[int]:
    """The words of a table that is gathered."""
    return [tensor.data_ptr(), *tensor.shape, *tensor.stride()]


def _differs(tensors: Sequence[Tensor], axis: int, leads: Sequence[int]) -> bool:
    place = axis - len(leads) - 2
    return any(t.dim() >= -place and t.shape[place] != 1 and t.stride(place) != 0 for t in tensors)


@functools.lru_cache(maxsize=512)
def kernel(signature: Signature, tile: Tile, target: Isa | None = None) -> Kernel:
    """The kernel of a signature and a tile, compiled once."""
    return Kernel(signature, tile, target)


def signature_of(spec: Spec, query: Tensor, key: Tensor, value: Tensor,
                 operands: Sequence[Tensor]) -> Signature:
    """What to compile for these tensors."""
    rank = len(broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2]))
    return Signature(spec, DTYPES[query.dtype], query.shape[-1], value.shape[-1], rank,
                     tuple((DTYPES[t.dtype], t.dim()) for t in operands))
