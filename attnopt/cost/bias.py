"""Reading a dense bias, or a second dot product of rank R in its place: which costs less.

Per score of one head, with e bytes of a bias element, P FLOP/s of matrix products, W bytes/s:

    read       e / W, where the batch shares the bias W times its reuse in the cache
    low rank   2 R / P, with R a multiple of 16 on matrix units

The rank at which both cost the same is R* = e P / (2 W) (arXiv 2505.12044, section 3): 206 for a
16-bit bias on an H200 at peak, 0.63 of that at the shares of the peaks that kernels reach. On a CPU
the load costs its instructions and, beyond the second-level cache, the wait for its bytes, which
products do not hide: measured on one core in float32, head_dim 64, low rank was 0.9 of the speed of
a bias of 1 MB at any rank, and 1.1 (8 MB) to 1.3 (32 MB) times as fast at rank 32.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.cost.cpu import COEFFICIENTS
from attnopt.cost.devices import Cpu, Device, Gpu
from attnopt.cost.gpu import matrix_rate
from attnopt.cost.work import READ

#: shares of the peak rates of matrix products and memory that kernels reach
MATRIX_SHARE, MEMORY_SHARE = 0.5, 0.8
#: times that a bias is had from the cache, at most, where the batch shares it
REUSE = 2.5
#: columns of a matrix instruction
STEP = 16
#: low rank must save at least this share of the reading
MARGIN = 0.1


@dataclass(frozen=True)
class Reading:
    """A bias that is read at every score.

    item:      bytes of an element
    total:     bytes of the whole bias
    sharers:   entries of the leading axes that read the same bias
    head_dim, value_dim, dtype: of the attention
    """

    item: int
    total: int
    sharers: int = 1
    head_dim: int = 64
    value_dim: int = 64
    dtype: str = "float32"


def break_even(device: Gpu, item: int, dtype: str = "float16", shares: bool = False) -> float:
    """The rank at which a second dot product costs as much as reading `item` bytes; at the peak
    rates, or with `shares` at those that kernels reach."""
    flops = matrix_rate(device, dtype) * device.sms * device.clock  # GFLOP/s
    found = item * flops / (2.0 * device.memory)
    return found * MATRIX_SHARE / MEMORY_SHARE if shares else found


def seconds(device: Device, reading: Reading, rank: int) -> tuple[float, float]:
    """(reading, low rank): what each adds to one score, in seconds of one core or of the GPU."""
    if isinstance(device, Gpu):
        reuse = min(max(reading.sharers, 1), REUSE)
        # Positions and coordinates are products of float32.
        flops = matrix_rate(device, "tfloat32" if reading.item == 4 else reading.dtype)
        rate = flops * device.sms * device.clock * MATRIX_SHARE
        columns = -(-rank // STEP) * STEP
        read = reading.item / (device.memory * MEMORY_SHARE * reuse)
        return 1e-9 * read, 2e-9 * columns / rate
    return _core(device, reading, rank)


def _core(device: Cpu, reading: Reading, rank: int) -> tuple[float, float]:
    each = {**COEFFICIENTS, **device.coefficients}
    product = each["fma"] / device.fma / device.width  # of one channel, per score
    waits = reading.item * each["far"] / 1024 if reading.total > device.l2 else 0.0
    # Factors are float32, and so are query, key and value next to them.
    at_once = device.depth.get(reading.dtype, 1)
    widened = (reading.head_dim + reading.value_dim) * (1 - 1 / at_once) * product
    return 1e-9 * (READ * each["op"] / device.width + waits), 1e-9 * (rank * product + widened)


def low_rank_pays(device: Device, reading: Reading, rank: int) -> bool:
    """Whether a second dot product of this rank costs less than reading the bias."""
    read, products = seconds(device, reading, rank)
    return products <= (1 - MARGIN) * read
