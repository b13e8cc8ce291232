"""The stencil lowering of a Spec whose mask is a small window on a grid: what it takes, the call.

A tiled kernel computes every score of the tiles that a window touches; a stencil computes those of
the window alone. It is for windows of up to some hundred keys (`attnopt.cost.stencil` compares).
"""

from __future__ import annotations

import ctypes
import functools
import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.cost import stencil as cost
from attnopt.errors import AttnOptError
from attnopt.ir import expr as E
from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels.aten.tile import broadcast
from attnopt.kernels.cpp import attention
from attnopt.kernels.cpp.call import (
    _differs,
    empty_like_fused,
    log_sum_exp,
    matrix,
    operand,
    signature_of,
)
from attnopt.kernels.cpp.grid_windows import Axis, Windows3d, windows_of
from attnopt.kernels.cpp.integers import LARGEST
from attnopt.kernels.cpp.isa import Isa, isa
from attnopt.kernels.cpp.stencil_source import StencilTile, stencil_source
from attnopt.kernels.cpp.template import Signature
from attnopt.kernels.cpp.toolchain import compile_all, load

#: the name of the lowering in a Schedule; its tile is (rows, taps, channels)
LOWERING = "cpp:stencil"
#: keys of a window
_LARGEST_WINDOW = 4096


def reasons(spec: Spec, dtypes: Sequence[torch.dtype] = (torch.float32,), device: str = "cpu",
            lengths: tuple[int, int] | None = None, requires_grad: bool = False) -> list[str]:
    """Why the stencil does not compute the Spec; empty where it does.

    lengths: of queries and keys, where they are known; requires_grad: a gradient will be asked for
    """
    found = [*attention.reasons(spec, dtypes, device), *spec_reasons(spec)]
    if requires_grad:
        found.append("a stencil has no gradient")
    if lengths is not None:
        found += length_reasons(spec, *lengths)
    return list(dict.fromkeys(found))


@functools.lru_cache(maxsize=1024)
def spec_reasons(spec: Spec) -> tuple[str, ...]:
    """Why the stencil does not compute the Spec, whatever the inputs; empty where it does."""
    found = list(attention.spec_reasons(spec))
    if spec.mask.predicate() is E.TRUE:
        found.append("a stencil needs a window")
    if spec.score not in ("dot", "distance"):
        found.append(f"a stencil needs scores of query and key, got {spec.score}")
    if spec.weights is not E.weight or spec.renormalize:
        found.append("a stencil has no epilogue of the weights")
    if spec.output.has("stat") or E.value in spec.output.leaves:
        found.append("a stencil's epilogue of the output reads no statistics and no values")
    if spec.empty_row == "uniform" and not spec.mask.row_always_kept(True):
        found.append("rows without a key must be nan or zero")
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def length_reasons(spec: Spec, queries: int, keys: int) -> tuple[str, ...]:
    """Why the stencil does not compute the Spec at these lengths; empty where it does."""
    if queries != keys:
        return (f"a stencil needs as many keys as queries, got {queries} and {keys}",)
    windows = windows_of(spec.mask, queries)
    if isinstance(windows, str):
        return (windows,)
    largest = window_of(windows)
    if largest > _LARGEST_WINDOW:
        return (f"a window must have at most {_LARGEST_WINDOW} keys, got {largest}",)
    return ()


def window_of(windows: Windows3d) -> int:
    """Keys of the largest window."""
    return math.prod(int(axis.count.max()) for axis in windows.axes)


def default_tile(windows: Windows3d, target: Isa) -> StencilTile:
    """As many rows as share keys, and register blocks that the registers hold."""
    rows = 4 if windows.axes[1].length > 1 else 1
    if target.registers >= 32:
        return StencilTile(rows, 4 if rows > 1 else 8, 4)
    return StencilTile(rows, 2 if rows > 1 else 4, 2)


def grid_of(windows: Windows3d, tile: StencilTile) -> cost.Grid:
    """What the time of a stencil depends on, of its windows."""
    return cost.grid_of([list(zip(a.start.tolist(), a.count.tolist(), strict=True))
                         for a in windows.axes], tile.rows)


