"""Attention by a generated kernel as one operator that no compiler looks into.

    generated(Tensor query, Tensor key, Tensor value, Tensor[] operands, str spec, str schedule,
              str places) -> Tensor

`attnopt::attention` and `window_attention` are compositions: a compiler that traces them gets ATen
and never the generated kernel of their Schedule. This operator is the same call left whole, of
`places` where these are not "", with its result contiguous. Its gradient, one operator too,
computes the result again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.kernels.bind import bind
from attnopt.kernels.window_maps import bind_windows

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "generated(Tensor query, Tensor key, Tensor value, Tensor[] operands, str spec, str schedule, "
    "str places) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "generated_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor[] operands, "
    "str spec, str schedule, str places, bool[] wanted) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,))


def _compute(tensors: Sequence[Tensor], spec: str, schedule: str, places: str) -> Tensor:
    if places:
        return bind_windows(spec, schedule, places)(*tensors)
    return bind(spec, schedule)(*tensors)


def _generated(query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], spec: str,
               schedule: str, places: str) -> Tensor:
    out = _compute((query, key, value, *operands), spec, schedule, places).contiguous()
    aliased = out.untyped_storage().data_ptr() == value.untyped_storage().data_ptr()
    return out.clone() if aliased else out


def _fake(query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor], spec: str,
          schedule: str, places: str) -> Tensor:
    found = _compute((query, key, value, *operands), spec, schedule, places)
    return torch.empty(found.shape, dtype=found.dtype, device=found.device)


def _gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor,
               operands: Sequence[Tensor], spec: str, schedule: str, places: str,
               wanted: Sequence[bool]) -> list[Tensor]:
    tensors = (query, key, value, *operands)
    with torch.enable_grad():
        own = [t.detach().requires_grad_(want) for t, want in zip(tensors, wanted, strict=True)]
        out = _compute(own, spec, schedule, places)
    given = [t for t, want in zip(own, wanted, strict=True) if want]
    found = torch.autograd.grad(out, given, grad, allow_unused=True)
    return [torch.zeros_like(t, memory_format=torch.contiguous_format) if g is None
            else g.clone(memory_format=torch.contiguous_format)
            for t, g in zip(given, found, strict=True)]


def _fake_gradients(grad: Tensor, query: Tensor, key: Tensor, value: Tensor,
                    operands: Sequence[Tensor], spec: str, schedule: str, places: str,
                    wanted: Sequence[bool]) -> list[Tensor]:
    return [torch.empty(t.shape, dtype=t.dtype, device=t.device)
            for t, want in zip((query, key, value, *operands), wanted, strict=True) if want]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, operands, *texts = inputs
    ctx.save_for_backward(query, key, value, *operands)
    ctx.texts = texts


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, value, *operands = ctx.saved_tensors
    needs = list(ctx.needs_input_grad)
    of_operands = needs[3] if isinstance(needs[3], (list, tuple)) else [needs[3]] * len(operands)
    wanted = [*needs[:3], *of_operands]
    if torch.is_grad_enabled():  # gradients that have gradients: those of the operator have none
        own = [t.view_as(t) for t in (query, key, value, *operands)]  # one may be in two roles
        given = [t for t, want in zip(own, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(_compute(own, *ctx.texts), given, grad, create_graph=True,
                                         allow_unused=True))
    else:
        found = iter(torch.ops.attnopt.generated_backward.default(
            grad, query, key, value, operands, *ctx.texts, wanted))
    query, key, value, *operands = (next(found) if want else None for want in wanted)
    return query, key, value, operands, None, None, None


_library.impl("generated", _generated, "CompositeExplicitAutograd")
_library.impl("generated_backward", _gradients, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::generated", _fake, lib=_library)
torch.library.register_fake("attnopt::generated_backward", _fake_gradients, lib=_library)
torch.library.register_autograd("attnopt::generated", _backward, setup_context=_setup,
                                lib=_library)

generated = torch.ops.attnopt.generated.default
