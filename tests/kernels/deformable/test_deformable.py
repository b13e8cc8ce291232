"""Deformable attention against its oracle and against F.grid_sample, forward and backward."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.kernels.deformable import Sampling, deformable_attention, ops, reference
from tests.kernels.deformable.cases import by_grid_sample, inputs

SHAPES = {1: (7, 4), 2: (5, 6, 3, 2), 3: (3, 4, 5, 2, 2, 3)}
WAYS = list(itertools.product((1, 2, 3), ("linear", "nearest"), ("zeros", "border", "reflection"),
                              (False, True), ("unit", "signed", "texels")))
QUICK = [way for i, way in enumerate(WAYS) if i % 5 == 0]


@pytest.fixture(autouse=True)
def composed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The composition of ATen ops computes here; test_gather.py is about the kernels."""
    for name in ("gather", "gradients"):
        monkeypatch.setattr(ops, name, lambda *_: None)


def grads(out: Tensor, tensors: tuple[Tensor | None, ...]) -> list[Tensor]:
    given = [t for t in tensors if t is not None]
    found = torch.autograd.grad(out, given, torch.linspace(
        -1, 1, out.numel(), dtype=out.dtype).view_as(out), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(given, found, strict=True)]


def leaves(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    return tuple(None if t is None else t.clone().requires_grad_() for t in tensors)


def compare(sampling: Sampling, shapes: tuple[int, ...], given: tuple[Tensor | None, ...], *,
            oracle: bool = True, tolerance: float = 1e-12) -> Tensor:
    """Forward within 1e-12 and backward within 1e-10 of F.grid_sample and of the oracle."""
    mine = leaves(given)
    out = deformable_attention(*mine[:3], shapes, sampling, mine[3])
    own = grads(out, mine)
    for other in (by_grid_sample, *([reference] if oracle else [])):
        theirs = leaves(given)
        wanted = other(sampling, *theirs, shapes)
        torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(own, grads(wanted, theirs), atol=100 * tolerance,
                                   rtol=100 * tolerance)
    return out


@pytest.mark.parametrize("axes, mode, padding, align, span", QUICK)
def test_as_grid_sample_has_it(axes: int, mode: str, padding: str, align: bool, span: str) -> None:
    if align and span == "texels":
        align = False
    sampling = Sampling((2, 3), axes, mode, padding, align, span)
    compare(sampling, SHAPES[axes], inputs(sampling, SHAPES[axes]))


@pytest.mark.slow
@pytest.mark.parametrize("axes, mode, padding, align, span", WAYS)
def test_every_way(axes: int, mode: str, padding: str, align: bool, span: str) -> None:
    sampling = Sampling((3, 1), axes, mode, padding, align, span)
    compare(sampling, SHAPES[axes], inputs(sampling, SHAPES[axes], spread=3.0))


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("axes, depths, heads", [(1, 4, 1), (2, 6, 1), (2, 6, 3), (2, 1, 1)])
def test_lifting_is_the_volume_that_is_never_built(
        axes: int, depths: int, heads: int, mode: str, padding: str) -> None:
    sampling = Sampling((4, 2), axes, mode, padding)
    compare(sampling, SHAPES[axes],
            inputs(sampling, SHAPES[axes], depths=depths, depth_heads=heads))


@pytest.mark.parametrize("points, shapes", [
    ((4,), (3, 5)), ((1, 7, 2), (4, 4, 2, 2, 1, 1)), ((3, 3), (1, 6, 6, 1)), ((0, 2), (4, 4, 2, 3)),
])
def test_levels_of_any_size_and_number_of_points(
        points: tuple[int, ...], shapes: tuple[int, ...]) -> None:
    sampling = Sampling(points)
    compare(sampling, shapes, inputs(sampling, shapes))


def test_an_empty_level_gives_nothing() -> None:
    sampling = Sampling((2, 2, 2))
    for shapes in ((0, 3, 4, 4, 2, 2), (4, 4, 2, 2, 3, 0), (4, 4, 0, 0, 2, 2)):
        given = inputs(sampling, shapes)
        mine, theirs = leaves(given), leaves(given)
        out = deformable_attention(*mine[:3], shapes, sampling)
        wanted = reference(sampling, *theirs, shapes)
        torch.testing.assert_close(out, wanted)
        torch.testing.assert_close(grads(out, mine), grads(wanted, theirs))


def test_no_texels_at_no_places_give_zero() -> None:
    """Nothing is sampled, wherever: neither NaN nor a gradient comes of it."""
    sampling = Sampling((2, 1), padding="border")
    given = inputs(sampling, (2, 0, 0, 3))
    given[1].flatten()[::3] = torch.nan
    given[1].flatten()[1::3] = torch.inf
    mine = leaves(given)
    out = deformable_attention(*mine[:3], (2, 0, 0, 3), sampling)
    assert out.shape == (2, 5, 3, 5) and not out.any()
    assert not any(g.any() for g in grads(out, mine))


@pytest.mark.parametrize("shapes", [(2, 1, 1, 3), (1, 1, 1, 1)])
def test_reflection_about_a_single_texel_has_no_slope(shapes: tuple[int, ...]) -> None:
    sampling = Sampling((2, 3), padding="reflection", align_corners=True)
    compare(sampling, shapes, inputs(sampling, shapes, spread=3.0))


@pytest.mark.parametrize("change", [
    {"batch": 0}, {"queries": 0}, {"channels": 0}, {"heads": 0}, {"batch": 1, "queries": 1},
    {"heads": 1, "channels": 1}])
def test_empty_and_single_axes(change: dict[str, int]) -> None:
    sampling = Sampling((2, 2))
    given = leaves(inputs(sampling, SHAPES[2], **change))
    out = deformable_attention(*given[:3], SHAPES[2], sampling)
    wanted = reference(sampling, *given, SHAPES[2])
    assert out.shape == wanted.shape
    torch.testing.assert_close(out, wanted)
    out.sum().backward()
    assert all(t is None or t.grad is not None for t in given)


@pytest.mark.parametrize("padding", ["zeros", "border", "reflection"])
@pytest.mark.parametrize("align", [False, True])
def test_on_centres_edges_and_borders(align: bool, padding: str) -> None:
    """Also the gradients, which have a step there."""
    sampling = Sampling((1,), 2, "linear", padding, align, "signed")
    shapes = (3, 4)
    places = [(i - 0.5 * j) / n for n in (3, 4) for i in range(-1, n + 1) for j in (0, 1)]
    at = torch.tensor([2 * p - 1 for p in places] + [-1.0, 1.0, 1 + 1e-12], dtype=torch.float64)
    grid = torch.cartesian_prod(at, at)
    value = torch.randn(1, 12, 1, 3, dtype=torch.float64)
    compare(sampling, shapes, (value, grid.view(1, -1, 1, 1, 2),
                               torch.ones(1, len(grid), 1, 1, dtype=torch.float64), None))


@pytest.mark.parametrize("mode", ["linear", "nearest"])
@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("depths", [0, 3])
def test_far_away_and_not_finite(axes: int, mode: str, depths: int) -> None:
    for dtype in (torch.float32, torch.float64):
        for padding in ("zeros", "border"):
            for lost in ("zero", "nan"):
                sampling = Sampling((3,), axes, mode, padding, not_finite=lost)
                shapes = SHAPES[axes][:axes]
                value, at, weights, depth = inputs(sampling, shapes, depths=depths, queries=8,
                                                   dtype=dtype)
                odd = [torch.nan, torch.inf, -torch.inf, 1e30, -3e9, 2.0 ** 31, 1e300, 0.5]
                at[0, :, 0, 0, 0] = torch.tensor(odd, dtype=torch.float64).to(dtype)
                at[1, :, 1, 1, -1] = torch.tensor(odd, dtype=torch.float64).to(dtype)
                given = leaves((value, at, weights, depth))
                out = deformable_attention(*given[:3], shapes, sampling, given[3])
                wanted = reference(sampling, value, at, weights, depth, shapes).to(dtype)
                tolerance = 1e-5 if dtype == torch.float32 else 1e-12
                torch.testing.assert_close(out, wanted, atol=tolerance, rtol=tolerance,
                                           equal_nan=True)
                finite = lost == "zero" or padding == "border" or mode == "nearest"
                assert bool(torch.isfinite(out).all()) == finite
                if finite:
                    out.sum().backward()
                    assert all(t is None or t.grad is None or torch.isfinite(t.grad).all()
                               for t in given)


def test_as_grid_sample_where_locations_are_not_finite() -> None:
    sampling = Sampling((2,), not_finite="nan")
    value, at, weights, _ = inputs(sampling, (4, 5))
    at[0, 0, 0, 0] = torch.nan
    at[1, 2, 1, 0, 1] = torch.inf
    weights[0, 0, 0, 0] = 0
    out = deformable_attention(value, at, weights, (4, 5), sampling)
    wanted = by_grid_sample(sampling, value, at, weights, None, (4, 5))
    assert torch.isnan(wanted).any()
    torch.testing.assert_close(out, wanted, equal_nan=True)


@pytest.mark.parametrize("number", [torch.nan, torch.inf])
def test_nan_in_a_texel_stays_with_its_neighbours(number: float) -> None:
    sampling = Sampling((2, 2))
    shapes = (4, 5, 2, 3)
    value, at, weights, depth = inputs(sampling, shapes, queries=40, depths=4, spread=2.0)
    assert depth is not None
    for tensor in (value, depth):
        given = tuple(t.clone() for t in (value, at, weights, depth))
        held = given[0] if tensor is value else given[3]
        held[0, 0] = number
        held[1, -1] = number
        mine, theirs = leaves(given), leaves(given)
        out = deformable_attention(*mine[:3], shapes, sampling, mine[3])
        wanted = reference(sampling, *theirs, shapes)
        assert torch.isfinite(out).any() and not torch.isfinite(out).all()
        torch.testing.assert_close(torch.isfinite(out), torch.isfinite(wanted))
        good = torch.isfinite(out)
        torch.testing.assert_close(out[good], wanted[good])


def test_a_weight_of_nan_or_zero() -> None:
    sampling = Sampling((2, 1))
    shapes = (4, 5, 2, 3)
    value, at, weights, _ = inputs(sampling, shapes, spread=4.0)
    weights[0, 0, 0, 0] = torch.nan
    weights[1] = 0
    compare_nan = deformable_attention(value, at, weights, shapes, sampling)
    torch.testing.assert_close(
        compare_nan, reference(sampling, value, at, weights, None, shapes), equal_nan=True)
    assert not compare_nan[1].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_lower_precision(dtype: torch.dtype) -> None:
    """Half values with float32 locations, as mixed-precision models have them."""
    sampling = Sampling((4, 4))
    shapes = (9, 11, 5, 6)
    value, at, weights, _ = inputs(sampling, shapes, channels=32, dtype=torch.float32)
    value, weights = value.to(dtype), weights.to(dtype)
    out = deformable_attention(value, at, weights, shapes, sampling)
    assert out.dtype == dtype
    wanted = reference(sampling, value, at, weights, None, shapes)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), wanted, atol=8 * eps, rtol=8 * eps)
    mixed = deformable_attention(value, at, weights.float(), shapes, sampling)
    assert mixed.dtype == torch.float32


