"""Which ATen lowering, and with which tile. Pure functions of shapes, tested without a device."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch

from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels.aten.dense import HALF
from attnopt.kernels.aten.linear import varies
from attnopt.kernels.aten.sdpa import plan
from attnopt.kernels.aten.skipping import skips_keys
from attnopt.kernels.aten.tile import broadcast

#: Scores of one block of `blocks`, in bytes: on a CPU with 1 MB of second-level cache a core and
#: 32 MB of third, 1 to 4 MB were within 10 % of each other at 512 to 2048 keys.
BLOCK_BYTES = 1 << 22
#: Query rows of a block; fewer where the mask lets a block skip keys.
ROWS, ROWS_OF_SKIPPING = 256, 128
#: Outside of the CPU a whole score tensor is faster than blocks until it is this large.
DEVICE_BYTES = 1 << 30


def choose(spec: Spec, query: Sequence[int], key: Sequence[int], value: Sequence[int],
           dtype: torch.dtype = torch.float32, device: str = "cpu", requires_grad: bool = False,
           operand_grad: bool = False) -> Schedule:
    """The Schedule for a Spec at shapes query (*L, Q, D), key (*L, K, D), value (*L, K, Dv).

    requires_grad: a gradient will be asked for; operand_grad: of a bias or sink, too.
    """
    found = plan(spec)
    if found is not None and found.fits(query[-1], value[-1], device, requires_grad, operand_grad):
        return Schedule("aten:sdpa")
    if requires_grad or not can_block(spec, dtype):
        return Schedule("aten:dense")
    leading = broadcast(query[:-2], key[:-2], value[:-2])
    tile = block_tile(spec.score, math.prod(leading), query[-2], key[-2], query[-1], device,
                      skips_keys(spec))
    return Schedule("aten:blocks", tile) if tile else Schedule("aten:dense")


def can_block(spec: Spec, dtype: torch.dtype) -> bool:
    """Whether `blocks` computes the Spec for inputs of this dtype."""
    return not block_reasons(spec, dtype)


@functools.lru_cache(maxsize=1024)
def block_reasons(spec: Spec, dtype: torch.dtype) -> tuple[str, ...]:
    """Why `blocks` cannot, or should not, compute the Spec for inputs of this dtype."""
    found = []
    work = torch.float32 if dtype in HALF else dtype
    if spec.compute and torch.promote_types(work, getattr(torch, spec.compute)) != work:
        found.append(f"compute must be {work} or less, got {spec.compute}")
    if spec.mix_logits or spec.mix_weights or spec.mix_bias:
        found.append("heads must not be mixed")
    if spec.dropout:
        found.append(f"dropout must be 0, got {spec.dropout}")
    if spec.score == "distance" and work != torch.float32:
        found.append(f"distances must be of float32 or half inputs, got {dtype}")
    if rows_alike(spec):
        found.append("weights must vary along q")
    return tuple(found)


def rows_alike(spec: Spec) -> bool:
    """Whether all query rows have the same weights: key-only logits and a mask of keys."""
    if spec.score != "key":
        return False
    exprs = [e for e in (spec.logits, spec.mask.predicate(), spec.sinks, spec.weights)
             if e is not None]
    return not any("q" in varies(e, spec) for e in exprs)


def block_tile(score: str, heads: int, queries: int, keys: int, head_dim: int, device: str = "cpu",
               skipping: bool = False) -> tuple[int, ...]:
    """(query rows, leading entries) of one block; () where the whole is better."""
    width = 4 * max(keys, 1) * (head_dim if score == "additive" else 1)
    budget = BLOCK_BYTES if device == "cpu" else DEVICE_BYTES
    if width * queries * heads <= budget // 2:
        return ()
    rows = min(max(queries, 1), ROWS_OF_SKIPPING if skipping else ROWS)
    if rows * width > 2 * budget:
        rows = max(min(rows, 8), 2 * budget // width)
    return rows, max(1, min(heads, budget // (rows * width)))
