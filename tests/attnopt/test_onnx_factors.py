"""Biases of low rank in files: their factors are numbers there, the bias is not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.approximations import LowRank
from attnopt.factor_numbers import write_factors
from attnopt.kernels.factors import Cross, cross
from attnopt.passes.analyze import low_rank_values

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

H, N, D, R = 3, 40, 8, 4


class Biased(nn.Module):
    """Attention with a bias (H, N, N) of a low rank, up to noise; `halves` holds it in two parts
    that the graph puts together."""

    def __init__(self, noise: float = 0.0, halves: bool = False) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(1)
        bias = torch.randn(H, N, R, generator=g) @ torch.randn(H, R, N, generator=g)
        bias = bias + noise * torch.randn(H, N, N, generator=g)
        parts = bias.chunk(2, 1) if halves else (bias,)
        for name, part in zip(("one", "two"), parts, strict=False):
            self.register_buffer(name, part.clone())
        self.halves = halves

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = torch.cat((self.one, self.two), 1) if self.halves else self.one
        return (q @ k.mT * D**-0.5 + bias).softmax(-1) @ v


@pytest.fixture(autouse=True)
def _take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    monkeypatch.setattr(low_rank_values, "largest", lambda *_: 8)


def drawn(batch: int = 2) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(batch)
    return tuple(torch.randn(batch, H, N, D, generator=g) for _ in range(3))


def largest(path) -> int:
    """Numbers in the largest constant of a file."""
    model = onnx.load(path)
    nodes = [*model.graph.node, *(n for f in model.functions for n in f.node)]
    held = [*model.graph.initializer,
            *(a.t for n in nodes for a in n.attribute if a.type == onnx.AttributeProto.TENSOR)]
    return max(int(torch.tensor(list(t.dims)).prod()) if t.dims else 1 for t in held)


@pytest.mark.parametrize(("opset", "halves"), [
    (18, False), pytest.param(23, True, marks=pytest.mark.slow)])
def test_factors_are_numbers(tmp_path, opset: int, halves: bool) -> None:
    path = tmp_path / "m.onnx"
    report = attnopt.export_onnx(Biased(halves=halves).eval(), drawn(), path, opset=opset)
    assert [f.calls for f in report.forms] == [1] and "inner" in report.forms[0].spec
    assert report.error is not None and report.error < 1e-5
    assert largest(path) == H * N * R


@pytest.mark.slow
def test_an_approximation_is_what_the_file_is_compared_with(tmp_path) -> None:
    model, path = Biased(noise=1e-3).eval(), tmp_path / "m.onnx"
    report = attnopt.export_onnx(model, drawn(), path, rules=[LowRank(error=0.02)])
    assert largest(path) == H * N * R and "inner" in report.forms[0].spec
    assert report.error is not None and report.error < 1e-5
    (line,) = report.approximations
    assert "of rank 4" in line


def test_a_portable_program_holds_numbers_too(tmp_path) -> None:
    model, x = Biased().eval(), drawn()
    program = attnopt.export(model, x, portable=True)
    assert not any("linalg" in str(n.target) for n in program.graph.nodes)
    path = attnopt.save(program, tmp_path / "m.pt2")
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(path).module()(*x), model(*x), atol=1e-5,
                                   rtol=1e-5)


def test_what_can_change_stays_computed() -> None:
    bias = Biased().one
    text = Cross(tuple(cross(m.double(), 8, 1e-6) for m in bias)).text("q")  # type: ignore

    class Made(nn.Module):
        def forward(self, held: Tensor, given: Tensor) -> tuple[Tensor, ...]:
            noise = torch.rand_like(held)
            return tuple(torch.ops.attnopt.factor([x], [], text)
                         for x in (held, held * 1, held + given, held + noise))

    graph = torch.export.export(Made(), (bias, bias.clone()), strict=False).module()
    graph = torch.fx.GraphModule(graph, graph.graph)
    wanted = torch.ops.attnopt.factor([bias], [], text)
    assert write_factors(graph, {"held": bias}) == 2
    left = [n for n in graph.graph.nodes if n.target is torch.ops.attnopt.factor.default]
    assert len(left) == 2
    found = graph(bias, torch.zeros_like(bias))
    assert torch.equal(found[0], wanted) and torch.equal(found[1], wanted)
    assert write_factors(graph, {"held": bias}) == 0
