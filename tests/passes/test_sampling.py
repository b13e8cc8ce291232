"""Weighted sums of samples become one call of the op, whatever they are spelled like."""

from __future__ import annotations

import copy

import pytest
import torch

import attnopt
from attnopt.kernels.deformable import Sampling, reference
from tests.spellings import sampling_spellings as spelled
from tests.spellings.checking import describe, differences, oracle, run
from tests.spellings.sampling_spellings import GRIDS, NEAR, TABLE, Form, Sampler, Spelling

SHAPES = [n for grid in GRIDS for n in grid]
QUICK = {"stacked_levels", "concatenated", "looked_up"}
QUICK_NEAR = {"returned_as_well", "position_embedding"}


def optimized(module, inputs, **options):
    return attnopt.optimize(copy.deepcopy(module), inputs, **options)


def sites(opt):
    return [s for s in opt.report.sites if s.kind == "sampling"]


def check(original, opt, inputs, gradients: bool = False) -> None:
    exact = oracle(original, inputs, gradients=gradients)
    wrong = differences(run(opt, inputs, gradients=gradients),
                        run(original, inputs, gradients=gradients), exact)
    assert not wrong, f"{wrong}; {describe(opt)}"


def expected(spelling: Spelling, value, locations, weights):
    sampling = Sampling(spelling.points, 2, spelling.mode, spelling.padding,
                        spelling.align_corners)
    return reference(sampling, value, locations, weights.double().softmax(-1), None, SHAPES
                     ).flatten(2)


def marked(items, quick, name):
    return [pytest.param(x, id=name(x), marks=[] if name(x) in quick else pytest.mark.slow)
            for x in items]


@pytest.mark.parametrize("spelling", marked(TABLE, QUICK, lambda s: s.name))
def test_spelling(spelling: Spelling) -> None:
    original, inputs = spelling.module(), spelling.inputs()
    with torch.no_grad():
        opt = optimized(original, inputs)
    (site,) = sites(opt)
    assert site.status == "rewritten" and site.rule == "deformable", (site, describe(opt))
    assert len(opt.report.sites) == 1, "the softmax of the weights belongs to the site"
    text = str(opt.graph_modules[0].graph)
    assert text.count("deformable_attention") and "grid_sampler" not in text
    assert text.count("aten.cat") <= (2 if spelling.parts else 0), text
    check(original, opt, inputs)
    if spelling.form not in (spelled.looked_up, spelled.every_head_alike):
        again = spelling.inputs()
        with torch.no_grad():
            found = opt(*again)
        torch.testing.assert_close(found.double(), expected(spelling, *again), rtol=1e-5,
                                   atol=1e-5)


@pytest.mark.parametrize("form", marked(NEAR, QUICK_NEAR, lambda f: f.__name__))
def test_near_miss_stays(form: Form) -> None:
    original, inputs = Sampler(form), TABLE[0].inputs()
    with torch.no_grad():
        opt = optimized(original, inputs)
    assert all(s.status == "kept" and s.reason for s in sites(opt)), describe(opt)
    assert sites(opt) or form is spelled.unclamped
    check(original, opt, inputs)


@pytest.mark.parametrize("spelling", marked(
    [TABLE[0], TABLE[7], TABLE[11]], {"stacked_levels"}, lambda s: s.name))
def test_gradients(spelling: Spelling) -> None:
    original, inputs = spelling.module(), spelling.inputs()
    opt = optimized(original, inputs)
    assert [s.status for s in sites(opt)] == ["rewritten"], describe(opt)
    check(original, opt, inputs, gradients=True)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", [TABLE[0], TABLE[4], TABLE[7], TABLE[14]],
                         ids=lambda s: s.name)
def test_any_batch_and_number_of_queries(spelling: Spelling) -> None:
    dim = torch.export.Dim.AUTO
    original, inputs = spelling.module(), spelling.inputs(3, 9)
    shapes = {"value": {0: dim}, "locations": {0: dim, 1: dim}, "weights": {0: dim, 1: dim}}
    with torch.no_grad():
        opt = optimized(original, inputs, dynamic_shapes=shapes)
    assert [s.status for s in sites(opt)] == ["rewritten"], describe(opt)
    for batch, queries in ((3, 9), (2, 1), (1, 5), (4, 4)):
        check(original, opt, spelling.inputs(batch, queries))


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "queries"), [(1, 1), (1, 4), (0, 3), (2, 0)])
def test_tiny(batch: int, queries: int) -> None:
    original, inputs = TABLE[0].module(), TABLE[0].inputs(batch, queries)
    with torch.no_grad():
        opt = optimized(original, inputs)
    check(original, opt, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    original, inputs = TABLE[0].module(), TABLE[0].inputs(dtype=dtype)
    with torch.no_grad():
        opt = optimized(original, inputs)
    assert [s.status for s in sites(opt)] == ["rewritten"], describe(opt)
    check(original, opt, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("spelling", [TABLE[0], TABLE[11]], ids=lambda s: s.name)
def test_locations_that_are_no_places(spelling: Spelling) -> None:
    """NaN, infinite, far away, on the border and on centres of texels, as F.grid_sample has it."""
    original, inputs = spelling.module(), spelling.inputs()
    with torch.no_grad():
        opt = optimized(original, inputs)
        assert [s.status for s in sites(opt)] == ["rewritten"], describe(opt)
        odd = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -3e9, 0.0, 1.0, 0.5, 0.125])
        at = odd[torch.randint(0, len(odd), inputs[1].shape)]
        at = torch.where(torch.rand(at.shape) < 0.2, at, inputs[1])
        for locations in (at, at.nan_to_num(0.3, 4.0, -4.0)):
            found, wanted = (m(inputs[0], locations, inputs[2]) for m in (opt, original))
            torch.testing.assert_close(found, wanted, equal_nan=True, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_strides_of_the_inputs() -> None:
    """Expanded and permuted tensors."""
    spelling = TABLE[0]
    value, locations, weights = spelling.inputs()
    value = value.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
    locations = locations[:1].expand(spelled.B, -1, -1, -1, -1)
    with torch.no_grad():
        opt = optimized(spelling.module(), (value, locations, weights))
        assert [s.status for s in sites(opt)] == ["rewritten"], describe(opt)
        torch.testing.assert_close(opt(value, locations, weights),
                                   spelling.module()(value, locations, weights),
                                   rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_options() -> None:
    """Rules that are not wanted, modules that are not meant."""
    original, inputs = TABLE[0].module(), TABLE[0].inputs()
    for options in ({"rules": ["generated"]}, {"only": "encoder.*"}):
        with torch.no_grad():
            opt = optimized(original, inputs, **options)
        (site,) = sites(opt)
        assert site.status in ("canonical", "kept") and site.reason
        check(original, opt, inputs)
