"""The kernel suites of `attnopt bench`: what they measure, say and store; no figure is asserted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnopt
from attnopt import bench
from attnopt.bench import cpu, gpu, memory, summary
from attnopt.bench.attentions import (
    Alibi,
    Attention,
    Causal,
    Neighborhood,
    SlidingWindow,
    Softcap,
)
from attnopt.bench.exact import truth, visible
from attnopt.bench.side_by_side import OURS, Case, bootstrap_interval, ratio, run_case
from attnopt.cli import main
from attnopt.report import Report

ATTENTIONS: dict[str, Callable[[], Attention]] = {
    "dense": Attention, "causal": Causal, "window": lambda: SlidingWindow(5),
    "neighbourhood": lambda: Neighborhood(4, 6, 3), "alibi": lambda: Alibi(4), "softcap": Softcap}
CPU = torch.device("cpu")


class Double:
    """Stands for an optimised module: `factor` times the author's output."""

    def __init__(self, module: Attention, factor: float = 1.0) -> None:
        self.module, self.factor, self.report = module, factor, Report()

    def __call__(self, *args: Tensor) -> Tensor:
        return self.factor * self.module(*args)


def same(module: Attention, args: Any, **options: Any) -> Double:
    return Double(module)


def small(name: str, **more: Any) -> Case:
    return Case(name, ATTENTIONS[name], heads=4, length=24, head_dim=8, **more)


@pytest.mark.parametrize("name", list(ATTENTIONS))
def test_one_meaning_in_all_spellings(name: str) -> None:
    """The author's code, SDPA's arguments, and the functions for flex say the same."""
    case = small(name, batch=2)
    attention, (q, k, v) = case.make(), case.inputs(CPU)
    exact = truth(attention, q, k, v)
    assert len(exact.places) == 8
    assert exact.error((attention(q, k, v),)) < 1e-5
    options = attention.fused(q, k)
    if options is not None:
        assert exact.error((F.scaled_dot_product_attention(q, k, v, **options),)) < 1e-5
    grid = torch.softmax(attention.change(torch.zeros(1, 4, 24, 24)), -1) > 0
    assert visible(attention, 24, 24, CPU) == grid[0, 0].sum()


def test_the_truth_has_gradients() -> None:
    case = small("softcap", training=True)
    attention, inputs = case.make(), case.inputs(CPU)
    out = attention(*inputs)
    found = (out, *torch.autograd.grad(out, inputs, torch.ones_like(out)))
    exact = truth(attention, *inputs, torch.ones_like(out))
    assert exact.error(found) < 1e-5
    wrong = (*found[:3], found[3] + 0.5)
    assert exact.error(wrong) == pytest.approx(0.5, abs=1e-5)
    assert math.isinf(exact.error((out * torch.nan, *found[1:])))


def test_a_row() -> None:
    row = run_case(small("causal", goals={"eager": (1e6, 2e6), "sdpa": (1e-6, 1.0)}), same,
                   repeats=2, compiled=False)
    assert row["shape"] == "B1 H4 N24 d8" and row["dtype"] == "fp32" and row["clock"] == "cpu"
    assert set(row["contestants"]) == {"eager", "sdpa", OURS}
    assert row["left_out"] == {} and row["rounds"] == 2
    assert row["ratios"]["eager"]["missed"] and not row["ratios"]["sdpa"]["missed"]
    assert row["density"] == pytest.approx(25 / 48)
    assert row["work"] == 4 * 8 * 300 * 4 and row["roofline_share"] > 0
    assert all(found["seconds"] > 0 and found["error"] < 1e-5
               for found in row["contestants"].values())
    json.dumps(row)


def test_an_error_shows() -> None:
    row = run_case(small("dense"), lambda module, args, **_: Double(module, 1.5), repeats=1,
                   compiled=False)
    assert row["contestants"][OURS]["error"] > 0.01 > row["contestants"]["eager"]["error"]


def test_a_training_row_and_peers_that_cannot() -> None:
    row = run_case(small("softcap", training=True, baselines=("eager", "sdpa", "flex")), same,
                   repeats=1)
    assert set(row["contestants"]) == {"eager", OURS}
    assert row["left_out"] == {
        "sdpa": "NotImplementedError: SDPA cannot express these scores",
        "flex": "NotImplementedError: FlexAttention on a CPU gives no gradients"}
    assert row["work"] == 4 * 8 * 24 * 24 * 4 * 3.5