def test_tensors_of_any_layout() -> None:
    sampling = Sampling((2, 3))
    shapes = (5, 6, 3, 2)
    value, at, weights, _ = inputs(sampling, shapes, batch=2)
    wanted = reference(sampling, value, at, weights, None, shapes)
    apart = torch.randn(2, 3, 5, 36, dtype=torch.float64).permute(0, 3, 1, 2)
    apart.copy_(value)
    spaced = torch.zeros(*at.shape[:-1], 4, dtype=torch.float64)[..., ::2].copy_(at)
    turned = weights.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    torch.testing.assert_close(deformable_attention(apart, spaced, turned, shapes, sampling),
                               wanted)
    one = at[:1, :1].expand(2, 5, -1, -1, -1)
    same = value[:1].expand(2, -1, -1, -1)
    torch.testing.assert_close(
        deformable_attention(same, one, weights, shapes, sampling),
        reference(sampling, same, one, weights, None, shapes))
    grad = torch.randn(2, 5, 5, 3, dtype=torch.float64).transpose(2, 3)
    mine, theirs = leaves((value, at, weights)), leaves((value, at, weights))
    deformable_attention(*mine, shapes, sampling).backward(grad)
    reference(sampling, *theirs, None, shapes).backward(grad)
    torch.testing.assert_close([t.grad for t in mine], [t.grad for t in theirs])


