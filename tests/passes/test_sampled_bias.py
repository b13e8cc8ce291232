"""Biases that are a table sampled at key positions become four look-ups in the kernel.

Most expressions are evaluated by ATen, so that few kernels are compiled; results are compared with
the module's own in float64.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.ir.spec import Spec
from attnopt.kernels import padded_tables
from tests.passes.test_bias_gradients import kernels_in
from tests.spellings import deformable_transformer_spellings as spell

SIZE, SAMPLES = (5, 7), 13
WORDS = "table sampled at key positions"
pytestmark = pytest.mark.usefixtures("by_aten")


class At(spell.Sampled2D):
    """The attention alone, at positions that are an input."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        q, k, v = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))  # (B * heads, channels, tokens)
        scores = torch.einsum("bcm,bcn->bmn", q, k) * self.scale
        assert self.bias is not None
        weights = (scores + self.bias(self, positions, q)).softmax(-1)
        return torch.einsum("bmn,bcn->bcm", weights, v)


def drawn(size: tuple[int, int] = SIZE, samples: int = SAMPLES, batch: int = 2, heads: int = 4,
          groups: int = 2, reach: float = 1.2) -> list[Tensor]:
    """Queries, keys, values and positions, some of them outside of the map."""
    generator = torch.Generator().manual_seed(samples)
    found = [torch.randn(batch, heads, 8, n, generator=generator)
             for n in (size[0] * size[1], samples, samples)]
    places = torch.rand(batch * groups, samples, 1, 2, generator=generator)
    return [*found, reach * (2 * places - 1)]


def near(found: Tensor, own: Tensor, right: Tensor) -> None:
    """As near to float64 as the module itself, nan where that is."""
    assert torch.equal(found.isnan(), right.isnan())
    error, other = ((x.double() - right).abs().nan_to_num().max() for x in (found, own))
    assert error <= max(4 * other, 1e-5 * right.abs().nan_to_num().max()), f"{error} for {other}"


def optimised(module: nn.Module, inputs: list[Tensor], **options: Any) -> tuple[Any, Spec, Any]:
    opt = attnopt.optimize(module, tuple(inputs), **{"verify": False, **options})
    (site,) = (s for s in opt.report.sites if s.kind == "attention")
    assert site.status == "rewritten", (site.reason, site.tried)
    return opt, Spec.parse(site.spec), site


def check(module: nn.Module, inputs: list[Tensor], *others: list[Tensor], **options: Any) -> Any:
    """Optimise on the inputs, compare on them and on others; the bias is four look-ups."""
    opt, spec, site = optimised(module, inputs, **options)
    assert WORDS in site.bias, site.bias
    assert not any({"q", "k"} <= set(o.axes or ()) for o in spec.operands), spec
    exact = copy.deepcopy(module).double()
    with torch.no_grad():
        for given in (inputs, *others):
            near(opt(*given), module(*given), exact(*(t.double() for t in given)))
    assert sum(v for k, v in opt.report.calls.items() if k != "hits") == 0, opt.report.calls
    return opt


def named(x: Any) -> str:
    return getattr(x, "__name__", str(x))


# -- forms ----------------------------------------------------------------------------------------
def some(cases: list[Any], *quick: Any) -> list[Any]:
    """Cases of which some are checked each time."""
    return [x if x in quick else pytest.param(x, marks=pytest.mark.slow) for x in cases]


@pytest.mark.parametrize("bias", some(spell.TABLES, spell.by_table), ids=named)
def test_a_table_is_looked_up(bias: spell.Bias) -> None:
    check(At(SIZE, bias=bias).eval(), drawn(), drawn(reach=4.0))


@pytest.mark.parametrize("grid", some(spell.GRIDS[1:], spell.grid_buffer), ids=named)
def test_a_grid_is_read_off_its_values(grid: Any) -> None:
    check(At(SIZE, grid=grid).eval(), drawn())


