"""The door of everything that computes: other rooms import from here only.

    reference(spec)             the float64 oracle of a Spec
    ops.attention               the op; ops.attend, what eager graphs call in its place
    reasons(spec, lowering)     why a lowering does not serve a Spec
    fused_mask(spec)            what fused attention makes one tensor of, in place of the Spec's
    estimates(problem, …)       predicted times of lowerings and tiles; original(problem, authored)
    prepare(calls)              compile the generated kernels of some calls in parallel
    merge(outs, lses)           attention over parts of the keys as one, by their log-sum-exp
    attend_rows(spec, …, rows)  attention of the listed query rows, 0 elsewhere
    lifetimes                   for which rows each key is among the best of those before
    block_maps                  which blocks of keys an approximation keeps
    low_rank                    terms of low rank as columns of query and key
    relative_tables             products of rows or keys and embeddings of relative positions
    key_floor                   how low a bias must be to hide a key
    padded_tables               tables with a rim, for look-ups that may lie outside of them
    placed                      what belongs to a part of the scores, with zeros beside it
    opaque.generated            a generated kernel as one operator, for compilers
    window_maps                 attention within windows, in the map that they are cut from
    tabulate                    a bias as a table of the places that rows and keys look up
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attnopt.cost.choose import worth
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels import (
    block_maps,
    cpp,
    factors,
    key_floor,
    lifetimes,
    low_rank,
    opaque,
    ops,
    padded_tables,
    placed,
    relative_tables,
    tabulate,
    triton,
    window_maps,
)
from attnopt.kernels.aten.choose import can_block
from attnopt.kernels.aten.sdpa import plan
from attnopt.kernels.aten.sdpa import reasons as not_fused
from attnopt.kernels.choosing import (
    Problem,
    Tables,
    aten_lowering,
    device,
    estimates,
    original,
)
from attnopt.kernels.cpp import stencil
from attnopt.kernels.cpp.template import WINDOW
from attnopt.kernels.cpp.toolchain import toolchain
from attnopt.kernels.merging import merge
from attnopt.kernels.reference import reference
from attnopt.kernels.row_lists import attend_rows

__all__ = ["Problem", "Tables", "aten_lowering", "attend_rows", "block_maps", "device", "estimates",
           "factors", "fused_mask", "key_floor", "lifetimes", "low_rank", "merge", "missing",
           "opaque", "ops", "original", "padded_tables", "placed", "prepare", "reasons",
           "reference", "relative_tables", "tabulate", "window_maps", "worth"]


def reasons(spec: Spec, lowering: str, *, head_dims: tuple[Any, Any] = (1, 1),
            dtypes: Sequence[torch.dtype] = (torch.float32,), device: str = "cpu",
            requires_grad: bool = False, operand_grad: bool = False) -> list[str]:
    """Why `lowering` cannot, or should not, compute `spec`; empty where it can.

    head_dims: D and Dv, ints or symbolic; dtypes: of query, key and value; requires_grad and
    operand_grad: a gradient will be asked for, of a bias or sink too.
    """
    found = []
    if len(set(dtypes)) > 1:
        found.append("query, key and value must have one dtype, got "
                     + ", ".join(str(d).removeprefix("torch.") for d in dtypes))
    if not all(d.is_floating_point for d in dtypes):
        found.append("query, key and value must be floating")
    if lowering in ("aten:sdpa", "cpp"):
        wide = low_rank.widening(spec)
        spec = spec if wide is None else wide.spec
    if lowering == "aten:sdpa":
        found += not_fused(spec)
        fused = plan(spec)
        known = all(isinstance(d, int) for d in head_dims)
        if fused is not None and known and not fused.fits(
                *head_dims, device, requires_grad, operand_grad):
            found.append("fused attention is slower here: head_dims that differ much, sinks, or a "
                         "bias whose gradient is asked for")
    elif lowering == "aten:blocks":
        if not can_block(spec, dtypes[-1]):
            found.append("row blocks do not take mixed heads, dropout, a wider softmax dtype, or "
                         "rows that are all alike")
    elif lowering == "cpp":
        found += cpp.reasons(spec, dtypes, device, requires_grad, operand_grad)
    elif lowering == "triton":
        found += triton.reasons(spec, dtypes, device, head_dims=head_dims,
                                requires_grad=requires_grad)
    elif lowering != "aten:dense":
        found.append("lowering must be aten:sdpa, aten:blocks, aten:dense, cpp or triton, got "
                     f"{lowering!r}")
    return found


def fused_mask(spec: Spec) -> tuple[Expr, ...]:
    """Terms and masks of which fused attention is handed one tensor that it makes; () where it is
    handed an operand as it is, or nothing."""
    fused = plan(spec)
    masking = fused.masking if fused is not None else None
    if masking is None or masking.slot is not None:
        return ()
    return tuple(e for e in (masking.term, masking.structure, *masking.others) if e is not None)


def missing() -> str:
    """Why no C++ can be generated on this machine, "" where it can."""
    return toolchain().why_not()


def prepare(calls: Sequence[tuple[Spec, Schedule, Sequence[torch.Tensor]]],
            training: bool = False) -> None:
    """Compile the kernels of calls with a generated lowering, in parallel and each once.

    A call is its Spec, its Schedule and its tensors (query, key, value, *operands), of which only
    dtypes and shapes are looked at. training: the kernels of their gradients, too. Raises
    KernelError.
    """
    windowed = [call for call in calls if call[1].lowering == stencil.LOWERING]
    wide = [(*low_rank.of_call(spec, tensors), schedule) for spec, schedule, tensors in calls
            if schedule.lowering in ("cpp", WINDOW)]
    cpp.prepare([(spec, schedule, tensors) for spec, tensors, schedule in wide], training)
    stencil.prepare(windowed)
