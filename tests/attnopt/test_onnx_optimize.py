"""attnopt.onnx.optimize: existing files, and those that it must refuse."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from attnopt.errors import AttnOptError, OptionError
from tests.attnopt.test_onnx import Blocks, kinds

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

TensorProto, helper, numpy_helper = onnx.TensorProto, onnx.helper, onnx.numpy_helper
optimize = pytest.importorskip("attnopt.onnx").optimize


@pytest.fixture(autouse=True)
def _take_all(monkeypatch):
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    torch.manual_seed(0)


def written(path, spelling, opset, dynamic=None):
    """A file that torch's own exporter writes."""
    torch.onnx.export(Blocks(spelling).eval(), (torch.randn(2, 320, 16),), path, dynamo=True,
                      opset_version=opset, verbose=False, dynamic_shapes=dynamic)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 23])
@pytest.mark.parametrize(("spelling", "form"), [
    ("eager", "attention"), ("bias", "attention"), ("window", "tiled"), ("sdpa", "attention"),
    ("sdpa window", "tiled")])
def test_five_spellings_of_a_file(tmp_path, spelling, form, opset):
    source = written(tmp_path / "in.onnx", spelling, opset)
    report = optimize(source, tmp_path / "out.onnx")
    fused = sum(n.op_type == "Attention" for n in onnx.load(source).graph.node)
    if form == "tiled" or not fused:
        assert sum(f.calls for f in report.forms if f.form == form) == 2, report
    assert report.error is not None and report.error < 1e-4
    if form == "tiled":
        assert kinds(tmp_path / "out.onnx")[1] < 320 * 320 // 4


def by_hand(length=None, batch="b", unused=False):
    """q @ k^T * s, softmax, @ v."""
    axes = [batch, 2, length or "n", 8]
    q, k, v, out = (helper.make_tensor_value_info(n, TensorProto.FLOAT, axes) for n in "qkvy")
    nodes = [helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]),
             helper.make_node("MatMul", ["q", "kt"], ["s"]),
             helper.make_node("Mul", ["s", "scale"], ["t"]),
             helper.make_node("Softmax", ["t"], ["w"], axis=-1),
             helper.make_node("MatMul", ["w", "v"], ["y"])]
    outs = [out]
    if unused:
        outs.append(helper.make_tensor_value_info(
            "w", TensorProto.FLOAT, [batch, 2, "n", "n"]))
    graph = helper.make_graph(nodes, "g", [q, k, v], outs,
                              [numpy_helper.from_array(np.float32(0.3), "scale")])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)


def test_a_model_with_dynamic_sizes(tmp_path):
    report = optimize(by_hand(), tmp_path / "out.onnx")
    assert [(f.form, f.calls) for f in report.forms] == [("attention", 1)], report
    assert len(report.errors) == 3 and report.error < 1e-5
    model = onnx.load(tmp_path / "out.onnx")
    assert [o.name for o in model.graph.output] == ["y"]
    assert model.graph.input[0].type.tensor_type.shape.dim[2].dim_param == "n"
    assert "Softmax" not in {n.op_type for n in model.graph.node}


def test_weights_that_are_an_output_stay(tmp_path):
    report = optimize(by_hand(unused=True), tmp_path / "out.onnx")
    assert not report.forms and "output" in report.kept[0] and report.error == 0


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x0a\x12\xff\xff\xff\xff\x0f"])
def test_what_is_no_onnx(tmp_path, content):
    source = tmp_path / "in.onnx"
    source.write_bytes(content)
    with pytest.raises(AttnOptError, match="no valid ONNX"):
        optimize(source, tmp_path / "out.onnx")
    assert os.listdir(tmp_path) == ["in.onnx"]


@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "link", "missing"])
def test_hostile_external_data(tmp_path, place):
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(b"\0" * 4)
    (folder / "link").symlink_to(tmp_path / "secret")
    model = by_hand()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    (folder / "in.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(AttnOptError, match="external data must"):
        optimize(folder / "in.onnx", folder / "out.onnx")
    assert not (folder / "out.onnx").exists()


def test_external_data_is_taken_in(tmp_path):
    onnx.save(by_hand(16, 1), tmp_path / "in.onnx", save_as_external_data=True, size_threshold=0,
              location="weights")
    assert optimize(tmp_path / "in.onnx", tmp_path / "out.onnx").forms
    assert {f.name for f in tmp_path.iterdir()} == {"in.onnx", "weights", "out.onnx"}


@pytest.mark.parametrize(("change", "words"), [
    ({"model": 3}, "model must be the path"), ({"lowering": "fast"}, "lowering must be one of"),
    ({"inputs": {"q": 1}}, "inputs must be arrays by the names"), ({"rule": 1}, "option must be"),
    ({"path": "no/such/m.onnx"}, "path must lie in a folder")])
def test_bad_arguments(tmp_path, change, words):
    given = {"model": by_hand(), "path": tmp_path / "out.onnx", **change}
    if isinstance(given["path"], str):
        given["path"] = tmp_path / given["path"]
    with pytest.raises(OptionError, match=words):
        optimize(given.pop("model"), given.pop("path"), **given)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("opset", [12, 27])
def test_opsets_that_are_refused(tmp_path, opset):
    model = by_hand()
    model.opset_import[0].version = opset
    with pytest.raises(AttnOptError, match="opset of the model must be 13 to 25"):
        optimize(model, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
