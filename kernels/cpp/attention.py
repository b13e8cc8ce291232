"""The cpp lowering of a Spec: what it takes, its tile lists, and the call."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt import logs
from attnopt.errors import AttnOptError
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.intervals import PARTIAL, tile_lists, tile_states
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.aten.tile import broadcast
from attnopt.kernels.cpp.call import DTYPES, LARGEST, kernel, signature_of
from attnopt.kernels.cpp.isa import Isa
from attnopt.kernels.cpp.template import Parts, Signature, Tile, source
from attnopt.kernels.cpp.toolchain import compile_all, isas, toolchain

_ELEMENTS = (torch.float32, torch.bfloat16, torch.float16)
#: from here on a mask of index arithmetic gets tile lists, in scores of one head
_LISTED = 128 * 128


@functools.lru_cache(maxsize=1024)
def reasons(spec: Spec) -> tuple[str, ...]:
    """Why generated C++ does not compute the Spec; empty where it does."""
    found = []
    if spec.mix_logits or spec.mix_weights:
        found.append("heads must not be mixed")
    if spec.dropout:
        found.append(f"dropout must be 0, got {spec.dropout}")
    if spec.compute and torch.promote_types(
            torch.float32, getattr(torch, spec.compute)) != torch.float32:
        found.append(f"compute must be float32 or less, got {spec.compute}")
    exprs = [e for e in (spec.logits, spec.mask.predicate(), spec.weights, spec.output,
                         spec.groups, spec.sinks) if e is not None]
    nodes = {node for e in exprs for node in e.walk()}
    if any(node.op == "inner" for node in nodes):
        found.append("a second dot product must not be part of the score")
    if any(node.op == "const" and node.dtype == E.INT and abs(node.value) > LARGEST
           for node in nodes):
        found.append("integers must fit 32 bits")
    if spec.sinks is not None and "k" in spec.sinks.indices:
        found.append("sinks must not vary along k")
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


def rows_alike(spec: Spec) -> bool:
    """Whether all query rows have the same weights, which one row's worth of work computes."""
    from attnopt.kernels.aten.choose import rows_alike as alike

    return alike(spec)


class Attention:
    """A Spec as generated C++: `attention(query, key, value, operands)` -> out or None.

    None means that these tensors are not for the kernel (another dtype, an empty length, integers
    beyond 32 bits): the caller then computes them otherwise.
    """

    def __init__(self, spec: Spec, tile: Tile | None = None, target: Isa | None = None) -> None:
        self.spec, self.tile, self.target = spec, tile or Tile(), target
        self.possible = not reasons(spec)
        self.parts = Parts.of(spec) if self.possible else None
        nodes = list(spec.logits.walk()) + list(spec.mask.predicate().walk())
        #: products of indices or sizes occur, which may grow as large as Q * K
        self.products = any(n.op == "mul" and n.dtype == E.INT for n in nodes)
        self.skips = spec.weights is E.weight and not (
            "count" in (self.parts.statistics if self.parts else ()) and False)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
                 ) -> Tensor | None:
        if not self.possible or not self.takes(query, key, value, operands):
            return None
        signature = signature_of(self.spec, query, key, value, operands)
        try:
            run = kernel(signature, self.tile, self.target)
        except AttnOptError as error:
            _warn_once(str(error))
            return None
        return run(query, key, value, operands, lists=self.lists(query, key, value, operands))

    def takes(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]) -> bool:
        """Whether the kernel computes these tensors."""
        if not (query.device.type == "cpu" and query.dtype in _ELEMENTS
                and query.dtype == key.dtype == value.dtype):
            return False
        if not (query.numel() and key.numel() and value.numel()) or max(
                query.shape[-2], key.shape[-2]) > LARGEST:
            return False
        if self.products and query.shape[-2] * key.shape[-2] > LARGEST:
            return False
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        return all(_fits(o, t, leads, self.spec.score)
                   for o, t in zip(self.spec.operands, operands, strict=True))

    def lists(self, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor]
              ) -> tuple[Tensor, Tensor] | None:
        """The key tiles that every query tile visits, where the mask leaves some out."""
        predicate = self.spec.mask.predicate()
        rows, keys = query.shape[-2], key.shape[-2]
        if predicate is E.TRUE or not self.skips or rows * keys < _LISTED:
            return None
        if not predicate.slots:
            leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
            return _fixed_lists(predicate, rows, keys, self.tile.rows, self.tile.keys, leads)
        leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        named = {o.slot: t for o, t in zip(self.spec.operands, operands, strict=True)
                 if o.slot in predicate.slots}
        return _lists(predicate, rows, keys, self.tile.rows, self.tile.keys, leads, named)


def _lists(predicate: Expr, rows: int, keys: int, block_q: int, block_k: int,
           leads: tuple[int, ...], operands: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    found = tile_lists(tile_states(predicate, rows, keys, block_q, block_k, leads, operands))
    return found.starts, (found.tiles * 2 + (found.kinds == PARTIAL)).int()


@functools.lru_cache(maxsize=256)
def _fixed_lists(predicate: Expr, rows: int, keys: int, block_q: int, block_k: int,
                 leads: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        return _lists(predicate, rows, keys, block_q, block_k, leads, {})


def _fits(described: Operand, tensor: Tensor, leads: tuple[int, ...], score: str) -> bool:
    """Whether a kernel reads this operand right: its type, its axes, its size."""
    if tensor.dtype not in DTYPES or tensor.device.type != "cpu" or not tensor.numel():
        return False
    if tensor.dtype == torch.int64:
        low, high = tensor.aminmax()
        if low < -LARGEST or high > LARGEST:
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


def prepare(kernels: Sequence[tuple[Signature, Tile]], target: Isa | None = None) -> None:
    """Compile the kernels of a model, in parallel; raises KernelError."""
    width = (target or isas()[0]).width
    compile_all([source(signature, tile, width) for signature, tile in kernels], target)


@functools.cache
def _warn_once(message: str) -> None:
    logs.get("cpp").warning("a generated kernel could not be compiled, ATen computes it: %s",
                            message)


def available() -> str:
    """"" where C++ can be generated, else the reason."""
    return toolchain().why_not()