@pytest.mark.parametrize("size, batch, heads, groups", [
    ((2, 3), 1, 1, 1), *(pytest.param(*x, marks=pytest.mark.slow) for x in (
        ((2, 2), 3, 2, 2), ((3, 2), 1, 4, 1), ((6, 5), 2, 4, 4), ((8, 8), 1, 6, 3)))])
def test_shapes(size: tuple[int, int], batch: int, heads: int, groups: int) -> None:
    module = At(size, heads, groups).eval()
    check(module, drawn(size, 4, batch, heads, groups), drawn(size, 4, batch, heads, groups, 3.0))


def test_nothing_of_all_pairs_is_made() -> None:
    size, samples = (12, 12), 40
    opt = check(At(size).eval(), drawn(size, samples, 1))
    made = [n for n in opt.graph_modules[0].graph.nodes if n.op == "call_function"
            and isinstance(n.meta.get("val"), Tensor)]
    assert not [n for n in made if list(n.meta["val"].shape).count(samples)
                and list(n.meta["val"].shape).count(size[0] * size[1])]
    assert not [n for n in made if "grid_sampler" in n.name]


@pytest.mark.slow
def test_batches_of_any_number() -> None:
    moving = tuple({0: torch.export.Dim.AUTO} for _ in range(4))
    check(At(SIZE).eval(), drawn(), drawn(batch=3), dynamic_shapes=moving)


def test_a_window_of_the_map() -> None:
    """Queries in another order, and not from the map's corner: still whole numbers of entries."""
    order = torch.randperm(SIZE[0] * SIZE[1], generator=torch.Generator().manual_seed(1))
    module = At(SIZE, grid=spell.grid_buffer).eval()
    module.places = module.places.flatten(0, 1)[order].reshape(*SIZE, 2)
    check(module, drawn())


# -- what is at the rim and beyond ----------------------------------------------------------------
RIM = (-1.0, 0.0, 1.0, 1.0 + 2 / 6, -1.0 - 2 / 4, 2.9999, 3.0, -3.0001, 40.0, -1e9, 1e30)


@pytest.mark.parametrize("bias", [spell.by_table, spell.by_table_with_border], ids=named)
def test_positions_at_the_rim(bias: spell.Bias) -> None:
    others = []
    for place in RIM:
        inputs = drawn()
        inputs[-1][0, :3] = place
        inputs[-1][1, 2:5, :, 0] = place
        others.append(inputs)
    check(At(SIZE, bias=bias).eval(), drawn(), *others)


def test_positions_that_are_no_numbers() -> None:
    module = At(SIZE).eval()
    opt = check(module, drawn())
    for place in (float("nan"), float("inf"), -float("inf")):
        inputs = drawn()
        inputs[-1][0, 3, :, 1] = place
        with torch.no_grad():
            found, own = opt(*inputs), module(*inputs)
        assert torch.equal(found.isnan(), own.isnan()) and bool(own.isnan().any())
        torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.slow
def test_a_position_on_an_entry_reads_no_neighbour() -> None:
    module, inputs = At((3, 3)).eval(), drawn((3, 3), 4)
    inputs[-1][:] = 0.0
    with torch.no_grad():
        module.table[:, 0, 0] = float("inf")  # out of reach of a key in the middle
        module.table[:, 1:4, 1:4] = 1.0
    opt, *_ = optimised(module, inputs)
    with torch.no_grad():
        assert bool(opt(*inputs).isfinite().all())


# -- the whole module -----------------------------------------------------------------------------
@pytest.mark.parametrize("factor", some([2.0, -1.0], 2.0), ids=str)
def test_a_module(factor: float) -> None:
    module = spell.Sampled2D((7, 9), factor=factor, grid=spell.grid_without_gradients).eval()
    check(module, [torch.randn(2, 32, 7, 9)], [torch.randn(2, 32, 7, 9)])


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_a_kernel() -> None:
    module = spell.Sampled2D((7, 9)).eval()
    opt = check(module, [torch.randn(2, 32, 7, 9)], verify=True)
    assert {s.lowering[:3] for s in opt.report.sites if s.kind == "attention"} == {"cpp"}


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
def test_positions_of_any_kind_in_a_kernel() -> None:
    module, others = At(SIZE).eval(), []
    for place in (float("nan"), float("inf"), -1e30, 1e9, -1.5):
        inputs = drawn()
        inputs[-1][0, 3, :, 1] = place
        others.append(inputs)
    opt = check(module, drawn(), *others)
    assert {s.lowering[:3] for s in opt.report.sites if s.kind == "attention"} == {"cpp"}


