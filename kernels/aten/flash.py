"""torch's CPU flash attention with what F.scaled_dot_product_attention leaves out.

`Flash` is the kernel with a backward that can itself be differentiated (torch: "derivative for
_scaled_dot_product_flash_attention_for_cpu_backward is not implemented"): when the graph of the
gradient is asked for, the attention is composed from ATen ops once more. `flash_with_lse` also
returns the log-sum-exp. Both take 4-D inputs of one dtype with E_q == E_k == E_v and a last stride
of 1, any number of key heads that divides the query heads, and a float mask that broadcasts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FORWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
_MATH = getattr(torch.ops.aten, "_scaled_dot_product_attention_math", None)
AVAILABLE = None not in (_FORWARD, _BACKWARD, _MATH)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the kernel computes these 4-D inputs."""
    return (AVAILABLE and query.device.type == "cpu" and query.dtype in DTYPES
            and query.dtype == key.dtype == value.dtype
            and query.shape[-1] == key.shape[-1] == value.shape[-1]
            and query.shape[0] == key.shape[0] == value.shape[0]
            and query.numel() > 0 and key.numel() > 0)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A bool mask as the float mask that the kernel takes."""
    if mask.dtype != torch.bool:
        return mask
    zero = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, zero, torch.full_like(zero, -torch.inf))


def flash_with_lse(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool,
                   scale: float) -> tuple[Tensor, Tensor]:
    """(out, log-sum-exp (B, H, Q) in float32 or float64; 0 where a row has no key)."""
    assert _FORWARD is not None
    result: tuple[Tensor, Tensor] = _FORWARD.default(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale)
    return result


class Flash(torch.autograd.Function):
    """Flash.apply(query, key, value, mask, causal, scale) -> out, differentiable at any order."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None,
                causal: bool, scale: float) -> Tensor:
        out, lse = flash_with_lse(query, key, value, mask, causal, scale)
        ctx.save_for_backward(query, key, value, mask, out, lse)
        ctx.causal, ctx.scale = causal, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value, mask, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:3]
        if torch.is_grad_enabled():
            found = _composed_gradient((query, key, value), mask, ctx, grads[0], wanted)
        else:
            assert _BACKWARD is not None
            found = _BACKWARD.default(grads[0], query, key, value, out, lse, 0.0, ctx.causal,
                                      attn_mask=mask, scale=ctx.scale)
        return (*(g if w else None for g, w in zip(found, wanted, strict=True)), None, None, None)


def _composed_gradient(inputs: tuple[Tensor, Tensor, Tensor], mask: Tensor | None, ctx: Any,
                       grad: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradient, with a graph of its own."""
    assert _MATH is not None
    causal = ctx.causal
    if causal and mask is not None:
        rows, keys = inputs[0].shape[-2], inputs[1].shape[-2]
        kept = torch.ones(rows, keys, dtype=torch.bool, device=grad.device).tril()
        mask, causal = mask.masked_fill(~kept, -torch.inf), False
    with torch.enable_grad():
        # The same tensors, so that the result is connected to them, under names of this graph.
        views = [t.view_as(t) for t in inputs]
        out = _MATH.default(*views, mask, 0.0, causal, scale=ctx.scale,
                            enable_gqa=inputs[0].shape[1] != inputs[1].shape[1])[0]
        chosen = [v for v, w in zip(views, wanted, strict=True) if w]
        found = iter(torch.autograd.grad(out, chosen, grad, create_graph=True))
    return [next(found) if w else None for w in wanted]
