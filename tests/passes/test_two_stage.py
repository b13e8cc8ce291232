"""DFA3D's two compiled stages, captured as one deformable attention with depths.

The classes have the names and arguments of the project's; what they call is not there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import Function

import attnopt
from attnopt.kernels.deformable import Sampling, two_stage
from attnopt.kernels.deformable import levels as _levels  # registers the op

assert two_stage and _levels
GRIDS = torch.tensor([(4, 5, 6), (2, 3, 6)])
STARTS = torch.tensor([0, 20])
B, Q, H, C, L, P, D = 2, 7, 2, 4, 2, 3, 6


class MultiScaleDepthScoreSampleFunction(Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations,
                im2col_step):
        raise RuntimeError("Not compiled with GPU support")

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("Not compiled with GPU support")


class WeightedMultiScaleDeformableAttnFunction(Function):
    @staticmethod
    def forward(ctx, value, value_spatial_shapes, value_level_start_index, sampling_locations,
                attention_weights, depth_score, im2col_step):
        raise RuntimeError("Not compiled with GPU support")

    @staticmethod
    def backward(ctx, grad):
        raise RuntimeError("Not compiled with GPU support")


scores = MultiScaleDepthScoreSampleFunction.apply
attention = WeightedMultiScaleDeformableAttnFunction.apply


def drawn(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """value, depth, locations, weights; some of the locations outside."""
    generator = torch.Generator().manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, dtype=dtype)

    return (rand(B, 26, H, C) - 0.5, rand(B, 26, H, D).softmax(-1),
            rand(B, Q, H, L, P, 3) * 1.8 - 0.4, rand(B, Q, H, L, P))


def wanted(value: Tensor, depth: Tensor, at: Tensor, weights: Tensor) -> Tensor:
    return torch.ops.attnopt.deformable_attention_of_levels(
        value, at.flatten(3, 4), weights.flatten(3), depth, GRIDS[:, :2], STARTS,
        str(Sampling((P,) * L))).flatten(2)


# -- the ops ---------------------------------------------------------------------------------------
def stages(value: Tensor, depth: Tensor, at: Tensor, weights: Tensor) -> Tensor:
    text, at = str(Sampling((P,) * L)), at.flatten(3, 4)
    score = torch.ops.attnopt.depth_score(depth, at, GRIDS, STARTS, text)
    return torch.ops.attnopt.scored_attention(
        value, at[..., :2], weights.flatten(3), score, GRIDS[:, :2], STARTS, text).flatten(2)


def test_stages_are_one() -> None:
    tensors = [t.requires_grad_() for t in drawn(torch.float64)]
    results = []
    for run in (stages, wanted):
        out = run(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-10)


def test_order_of_corners() -> None:
    """Around the middle of four texels: low low, low high, high high, high low."""
    depth = torch.arange(4.0).view(1, 4, 1, 1)
    at = torch.full((1, 1, 1, 1, 3), 0.5)
    score = torch.ops.attnopt.depth_score(
        depth, at, torch.tensor([(2, 2, 1)]), torch.tensor([0]), str(Sampling((1,))))
    assert score.flatten().tolist() == [0.0, 1.0, 3.0, 2.0]


@pytest.mark.parametrize("place", [float("nan"), float("inf"), -1e30, 1e30, -0.125])
def test_far_outside(place: float) -> None:
    value, depth, at, weights = drawn()
    at[0, 0] = place
    out = stages(value, depth, at, weights)
    torch.testing.assert_close(out, wanted(value, depth, at, weights))
    assert (out[0, 0] == 0).all()


def test_gradients() -> None:
    tensors = [t[:1, :, :, :] for t in drawn(torch.float64)]
    tensors = [t.detach().requires_grad_() for t in tensors]
    assert torch.autograd.gradcheck(stages, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(stages, tensors, fast_mode=True)


# -- captured --------------------------------------------------------------------------------------
def cut(value, depth, at, weights):
    """The places of the second stage are a part of those of the first."""
    score = scores(depth, GRIDS, STARTS, at, 64)
    return attention(value, GRIDS[:, :2].contiguous(), STARTS, at[..., :2].contiguous(), weights,
                     score, 64)


def put_together(value, depth, at, weights):
    """Those of the first stage are put together."""
    plane, deep = at[..., :2] * 1.0, at[..., 2:] * 1.0
    score = scores(depth, GRIDS, STARTS, torch.cat((plane, deep), -1), 64)
    return attention(value, GRIDS[:, :2], STARTS, plane, weights, score.contiguous(), 64)


def literals(value, depth, at, weights):
    shapes = torch.tensor([(4, 5), (2, 3)])
    deep = torch.cat((shapes, shapes.new_full((2, 1), D)), -1)
    score = scores(depth, deep, STARTS, at, 64)
    return attention(value, torch.tensor([(4, 5), (2, 3)]), STARTS, at[..., :2], weights, score, 64)


class Model(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def ops(optimized: Any) -> list[str]:
    return [n.target._schema.name.partition("::")[2] for g in optimized.graph_modules
            for n in g.graph.nodes if "attnopt" in str(n.target)]


@pytest.mark.parametrize("function", [cut, put_together, literals])
def test_captured(function: Any) -> None:
    tensors = [t.requires_grad_() for t in drawn()]
    optimized = attnopt.optimize(Model(function), tuple(tensors))
    assert ops(optimized) == ["deformable_attention"], optimized.report
    results = []
    for run in (optimized, wanted):
        out = run(*tensors)
        results.append((out, *torch.autograd.grad(out, tensors, torch.ones_like(out))))
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-6, rtol=1e-5)


def other_places(value, depth, at, weights):
    score = scores(depth, GRIDS, STARTS, at, 64)
    return attention(value, GRIDS[:, :2], STARTS, at[..., :2] * 0.9, weights, score, 64)


def last_two(value, depth, at, weights):
    score = scores(depth, GRIDS, STARTS, at, 64)
    return attention(value, GRIDS[:, :2], STARTS, at[..., 1:], weights, score, 64)


def changed_scores(value, depth, at, weights):
    score = scores(depth, GRIDS, STARTS, at, 64)
    return attention(value, GRIDS[:, :2], STARTS, at[..., :2], weights, score.sqrt(), 64)


def moved_in_place(value, depth, at, weights):
    at = at * 1.0
    score = scores(depth, GRIDS, STARTS, at, 64)
    at.mul_(0.9)
    return attention(value, GRIDS[:, :2], STARTS, at[..., :2], weights, score, 64)


@pytest.mark.parametrize("function", [other_places, last_two, changed_scores, moved_in_place])
def test_stages_of_other_places(function: Any) -> None:
    """Two stages they stay, with their own numbers."""
    tensors = drawn()
    optimized = attnopt.optimize(Model(function), tensors)
    assert ops(optimized) == ["depth_score", "scored_attention"], optimized.report
    value, depth, at, weights = tensors
    text = str(Sampling((P,) * L))
    score = torch.ops.attnopt.depth_score(depth, at.flatten(3, 4), GRIDS, STARTS, text)
    plane = {other_places: at[..., :2] * 0.9, last_two: at[..., 1:], changed_scores: at[..., :2],
             moved_in_place: at[..., :2] * 0.9}[function]
    score = score.sqrt() if function is changed_scores else score
    out = torch.ops.attnopt.scored_attention(value, plane.flatten(3, 4), weights.flatten(3), score,
                                             GRIDS[:, :2], STARTS, text).flatten(2)
    torch.testing.assert_close(optimized(*tensors), out)
