"""Raw scores of query and key rows, the two contractions, and the mixing of heads."""

from __future__ import annotations

import torch
from torch import Tensor

from attnopt.ir.spec import Spec
from attnopt.kernels.aten.tile import Tile


def contract(a: Tensor, b: Tensor) -> Tensor:
    """a (*L, M, R) @ b (*L, R, N). Heads that share `b` become rows of one product."""
    if a.dim() >= 3 and b.dim() >= 3 and b.shape[-3] == 1 and a.shape[-3] != 1:
        heads, rows = a.shape[-3], a.shape[-2]
        merged = contract(a.flatten(-3, -2), b.squeeze(-3))
        return merged.unflatten(-2, (heads, rows))
    return torch.matmul(a, b)


def augmented(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Rows whose dot product is the squared distance of query and key.

    In double precision |q|^2 - 2 q.k + |k|^2 of single-precision inputs is more exact than summing
    the squares in single precision, and one GEMM.
    """
    query, key = query.double(), key.double()
    one_q, one_k = torch.ones_like(query[..., :1]), torch.ones_like(key[..., :1])
    return (torch.cat([query * -2, query.square().sum(-1, keepdim=True), one_q], -1),
            torch.cat([key, one_k, key.square().sum(-1, keepdim=True)], -1))


def raw_scores(spec: Spec, query: Tensor, key: Tensor, tile: Tile) -> Tensor:
    """Raw scores (*L, Q, K), differentiable."""
    match spec.score:
        case "dot":
            return contract(query, key.transpose(-1, -2))
        case "distance" if query.dtype == torch.float32 and query.device.type == "cpu":
            rows, columns = augmented(query, key)
            return contract(rows, columns.transpose(-1, -2)).relu().to(query.dtype)
        case "distance":
            return (query.unsqueeze(-2) - key.unsqueeze(-3)).square().sum(-1)
        case "additive":
            return additive_scores(query, key, tile.operand("score_weight"))
    return query.new_zeros(query.shape[-2], key.shape[-2])


def additive_scores(query: Tensor, key: Tensor, weight: Tensor, mode: str = "none") -> Tensor:
    """Sum of weight * tanh(query + key); weight (D,) or (*L, D)."""
    both = query.unsqueeze(-2) + key.unsqueeze(-3)
    both = both.tanh_() if mode == "all" else both.tanh()
    if weight.dim() == 1:
        return both @ weight.to(both.dtype)
    return (both * weight[..., None, None, :]).sum(-1)


def mix(x: Tensor, matrix: Tensor) -> Tensor:
    """New heads from old ones: `matrix` is (heads out, heads in)."""
    rows, columns = x.shape[-2:]
    return (matrix.to(x.dtype) @ x.flatten(-2)).unflatten(-1, (rows, columns))