class Kernel:
    """One compiled kernel, ready to be called with tensors."""

    def __init__(self, signature: Signature, windows: Windows3d, tile: StencilTile, target: Isa
                 ) -> None:
        self.spec, self.width = signature.spec, target.width
        path = compile_all([stencil_source(signature, windows, tile, target.width)], target)[0]
        self.function = load(path).stencil
        self.function.argtypes, self.function.restype = [ctypes.c_void_p], None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
                 windows: Windows3d, statistics: Tensor | None = None) -> Tensor:
        """query (*L, N, D), key (*L, N, D), value (*L, N, Dv) -> (*L, N, Dv); statistics as
        `call.Kernel` fills them."""
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        tokens, rank = query.shape[-2], len(leads)
        out = empty_like_fused(query, (*leads, tokens, value.shape[-1]))
        own = [int(_differs((key, value), i, leads)) for i in range(rank)]
        words = [torch.get_num_threads(), tokens, tokens, *leads, *own]
        for tensor in (query, key, value, out, statistics):
            words += matrix(tensor, rank)
        tables = _padded(windows, self.width)
        for axis, kept in zip(windows.axes, tables, strict=True):
            words += [axis.length, *(t.data_ptr() for t in kept)]
        for described, tensor in zip(self.spec.operands, operands, strict=True):
            words += operand(described, tensor, rank, (tokens, value.shape[-1]))
        arguments = array("q", words)
        self.function(arguments.buffer_info()[0])
        return out


@functools.lru_cache(maxsize=256)
def _padded(windows: Windows3d, width: int) -> tuple[tuple[Tensor, ...], ...]:
    """order, start and count of each axis, the last entry repeated for a vector's width."""
    def longer(axis: Axis, table: Tensor) -> Tensor:
        return torch.cat([table, table[-1:].expand(width)])

    with torch.inference_mode(False):
        return tuple(tuple(longer(a, t) for t in (a.order, a.start, a.count))
                     for a in windows.axes)


class Stencil:
    """A Spec as a generated stencil: `stencil(query, key, value, operands)` -> out or None.

    tile: (rows, taps, channels), () for the default. None means that these tensors are not for the
    kernel: another dtype, an empty length, a mask that is no window at this length.
    """

    def __init__(self, spec: Spec, tile: Sequence[int] = (), target: Isa | None = None) -> None:
        self.spec, self.target = spec, target or isa()
        self.tile = StencilTile(*tile) if len(tile) == 3 else None
        self.possible = not reasons(spec)
        self.tiled = attention.Attention(spec)
        self.kernels: dict[Any, Kernel | None] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
                 ) -> Tensor | None:
        found = self.ready(query, key, value, operands)
        return None if found is None else found[0](query, key, value, operands, found[1])

    def with_lse(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
                 ) -> tuple[Tensor, Tensor] | None:
        """The same with the log-sum-exp (*L, N) of the rows, in float32."""
        found = self.ready(query, key, value, operands)
        if found is None:
            return None
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        statistics = torch.empty((*leads, query.shape[-2], 2), dtype=torch.float32, device="cpu")
        out = found[0](query, key, value, operands, found[1], statistics)
        return out, log_sum_exp(statistics)

    def ready(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
              ) -> tuple[Kernel, Windows3d] | None:
        """The kernel and the windows for these tensors, None where they are not for it."""
        if not self.possible or not self.takes(query, key, value, operands):
            return None
        windows = windows_of(self.spec.mask, query.shape[-2])
        assert isinstance(windows, Windows3d)
        tile = self.tile or default_tile(windows, self.target)
        rank = max(query.dim(), key.dim(), value.dim())
        known = (tile, windows.grid, windows.rest, query.dtype, query.shape[-1], value.shape[-1],
                 rank, *((t.dtype, t.dim()) for t in operands))
        if known not in self.kernels:
            signature = signature_of(self.spec, query, key, value, operands)
            try:
                self.kernels[known] = Kernel(signature, windows, tile, self.target)
            except AttnOptError as error:
                attention.warn_once(str(error))
                self.kernels[known] = None
        kernel = self.kernels[known]
        return None if kernel is None else (kernel, windows)

    def takes(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]) -> bool:
        """Whether the kernel computes these tensors."""
        return (self.tiled.takes(query, key, value, operands)
                and not length_reasons(self.spec, query.shape[-2], key.shape[-2])
                and all(_extent(t) <= LARGEST for t in operands))


def _extent(tensor: Tensor) -> int:
    """How far apart the elements of one head of an operand are: offsets of lanes have 32 bits."""
    return sum((n - 1) * s for n, s in zip(tensor.shape[-2:], tensor.stride()[-2:], strict=True))


def prepare(calls: Sequence[tuple[Spec, Schedule, Sequence[Tensor]]], target: Isa | None = None
            ) -> None:
    """Compile the kernels of calls (Spec, Schedule, tensors), in parallel; raises KernelError."""
    own = target or isa()
    sources: dict[str, None] = {}
    for spec, schedule, (query, key, value, *operands) in calls:
        windows = windows_of(spec.mask, query.shape[-2])
        if isinstance(windows, str) or length_reasons(spec, query.shape[-2], key.shape[-2]):
            continue
        tile = StencilTile(*schedule.tile) if len(schedule.tile) == 3 else (
            default_tile(windows, own))
        signature = signature_of(spec, query, key, value, operands)
        sources[stencil_source(signature, windows, tile, own.width)] = None
    compile_all(list(sources), own)
