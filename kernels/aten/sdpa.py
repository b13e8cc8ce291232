"""The sdpa lowering: F.scaled_dot_product_attention, with the semantics of the Spec kept.

`plan(spec)` reads a Spec as softmax(scale * factors * (q . k) + terms, mask): the scale becomes an
argument, a factor that does not vary along k (learned, per head) is folded into the queries, the
terms and the mask become one `attn_mask` of their broadcast shape, Causal() becomes `is_causal`,
heads that share keys become `enable_gqa`, a sink is applied to the output with the log-sum-exp.

What torch 2.11 to 2.13 do on a CPU, and what is done about it here:

    a row with no key gives 0 in every backend            seen in the output; where the Spec says
    a query row of NaN gives 0 when there is no mask        otherwise, computed again by `fallback`
    only 4-D inputs with E_q == E_k == E_v, a last        inputs are viewed, padded or copied so
      stride of 1 and masks of 2 or 4 axes that want        that it takes them
      no gradient reach the flash kernel
    the backward of flash has no backward                 `flash.Flash` has one
    a bool mask is made a float mask at each call         a mask of index arithmetic is kept as one
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import And, Causal
from attnopt.ir.spec import Spec
from attnopt.kernels.aten import flash
from attnopt.kernels.aten.codegen import compiled
from attnopt.kernels.aten.dense import working_dtype
from attnopt.kernels.aten.heads import collapse
from attnopt.kernels.aten.linear import linear, varies
from attnopt.kernels.aten.masking import Masking
from attnopt.kernels.aten.steps import Steps, finish, may_be_infinite
from attnopt.kernels.aten.tile import Tile, broadcast

#: Up to here a mask of one zero is cheaper than a look at the output for rows of NaN.
_SMALL = 128 * 128
_MAX_PADDING = 2


@dataclass(frozen=True)
class Plan:
    """A Spec as arguments of fused attention.

    scale:       of the scores, a number
    query_factor, key_factor: multiply the queries or the keys; each broadcasts against the score
    masking:     what becomes `attn_mask`, or None
    zero:        a row without a key gives 0, as the kernel does
    empty_check: a row without a key may occur, and must not give 0
    """

    scale: float
    query_factor: Expr | None
    key_factor: Expr | None
    masking: Masking | None
    causal: bool
    zero: bool
    empty_check: bool
    sinks: Expr | None
    output: Expr

    @functools.cached_property
    def bare(self) -> bool:
        """Whether fused attention needs nothing but query, key and value."""
        return (self.query_factor is None and self.key_factor is None and self.masking is None
                and self.sinks is None)

    def fits(self, head_dim: int, value_dim: int, device: str, requires_grad: bool = False,
             operand_grad: bool = False) -> bool:
        """Whether fused attention is the right thing at these shapes."""
        if device != "cpu":
            return self.sinks is None and not (self.masking and self.masking.uniform)
        if self.sinks is not None and (requires_grad or not flash.AVAILABLE):
            return False
        learned = (self.masking, self.sinks, self.query_factor, self.key_factor)
        if operand_grad and any(part is not None for part in learned):
            return False
        return head_dim == value_dim or max(head_dim, value_dim) <= _MAX_PADDING * min(
            head_dim, value_dim)


#: distance from 0 at which a row's log-sum-exp has lost digits that its weights need
_MOST_SHIFT = 32.0


def reasons(spec: Spec) -> list[str]:
    """Why fused attention cannot compute the Spec; empty where it can."""
    found = []
    if spec.score != "dot":
        found.append(f"score must be a dot product, got {spec.score}")
    if spec.normalizer != "softmax":
        found.append(f"normalizer must be softmax, got {spec.normalizer}")
    if spec.weights is not E.weight or spec.renormalize:
        found.append("weights must reach the values as the softmax gives them")
    if spec.mix_logits or spec.mix_weights or spec.mix_bias:
        found.append("heads must not be mixed")
    if spec.dropout:
        found.append(f"dropout must be 0, got {spec.dropout}")
    if spec.output.has("stat"):
        found.append("output must not read row statistics")
    parts = linear(spec.logits)
    if parts is None:
        found.append("logits must be scale * score + bias")
    else:
        for factor in parts.factors:
            if {"q", "k"} <= varies(factor, spec):
                found.append("a factor of the score must not vary along both q and k")
    return found


@functools.lru_cache(maxsize=1024)
def plan(spec: Spec) -> Plan | None:
    """The Spec as arguments of fused attention, or None."""
    parts = linear(spec.logits)
    if parts is None or reasons(spec):
        return None
    of_query = [f for f in parts.factors if "k" not in varies(f, spec)]
    of_key = [f for f in parts.factors if "k" in varies(f, spec)]
    causal = spec.mask == Causal() and not parts.terms
    row_kept = spec.mask.row_always_kept()
    term = parts.sum() if parts.terms else None
    softmax_alone = spec.sinks is None
    masks = () if causal else spec.mask.masks if isinstance(spec.mask, And) else (spec.mask,)
    return Plan(
        parts.scale, _product(of_query), _product(of_key),
        Masking.of(term, [m.predicate() for m in masks], tuple(o.slot for o in spec.operands),
                   uniform=spec.empty_row == "uniform" and not row_kept and softmax_alone),
        causal, zero=spec.empty_row == "zero",
        empty_check=spec.empty_row != "zero" and softmax_alone and (
            term is not None and may_be_infinite(term)
            or spec.empty_row == "nan" and not row_kept),
        sinks=spec.sinks, output=spec.output)


def _product(factors: list[Expr]) -> Expr | None:
    return functools.reduce(Expr.__mul__, factors) if factors else None


def sdpa(s: Steps, p: Plan, query: Tensor, key: Tensor, value: Tensor,
         operands: tuple[Tensor, ...], state: str, fallback: Callable[[], Tensor]) -> Tensor:
    """Attention by the Plan; strides as F.scaled_dot_product_attention gives them.

    state: "traced", "safe" or "all", see `call_state`; `fallback` computes the same in another
    way, where fused attention cannot.
    """
    mask = tile = leads = None
    if not p.bare:
        if p.sinks is not None and state != "all":
            return fallback()
        if p.masking is None or p.masking.slot is None or p.sinks is not None or (
                p.query_factor is not None or p.key_factor is not None):
            if (p.query_factor is not None or p.key_factor is not None) and _learned(operands):
                return fallback()  # the factor's gradient is more accurate from the scores
            tile = _tile(s, query, key, value, operands)
            query, key = _with_factors(p, query, key, tile)
        if p.masking is not None:
            mask = p.masking.mask(query, tile, operands, state)
            if torch.is_grad_enabled() and any(
                    t.requires_grad for t in (query, key, value, mask)) and (
                    mask.requires_grad or (p.masking.uniform if state == "traced"
                                           else _has_low_row(mask))):
                return fallback()
    shape = query.shape
    if not len(shape) == key.dim() == value.dim() == 4:
        leads = broadcast(*(t.shape[:-2] for t in (query, key, value, mask) if t is not None))
    q, k, v, mask, shared = collapse(query, key, value, mask)
    on_cpu = q.is_cpu
    plain = on_cpu and state != "traced"
    look = p.empty_check
    if on_cpu:
        if q.stride(-1) != 1 or k.stride(-1) != 1 or v.stride(-1) != 1:
            q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
        if shape[-1] != v.shape[-1]:
            q, k, v = _padded(q, k, v)
        if plain and mask is None and not p.zero:
            if p.sinks is not None or not p.causal and shape[-2] * k.shape[-2] <= _SMALL:
                mask = _zero(q.dtype)
            else:
                look = True
    if p.sinks is not None:
        if not flash.takes(q, k, v):
            return fallback()
        out = _with_sink(p, q, k, v, mask, tile, leads)
    elif plain and state == "safe" and flash.takes(q, k, v):
        out = flash.Flash.apply(
            q, k, v, None if mask is None else flash.additive(mask, q.dtype), p.causal, p.scale)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, 0.0, p.causal, scale=p.scale, enable_gqa=shared)
    if plain:
        if look and _has_zero_row(out) and k.shape[-2]:
            return fallback()
        if p.masking is not None and p.masking.may_give_nan and _has_nan_row(out):
            return fallback()
    elif look and mask is not None and k.shape[-2] > 0:
        out = torch.where(_empty_rows(mask), torch.nan, out)  # masked_fill would lose the strides
    if out.shape[-1] != value.shape[-1]:
        out = out[..., : value.shape[-1]].contiguous()
    if leads is not None:
        out = out.reshape(*leads, *out.shape[-2:])
    return out if p.output is E.out else _finished(s, out, value, key, operands)


def quick(p: Plan, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """`sdpa` for the commonest case of inference, or None: this is where Python time counts."""
    rows, keys = query.shape, key.shape
    if (len(rows) != 4 or len(keys) != 4 or keys != value.shape or rows[3] != keys[3]
            or rows[1] != keys[1] or rows[0] != keys[0] or not query.is_cpu
            or query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1):
        return None
    if p.zero or not p.causal and rows[2] * keys[2] <= _SMALL:
        mask = None if p.zero else _zero(query.dtype)
        return F.scaled_dot_product_attention(
            query, key, value, mask, 0.0, p.causal, scale=p.scale)
    out = F.scaled_dot_product_attention(query, key, value, None, 0.0, p.causal, scale=p.scale)
    return None if _has_zero_row(out) and keys[2] else out


def _has_low_row(mask: Tensor) -> bool:
    """Does a row hold nothing but low values? The fused backward takes the weights from
    exp(score - lse), and lse has no digits left there: a uniform row comes back as ones."""
    if mask.dtype == torch.bool or not mask.numel():
        return False
    return bool(mask.detach().amax(-1).min() < -_MOST_SHIFT)


def _learned(operands: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(o.requires_grad for o in operands)


def _tile(s: Steps, query: Tensor, key: Tensor, value: Tensor, operands: tuple[Tensor, ...]
          ) -> Tile:
    leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    named = dict(zip((o.slot for o in s.spec.operands), operands, strict=True))
    dtype = working_dtype(query)
    return Tile((*leads, query.shape[-2], key.shape[-2]), named, dtype, query.device)


def _with_factors(p: Plan, query: Tensor, key: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    dtype = query.dtype
    if p.query_factor is not None:
        query = (query.to(tile.dtype) * compiled(p.query_factor)(tile)).to(dtype)
    if p.key_factor is not None:
        factor = torch.atleast_2d(compiled(p.key_factor)(tile)).transpose(-1, -2)
        key = (key.to(tile.dtype) * factor).to(dtype)
    return query, key


@functools.lru_cache(maxsize=16)
def _zero(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(1, 1, dtype=dtype, device="cpu")


def _padded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equal head dims."""
    more = v.shape[-1] - q.shape[-1]
    if more > 0:
        return F.pad(q, (0, more)), F.pad(k, (0, more)), v
    return q, k, F.pad(v, (0, -more))


