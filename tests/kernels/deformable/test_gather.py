"""The generated C++ of deformable attention against the oracle."""

from __future__ import annotations

import pytest
import torch

from attnopt.kernels.cpp.isa import isas
from attnopt.kernels.cpp.toolchain import toolchain
from attnopt.kernels.deformable import Sampling, deformable_attention, gather, reference
from tests.kernels.deformable.cases import inputs

SHAPES = {1: (7, 4), 2: (5, 6, 3, 2), 3: (3, 4, 5, 2, 2, 3)}
pytestmark = pytest.mark.skipif(bool(toolchain().why_not()), reason="needs a C++ compiler")
#: (sampling, depths, heads of the depth, channels)
CASES = [
    (Sampling((2, 3)), 0, 1, 32), (Sampling((2, 3)), 4, 1, 5),
    (Sampling((2, 3), not_finite="nan"), 3, 3, 16),
    (Sampling((2, 3), padding="border", align_corners=True, range="signed"), 0, 1, 37),
    (Sampling((2, 70), mode="nearest"), 0, 1, 150),
    (Sampling((2, 3), 1, padding="border"), 4, 1, 33),
    (Sampling((2, 3), 3, range="signed", not_finite="nan"), 0, 1, 8),
    (Sampling((2, 3), 3, "nearest", "border", range="texels"), 0, 1, 4),
    (Sampling((2, 3), padding="reflection"), 3, 1, 20),
    (Sampling((2, 3), padding="reflection", align_corners=True, range="signed"), 0, 1, 40)]
SLOW = [pytest.param(*c, marks=pytest.mark.slow) if i > 1 else c for i, c in enumerate(CASES)]


def compare(sampling: Sampling, *given: torch.Tensor | None, shapes: tuple[int, ...],
            tolerance: float = 2e-6) -> None:
    out = gather.gather(sampling, *given, shapes)  # type: ignore[arg-type]
    assert out is not None
    wanted = reference(sampling, *given, shapes).to(out.dtype)  # type: ignore[arg-type]
    torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("sampling, depths, depth_heads, channels", SLOW)
def test_as_the_oracle(sampling: Sampling, depths: int, depth_heads: int, channels: int) -> None:
    shapes = SHAPES[sampling.axes]
    more = {"depths": depths, "depth_heads": depth_heads, "channels": channels,
            "dtype": torch.float32, "queries": 9}
    for spread in (1.0, 3.0):
        value, at, weights, depth = inputs(sampling, shapes, spread=spread, **more)
        compare(sampling, value, at, weights, depth, shapes=shapes)
    odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -3e9, 2.0 ** 31, 0.5, 0, 1])
    if sampling.padding == "reflection":  # where a huge number falls is a matter of rounding
        odd = odd.where(~(odd.abs() > 1e9) | odd.isinf(), 7.25)
    at[0, :, 0, 0, 0] = odd
    at[1, :, 1, 1, -1] = odd
    weights[0, :, 2, 0] = odd.where(odd.abs() < 10, torch.nan)
    compare(sampling, value, at, weights, depth, shapes=shapes)
    value[0, 1] = torch.nan
    value[1, -1] = torch.nan
    if depth is not None:
        depth[0, 3, :, -1] = torch.nan
    compare(sampling, value, at, weights, depth, shapes=shapes)


