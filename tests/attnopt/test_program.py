"""attnopt.export: programs to save and load, with attnopt's operators and without."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnopt
from attnopt.errors import CaptureError, OptionError
from tests.attnopt.small_models import same

DIM = torch.export.Dim


class Model(nn.Module):
    """Two attentions, the first under a window that is a buffer."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.one, self.two = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.register_buffer("mask", torch.ones(256, 256).tril().triu(-9).bool())

    def attend(self, project, input, keep):
        q, k, v = project(input).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        if keep is not None:
            scores = scores.masked_fill(~keep, float("-inf"))
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)

    def forward(self, input, scale: float = 1.0):
        n = input.shape[1]
        input = input + self.attend(self.one, input, self.mask[:n, :n])
        return {"out": input + scale * self.attend(self.two, input, None)}


@pytest.fixture(autouse=True)
def _take_all(monkeypatch):
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    torch.manual_seed(0)


def operators(program):
    return [str(n.target) for n in program.graph.nodes
            if n.op == "call_function" and str(n.target).startswith("attnopt")]


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_computes_the_same(tmp_path, portable, dynamic):
    model = Model().eval()
    x = torch.randn(2, 150, 16)
    shapes = {"input": {0: DIM("b", min=1, max=8), 1: DIM("n", min=4, max=255)}} \
        if dynamic else None
    program = attnopt.export(model, (x,), dynamic_shapes=shapes, portable=portable)
    assert (operators(program) == []) == portable
    assert set(program.state_dict) == {n for n, _ in model.named_parameters()} | {"mask"}
    path = attnopt.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(path).module()
    with torch.no_grad():
        same(loaded(x), model(x))
        if dynamic:
            for b, n in ((1, 5), (3, 97), (2, 255)):
                y = torch.randn(b, n, 16)
                same(loaded(y), model(y))
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]


def test_of_an_optimised_module_and_of_a_program():
    model = Model().eval()
    x = torch.randn(2, 64, 16)
    optimised = attnopt.optimize(model, (x,))
    assert operators(attnopt.export(optimised, (x,)))
    program = torch.export.export(model, (x,))
    again = attnopt.export(program, (x,))
    assert operators(again)
    same(again.module()(x), model(x))


def test_a_tiled_window_holds_nothing_of_all_scores():
    model = Model().eval()
    model.mask = torch.ones(600, 600).tril().triu(-9).bool()
    x = torch.randn(1, 600, 16)
    program = attnopt.export(model, (x,), portable=True)
    first = [n.meta["val"] for n in program.graph.nodes
             if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)
             and n.meta["val"].numel() >= 600 * 600]
    assert not first
    same(program.module()(x), model(x))


def test_errors(tmp_path):
    model, x = Model().eval(), torch.randn(1, 8, 16)
    with pytest.raises(OptionError, match="args must be a tuple"):
        attnopt.export(model, x)
    with pytest.raises(OptionError, match="portable must be True or False"):
        attnopt.export(model, (x,), portable=1)
    with pytest.raises(OptionError, match="model must be"):
        attnopt.export(torch.sin, (x,))
    with pytest.raises(CaptureError):
        attnopt.export(model, (x, x, x, x))
    program = attnopt.export(model, (x,))
    with pytest.raises(OptionError, match="path must lie in a folder that exists"):
        attnopt.save(program, tmp_path / "no" / "model.pt2")
    assert not list(tmp_path.iterdir())
