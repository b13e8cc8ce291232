"""Run a Deformable-DETR style detector on a photograph.

Each query looks at a few points of each level of a pyramid of features, where its own offsets say
(Zhu et al., "Deformable DETR", ICLR 2021), in the spelling that such models have in plain PyTorch:
F.grid_sample level by level, a stack of all samples, times the weights, summed. `attnopt.optimize`
reads that back to one sum over sampled points, which holds no samples. The weights are random: the
detections mean nothing, but they must be the same.

    python examples/deformable_detector.py [--size 512] [--layers 3] [--queries 300] [--repeats 3]

The photograph ("astronaut", NASA, public domain) comes with scikit-image.
"""

import argparse

import before_and_after
import torch
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, POINTS, CLASSES = 256, 8, 4, 20
STRIDES = (8, 16, 32, 64)


class DeformableAttention(nn.Module):
    """Queries (B, Q, WIDTH) look at `POINTS` places of each level, around their reference points.

    Args:
        grids: heights and widths of the levels.
    """

    def __init__(self, grids: list[tuple[int, int]]) -> None:
        super().__init__()
        self.grids = grids
        self.offsets = nn.Linear(WIDTH, HEADS * len(grids) * POINTS * 2)
        self.weights = nn.Linear(WIDTH, HEADS * len(grids) * POINTS)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.output = nn.Linear(WIDTH, WIDTH)

    def forward(self, query: Tensor, reference: Tensor, memory: Tensor) -> Tensor:
        batch, queries, _ = query.shape
        levels = len(self.grids)
        value = self.value(memory).view(batch, -1, HEADS, WIDTH // HEADS)
        offsets = self.offsets(query).view(batch, queries, HEADS, levels, POINTS, 2)
        sizes = torch.tensor([(w, h) for h, w in self.grids], device=query.device)
        locations = reference[:, :, None, None, None] + offsets / sizes[:, None]
        weights = self.weights(query).view(batch, queries, HEADS, levels * POINTS).softmax(-1)

        places = 2 * locations - 1
        samples = []
        pieces = value.split([h * w for h, w in self.grids], dim=1)
        for level, (height, width) in enumerate(self.grids):
            piece = pieces[level].permute(0, 2, 3, 1).reshape(batch * HEADS, -1, height, width)
            place = places[:, :, :, level].transpose(1, 2).flatten(0, 1)
            samples.append(F.grid_sample(piece, place, mode="bilinear", padding_mode="zeros",
                                         align_corners=False))
        by_head = weights.transpose(1, 2).reshape(batch * HEADS, 1, queries, levels * POINTS)
        out = (torch.stack(samples, dim=-2).flatten(-2) * by_head).sum(-1)
        return self.output(out.view(batch, WIDTH, queries).transpose(1, 2))


class Layer(nn.Module):
    """A layer of the encoder, or of the decoder, whose queries look at each other first."""

    def __init__(self, grids: list[tuple[int, int]], decoder: bool) -> None:
        super().__init__()
        self.among = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) if decoder else None
        self.cross = DeformableAttention(grids)
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(),
                                  nn.Linear(4 * WIDTH, WIDTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3))

    def forward(self, x: Tensor, reference: Tensor, memory: Tensor | None = None) -> Tensor:
        if self.among is not None:
            x = self.norms[2](x + self.among(x, x, x, need_weights=False)[0])
        x = self.norms[0](x + self.cross(x, reference, x if memory is None else memory))
        return self.norms[1](x + self.feed(x))


class Detector(nn.Module):
    """Pictures (1, 3, side, side) to class logits and boxes: (1, queries, CLASSES + 4)."""

    def __init__(self, side: int, layers: int, queries: int) -> None:
        super().__init__()
        grids = [(side // stride, side // stride) for stride in STRIDES]
        self.stem = nn.ModuleList(
            nn.Conv2d(3, WIDTH, stride, stride=stride) for stride in STRIDES)
        self.level = nn.Parameter(torch.randn(len(STRIDES), WIDTH))
        self.encoder = nn.ModuleList(Layer(grids, decoder=False) for _ in range(layers))
        self.decoder = nn.ModuleList(Layer(grids, decoder=True) for _ in range(layers))
        self.queries = nn.Parameter(torch.randn(1, queries, WIDTH))
        self.reference = nn.Linear(WIDTH, 2)
        self.classes, self.boxes = nn.Linear(WIDTH, CLASSES), nn.Linear(WIDTH, 4)
        centres = [torch.stack(torch.meshgrid(
            (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")[::-1],
            -1).view(1, -1, 2) for h, w in grids]
        self.register_buffer("centres", torch.cat(centres, 1))

    def forward(self, picture: Tensor) -> Tensor:
        memory = torch.cat([conv(picture).flatten(2).transpose(1, 2) + self.level[i]
                            for i, conv in enumerate(self.stem)], 1)
        for layer in self.encoder:
            memory = layer(memory, self.centres)
        found, reference = self.queries, self.reference(self.queries).sigmoid()
        for layer in self.decoder:
            found = layer(found, reference, memory)
        return torch.cat([self.classes(found), self.boxes(found).sigmoid()], -1)


def photograph(side: int) -> Tensor:
    """The photograph as (1, 3, side, side), normalised."""
    picture = torch.from_numpy(data.astronaut()).permute(2, 0, 1)[None].float() / 255
    picture = F.interpolate(picture, (side, side), mode="bilinear", antialias=True)
    return (picture - picture.mean((2, 3), keepdim=True)) / picture.std((2, 3), keepdim=True)


def best(found: Tensor, count: int = 5) -> list[tuple[int, int, float, list[float]]]:
    """(query, class, score, box) of the highest scores."""
    scores, classes = found[0, :, :CLASSES].softmax(-1).max(-1)
    order = scores.topk(count).indices.tolist()
    return [(i, int(classes[i]), float(scores[i]), found[0, i, CLASSES:].tolist()) for i in order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="side of the picture, 64s")
    parser.add_argument("--layers", type=int, default=3, help="of encoder and decoder each")
    parser.add_argument("--queries", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=3, help="of each timing")
    options = parser.parse_args()

    torch.manual_seed(0)
    model = Detector(options.size, options.layers, options.queries).eval()
    inputs = (photograph(options.size),)
    with torch.no_grad():
        optimized = before_and_after.optimize(model, inputs)
        before, after = (best(module(*inputs)) for module in (model, optimized))
    before_and_after.show(model, optimized, inputs, options.repeats)

    print("  query  class  score    box (centre, size)            score, optimised")
    for (query, label, score, box), (again, same, other, _) in zip(before, after, strict=True):
        place = " ".join(f"{x:.3f}" for x in box)
        print(f"  {query:5d}  {label:5d}  {score:.4f}  {place:28s}  {other:.4f}"
              f"{'' if (query, label) == (again, same) else '  another detection'}")


if __name__ == "__main__":
    main()
