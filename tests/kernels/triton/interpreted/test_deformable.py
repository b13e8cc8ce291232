"""Triton kernels of deformable attention in the interpreter: forward and gradients."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from attnopt.kernels.deformable import Sampling, deformable_attention, triton_gather
from attnopt.kernels.deformable.triton_blocks import Block
from attnopt.kernels.deformable.triton_walk import Form
from tests.kernels.deformable.cases import inputs
from tests.kernels.triton.deformable import ODD, SHAPES, check, gradients, leaves

#: several programs, with rows beyond the end; and one program for everything
SMALL, ONE = Block(4, 2, 1), Block(16, 4, 1)
WAYS = list(itertools.product((1, 2, 3), ("linear", "nearest"), ("zeros", "border", "reflection"),
                              (False, True), ("unit", "signed", "texels")))
LIFTED = [(axes, heads, mode, padding) for axes in (1, 2, 3) for heads in (1, 3)
          for mode in ("linear", "nearest") for padding in ("zeros", "border", "reflection")]


def some(cases: list[tuple[object, ...]], quick: set[int]) -> list[object]:
    """The cases, those not in `quick` marked as slow."""
    return [case if i in quick else pytest.param(*case, marks=pytest.mark.slow)
            for i, case in enumerate(cases)]


@pytest.mark.parametrize("axes, mode, padding, align, span", some(WAYS, {15, 31, 51, 86}))
def test_every_way(axes: int, mode: str, padding: str, align: bool, span: str) -> None:
    sampling = Sampling((2, 1), axes, mode, padding, align, span)
    given = inputs(sampling, SHAPES[axes], batch=1, dtype=torch.float32, spread=2.0)
    check(sampling, given, SHAPES[axes], ONE)


@pytest.mark.parametrize("axes, heads, mode, padding", some(LIFTED, {2, 12, 22}))
def test_depth(axes: int, heads: int, mode: str, padding: str) -> None:
    sampling = Sampling((2, 1), axes, mode, padding)
    given = inputs(sampling, SHAPES[axes], depths=3, depth_heads=heads, batch=1, queries=3,
                   dtype=torch.float32, spread=1.6)
    check(sampling, given, SHAPES[axes], ONE)


@pytest.mark.parametrize("depths, mode, padding, lost", some(
    list(itertools.product((0, 3), ("linear", "nearest"), ("zeros", "border"),
                           ("zero", "nan"))), {0, 9}))
def test_far_away_and_not_finite(depths: int, mode: str, padding: str, lost: str) -> None:
    sampling = Sampling((2,), 2, mode, padding, not_finite=lost)
    value, at, weights, depth = inputs(sampling, (5, 6), depths=depths, batch=2,
                                       queries=len(ODD), heads=1, dtype=torch.float32)
    at[0, :, 0, 0, 0] = torch.tensor(ODD)
    at[1, :, 0, 1, -1] = torch.tensor(ODD)
    check(sampling, (value, at, weights, depth), (5, 6), ONE)
    weights[0, :, 0, 1] = torch.tensor(ODD).where(torch.tensor(ODD).abs() < 10, torch.nan)
    check(sampling, (value, at, weights, depth), (5, 6), ONE, backward=False)


def test_nan_in_a_texel_stays_with_its_neighbours() -> None:
    sampling = Sampling((2, 2))
    value, at, weights, depth = inputs(sampling, SHAPES[2], queries=12, depths=4, heads=2,
                                       batch=1, spread=2.0, dtype=torch.float32)
    assert depth is not None
    value[0, 0], value[0, -1] = torch.nan, torch.inf
    depth[0, 7] = torch.nan
    check(sampling, (value, at, weights, depth), SHAPES[2], ONE, backward=False)


@pytest.mark.parametrize("points, shapes", some([
    ((0, 2), (4, 4, 2, 3)), ((1, 7, 2), (4, 4, 2, 2, 1, 1)), ((3, 3), (1, 6, 6, 1)),
    ((2, 2), (0, 3, 4, 4)), ((2, 2), (4, 4, 3, 0))], {3}))
def test_levels_of_any_size_and_number_of_points(
        points: tuple[int, ...], shapes: tuple[int, ...]) -> None:
    for padding in ("zeros", "border"):
        sampling = Sampling(points, padding=padding)
        check(sampling, inputs(sampling, shapes, batch=1, dtype=torch.float32), shapes, ONE)


@pytest.mark.parametrize("channels, block", some([
    (1, Block(4, 2, 1)), (37, Block(1, 4, 1)), (8, Block(8, 1, 4)), (32, Block(2, 1, 1)),
    (5, SMALL), (300, None)], {1}))
def test_channels_and_blocks(channels: int, block: Block | None) -> None:
    sampling = Sampling((2, 1))
    given = inputs(sampling, SHAPES[2], channels=channels, queries=3, batch=1,
                   dtype=torch.float32)
    check(sampling, given, SHAPES[2], block)


@pytest.mark.parametrize("dtype", [
    torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_lower_precision(dtype: torch.dtype) -> None:
    """Half values with float32 locations, as mixed-precision models have them; then all half."""
    sampling = Sampling((2, 1))
    value, at, weights, depth = inputs(sampling, SHAPES[2], depths=3, channels=8, queries=3,
                                       batch=1, dtype=torch.float32)
    assert depth is not None
    eps = torch.finfo(dtype).eps
    check(sampling, (value.to(dtype), at, weights, depth), SHAPES[2], ONE)
    check(sampling, (value.to(dtype), at.to(dtype), weights.to(dtype), depth.to(dtype)),
          SHAPES[2], ONE, tolerance=eps)


@pytest.mark.slow
def test_layouts() -> None:
    sampling, shapes = Sampling((2, 1)), SHAPES[2]
    value, at, weights, depth = inputs(sampling, shapes, channels=6, depths=3, depth_heads=3,
                                       queries=3, dtype=torch.float32)
    assert depth is not None
    turned = value.permute(2, 1, 0, 3).contiguous().permute(2, 1, 0, 3)
    check(sampling, (turned, at.transpose(0, 1).contiguous().transpose(0, 1), weights, depth),
          shapes, SMALL, backward=False)
    check(sampling, (value.transpose(1, 3).contiguous().transpose(1, 3), at, weights,
                     depth[:, :, :1].expand(-1, -1, 3, -1)), shapes, SMALL)
    check(sampling, (value[:1].expand(2, -1, -1, -1), at[:, :1].expand(-1, 3, -1, -1, -1),
                     weights, depth.transpose(2, 3).contiguous().transpose(2, 3)), shapes, SMALL,
          backward=False)


@pytest.mark.slow
def test_only_what_is_asked_for() -> None:
    sampling = Sampling((2, 1))
    given = inputs(sampling, SHAPES[2], depths=3, queries=2, batch=1, dtype=torch.float32)
    grad = torch.randn(1, 2, 3, 5)
    every = gradients(sampling, given, triton_gather.NAMES, grad, SHAPES[2])
    for names in (("value",), ("locations",), ("weights", "depth")):
        found = gradients(sampling, given, names, grad, SHAPES[2])
        assert tuple(found) == names
        for name in names:
            torch.testing.assert_close(found[name], every[name])


def test_offsets_of_64_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    of, seen = Form.of, []

    def wide(*args: object) -> Form:
        seen.append(dataclasses.replace(of(*args), wide=True))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(triton_gather.Form, "of", wide)
    sampling = Sampling((2, 1))
    check(sampling, inputs(sampling, SHAPES[2], depths=3, queries=2, batch=1,
                           dtype=torch.float32), SHAPES[2], SMALL)
    assert len(seen) == 2


def test_the_op_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling, shapes = Sampling((2, 1)), SHAPES[2]
    given = leaves(inputs(sampling, shapes, depths=3, queries=2, batch=1, heads=1,
                          dtype=torch.float32))
    value, at, weights, depth = given
    assert value is not None and at is not None and weights is not None and depth is not None
    calls = []
    run = triton_gather._Call.run

    def counted(self: object, wanted: tuple[str, ...], *args: object) -> bool:
        calls.append(wanted)
        return run(self, wanted, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(triton_gather._Call, "run", counted)
    out = deformable_attention(value, at, weights, shapes, sampling, depth)
    found = torch.autograd.grad(out.square().sum(), (value, at, weights, depth))
    assert calls == [(), triton_gather.NAMES]
    torch.use_deterministic_algorithms(True)
    try:
        again = deformable_attention(value, at, weights, shapes, sampling, depth)
        same = torch.autograd.grad(again.square().sum(), (value, at, weights, depth))
        assert calls[2:] == [()], "sums by atomics have no order"
        part = deformable_attention(
            value.detach(), at, weights, shapes, sampling, depth.detach())
        own = torch.autograd.grad(part.square().sum(), (at, weights))
        assert calls[3:] == [(), ("locations", "weights")]
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:3], own, rtol=1e-4, atol=1e-5)


def test_what_they_do_not_take() -> None:
    sampling, shapes = Sampling((2, 1)), SHAPES[2]
    value, at, weights, depth = inputs(sampling, shapes, dtype=torch.float32)
    assert triton_gather.takes(sampling, value, at, weights, depth)
    assert not triton_gather.takes(sampling, value.double(), at, weights, depth)
    assert not triton_gather.takes(sampling, value, at.double(), weights, depth)
    assert not triton_gather.takes(sampling, value, at[:, :0], weights[:, :0], depth)
    assert not triton_gather.takes(
        sampling, value.expand(-1, -1, -1, 5).repeat(1, 1, 1, 205), at, weights, depth)
