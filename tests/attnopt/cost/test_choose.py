"""Choosing a lowering and a tile, and the verdict on a rewrite."""

import dataclasses
import itertools

import torch

from attnopt.cost import cpu
from attnopt.cost.choose import Candidate, choose, duration, refused, worth
from attnopt.cost.cpu_tiles import cpu_tiles
from attnopt.cost.devices import find_cpu, find_gpu
from attnopt.cost.gpu import Usage
from attnopt.cost.tiles import count_tiles
from attnopt.cost.work import Work
from attnopt.ir.intervals import GridTile
from attnopt.ir.mask import ALL, Band, Causal, KeyKeep, Mask, Neighborhood
from attnopt.ir.tiling import tilings_of

H200 = find_gpu("NVIDIA H200")
CPU = find_cpu("Some CPU", "avx512")
WORK = Work(8, 8, 1024, 1024, 64, 64)
ALL_TILES = [Candidate("cpp", tile) for tile in cpu_tiles(CPU, 1024, 1024)]


def test_the_fastest_candidate_is_chosen() -> None:
    found = choose(ALL_TILES, WORK, ALL, CPU)
    assert found.best is not None and found.table[0] is found.best
    assert len(found.table) == len(ALL_TILES) and not any(e.reason for e in found.table)
    times = {c.tile: cpu.seconds(CPU, WORK, count_tiles(ALL, 1024, 1024, *c.tile[:2], tail=True),
                                 c.tile) for c in ALL_TILES}
    assert found.best.seconds <= 1.01 * min(times.values())
    assert [e.seconds for e in found.table[1:]] == sorted(e.seconds for e in found.table[1:])
    assert "cpp " in str(found.best) and str(found.best).endswith("s")


def test_a_narrow_window_gets_small_tiles() -> None:
    long = dataclasses.replace(WORK, queries=8192, keys=8192)
    def area(mask: Mask) -> int:
        best = choose(ALL_TILES, long, mask, CPU).best
        assert best is not None
        return best.candidate.tile[0] * best.candidate.tile[1]
    assert area(Band(-31, 0)) < area(ALL)


def test_operands_that_are_known_are_counted() -> None:
    pad = torch.arange(1024) < 128
    candidates = ALL_TILES[:3]
    known = choose(candidates, WORK, KeyKeep("pad"), CPU, operands={"pad": pad}).best
    unknown = choose(candidates, WORK, KeyKeep("pad"), CPU).best
    assert known is not None and unknown is not None and known.seconds < 0.3 * unknown.seconds


def test_what_spills_or_does_not_fit_is_never_chosen() -> None:
    candidates = [
        Candidate("triton", (128, 64, 4, 3), Usage(255, 131072, 27, 4)),
        Candidate("triton", (128, 256, 8, 3), Usage(255, 300_000, 0, 8)),
        Candidate("triton", (256, 256, 8, 3), Usage(300, 1000, 0, 8)),
        Candidate("triton", (64, 64, 4, 3), Usage(158, 65592, 0, 4)),
        Candidate("triton", (128,))]
    work = dataclasses.replace(WORK, leading=64, owners=64, head_dim=128, value_dim=128,
                               dtype="bfloat16")
    found = choose(candidates, work, Causal(), H200)
    assert found.best is not None and found.best.candidate is candidates[3]
    reasons = {str(e.candidate): e.reason for e in found.table}
    assert reasons["triton 128x64x4x3"] == "spills 27"
    assert "does not fit" in reasons["triton 128x256x8x3"] and "must have" in reasons["triton 128"]
    nothing = choose(candidates[:3], work, Causal(), H200)
    assert nothing.best is None and len(nothing.table) == 3
    for tile, part in (((48, 64, 12, 4), "spills"), ((48, 32, 6, 4), "multiple of 64"),
                       ((48, 64), "4 numbers")):
        assert part in refused(Candidate("cpp", tile), CPU)
    assert "must be cpp" in refused(Candidate("triton", (64, 64, 4, 3)), CPU)
    assert refused(Candidate("aten:sdpa"), CPU) == "" == refused(Candidate("aten:dense"), H200)


def test_ties_prefer_fewer_tiles() -> None:
    work = Work(1, 1, 64, 64, 128, 128, "bfloat16")
    tied = [Candidate("triton", (64, 32, 4, 3)), Candidate("triton", (64, 64, 4, 3))]
    for order in itertools.permutations(tied):
        found = choose(order, work, ALL, H200)
        assert found.best is not None and found.best.candidate.tile[1] == 64


def test_boxes_of_a_grid_compete() -> None:
    length = (64, 64)
    mask, n = Neighborhood((15, 15), length=length), 4096
    work = Work(24, 24, n, n, 128, 128, "bfloat16")
    candidates = [Candidate("gluon", (128, 64, 8, 2))] + [
        Candidate("gluon", (128, 64, 8, 2), boxes=(a, b))
        for a in tilings_of(length, 128) for b in tilings_of(length, 64)]
    found = choose(candidates, work, mask, H200)
    assert found.best is not None and found.best.candidate.boxes is not None
    # Boxes of nearly equal sides beat rows of tokens.
    assert all(min(t.shape) >= 4 for t in found.best.candidate.boxes)  # type: ignore[union-attr]
    wrong = Candidate("gluon", (128, 64), boxes=(GridTile(length, (4, 4)), 64))
    assert "boxes must have" in refused(wrong, H200)


def test_lowerings_compete() -> None:
    torch_only = [Candidate("aten:sdpa"), Candidate("aten:dense"),
                  Candidate("aten:blocks", (256, 1))]
    for device, work in ((CPU, WORK), (H200, dataclasses.replace(WORK, dtype="bfloat16"))):
        found = choose(torch_only, work, ALL, device)
        assert found.best is not None and found.best.candidate.lowering == "aten:sdpa"
    found = choose([*torch_only, *ALL_TILES], WORK, Band(-31, 0), CPU)
    assert found.best is not None and found.best.candidate.lowering == "cpp"


def test_verdicts() -> None:
    good = worth(2e-3, 1e-3)
    assert good.pays and good.speedup == 2 and good.text == "predicted 1 ms instead of 2 ms"
    bad = worth(1e-3, 0.99e-3)
    assert not bad.pays and bad.text == "cost: predicted 990 us instead of 1 ms"
    assert worth(1e-3, 0.99e-3, margin=0.0).pays and not worth(0.0, 1e-6).pays
    assert [duration(x) for x in (2.5, 0.0321, 12e-6, 4e-9)] == ["2.5 s", "32.1 ms", "12 us",
                                                                 "0.004 us"]
