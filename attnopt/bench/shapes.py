"""Attentions by their sizes alone, for what is measured tile by tile."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.cost.work import Work, work_of
from attnopt.ir import expr as E
from attnopt.ir.mask import ALL, Causal
from attnopt.ir.spec import Spec

KINDS = ("dense", "causal", "softcap")
_CAP = 30.0


@dataclass(frozen=True)
class Shape:
    """query (batch, heads / group, group, Q, D), key and value (batch, heads / group, 1, K, D).

    kind: "dense"; "causal", with the ends aligned; "softcap", a tanh of the scores
    """

    kind: str
    batch: int
    heads: int
    group: int
    queries: int
    keys: int
    head_dim: int
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.heads % self.group:
            raise ValueError(f"heads must be a multiple of {self.group}, got {self.heads}")

    def __str__(self) -> str:
        heads = str(self.heads) if self.group == 1 else f"{self.heads}/{self.heads // self.group}"
        return (f"{self.kind} B{self.batch} H{heads} Q{self.queries} K{self.keys} "
                f"d{self.head_dim}")

    @property
    def leading(self) -> tuple[int, int, int]:
        return self.batch, self.heads // self.group, self.group

    @property
    def sizes(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        """The shapes of query, key and value."""
        key = (self.batch, self.heads // self.group, 1, self.keys, self.head_dim)
        return (*self.leading, self.queries, self.head_dim), key, key

    @property
    def spec(self) -> Spec:
        return _spec(self.kind, self.head_dim)

    @property
    def work(self) -> Work:
        return work_of(self.spec, *self.sizes, str(self.dtype).removeprefix("torch."))

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
        """Random query, key and value, the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        query, key, value = (
            torch.randn(size, generator=generator, device=device).to(self.dtype)
            for size in self.sizes)
        return query, key, value

    def compose(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """As an author spells it; mask: (Q, K), true where a key is hidden."""
        scores = query @ key.transpose(-1, -2) * self.head_dim**-0.5
        if self.kind == "softcap":
            scores = torch.tanh(scores * (1 / _CAP)) * _CAP
        if mask is not None:
            scores = scores.masked_fill(mask, float("-inf"))
        return torch.softmax(scores, -1) @ value

    def hidden(self) -> Tensor | None:
        """bool (Q, K): keys that rows do not see; None where they see all."""
        if self.kind != "causal":
            return None
        return ~torch.ones(self.queries, self.keys, dtype=torch.bool).tril(self.keys - self.queries)


@functools.lru_cache(maxsize=64)
def _spec(kind: str, head_dim: int) -> Spec:
    logits = E.score * head_dim**-0.5
    if kind == "softcap":
        logits = E.call("tanh", logits * (1 / _CAP)) * _CAP
    ends = Causal(E.size("k") - E.size("q"))
    return Spec(logits=logits, mask=ends if kind == "causal" else ALL)
