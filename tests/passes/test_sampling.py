"""Weighted sums of samples become one call of the op, whatever they are spelled like."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt
from attnopt.kernels.cpp.toolchain import toolchain
from attnopt.kernels.deformable import Sampling, reference
from attnopt.passes.rules import cost
from tests.spellings import sampling_spellings as spelled
from tests.spellings.checking import describe, differences, oracle, run
from tests.spellings.sampling_spellings import GRIDS, NEAR, TABLE, Form, Sampler, Spelling

SHAPES = [n for grid in GRIDS for n in grid]
QUICK = {"stacked_levels", "concatenated", "looked_up", "seen_points"}
QUICK_NEAR = {"returned_as_well", "position_embedding"}


@pytest.fixture(autouse=True)
def _take_all(monkeypatch):
    monkeypatch.setattr(cost, "TAKE_ALL", True)


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
    if spelling.form not in spelled.OTHER:
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
    taken = [s for s in sites(opt) if s.status != "kept"]
    assert len(taken) == 2 * (form is spelled.one_of_two_levels_counts), describe(opt)
    assert all(s.reason for s in sites(opt) if s not in taken)
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
    batch, queries = torch.export.Dim("batch", max=64), torch.export.Dim("queries", max=64)
    original, inputs = spelling.module(), spelling.inputs(3, 9)
    both = {0: batch, 1: queries}
    shapes = {"value": {0: batch}, "locations": both, "weights": both}
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


@pytest.mark.parametrize("backend", ["auto", "aten"])
def test_few_points_are_declined_on_cost(monkeypatch, backend: str) -> None:
    """With both estimates, and taken where the number of queries makes up for the call."""
    monkeypatch.setattr(cost, "TAKE_ALL", False)
    if backend == "auto" and toolchain().why_not():
        pytest.skip(toolchain().why_not())
    original = TABLE[0].module().eval()
    for queries, status in ((1, "canonical"), (150, "rewritten"))[:1 + (backend == "auto")]:
        inputs = TABLE[0].inputs(queries=queries)
        with torch.no_grad():
            opt = optimized(original, inputs, backend=backend, verify=False)
        (site,) = opt.report.sites
        assert site.status == status, (site, describe(opt))
        if status == "canonical":
            assert re.fullmatch(r"cost: predicted \S+ [mu]s instead of \S+ us", site.reason), site
            assert site.tried == [f"deformable: {site.reason}"] and site.lowering == "author"
            check(original, opt, inputs)
            with torch.no_grad():
                smaller = optimized(original, inputs, backend=backend, prefer="memory")
            assert [s.status for s in sites(smaller)] == ["rewritten"]
        else:
            assert site.predicted_speedup > 1


class Maps(nn.Module):
    """Feature maps of any size, with a volume of depths or without; a grid as it is, or flat."""

    def __init__(self, depths: int = 0, flat: bool = False) -> None:
        super().__init__()
        self.depths, self.flat = depths, flat

    def forward(self, first: Tensor, second: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        b, q, h, _, _ = locations.shape
        grid = (2 * locations - 1).transpose(1, 2).flatten(0, 1)
        found = []
        for level, features in enumerate((first, second)):
            c, *size = features.shape[1:]
            image = features.flatten(2).mul(2.0).unflatten(2, size) if self.flat else features
            image = image.reshape(b * h, c // h, *size)
            at = grid[:, :, 2 * level:2 * level + 2]
            if self.depths:
                shares = image[:, :self.depths].softmax(1).unsqueeze(1)
                volume = image[:, self.depths:].unsqueeze(2) * shares
                found.append(F.grid_sample(volume, at.unsqueeze(1), align_corners=False).squeeze(2))
            else:
                found.append(F.grid_sample(image, at, align_corners=False))
        shares = weights.softmax(-1).transpose(1, 2).reshape(b * h, 1, q, -1)
        out = (torch.cat(found, -1) * shares).sum(-1)
        return out.view(b, -1, q).transpose(1, 2)

    def inputs(self, one: tuple[int, int], two: tuple[int, int], queries: int = 5
               ) -> tuple[Tensor, ...]:
        rank = 3 if self.depths else 2
        return (torch.randn(2, 16, *one), torch.randn(2, 16, *two),
                torch.rand(2, queries, 2, 4, rank) * 1.2 - 0.1, torch.randn(2, queries, 2, 4))


@pytest.mark.parametrize(("depths", "flat"), [
    (0, False), pytest.param(0, True, marks=pytest.mark.slow),
    pytest.param(3, False, marks=pytest.mark.slow), pytest.param(3, True, marks=pytest.mark.slow)])
def test_maps_of_any_size(depths: int, flat: bool) -> None:
    dim = torch.export.Dim.AUTO
    original = Maps(depths, flat)
    sizes = {2: dim, 3: dim}
    opt = optimized(original, original.inputs((5, 6), (3, 4)), dynamic_shapes={
        "first": sizes, "second": sizes, "locations": {1: dim}, "weights": {1: dim}})
    assert [s.status for s in sites(opt)] == ["rewritten"], (describe(opt), sites(opt))
    call = next(n for n in opt.graph_modules[0].graph.nodes if "deformable" in str(n.target))
    assert (call.args[3] is not None) == bool(depths), sites(opt)[0].tried
    for one, two, queries in (((5, 6), (3, 4), 5), ((7, 2), (4, 9), 3), ((3, 3), (2, 2), 8)):
        check(original, opt, original.inputs(one, two, queries), gradients=True)
    assert opt.report.calls["hits"] and set(opt.report.calls) == {"hits"}, opt.report.calls
