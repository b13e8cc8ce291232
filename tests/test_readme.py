"""The README's quick start runs and prints what the README shows, numbers aside."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from attnopt.cost.devices import find_cpu
from attnopt.kernels import choosing

README = Path(__file__).parent.parent / "README.md"


def _words(text: str) -> list[str]:
    """The words, without numbers, units of time and rules, which vary from machine to machine."""
    text = re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "#", text)
    text = re.sub(r"-{2,}", " ", text)
    return re.sub(r"# +(us|ms|s|min)\b", "#", " ".join(text.split())).split()


def test_quick_start_prints_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    # The rule that is chosen depends on the machine: on the one that the README was written on.
    written_on = find_cpu("Intel(R) Xeon(R) Processor @ 2.50GHz", "avx512", 2, None)
    monkeypatch.setattr("attnopt.kernels.choosing.device", lambda kind="cpu": written_on)
    monkeypatch.setattr("attnopt.passes.rules.cost.FEWEST_SCORES", 32_768)
    for cached in (choosing.estimates, choosing.original):
        cached.cache_clear()
    section = README.read_text().partition("## Quick start")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    code = next(text for language, text in blocks if language == "python")
    shown = next(text for language, text in blocks if not language)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "quickstart.py", "exec"), {"__name__": "quickstart"})
    assert _words(said.getvalue()) == _words(shown)
