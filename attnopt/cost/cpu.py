"""Time of the generated C++ kernel on a CPU.

The kernel packs the keys, then takes one query tile after another over its key tiles: scores by
register blocks of MR rows x NV vectors, softmax row by row, values by the same blocks. Its time is
a sum of counted features times coefficients in nanoseconds, which a calibration fits:

    fma     clocks of the products' inner loops: the largest of multiply-adds, loads and latency
    load    loads of the inner loops, in clocks
    block   register blocks: loop set-up, and stores of their vectors (store)
    score   vectors of scores: maximum, exponential, sum;  op: instructions of the Spec on them
    hidden  vectors of scores of partial tiles
    row     rows of tiles: reductions over lanes, rescaling
    spill   KB that inner loops read from the second-level cache as a tile exceeds the first
    stream  KB of keys and values from behind the second-level cache
    visit   tiles;  query: query rows times channels, to begin and end
    pack    key and value elements that are packed;  gather: those that a box of queries gathers
    far     KB of tensors beyond the second-level cache, read or written once
    call    calls;  thread: threads that are woken

Ragged ends round up as in the kernel: rows to MR, scores to the key tile; values are cut exactly.
Threads take query tiles as they become free.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch

from attnopt.cost.devices import Cpu
from attnopt.cost.makespan import makespan
from attnopt.cost.tiles import TileCounts
from attnopt.cost.work import GATHER, READ, Work

#: nanoseconds by feature where a device has none; of a 2.5 GHz core with two AVX-512 units
COEFFICIENTS: Mapping[str, float] = {
    "fma": 0.45, "load": 0.024, "block": 4.3, "store": 0.35, "score": 4.5, "op": 0.53,
    "hidden": 0.5, "row": 1.5, "spill": 3.6, "stream": 14.0, "visit": 48.0, "query": 0.87,
    "pack": 0.9, "gather": 0.4, "far": 130.0, "call": 4900.0, "thread": 3000.0,
}
#: share of the first-level cache that a panel may take before it falls out between uses
FITS = 0.75

Features = Mapping[str, float]


def visit_features(device: Cpu, work: Work, tile: Sequence[int], rows: int, depth: int,
                   ) -> dict[str, float]:
    """Features of one query tile with `rows` rows on one key tile with `depth` keys."""
    _, block_keys, mr, nv, *_box = tile
    found: dict[str, float] = defaultdict(float)
    row_blocks, vectors = -(-rows // mr), block_keys // device.width
    channels = -(-work.value_dim // device.width)
    at_once = device.depth.get(work.dtype, 1)
    for total, summed, moves in ((vectors, work.head_dim, 1), (channels, depth, 2)):
        steps = -(-summed // at_once)
        for n, times in ((nv, total // nv), (total % nv, 1)):
            if n and times:
                blocks = row_blocks * times
                clocks = max(mr * n / device.fma, (mr + n) / device.load, device.latency)
                found["fma"] += blocks * steps * clocks
                found["load"] += blocks * steps * (mr + n) / device.load
                found["block"] += blocks
                found["store"] += blocks * moves * mr * n
    found["score"] = rows * vectors
    found["op"] = rows * vectors * work.score_ops
    found["row"] = rows
    found["visit"] = 1
    padded = channels * device.width
    panels = [4 * block_keys * work.head_dim, 4 * depth * padded]
    # A panel that the first-level cache holds is read into it once, another for each row block.
    reads = sum(p * (1 if p <= FITS * device.l1 else row_blocks) for p in panels)
    state = 4 * (tile[0] * (work.head_dim + block_keys + padded))
    excess = min(1.0, max(0.0, (state + max(panels)) / device.l1 - 1))
    found["spill"] = (reads + 2 * state * excess) / 1024
    return found


def features(device: Cpu, work: Work, counts: TileCounts, tile: Sequence[int]) -> dict[str, float]:
    """Features of a whole call by one thread; tile: (query rows, keys, MR, NV, *box)."""
    total: dict[str, float] = defaultdict(float)
    for part, times in _query_tiles(device, work, counts, tile):
        for name, n in part.items():
            total[name] += n * times
    return {**total, **_once(work, device, tile)}


def _query_tiles(device: Cpu, work: Work, counts: TileCounts, tile: Sequence[int],
                 ) -> list[tuple[dict[str, float], int]]:
    """(features, how often) of the query tiles, alike ones together."""
    entries = max(counts.full.numel() // max(counts.full.shape[-1], 1), 1)
    repeat = max(work.leading // entries, 1)
    grouped: Counter[tuple[bool, int, int]] = Counter()
    last = counts.full.shape[-1] - 1
    full, partial = counts.full.reshape(-1, last + 1), counts.partial.reshape(-1, last + 1)
    for f, p in zip(full.tolist(), partial.tolist(), strict=True):
        for i, pair in enumerate(zip(f, p, strict=True)):
            grouped[(i == last, *pair)] += repeat
    return [(_query_tile(device, work, counts, tile, *key), n) for key, n in grouped.items()]


def _query_tile(device: Cpu, work: Work, counts: TileCounts, tile: Sequence[int], last: bool,
                full: int, partial: int) -> dict[str, float]:
    block_q, block_k = tile[:2]
    boxed = len(tile) > 4
    if boxed:  # all alike; their keys are gathered, so that none is cut off
        rows, rest = -(-work.queries // counts.full.shape[-1]), 0
    else:
        rows = work.queries - (-(-work.queries // block_q) - 1) * block_q if last else block_q
        rest = work.keys % block_k
    found: dict[str, float] = defaultdict(float)
    visited = full + partial
    # A row that visits every key tile also visits the one that the end of the keys cuts off.
    cut = 1 if rest and visited == counts.key_tiles else 0
    for depth, times in ((block_k, visited - cut), (rest, cut)):
        if times:
            for name, n in visit_features(device, work, tile, rows, depth).items():
                found[name] += n * times * work.sweeps
    hidden = rows * (block_k // device.width) * partial * work.sweeps
    found["hidden"] += hidden
    found["op"] += hidden * work.mask_ops
    found["query"] += rows * work.head_dim + block_q * work.value_dim
    # Keys and values of a head that the second-level cache holds are streamed from there.
    held = 4 * work.keys * (work.head_dim + work.value_dim)
    beyond = min(1.0, max(0.0, held / device.l2 - 0.5))
    width = work.head_dim + work.value_dim
    moved = 4 * block_k * width * beyond
    if boxed:
        found["gather"] += block_k * width * visited * work.sweeps
        # Operands that vary along both axes are gathered, too.
        found["op"] += rows * block_k / device.width * visited * work.sweeps * (
            (GATHER - READ) * work.bias_bytes / work.item)
    moved += work.bias_bytes * rows * block_k
    found["stream"] += moved * visited * work.sweeps / 1024
    return found


def _once(work: Work, device: Cpu, tile: Sequence[int]) -> dict[str, float]:
    keys = 0 if len(tile) > 4 else -(-work.keys // tile[1]) * tile[1]
    in_place = work.dtype == "float32" and work.value_dim % device.width == 0
    width = work.head_dim + (0 if in_place else work.value_dim)
    moved = work.tensor_bytes + work.item * work.owners * keys * width
    return {"pack": float(work.owners * keys * width), "call": 1.0,
            "far": max(0.0, moved - device.l2) / 1024}


def weigh(device: Cpu, counted: Features) -> float:
    """Nanoseconds of some features."""
    given = {**COEFFICIENTS, **device.coefficients}
    return sum(given[name] * n for name, n in counted.items())


def seconds(device: Cpu, work: Work, counts: TileCounts, tile: Sequence[int],
            threads: int = 1) -> float:
    """Predicted time of a call with the tile (query rows, keys, MR, NV, *box)."""
    once = _once(work, device, tile)
    parts = _query_tiles(device, work, counts, tile)
    costs = [(weigh(device, part), n) for part, n in parts]
    packing = weigh(device, {name: once[name] for name in ("pack", "far")})
    if threads <= 1:
        total = sum(cost * n for cost, n in costs) + packing
    else:
        tasks = torch.cat([torch.full((n,), cost, dtype=torch.float64) for cost, n in costs])
        total = makespan(tasks, threads) + packing / threads
    woken = threads if threads > 1 else 0
    return 1e-9 * (total + weigh(device, {"call": 1.0, "thread": woken}))
