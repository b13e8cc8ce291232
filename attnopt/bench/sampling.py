"""Deformable attention, computed by everything that can compute it, side by side in one process.

    eager     the author's code: F.grid_sample for each level, then a weighted sum; with a depth the
              volume of value x depth is made and sampled
    compile   torch.compile of that
    op        `attnopt::deformable_attention`, called by hand
    ours      attnopt.optimize of the author's code; `composed`: with no generated kernel, by the
              composition of ATen ops alone

Work counts the bytes of the corners that are read, C numbers for each corner of each point.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnopt import logs
from attnopt.bench import memory
from attnopt.bench.side_by_side import OURS, hold_peak, ratio, site
from attnopt.kernels.deformable import Sampling, deformable_attention, ops
from attnopt.timing import device_wait, interleave

Shapes = tuple[tuple[int, int], ...]
_PRECISIONS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: of an image of 800 x 1066, as Deformable DETR has them, and of one of 640 x 640
LARGE: Shapes = ((100, 134), (50, 67), (25, 34), (13, 17))
SMALL: Shapes = ((80, 80), (40, 40), (20, 20))


@dataclass(frozen=True)
class SampledCase:
    """One row. queries: 0 for as many as there are texels, each near its own; depths: layers of
    depth, 0 for none; compiled: torch.compile takes part; whole: also the arithmetic of locations
    and the softmax of scores; composed: ours without generated kernels; goals: as those of
    `side_by_side.Case`; most: share of eager's peak of memory that ours may take, 0 for no limit.
    """

    name: str
    shapes: Shapes = LARGE
    queries: int = 0
    points: int = 4
    heads: int = 8
    channels: int = 32
    batch: int = 1
    depths: int = 0
    dtype: torch.dtype = torch.float32
    training: bool = False
    compiled: bool = False
    whole: bool = False
    composed: bool = False
    goals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    most: float = 0.0

    @property
    def texels(self) -> int:
        return sum(h * w for h, w in self.shapes)

    @property
    def shape(self) -> str:
        """"B1 H8 Q300 T16 d32"."""
        layers = f" D{self.depths}" if self.depths else ""
        return (f"B{self.batch} H{self.heads} Q{self.queries or self.texels} "
                f"T{len(self.shapes) * self.points} d{self.channels}{layers}")

    def inputs(self, device: torch.device) -> tuple[Tensor, ...]:
        """value, locations, weights and, where there is one, depth; the same at every call. When
        whole: value, offsets, scores, references, which have no gradient, and depth."""
        generator = torch.Generator().manual_seed(0)
        own: dict[str, Any] = {"generator": generator}
        queries, levels = self.queries or self.texels, len(self.shapes)
        value = torch.randn(self.batch, self.texels, self.heads, self.channels, **own)
        if self.queries:
            centres = torch.rand(queries, 2, **own)
        else:
            centres = torch.cat([torch.cartesian_prod(
                (torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(-1)
                for h, w in self.shapes])
        sizes = torch.tensor(self.shapes).flip(-1)
        # Some texels away from the centre, each head in a direction of its own.
        steps = 2 * torch.randn(self.heads, levels, self.points, 2, **own) + torch.randn(
            self.batch, queries, self.heads, levels, self.points, 2, **own) / 2
        if self.whole:
            if self.depths:
                centres = torch.cat((centres, torch.rand(queries, 1, **own)), -1)
                deep = self.depths / 4 * torch.randn(*steps.shape[:-1], 1, **own)
                steps = torch.cat((steps, deep), -1)
            places = centres[None, :, None].repeat(self.batch, 1, levels, 1)
            scores = torch.randn(*steps.shape[:3], levels * self.points, **own)
            tensors = [value, steps, scores, places]
        else:
            locations = centres[:, None, None, None] + steps / sizes[:, None]
            if self.depths:
                locations = torch.cat((locations, torch.rand(*locations.shape[:-1], 1, **own)), -1)
            weights = torch.randn(*locations.shape[:3], levels * self.points, **own).softmax(-1)
            tensors = [value, locations, weights.unflatten(-1, (levels, self.points))]
        if self.depths:
            tensors.append(torch.randn(self.batch, self.texels, self.depths, **own).softmax(-1))
        return tuple(t.to(device, self.dtype).requires_grad_(
            self.training and not (self.whole and i == 3)) for i, t in enumerate(tensors))

    def module(self) -> nn.Module:
        return Whole(self.shapes, self.depths) if self.whole else Sampled(self.shapes)


class Sampled(nn.Module):
    """Multi-scale deformable attention as its authors spell it in plain PyTorch."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor,
                depth: Tensor | None = None) -> Tensor:
        """value (B, S, H, C), locations (B, Q, H, L, P, 2 or 3) in 0 to 1, weights (B, Q, H, L, P),
        depth (B, S, D): (B, Q, H * C)."""
        b, _, heads, channels = value.shape
        queries = locations.shape[1]
        grids = 2 * locations - 1
        sizes = [h * w for h, w in self.shapes]
        depths = [None] * len(sizes) if depth is None else depth.split(sizes, 1)
        found = []
        for level, (part, layers) in enumerate(zip(value.split(sizes, 1), depths, strict=True)):
            height, width = self.shapes[level]
            image = part.flatten(2).transpose(1, 2).reshape(b * heads, channels, height, width)
            grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)
            if layers is None:
                sampled = F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros",
                                        align_corners=False)
            else:
                each = layers.transpose(1, 2).reshape(b, 1, 1, -1, height, width)
                volume = image.view(b, heads, channels, 1, height, width) * each
                sampled = F.grid_sample(volume.flatten(0, 1), grid.unsqueeze(1), mode="bilinear",
                                        padding_mode="zeros", align_corners=False).squeeze(2)
            found.append(sampled)
        shares = weights.transpose(1, 2).reshape(b * heads, 1, queries, -1)
        out = (torch.stack(found, -2).flatten(-2) * shares).sum(-1)
        return out.view(b, heads * channels, queries).transpose(1, 2).contiguous()


