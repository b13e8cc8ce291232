"""The cpp lowering of a Spec: what it takes, its tile lists, and the call."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt import logs
from attnopt.errors import AttnOptError
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.intervals import PARTIAL, tile_lists, tile_states
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import printable
from attnopt.kernels.aten.choose import rows_alike
from attnopt.kernels.aten.tile import broadcast
from attnopt.kernels.cpp import integers
from attnopt.kernels.cpp.call import (
    DTYPES,
    Gathers,
    Kernel,
    Places,
    kernel,
    log_sum_exp,
    signature_of,
)
from attnopt.kernels.cpp.gathering import gathers
from attnopt.kernels.cpp.integers import LARGEST
from attnopt.kernels.cpp.isa import Isa
from attnopt.kernels.cpp.template import Parts, Tile, source
from attnopt.kernels.cpp.template_window import window_reasons
from attnopt.kernels.cpp.toolchain import compile_all, isas, toolchain

_ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)
#: from here on a mask of index arithmetic gets tile lists, in scores of one head
_LISTED = 128 * 128
#: from here on what operands hide is looked at before a tile is chosen, in scores; in such tiles
_ASKED, _ASKING = 1 << 22, Tile(rows=64, keys=64)
#: lengths whose tile is remembered
_REMEMBERED = 1024


def reasons(spec: Spec, dtypes: Sequence[torch.dtype] = (torch.float32,), device: str = "cpu",
            requires_grad: bool = False, operand_grad: bool = False) -> list[str]:
    """Why generated C++ does not compute the Spec, for inputs of these dtypes on this device;
    empty where it does.

    requires_grad: a gradient will be asked for; operand_grad: of float operands, too.
    """
    found = list(spec_reasons(spec))
    if device != "cpu":
        found.append(f"device must be cpu, got {device}")
    found += [f"dtype must be float32, bfloat16 or float16, got {d}" for d in dict.fromkeys(dtypes)
              if d not in _ELEMENTS]
    if requires_grad:
        from attnopt.kernels.cpp.training import training_reasons

        wanted = [o.slot for o in spec.operands if o.dtype == E.FLOAT] if operand_grad else []
        found += training_reasons(spec, tuple(wanted))
    if not found and toolchain().why_not():
        found.append(toolchain().why_not())
    return found


@functools.lru_cache(maxsize=1024)
def spec_reasons(spec: Spec) -> tuple[str, ...]:
    """Why generated C++ does not compute the Spec, whatever the inputs; empty where it does."""
    found = list(printable.reasons(spec))
    exprs = [e for e in (spec.logits, spec.mask.predicate(), spec.weights, spec.output,
                         spec.groups, spec.sinks) if e is not None]
    nodes = {node for e in exprs for node in e.walk()}
    if any(node.op == "inner" for node in nodes):
        found.append("a second dot product must not be part of the score")
    if any(node.op == "const" and node.dtype == E.INT and abs(node.value) > LARGEST
           for node in nodes):
        found.append("integers must fit 32 bits")
    if spec.empty_row != "nan" and spec.weights is not E.weight and not (
            spec.mask.row_always_kept()):
        found.append("rows without a key must be nan where the weights have an epilogue")
    if rows_alike(spec):
        found.append("weights must vary along q")
    for operand in spec.operands:
        loads = {bool(n.args) for n in nodes if n.op == "load" and n.value == operand.slot}
        if operand.slot == "score_weight":
            loads.add(False)
        if loads == {True, False} or loads == {True} and operand.axes is not None or (
                loads == {False} and operand.axes is None and operand.slot != "score_weight"):
            found.append(f"operand {operand.slot!r} must be either gathered or broadcast")
    try:
        Parts.of(spec)
    except ValueError:
        found.append("groups must be numbers")
    return tuple(found)


class Attention:
    """A Spec as generated C++: `attention(query, key, value, operands)` -> out or None.

    tile: of the kernel, (rows, keys, block rows, block vectors, *box), see `Tile`; () to choose it
    at each call, by lengths. None means that these tensors are not for the kernel (another dtype,
    an empty length, integers beyond 32 bits), or that ATen is faster: the caller then computes them
    otherwise.
    """

    def __init__(self, spec: Spec, tile: Sequence[int] = (), target: Isa | None = None,
                 lowering: str = "cpp") -> None:
        self.spec, self.target = spec, target
        self.tile = Tile.of(tile, lowering) if len(tile) >= 4 else None
        if self.tile is not None and self.tile.whole and window_reasons(spec):
            self.tile = None
        self.possible = not spec_reasons(spec) and not toolchain().why_not()
        self.skips = spec.weights is E.weight
        self.varies = bool(spec.mask.axes - {"q", "k"})
        self.kernels: dict[Any, Kernel | None] = {}
        self.tiles: dict[Any, Tile | None] = {}
        self.mapped: dict[Any, bool] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
                 ) -> Tensor | None:
        if not self.possible or not self.takes(query, key, value, operands):
            return None
        tile = self.given(query, key) or self.chosen(query, key, value, operands)
        if tile is None:
            return None
        tile, lists = self.plan(query, key, value, operands, tile)
        run = self.kernel(tile, query, key, value, operands)
        return None if run is None else run(query, key, value, operands, lists=lists)

    def in_maps(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
                places: Places) -> Tensor | None:
        """The same of windows of maps: query (S, H, T, D), key and value likewise, the operands
        those of all windows. Only the kernel for few keys does it."""
        tile = self.tile
        if tile is None or not self.possible or query.device.type != "cpu":
            return None
        known = (places.tokens.shape, places.length, integers.values_of(self.spec, operands),
                 *[(t.shape, t.stride(), t.dtype, t.device) for t in operands],
                 *[(t.shape, t.dtype) for t in (query, key, value)])
        taken = self.mapped.get(known)
        if taken is None:
            if len(self.mapped) >= _REMEMBERED:
                self.mapped.clear()
            taken = self.mapped[known] = self.takes_maps(query, key, value, operands, places)
        run = self.kernel(tile, query, key, value, operands) if taken else None
        return None if run is None else run(query, key, value, operands, places=places)

    def takes_maps(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
                   places: Places) -> bool:
        """Whether the kernel computes these tensors of maps, which their shapes, strides and types
        and the largest whole numbers decide."""
        windows, rows = places.tokens.shape
        shapes = [(t.shape[0] * windows, t.shape[1], rows, t.shape[3])
                  for t in (query, key, value) if t.dim() == 4 and t.shape[2] == places.length]
        if len(shapes) < 3:
            return False
        inside = [t.new_empty(()).expand(s) for t, s in zip((query, key, value), shapes,
                                                            strict=True)]
        return self.takes(inside[0], inside[1], inside[2], operands) \
            and self.given(inside[0], inside[1]) is not None

    def with_lse(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
                 ) -> tuple[Tensor, Tensor] | None:
        """The same with the log-sum-exp (*L, Q) of the rows, in float32."""
        if not self.possible or not self.takes(query, key, value, operands):
            return None
        tile, lists = self.plan(query, key, value, operands, self.given(query, key)
                                or self.chosen(query, key, value, operands) or Tile())
        run = self.kernel(tile, query, key, value, operands)
        if run is None:
            return None
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        found = torch.empty((*leads, query.shape[-2], 2), dtype=torch.float32, device="cpu")
        out = run(query, key, value, operands, statistics=found, lists=lists)
        return out, log_sum_exp(found)

    def given(self, query: Tensor, key: Tensor) -> Tile | None:
        """The tile that was asked for, where these lengths may have it."""
        tile = self.tile
        if tile is None or not tile.whole:
            return tile
        width = (self.target or isas()[0]).width
        few = query.shape[-2] <= tile.rows and tile.keys - width < key.shape[-2] <= tile.keys
        return tile if few else None

    def kernel(self, tile: Tile, query: Tensor, key: Tensor, value: Tensor,
               operands: Sequence[Tensor]) -> Kernel | None:
        """The compiled kernel for these tensors; None, with a warning, where it has none."""
        rank = max(query.dim(), key.dim(), value.dim())
        known = (tile, query.dtype, query.shape[-1], value.shape[-1], rank,
                 *((t.dtype, t.dim()) for t in operands))
        if known not in self.kernels:
            try:
                self.kernels[known] = kernel(
                    signature_of(self.spec, query, key, value, operands), tile, self.target)
            except AttnOptError as error:
                warn_once(str(error))
                self.kernels[known] = None
        return self.kernels[known]

    def chosen(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor] = ()
               ) -> Tile | None:
        """The tile for these lengths and what the mask hides, None where ATen is faster."""
        from attnopt.kernels.choosing import Problem, schedule_of

        threads, visible = torch.get_num_threads(), self.visible(query, key, value, operands)
        lengths = query.shape, key.shape, value.shape, query.dtype, threads, visible
        if lengths not in self.tiles:
            if len(self.tiles) >= _REMEMBERED:
                self.tiles.clear()
            schedule = schedule_of(Problem(
                self.spec, tuple(query.shape), tuple(key.shape), tuple(value.shape), query.dtype,
                threads=threads, visible=visible).rounded())
            self.tiles[lengths] = Tile.of(schedule.tile) if schedule.lowering == "cpp" else None
        return self.tiles[lengths]

    def visible(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
                ) -> float:
        """About the share of the key tiles that operands leave to visit, in eighths; 1 where too
        few scores are computed for it to matter."""
        if not operands or not self.spec.mask.slots or query[..., 0].numel() * key.shape[
                -2] < _ASKED:
            return 1.0
        found = self.lists(query, key, value, operands, _ASKING)
        if found is None:
            return 1.0
        starts, tiles = found
        rows = starts.numel() - starts[..., 0].numel()
        share = tiles.numel() / max(rows * -(-key.shape[-2] // _ASKING.keys), 1)
        return min(1.0, (1 + int(8 * share)) / 8)

    def takes(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]) -> bool:
        """Whether the kernel computes these tensors."""
        if not (query.device.type == "cpu" and query.dtype in _ELEMENTS
                and query.dtype == key.dtype == value.dtype):
            return False
        if not (query.numel() and key.numel() and value.numel()):
            return False
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        return all(_fits(o, t, leads) for o, t in zip(self.spec.operands, operands, strict=True)
                   ) and integers.fits(self.spec, leads, query.shape[-2], key.shape[-2],
                                       value.shape[-1], operands)

    def plan(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
             tile: Tile) -> tuple[Tile, Gathers | tuple[Tensor, Tensor] | None]:
        """The tile, without its box where these lengths have no halos, and what it visits."""
        if tile.whole:
            return tile, None
        if tile.box:
            leads: tuple[int, ...] = ()
            if self.varies:
                leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
            found = gathers(self.spec.mask, query.shape[-2], key.shape[-2], tile, leads
                            ) if self.skips else None
            if found is not None:
                return tile, found
            tile = tile.aligned
        return tile, self.lists(query, key, value, operands, tile)

    def lists(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
              tile: Tile) -> tuple[Tensor, Tensor] | None:
        """The key tiles that every query tile visits, where the mask leaves some out."""
        predicate = self.spec.mask.predicate()
        rows, keys = query.shape[-2], key.shape[-2]
        if predicate is E.TRUE or not self.skips or rows * keys < _LISTED:
            return None
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        if not predicate.slots:
            return _fixed_lists(predicate, rows, keys, tile.rows, tile.keys, leads)
        wanted = predicate.slots - within_tables(self.spec)
        named = {o.slot: t for o, t in zip(self.spec.operands, operands, strict=True)
                 if o.slot in wanted}
        return _lists(predicate, rows, keys, tile.rows, tile.keys, leads, named)


@functools.lru_cache(maxsize=1024)
def within_tables(spec: Spec) -> frozenset[str]:
    """Operands along queries and keys that stand beside a table, `table[...] | operand`: the table
    knows the tiles in which they matter, so that lists of tiles need nothing of their size."""
    found: set[str] = set()
    for node in spec.mask.predicate().walk():
        if node.op == "or" and any(a.op == "load" and a.args for a in node.args):
            found |= {s for a in node.args for s in a.slots}
    return frozenset(s for s in found if {"q", "k"} <= set(spec.operand(s).axes or ()))


def _lists(predicate: Expr, rows: int, keys: int, block_q: int, block_k: int,
           leads: tuple[int, ...], operands: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    found = tile_lists(tile_states(predicate, rows, keys, block_q, block_k, leads, operands,
                                   missing=True))
    return found.starts, (found.tiles * 2 + (found.kinds == PARTIAL)).int()


@functools.lru_cache(maxsize=256)
def _fixed_lists(predicate: Expr, rows: int, keys: int, block_q: int, block_k: int,
                 leads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _lists(predicate, rows, keys, block_q, block_k, leads, {})


def _fits(described: Operand, tensor: Tensor, leads: tuple[int, ...]) -> bool:
    """Whether a kernel reads this operand right: its type, its axes, its size."""
    if tensor.dtype not in DTYPES or tensor.device.type != "cpu" or not tensor.numel():
        return False
    if described.slot == "score_weight":
        return len(tensor.shape[:-1]) <= len(leads)
    if described.axes is None:
        return sum((n - 1) * abs(s) for n, s in zip(tensor.shape, tensor.stride(), strict=True)
                   ) <= LARGEST and min(tensor.stride(), default=0) >= 0
    if tensor.dim() < 2:
        tensor = tensor.view((1,) * (2 - tensor.dim()) + tuple(tensor.shape))
    own = tensor.shape[:-2]
    if len(own) > len(leads) or any(
            own[-i] not in (1, leads[-i]) for i in range(1, len(own) + 1)):
        return False
    return (tensor.shape[-2] == 1 or "q" in described.axes) and (
        tensor.shape[-1] == 1 or bool({"k", "d"}.intersection(described.axes)))


def prepare(calls: Sequence[tuple[Spec, Schedule, Sequence[Tensor]]], training: bool = False,
            target: Isa | None = None) -> None:
    """Compile the kernels of calls (Spec, Schedule, tensors), in parallel; raises KernelError.

    training: the kernels of their gradients, too.
    """
    from attnopt.kernels.choosing import Problem, legal_tiles
    from attnopt.kernels.cpp.template_backward import backward_source
    from attnopt.kernels.cpp.training import backward_tile, few_keys_tile, training_reasons

    width = (target or isas()[0]).width
    sources: dict[str, None] = {}
    for spec, schedule, (query, key, value, *operands) in calls:
        signature = signature_of(spec, query, key, value, operands)
        tiles: Sequence[Sequence[int]] = [schedule.tile]
        if len(schedule.tile) < 4:
            tiles = legal_tiles(Problem(spec, tuple(query.shape), tuple(key.shape),
                                        tuple(value.shape), query.dtype), few=True)
        sources.update((source(signature, Tile.of(t, schedule.lowering), width), None)
                       for t in tiles)
        learned = tuple(o.slot for o in spec.operands if o.dtype == E.FLOAT)
        if training and not training_reasons(spec, learned):
            known = key.shape[-2] if isinstance(key.shape[-2], int) else None
            shapes = [tuple(t.shape) for t in (query, key, value)]
            few = few_keys_tile(shapes[0], shapes[1], shapes[2], target) if all(
                isinstance(n, int) for s in shapes for n in s) else None
            sources[backward_source(
                signature, learned, few or backward_tile(spec, known, target), width)] = None
    compile_all(list(sources), target)


@functools.cache
def warn_once(message: str) -> None:
    logs.get("cpp").warning("a generated kernel could not be compiled, ATen computes it: %s",
                            message)