@pytest.mark.slow
@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("bias", [spell.by_table, spell.by_table_with_border], ids=named)
def test_gradients_of_table_positions_and_offsets(bias: spell.Bias) -> None:
    module, x = spell.Sampled2D((7, 9), bias=bias).train(), torch.randn(2, 32, 7, 9)
    opt, spec, site = optimised(module, [x], verify=True)
    assert WORDS in site.bias and site.lowering[:3] == "cpp", site
    ahead = torch.randn(2, 32, 7, 9)
    runs = []
    for run, own in ((opt, module), (module, module), (
            exact := copy.deepcopy(module).double(), exact)):
        dtype = torch.float64 if own is exact else torch.float32
        given = x.detach().clone().to(dtype).requires_grad_()
        own.zero_grad()
        out = run(given)
        assert run is not opt or kernels_in(out)
        out.backward(ahead.to(dtype))
        runs.append({n: p.grad.clone() for n, p in own.named_parameters() if p.grad is not None}
                    | {"x": given.grad})
    found, own, right = runs
    assert found.keys() == right.keys() and "offsets.0.weight" in found and "table" in found
    for name, wanted in right.items():
        error, other = ((g[name] - wanted).abs().max() for g in (found, own))
        most = 64 * torch.finfo(torch.float32).eps * wanted.abs().max()
        assert error <= max(4 * other, most), f"{name}: {error} for {other}"


