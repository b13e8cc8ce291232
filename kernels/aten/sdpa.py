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
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from attnopt.kernels.aten import flash
from attnopt.kernels.aten.codegen import compiled
from attnopt.kernels.aten.dense import HALF
from attnopt.kernels.aten.heads import collapse
from attnopt.kernels.aten.linear import linear, varies
from attnopt.kernels.aten.steps import Steps, finish, may_be_infinite
from attnopt.kernels.aten.tile import Tile, broadcast
from torch import Tensor
from torch.nn import functional as F

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import Causal
from attnopt.ir.spec import Spec

#: Up to here a mask of one zero is cheaper than a look at the output for rows of NaN.
_SMALL = 128 * 128
_MAX_PADDING = 2
#: Largest mask that is kept from call to call, in entries.
_CACHED = 1 << 20


@dataclass(frozen=True)
class Plan:
    """A Spec as arguments of fused attention.

    scale:       of the scores, a number
    query_factor, key_factor: multiply the queries or the keys; each broadcasts against the score
    terms:       what is added to the scores
    predicate:   the mask, unless `causal`
    empty_check: a row without a key may occur, and must not give the kernel's 0
    """

    scale: float
    query_factor: Expr | None
    key_factor: Expr | None
    terms: Expr | None
    predicate: Expr | None
    causal: bool
    uniform: bool
    zero: bool
    empty_check: bool
    sinks: Expr | None
    output: Expr

    @functools.cached_property
    def reads_operands(self) -> bool:
        """Whether more than query, key and value is needed for the scores."""
        return any(e is not None for e in (
            self.query_factor, self.key_factor, self.terms, self.predicate, self.sinks))

    def fits(self, head_dim: int, value_dim: int, device: str, requires_grad: bool = False,
             operand_grad: bool = False) -> bool:
        """Whether fused attention is the right thing at these shapes."""
        if self.sinks is not None and (device != "cpu" or requires_grad or not flash.AVAILABLE):
            return False
        if operand_grad and (self.terms is not None or self.sinks is not None):
            return False
        return device != "cpu" or max(head_dim, value_dim) <= _MAX_PADDING * min(
            head_dim, value_dim)


def reasons(spec: Spec) -> list[str]:
    """Why fused attention cannot compute the Spec; empty where it can."""
    found = []
    if spec.score != "dot":
        found.append(f"score must be a dot product, got {spec.score}")
    if spec.normalizer != "softmax":
        found.append(f"normalizer must be softmax, got {spec.normalizer}")
    if spec.weights is not E.weight or spec.renormalize:
        found.append("weights must reach the values as the softmax gives them")
    if spec.mix_logits or spec.mix_weights:
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
    predicate = spec.mask.predicate()
    causal = spec.mask == Causal() and not parts.terms
    sinks = spec.sinks is not None
    row_kept = spec.mask.row_always_kept()
    hides = may_be_infinite(parts.sum()) if parts.terms else False
    return Plan(
        parts.scale, _product(of_query), _product(of_key), parts.sum() if parts.terms else None,
        None if causal or predicate is E.TRUE else predicate, causal,
        uniform=spec.empty_row == "uniform" and not row_kept and not sinks,
        zero=spec.empty_row == "zero",
        empty_check=spec.empty_row != "zero" and not sinks and (
            hides or spec.empty_row == "nan" and not row_kept),
        sinks=spec.sinks, output=spec.output)


def _product(factors: list[Expr]) -> Expr | None:
    return functools.reduce(Expr.__mul__, factors) if factors else None


