"""A language model without position embeddings: ALiBi, made anew at each call as authors make it.

Every head takes its own slope times the distance to the key off its scores ("Train short, test
long", arXiv 2108.12409). The model below builds that penalty and the causal mask in its forward as
one heads x N x N tensor. `attnopt.optimize` proves that the tensor is a closed form of the row, the
key and the slope, at every length, computes it in the kernel and skips the keys to come: nothing of
N x N is left.

    python examples/alibi_language_model.py [--steps 60] [--tokens 2048] [--repeats 3]

The model learns bytes of the Python language reference, which come with Python, in rows of 128, and
is then asked about rows many times as long.
"""

import argparse
import time
from pydoc_data.topics import topics

import before_and_after
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

SHORT = 128


class Block(nn.Module):
    """Attention with a penalty for distance, then a perceptron."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, hidden: Tensor, penalty: Tensor) -> Tensor:
        split = self.qkv(self.before(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5 + penalty
        mixed = scores.softmax(-1) @ value
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(-2))
        return hidden + self.mlp(self.between(hidden))


class Model(nn.Module):
    """Bytes (batch, N) to logits (batch, N, 256)."""

    def __init__(self, size: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.bytes = nn.Embedding(256, size)
        self.blocks = nn.ModuleList(Block(size, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(size), nn.Linear(size, 256)
        self.register_buffer("slopes", 2.0 ** (-8 / heads * torch.arange(1, heads + 1)))

    def forward(self, tokens: Tensor) -> Tensor:
        place = torch.arange(tokens.shape[1], device=tokens.device)
        distance = place[:, None] - place
        penalty = -self.slopes[:, None, None] * distance.abs()
        penalty = penalty.masked_fill(distance < 0, float("-inf"))
        hidden = self.bytes(tokens)
        for block in self.blocks:
            hidden = block(hidden, penalty)
        return self.head(self.norm(hidden))


def loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def learn(model: nn.Module, text: Tensor, steps: int) -> float:
    """Loss of the last step, in nats a byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = torch.zeros(())
    for _ in range(steps):
        starts = torch.randint(len(text) - SHORT, (8, 1))
        rows = text[starts + torch.arange(SHORT)]
        found = loss(model(rows), rows)
        optimizer.zero_grad()
        found.backward()
        optimizer.step()
    return found.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=60, help="of training")
    parser.add_argument("--tokens", type=int, default=2048, help="the longest row")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    text = torch.tensor(list("\n".join(topics[t] for t in sorted(topics)).encode()))
    unseen, text = text[: options.tokens], text[options.tokens :]
    model = Model()
    start = time.perf_counter()
    last = learn(model, text, options.steps)
    print(f"{options.steps} steps on rows of {SHORT} bytes in {time.perf_counter() - start:.1f} s, "
          f"loss {last:.2f} nats a byte\n")

    model.eval()
    row = unseen[None, : options.tokens]
    with torch.no_grad():
        optimized = before_and_after.optimize(
            model, (row,), dynamic_shapes=({1: Dim("length", min=2, max=1 << 16)},))
    before_and_after.show(model, optimized, (row,), options.repeats)
    with torch.no_grad():
        length = SHORT
        while length <= options.tokens:
            rows = unseen[None, :length]
            losses = [loss(m(rows), rows).item() for m in (model, optimized)]
            print("  rows of {:5d} bytes: loss {:.5f}, optimised {:.5f} nats a byte".format(
                length, *losses))
            length *= 2
    print(f"  calls of the optimised model: {dict(optimized.report.calls)}\n")


if __name__ == "__main__":
    main()
