"""A bird's-eye view of what six cameras see: image features lifted into space by their depths.

Each pixel has features and a distribution over depths. Authors multiply the two to a volume for
each camera, and sample it where the pillars over a map's cells project to, with learned offsets and
weights (BEVFormer's spatial cross-attention, arXiv 2203.17270, on DFA3D's volume, arXiv
2307.12972). `attnopt.optimize` proves that the volume is an outer product: it samples the features
alone, and weights their corners by depths. The result is the same, and the volume is never made.

    python examples/bev_lifting.py [--side 50] [--height 29] [--width 50] [--depths 64]
                                   [--channels 16] [--heads 4] [--repeats 3] [--out map.ppm]

The scene is drawn: coloured pillars around the car, whose colours are the first three features of
a pixel. The map that comes out shows them where they stand; `--out` writes it as a picture.
"""

import argparse
import math
from pathlib import Path

import before_and_after
import torch
from torch import Tensor, nn
from torch.nn import functional as F

CAMERAS, SPREAD, TILT = 6, math.tan(math.radians(35)), math.tan(math.radians(22))
NEAR, FAR, EXTENT, TALL = 1.0, 25.0, 20.0, 1.2
#: x and y ahead and to the left of the car, radius, colour; metres
PILLARS = [(12.0, 3.0, 2.0, "r"), (5.0, -9.0, 1.8, "g"), (-9.0, -7.0, 2.4, "b"),
           (-6.0, 10.0, 2.0, "g"), (3.0, 13.0, 2.2, "b"), (-14.0, 2.0, 2.0, "r")]
COLOURS = "rgb"


