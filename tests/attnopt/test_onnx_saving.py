"""ONNX files with data beside them: named for the file, whole or not at all, taken from others."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

import attnopt
from attnopt.errors import AttnOptError, OptionError
from tests.attnopt.test_onnx import Blocks
from tests.attnopt.test_onnx_optimize import by_hand

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
saving = pytest.importorskip("attnopt.onnx.saving")
optimize = pytest.importorskip("attnopt.onnx").optimize


@pytest.fixture(autouse=True)
def _small_threshold(monkeypatch):
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    monkeypatch.setattr(saving, "LARGE", 2)
    torch.manual_seed(0)


def places(path):
    return {e.value for t in onnx.load(path, load_external_data=False).graph.initializer
            for e in t.external_data if e.key == "location"}


def test_data_lies_beside_an_exported_file(tmp_path):
    model, x, path = Blocks("window").eval(), torch.randn(1, 320, 16), tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").write_bytes(b"of an earlier model")
    report = attnopt.export_onnx(model, (x,), path)
    assert set(os.listdir(tmp_path)) == {"model.onnx", "model.onnx.data"}
    assert places(path) == {"model.onnx.data"} and report.path == str(path)
    assert report.size == path.stat().st_size + (tmp_path / "model.onnx.data").stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.abs(found - model(x).detach().numpy()).max() < 1e-4


def test_both_files_stay_as_they_were_where_a_move_fails(tmp_path, monkeypatch):
    path, data = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    replace = os.replace

    def refuses(source, target):
        if target == path:
            raise PermissionError(13, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuses)
    for earlier in (False, True):
        if earlier:
            path.write_bytes(b"model")
            data.write_bytes(b"weights")
        with pytest.raises(OptionError, match="path must be writable"), \
                saving.whole_model(path) as part:
            part.write_bytes(b"new")
            saving.data_of(part).write_bytes(b"new weights")
        assert set(os.listdir(tmp_path)) == ({"m.onnx", "m.onnx.data"} if earlier else set())
    assert (path.read_bytes(), data.read_bytes()) == (b"model", b"weights")


@pytest.mark.slow
def test_what_stops_a_large_export_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("attnopt.onnx.check.distance", lambda found, expected: 1.0)
    with pytest.raises(AttnOptError, match="must compute what the model computes"):
        attnopt.export_onnx(Blocks("eager").eval(), (torch.randn(1, 20, 16),), tmp_path / "m.onnx")
    assert not os.listdir(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("same", [False, True])
def test_data_of_another_folder_is_copied(tmp_path, same):
    folder = tmp_path / "source"
    folder.mkdir()
    model, source = by_hand(16, 1), folder / "in.onnx"
    model.graph.initializer.append(onnx.numpy_helper.from_array(
        np.linspace(-1, 1, 512, dtype=np.float32).reshape(1, 2, 16, 16), "bias"))
    model.graph.node[3].input[0] = "biased"
    model.graph.node.insert(3, onnx.helper.make_node("Add", ["t", "bias"], ["biased"]))
    onnx.save(model, source, save_as_external_data=True, size_threshold=0, location="in.onnx.data")
    x = {n: np.random.default_rng(0).standard_normal((1, 2, 16, 8)).astype(np.float32)
         for n in "qkv"}

    def run(path):
        return onnxruntime.InferenceSession(
            str(path), providers=["CPUExecutionProvider"]).run(None, x)[0]

    expected, target = run(source), source if same else tmp_path / "out.onnx"
    assert optimize(source, target).error < 1e-5
    if not same:
        for file in folder.iterdir():
            file.unlink()
    assert places(target) <= {f"{target.name}.data"}
    onnx.checker.check_model(str(target), full_check=True)
    assert np.abs(run(target) - expected).max() < 1e-5


def test_truncated_data_is_refused(tmp_path):
    onnx.save(by_hand(16, 1), tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0,
              location="weights")
    (tmp_path / "weights").write_bytes(b"\0")
    with pytest.raises(AttnOptError, match="external data must reach to byte"):
        optimize(tmp_path / "in.onnx", tmp_path / "out.onnx")
    assert set(os.listdir(tmp_path)) == {"in.onnx", "weights"}
