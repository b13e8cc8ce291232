"""Calls that differ from the example in what no shape or dtype shows."""

import pytest
import torch

import attnopt


class Plain(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


class Fixed(torch.nn.Module):
    """torch.export takes this length as fixed, whatever the user said of it."""

    def forward(self, q, k, v):
        place = torch.linspace(0, 1, q.shape[-2])
        return torch.softmax(q @ k.transpose(-1, -2) + place[:, None] - place[None], -1) @ v


def drawn(length: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, 2, length, 8) for _ in range(3))


@pytest.mark.parametrize("made_in", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("called_in", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_optimized_and_called_under_any_mode(made_in, called_in) -> None:
    model = Plain().eval()
    with made_in():
        optimized = attnopt.optimize(model, drawn(16))
    assert [s.status for s in optimized.report.sites] == ["rewritten"]
    with called_in():
        given = drawn(16)
        torch.testing.assert_close(optimized(*given), model(*given))
    assert "1 by a variant" in str(optimized.report)


def test_a_length_that_the_capture_came_to_fix_is_checked() -> None:
    model = Fixed().eval()
    moving = {name: {2: torch.export.Dim.AUTO} for name in "qkv"}
    optimized = attnopt.optimize(model, drawn(40), dynamic_shapes=moving)
    for length in (40, 72, 40, 17):
        given = drawn(length)
        torch.testing.assert_close(optimized(*given), model(*given))


def test_without_a_compiler_aten_computes_and_the_report_says_so(
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    model, given = Plain().eval(), drawn(64)
    optimized = attnopt.optimize(model, given)
    (site,) = optimized.report.sites
    assert site.status == "rewritten" and site.lowering.startswith("aten")
    assert "CXX must name a C++ compiler" in " ".join(str(optimized.report).split())
    torch.testing.assert_close(optimized(*given), model(*given))
