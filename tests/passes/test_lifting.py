"""Deformable lifting: outer products of features and depths are sampled without being built."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import attnopt
from attnopt.kernels.deformable import gather
from tests.spellings import lifting_spellings as spell

SHAPES = [(4, 5), (3, 2)]


@pytest.fixture(autouse=True)
def by_aten(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernels are compiled, unless the test is `compiled`: what they compute is tested there."""
    if "compiled" not in request.fixturenames:
        monkeypatch.setattr(gather, "takes", lambda *_: False)


def calls(optimized: Any) -> list[fx.Node]:
    return [n for g in optimized.graph_modules for n in g.graph.nodes
            if n.target is torch.ops.attnopt.deformable_attention.default]


def shapes_of(call: fx.Node) -> list[tuple[int, ...]]:
    return [tuple(a.meta["val"].shape) for a in call.args[:4] if isinstance(a, fx.Node)]


def check(model: nn.Module, args: Sequence[Tensor], *, lifted: int, volumes: int = 0,
          atol: float = 1e-12, grad_atol: float = 1e-10) -> Any:
    """Optimise; `lifted` calls must have depths and `volumes` none; compare with gradients."""
    args = tuple(a.requires_grad_(a.is_floating_point()) for a in args)
    optimized = attnopt.optimize(model, args)
    deep = [len(shapes_of(c)) == 4 for c in calls(optimized)]
    assert (deep.count(True), deep.count(False)) == (lifted, volumes), optimized.report
    results = []
    for module in (model, optimized):
        copies = [a.detach().clone().requires_grad_(a.requires_grad) for a in args]
        out = module(*copies)
        torch.manual_seed(0)
        wanted = [a for a in copies if a.requires_grad]
        found = torch.autograd.grad(out, wanted, torch.randn(out.shape).to(out),
                                    allow_unused=True)
        results.append((out.detach(), found))
    (old, old_grads), (new, new_grads) = results
    torch.testing.assert_close(new, old, atol=atol, rtol=0, equal_nan=True)
    for mine, theirs in zip(new_grads, old_grads, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            torch.testing.assert_close(mine, theirs, atol=grad_atol, rtol=0, equal_nan=True)
    return optimized


# -- spellings -------------------------------------------------------------------------------------
def some(names: Iterable[Any], *quick: Any) -> list[Any]:
    """The others are slow."""
    return [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.mark.parametrize("own_depths", [False, True])
@pytest.mark.parametrize("name", some(spell.VOLUMES, "repeat", "cat"))
def test_volumes(name: str, own_depths: bool) -> None:
    """However the volume is spelled; depths that are shared by heads are not repeated."""
    optimized = check(spell.Lifting(SHAPES, spell.VOLUMES[name]),
                      spell.inputs(SHAPES, own_depths=own_depths), lifted=1)
    value, locations, weights, depth = shapes_of(calls(optimized)[0])
    assert value == (2, 26, 3, 4) and locations == (2, 7, 3, 4, 3) and weights == (2, 7, 3, 4)
    assert depth == (2, 26, 3 if own_depths else 1, 5)


@pytest.mark.slow
@pytest.mark.parametrize("sums", ["levels", "einsum"])
def test_sums(sums: str) -> None:
    check(spell.Lifting(SHAPES, spell.by_einsum, sums), spell.inputs(SHAPES), lifted=1)


@pytest.mark.slow
@pytest.mark.parametrize("sampling", [
    {"align_corners": True}, {"padding_mode": "border"}, {"mode": "nearest"},
    {"padding_mode": "reflection"},
    {"mode": "nearest", "padding_mode": "border", "align_corners": True},
])
def test_modes(sampling: dict[str, object]) -> None:
    check(spell.Lifting(SHAPES, **sampling), spell.inputs(SHAPES), lifted=1)


@pytest.mark.parametrize("name", some(spell.OTHER, "transposed", "constants"))
def test_other_products(name: str) -> None:
    shapes = [(4, 4), (3, 3)] if name == "transposed" else SHAPES
    check(spell.Lifting(shapes, spell.OTHER[name]), spell.inputs(shapes), lifted=1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [
    {"depths": 1}, {"channels": 1}, {"heads": 1}, {"batch": 1, "heads": 1}, {"points": 1},
    {"queries": 1}, {"depths": 1, "channels": 1, "heads": 1},
], ids=str)
def test_sizes(sizes: dict[str, int]) -> None:
    check(spell.Lifting(SHAPES), spell.inputs(SHAPES, **sizes), lifted=1)


@pytest.mark.slow
def test_thin_levels() -> None:
    shapes = [(1, 5), (3, 1), (1, 1)]
    check(spell.Lifting(shapes), spell.inputs(shapes), lifted=1)


@pytest.mark.slow
def test_one_level() -> None:
    check(spell.Lifting([(4, 5)], spell.by_repeat), spell.inputs([(4, 5)]), lifted=1)


def test_equal_lengths() -> None:
    """Axes are told apart where all are as long."""
    shapes = [(3, 3)]
    args = spell.inputs(shapes, batch=3, queries=3, heads=3, channels=3, points=3, depths=3,
                        own_depths=True)
    check(spell.Lifting(shapes, spell.by_einsum), args, lifted=1)


def test_depth_last() -> None:
    """The depth is another axis of the grid: its coordinate goes to the end."""
    torch.manual_seed(0)
    args = (torch.randn(2, 3, 4, 5), torch.rand(2, 6, 4, 5), torch.rand(2, 7, 3, 2, 3) * 3 - 1.5,
            torch.rand(2, 7, 3, 2))
    check(spell.DepthLast(), [a.double() for a in args], lifted=1)


@pytest.mark.slow
def test_compiled(compiled: None) -> None:
    check(spell.Lifting(SHAPES), spell.inputs(SHAPES, dtype=torch.float32), lifted=1, atol=1e-5,
          grad_atol=1e-4)


def test_empty_batch() -> None:
    model = spell.Lifting(SHAPES)
    args = spell.inputs(SHAPES, batch=0)
    optimized = attnopt.optimize(model, args)
    assert optimized(*args).shape == (0, 7, 12)


# -- bird's-eye views ------------------------------------------------------------------------------
def pillars(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, dtype=torch.float64, generator=generator)

    seen = draw(2, 3, 6, 4) > 0
    seen[:, :, 0] = False
    return [draw(2, 3, 8, 4, 5), draw(2, 3, 5, 4, 5).softmax(2), draw(2, 3, 6, 4, 3), seen,
            draw(2, 6, 2, 3, 4, 3) * 0.1, draw(2, 6, 2, 3, 4)]


def test_pillars() -> None:
    """Cameras in the batch, anchors along a pillar among the points, queries out of view."""
    check(spell.Pillars(2), pillars(), lifted=1)


@pytest.mark.slow
def test_behind_the_camera() -> None:
    """Projections behind a camera are far outside of every number that an index can be."""
    args = pillars()
    args[2][0, 0, 1] = 1e30
    args[2][0, 1, 2] = -1e12
    args[2][1, 2, 3] = torch.inf
    args[2][1, 0, 4, 1] = torch.nan
    optimized = attnopt.optimize(spell.Pillars(2), tuple(args))
    torch.testing.assert_close(optimized(*args), spell.Pillars(2)(*args), atol=1e-12, rtol=0,
                               equal_nan=True)


def test_unweighted() -> None:
    torch.manual_seed(0)
    args = (torch.randn(3, 4, 4, 5), torch.rand(3, 6, 4, 5).softmax(1),
            torch.rand(3, 2, 5, 6, 3) * 3 - 1.5)
    check(spell.Unweighted(), [a.double() for a in args], lifted=1)


# -- near misses -----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", some(spell.NEAR_MISSES, "clipped", "emptied"))
def test_near_misses(name: str) -> None:
    """What is no outer product is sampled along three axes."""
    optimized = check(spell.Lifting(SHAPES, spell.NEAR_MISSES[name]), spell.inputs(SHAPES),
                      lifted=0, volumes=1)
    assert any("lifting: " in text for row in optimized.report.sites for text in row.tried)


def test_used_elsewhere() -> None:
    optimized = check(spell.UsedElsewhere(SHAPES), spell.inputs(SHAPES), lifted=0, volumes=1)
    assert "used elsewhere" in optimized.report.sites[0].tried[0]


def test_no_gradient() -> None:
    """No gradient flows from a volume to its factors where none was recorded."""
    check(spell.WithoutGradient(SHAPES), spell.inputs(SHAPES), lifted=0, volumes=1)


def test_overwritten() -> None:
    """A factor that changes after the product is not read in place of the volume."""
    model, args = spell.FeaturesWritten(SHAPES), spell.inputs(SHAPES)
    optimized = attnopt.optimize(model, args)
    assert [len(shapes_of(c)) for c in calls(optimized)] == [3]
    torch.testing.assert_close(optimized(*args), model(*args), atol=1e-12, rtol=0)
