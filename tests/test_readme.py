"""The README's code runs; the quick start prints what the README shows, numbers aside."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo

from attnopt.cost.devices import find_cpu
from attnopt.kernels import choosing

README = Path(__file__).parent.parent / "README.md"


def _words(text: str) -> list[str]:
    """The words, without numbers, units of time and rules, which vary from machine to machine."""
    text = re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "#", text)
    text = re.sub(r"-{2,}", " ", text)
    return re.sub(r"# +(us|ms|s|min)\b", "#", " ".join(text.split())).split()


def _blocks(title: str) -> list[tuple[str, str]]:
    """(language, text) of the blocks of a section."""
    section = README.read_text().partition(f"## {title}")[2].partition("\n## ")[0]
    return re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def test_quick_start_prints_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    # The rule that is chosen depends on the machine: on the one that the README was written on.
    written_on = find_cpu("Intel(R) Xeon(R) Processor @ 2.50GHz", "avx512", 2, None)
    monkeypatch.setattr("attnopt.kernels.choosing.device", lambda kind="cpu": written_on)
    monkeypatch.setattr("attnopt.passes.rules.cost.FEWEST_SCORES", 32_768)
    for cached in (choosing.estimates, choosing.original):
        cached.cache_clear()
    blocks = _blocks("Quick start")
    code = next(text for language, text in blocks if language == "python")
    shown = next(text for language, text in blocks if not language)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "quickstart.py", "exec"), {"__name__": "quickstart"})
    assert _words(said.getvalue()) == _words(shown)


def test_four_more_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    if "attnopt" not in torch._dynamo.list_backends():
        pytest.skip("the backend is not installed")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "uses"}
    start = next(text for language, text in _blocks("Quick start") if language == "python")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(start, "quickstart.py", "exec"), names)
        for _, text in _blocks("Four more uses"):
            exec(compile(text, "uses.py", "exec"), names)
    assert "rewritten causal" in said.getvalue() and "fused: ok" in said.getvalue()
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "model.onnx"}
    assert names["written"].error < names["written"].bound