def sdpa(s: Steps, p: Plan, query: Tensor, key: Tensor, value: Tensor,
         operands: tuple[Tensor, ...], mode: str, fallback: Callable[[], Tensor]) -> Tensor:
    """Attention by the Plan; strides as F.scaled_dot_product_attention gives them.

    mode: "traced", "safe" (a gradient may be asked for) or "all"; `fallback` computes the same in
    another way, where fused attention cannot.
    """
    if p.sinks is not None and mode != "all":
        return fallback()
    mask, tile = None, None
    if p.reads_operands:
        tile = _tile(s, query, key, value, operands)
        query, key, mask = _with_operands(p, query, key, tile, mode)
        if mask is not None and mask.requires_grad and torch.is_grad_enabled():
            return fallback()
    leads = None
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        leads = broadcast(*(t.shape[:-2] for t in (query, key, value, mask)
                                         if t is not None))
    q, k, v, mask, shared = collapse(query, key, value, mask)
    plain = mode != "traced" and q.device.type == "cpu"
    look = p.empty_check
    if q.device.type == "cpu":
        q, k, v = _for_flash(q, k, v)
        if plain and mask is None and not p.zero:
            if p.sinks is not None or not p.causal and q.shape[-2] * k.shape[-2] <= _SMALL:
                mask = _zero(q.dtype)
            else:
                look = True
    if p.sinks is not None:
        if not flash.takes(q, k, v):
            return fallback()
        out = _with_sink(p, q, k, v, mask, tile, leads)
    elif plain and mode == "safe" and flash.takes(q, k, v):
        out = flash.Flash.apply(
            q, k, v, None if mask is None else flash.additive(mask, q.dtype), p.causal, p.scale)
    else:
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=p.causal, scale=p.scale, enable_gqa=shared)
    if look and plain:
        if _has_zero_row(out) and k.shape[-2]:
            return fallback()
    elif look and mask is not None and k.shape[-2] > 0:
        out = out.masked_fill(_empty_rows(mask), torch.nan)
    if out.shape[-1] != value.shape[-1]:
        out = out[..., : value.shape[-1]].contiguous()
    if leads is not None:
        out = out.reshape(*leads, *out.shape[-2:])
    if p.output is E.out:
        return out
    named = dict(zip((o.slot for o in s.spec.operands), operands, strict=True))
    end = Tile(tuple(out.shape), named, out.dtype, out.device, last=("q", "d"),
               sizes={"k": key.shape[-2]})
    return finish(s, out, value, end, "none").to(out.dtype)


def _tile(s: Steps, query: Tensor, key: Tensor, value: Tensor, operands: tuple[Tensor, ...]
          ) -> Tile:
    leads = broadcast(query.shape[:-2], key.shape[:-2], value.shape[:-2])
    named = dict(zip((o.slot for o in s.spec.operands), operands, strict=True))
    dtype = torch.float32 if query.dtype in HALF else query.dtype
    return Tile((*leads, query.shape[-2], key.shape[-2]), named, dtype, query.device)


def _with_operands(p: Plan, query: Tensor, key: Tensor, tile: Tile, mode: str
                   ) -> tuple[Tensor, Tensor, Tensor | None]:
    """Queries and keys times their factors, and the mask: bool, or float and added."""
    dtype = query.dtype
    if p.query_factor is not None:
        query = (query.to(tile.dtype) * compiled(p.query_factor)(tile)).to(dtype)
    if p.key_factor is not None:
        factor = torch.atleast_2d(compiled(p.key_factor)(tile)).transpose(-1, -2)
        key = (key.to(tile.dtype) * factor).to(dtype)
    keep = None
    if p.predicate is not None:
        fixed = mode != "traced" and not p.predicate.slots and (
            tile.shape[-2] * tile.shape[-1] <= _CACHED)
        keep = _structure(p.predicate, tile.shape, str(tile.device)) if fixed else (
            _predicate(p.predicate, tile))
    if p.terms is None and not (p.uniform and keep is not None):
        return query, key, keep
    term = torch.zeros((), dtype=tile.dtype) if p.terms is None else compiled(p.terms)(tile)
    term = torch.as_tensor(term, device=tile.device)
    # Half precision may come with a float32 mask on a CPU; elsewhere kernels want their own dtype.
    if term.dtype != dtype and not (
            dtype in HALF and term.dtype == torch.float32 and tile.device.type == "cpu"):
        term = term.to(tile.dtype if tile.device.type == "cpu" else dtype)
    if keep is not None:
        # The lowest number swallows every score in float32: a row of it alone is uniform.
        fill = -torch.inf
        if p.uniform:
            term = term.to(tile.dtype)
            fill = torch.finfo(term.dtype).min
        term = torch.where(keep, term, torch.full((), fill, dtype=term.dtype, device=term.device))
    return query, key, torch.atleast_2d(term)


def _predicate(predicate: Expr, tile: Tile) -> Tensor:
    return torch.atleast_2d(torch.as_tensor(compiled(predicate)(tile), device=tile.device))


@functools.lru_cache(maxsize=16)
def _structure(predicate: Expr, shape: tuple[int, ...], device: str) -> Tensor:
    """A mask that reads no operand, for the next layers and calls of the same lengths."""
    with torch.inference_mode(False):
        return _predicate(predicate, Tile(shape, {}, torch.float32, torch.device(device)))


@functools.lru_cache(maxsize=16)
def _zero(dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.zeros(1, 1, dtype=dtype)


def _for_flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Copies with a last stride of 1 and equal head dims, where they have not got them."""
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    more = v.shape[-1] - q.shape[-1]
    if more > 0:
        q, k = F.pad(q, (0, more)), F.pad(k, (0, more))
    elif more < 0:
        v = F.pad(v, (0, -more))
    return q, k, v


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