class Whole(nn.Module):
    """That with the offsets' way to locations and the softmax over levels and points in front."""

    sizes: Tensor

    def __init__(self, shapes: Shapes, depths: int = 0) -> None:
        super().__init__()
        self.core: Callable[..., Tensor] = Sampled(shapes)
        self.register_buffer("sizes", torch.tensor([
            [w, h, *([depths] if depths else [])] for h, w in shapes], dtype=torch.float32))

    def forward(self, value: Tensor, offsets: Tensor, scores: Tensor, references: Tensor,
                depth: Tensor | None = None) -> Tensor:
        """value and depth as for `Sampled`, offsets (B, Q, H, L, P, 2 or 3) in texels, scores
        (B, Q, H, L * P), references (B, Q, L, 2 or 3) in 0 to 1."""
        weights = scores.softmax(-1).view(offsets.shape[:-1])
        sizes = self.sizes.to(value.dtype)[None, None, None, :, None, :]
        locations = references[:, :, None, :, None, :] + offsets / sizes
        return self.core(value, locations, weights, depth)


def by_hand(case: SampledCase) -> Callable[..., Tensor]:
    """The op on the same tensors."""
    sampling = Sampling((case.points,) * len(case.shapes))
    shapes = [n for shape in case.shapes for n in shape]

    def run(value: Tensor, locations: Tensor, weights: Tensor, depth: Tensor | None = None
            ) -> Tensor:
        out = deformable_attention(value, locations.flatten(3, 4), weights.flatten(3), shapes,
                                   sampling, None if depth is None else depth.unsqueeze(2))
        return out.flatten(2)

    if not case.whole:
        return run
    whole = Whole(case.shapes, case.depths)
    del whole.core
    whole.core = run
    return whole


@contextlib.contextmanager
def composed() -> Iterator[None]:
    """The op computes by its composition of ATen ops, forward and backward."""
    with (mock.patch.object(ops, "gather", lambda *_: None),
          mock.patch.object(ops, "gradients", lambda *_: None)):
        yield


def run_sampled(case: SampledCase, optimize: Callable[..., Any], *, device: str = "cpu",
                repeats: int = 15, compiled: bool = True) -> dict[str, Any]:
    """A row, with the entries that `side_by_side.run_case` gives one."""
    place = torch.device(device)
    module, inputs = case.module().to(place), case.inputs(place)
    with torch.set_grad_enabled(case.training):
        optimized = optimize(module, inputs, verify=False)
        makers: dict[str, Callable[[], Callable[..., Tensor]]] = {"eager": lambda: module}
        if compiled and case.compiled:
            makers["compile"] = lambda: torch.compile(module, dynamic=False)
        if not case.composed:
            makers["op"] = lambda: by_hand(case)
        makers[OURS] = lambda: optimized
        steps: dict[str, Callable[[], tuple[Tensor, ...]]] = {}
        left_out: dict[str, str] = {}
        for name, make in makers.items():
            try:
                step = _step(make(), inputs, case.training)
                if case.composed and name == OURS:
                    step = composed()(step)
                step()
            except Exception as error:  # a peer's limit is a finding, not an error of ours
                if name == OURS:
                    raise
                left_out[name] = f"{type(error).__name__}: {str(error).strip()[:160]}"
                logs.get("bench").debug("%s: %s left out", case.name, name, exc_info=True)
                continue
            steps[name] = step
        wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
        exact = _step(copy.deepcopy(module).double(), wide, case.training)()
        errors = {name: max((a.double() - b).abs().max().item()
                            for a, b in zip(step(), exact, strict=True))
                  for name, step in steps.items()}
        del exact, wide
        peaks = {name: memory.peak(step, place) for name, step in steps.items()}
        times = interleave(steps, repeats, synchronize=device_wait(device))
    taps = case.batch * case.heads * (case.queries or case.texels) * len(case.shapes) * case.points
    work = 4 * taps * case.channels * case.dtype.itemsize
    row = {
        "shape": case.shape, "dtype": _PRECISIONS[case.dtype], "training": case.training,
        "device": place.type, "threads": 1, "rounds": repeats,
        "clock": "cpu" if place.type == "cpu" else "wall",
        "ours": {**site(optimized.report), **({"lowering": "aten"} if case.composed else {})},
        "contestants": {name: {"seconds": statistics.median(times[name]), "error": errors[name],
                               "peak_bytes": peaks[name]} for name in steps},
        "left_out": left_out,
        "ratios": {name: ratio(times[name], times[OURS], case.goals.get(name))
                   for name in steps if name != OURS},
        "work": work, "rate": work / statistics.median(times[OURS]),
    }
    hold_peak(row, case.most)
    return row


def _step(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], training: bool
          ) -> Callable[[], tuple[Tensor, ...]]:
    """One call; when training, also the gradients of all inputs."""
    if not training:
        return lambda: (fn(*inputs),)

    def train() -> tuple[Tensor, ...]:
        out = fn(*inputs)
        wanted = [t for t in inputs if t.requires_grad]
        return (out, *torch.autograd.grad(out, wanted, torch.ones_like(out)))

    return train

