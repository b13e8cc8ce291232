"""Spec -> plain torch: slow, obviously right, the oracle of every kernel test.

`reference(spec)` returns a function that computes the normal form of `attnopt.ir.spec` step by
step in the dtype of its inputs, with every N x N tensor written out. Give it float64.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec

Operands = Mapping[str, Tensor] | Sequence[Tensor]

_NORMALIZERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid, "relu": torch.relu, "exp": torch.exp, "identity": lambda x: x,
    "softplus": lambda x: F.softplus(x, threshold=40),
}


def reference(spec: Spec) -> Callable[..., Any]:
    """The attention of `spec` as a function (query, key, value, operands=()).

    query (*L, Q, D), key (*L, K, D), value (*L, K, Dv), leading axes broadcast; operands by slot,
    or in the order of `spec.operands`. Returns (*L, Q, Dv); with `with_lse` or `with_weights` a
    tuple that goes on with the log-sum-exp (*L, Q) and the weights (*L, Q, K) as they meet the
    values. Raises ValueError for a missing operand.
    """
    def run(query: Tensor, key: Tensor, value: Tensor, operands: Operands = (), *,
            with_lse: bool = False, with_weights: bool = False) -> Any:
        result = _Run(spec, query, key, value, _by_slot(spec, operands))
        extras = [result.lse()] * with_lse + [result.weights] * with_weights
        return (result.out, *extras) if extras else result.out

    return run


def _by_slot(spec: Spec, operands: Operands) -> dict[str, Tensor]:
    if isinstance(operands, Mapping):
        given = dict(operands)
    else:
        if len(operands) != len(spec.operands):
            raise ValueError(f"operands must be {len(spec.operands)}, got {len(operands)}")
        given = {o.slot: t for o, t in zip(spec.operands, operands, strict=True)}
    missing = spec.slots - set(given)
    if missing:
        raise ValueError(f"operands must have every slot, got no {sorted(missing)}")
    return given


class _Run:
    """One evaluation; the steps are those of the normal form, in order."""

    def __init__(self, spec: Spec, query: Tensor, key: Tensor, value: Tensor,
                 operands: dict[str, Tensor]) -> None:
        self.spec, self.operands, self.dtype = spec, operands, query.dtype
        self.leaves: dict[Expr, Tensor] = {}
        leading = [query.shape[:-2], key.shape[:-2]]
        if not spec.mix_logits and not spec.mix_weights:  # mixing may change the number of heads
            leading.append(value.shape[:-2])
        self.shape = (*torch.broadcast_shapes(*leading), query.shape[-2], key.shape[-2])
        self.leaves[E.score] = raw_scores(spec, query, key, operands).expand(self.shape)
        x = self.full(spec.logits)
        if spec.mix_logits:
            x = mix(x, operands[spec.mix_logits])
        self.shape = tuple(x.shape)
        if spec.compute:
            x = x.to(torch.promote_types(x.dtype, getattr(torch, spec.compute)))
            self.dtype = x.dtype
        self.keep = torch.as_tensor(
            self.value_of(spec.mask.predicate()), device=x.device).expand(x.shape)
        self.sink = None if spec.sinks is None else self.row(spec.sinks)
        self.normalize(x)
        self.weights = self.edited().to(query.dtype)
        if spec.mix_weights:
            self.weights = mix(self.weights, operands[spec.mix_weights])
        if spec.mix_bias:
            self.weights = self.weights + operands[spec.mix_bias][:, None, None]
        self.weights = torch.dropout(self.weights, spec.dropout, train=spec.dropout > 0)
        self.out = self.finished(self.weights @ value, value)

    def value_of(self, expr: Expr) -> Any:
        return evaluate(expr, Env(self.shape, self.operands, self.leaves, dtype=self.dtype,
                                  device=self.leaves[E.score].device))

    def full(self, expr: Expr) -> Tensor:
        """The value at every (…, q, k)."""
        value = torch.as_tensor(self.value_of(expr), dtype=self.dtype,
                                device=self.leaves[E.score].device)
        return value.expand(torch.broadcast_shapes(value.shape, self.shape))

    def row(self, expr: Expr) -> Tensor:
        """The value at every (…, q), with one column."""
        return torch.as_tensor(self.value_of(expr), dtype=self.dtype,
                               device=self.leaves[E.score].device).expand(*self.shape[:-1], 1)

    def normalize(self, x: Tensor) -> None:
        """w = normalizer(x), and the statistics of its rows."""
        spec, keep, K = self.spec, self.keep, x.shape[-1]
        kept = x.masked_fill(~keep, -torch.inf)
        highest = kept.amax(-1, keepdim=True) if K else x.new_full((*x.shape[:-1], 1), -torch.inf)
        if spec.normalizer == "softmax":
            every = kept if self.sink is None else torch.cat([kept, self.sink], -1)
            sum_log = torch.logsumexp(every, -1, keepdim=True)
            total = sum_log.exp()
            # Rows without a key are set apart before softmax, so that no nan enters gradients.
            empty = ~keep.any(-1, keepdim=True) & (self.sink is None)
            rest = {"nan": torch.nan, "zero": 0.0, "uniform": 1 / max(K, 1)}[spec.empty_row]
            weight = torch.softmax(every.masked_fill(empty, 0.0), -1)[..., :K]
            weight = torch.where(empty, rest, weight)
        else:
            weight = torch.where(keep, _NORMALIZERS[spec.normalizer](x), 0.0)
            total = weight.sum(-1, keepdim=True)
            if self.sink is not None:
                total = total + _NORMALIZERS[spec.normalizer](self.sink)
            sum_log = total.log()
            weight = weight / total if spec.l1 else weight
        self.leaves |= {
            E.weight: weight, E.stat("max"): highest, E.stat("sum"): total, E.stat("lse"): sum_log,
            E.stat("count"): keep.sum(-1, keepdim=True)}
        self.leaves |= self.masses(weight)

    def masses(self, weight: Tensor) -> dict[Expr, Tensor]:
        """The weight of each key group that the epilogues ask for."""
        asked = {leaf for e in (self.spec.weights, self.spec.output) for leaf in e.leaves
                 if leaf.op == "stat" and leaf.value.startswith("mass:")}
        if not asked:
            return {}
        if self.spec.groups is None:
            raise ValueError(f"groups must be set for {sorted(map(str, asked))}")
        group = torch.as_tensor(self.value_of(self.spec.groups), device=weight.device)
        return {leaf: torch.where(group == int(leaf.value[5:]), weight, 0.0).sum(-1, keepdim=True)
                for leaf in asked}

    def edited(self) -> Tensor:
        """The weights after their own epilogue."""
        weight = self.full(self.spec.weights)
        total = weight.sum(-1, keepdim=True)
        self.leaves[E.stat("total")] = total
        return weight / total if self.spec.renormalize else weight

    def finished(self, out: Tensor, value: Tensor) -> Tensor:
        """The output after its epilogue."""
        if self.spec.output is E.out:
            return out
        leaves = {**self.leaves, E.out: out, E.value: value}
        env = Env(tuple(out.shape), self.operands, leaves, {"k": value.shape[-2]},
                  last=("q", "d"), dtype=out.dtype, device=out.device)
        return torch.as_tensor(evaluate(self.spec.output, env)).expand(out.shape).to(out.dtype)

    def lse(self) -> Tensor:
        return self.leaves[E.stat("lse")].squeeze(-1)


def raw_scores(spec: Spec, query: Tensor, key: Tensor, operands: Mapping[str, Tensor]) -> Tensor:
    """Raw scores (*L, Q, K); `score_weight` of an additive score is (D,) or (*L, D)."""
    match spec.score:
        case "dot":
            return query @ key.transpose(-1, -2)
        case "distance":
            return (query.unsqueeze(-2) - key.unsqueeze(-3)).square().sum(-1)
        case "additive":
            weight = operands["score_weight"][..., None, None, :]
            return (weight * torch.tanh(query.unsqueeze(-2) + key.unsqueeze(-3))).sum(-1)
        case _:
            return query.new_zeros(query.shape[-2], key.shape[-2])


def mix(x: Tensor, matrix: Tensor) -> Tensor:
    """New heads from old ones: `matrix` is (heads out, heads in)."""
    return torch.einsum("gh,...hqk->...gqk", matrix, x)