class Lifting(nn.Module):
    """Features (N, C, h, w) and depths (N, D, h, w) of N cameras to a map (side * side, C).

    anchors: where the pillars over the cells are in each image, (N, Q, Z, 3) in 0 to 1
    seen:    which of them are in view, (N, Q, Z)
    """

    def __init__(self, anchors: Tensor, seen: Tensor, heads: int, points: int, size: int) -> None:
        super().__init__()
        cells, height = anchors.shape[1:3]
        self.heads, self.points, self.levels = heads, points, height
        self.register_buffer("anchors", anchors)
        self.register_buffer("seen", seen.float())
        self.register_buffer("count", seen.any(2).sum(0).clamp(min=1))
        self.queries = nn.Parameter(torch.randn(cells, size))
        self.offsets = nn.Linear(size, heads * points * height * 3)
        self.weights = nn.Linear(size, heads * points * height)

    def forward(self, features: Tensor, depth: Tensor) -> Tensor:
        n, c, h, w = features.shape
        features = features.view(n, self.heads, c // self.heads, 1, h, w)
        volume = features * depth.view(n, 1, 1, -1, h, w)

        shape = -1, self.heads, self.points, self.levels
        offsets = self.offsets(self.queries).tanh().view(*shape, 3) * 0.01
        places = self.anchors[:, :, None, None] + offsets
        grid = 2 * places.transpose(1, 2).flatten(0, 1) - 1
        samples = F.grid_sample(volume.flatten(0, 1), grid, align_corners=False)

        weights = self.weights(self.queries).unflatten(1, (self.heads, -1)).softmax(-1).view(shape)
        weights = weights * self.seen[:, :, None, None]
        weights = weights.transpose(1, 2).flatten(0, 1).unsqueeze(1)
        lifted = (samples * weights).sum((-2, -1)).view(n, c, -1)
        return (lifted.sum(0) / self.count).T


def axes_of(camera: int) -> tuple[Tensor, Tensor]:
    """The directions ahead of a camera and to its right."""
    yaw = 2 * math.pi * camera / CAMERAS
    return (torch.tensor([math.cos(yaw), math.sin(yaw)]),
            torch.tensor([math.sin(yaw), -math.cos(yaw)]))


def project(side: int, height: int) -> tuple[Tensor, Tensor]:
    """Anchors over the cells of a map in each image, and which are in view."""
    line = (torch.arange(side) + 0.5) / side * 2 * EXTENT - EXTENT
    x, y = torch.meshgrid(-line, -line, indexing="ij")  # ahead is up, left is left
    ground = torch.stack((x, y), -1).view(-1, 1, 2)
    up = torch.linspace(-TALL, TALL, height) * 0.8
    found = []
    for camera in range(CAMERAS):
        ahead, right = axes_of(camera)
        depth, across = ground @ ahead, ground @ right
        away = depth.clamp(min=1e-5)  # behind the camera: far outside of the image
        found.append(torch.stack((
            ((across / away / SPREAD + 1) / 2).expand(-1, height),
            (1 - up / away / TILT) / 2,
            ((depth - NEAR) / (FAR - NEAR)).expand(-1, height)), -1))
    anchors = torch.stack(found)
    return anchors, ((anchors > 0) & (anchors < 1)).all(-1)


def look(height: int, width: int, depths: int, channels: int, heads: int) -> tuple[Tensor, Tensor]:
    """What the cameras see of the pillars: features, and for each pixel how far away it may be."""
    away = NEAR + (torch.arange(depths) + 0.5) / depths * (FAR - NEAR)
    across = ((torch.arange(width) + 0.5) / width * 2 - 1) * SPREAD
    up = (1 - (torch.arange(height) + 0.5) / height * 2) * TILT
    low = (away[:, None] * up).abs() < TALL  # (D, h)
    images, distances = [], []
    for camera in range(CAMERAS):
        ahead, right = axes_of(camera)
        place = away[:, None, None] * (ahead + across[:, None] * right)  # (D, w, 2)
        inside = torch.stack([((place - torch.tensor([x, y])).norm(dim=-1) < radius)
                              for x, y, radius, _ in PILLARS])
        solid = inside[:, :, None] & low[:, :, None]  # (pillars, D, h, w)
        hit = solid.any(0)
        first = hit.int().argmax(0)  # (h, w)
        colour = torch.zeros(3, height, width)
        for pillar, (*_, name) in zip(solid, PILLARS, strict=True):
            colour[COLOURS.index(name)] += pillar.gather(0, first[None])[0]
        image = torch.randn(heads, channels, height, width) * 0.1
        image[:, :3] = colour
        images.append(image.flatten(0, 1))
        spread = -(torch.arange(depths)[:, None, None] - first) ** 2 / 4.0
        distances.append((spread * hit.any(0)).softmax(0))
    return torch.stack(images), torch.stack(distances)


def draw(lifted: Tensor, side: int, heads: int) -> Tensor:
    """Prints the map, ahead is up; returns it as (side, side, 3)."""
    colours = lifted.view(side, side, heads, -1)[..., :3].mean(2).clamp(min=0)
    picture = colours / colours.max()
    strongest, which = picture.max(-1)
    for row in range(0, side, 2):
        cells = range(side)
        print("  " + "".join("^" if row in (side // 2, side // 2 - 1) and i == side // 2 else
                             COLOURS[which[row, i]] if strongest[row, i] > 0.3 else "·"
                             for i in cells))
    return picture


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--side", type=int, default=50, help="cells along an edge of the map")
    parser.add_argument("--height", type=int, default=29, help="of the images, in features")
    parser.add_argument("--width", type=int, default=50)
    parser.add_argument("--depths", type=int, default=64)
    parser.add_argument("--channels", type=int, default=16, help="of each head")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are timed")
    parser.add_argument("--out", type=Path, help="write the map there, as a PPM picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    size = options.height, options.width, options.depths, options.channels, options.heads
    features, depth = look(*size)
    model = Lifting(*project(options.side, 4), options.heads, 2, 32).eval()
    print(f"{CAMERAS} cameras, features of {features.numel() * 4e-6:.1f} MB, depths of "
          f"{depth.numel() * 4e-6:.1f} MB; their volume has {CAMERAS * math.prod(size) * 4e-6:.0f} "
          "MB\n")

    optimized = before_and_after.optimize(model, (features, depth))
    before_and_after.show(model, optimized, (features, depth), options.repeats)
    print("  seen from above, the car (^) in the middle, ahead is up:\n")
    picture = draw(optimized(features, depth), options.side, options.heads)
    if options.out is not None:
        header = f"P6 {options.side} {options.side} 255\n".encode()
        options.out.write_bytes(header + bytes((picture * 255).byte().flatten().tolist()))


if __name__ == "__main__":
    main()
