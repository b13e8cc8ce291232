"""Time of the generated C++ kernel for few keys, such as the tokens of a window, on a CPU.

For each combination of the leading axes it packs keys, values and queries once, and then goes over
register blocks of rows: scores, softmax, output. Products count as in `attnopt.cost.cpu`, with the
`fma`, `block` and `store` of the device; the rest is nanoseconds per element that is moved
(`MOVED`), per vector of scores (`SCORED`), per row (`ROW`: its maximum and sum), and per
combination (`EACH`), measured on a 2.5 GHz core with two AVX-512 units. Bias terms that all windows
of a head share cost what reading them does, and once per head what computing them does.
"""

from __future__ import annotations

from collections.abc import Sequence

from attnopt.cost.cpu import COEFFICIENTS
from attnopt.cost.devices import Cpu
from attnopt.cost.work import Work

MOVED, SCORED, ROW, EACH = 0.27, 4.0, 6.0, 150.0
#: registers of the smallest block of rows
LEAST = 4


def tiles(device: Cpu, queries: int, keys: int) -> list[tuple[int, ...]]:
    """(rows, keys, MR, NV): all queries and keys, with blocks of rows that leave few of them empty
    and of as many vectors as a row of scores has, or parts of it."""
    vectors = -(-keys // device.width)
    found = []
    for nv in {n for n in (1, 2, 3, 4) if vectors % n == 0}:
        most = min((device.registers - nv) // nv, 16, max(queries, 1))
        least = min(LEAST, most)
        for mr in range(least, most + 1):
            found.append((-(-queries // mr) * mr, vectors * device.width, mr, nv))
    return sorted(found)


def seconds(device: Cpu, work: Work, tile: Sequence[int], score_ops: float, shared_ops: float,
            heads: int, threads: int) -> float:
    """Predicted time of a call.

    score_ops: vector instructions per score in a window, shared_ops: of what is computed once for
    each of `heads`
    """
    rows, padded, mr, nv = tile
    given = {**COEFFICIENTS, **device.coefficients}
    vectors, channels = padded // device.width, -(-work.value_dim // device.width)
    clocks = blocks = 0.0
    for total, depth in ((vectors, work.head_dim), (channels, work.keys)):
        for n, times in ((nv, total // nv), (total % nv, 1)):
            if n and times:
                clocks += rows // mr * times * depth * max(
                    mr * n / device.fma, (mr + n) / device.load, device.latency)
                blocks += rows // mr * times * (given["block"] + given["store"] * mr * n)
    moved = (work.keys + rows) * (work.head_dim + work.value_dim)
    scores = rows * vectors
    each = (given["fma"] * clocks + blocks + MOVED * moved + ROW * rows + EACH
            + scores * (SCORED + given["op"] * score_ops))
    shared = given["op"] * shared_ops * scores * heads
    woken = given["thread"] * threads if threads > 1 else 0.0
    return 1e-9 * ((each * work.leading + shared) / max(threads, 1) + given["call"] + woken)
