"""`attnopt calibrate` and the suite that judges tiles: what is stored, found, said; no figures."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch

from attnopt import environment, logs
from attnopt.bench import RESULTS, calibrate, calibrate_cpu, calibrate_gpu, tiles
from attnopt.bench.shapes import KINDS, Shape
from attnopt.cli import main
from attnopt.cost.cpu_tiles import cpu_tiles
from attnopt.cost.devices import Cpu, calibration_path, find_cpu, find_gpu
from attnopt.cost.fit_gpu import Measured
from attnopt.cost.tiles import count_tiles
from attnopt.kernels.cpp.toolchain import isa, toolchain
from attnopt.kernels.reference import reference

NAME = environment.processor()["model"]
needs_compiler = pytest.mark.skipif(bool(toolchain().why_not()), reason=toolchain().why_not())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNOPT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")


def found_in(folder: Path) -> Cpu:
    return find_cpu(NAME, isa().name, folder=folder)


# -- the profile ----------------------------------------------------------------------------------
@needs_compiler
def test_a_profile_is_stored_found_and_removed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--quick", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    path = calibration_path(folder, "cpu", NAME)
    assert str(path) in said.out and "GFLOP/s" in said.out and "calls in turns" in said.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    device = found_in(folder)
    assert device.calibrated and not device.hint and device.name == NAME
    assert {"fma", "score", "sdpa.score"} <= set(device.coefficients)
    assert {"float32", "bfloat16"} <= set(device.gemm) and device.memory > 0
    assert main(["calibrate", "--show", "--json"]) == 0
    [entry] = json.loads(capsys.readouterr().out)
    assert entry["path"] == str(path) and entry["device"]["calibrated"]
    assert main(["calibrate", "--reset"]) == 0
    assert capsys.readouterr().out == f"removed: {path}\n" and not path.exists()
    assert not found_in(folder).calibrated
    for argv in (["--show"], ["--reset"]):
        assert main(["calibrate", *argv]) == 0
        assert capsys.readouterr().out == "nothing is stored\n"


def test_without_a_compiler_torch_alone_is_measured(
    folder: Path, without_compiler: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--quick", "--device", "cpu", "--json"]) == 0
    said = capsys.readouterr()
    [entry] = json.loads(said.out)
    assert "no-such-compiler" in said.err and "no-such-compiler" in entry["notes"]["left out"]
    prior, found = entry["prior"], entry["device"]["coefficients"]
    assert found["sdpa.call"] > 0 and all(
        found[name] == prior[name] for name in prior if "." not in name)


def test_a_folder_that_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setattr(logs.logger, "disabled", True)
    for argv in (["--quick"], ["--show"], ["--reset"]):
        assert main(["calibrate", *argv]) == 1
        said = capsys.readouterr()
        assert "CacheError" in said.err and "no profile can be stored" in said.err
        assert not said.out
    assert list(folder.iterdir()) == []


def test_a_broken_profile_is_shown_as_such(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir(mode=0o700)
    calibration_path(folder, "cpu", NAME).write_text("{}")
    assert main(["calibrate", "--show"]) == 0
    assert "not used, device must be a file of version" in capsys.readouterr().out
    assert main(["calibrate", "--reset"]) == 0


def test_usage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["calibrate", "--show", "--reset"])
    assert stopped.value.code == 2
    if not torch.cuda.is_available():
        assert main(["calibrate", "--device", "gpu"]) == 1
        assert "gpu must be a CUDA device" in capsys.readouterr().err


# -- what is measured -----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_shapes_mean_what_they_say(kind: str) -> None:
    shape = Shape(kind, 2, 4, 2, 5, 9, 8)
    query, key, value = shape.tensors()
    assert tuple(map(tuple, (query.shape, key.shape, value.shape))) == shape.sizes
    assert str(shape) == f"{kind} B2 H4/2 Q5 K9 d8" and shape.work.leading == 8
    exact = reference(shape.spec)(query.double(), key.double(), value.double())
    found = shape.compose(query, key, value, shape.hidden())
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="kind must be"):
        Shape("sparse", 1, 1, 1, 1, 1, 1)
    with pytest.raises(ValueError, match="multiple of 3"):
        Shape(kind, 1, 4, 3, 1, 1, 1)


@pytest.mark.parametrize("name", ["avx512", "avx2", "neon", "generic"])
def test_the_plan_covers_tiles_and_sizes(name: str) -> None:
    device = find_cpu("Some CPU", name)
    plan = calibrate_cpu.plan(device)
    assert all(set(chosen) <= set(cpu_tiles(device, s.queries, s.keys)) for s, chosen in plan)
    assert sum(len(chosen) for _, chosen in plan) >= 150 and all(chosen for _, chosen in plan)
    assert {s.head_dim for s, _ in plan} == {32, 64, 128} and {s.kind for s, _ in plan} == {*KINDS}
    kernels = {(s.kind, s.head_dim, tile) for s, chosen in plan for tile in chosen}
    assert len(kernels) <= 90, "all of them have to be compiled"


def test_what_is_known_of_an_unknown_cpu(tmp_path: Path) -> None:
    for index, (level, kind, size) in enumerate((
            ("1", "Data", "48K"), ("1", "Instruction", "99K"), ("2", "Unified", "2048K"))):
        (tmp_path / f"index{index}").mkdir()
        for file, text in (("level", level), ("type", kind), ("size", size)):
            (tmp_path / f"index{index}" / file).write_text(text + "\n")
    base = find_cpu("Some CPU", isa().name)
    found = calibrate_cpu.facts(base, tmp_path)
    assert (found.l1, found.l2, found.l3) == (48 << 10, 2 << 20, base.l3)
    assert found.width == isa().width
    known = dataclasses.replace(base, hint="")
    assert calibrate_cpu.facts(known, tmp_path) == known


@needs_compiler
def test_two_threads_never_spoil_the_device() -> None:
    device, scaling = calibrate_cpu.threads(find_cpu(NAME, isa().name), quick=True)
    assert scaling > 0 and device.coefficients.get("thread", 1.0) > 0


# -- a GPU ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("name", "arch"), [("NVIDIA H200", "sm_90"), ("NVIDIA L4", "sm_89"),
                                            ("AMD Instinct MI300X", "gfx942")])
def test_the_plan_of_a_gpu(name: str, arch: str) -> None:
    device = find_gpu(name)
    plan = calibrate_gpu.plan(device, arch)
    assert {s.head_dim for s, _ in plan} == {64, 128} and len(plan) >= 100
    assert 8 <= len({tile for s, tile in plan if s.head_dim == 64}) <= 10
    dense = [(s, tile) for s, tile in plan if s.kind == "dense"]
    assert {s.queries // tile.rows for s, tile in dense} == {
        1, device.sms, device.sms + 1, 4 * device.sms}
    # Every one is a measurement that the fit takes.
    shape, tile = plan[0]
    counts = count_tiles(shape.spec.mask, shape.queries, shape.keys, tile.rows, tile.keys)
    assert Measured(shape.work, counts, (tile.rows, tile.keys), 1.0).work.dtype == "bfloat16"
    assert len(calibrate_gpu.plan(device, arch, quick=True)) < 12


def test_spread() -> None:
    assert calibrate_gpu.spread(range(100), 4) == [0, 33, 66, 99]
    assert calibrate_gpu.spread(range(3), 4) == [0, 1, 2]


@pytest.mark.gpu
def test_a_gpu_is_calibrated(folder: Path) -> None:
    [entry] = calibrate.run(["gpu"], quick=True, say=lambda line: None)
    assert entry["device"]["calibrated"] and "triton" in entry["device"]["coefficients"]
    shape, tile = calibrate_gpu.plan(find_gpu(""), "sm_80", quick=True)[0]
    ready, failed = calibrate_gpu.compiled([(shape, tile)], lambda line: None)
    assert ready and not failed
    usage = calibrate_gpu.usage_of(shape, tile)
    assert usage is not None and usage.registers > 16 and usage.smem > 0


@pytest.mark.gpu
def test_tiles_of_a_gpu(folder: Path) -> None:
    found = tiles.measure_gpu(quick=True, say=lambda line: None)
    assert found["summary"]["shapes"] == 2


# -- the suite ------------------------------------------------------------------------------------
def test_shapes_that_no_calibration_has_seen() -> None:
    shapes = tiles.random_shapes()
    assert shapes == tiles.random_shapes() != tiles.random_shapes(seed=1)
    assert len({str(s) for s in shapes}) == len(shapes) == 40
    seen = {(s.queries, s.keys, s.head_dim) for s, _, _ in calibrate_cpu.SHAPES}
    assert not [s for s in shapes if (s.queries, s.keys, s.head_dim) in seen]
    assert {s.kind for s in shapes} == {"dense", "causal"} and any(s.group > 1 for s in shapes)
    assert any(s.queries in tiles.DECODING for s in shapes)
    for name in ("avx512", "avx2", "neon", "generic"):
        device = find_cpu("Some CPU", name)
        assert all(len(cpu_tiles(device, s.queries, s.keys)) >= 12 for s in shapes)
    assert len({str(s) for s in tiles.gpu_shapes()}) == 40


def test_judgement() -> None:
    times = {"a": [1.3] * 15, "b": [1.0] * 15, "c": [1.25, 1.0, 0.9] * 5}
    row = tiles.judged(times, {"a": 1.0, "b": 1.1, "c": 1.2}, 0.1)
    assert (row["chosen"], row["best"]) == ("a", "b") and row["missed"] and not row["within"]
    assert row["regret"] == pytest.approx(0.3) and set(row["seconds"]) == {"a", "b", "c"}
    row = tiles.judged({"a": [1.3, 1.0, 1.3] * 5, "b": [1.0] * 15}, {"a": 1.0, "b": 1.1}, 0.29)
    assert not row["missed"] and not row["within"], "beyond the bound, but not shown"
    best = tiles.judged(times, {"b": 1.0, "a": 1.1, "c": 1.2}, 0.1)
    assert best["regret"] == 0 and best["interval"] == [0, 0] and best["within"]
    rows = {str(i): best for i in range(9)} | {
        "a": tiles.judged(times, {"a": 1.0, "b": 1.0, "c": 1.0}, 0.1)}
    found = tiles.summary(rows, 0.1)
    assert found["fulfilled"] and (found["missed"], found["shapes"]) == (1, 10)
    assert not tiles.summary(rows | {"x": rows["a"]}, 0.1)["fulfilled"]
    assert not tiles.summary({}, 0.1)["fulfilled"]
    assert "missed" in tiles.line("a", rows["a"])


@needs_compiler
def test_the_suite_tiles(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    assert main(["bench", "--suite", "tiles", "--quick", "--json", str(path)]) == 0
    found = json.loads(path.read_text("utf-8"))["suites"]["tiles"]
    assert found["summary"]["shapes"] == 2 and found["rounds"] == 3
    for row in found["shapes"].values():
        assert len(row["seconds"]) == 4 and set(row["predicted"]) == set(row["seconds"])
        assert row["chosen"] == next(iter(row["predicted"]))
    assert "of 2 shapes" in capsys.readouterr().out
    said: list[str] = []
    assert tiles.measure(quick=True, budget=1e-9, say=said.append) == {}
    assert said == ["no time for 2 of 2 shapes"]


def test_the_suites_where_nothing_is_generated(
    folder: Path, without_compiler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    assert tiles.measure(quick=True, say=said.append) == {} and "left out" in said[0]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tiles.measure_gpu(quick=True, say=said.append) == {}
    assert said[1] == "left out: this torch finds no CUDA device"


@pytest.mark.parametrize("path", sorted(RESULTS.glob("tiles-*.json")), ids=lambda p: p.stem)
def test_stored_results_are_whole(path: Path) -> None:
    record: dict[str, Any] = json.loads(path.read_text("utf-8"))
    found = record["suites"]["tiles"]
    assert record["date"] and record["versions"]["torch"] and record["cpu"]["model"]
    assert found["summary"] == tiles.summary(found["shapes"], tiles.BOUND)
    assert found["summary"]["shapes"] == 40 and found["rounds"] >= 15
    assert found["summary"]["fewest_tiles"] >= 12
