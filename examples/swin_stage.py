"""A stage of a Swin Transformer: attention in windows, every second time in shifted ones.

Each head adds a learned number for the offset of query and key, and shifted windows, which hold
tokens from opposite edges of the map, take 100 off the scores between these (arXiv 2103.14030).
Authors gather the one as a heads x N x N tensor at each call and keep the other as a buffer of
windows x N x N. `attnopt.optimize` finds that the index buffer is a function of offsets on a grid
and that the mask compares regions: the kernel reads a short vector for each head and a region for
each token.

    python examples/swin_stage.py [--side 48] [--window 24] [--repeats 3]

The default window is that of models for images of 384 x 384 pixels. The table is drawn at random:
what is shown holds for any.
"""

import argparse
import itertools

import before_and_after
import torch
from torch import Tensor, nn


def offsets(window: int) -> Tensor:
    """Places (N, N) of all pairs of a window's tokens in a table of offsets."""
    rows, columns = torch.arange(window**2) // window, torch.arange(window**2) % window
    far = [t[:, None] - t + window - 1 for t in (rows, columns)]
    return far[0] * (2 * window - 1) + far[1]


def strangers(side: int, window: int) -> Tensor:
    """-100 (windows, N, N) between tokens that were no neighbours before the shift, else 0."""
    region = torch.zeros(side, side)
    cuts = (slice(0, -window), slice(-window, -(window // 2)), slice(-(window // 2), None))
    for number, (rows, columns) in enumerate(itertools.product(cuts, cuts)):
        region[rows, columns] = number
    n = side // window
    region = region.view(n, window, n, window).transpose(1, 2).reshape(n * n, window**2)
    return torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)


class Block(nn.Module):
    """Attention in windows of a map (batch, side, side, size), then a perceptron."""

    def __init__(self, size: int, heads: int, side: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.before, self.between = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        self.register_buffer("index", offsets(window))
        self.register_buffer("mask", strangers(side, window) if shift else None)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        return x + self.mlp(self.between(x))

    def attention(self, x: Tensor) -> Tensor:
        batch, side, _, size = x.shape
        count = side // self.window
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), dims=(1, 2))
        x = x.view(batch, count, self.window, count, self.window, size)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.window**2, size)

        windows, n, _ = x.shape
        query, key, value = self.qkv(x).view(windows, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        if self.mask is not None:
            scores = scores.view(batch, count**2, self.heads, n, n) + self.mask[None, :, None]
            scores = scores.view(windows, self.heads, n, n)
        x = self.out((scores.softmax(-1) @ value).transpose(1, 2).reshape(windows, n, size))

        x = x.view(batch, count, count, self.window, self.window, size)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, side, side, size)
        return torch.roll(x, (self.shift, self.shift), dims=(1, 2)) if self.shift else x


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=48, help="of the map, a multiple of the window")
    parser.add_argument("--window", type=int, default=24)
    parser.add_argument("--size", type=int, default=96, help="channels")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    side, window = options.side, options.window
    stage = nn.Sequential(*(Block(options.size, options.heads, side, window, shift)
                            for shift in (0, window // 2))).eval()
    x = torch.randn(1, side, side, options.size)
    n = window**2
    print(f"A map of {side} x {side} tokens in {(side // window) ** 2} windows of {n}: a bias of "
          f"{options.heads * n * n} numbers from {options.heads * (2 * window - 1) ** 2}\n")

    optimized = before_and_after.optimize(stage, (x,))
    before_and_after.show(stage, optimized, (x,), options.repeats)

    for block in stage:
        block.table.neg_()
    difference = (optimized(x) - stage(x)).abs().max()
    print(f"  other tables, the same optimised stage: outputs differ by at most {difference:.1e}\n")


if __name__ == "__main__":
    main()
