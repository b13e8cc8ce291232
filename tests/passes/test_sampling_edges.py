"""Programs around sampling sites that nearly are what they seem."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt
from attnopt.passes.rules import cost
from tests.spellings.corner_spellings import masked

N, C, H, W, Q, P = 2, 4, 5, 6, 33, 3


@pytest.fixture(autouse=True)
def _take_all(monkeypatch):
    monkeypatch.setattr(cost, "TAKE_ALL", True)


class Model(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.function(*tensors)


def optimized(function: Callable[..., Tensor], inputs: tuple[Tensor, ...], **options):
    with torch.no_grad():
        opt = attnopt.optimize(Model(function), inputs, **options)
        found, own = opt(*inputs), function(*inputs)
    torch.testing.assert_close(found, own, atol=2e-6, rtol=1e-5)
    return [s for s in opt.report.sites if s.kind == "sampling"]


def drawn() -> tuple[Tensor, ...]:
    return torch.randn(N, C, H, W), torch.rand(N, Q, P, 2) * 2.4 - 1.2, torch.randn(N, Q, P)


# -- tensors that are overwritten ------------------------------------------------------------------
SIZES = torch.tensor([5.0, 6.0])


def offset_overwritten(value, base, weights, offsets):
    offsets = offsets * 1.0
    moved = offsets / SIZES
    offsets.zero_()
    samples = F.grid_sample(value, base[:, :, None] + moved, align_corners=False)
    return (samples * weights[:, None]).sum(-1) + offsets.sum()


def size_overwritten(value, base, weights, offsets):
    sizes = SIZES * torch.ones_like(offsets)
    moved = offsets / sizes
    sizes.fill_(7.0)
    samples = F.grid_sample(value, base[:, :, None] + moved, align_corners=False)
    return (samples * weights[:, None]).sum(-1) + sizes.sum()


@pytest.mark.parametrize("form", [offset_overwritten, size_overwritten])
def test_overwritten_before_the_sum(form: Callable[..., Tensor]) -> None:
    """A quotient is not moved behind a write to what it is of."""
    value, at, weights = drawn()
    (site,) = optimized(form, (value, at[:, :, 0], weights, torch.randn(N, Q, P, 2)))
    assert site.status == "rewritten", site.reason


# -- levels that differ ----------------------------------------------------------------------------
def coordinates_swapped(one, two, first, second, weights):
    samples = [masked(one, first[..., 0], first[..., 1]), masked(two, second[..., 1],
                                                                second[..., 0])]
    return (torch.cat(samples, -1) * weights[:, None]).sum(-1)


def coordinates_apart(one, two, first, second, weights):
    samples = [masked(one, first[..., 0] * 0.9, first[..., 1] * 0.9),
               masked(two, second[..., 0], second[..., 1])]
    return (torch.cat(samples, -1) * weights[:, None]).sum(-1)


@pytest.mark.parametrize("form", [coordinates_swapped, coordinates_apart])
def test_levels_with_other_coordinates(form: Callable[..., Tensor]) -> None:
    at = [torch.rand(N, Q, P, 2) * 8 - 1.5 for _ in range(2)]
    inputs = (torch.randn(N, C, H, W), torch.randn(N, C, H, W), *at, torch.randn(N, Q, 2 * P))
    for verify in (True, False):
        found = optimized(form, inputs, verify=verify)
        assert {s.status for s in found} == {"kept"}
        assert any("in several ways" in s.reason for s in found), found


# -- weights and sums ------------------------------------------------------------------------------
def sum_in_double(value, at, weights):
    return (F.grid_sample(value, at, align_corners=False) * weights[:, None]).sum(
        -1, dtype=torch.float64).float()


def one_weight(value, at, weights):
    return (F.grid_sample(value, at, align_corners=False) * weights[0, 0, 0]).sum(-1)


def point_by_point(value, at, weights):
    out = 0
    for p in range(P):
        sample = F.grid_sample(value, at[:, :, p:p + 1], align_corners=False)[..., 0]
        out = out + sample * weights[:, None, :, p]
    return out


def whole_weights(value, at, weights):
    return (F.grid_sample(value, at, align_corners=False) * (weights > 0)[:, None]).sum(-1)


def one_level_joined(value, at, weights):
    samples = torch.cat([F.grid_sample(value, at, align_corners=False)], -1)
    return (samples * weights[:, None]).sum(-1)


@pytest.mark.parametrize("form", [one_level_joined, sum_in_double, one_weight, point_by_point,
                                  whole_weights])
def test_found(form: Callable[..., Tensor]) -> None:
    assert [s.status for s in optimized(form, drawn())] == ["rewritten"]


def test_whole_numbers_of_double() -> None:
    """Large ones are what float64 holds."""
    def form(value: Tensor, at: Tensor, weights: Tensor) -> Tensor:
        return (F.grid_sample(value, at, align_corners=False) * weights[:, None]).sum(-1)

    value, at, weights = (t.double() for t in drawn())
    numbers = (weights * 10).long()
    with torch.no_grad():
        opt = attnopt.optimize(Model(form), (value, at, numbers))
        numbers = numbers + (1 << 30)
        torch.testing.assert_close(opt(value, at, numbers), form(value, at, numbers), rtol=1e-13,
                                   atol=0)


def test_any_number_of_points() -> None:
    def form(value: Tensor, at: Tensor, weights: Tensor) -> Tensor:
        return (F.grid_sample(value, at, align_corners=False) * weights[:, None]).sum(-1)

    points = torch.export.Dim("points", max=64)
    shapes = (None, {2: points}, {2: points})
    with torch.no_grad():
        opt = attnopt.optimize(Model(form), drawn(), dynamic_shapes={"tensors": shapes})
    (site,) = [s for s in opt.report.sites if s.kind == "sampling"]
    assert site.status == "kept" and "number of points that is not known" in site.reason, site


def warped(image, flow, mask):
    return F.grid_sample(image, flow, align_corners=False) * mask[:, None]


def narrow_map(value, at, weights):
    """Of one row, padded along it alone."""
    flat, x = F.pad(value[:1, :, :1], (1, 1)).flatten(2), at[:1, ..., 0]
    low = x.floor()
    part = (x - low)[:, None]

    def texel(column):
        place = (column + 1).clamp(0, W + 1).long() + 0 * W
        return flat.gather(2, place.flatten(1)[:, None].expand(-1, C, -1)).view(1, C, Q, P)

    return ((texel(low) * (1 - part) + texel(low + 1) * part) * weights[:1, None]).sum(-1)


@pytest.mark.parametrize("form", [warped, narrow_map])
def test_left_alone(form: Callable[..., Tensor]) -> None:
    """A warp is no attention; nor is what is read by one number only."""
    assert {s.status for s in optimized(form, drawn())} <= {"kept"}


def quantised(value, at, weights):
    samples = F.grid_sample(value, at, align_corners=False)
    return (samples.to(torch.float8_e4m3fn).float() * weights[:, None]).sum(-1)


def test_eight_bits_are_kept() -> None:
    assert {s.status for s in optimized(quantised, drawn())} == {"kept"}


# -- maps of three axes ----------------------------------------------------------------------------
def volumes(padding: str, align: bool, lift: bool) -> Callable[..., Tensor]:
    """Summed without weights, of a volume or of maps times their depths."""
    def form(value: Tensor, at: Tensor, depth: Tensor) -> Tensor:
        whole = value[:, :, None] * (depth[:, None] if lift else depth[:, None].cumsum(2))
        whole = whole if lift else whole + value[:, :, None].exp()
        found = F.grid_sample(whole, at[:, None], padding_mode=padding, align_corners=align)
        return found.squeeze(2).sum(-1)
    return form


@pytest.mark.parametrize("lift", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("padding", "align"), [
    ("border", False), *(pytest.param(p, a, marks=pytest.mark.slow) for p, a in (
        ("border", True), ("reflection", False), ("reflection", True), ("zeros", False)))])
def test_locations_that_are_no_places(padding: str, align: bool, lift: bool) -> None:
    """As F.grid_sample of three axes has NaN and infinity on a CPU: the last texel, where that of
    two axes has the first."""
    form = volumes(padding, align, lift)
    value, at, depth = torch.randn(N, C, H, W), torch.rand(N, Q, P, 3) * 2.4 - 1.2, torch.rand(
        N, 4, H, W)
    with torch.no_grad():
        opt = attnopt.optimize(Model(form), (value, at, depth))
        assert [s.status for s in opt.report.sites] == ["rewritten"], opt.report.sites
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 900.0])
        at = at.where(torch.rand(at.shape) > 0.3, odd[torch.randint(0, 4, at.shape)])
        torch.testing.assert_close(opt(value, at, depth), form(value, at, depth), atol=1e-5,
                                   rtol=1e-4)
