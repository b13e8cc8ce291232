"""The roofline: in what time a device could do a given work at best.

    seconds >= max(flops / peak, bytes / bandwidth)

(Williams, Waterman, Patterson: Roofline, CACM 2009.) The peak of a CPU is the rate of a large
matrix product on its cores, that of a GPU the rate of its matrix units. Bytes come from memory, or
from the last cache where everything together fits into it. Exponentials and the like are no flops
here, so that a kernel full of them stays below 1 for good.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.cost import gpu
from attnopt.cost.devices import Cpu, Device


@dataclass(frozen=True)
class Roof:
    """The least seconds, and what they are spent on: "compute" or "memory"."""

    seconds: float
    bound: str


def roof(device: Device, flops: float, nbytes: float, dtype: str = "float32",
         threads: int = 1) -> Roof | None:
    """The roof of one call; None where nothing is known of the device, or nothing is done."""
    if isinstance(device, Cpu):
        cores = max(1, min(threads, device.cores))
        peak = cores * device.gemm.get(dtype, device.gemm.get("float32", 0.0))
        bandwidth = device.cache if nbytes <= device.l3 else device.memory
        bandwidth *= cores
    else:
        peak = gpu.matrix_rate(device, dtype) * device.sms * device.clock
        bandwidth = device.l2 if nbytes <= device.l2_size else device.memory
    if peak <= 0 or bandwidth <= 0:
        return None
    computing, moving = 1e-9 * flops / peak, 1e-9 * nbytes / bandwidth
    if max(computing, moving) <= 0:
        return None
    return Roof(max(computing, moving), "compute" if computing >= moving else "memory")
