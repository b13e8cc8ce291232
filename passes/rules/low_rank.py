"""Low rank: a constant bias cut off at the singular values that a tolerance on the logits allows.

For every head, with the rows of B centred, which softmax does not see:

    B - mean_k B  ~  f g^T,   f = U_R S_R^1/2,  g = V_R S_R^1/2,   R = min{r : max |B - f g^T| <= e}

A weight changes by a factor between exp(-2e) and exp(2e) then. FlashBias (arXiv 2505.12044) cuts at
99.5 % of the energy instead, which leaves logits off by some 7 % of the bias: the bound here is on
the largest difference of any logit, and the report prints the one that was met. Of tables that were
learned (T5's buckets, Swin's and LeViT's offsets) few are of low rank at all; those are kept whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from attnopt.errors import OptionError
from attnopt.ir.mask import ALL, Mask
from attnopt.passes.rules.reductions import whole
from attnopt.rules import Approximation, BlockTable, Decline, Factors, Region


class LowRank(Approximation):
    """Biases as products of at most `rank` columns, no logit off by more than `error`.

    Heads may need different ranks; all have the columns of the one that needs most. Biases that
    depend on parameters have values with `freeze=True` alone. path: pattern of the module paths
    that it is for.
    """

    name = "low-rank"
    recognizes = "a constant bias, by request: its largest singular values"

    def __init__(self, error: float, rank: int = 64, path: str = "*") -> None:
        self.error, self.rank, self.path = error, whole("rank", rank), path
        if isinstance(error, bool) or not isinstance(error, (int, float)) or not (
                0 < error < math.inf):
            raise OptionError(f"error must be a number above 0, got {error!r}")

    def reduce(self, region: Region) -> tuple[Mask, Mapping[str, BlockTable | Factors]]:
        if not region.biases:
            raise Decline("no constant bias is added to the scores")
        return ALL, {slot: self.cut(bias) for slot, bias in region.biases.items()}

    def cut(self, bias: Tensor) -> Factors:
        """The factors of a bias (H, Q, K)."""
        if not bool(bias.isfinite().all()):
            raise Decline("the bias must be finite, it hides keys")
        centred = bias.double() - bias.double().mean(-1, keepdim=True)
        heads = [self._head(matrix) for matrix in centred]
        most = max(f.shape[-1] for f, _ in heads)
        query, key = (torch.stack([torch.nn.functional.pad(pair[i], (0, most - pair[i].shape[-1]))
                                   for pair in heads]) for i in (0, 1))
        error = float((query.double() @ key.double().mT - centred).abs().max())
        return Factors(query, key, error)

    def _head(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        left, values, right = torch.linalg.svd(matrix, full_matrices=False)
        root = values.sqrt()
        f, g = (left * root).float(), (right.mT * root).float()
        rest = matrix.clone()
        for r in range(1, min(self.rank, len(values)) + 1):
            rest.addr_(f[:, r - 1].double(), g[:, r - 1].double(), alpha=-1.0)
            if float(rest.abs().max()) <= self.error:
                return f[:, :r], g[:, :r]
        raise Decline(f"a head's bias has no rank up to {self.rank} that keeps its logits within "
                      f"{self.error:g}")
