"""A long capture says so where somebody watches."""

import io
import sys

import attnopt.progress as progress_module


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_silent_when_quick_or_unwatched(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(progress_module, "_AFTER", 3.0 if stream.isatty() else 0.0)
        with progress_module.progress("Model"):
            pass
        assert stream.getvalue() == ""


def test_a_line_that_is_cleared(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress_module, "_AFTER", 0.0)
    with progress_module.progress("Model"):
        while "Model" not in stream.getvalue():
            pass
    assert stream.getvalue().startswith("\rattnopt: reading Model")
    assert stream.getvalue().endswith("\x1b[K")
