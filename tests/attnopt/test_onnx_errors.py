"""What an export says where it cannot go on: a package that is missing, a form that torch.onnx
cannot write."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import attnopt
from attnopt.errors import AttnOptError, MissingPackageError, OptionError, VerificationError

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import torch, attnopt
from attnopt.errors import MissingPackageError

uses = [lambda: attnopt.export_onnx(torch.nn.Linear(2, 2), (torch.ones(1, 2),), "m.onnx"),
        lambda: attnopt.onnx.optimize("in.onnx", "out.onnx")]
for use in uses:
    try:
        use()
    except MissingPackageError as error:
        print(error)
from attnopt import cli
raise SystemExit(cli.main(["onnx", "in.onnx", "-o", "out.onnx"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named_with_what_to_install(tmp_path, package: str) -> None:
    for needed in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(needed)
    root = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run([sys.executable, "-c", WITHOUT, package], cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": root},
                          capture_output=True, text=True)
    words = f"attnopt.onnx needs the package {package}: install it by pip install 'attnopt[onnx]'"
    assert done.stdout.count(words) == 2, done.stdout + done.stderr
    assert done.returncode != 0
    assert words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_an_option_and_an_import_error() -> None:
    error = MissingPackageError("must be installed", "onnx")
    assert isinstance(error, (OptionError)) and isinstance(error, ImportError)
    assert error.name == "onnx" and str(error) == "must be installed"


class Attention(nn.Module):
    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


@pytest.mark.parametrize("source", ["model", "file"])
def test_a_form_that_cannot_be_written(tmp_path, monkeypatch, source: str) -> None:
    onnx = pytest.importorskip("onnx")
    forms = pytest.importorskip("attnopt.onnx.bodies")
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)

    def fails(*args, **kwargs):
        raise RuntimeError("outer") from NotImplementedError("aten.solve has no counterpart\nmore")

    model, x, path = Attention().eval(), torch.randn(1, 2, 12, 8), tmp_path / "m.onnx"
    if source == "file":
        before = tmp_path / "in.onnx"
        torch.onnx.export(model, (x,), before, dynamo=True, verbose=False, opset_version=18,
                          external_data=False)
    monkeypatch.setattr(forms, "body", fails)
    if source == "file":  # that attention stays as it was
        report = attnopt.onnx.optimize(before, path)
        assert not report.forms and report.error == 0
        assert "got aten.solve has no counterpart" in report.kept[0]
        assert not onnx.load(path).functions
        return
    with pytest.raises(AttnOptError) as found:
        attnopt.export_onnx(model, (x,), path)
    text = str(found.value)
    assert text.startswith("the attention form of attnopt.Attention of ")
    assert "test_onnx_errors.py:" in text and "opset 23, got aten.solve has no counter" in text
    assert not list(tmp_path.iterdir())


def test_a_model_that_onnxruntime_has_no_operators_for(tmp_path) -> None:
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return (q @ k.mT / 4).softmax(-1) @ v

    inputs = tuple(torch.randn(1, 2, 8, 16, dtype=torch.bfloat16) for _ in range(3))
    path = tmp_path / "m.onnx"
    with pytest.raises(VerificationError, match="float32 or float16, or give verify=False"):
        attnopt.export_onnx(Attention(), inputs, path)
    assert not any(tmp_path.iterdir())
    attnopt.export_onnx(Attention(), inputs, path, verify=False)
    assert path.is_file()