def test_grouped_queries() -> None:
    row = run_case(small("dense", kv_heads=2), same, repeats=1, compiled=False)
    assert row["shape"] == "B1 H4/2 N24 d8"
    assert row["contestants"]["sdpa"]["error"] < 1e-5


def test_ratio_and_interval() -> None:
    values = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0]
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert 1.0 <= low < 1.5 < high <= 2.0
    found = ratio(values, [1.0] * 11, (1.6, 2.0))
    assert found["ratio"] == 1.5 and found["at_least"] == 1.6
    assert not found["missed"], "the interval reaches above it"
    assert ratio(values, [1.0] * 11, (high + 0.01, 9.0))["missed"]


def test_peak_memory() -> None:
    taken = memory.peak(lambda: torch.ones(32 * 2**20).sum(), CPU)
    if taken is None:
        pytest.skip("this system does not tell")
    assert 120e6 < taken < 200e6
    small = memory.peak(lambda: torch.ones(4), CPU)
    assert small is not None and small < 30e6


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "_QUICK", 32)
    monkeypatch.setitem(vars(attnopt), "optimize", same)


def test_the_suite_cpu(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    assert main(["bench", "--suite", "cpu", "--quick", "--repeats", "1", "--json", str(path)]) == 0
    record = json.loads(path.read_text("utf-8"))
    rows = record["suites"]["cpu"]
    assert set(rows) - {"two threads"} == {case.name for case in cpu.CASES}
    assert record["compiler"]["isa"] and record["versions"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert all(f"{name}, B" in said for name in rows)
    assert "must be" not in said, "goals are for the full lengths"


def test_some_rows_are_not_stored(
    tiny: None, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "attnopt" / "bench" / "results")
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "attnopt" / "bench").mkdir(parents=True)
    argv = ["bench", "--suite", "cpu", "--quick", "--case", "dense d*"]
    assert main(argv) == 0
    said = capsys.readouterr()
    assert "dense d32, B" in said.out and "dense d128, B" in said.out
    assert "causal" not in said.out and said.err == ""
    assert not bench.RESULTS.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_the_suite_gpu_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert main(["bench", "--suite", "gpu", "--json", str(path)]) == 0
    assert "left out: this torch finds no CUDA device" in capsys.readouterr().out
    assert json.loads(path.read_text("utf-8"))["suites"] == {}


def test_the_rows_of_the_suite_gpu_on_a_cpu() -> None:
    said: list[str] = []
    rows = gpu.measure(same, quick=True, repeats=1, device="cpu", say=said.append)
    assert set(rows) == {case.name for case in gpu.QUICK}
    assert len({case.name for case in gpu.CASES}) == len(gpu.CASES)
    rows = gpu.measure(same, quick=True, repeats=1, device="cpu", budget=1, say=said.append)
    assert rows == {} and said[-2].startswith("no time for: dense")


def test_an_interrupt_keeps_the_rows() -> None:
    said: list[str] = []
    calls = iter(range(9))

    def interrupted(module: Attention, args: Any, **options: Any) -> Double:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return Double(module)

    rows = gpu.measure(interrupted, quick=True, repeats=1, device="cpu", say=said.append)
    assert list(rows) == [case.name for case in gpu.QUICK[:2]]
    assert any(line.startswith("interrupted at: sliding window") for line in said)


@pytest.mark.gpu
def test_the_suite_gpu() -> None:
    rows = gpu.measure(attnopt.optimize, quick=True, repeats=2, say=lambda line: None)
    assert all(row["contestants"][OURS]["error"] < 0.1 for row in rows.values())
    assert all(row["contestants"][OURS]["peak_bytes"] > 0 for row in rows.values())


def test_table_and_chart(tmp_path: Path) -> None:
    rows = {"causal": run_case(small("causal", goals={"sdpa": (2.0, 3.0)}), same, repeats=1,
                               compiled=False)}
    head, line = summary.table(rows)
    assert head.split()[:3] == ["case", "shape", "dtype"] and line.startswith("causal")
    assert head.index("sdpa") == line.index(line.split("  ")[4].strip())
    path = tmp_path / "chart.svg"
    if summary.chart(rows, path, "a machine"):
        text = path.read_text("utf-8")
        assert "<svg" in text and "a machine" in text or "<path" in text
    else:
        assert not path.exists()
