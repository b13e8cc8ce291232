"""Take the noise out of a photograph with non-local means, which is attention by another name.

Every pixel becomes a weighted mean of the pixels around it; the weights are the softmax of minus
the squared distance between the patches around the two pixels, over h^2 (Buades, Coll and Morel,
2005). The model below says so in plain PyTorch: the picture is cut into tiles, the queries are the
patches of a tile, the keys those of the tile and its surroundings, and a mask keeps the keys in a
square window around each query. `attnopt.optimize` finds the attention in it, reads the window off
the mask's arithmetic, and skips what it hides.

    python examples/denoise_photo.py [--size 128] [--noise 0.1] [--repeats 3]

The photograph ("astronaut", NASA, public domain) comes with scikit-image.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from PIL import Image
from skimage import data
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt

OUTPUT = Path(__file__).parent / "output"


class NonLocalMeans(nn.Module):
    """Non-local means of pictures (1, channels, height, width) whose sides are multiples of `tile`.

    Args:
        strength: h, the distance between patches at which a weight has fallen to 1/e.
        patch: side of the square patches that are compared, odd.
        radius: how many pixels the window reaches to each side.
        tile: side of the tiles that are worked on at once.
    """

    def __init__(self, strength: float, patch: int = 5, radius: int = 7, tile: int = 32) -> None:
        super().__init__()
        self.strength, self.patch, self.radius, self.tile = strength, patch, radius, tile

    def patches(self, image: Tensor) -> Tensor:
        """The patch around every pixel as that pixel's channels, scaled to a mean square.

        Their mean is taken away: distances stay what they are, but |q|^2 + |k|^2 - 2 q.k is then
        a difference of smaller numbers and keeps its digits.
        """
        _, channels, height, width = image.shape
        padded = F.pad(image, (self.patch // 2,) * 4, mode="reflect")
        columns = F.unfold(padded, self.patch) / math.sqrt(channels * self.patch**2)
        columns = columns - columns.mean(-1, keepdim=True)
        return columns.view(1, -1, height, width)

    def tiles(self, image: Tensor, margin: int) -> Tensor:
        """Tiles with a margin around each: (tiles, pixels of a tile, channels)."""
        side = self.tile + 2 * margin
        padded = F.pad(image, (margin,) * 4, mode="reflect")
        columns = F.unfold(padded, side, stride=self.tile)
        return columns.view(image.shape[1], side * side, -1).permute(2, 1, 0)

    def window(self) -> Tensor:
        """Which keys of the tile with its margin a query of the tile sees: bool (queries, keys)."""
        side = self.tile + 2 * self.radius
        query, key = torch.arange(self.tile**2), torch.arange(side**2)
        rows = query.div(self.tile, rounding_mode="floor")[:, None] + self.radius
        columns = query.remainder(self.tile)[:, None] + self.radius
        down = (rows - key.div(side, rounding_mode="floor")).abs() <= self.radius
        across = (columns - key.remainder(side)).abs() <= self.radius
        return down & across

    def forward(self, image: Tensor) -> Tensor:
        features = self.patches(image)
        query, key = self.tiles(features, 0), self.tiles(features, self.radius)
        value = self.tiles(image, self.radius)

        square = query.pow(2).sum(-1, keepdim=True) + key.pow(2).sum(-1).unsqueeze(1)
        distance = square - 2 * query @ key.transpose(1, 2)
        scores = (-distance / self.strength**2).masked_fill(~self.window(), -math.inf)
        mixed = scores.softmax(-1) @ value

        columns = mixed.permute(2, 1, 0).reshape(1, -1, mixed.shape[0])
        return F.fold(columns, image.shape[-2:], self.tile, stride=self.tile)


def load_photo(size: int) -> Tensor:
    """The middle of the portrait: (1, 3, size, size), float32 in 0..1."""
    left = max(0, 224 - size // 2)
    pixels = torch.from_numpy(data.astronaut()[:size, left : left + size].copy())
    return pixels.permute(2, 0, 1).unsqueeze(0).float() / 255


def save(name: str, image: Tensor) -> None:
    pixels = (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(OUTPUT / name)


def psnr(image: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels; higher is better."""
    return -10 * math.log10((image.clamp(0, 1) - truth).pow(2).mean().item())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=128, choices=[64, 128, 256, 448])
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation, white = 1")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    photo = load_photo(options.size)
    noisy = photo + options.noise * torch.randn_like(photo)
    model = NonLocalMeans(strength=options.noise).eval()
    queries, keys = model.window().shape
    print(f"Photograph of {options.size} x {options.size} pixels in tiles of {queries} queries and"
          f" {keys} keys; a query sees {model.window().sum(1).max()} keys\n")

    start = time.perf_counter()
    with torch.no_grad():
        optimized = attnopt.optimize(model, (noisy,))
    print(optimized.report)
    print(f"\noptimised and verified in {time.perf_counter() - start:.1f} s\n")
    print(optimized.report.pictures(), "\n")

    with torch.no_grad():
        before, after = model(noisy), optimized(noisy)
        print(f"  {optimized.report.measure(repeats=options.repeats)}")
    print(f"  pictures differ by at most {(before - after).abs().max():.1e}")
    print(f"  PSNR: noisy {psnr(noisy, photo):.2f} dB, denoised {psnr(after, photo):.2f} dB")

    OUTPUT.mkdir(exist_ok=True)
    pictures = {"noisy.png": noisy, "denoised.png": after, "original.png": photo}
    for name, image in pictures.items():
        save(name, image)
    save("side_by_side.png", torch.cat(list(pictures.values()), dim=-1))
    print(f"  pictures: {', '.join(pictures)} and side_by_side.png in {OUTPUT}\n")


if __name__ == "__main__":
    main()
