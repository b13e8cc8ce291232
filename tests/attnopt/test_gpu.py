"""On a CUDA device: an optimised encoder is as near to float64 as the original; `.to()` works."""

from __future__ import annotations

import copy

import pytest
import torch

import attnopt
from attnopt.bench.encoder import encoder

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
def test_encoder(dtype: torch.dtype, batch: int) -> None:
    model, (x, keep) = encoder(2, 128, 4, batch, 96)
    truth = copy.deepcopy(model).double()(x.double(), keep)
    model, x, keep = model.to("cuda", dtype), x.to("cuda", dtype), keep.cuda()
    optimized = attnopt.optimize(model, (x, keep))
    assert {site.status for site in optimized.report.sites} <= {"rewritten", "canonical"}
    assert len(optimized.report.sites) == 2

    before = (model(x, keep).cpu().double() - truth).abs().max()
    after = (optimized(x, keep).cpu().double() - truth).abs().max()
    assert after <= 2 * before + 8 * torch.finfo(dtype).eps * truth.abs().max()


def test_gradients() -> None:
    model, (x, keep) = encoder(2, 128, 4, 2, 96)
    model.cuda()
    x, keep = x.cuda(), keep.cuda()
    optimized = attnopt.optimize(model, (x, keep))
    expected = torch.autograd.grad(model(x, keep).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(optimized(x, keep).square().sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_moving_to_the_device_after_optimising() -> None:
    model, (x, keep) = encoder(2, 128, 4, 2, 96)
    optimized = attnopt.optimize(model, (x, keep))
    expected = optimized(x, keep)
    optimized.cuda()
    for _ in range(3):
        found = optimized(x.cuda(), keep.cuda())
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)
