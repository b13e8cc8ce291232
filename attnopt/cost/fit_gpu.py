"""Fitting how well an implementation uses a GPU to measured times of its kernels.

The model of `attnopt.cost.gpu` is not linear in its six numbers, but it is smooth enough: each is
moved in turn by a step that shrinks, while the squared errors of the logarithms fall. Measurements
must hold tiny launches and large ones, full tiles and partial ones: large ones alone say nothing of
the launch, and leave small cases 44 % off.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.cost.devices import Gpu
from attnopt.cost.gpu import Kernel, Usage, in_waves, kernel_of, waves
from attnopt.cost.tiles import TileCounts
from attnopt.cost.work import Work

#: lowest and highest value, and first step, of what is fitted
RANGES = {"launch": (0.5, 50.0, 2.0), "efficiency": (0.1, 1.2, 0.1), "overlap": (0.0, 1.0, 0.25),
          "shared": (0.0, 1.0, 0.25), "masked": (0.0, 2.0, 0.25), "epilogue": (0.0, 4.0, 0.5)}
#: times that the steps are halved
HALVINGS = 5
#: draws each number to its start, as a share of its range against a relative error
PENALTY = 1e-3


@dataclass(frozen=True)
class Measured:
    """One launch of a forward kernel: `tile` is (query rows, keys, …)."""

    work: Work
    counts: TileCounts
    tile: tuple[int, ...]
    seconds: float
    usage: Usage | None = None


@dataclass(frozen=True)
class GpuFit:
    """mean and worst: relative error of the measurements."""

    kernel: Kernel
    mean: float
    worst: float


def fit_kernel(device: Gpu, measured: Sequence[Measured], start: Kernel | None = None) -> GpuFit:
    """The numbers of an implementation that fit its measured times best."""
    if not measured or any(m.seconds <= 0 for m in measured):
        raise ValueError(f"measured must have positive times, got {len(measured)} rows")
    first = start or Kernel()
    known: dict[tuple[int, float, float], tuple[float, int]] = {}

    def predict(kernel: Kernel) -> list[float]:
        found = []
        for i, m in enumerate(measured):
            key = (i, kernel.masked, kernel.epilogue)
            if key not in known:
                known[key] = waves(device, kernel, m.work, m.counts, m.usage)
            found.append(in_waves(device, kernel, m.work, m.counts, m.tile, *known[key]))
        return found

    def loss(kernel: Kernel) -> float:
        errors = sum(math.log(p / m.seconds) ** 2
                     for p, m in zip(predict(kernel), measured, strict=True)) / len(measured)
        return errors + PENALTY * sum(
            ((getattr(kernel, n) - getattr(first, n)) / (high - low)) ** 2
            for n, (low, high, _) in RANGES.items())

    best, least = first, loss(first)
    for halving in range(HALVINGS):
        moved = True
        while moved:
            moved = False
            for name, (low, high, step) in RANGES.items():
                for sign in (1, -1):
                    value = getattr(best, name) + sign * step / 2**halving
                    tried = dataclasses.replace(best, **{name: min(max(value, low), high)})
                    cost = loss(tried)
                    if cost < least * (1 - 1e-6):
                        best, least, moved = tried, cost, True
    errors = [abs(p / m.seconds - 1) for p, m in zip(predict(best), measured, strict=True)]
    return GpuFit(best, sum(errors) / len(errors), max(errors))


def calibrated(device: Gpu, name: str, implementation: str, measured: Sequence[Measured]) -> Gpu:
    """`device` with the numbers of one implementation as measured."""
    made = fit_kernel(device, measured, kernel_of(device, implementation))
    own = {f.name: round(getattr(made.kernel, f.name), 4) for f in dataclasses.fields(Kernel)}
    source = f"{implementation}: {len(measured)} measurements, off by {made.mean:.1%} on average"
    return dataclasses.replace(device, name=name, match=(), calibrated=True, hint="", source=source,
                               coefficients={**device.coefficients, implementation: own})
