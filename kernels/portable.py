"""attnopt's operators in ATen alone, for programs that run where attnopt is not.

`table` is what torch.export's `run_decompositions` takes. Structured masks become tiles
(`aten.tiled`), what fused attention computes becomes scaled_dot_product_attention, everything else
the dense composition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels import (
    block_maps,
    factors,
    key_floor,
    padded_tables,
    placed,
    relative_tables,
    tabulate,
)
from attnopt.kernels.aten.dense import dense
from attnopt.kernels.aten.sdpa import plan, sdpa
from attnopt.kernels.aten.steps import steps
from attnopt.kernels.aten.tiled import band_of, constant, tiled, tiled_reasons, tiles_of
from attnopt.kernels.deformable import Sampling
from attnopt.kernels.deformable.corners import compose
from attnopt.kernels.merging import bind_with_lse

FORMS = ("tiled", "fused", "dense")
_OPS = torch.ops.attnopt


def table(attention: Callable[..., tuple[Tensor, Tensor]] | None = None,
          sampling: Callable[..., Tensor] | None = None) -> dict[Any, Callable[..., Any]]:
    """Decompositions of attnopt's operators.

    attention, sampling: what stands for `attention` and `deformable_attention`, if not ATen.
    """
    found: dict[Any, Callable[..., Any]] = {
        _OPS.attention.default: attention or _attention,
        _OPS.deformable_attention.default: sampling or sample,
        _OPS.tabulate.default: tabulate.tabulate,
        _OPS.literal.default: lambda tensors, lengths, text: constant(
            tabulate.numbers_of(text), tensors[0].device),
        _OPS.key_floor.default: key_floor.key_floor,
        _OPS.relative_table.default: relative_tables.relative_table,
        _OPS.factor.default: factors.factor,
        _OPS.padded_table.default: padded_tables.padded_table,
        _OPS.placed.default: placed.placed,
        _OPS.block_map.default: block_maps.block_map,
    }
    return found


def _attention(query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], spec: str,
               schedule: str = "") -> tuple[Tensor, Tensor]:
    parsed = Spec.parse(spec)
    return compute(parsed, form_of(parsed, query.shape, key.shape), query, key, value, operands)


def sample(value: Tensor, locations: Tensor, weights: Tensor, depth: Tensor | None,
              shapes: Sequence[int], sampling: str, schedule: str = "") -> Tensor:
    return compose(Sampling.parse(sampling), value, locations, weights, depth, shapes,
                   careful=True, bags=False)


def form_of(spec: Spec, query: Sequence[Any], key: Sequence[Any]) -> str:
    """The form that costs least."""
    lengths = query[-2], key[-2]
    if not tiled_reasons(spec) and not spec.lse:
        if all(isinstance(n, int) for n in lengths):
            if tiles_of(spec.mask, *lengths) is not None:
                return "tiled"
        elif band_of(spec.mask) is not None:
            return "tiled"
    found = plan(spec)
    return "fused" if found is not None and not spec.lse else "dense"


def compute(spec: Spec, form: str, query: Tensor, key: Tensor, value: Tensor,
            operands: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """(out, lse) of the op `attnopt::attention` by one of FORMS."""
    if spec.lse:
        return bind_with_lse(str(spec), str(Schedule("aten:dense")))(query, key, value, *operands)

    def composed() -> Tensor:
        named = {o.slot: t for o, t in zip(spec.operands, operands, strict=True)}
        return dense(steps(spec), query, key, value, named, "none")

    found = plan(spec) if form == "fused" else None
    if form == "tiled":
        lengths = query.shape[-2], key.shape[-2]
        known = all(isinstance(n, int) for n in lengths)
        out = tiled(spec, query, key, value, operands,
                    tiles_of(spec.mask, *lengths) if known else None)
    elif found is not None:
        out = sdpa(steps(spec), found, query, key, value, tuple(operands), "traced", composed)
    else:
        out = composed()
    return out, out.new_empty(0)
