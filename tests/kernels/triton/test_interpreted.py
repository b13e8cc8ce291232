"""Runs `interpreted` in a child process, where TRITON_INTERPRET is set before triton is there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
FOLDER = Path(__file__).parent / "interpreted"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


def run(name: str, marked: str) -> None:
    root = Path(__file__).parents[3]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", str(FOLDER / name), "-q", "-p", "no:xdist", "-p",
         "no:cacheprovider", "-W", "ignore", "-m", marked], cwd=root, capture_output=True,
        text=True, env=os.environ | {"TRITON_INTERPRET": "1"}, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@pytest.mark.parametrize("name", FILES)
def test_essentials(name: str) -> None:
    run(name, "not slow")


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_everything(name: str) -> None:
    run(name, "slow")
