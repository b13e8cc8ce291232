"""Time of deformable attention on a CPU: of a composition of F.grid_sample, and of the op.

A time is a sum of counted features times coefficients in nanoseconds, as in `attnopt.cost.plain`:

    call    calls;  level: levels, each with a few operations of the composition
    texel   elements of the value, which the composition puts channels first
    point   sampled points: B * heads * queries * points of all levels
    number  channels of those points; the composition writes each, then weights and sums them

"plain" is the composition, "cpp" the generated kernel, "aten" the op without it. The defaults are a
fit to 30 sites of one AVX-512 core at 2.5 GHz in float32 (1 to 4,484 queries, 1 to 4 levels, 16 to
64 channels, linear samples of two axes): 80 % of them within 0.6 to 1.2 of what was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from attnopt.cost.devices import Cpu

COEFFICIENTS: Mapping[str, float] = {
    "sampling.plain.call": 136000.0, "sampling.plain.level": 52600.0,
    "sampling.plain.texel": 0.01, "sampling.plain.point": 137.0, "sampling.plain.number": 19.3,
    "sampling.cpp.call": 387000.0, "sampling.cpp.point": 41.1, "sampling.cpp.number": 0.594,
    "sampling.aten.call": 1421000.0, "sampling.aten.point": 97.0, "sampling.aten.number": 1.4,
}
LOWERINGS = ("plain", "cpp", "aten")


@dataclass(frozen=True)
class Samples:
    """Sizes: batch, texels of all levels, heads, channels of a head, queries, points of all levels
    per query and head, levels."""

    batch: int
    texels: int
    heads: int
    channels: int
    queries: int
    points: int
    levels: int = 1

    @property
    def count(self) -> int:
        return self.batch * self.heads * self.queries * self.points


def seconds(device: Cpu, samples: Samples, lowering: str) -> float:
    """Predicted time of a forward call by one thread; lowering: "plain", "cpp" or "aten"."""
    if lowering not in LOWERINGS:
        raise ValueError(f"lowering must be one of {', '.join(LOWERINGS)}, got {lowering!r}")
    given = {**COEFFICIENTS, **device.coefficients}
    counted = {
        "call": 1, "level": samples.levels,
        "texel": samples.batch * samples.texels * samples.heads * samples.channels,
        "point": samples.count, "number": samples.count * samples.channels,
    }
    return 1e-9 * sum(given.get(f"sampling.{lowering}.{name}", 0.0) * n
                      for name, n in counted.items())
