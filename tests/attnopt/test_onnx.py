"""export_onnx: forms, functions, checks in onnxruntime, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import attnopt
from attnopt.errors import AttnOptError, CaptureError, OptionError

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

DIM = torch.export.Dim


@pytest.fixture(autouse=True)
def _take_all(monkeypatch):
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    torch.manual_seed(0)


class Blocks(nn.Module):
    """Two blocks of attention in one of five spellings."""

    def __init__(self, spelling, length=320, width=16, heads=2, window=24):
        super().__init__()
        self.spelling, self.heads = spelling, heads
        self.project = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(heads, length, length)) if spelling == "bias" else None
        self.register_buffer(
            "mask", torch.ones(length, length).tril().triu(1 - window).bool(), persistent=False)

    def attend(self, q, k, v):
        n = q.shape[-2]
        if self.spelling.startswith("sdpa"):
            mask = self.mask[:n, :n] if self.spelling == "sdpa window" else None
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if self.bias is not None:
            scores = scores + self.bias[:, :n, :n]
        if self.spelling == "window":
            scores = scores.masked_fill(~self.mask[:n, :n], float("-inf"))
        return scores.softmax(-1) @ v

    def forward(self, x):
        for project in self.project:
            q, k, v = project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            x = x + self.attend(q, k, v).transpose(1, 2).flatten(-2)
        return x


def kinds(path):
    """Operators of a file with those of its functions, and the initializers' largest size."""
    model = onnx.load(path)
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    held = [t for t in model.graph.initializer] + [
        a.t for n in nodes if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    sizes = [int(torch.tensor(list(t.dims)).prod()) if t.dims else 1 for t in held]
    return {n.op_type for n in nodes}, max(sizes, default=0)


@pytest.mark.parametrize(("spelling", "form"), [
    ("eager", "attention"), ("bias", "attention"), ("window", "tiled"), ("sdpa", "attention"),
    ("sdpa window", "tiled")])
def test_five_spellings(tmp_path, spelling, form):
    path = tmp_path / "model.onnx"
    report = attnopt.export_onnx(Blocks(spelling).eval(), (torch.randn(1, 320, 16),), path)
    if spelling == "sdpa":  # one fused call already, which torch translates
        assert not report.forms
    else:
        assert [f.form for f in report.forms] == [form] and report.forms[0].calls == 2
    assert report.error is not None and report.error < 1e-4
    operators, largest = kinds(path)
    assert "Softmax" not in operators or form == "tiled"
    assert ("Attention" in operators) == (form == "attention")
    if form == "tiled":
        assert report.forms[0].name == "SlidingWindowAttention" and largest < 320 * 320 // 4
    assert {f.name for f in tmp_path.iterdir()} == {"model.onnx"}


@pytest.mark.parametrize("opset", [
    18, *(pytest.param(n, marks=pytest.mark.slow) for n in (19, 20, 21, 22, 24, 25))])
def test_opsets_and_dynamic_sizes(tmp_path, opset):
    shapes = {"x": {0: DIM("b", min=1, max=8), 1: DIM("n", min=2, max=319)}}
    path = tmp_path / "model.onnx"
    report = attnopt.export_onnx(Blocks("window").eval(), (torch.randn(2, 100, 16),), path,
                                 opset=opset, dynamic_shapes=shapes)
    assert [f.form for f in report.forms] == ["tiled"]
    assert sum(where.startswith("onnxruntime") for where in report.errors) == 3
    assert report.error < 1e-4
    model = onnx.load(path)
    node = next(n for n in model.graph.node if n.domain == "attnopt")
    assert {p.key for p in node.metadata_props} >= {"attnopt.form", "attnopt.spec"}
    assert model.functions[0].name == node.op_type


class Neighbours(nn.Module):
    """2-D neighbourhood attention (NATTEN): windows of side x side keys, kept inside the map."""

    def __init__(self, height=20, width=18, side=5, heads=2, dim=8):
        super().__init__()
        self.heads, self.project = heads, nn.Linear(heads * dim, 3 * heads * dim)
        rows, columns = (self.near(n, side) for n in (height, width))
        mask = rows[:, None, :, None] & columns[None, :, None, :]
        self.register_buffer("mask", mask.reshape(height * width, -1), persistent=False)

    @staticmethod
    def near(length, side):
        place = torch.arange(length)
        first = (place - side // 2).clamp(0, length - side)[:, None]
        return (place >= first) & (place < first + side)

    def forward(self, x):  # (batch, height, width, heads * dim)
        q, k, v = self.project(x).flatten(1, 2).unflatten(-1, (3, self.heads, -1)).permute(
            2, 0, 3, 1, 4)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        weights = scores.masked_fill(~self.mask, float("-inf")).softmax(-1)
        return (weights @ v).transpose(1, 2).reshape(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 23])
def test_a_neighbourhood_of_any_number_of_maps(tmp_path, opset):
    import onnxruntime

    model, path = Neighbours().eval(), tmp_path / "m.onnx"
    report = attnopt.export_onnx(model, (torch.randn(2, 20, 18, 16),), path, opset=opset,
                                 dynamic_shapes={"x": {0: DIM("b", min=1, max=16)}})
    assert [(f.name, f.form) for f in report.forms] == [("NeighborhoodAttention", "tiled")]
    assert kinds(path)[1] < 360 * 360 // 2
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 7):
        x = torch.randn(batch, 20, 18, 16)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-5, rtol=1e-5)


def test_a_structured_mask_is_never_written_out(tmp_path):
    path = tmp_path / "model.onnx"
    report = attnopt.export_onnx(Blocks("window").eval(), (torch.randn(1, 320, 16),), path,
                                 lowering="attention")
    operators, largest = kinds(path)
    assert [f.form for f in report.forms] == ["attention"] and "Range" in operators
    assert largest < 320 * 320 // 4


