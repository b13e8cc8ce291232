"""Models of transformers with deformable attention: every sampling site is rewritten, and the
outputs are those of the model."""

from __future__ import annotations

import copy

import pytest
import torch

import attnopt
from tests.spellings.checking import describe

deformable = pytest.importorskip("tests.models.deformable")


@pytest.fixture(autouse=True)
def _take_all(monkeypatch) -> None:
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)


@pytest.mark.slow
@pytest.mark.parametrize("build", deformable.MODELS, ids=lambda b: b.__name__)
def test_every_site_is_rewritten(build) -> None:
    torch.manual_seed(0)
    model, inputs = build()
    model.eval()
    with torch.no_grad():
        expected = model(**inputs)
        opt = attnopt.optimize(copy.deepcopy(model), (), inputs)
        found = opt(**inputs)
    sites = [s for s in opt.report.sites if s.kind == "sampling"]
    assert [s.status for s in sites] == ["rewritten"] * deformable.MODELS[build], (
        describe(opt), [s.reason for s in sites])
    for name, tensor in expected.items():
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
            scale = max(1.0, float(tensor[tensor.isfinite()].abs().max()))
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-5 * scale,
                                       equal_nan=True)


@pytest.mark.slow
def test_gradients() -> None:
    """Of every parameter of Deformable DETR."""
    torch.manual_seed(0)
    model, inputs = deformable.deformable_detr()
    model.eval()
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.bias"):  # away from texels, where slopes have two values
            parameter.data += torch.rand_like(parameter) * 0.3 + 0.1
    opt = attnopt.optimize(copy.deepcopy(model), (), inputs)
    sites = [s for s in opt.report.sites if s.kind == "sampling"]
    assert [s.status for s in sites] == ["rewritten"] * 4, [s.reason for s in sites]
    grads = []
    for module in (model, opt):
        out = module(**inputs)
        (out.logits.square().mean() + out.pred_boxes.square().mean()).backward()
        grads.append({n: p.grad for n, p in module.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1])
    for name, grad in grads[0].items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=2e-3 * scale + 1e-7)


@pytest.mark.slow
def test_training_mode() -> None:
    """Its encoder asks whether numbers are finite then, and is captured piece by piece."""
    torch.manual_seed(0)
    model, inputs = deformable.deformable_detr()
    model.train()
    for module in model.modules():
        for name in ("dropout", "activation_dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for name, parameter in model.named_parameters():
        if name.endswith("sampling_offsets.bias"):
            parameter.data += torch.rand_like(parameter) * 0.3 + 0.1
    twin = copy.deepcopy(model)
    opt = attnopt.optimize(twin, (), inputs)
    grads = []
    for module in (model, opt):
        out = module(**inputs)
        out.logits.square().mean().backward()
        grads.append({n: p.grad for n, p in (model if module is model else twin).named_parameters()
                      if p.grad is not None})
    sites = [s for s in opt.report.sites if s.kind == "sampling"]
    assert sites and {s.status for s in sites} == {"rewritten"}, opt.report
    assert set(grads[0]) == set(grads[1])
    for name, grad in grads[0].items():
        scale = float(grad.abs().max())
        torch.testing.assert_close(grads[1][name], grad, rtol=0, atol=2e-3 * scale + 1e-7)
