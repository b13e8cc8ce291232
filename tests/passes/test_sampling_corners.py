"""Linear samples that are written out as four look-ups, read by `recognize.sampling_corners`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from attnopt.passes.rules import cost
from tests.passes.test_sampling import check, expected, marked, optimized, sites
from tests.spellings.checking import describe
from tests.spellings.corner_spellings import (
    CORNERS,
    NEAR_CORNERS,
    ROWS,
    flat_rows,
    indexed,
    masked,
    padded,
)
from tests.spellings.sampling_spellings import Form, Sampler, Spelling

QUICK = {"padded_gathers", "masked_rows"}
QUICK_NEAR = {"clamped_too_early", "shares_of_the_other_axis", "masked_too_much"}


@pytest.fixture(autouse=True)
def _take_all(monkeypatch):
    monkeypatch.setattr(cost, "TAKE_ALL", True)


def by_name(spellings, quick=QUICK):
    return marked(spellings, quick, lambda s: s.name)


def taken(original, inputs, **options):
    opt = optimized(original, inputs, **options)
    assert sites(opt) and all(s.status == "rewritten" for s in sites(opt)), describe(opt)
    return opt


@pytest.mark.parametrize("spelling", by_name([*CORNERS, ROWS]))
def test_spelling(spelling: Spelling) -> None:
    original, inputs = spelling.module(), spelling.inputs()
    with torch.no_grad():
        opt = taken(original, inputs)
        if spelling is not ROWS:
            assert len(opt.report.sites) == 1, describe(opt)
        text = str(opt.graph_modules[0].graph)
        assert "aten.gather" not in text and "aten.index" not in text and "floor" not in text
        check(original, opt, inputs)
        again = spelling.inputs()
        torch.testing.assert_close(opt(*again).double(), expected(spelling, *again), rtol=1e-5,
                                   atol=1e-5)


@pytest.mark.parametrize("form", marked(NEAR_CORNERS, QUICK_NEAR, lambda f: f.__name__))
def test_near_miss_stays(form: Form) -> None:
    original, inputs = Sampler(form), CORNERS[0].inputs()
    with torch.no_grad():
        opt = optimized(original, inputs)
    assert sites(opt) and all(s.status == "kept" and s.reason for s in sites(opt)), describe(opt)
    check(original, opt, inputs)


@pytest.mark.parametrize("spelling", by_name([*CORNERS, ROWS], {"masked_gathers"}))
def test_gradients(spelling: Spelling) -> None:
    original, inputs = spelling.module(), spelling.inputs()
    check(original, taken(original, inputs), inputs, gradients=True)


@pytest.mark.parametrize("spelling", by_name(
    # Of an axis that torch.take_along_dim broadcasts, torch.export fixes the size.
    [s for s in CORNERS if s.name != "taken_along"], {"indexed_corners"}))
def test_any_batch_and_number_of_queries(spelling: Spelling) -> None:
    batch, queries = torch.export.Dim("batch", max=64), torch.export.Dim("queries", max=64)
    original, inputs = spelling.module(), spelling.inputs(3, 9)
    both = {0: batch, 1: queries}
    with torch.no_grad():
        opt = taken(original, inputs, dynamic_shapes={
            "value": {0: batch}, "locations": both, "weights": both})
    for batch, queries in ((3, 9), (2, 1), (1, 5), (4, 4)):
        check(original, opt, spelling.inputs(batch, queries))


@pytest.mark.parametrize("spelling", by_name(CORNERS, {"padded_gathers"}))
def test_locations_that_are_no_places(spelling: Spelling) -> None:
    """NaN, infinite, far away, on the border and on centres of texels.

    A NaN that is clamped before it becomes an index has no texel: the author's code fails then.
    """
    original, inputs = spelling.module(), spelling.inputs()
    with torch.no_grad():
        opt = taken(original, inputs)
        values = (torch.inf, -torch.inf, 1e6, -1e6, 0.0, 1.0, 0.5, -1 / 8, 9 / 8)
        for value in (*values, torch.nan) if spelling.name == "masked_gathers" else values:
            v, at, w = spelling.inputs()
            at[0, 1, 0, 0, 0] = at[1, 2, 0, 1, 1] = value
            found, own = opt(v, at, w), original(v, at, w)
            torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4, equal_nan=True)


class Maps(nn.Module):
    """Corners of maps (N, C, H, W) of any size, with one sum over points."""

    def __init__(self, sample) -> None:
        super().__init__()
        self.sample = sample

    def forward(self, image, locations, weights):
        h, w = image.shape[2:]
        x, y = locations[..., 0] * w - 0.5, locations[..., 1] * h - 0.5
        return (self.sample(image, x, y) * weights.softmax(-1)[:, None]).sum(-1)


@pytest.mark.parametrize("sample", marked([masked, padded, indexed, flat_rows], {"masked"},
                                          lambda f: f.__name__))
def test_maps_of_any_size(sample) -> None:
    def inputs(batch, h, w, queries):
        return (torch.randn(batch, 4, h, w), torch.rand(batch, queries, 3, 2) * 1.4 - 0.2,
                torch.randn(batch, queries, 3))

    dim = torch.export.Dim.AUTO
    original = Maps(sample)
    with torch.no_grad():
        opt = optimized(original, inputs(2, 5, 6, 7), dynamic_shapes={
            "image": {0: dim, 2: dim, 3: dim}, "locations": {0: dim, 1: dim},
            "weights": {0: dim, 1: dim}})
    assert [s.status for s in sites(opt)] == ["rewritten"], describe(opt)
    for sizes in ((2, 5, 6, 7), (3, 4, 9, 2), (2, 7, 3, 5)):
        check(original, opt, inputs(*sizes))


@pytest.mark.slow
@pytest.mark.parametrize("spelling", CORNERS, ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(spelling: Spelling, dtype: torch.dtype) -> None:
    """Places of half precision round y * width + x: taken or not, the results are the author's."""
    original, inputs = spelling.module(), spelling.inputs(dtype=dtype)
    with torch.no_grad():
        opt = optimized(original, inputs)
        if dtype is torch.float64:
            assert [s.status for s in sites(opt)] == ["rewritten"], describe(opt)
        check(original, opt, inputs)
        check(original, opt, spelling.inputs(dtype=dtype))