def test_gradients_by_aten() -> None:
    """The same expression without a kernel, to positions that are an input."""
    module, inputs = At(SIZE).eval(), drawn()
    opt, *_ = optimised(module, inputs)
    found = []
    for run in (opt, module):
        given = [t.clone().requires_grad_() for t in inputs]
        found.append(torch.autograd.grad(run(*given).square().sum(), [*given, module.table]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("bias", some(spell.OTHERS, spell.by_network), ids=named)
def test_attention_with_another_bias_is_found(bias: spell.Bias | None) -> None:
    module, x = spell.Sampled2D((7, 9), bias=bias).eval(), torch.randn(2, 32, 7, 9)
    opt, _, site = optimised(module, [x])
    assert WORDS not in site.bias
    with torch.no_grad():
        torch.testing.assert_close(opt(x), module(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("module, shape", [
    (spell.Sampled1D(), (2, 16, 30)), pytest.param(
        spell.Sampled1D(shifted=False), (1, 16, 17), marks=pytest.mark.slow),
    pytest.param(spell.Sampled3D(), (2, 16, 4, 6, 8), marks=pytest.mark.slow), pytest.param(
        spell.Sampled3D(heads=2, groups=1, stride=1, shifted=False), (1, 16, 3, 4, 5),
        marks=pytest.mark.slow)], ids=["line", "line-plain", "volume", "volume-plain"])
def test_one_and_three_axes(module: nn.Module, shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape)
    opt, *_ = optimised(module.eval(), [x])
    with torch.no_grad():
        torch.testing.assert_close(opt(x), module(x), atol=1e-5, rtol=1e-5)


def test_the_order_of_a_volume_is_kept() -> None:
    """(f, h, w) is read as (x, y, z): a transposed sampling is another function."""
    module, x = spell.Sampled3D().eval(), torch.randn(1, 16, 4, 6, 8)
    places = torch.rand(2, 2, 3, 4, 3) * 2 - 1
    features = x.reshape(2, 8, 4, 6, 8)
    assert not torch.allclose(module.sample(features, places),
                              module.sample(features, places.flip(-1)))
    opt, *_ = optimised(module, [x])
    with torch.no_grad():
        torch.testing.assert_close(opt(x), module(x), atol=1e-5, rtol=1e-5)


# -- near misses ----------------------------------------------------------------------------------
REASONS = {
    spell.by_another_step: "no whole number of entries", spell.by_nearest: "than bilinearly",
    spell.by_corners_of_centres: "no whole number of entries", spell.by_reflection: "reflected",
    spell.by_bent_displacements: "no place of a query less one of a key",
    spell.by_scaled_queries: "no place of a query less one of a key"}


@pytest.mark.parametrize("bias", some(
    spell.NEAR_MISSES, spell.by_another_step, spell.by_scaled_queries), ids=named)
def test_a_near_miss_is_carried_as_it_is(bias: spell.Bias, caplog: pytest.LogCaptureFixture
                                         ) -> None:
    module, inputs = At(SIZE, bias=bias).eval(), drawn()
    with caplog.at_level(logging.DEBUG, "attnopt.passes"):
        opt, spec, site = optimised(module, inputs)
    assert WORDS not in site.bias and any({"q", "k"} <= set(o.axes or ()) for o in spec.operands)
    assert REASONS[bias] in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(opt(*inputs), module(*inputs), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_a_grid_between_the_entries_is_a_near_miss(caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = At(SIZE, grid=spell.grid_of_centres).eval(), drawn()
    with caplog.at_level(logging.DEBUG, "attnopt.passes"):
        *_, site = optimised(module, inputs)
    assert WORDS not in site.bias and "no whole number of entries" in caplog.text


@pytest.mark.slow
def test_a_table_of_another_size_is_a_near_miss() -> None:
    module, inputs = At(SIZE).eval(), drawn()
    module.table = nn.Parameter(torch.randn(4, 9, 14))
    *_, site = optimised(module, inputs)
    assert WORDS not in site.bias


def test_a_grid_that_is_a_parameter_is_not_read() -> None:
    module, inputs = At(SIZE, grid=spell.grid_buffer).eval(), drawn()
    places = module.places
    del module.places
    module.places = nn.Parameter(places)
    *_, site = optimised(module, inputs)
    assert WORDS not in site.bias


@pytest.mark.slow
def test_half_precision_is_carried_as_it_is() -> None:
    module = At(SIZE).eval().bfloat16()
    inputs = [t.bfloat16() for t in drawn()]
    opt, _, site = optimised(module, inputs)
    assert WORDS not in site.bias
    with torch.no_grad():
        torch.testing.assert_close(opt(*inputs), module(*inputs), atol=2e-2, rtol=2e-2)


@pytest.mark.slow
def test_a_grid_that_changes_is_seen() -> None:
    module, inputs = At(SIZE, grid=spell.grid_buffer).eval(), drawn()
    opt = check(module, inputs)
    with torch.no_grad():
        module.places.mul_(0.9)
        torch.testing.assert_close(opt(*inputs), module(*inputs), atol=1e-5, rtol=1e-5)


# -- the rim --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, mode", [("zeros", "constant"), ("border", "replicate")])
def test_a_rim(kind: str, mode: str) -> None:
    table = torch.randn(3, 4, 2, 5, dtype=torch.float64, requires_grad=True)
    text = str(padded_tables.Rim((1, 3), (2, 1), (0, 3), kind))
    assert padded_tables.Rim.parse(text) == padded_tables.Rim((1, 3), (2, 1), (0, 3), kind)

    def padded(t: Tensor) -> Tensor:
        return torch.ops.attnopt.padded_table([t], [], text)
    found = padded(table).unflatten(-1, (6, 9))
    wanted = nn.functional.pad(table.permute(0, 2, 1, 3), (1, 3, 2, 0), mode=mode)
    assert torch.equal(found, wanted)
    assert torch.autograd.gradcheck(padded, (table,))


def test_a_rim_of_another_kind() -> None:
    with pytest.raises(ValueError, match="kind must be one of zeros, border, got 'wrap'"):
        padded_tables.Rim((0, 1), (1, 1), (1, 1), "wrap")
