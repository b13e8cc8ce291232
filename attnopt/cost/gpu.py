"""Time of a tiled attention kernel on a GPU.

For a tile of M query rows and N keys, in clocks of one multiprocessor:

    matrix = 2 M N (D + Dv) / matrix rate
    other  = M N / exp rate + (scalar + score_ops) M N / float32 rate + M Dv / float32 rate
    clocks = (max(matrix, other) + (1 - overlap) min(matrix, other)) / efficiency
    tile   = max(clocks, bytes of K, V and bias / share of the L2 bandwidth)

A thread block costs `epilogue` tiles, plus its full tiles, plus its partial tiles times 1 + masked.
The kernel takes `launch` plus the makespan of all blocks over multiprocessors x blocks that fit on
one (they share it, and overlap better), and not less than the DRAM traffic.

Checked against 34 published times of cuDNN on an H200 (tests/attnopt/cost/data): the wave rounding
in the makespan is the first-order term below some four waves. A model without it is 62 % off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from attnopt.cost.devices import Gpu
from attnopt.cost.makespan import makespan
from attnopt.cost.tiles import TileCounts
from attnopt.cost.work import Work


@dataclass(frozen=True)
class Kernel:
    """How well an implementation uses a GPU: what a calibration fits.

    launch:     microseconds before the first tile
    overlap:    share of the smaller of matrix and other time that the larger hides, with one block
                on a multiprocessor; shared: with several
    efficiency: what barriers, issue and power leave of the rates
    masked:     surcharge of a partial tile
    scalar:     float32 instructions per score of the softmax
    epilogue:   tiles that begin and end of a block cost
    backward:   time of the backward relative to the forward
    """

    launch: float = 5.0
    overlap: float = 0.0
    shared: float = 0.4
    efficiency: float = 0.87
    masked: float = 0.5
    scalar: float = 4.0
    epilogue: float = 0.0
    backward: float = 3.5


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes, as the compiler reports it; spills in bytes or instructions."""

    registers: int = 0
    smem: int = 0
    spills: int = 0
    warps: int = 4


def kernel_of(device: Gpu, implementation: str) -> Kernel:
    """The coefficients of an implementation on a device; those of a plain kernel where unknown."""
    known = {f.name for f in fields(Kernel)}
    given = device.coefficients.get(implementation) or device.coefficients.get("triton") or {}
    return Kernel(**{name: x for name, x in given.items() if name in known})


def blocks_per_sm(device: Gpu, usage: Usage | None) -> int:
    """Thread blocks that fit on a multiprocessor; 0 where one does not."""
    if usage is None:
        return 1
    if usage.smem > device.smem_block or usage.registers > device.thread_registers:
        return 0
    per_warp = -(-usage.registers * device.warp // device.register_unit) * device.register_unit
    limits = [device.blocks, device.warps // max(usage.warps, 1),
              device.smem // (usage.smem + device.smem_reserved)]
    if usage.registers:
        limits.append(device.registers // (per_warp * usage.warps))
    return min(limits)


def tile_clocks(device: Gpu, kernel: Kernel, rows: int, keys: int, work: Work,
                sharing: int = 1) -> float:
    """Clocks of one full tile, for a block that has a multiprocessor for itself."""
    area = rows * keys
    matrix = 2.0 * area * (work.head_dim + work.value_dim) / matrix_rate(device, work.dtype)
    other = (area / device.exp + (kernel.scalar + work.score_ops) * area / device.fp32
             + rows * work.value_dim / device.fp32)
    overlap = kernel.overlap if sharing == 1 else max(kernel.overlap, kernel.shared)
    busy = max(matrix, other) + (1 - overlap) * min(matrix, other)
    moved = keys * (work.head_dim + work.value_dim) * work.item + area * work.bias_bytes
    share = device.l2 / device.clock / device.sms  # bytes per clock
    return max(busy / kernel.efficiency, moved / share)


def matrix_rate(device: Gpu, dtype: str) -> float:
    """Matrix FLOP per clock and multiprocessor; without matrix units, those of multiply-adds."""
    return device.matrix.get(dtype) or 2.0 * device.fp32


def waves(device: Gpu, kernel: Kernel, work: Work, counts: TileCounts, usage: Usage | None = None,
          order: str = "given") -> tuple[float, int]:
    """(makespan in full tiles, blocks that share a multiprocessor).

    Only `masked` and `epilogue` of the kernel matter.
    """
    per_sm = blocks_per_sm(device, usage)
    if per_sm < 1:
        raise ValueError(f"kernel must fit on a multiprocessor of {device.name}, got {usage}")
    costs = (kernel.epilogue + counts.full + counts.partial * (1 + kernel.masked)).double()
    repeat = max(work.leading // max(costs.numel() // max(costs.shape[-1], 1), 1), 1)
    sharing = max(1, min(per_sm, -(-costs.numel() * repeat // device.sms)))
    if order == "longest":
        costs = costs.flatten().sort(descending=True).values.repeat_interleave(repeat)
        repeat = 1
    return makespan(costs, device.sms * sharing, repeat), sharing


def seconds(device: Gpu, implementation: str, work: Work, counts: TileCounts,
            tile: Sequence[int], usage: Usage | None = None, order: str = "given") -> float:
    """Predicted time of a kernel with the tile (query rows, keys, …).

    counts: of that tile; the leading entries that it does not tell apart are alike
    usage:  registers and shared memory; None: one block on a multiprocessor
    order:  "given", or "longest" first, as a persistent kernel can do
    """
    kernel = kernel_of(device, implementation)
    found = waves(device, kernel, work, counts, usage, order)
    return in_waves(device, kernel, work, counts, tile, *found)


def in_waves(device: Gpu, kernel: Kernel, work: Work, counts: TileCounts, tile: Sequence[int],
             span: float, sharing: int) -> float:
    """Seconds of a kernel whose `waves` are known."""
    clocks = tile_clocks(device, kernel, tile[0], tile[1], work, sharing) * sharing
    busy = span * clocks * work.sweeps * (1 + kernel.backward if work.backward else 1)
    moved = work.tensor_bytes + work.bias_bytes * work.scores * counts.density
    return kernel.launch * 1e-6 + max(busy / (device.clock * 1e9), moved / (device.memory * 1e9))
