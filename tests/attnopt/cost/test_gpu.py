"""The GPU model: published times of cuDNN on an H200, published brackets, occupancy, limits."""

import csv
import dataclasses
import math
from pathlib import Path

import pytest
import torch

from attnopt.cost import gpu
from attnopt.cost.devices import find_gpu
from attnopt.cost.gpu import Kernel, Usage, blocks_per_sm, kernel_of, seconds, tile_clocks
from attnopt.cost.makespan import MOST, makespan
from attnopt.cost.tiles import count_tiles
from attnopt.cost.work import Work
from attnopt.ir import expr as E
from attnopt.ir.intervals import GridTile
from attnopt.ir.mask import ALL, Band, Causal, Neighborhood

DATA = Path(__file__).parent / "data" / "cudnn_h200_prefill.csv"
H200 = find_gpu("NVIDIA H200")
ENDS_ALIGNED = Causal(E.size("k") - E.size("q"))


def errors(waves: bool = True) -> torch.Tensor:
    """Relative errors on the published sweep; waves: with the makespan, or total / units."""
    found = []
    with open(DATA, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            q, k, h = (int(row[name]) for name in ("query_length", "key_length", "query_heads"))
            work = Work(h, 8, q, k, 128, 128, "bfloat16")
            counts = count_tiles(ENDS_ALIGNED, q, k, 128, 128)
            time = seconds(H200, "cudnn", work, counts, (128, 128))
            if not waves:
                clocks = tile_clocks(H200, kernel_of(H200, "cudnn"), 128, 128, work)
                time = 5e-6 + float(counts.visited.sum()) * h / H200.sms * clocks / 1.755e9
            found.append(time * 1e3 / float(row["milliseconds"]) - 1)
    return torch.tensor(found).abs()


def test_published_times_of_cudnn() -> None:
    found = errors()
    assert len(found) == 34
    assert float(found.mean()) <= 0.037 and float(found.max()) <= 0.075
    without = errors(waves=False)
    assert float(without.mean()) > 0.1 and float(without.max()) > 0.5


@pytest.mark.parametrize(("head_dim", "rates"), [
    (64, (370, 460, 538)), (128, (524, 675, 816)), (256, (660, 779, 873))])
def test_brackets_of_published_kernels(head_dim: int, rates: tuple[int, ...]) -> None:
    """TFLOP/s for 0, half and four fifths of overlap, before what barriers and power take."""
    ideal = dataclasses.replace(H200, l2=1e9)
    work = Work(1, 1, 1, 1, head_dim, head_dim, "bfloat16")
    for overlap, rate in zip((0, 0.5, 0.8), rates, strict=True):
        clocks = tile_clocks(ideal, Kernel(overlap=overlap, efficiency=1.0), 128, 128, work)
        flops = 4 * 128 * 128 * head_dim * H200.sms * H200.clock * 1e9
        assert flops / clocks / 1e12 == pytest.approx(rate, abs=0.6)


@pytest.mark.parametrize(("usage", "blocks"), [
    (Usage(221, 164864, 0, 8), 1), (Usage(158, 114744, 0, 4), 2), (Usage(255, 65592, 0, 4), 2),
    (Usage(154, 33000, 0, 4), 3), (Usage(64, 1000, 0, 4), 8), (Usage(256, 1000, 0, 4), 0),
    (Usage(128, 232449, 0, 4), 0), (Usage(168, 164112, 0, 12), 1), (Usage(0, 0, 0, 64), 1)])
def test_blocks_on_a_multiprocessor(usage: Usage, blocks: int) -> None:
    assert blocks_per_sm(H200, usage) == blocks


def test_a_kernel_that_does_not_fit_has_no_time() -> None:
    work = Work(8, 8, 1024, 1024, 64, 64, "bfloat16")
    counts = count_tiles(ALL, 1024, 1024, 128, 128)
    with pytest.raises(ValueError, match="must fit"):
        seconds(H200, "triton", work, counts, (128, 128), Usage(255, 300_000, 0, 8))


def test_what_makes_a_kernel_slower() -> None:
    work = Work(64, 64, 4096, 4096, 64, 64, "bfloat16")
    def time(mask: object = ALL, order: str = "given", **changes: object) -> float:
        w = dataclasses.replace(work, **changes)  # type: ignore[arg-type]
        counts = count_tiles(mask, 4096, 4096, 128, 128)  # type: ignore[arg-type]
        return seconds(H200, "triton", w, counts, (128, 128), order=order)
    dense = time()
    assert time(Causal()) < 0.65 * dense and time(Band(-255, 0)) < 0.15 * dense
    assert time(score_ops=20.0) > 1.2 * dense and time(head_dim=128) > 1.1 * dense
    assert time(bias_bytes=8.0) > dense == time(bias_bytes=0.1) and time(backward=True) > 3 * dense
    assert time(sweeps=2) > 1.8 * dense and time(dtype="float32") > 2 * dense
    assert time(Causal(), "longest") < time(Causal())


def test_masked_tiles_cost_more() -> None:
    grid = Neighborhood((80, 80), length=(256, 256))
    box, n = GridTile((256, 256), (16, 8)), 256 * 256
    work = Work(24, 24, n, n, 128, 128, "bfloat16")
    counts = count_tiles(grid, n, n, box, box)
    all_masked = dataclasses.replace(
        counts, full=counts.full * 0, partial=counts.visited)
    times = [seconds(H200, "gluon", work, c, (128, 128)) for c in (counts, all_masked)]
    # Half of the tiles are full: masking them all costs 1.5 instead of 1.25 on average.
    assert times[1] / times[0] == pytest.approx(1.2, abs=0.03)


def test_other_devices_and_implementations() -> None:
    assert kernel_of(H200, "unheard of") == kernel_of(H200, "triton")
    assert kernel_of(dataclasses.replace(H200, coefficients={}), "triton") == Kernel()
    assert gpu.matrix_rate(H200, "float32") == 256 and gpu.matrix_rate(H200, "bfloat16") == 4096
    names = ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA L4",
             "NVIDIA GeForce RTX 4090", "NVIDIA B200", "AMD Instinct MI300X", "unknown card")
    work = Work(64, 64, 8192, 8192, 128, 128, "bfloat16")
    counts = count_tiles(ALL, 8192, 8192, 128, 64)
    rates = {}
    for name in names:
        device = find_gpu(name)
        time = seconds(device, "triton", work, counts, (128, 64))
        peak = device.sms * device.clock * gpu.matrix_rate(device, "bfloat16") * 1e9
        rates[name] = work.flops / time
        assert 0.15 * peak < rates[name] < peak, name
    assert rates["NVIDIA B200"] > rates["NVIDIA H100 80GB HBM3"] > rates["NVIDIA A100-SXM4-80GB"]
    assert rates["NVIDIA A100-SXM4-80GB"] > rates["NVIDIA GeForce RTX 4090"] > rates["NVIDIA L4"]


# -- makespan -------------------------------------------------------------------------------------
def test_waves() -> None:
    assert makespan([1.0] * 132, 132) == 1.0 and makespan([1.0] * 133, 132) == 2.0
    assert makespan([2.0], 4, 9) == 6.0 and makespan([], 4) == 0.0
    assert makespan([3.0, 1.0, 1.0, 1.0], 2) == 3.0 and makespan([1.0, 1.0, 1.0, 3.0], 2) == 4.0
    assert makespan(torch.tensor([1.0, 2.0]), 1, 3) == 9.0
    with pytest.raises(ValueError, match="units must"):
        makespan([1.0], 0)


def test_many_tasks_are_near_their_average() -> None:
    costs = torch.arange(1, 129, dtype=torch.float64)
    few, many = makespan(costs, 132, MOST // 128), makespan(costs, 132, MOST // 128 + 1)
    assert many == pytest.approx(few * (1 + 128 / MOST), rel=0.01)
    assert math.isclose(makespan(costs, 1, 1000), float(costs.sum()) * 1000)
