"""Which lowering and which tile, and whether a rewrite pays: pure functions of data.

A candidate comes with what its kernel takes, where a compiler has said so. One that spills or does
not fit is never chosen. Among predictions that the model cannot tell apart, fewer tiles win, then
the order in which candidates are given.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from attnopt.cost import cpu, gpu, plain
from attnopt.cost.devices import Cpu, Device, Gpu
from attnopt.cost.gpu import Usage
from attnopt.cost.tiles import TileCounts, count_halos, count_tiles
from attnopt.cost.work import Work
from attnopt.ir.mask import Mask
from attnopt.ir.tiling import Tiling, tile_size

#: predictions closer than this are alike
ALIKE = 0.01
#: a rewrite must save at least this share of the original's time
MARGIN = 0.05
PLAIN = {"aten:sdpa": "sdpa", "aten:dense": "dense", "aten:blocks": "blocks"}


@dataclass(frozen=True)
class Candidate:
    """A lowering ("cpp", "triton", "gluon", "aten:sdpa" …) with its tile.

    tile:    as in `Schedule`: (query rows, keys, …); (rows, entries) or () for ATen; for C++ that
             gathers keys (query rows, keys, MR, NV, *box)
    usage:   registers, shared memory and spills of the compiled kernel, where they are known
    boxes:   the tilings of queries and keys, where tiles are boxes of a grid
    density: share of the scores that an ATen lowering computes
    seconds: predicted by a model of the lowering's own
    """

    lowering: str
    tile: tuple[int, ...] = ()
    usage: Usage | None = None
    boxes: tuple[Tiling, Tiling] | None = None
    density: float = 1.0
    seconds: float | None = None

    def __str__(self) -> str:
        return " ".join([self.lowering, "x".join(map(str, self.tile))]).strip()


@dataclass(frozen=True)
class Estimate:
    """A candidate with its predicted seconds, or the reason why it cannot be chosen."""

    candidate: Candidate
    seconds: float = float("inf")
    visited: int = 0
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.candidate}: {self.reason or duration(self.seconds)}"


@dataclass(frozen=True)
class Choice:
    """The best estimate, or None, and all of them, the best first."""

    best: Estimate | None
    table: tuple[Estimate, ...]


def choose(candidates: Sequence[Candidate], work: Work, mask: Mask, device: Device,
           threads: int = 1, operands: Mapping[str, Tensor] | None = None,
           leading: Sequence[int] = (), visible: float = 1.0) -> Choice:
    """The candidate that the model predicts to be fastest.

    mask: of the Spec; operands: those of its operands that are known, by slot; leading: lengths of
    the leading axes, where the mask varies with them; visible: share of the key tiles that are
    visited, where only that is known.
    """
    @functools.cache
    def counted(tile_q: Tiling, tile_k: Tiling) -> TileCounts:
        found = count_tiles(mask, work.queries, work.keys, tile_q, tile_k, leading, operands,
                            tail=True)
        return found if visible >= 1 else found.thinned(visible)

    @functools.cache
    def gathered(box: tuple[int, ...], keys: int) -> TileCounts | None:
        leads = leading if mask.axes - {"q", "k"} else ()
        return count_halos(mask, work.queries, work.keys, box, keys, leads)

    estimates = []
    for candidate in candidates:
        if candidate.seconds is not None:
            estimates.append(Estimate(candidate, candidate.seconds))
            continue
        reason = refused(candidate, device)
        if not reason and is_gathered(candidate):
            halos = gathered(candidate.tile[4:], candidate.tile[1])
            if halos is None:
                reason = f"the mask has no halos of {candidate.tile[4:]}"
            else:
                estimates.append(Estimate(
                    candidate, _tiled(candidate, work, halos, device, threads),
                    int(halos.visited.sum())))
                continue
        if reason:
            estimates.append(Estimate(candidate, reason=reason))
        elif candidate.lowering in PLAIN:
            estimates.append(Estimate(candidate, _plain(candidate, work, device, threads)))
        else:
            tiles = candidate.boxes or (candidate.tile[0], candidate.tile[1])
            counts = counted(*tiles)
            estimates.append(Estimate(
                candidate, _tiled(candidate, work, counts, device, threads),
                int(counts.visited.sum())))
    legal = [e for e in estimates if not e.reason]
    best = None
    if legal:
        bound = min(e.seconds for e in legal) * (1 + ALIKE)
        near = [e for e in legal if e.seconds <= bound]
        best = min(near, key=lambda e: (e.visited, e.seconds))
    return Choice(best, tuple(sorted(estimates, key=lambda e: (e is not best, e.seconds))))


def is_gathered(candidate: Candidate) -> bool:
    """Whether it is C++ that gathers the keys of boxes of queries."""
    return candidate.lowering == "cpp" and len(candidate.tile) > 4


def refused(candidate: Candidate, device: Device) -> str:
    """Why a candidate cannot be chosen on a device, "" where it can."""
    usage = candidate.usage
    if candidate.lowering in PLAIN:
        return ""
    if len(candidate.tile) < 2:
        return f"tile must have rows and keys, got {candidate.tile}"
    if candidate.boxes is not None:
        sizes = tuple(map(tile_size, candidate.boxes))
        if sizes != candidate.tile[:2]:
            return f"boxes must have {candidate.tile[:2]} tokens, got {sizes}"
    if usage is not None and usage.spills:
        return f"spills {usage.spills}"
    if isinstance(device, Cpu):
        return _refused_on_cpu(candidate, device)
    if usage is not None and gpu.blocks_per_sm(device, usage) < 1:
        return (f"does not fit: {usage.registers} registers x {usage.warps} warps, "
                f"{usage.smem} bytes of shared memory")
    return ""


def _refused_on_cpu(candidate: Candidate, device: Cpu) -> str:
    if candidate.lowering != "cpp" or len(candidate.tile) < 4:
        return f"lowering must be cpp with 4 numbers on a CPU, got {candidate}"
    rows, keys, mr, nv, *box = candidate.tile
    if math.prod(box) > rows:
        return f"box must have at most {rows} queries, got {box}"
    if mr * nv + nv + 1 > device.registers:
        return f"spills: {mr} x {nv} sums do not fit into {device.registers} registers"
    if keys % (nv * device.width):
        return f"keys must be a multiple of {nv * device.width}, got {keys}"
    return ""


def _plain(candidate: Candidate, work: Work, device: Device, threads: int) -> float:
    if isinstance(device, Cpu):
        return plain.seconds(device, work, PLAIN[candidate.lowering], candidate.density, threads)
    # Matrix products at the device's rate, and every pass over the scores through its memory.
    rate = gpu.matrix_rate(device, work.dtype) * device.sms * device.clock * 0.6
    flops = work.flops * candidate.density * (3.5 if work.backward else 1.0)
    if candidate.lowering == "aten:sdpa":
        return 5e-6 + 1e-9 * flops / rate
    moved = 2.0 * work.scores * work.score_bytes * (work.author_ops + 2)
    moved *= 3.0 if work.backward else 1.0
    return 5e-6 * (work.author_ops + 3) + 1e-9 * (flops / rate + moved / device.memory)


def _tiled(candidate: Candidate, work: Work, counts: TileCounts, device: Device,
           threads: int) -> float:
    if isinstance(device, Gpu):
        return gpu.seconds(device, candidate.lowering, work, counts, candidate.tile,
                           candidate.usage)
    return cpu.seconds(device, work, counts, candidate.tile, threads)


@dataclass(frozen=True)
class Verdict:
    """Whether a rewrite pays, with both estimates as a text for the report."""

    pays: bool
    text: str
    speedup: float


def worth(original: float, rewritten: float, margin: float = MARGIN) -> Verdict:
    """Whether going from `original` to `rewritten` seconds saves at least `margin` of the time."""
    pays = rewritten <= original * (1 - margin)
    ratio = original / rewritten if rewritten > 0 else float("inf")
    verb = "predicted" if pays else "cost: predicted"
    return Verdict(pays, f"{verb} {duration(rewritten)} instead of {duration(original)}", ratio)


def duration(seconds: float) -> str:
    """Seconds as a short text."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"
