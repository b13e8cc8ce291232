"""Deformable attention on a real device: sizes of detectors, every form, gradients, graphs."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from attnopt.kernels.deformable import Sampling, deformable_attention, triton_gather
from attnopt.kernels.deformable.triton_blocks import Block
from tests.kernels.deformable.cases import by_grid_sample, inputs
from tests.kernels.triton.deformable import ODD, SHAPES, check, leaves

pytestmark = pytest.mark.gpu
LEVELS = (40, 50, 20, 25, 10, 13)
WAYS = [way for i, way in enumerate(itertools.product(
    (1, 2, 3), (0, 3), ("linear", "nearest"), ("zeros", "border", "reflection"), (False, True),
    ("unit", "signed", "texels"))) if i % 7 == 0]


def there(given: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.cuda() for t in given)


@pytest.mark.parametrize("axes, depths, mode, padding, align, span", WAYS)
def test_every_way(axes: int, depths: int, mode: str, padding: str, align: bool, span: str
                   ) -> None:
    sampling = Sampling((2, 3), axes, mode, padding, align, span)
    given = inputs(sampling, SHAPES[axes], depths=depths, queries=50, dtype=torch.float32,
                   spread=2.0)
    check(sampling, there(given), SHAPES[axes], tolerance=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("depths", (0, 16))
@pytest.mark.parametrize("channels", (32, 20, 64))
def test_detectors(channels: int, depths: int, dtype: torch.dtype) -> None:
    """Four points of each of three levels."""
    sampling = Sampling((4, 4, 4))
    value, at, weights, depth = inputs(
        sampling, LEVELS, channels=channels, depths=depths, queries=600, heads=8,
        dtype=torch.float32)
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    check(sampling, there((value.to(dtype), at, weights.to(dtype), depth)), LEVELS,
          tolerance=tolerance)


@pytest.mark.parametrize("block", (Block(1, 1, 1), Block(4, 8, 1), Block(64, 1, 4), Block(8, 8, 8)))
def test_blocks(block: Block) -> None:
    sampling = Sampling((4, 4, 4))
    given = inputs(sampling, LEVELS, channels=32, queries=301, heads=8, depths=4,
                   dtype=torch.float32)
    check(sampling, there(given), LEVELS, block, tolerance=2e-5)


@pytest.mark.parametrize("lost", ("zero", "nan"))
@pytest.mark.parametrize("depths", (0, 3))
def test_far_away_and_not_finite(depths: int, lost: str) -> None:
    for mode, padding in itertools.product(("linear", "nearest"), ("zeros", "border")):
        sampling = Sampling((2,), 2, mode, padding, not_finite=lost)
        value, at, weights, depth = inputs(sampling, (5, 6), depths=depths, queries=len(ODD),
                                           dtype=torch.float32)
        at[0, :, 0, 0, 0] = torch.tensor(ODD)
        at[1, :, 1, 1, -1] = torch.tensor(ODD)
        check(sampling, there((value, at, weights, depth)), (5, 6), tolerance=1e-5)


def test_as_grid_sample_has_it_there() -> None:
    sampling = Sampling((4, 4, 4))
    given = inputs(sampling, LEVELS, channels=32, queries=500, heads=8, dtype=torch.float32)
    ours, theirs = (leaves(there(given)) for _ in range(2))
    out = deformable_attention(*ours[:3], LEVELS, sampling)
    wanted = by_grid_sample(sampling, *theirs, LEVELS)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    grad = torch.randn_like(out)
    found, exact = (torch.autograd.grad(o, t[:3], grad) for o, t in ((out, ours), (wanted, theirs)))
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-4)


def test_deterministic_gradients_are_equal_every_time() -> None:
    sampling = Sampling((4, 4, 4))
    tensors = leaves(there(inputs(sampling, LEVELS, channels=32, queries=600, heads=8, depths=4,
                                  dtype=torch.float32)))
    value, at, weights, depth = tensors

    def run() -> tuple[Tensor, ...]:
        out = deformable_attention(value, at, weights, LEVELS, sampling, depth)
        return torch.autograd.grad(out.square().sum(), tensors)

    fast = run()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = run(), run()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.testing.assert_close(fast, first, rtol=1e-3, atol=1e-4)


def test_in_a_graph() -> None:
    sampling = Sampling((4, 4, 4))
    given = there(inputs(sampling, LEVELS, channels=32, queries=300, dtype=torch.float32))
    value, at, weights, _ = given
    assert value is not None and at is not None and weights is not None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        triton_gather.gather(sampling, value, at, weights, None, LEVELS)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = deformable_attention(value, at, weights, LEVELS, sampling)
    at.copy_(torch.rand_like(at))
    graph.replay()
    torch.testing.assert_close(out, deformable_attention(value, at, weights, LEVELS, sampling))
