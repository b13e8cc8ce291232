"""The command line, its two spellings, logging and the bench suites."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import attnopt
from attnopt import bench, logs
from attnopt.bench.encoder import encoder
from attnopt.bench.spellings import SPELLINGS, Wrapped
from attnopt.cli import main
from attnopt.errors import OptionError
from attnopt.kernels import cache
from attnopt.report import Report

ROOT = Path(__file__).parent.parent.parent


class Untouched(nn.Module):
    """Stands for an optimised module: the suites must measure whatever they are given."""

    def __init__(self, module: nn.Module, args: Any) -> None:
        super().__init__()
        self.module, self.report = module, Report(timings={"capture": 0.1})

    def forward(self, *args: Any) -> Any:
        return self.module(*args)


@pytest.fixture
def clean_logger(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(logs.ENV, raising=False)
    level, handlers = logs.logger.level, list(logs.logger.handlers)
    yield
    logs.logger.setLevel(level)
    logs.logger.handlers[:] = handlers


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env"]) == 0
    said = capsys.readouterr().out
    for word in (attnopt.__version__, torch.__version__, "ATTNOPT_LOG", "cores", "fp32 lanes"):
        assert word in said


def test_env_as_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ATTNOPT_CACHE_DIR", str(tmp_path / "kernels"))
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["torch"] == torch.__version__
    assert found["settings"]["ATTNOPT_CACHE_DIR"] == str(tmp_path / "kernels")
    assert found["cache"]["folder"] == str(tmp_path / "kernels")
    assert found["compiler"]["lanes"] in (4, 8, 16)
    assert bool(found["compiler"]["version"]) != bool(found["compiler"]["why_not"])


def test_env_without_a_compiler(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    assert main(["env"]) == 0
    assert "CXX must name a C++ compiler, got '/nonexistent/c++'" in capsys.readouterr().out


def test_cache(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "kernels"
    monkeypatch.setenv("ATTNOPT_CACHE_DIR", str(folder))
    assert main(["cache"]) == 0
    assert capsys.readouterr().out == f"{folder}\nempty\n"
    cache.store("cpp", cache.key("a"), ".cpp", b"x" * 1500)
    cache.store("cpp", cache.key("a"), ".so", b"x" * 1500)
    cache.store("triton", cache.key("b"), ".py", b"x" * 2_000_000)
    assert main(["cache"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(folder), "cpp      2 files, 3.0 kB", "triton   1 file, 2.0 MB"]
    assert main(["cache", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == 3 and found["kinds"]["cpp"] == {"files": 2, "bytes": 3000}
    assert main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(folder), "removed 3 files, 2.0 MB", "empty"]
    assert cache.entries() == []
    assert main(["cache", "--clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["removed"] == {"files": 0, "bytes": 0}


def test_cache_that_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    monkeypatch.setenv("ATTNOPT_CACHE_DIR", str(folder))
    assert main(["cache"]) == 0
    said = capsys.readouterr().out
    assert f"refused: {folder} must not be writable by others, got mode 0777" in said
    assert main(["env"]) == 0
    assert "must not be writable by others" in capsys.readouterr().out


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "bench" in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert attnopt.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("argv", [["nonsense"], ["bench", "--suite", "nonsense"],
                                  ["bench", "--repeats", "0"], ["env", "extra"]])
def test_wrong_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(argv)
    assert exit_.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_module_twin() -> None:
    done = subprocess.run([sys.executable, "-m", "attnopt", "--version"], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"attnopt {attnopt.__version__}"


def test_errors_become_status_1(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "SUITES", {"overhead": _raises})
    monkeypatch.setitem(vars(attnopt), "optimize", Untouched)
    assert main(["bench", "--suite", "overhead", "--json", str(tmp_path / "r.json")]) == 1
    assert capsys.readouterr().err == "attnopt: OptionError: x must be y, got z\n"
    assert not (tmp_path / "r.json").exists()


def _raises(*args: Any, **kwargs: Any) -> dict[str, Any]:
    raise OptionError("x must be y, got z")


def test_bench_overhead(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(vars(attnopt), "optimize", Untouched)
    path = tmp_path / "r.json"
    assert main(["bench", "--suite", "overhead", "--repeats", "2", "--json", str(path)]) == 0
    record = json.loads(path.read_text("utf-8"))
    assert set(record) == {"date", "cpu", "compiler", "accelerators", "versions", "suites"}
    assert record["suites"]["overhead"]["toy, grad off"]["ratio"] > 0
    assert "ratio" in capsys.readouterr().out


def test_bench_optimize_and_spellings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench.optimizing, "LAYERS", (1, 2))
    monkeypatch.setattr(bench.optimizing, "SIZE", 24)
    monkeypatch.setattr(bench.spellings, "LENGTH", 8)
    some = dict(list(SPELLINGS.items())[:3])
    monkeypatch.setattr(bench.spellings, "SPELLINGS", some)
    said: list[str] = []
    record = bench.run(Untouched, ["optimize", "spellings"], repeats=1, say=said.append)
    assert record["suites"]["optimize"]["growth"] > 0
    assert set(record["suites"]["spellings"]) == set(some)
    assert len(said) == 2 + 2 + 1 + len(some)
    with pytest.raises(OptionError, match="suite must be one of"):
        bench.run(Untouched, ["nonsense"])
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "attnopt" / "bench" / "results")
    assert bench.save(record) is None, "an installed package has no place for results"
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "attnopt" / "bench").mkdir(parents=True)
    assert bench.save(record) == bench.RESULTS
    assert len(list(bench.RESULTS.glob("*.json"))) == 2


def test_bench_models_can_be_exported() -> None:
    state = torch.random.get_rng_state()
    model, args = encoder(1, 16, 2, 2, 8)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.testing.assert_close(model(*args), encoder(1, 16, 2, 2, 8)[0](*args))
    torch.export.export(model, args, strict=False)
    q = torch.randn(2, 8, 8, 64)
    for name, fn in SPELLINGS.items():
        assert Wrapped(fn)(q, q, q).isfinite().all(), name
        torch.export.export(Wrapped(fn), (q, q, q), strict=False)


def test_logging_is_silent_by_default(
    clean_logger: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logs.setup()
    assert any(isinstance(h, logging.NullHandler) for h in logs.logger.handlers)
    logs.get("anything").info("not shown")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("level", "number"), [("debug", 10), ("INFO", 20), ("15", 15), (" ", 0)])
def test_log_level_by_environment(
    clean_logger: None, monkeypatch: pytest.MonkeyPatch, level: str, number: int
) -> None:
    logs.logger.setLevel(0)
    monkeypatch.setenv(logs.ENV, level)
    assert logs.setup() == number == logs.logger.level
    count = len(logs.logger.handlers)
    logs.setup()
    assert len(logs.logger.handlers) == count


def test_a_wrong_level_is_said_not_raised(
    clean_logger: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(logs.ENV, "loud")
    logs.setup()
    assert "ATTNOPT_LOG must be a level" in caplog.text


def test_log_lines_go_to_stderr() -> None:
    code = "from attnopt import logs; logs.setup(); logs.get('x').info('hello')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, check=True,
                          capture_output=True, env={"ATTNOPT_LOG": "info", "PATH": ""})
    assert done.stdout == "" and done.stderr == "attnopt.x INFO: hello\n"
