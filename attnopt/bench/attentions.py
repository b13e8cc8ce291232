"""The attentions that are measured: as an author writes them, and as each peer would take them.

An `Attention` is a module of query (B, H, Q, D), key and value (B, H or fewer, K, D), and of what
`extras` gives beside them. `forward` is the author's code in plain PyTorch. `fused` gives the
arguments of SDPA that say the same, `score` and `keep` the two functions that FlexAttention takes;
these also make the float64 truth, so that it does not come from the code that is judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(D)) V; subclasses change the scores."""

    #: whether `score` and `keep` differ from what every attention has
    has_score = False
    has_keep = False
    #: whether batch entries differ in what `keep` says
    by_batch = False

    def extras(self) -> tuple[Tensor, ...]:
        """Inputs of `forward` after the value: what a user gives with each call."""
        return ()

    def see(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        """Called once with the inputs, for `fused`, `score` and `keep` that depend on them."""

    def pairs(self, queries: int, keys: int) -> int | None:
        """Visible scores of one head, where `keep` does not tell."""
        return None

    def others(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """Further spellings by an author, by the name of their baseline."""
        return {}

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if key.shape[1] != query.shape[1]:
            key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1)
                          for x in (key, value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return torch.softmax(self.change(scores), dim=-1) @ value

    def change(self, scores: Tensor) -> Tensor:
        """What the author does to the scores (B, H, Q, K)."""
        return scores

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        """Arguments of scaled_dot_product_attention beside the tensors; None: it cannot say it."""
        return {}

    def score(self, score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
        """The scaled score of heads h, rows q and keys k, changed."""
        return score

    def keep(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        """Whether row q sees key k."""
        return q >= 0


class _Masked(Attention):
    has_keep = True

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        return {"attn_mask": self._grid(query.shape[-2], key.shape[-2], query.device)}

    def _grid(self, queries: int, keys: int, device: torch.device) -> Tensor:
        q = torch.arange(queries, device=device)[:, None]
        return self.keep(0, 0, q, torch.arange(keys, device=device))


class Causal(_Masked):
    """A triangle of minus infinity."""

    def change(self, scores: Tensor) -> Tensor:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        return scores.masked_fill(~mask, float("-inf"))

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        return {"is_causal": True}

    def keep(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k


class SlidingWindow(_Masked):
    """A row sees itself and the `window` - 1 tokens before it."""

    def __init__(self, window: int) -> None:
        super().__init__()
        self.window = window

    def change(self, scores: Tensor) -> Tensor:
        q = torch.arange(scores.shape[-2], device=scores.device)[:, None]
        k = torch.arange(scores.shape[-1], device=scores.device)[None, :]
        mask = (k <= q) & (k > q - self.window)
        return scores.masked_fill(~mask, float("-inf"))

    def keep(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        return (k <= q) & (k > q - self.window)


class Neighborhood(_Masked):
    """Each token of a `height` x `width` image sees the `size` x `size` tokens around it.

    The window is moved inside at the edges. The author keeps it as a mask, a buffer.
    """

    mask: Tensor

    def __init__(self, height: int, width: int, size: int) -> None:
        super().__init__()
        self.height, self.width, self.size = height, width, size
        count = height * width
        self.register_buffer("mask", self._grid(count, count, torch.device("cpu")))

    def change(self, scores: Tensor) -> Tensor:
        return scores.masked_fill(~self.mask, float("-inf"))

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        return {"attn_mask": self.mask}

    def keep(self, b: Any, h: Any, q: Any, k: Any) -> Any:
        rows = self._near(q // self.width, k // self.width, self.height)
        return rows & self._near(q % self.width, k % self.width, self.width)

    def _near(self, q: Any, k: Any, length: int) -> Any:
        start = torch.clamp(q - self.size // 2, 0, length - self.size)
        return (k >= start) & (k < start + self.size)


class Alibi(Attention):
    """A penalty for distance, with a slope for each head."""

    has_score = True

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def _bias(self, queries: int, keys: int, device: torch.device) -> Tensor:
        slopes = 2.0 ** (-8.0 / self.heads * torch.arange(1, self.heads + 1, device=device))
        distance = torch.arange(keys, device=device) - torch.arange(queries, device=device)[:, None]
        return -slopes[:, None, None] * distance.abs()

    def change(self, scores: Tensor) -> Tensor:
        queries, keys = scores.shape[-2:]
        return scores + self._bias(queries, keys, scores.device).to(scores.dtype)

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        bias = self._bias(query.shape[-2], key.shape[-2], query.device)
        return {"attn_mask": bias.to(query.dtype)[None]}

    def score(self, score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
        return score - torch.exp2(-8.0 / self.heads * (h + 1)) * (q - k).abs()


class Softcap(Attention):
    """Scores bent to lie within +-`cap`."""

    has_score = True

    def __init__(self, cap: float = 20.0) -> None:
        super().__init__()
        self.cap = cap

    def change(self, scores: Tensor) -> Tensor:
        return self.cap * torch.tanh(scores / self.cap)

    def fused(self, query: Tensor, key: Tensor) -> dict[str, Any] | None:
        return None

    def score(self, score: Tensor, b: Any, h: Any, q: Any, k: Any) -> Tensor:
        return self.cap * torch.tanh(score / self.cap)