def test_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    sampling = Sampling((2, 3))
    given = inputs(sampling, SHAPES[2], queries=23)
    whole = compare(sampling, SHAPES[2], given, oracle=False)
    monkeypatch.setattr(ops, "CORNERS", 300)
    monkeypatch.setattr(ops, "BACKWARD_CORNERS", 700)
    torch.testing.assert_close(compare(sampling, SHAPES[2], given, oracle=False), whole)


@pytest.mark.parametrize("axes, depths, padding", [(2, 0, "zeros"), (1, 3, "zeros"),
                                                   (2, 3, "border"), (3, 0, "zeros")])
def test_gradients_and_their_gradients(axes: int, depths: int, padding: str) -> None:
    sampling = Sampling((2, 1), axes, padding=padding)
    shapes = (3, 2) if axes == 1 else (3, 2, 2, 2) if axes == 2 else (2, 2, 2, 1, 2, 2)
    given = leaves(inputs(sampling, shapes, batch=1, queries=2, heads=2, channels=2,
                          depths=depths))
    tensors = [t for t in given if t is not None]

    def run(*tensors: Tensor) -> Tensor:
        depth = tensors[3] if depths else None
        return deformable_attention(*tensors[:3], shapes, sampling, depth)

    assert torch.autograd.gradcheck(run, tensors)
    assert torch.autograd.gradgradcheck(run, tensors)


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    sampling = Sampling((2, 2))
    value, at, weights, depth = inputs(sampling, SHAPES[2], depths=3)
    assert depth is not None
    depth.requires_grad_()
    deformable_attention(value, at, weights, SHAPES[2], sampling, depth).sum().backward()
    assert depth.grad is not None and value.grad is None
    nearest = Sampling((2, 2), mode="nearest")
    at = at[..., :2].clone().requires_grad_()
    deformable_attention(value.requires_grad_(), at, weights, SHAPES[2], nearest).sum().backward()
    assert at.grad is None or not at.grad.any()


