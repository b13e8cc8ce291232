"""Weighted sums of samples as one call of `attnopt::deformable_attention`, forward and backward.

The author's composition writes every sample (B, H, C, Q, levels * points) before it sums; the op
holds the result alone. A call has a fixed price, which few points do not earn: where the cost model
knows a site, it says whether the call pays, as for attention (`attnopt.passes.rules.generated`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnopt import kernels
from attnopt.cost.devices import Cpu
from attnopt.cost.sampling import LOWERINGS, Samples, seconds
from attnopt.kernels.deformable import Sampling
from attnopt.passes.rules import cost
from attnopt.rules import Decline, Rule

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class SamplingRegion:
    """What a rule sees of a sampling site.

    dtypes:    of value, locations, weights and, where there is one, depth
    lengths:   (B, S, H, C, Q, T), ints or symbolic
    lowering:  what the op computes it by on this device
    lowerings: those that the user allows
    """

    sampling: Sampling
    dtypes: tuple[torch.dtype, ...]
    lengths: tuple[object, ...]
    device: str
    training: bool
    lowering: str
    lowerings: tuple[str, ...] = ("aten", "cpp", "triton")
    prefer: str = "speed"


@dataclass(frozen=True)
class SamplingMatch:
    """A rule says yes: compute `sampling` by `lowering`."""

    sampling: Sampling
    lowering: str
    predicted_speedup: float | None = None
    seconds: float | None = None


class Deformable(Rule):
    name = "deformable"
    kind = "sampling"
    recognizes = "weighted sums over sampled points (deformable attention)"

    def sample(self, region: SamplingRegion) -> SamplingMatch:
        """Answer with a SamplingMatch, or raise Decline."""
        odd = [d for d in region.dtypes if d not in DTYPES]
        if odd:
            raise Decline(f"value, locations and weights must be floating, got {odd[0]}")
        lowering = region.lowering if region.lowering in region.lowerings else "aten"
        if lowering not in region.lowerings:
            raise Decline(f"backend leaves out {region.lowering} and aten")
        if sum(region.sampling.points) == 0:
            raise Decline("no points: nothing is sampled")
        times = predicted(region, lowering)
        if times is None:
            return SamplingMatch(region.sampling, lowering)
        verdict = kernels.worth(*times)
        if not verdict.pays and not cost.TAKE_ALL and region.prefer != "memory":
            raise Decline(verdict.text)
        return SamplingMatch(region.sampling, lowering, verdict.speedup, times[1])


def predicted(region: SamplingRegion, lowering: str) -> tuple[float, float] | None:
    """Seconds of a composition of F.grid_sample and of the op; None where the cost model knows
    nothing of the site: off the CPU, in training, of other samples than linear ones of two axes
    (with a depth there is one dtype more), in other dtypes, or of lengths that are not known."""
    known = (region.device == "cpu" and not region.training and region.sampling.axes == 2
             and region.sampling.mode == "linear" and region.dtypes == (torch.float32,) * 3)
    sizes = [n for n in region.lengths if isinstance(n, int)]
    if not known or len(sizes) != 6 or lowering not in LOWERINGS:
        return None
    cpu = kernels.device("cpu")
    assert isinstance(cpu, Cpu)
    batch, texels, heads, channels, queries, points = sizes
    samples = Samples(batch, texels, heads, channels, queries, points, region.sampling.levels)
    return seconds(cpu, samples, "plain"), seconds(cpu, samples, lowering)