def test_without_functions(tmp_path):
    path = tmp_path / "model.onnx"
    report = attnopt.export_onnx(Blocks("window").eval(), (torch.randn(1, 320, 16),), path,
                                 keep_functions=False)
    assert not report.forms and report.error < 1e-4
    assert not onnx.load(path).functions


def test_what_half_precision_allows(tmp_path):
    model = Blocks("eager").eval().half()
    report = attnopt.export_onnx(model, (torch.randn(1, 40, 16).half(),), tmp_path / "m.onnx")
    assert report.error <= report.bound


@pytest.mark.parametrize(("change", "words"), [
    ({"opset": 17}, "opset must be 18 to 25"), ({"opset": True}, "opset must be"),
    ({"lowering": "fast"}, "lowering must be one of"), ({"verify": 1}, "verify must be"),
    ({"path": "no/such/folder/m.onnx"}, "path must lie in a folder"),
    ({"args": 3}, "args must be a tuple"), ({"rule": []}, "an option must be one of"),
])
def test_bad_arguments(tmp_path, change, words):
    given = {"args": (torch.randn(1, 20, 16),), "path": tmp_path / "m.onnx", **change}
    if isinstance(given["path"], str):
        given["path"] = tmp_path / given["path"]
    args, path = given.pop("args"), given.pop("path")
    with pytest.raises(OptionError, match=words):
        attnopt.export_onnx(Blocks("eager").eval(), args, path, **given)
    assert not list(tmp_path.iterdir())


def test_nothing_is_written_where_it_fails(tmp_path, monkeypatch):
    with pytest.raises(CaptureError):
        attnopt.export_onnx(Blocks("eager").eval(), (torch.randn(1, 20, 7),), tmp_path / "m.onnx")
    from attnopt.onnx import check

    monkeypatch.setattr(check, "distance", lambda found, expected: 1.0)
    with pytest.raises(AttnOptError, match="must compute what the model computes"):
        attnopt.export_onnx(Blocks("eager").eval(), (torch.randn(1, 20, 16),), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("lifted", [False, True])
def test_deformable_sampling_becomes_gathers(tmp_path, lifted):
    if lifted:
        from tests.spellings import lifting_spellings

        shapes = [(5, 7), (3, 4)]
        model, inputs = lifting_spellings.Lifting(shapes), lifting_spellings.inputs(shapes)
    else:
        from tests.spellings.sampling_spellings import TABLE

        model, inputs = TABLE[0].module(), TABLE[0].inputs()
    path = tmp_path / "model.onnx"
    report = attnopt.export_onnx(model.eval(), inputs, path, opset=18)
    assert [(f.name, f.form) for f in report.forms] == [("DeformableAttention", "gather")]
    assert report.error < 1e-5 and "GridSample" not in kinds(path)[0]


def _perturb(model):
    """Tables of positions and the like begin as zeros, which any bias would equal."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["Swin", "Mistral", "T5"])
def test_models_of_transformers(tmp_path, family):
    transformers = pytest.importorskip("transformers")
    settings, inputs, names = {
        "Swin": ({"image_size": 112, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4]},
                 {"pixel_values": torch.randn(1, 3, 112, 112)}, {"BiasedAttention"}),
        "Mistral": ({"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2,
                     "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
                     "sliding_window": 32, "use_cache": False},
                    {"input_ids": torch.randint(0, 100, (1, 400))}, {"SlidingWindowAttention"}),
        "T5": ({"vocab_size": 100, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2,
                "num_heads": 4, "use_cache": False},
               {"input_ids": torch.randint(0, 100, (1, 40)),
                "decoder_input_ids": torch.randint(0, 100, (1, 30))}, {"BiasedAttention"}),
    }[family]
    config = getattr(transformers, f"{family}Config")(**settings, attn_implementation="eager")
    model = getattr(transformers, f"{family}Model")(config).eval()
    _perturb(model)
    report = attnopt.export_onnx(model, (), tmp_path / "m.onnx", kwargs=inputs)
    assert report.error < report.bound
    assert names <= {f.name.partition("_")[0] for f in report.forms}, report


@pytest.mark.slow
def test_the_image_encoder_of_sam(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.SamVisionConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=64, patch_size=8,
        window_size=3, output_channels=16, global_attn_indexes=[1], mlp_dim=64, use_rel_pos=True,
        attn_implementation="eager")
    model = transformers.SamVisionModel(config).eval()
    _perturb(model)
    report = attnopt.export_onnx(model, (torch.randn(1, 3, 64, 64),), tmp_path / "m.onnx")
    assert report.error < report.bound and sum(f.calls for f in report.forms) == 2, report


@pytest.mark.slow
def test_a_lifting_of_images_to_a_map(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    from bev_lifting import Lifting

    model = Lifting(torch.rand(2, 12, 3, 3), torch.rand(2, 12, 3) > 0.3, 2, 2, 8).eval()
    given = (torch.randn(2, 8, 6, 7), torch.rand(2, 5, 6, 7).softmax(1))
    report = attnopt.export_onnx(model, given, tmp_path / "m.onnx")
    assert report.error < 1e-4, report
    assert [f.name for f in report.forms] == ["DeformableAttention"], report


@pytest.mark.slow
def test_deformable_detr(tmp_path):
    pytest.importorskip("transformers")
    from tests.models.deformable import deformable_detr

    model, given = deformable_detr()
    args, kwargs = ((), given) if isinstance(given, dict) else (tuple(given), {})
    report = attnopt.export_onnx(model.eval(), args, tmp_path / "m.onnx", kwargs=kwargs)
    assert report.error < 1e-4, report
    assert sum(f.calls for f in report.forms if f.name.startswith("DeformableAttention")) == 4