def test_the_op_under_opcheck_export_compile_and_vmap() -> None:
    sampling = Sampling((2, 3))
    value, at, weights, depth = inputs(sampling, SHAPES[2], depths=3)
    assert depth is not None
    op = torch.ops.attnopt.deformable_attention.default
    given = (value.requires_grad_(), at.requires_grad_(), weights, depth, list(SHAPES[2]),
             str(sampling))
    torch.library.opcheck(op, given)
    torch.library.opcheck(op, (value, at[..., :2].detach(), weights, None, *given[4:]))
    value, at = value.detach(), at.detach()
    found = torch.func.vmap(lambda v: op(v, at, weights, depth, *given[4:]))(
        torch.stack((value, value * 2)))
    torch.testing.assert_close(found[1], op(*given).detach() * 2)

    class Model(torch.nn.Module):
        def forward(self, value: Tensor, at: Tensor, weights: Tensor) -> Tensor:
            return deformable_attention(value, at, weights, SHAPES[2], sampling)

    args = (value, at[..., :2].contiguous(), weights)
    dynamic = torch.export.Dim.AUTO
    program = torch.export.export(Model(), args, dynamic_shapes=({}, {1: dynamic}, {1: dynamic}))
    assert any(n.target is op for n in program.graph.nodes)
    longer = inputs(sampling, SHAPES[2], queries=9)
    torch.testing.assert_close(program.module()(*longer[:3]), Model()(*longer[:3]))


@pytest.mark.parametrize("change, message", [
    ({"points": ()}, "points must be"), ({"axes": 4}, "axes must be"),
    ({"mode": "cubic"}, "mode must be"), ({"padding": "circular"}, "padding must be"),
    ({"align_corners": 1}, "align_corners must be"), ({"range": "pixels"}, "range must be"),
    ({"not_finite": "one"}, "not_finite must be")])
def test_a_sampling_that_is_none(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sampling(**{"points": (1,), **change})


def test_text_of_a_sampling() -> None:
    sampling = Sampling((1, 2), 3, "nearest", "border", True, "texels", "nan")
    assert Sampling.parse(str(sampling)) == sampling
    for text in ("", "{}", '{"points":[1],"more":2}', "[1]"):
        with pytest.raises(ValueError, match="sampling must be"):
            Sampling.parse(text)


def test_what_does_not_go_together() -> None:
    sampling = Sampling((2, 3))
    value, at, weights, depth = inputs(sampling, SHAPES[2], depths=2)
    for args, message in (
            ((value[:, 1:], at, weights, depth), "value must have 36 texels"),
            ((value, at[..., :2], weights, depth), "locations must be of shape"),
            ((value, at, weights[..., 1:], depth), "weights must be of shape"),
            ((value, at, weights, depth.expand(-1, -1, 2, -1)), "depth must be of shape"),
            ((value[0], at, weights, depth), r"value must be \(B, S, H, C\)"),
            ((value.long(), at, weights, depth), "value must be floating")):
        with pytest.raises(ValueError, match=message):
            deformable_attention(*args[:3], SHAPES[2], sampling, args[3])
    with pytest.raises(ValueError, match="shapes must be 2 sizes for each of 2 levels"):
        deformable_attention(value, at, weights, (5, 6), sampling, depth)