def test_any_layout_dtype_and_size() -> None:
    sampling, shapes = Sampling((2, 3)), SHAPES[2]
    value, at, weights, _ = inputs(sampling, shapes, channels=32, dtype=torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        eps = torch.finfo(dtype).eps
        compare(sampling, value.to(dtype), at, weights.to(dtype), None, shapes=shapes,
                tolerance=eps)
    turned = value.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    compare(sampling, turned, at.transpose(0, 1).contiguous().transpose(0, 1), weights, None,
            shapes=shapes)
    compare(sampling, value[:1].expand(2, -1, -1, -1), at[:, :1].expand(-1, 5, -1, -1, -1),
            weights, None, shapes=shapes)
    for empty in ((0, 3, 4, 4), (4, 4, 3, 0), (4, 4, 1, 1)):
        compare(sampling, *inputs(sampling, empty, channels=32, dtype=torch.float32),
                shapes=empty)


def test_what_it_does_not_take() -> None:
    sampling, shapes = Sampling((2, 3)), SHAPES[2]
    value, at, weights, depth = inputs(sampling, shapes)
    value = value.float().transpose(2, 3).contiguous().transpose(2, 3)
    assert not gather.takes(value, at.long()) and not gather.takes(value[..., :0], at)
    out = deformable_attention(value, at.float(), weights.float(), shapes, sampling)
    torch.testing.assert_close(
        out.double(), reference(sampling, value, at.float(), weights.float(), None, shapes),
        atol=2e-6, rtol=2e-6)


def gradients_of(sampling: Sampling, given: list[torch.Tensor | None], shapes: tuple[int, ...],
                 grad: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """By the kernel and by the oracle, of all tensors."""
    held = [i for i, t in enumerate(given) if t is not None]
    made = gather.gradients(sampling, given, held, grad, shapes)
    assert made is not None
    leaves = [None if t is None else t.double().requires_grad_() for t in given]
    wanted = torch.autograd.grad(
        reference(sampling, *leaves, shapes),  # type: ignore[arg-type]
        [leaves[i] for i in held], grad.double(), allow_unused=True)  # type: ignore[misc]
    mine = [made[i] for i in held]
    return mine, [torch.zeros_like(m) if w is None else w.to(m.dtype)
                  for m, w in zip(mine, wanted, strict=True)]


@pytest.mark.parametrize("sampling, depths, depth_heads, channels", SLOW)
def test_gradients_as_the_oracle(
        sampling: Sampling, depths: int, depth_heads: int, channels: int) -> None:
    shapes = SHAPES[sampling.axes]
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        given = list(inputs(sampling, shapes, depths=depths, depth_heads=depth_heads, queries=9,
                            channels=channels, dtype=dtype, spread=2.0))
        grad = torch.randn(2, 3, 9, channels, dtype=dtype).transpose(1, 2)
        mine, wanted = gradients_of(sampling, given, shapes, grad)
        torch.testing.assert_close(mine, wanted, atol=tolerance, rtol=tolerance)


def test_gradients_in_any_dtype_and_layout() -> None:
    sampling, shapes = Sampling((2, 3)), SHAPES[2]
    value, at, weights, depth = inputs(sampling, shapes, channels=16, depths=1,
                                       dtype=torch.float32)
    grad = torch.randn(1, 1, 1, 16).expand(2, 5, 3, 16)
    turned = value.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    mine, wanted = gradients_of(sampling, [turned, at.transpose(0, 1).contiguous().transpose(0, 1),
                                           weights, depth], shapes, grad)
    torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
    for dtype in (torch.bfloat16, torch.float16):
        eps = 8 * torch.finfo(dtype).eps
        mine, wanted = gradients_of(sampling, [value.to(dtype), at, weights.to(dtype), depth],
                                    shapes, grad.to(dtype))
        assert [g.dtype for g in mine] == [dtype, torch.float32, dtype, torch.float32]
        torch.testing.assert_close(mine, wanted, atol=eps, rtol=eps)
    weights.zero_()
    mine, _ = gradients_of(sampling, [value, at, weights, depth], shapes, grad)
    assert not mine[0].any() and not mine[1].any() and mine[2].any()


@pytest.mark.parametrize("depths, depth_heads", [(0, 1), (3, 1), (3, 3)])
@pytest.mark.parametrize("most", [0, 1 << 20])
def test_threads_do_not_change_a_digit(depths: int, depth_heads: int, most: int,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do far, missing and infinite locations disturb other gradients."""
    monkeypatch.setattr(gather, "MOST_APART", most)
    sampling, shapes = Sampling((2, 3)), SHAPES[2]
    given = list(inputs(sampling, shapes, channels=16, depths=depths, depth_heads=depth_heads,
                        dtype=torch.float32, queries=40))
    assert given[1] is not None
    given[1][0, :4, 0, 0, 0] = torch.tensor([torch.nan, torch.inf, -1e30, 3e9])
    grad = torch.randn(2, 40, 3, 16)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            mine, wanted = gradients_of(sampling, given, shapes, grad)
            torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
            out = gather.gather(sampling, *given, shapes)  # type: ignore[arg-type]
            assert out is not None
            found.append([out, *mine])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_op_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, shapes = Sampling((2, 3)), SHAPES[2]
    value, at, weights, _ = inputs(sampling, shapes, channels=32, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (value, at, weights)]
    fused = deformable_attention(*leaves, shapes, sampling)
    own = torch.autograd.grad(fused.square().sum(), leaves)
    monkeypatch.setattr("attnopt.kernels.deformable.ops.gather", lambda *_: None)
    monkeypatch.setattr("attnopt.kernels.deformable.ops.gradients", lambda *_: None)
    composed = deformable_attention(*leaves, shapes, sampling)
    torch.testing.assert_close(fused, composed, atol=2e-6, rtol=2e-6)
    torch.testing.assert_close(own, torch.autograd.grad(composed.square().sum(), leaves),
                               atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("target", isas(), ids=str)
def test_every_instruction_set(target: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gather, "isa", lambda: target)
    sampling, shapes = Sampling((2, 3)), SHAPES[2]
    for channels in (32, 7):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            value, at, weights, depth = inputs(sampling, shapes, channels=channels, depths=3,
                                               dtype=torch.float32)
            compare(sampling, value.to(dtype), at, weights, depth, shapes=shapes)
            mine, wanted = gradients_of(sampling, [value, at, weights, depth], shapes,
                                        torch.ones(2, 5, 3, channels))
            torch.testing.assert_close(mine, wanted, atol=1e-4, rtol=1e-4)
