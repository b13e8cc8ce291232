"""Many documents in one row of tokens: a language model that must not look from one into another.

Training and scoring pack documents of different lengths one after the other, so that no token is
padding. The model below does what authors do: it compares the documents' numbers of every row and
key, ands that with the causal triangle, and fills the rest with the lowest number. What rows see is
a small part of all pairs, but the dense code computes them all. `attnopt.optimize` keeps the
numbers of the documents as they are, an input, and skips at run time what they hide: other
documents may come with the next call.

    python examples/packed_documents.py [--tokens 2048] [--repeats 3]

The texts are paragraphs of the Python language reference, which come with Python; tokens are bytes.
The model is small and untrained: what is shown is that each document gets what it gets alone.
"""

import argparse
import time
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt
from attnopt.ir.mask import Causal, Segments


class Block(nn.Module):
    """Attention among the tokens of a document, then a perceptron."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(size), nn.LayerNorm(size)
        self.qkv, self.out = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.mlp = nn.Sequential(nn.Linear(size, 4 * size), nn.GELU(), nn.Linear(4 * size, size))

    def forward(self, hidden: Tensor, hide: Tensor) -> Tensor:
        split = self.qkv(self.before(hidden)).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores.masked_fill(hide, torch.finfo(scores.dtype).min)
        mixed = scores.softmax(-1) @ value
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(-2))
        return hidden + self.mlp(self.between(hidden))


class Model(nn.Module):
    """Bytes (1, N), their documents and their places in them to logits (1, N, 256)."""

    def __init__(self, longest: int, size: int = 256, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, size), nn.Embedding(longest, size)
        self.blocks = nn.ModuleList(Block(size, heads) for _ in range(layers))
        self.head = nn.Linear(size, 256)

    def forward(self, tokens: Tensor, documents: Tensor, places: Tensor) -> Tensor:
        order = torch.arange(tokens.shape[1])
        future = order > order[:, None]
        foreign = documents[:, :, None] != documents[:, None, :]
        hide = (future | foreign)[:, None]
        hidden = self.bytes(tokens) + self.places(places)
        for block in self.blocks:
            hidden = block(hidden, hide)
        return self.head(hidden)


def read_documents(tokens: int) -> list[Tensor]:
    """Paragraphs as bytes, of `tokens` bytes in all; the last one is cut."""
    found: list[Tensor] = []
    for topic in sorted(topics):
        for paragraph in topics[topic].split("\n\n"):
            text = " ".join(paragraph.split()).encode()
            left = tokens - sum(map(len, found))
            if len(text) > 40 and left:
                found.append(torch.tensor(list(text[:left])))
    return found


def pack(documents: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, numbers of the documents and places in them, each (1, N)."""
    numbers = [torch.full((len(d),), i) for i, d in enumerate(documents)]
    places = [torch.arange(len(d)) for d in documents]
    return tuple(torch.cat(parts)[None] for parts in (documents, numbers, places))


def loss(logits: Tensor, tokens: Tensor) -> float:
    return F.cross_entropy(logits[0, :-1], tokens[0, 1:]).item()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    documents = read_documents(options.tokens)
    batch = pack(documents)
    lengths = [len(d) for d in documents]
    pairs = sum(n * (n + 1) // 2 for n in lengths)
    print(f"{len(documents)} documents of {min(lengths)} to {max(lengths)} bytes in a row of "
          f"{sum(lengths)}: {pairs / sum(lengths) ** 2:.1%} of all pairs are seen\n")

    model = Model(longest=options.tokens).eval()
    start = time.perf_counter()
    optimized = attnopt.optimize(model, batch)
    print(optimized.report)
    print(f"\noptimised and verified in {time.perf_counter() - start:.1f} s\n")
    ids = batch[1][0]
    print((Causal() & Segments("rows", "keys")).picture(
        len(ids), operands={"rows": ids[:, None], "keys": ids[None]}), "\n")

    logits, expected = optimized(*batch), model(*batch)
    print(f"  {optimized.report.measure(repeats=options.repeats)}")
    print(f"  logits differ by at most {(logits - expected).abs().max():.1e}; loss "
          f"{loss(logits, batch[0]):.4f} and {loss(expected, batch[0]):.4f} nats a byte")
    first = 0
    worst = 0.0
    for document in documents[:4]:
        alone = model(*pack([document]))
        packed = logits[:, first : first + len(document)]
        worst = max(worst, (alone - packed).abs().max().item())
        first += len(document)
    print(f"  each of the first {min(4, len(documents))} documents alone: logits differ by at most "
          f"{worst:.1e}")
    shuffled = pack(documents[::-1])
    difference = (optimized(*shuffled) - model(*shuffled)).abs().max()
    print(f"  the documents in reverse, with the same optimised model: {difference:.1e}\n")


if __name__ == "__main__":
    main()