def _finished(s: Steps, out: Tensor, value: Tensor, key: Tensor, operands: tuple[Tensor, ...]
              ) -> Tensor:
    """The output after its epilogue."""
    named = dict(zip((o.slot for o in s.spec.operands), operands, strict=True))
    end = Tile(tuple(out.shape), named, out.dtype, out.device, last=("q", "d"),
               sizes={"k": key.shape[-2]})
    return finish(s, out, value, end, "none").to(out.dtype)


def _with_sink(p: Plan, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, tile: Tile | None,
               leads: tuple[int, ...] | None) -> Tensor:
    """Weights of the keys beside a sink: exp(x - lse) * exp(lse) / (exp(lse) + exp(sink))."""
    assert p.sinks is not None and tile is not None
    out, lse = flash.flash_with_lse(
        q, k, v, None if mask is None else flash.additive(mask, q.dtype), p.causal, p.scale)
    share = lse.unsqueeze(-1)
    if leads is not None:
        share = share.reshape(*leads, *share.shape[-2:])
    share = (share - compiled(p.sinks)(tile)).sigmoid_()
    return out.mul_(share.reshape(out.shape[0], -1, *share.shape[-2:])).contiguous()


def _has_zero_row(out: Tensor) -> bool:
    """Whether the kernel may have met a row without a key, or of NaN; dear only when it may."""
    if out.numel() == 0:
        return False
    first = out.select(-1, 0)
    if first.count_nonzero().item() == first.numel():
        return False
    return not out.any(-1).all().item()


def _empty_rows(mask: Tensor) -> Tensor:
    if mask.dtype == torch.bool:
        return ~mask.any(-1, keepdim=True)
    return mask.amax(-1, keepdim=True) == -torch.inf


def _has_nan_row(out: Tensor) -> bool:
    return out.numel() > 0 and math.isnan(out.select(-1, 0).sum().item())
