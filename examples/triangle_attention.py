"""Triangle attention of protein models: every row of a pair representation with the same bias.

A pair representation holds a vector for each pair of residues (i, j). Residues j of a row i attend
to each other, and the score of (i, j) with (i, k) gets a number made from the pair (j, k), the
third edge of the triangle (AlphaFold 2, doi.org/10.1038/s41586-021-03819-2, algorithms 13 and 14).
That number depends on the data and is the same for all rows i. Authors add it, and a number for
each padded residue, to scores of rows x heads x N x N. `attnopt.optimize` keeps it as what it is, a
tensor of heads x N x N that is read again for each row and never repeated, and the padding as a
vector.

    python examples/triangle_attention.py [--residues 128] [--padded 16] [--repeats 3]

Weights and pairs are drawn at random.
"""

import argparse
import math

import before_and_after
import torch
from torch import Tensor, nn


class TriangleAttention(nn.Module):
    """Pairs (batch, N, N, size) and which of them are real (batch, N, N) to an update of pairs.

    Args:
        starting: attention runs along rows i; otherwise along columns j.
    """

    def __init__(self, size: int, heads: int, starting: bool) -> None:
        super().__init__()
        self.heads, self.starting = heads, starting
        self.norm, self.bias = nn.LayerNorm(size), nn.Linear(size, heads, bias=False)
        self.query, self.key, self.value = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.gate, self.out = nn.Linear(size, size), nn.Linear(size, size)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def forward(self, pairs: Tensor, real: Tensor) -> Tensor:
        if not self.starting:
            pairs, real = pairs.transpose(1, 2), real.transpose(1, 2)
        x = self.norm(pairs)
        padding = (1e9 * (real - 1))[:, :, None, None, :]
        triangle = self.bias(x).permute(0, 3, 1, 2)[:, None]

        query, key, value = (self.split(f(x)) for f in (self.query, self.key, self.value))
        scores = (query / math.sqrt(query.shape[-1])) @ key.transpose(-1, -2)
        for bias in (padding, triangle):
            scores += bias
        mixed = (scores.softmax(-1) @ value).transpose(-2, -3).flatten(-2)
        update = self.out(torch.sigmoid(self.gate(x)) * mixed)
        return update if self.starting else update.transpose(1, 2)


class PairUpdate(nn.Module):
    """Both directions, each added to the pairs; what belongs to padding is 0 then."""

    def __init__(self, size: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.rows = TriangleAttention(size, heads, starting=True)
        self.columns = TriangleAttention(size, heads, starting=False)

    def forward(self, pairs: Tensor, real: Tensor) -> Tensor:
        pairs = pairs + self.rows(pairs, real)
        return (pairs + self.columns(pairs, real)) * real.unsqueeze(-1)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--residues", type=int, default=128)
    parser.add_argument("--padded", type=int, default=16, help="residues that are no real ones")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    n, present = options.residues, options.residues - options.padded
    model = PairUpdate().eval()
    pairs = torch.randn(1, n, n, 64)
    real = torch.zeros(1, n, n)
    real[:, :present, :present] = 1
    print(f"{n} residues, {n * n} pairs: {4 * n**3 / 1e6:.0f} million scores in either direction, "
          f"a bias of {4 * n * n / 1e3:.0f} thousand numbers\n")

    optimized = before_and_after.optimize(model, (pairs, real))
    before_and_after.show(model, optimized, (pairs, real), options.repeats)

    other = torch.zeros(1, n, n)
    other[:, : present // 2, : present // 2] = 1
    kept = slice(0, present // 2)
    difference = (optimized(pairs, other) - model(pairs, other))[:, kept, kept].abs().max()
    print(f"  a shorter protein, the same optimised model: pairs differ by at most "
          f"{difference:.1e}\n")


if __name__ == "__main__":
    main()
