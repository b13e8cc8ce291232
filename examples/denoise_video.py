"""Take the noise out of a video with a window in space and time: a 3-D neighbourhood attention.

Every frame is cut into patches, which are the tokens. A patch becomes the weighted mean of the
patches around it, in its own frame and in those before and after; the weights are the softmax of
minus the squared distance of the patches, over h^2. The model below writes it the short way: scores
of all patches with all patches of the video, and a mask made of coordinates that keeps a box of
3 x 7 x 7. Nearly all of that work is hidden by the mask; `attnopt.optimize` skips it.

    python examples/denoise_video.py [--frames 8] [--size 96] [--noise 0.1] [--repeats 3]

The video is a camera that moves over a photograph ("astronaut", NASA, public domain), which comes
with scikit-image.
"""

import argparse
import math
import time

import torch
from skimage import data
from torch import Tensor, nn

import attnopt

PATCH = 4


class SpaceTimeMeans(nn.Module):
    """Means over nearby patches of videos (frames, channels, height, width).

    Args:
        strength: h, the root mean square distance at which a weight has fallen to 1/e.
        reach: how far a patch sees, in (frames, rows, columns), to each side.
    """

    def __init__(self, strength: float, reach: tuple[int, int, int] = (1, 3, 3)) -> None:
        super().__init__()
        self.strength, self.reach = strength, reach

    def near(self, frames: int, rows: int, columns: int) -> Tensor:
        """Which patches a patch sees: bool (patches, patches)."""
        token = torch.arange(frames * rows * columns)
        frame, row, column = token // (rows * columns), token // columns % rows, token % columns
        near = (frame[:, None] - frame).abs() <= self.reach[0]
        near = near & ((row[:, None] - row).abs() <= self.reach[1])
        return near & ((column[:, None] - column).abs() <= self.reach[2])

    def forward(self, video: Tensor) -> Tensor:
        frames, channels, height, width = video.shape
        rows, columns = height // PATCH, width // PATCH
        cut = video.view(frames, channels, rows, PATCH, columns, PATCH)
        patches = cut.permute(0, 2, 4, 1, 3, 5).reshape(1, frames * rows * columns, -1)

        # Taking away the mean leaves distances as they are and keeps their digits.
        centred = patches - patches.mean(1, keepdim=True)
        square = centred.pow(2).sum(-1)
        distance = square[:, :, None] + square[:, None] - 2 * centred @ centred.transpose(1, 2)
        scores = -distance / (patches.shape[-1] * self.strength**2)

        near = self.near(frames, rows, columns)
        mixed = scores.masked_fill(~near, -math.inf).softmax(-1) @ patches

        cut = mixed.view(frames, rows, columns, channels, PATCH, PATCH)
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(video.shape)


def moving_camera(frames: int, size: int) -> Tensor:
    """(frames, 3, size, size), float32 in 0..1: each frame one patch further to the right."""
    pixels = torch.from_numpy(data.astronaut().copy()).permute(2, 0, 1).float() / 255
    return torch.stack([pixels[:, :size, left : left + size]
                        for left in range(160, 160 + PATCH * frames, PATCH)])


def psnr(video: Tensor, truth: Tensor) -> float:
    """Peak signal-to-noise ratio in decibels; higher is better."""
    return -10 * math.log10((video.clamp(0, 1) - truth).pow(2).mean().item())


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--frames", type=int, default=8)
    parser.add_argument("--size", type=int, default=96, help="a multiple of 4, up to 256")
    parser.add_argument("--noise", type=float, default=0.1, help="standard deviation, white = 1")
    parser.add_argument("--repeats", type=int, default=3, help="calls of each that are timed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    video = moving_camera(options.frames, options.size)
    noisy = video + options.noise * torch.randn_like(video)
    model = SpaceTimeMeans(strength=options.noise).eval()
    tokens = options.frames * (options.size // PATCH) ** 2
    print(f"Video of {options.frames} frames of {options.size} x {options.size} pixels: {tokens} "
          f"patches, {tokens**2 / 1e6:.0f} million pairs\n")

    start = time.perf_counter()
    optimized = attnopt.optimize(model, (noisy,))
    print(optimized.report)
    print(f"\noptimised and verified in {time.perf_counter() - start:.1f} s\n")
    print(optimized.report.pictures(), "\n")

    before, after = model(noisy), optimized(noisy)
    print(f"  {optimized.report.measure(repeats=options.repeats)}")
    print(f"  videos differ by at most {(before - after).abs().max():.1e}")
    print(f"  PSNR: noisy {psnr(noisy, video):.2f} dB, denoised {psnr(after, video):.2f} dB\n")


if __name__ == "__main__":
    main()
