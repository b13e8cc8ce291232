"""The README's quick start runs and prints what the README shows, numbers aside."""

import contextlib
import io
import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def _normal(text: str) -> list[str]:
    """Lines without their numbers and column widths, which may differ from machine to machine."""
    lines = (re.sub(r"[-+]?\d[\d.]*(e[-+]?\d+)?", "#", line) for line in text.splitlines())
    return [" ".join(line.split()) for line in lines if line.strip(" -─")]


def test_quick_start_prints_what_is_shown() -> None:
    section = README.read_text().partition("## Quick start")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    code = next(text for language, text in blocks if language == "python")
    shown = next(text for language, text in blocks if not language)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, str(README), "exec"), {"__name__": "quick_start"})
    assert _normal(said.getvalue()) == _normal(shown)
