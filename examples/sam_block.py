"""A global block of SAM's image encoder: every patch of an image attends to all 64 x 64.

Positions enter as two small products: of the query with a vector for each distance in rows, and of
the query with one for each distance in columns (arXiv 2304.02643, after MViTv2, arXiv 2112.01526).
Their sum is a number per pair of patches, 16.8 million for each head, and authors make it whole,
beside the scores. `attnopt.optimize` finds that a pair's number is the sum of two looked up by the
row and by the column of the key; the kernel adds these, and nothing of patches x patches is made.

    python examples/sam_block.py [--side 64] [--size 128] [--heads 2] [--repeats 3]

SAM's ViT-B has size 768 and 12 heads; the original then needs 3 GB. Weights are drawn at random.
"""

import argparse

import before_and_after
import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Attention of a map (batch, side, side, size) with decomposed relative positions."""

    def __init__(self, size: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (size // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.rel_pos_h, self.rel_pos_w = (
            nn.Parameter(torch.randn(2 * side - 1, size // heads) * self.scale) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, size = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.reshape(3, batch * self.heads, height * width, -1).unbind(0)
        scores = (query * self.scale) @ key.transpose(-2, -1)
        scores = self.add_positions(scores, query, height, width)
        x = scores.softmax(-1) @ value
        x = x.view(batch, self.heads, height, width, -1).permute(0, 2, 3, 1, 4)
        return self.proj(x.reshape(batch, height, width, size))

    def add_positions(self, scores: Tensor, query: Tensor, height: int, width: int) -> Tensor:
        rows, columns = (
            table[torch.arange(n)[:, None] - torch.arange(n) + n - 1]
            for table, n in ((self.rel_pos_h, height), (self.rel_pos_w, width)))
        patches = query.reshape(-1, height, width, query.shape[-1])
        by_row = torch.einsum("bhwc,hkc->bhwk", patches, rows)
        by_column = torch.einsum("bhwc,wkc->bhwk", patches, columns)
        scores = scores.view(-1, height, width, height, width)
        scores = scores + by_row[..., :, None] + by_column[..., None, :]
        return scores.view(-1, height * width, height * width)


class Block(nn.Module):
    def __init__(self, size: int, heads: int, side: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.attn = Attention(size, heads, side)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=64, help="patches along an edge of the image")
    parser.add_argument("--size", type=int, default=128, help="channels")
    parser.add_argument("--heads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    block = Block(options.size, options.heads, options.side).eval()
    x = torch.randn(1, options.side, options.side, options.size)
    n = options.side**2
    print(f"{n} patches: {options.heads * n * n / 1e6:.0f} million scores, each with a bias of its "
          f"own, from {2 * options.heads * n * options.side / 1e6:.1f} million numbers\n")

    optimized = before_and_after.optimize(block, (x,))
    before_and_after.show(block, optimized, (x,), options.repeats)


if __name__ == "__main__":
    main()
