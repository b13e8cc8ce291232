"""Local attention spelled by data movement becomes attention over its tokens, exactly.

Most cases evaluate the Spec that was found by ATen, so that few kernels have to be compiled.
"""

from __future__ import annotations

import copy
import math
import random

import pytest
import torch

import attnopt
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.mask import Neighborhood
from attnopt.passes.analyze.neighbours import Structure, structure
from attnopt.passes.analyze.runs import Run
from attnopt.passes.rules import blocks, cost, sdpa
from attnopt.rules import Decline
from tests.spellings import local_spellings as spelled
from tests.spellings.checking import describe, differences, oracle, run
from tests.spellings.local_spellings import NEAR, TABLE, Local


@pytest.fixture(autouse=True)
def _taken(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, by_aten: None) -> None:
    if "compiled" not in request.fixturenames:
        monkeypatch.setattr(cost, "pays", lambda region: None)
        for rule in (blocks, sdpa):
            monkeypatch.setattr(rule, "local", lambda region: None)
            monkeypatch.setattr(rule, "pays", lambda region: None)


def optimized(local: Local, **options: object) -> tuple[object, object, list[torch.Tensor]]:
    original, inputs = local.module(), local.inputs()
    with torch.no_grad():
        return original, attnopt.optimize(copy.deepcopy(original), tuple(inputs), **options), inputs


def check(original, opt, inputs) -> None:
    exact = oracle(original, inputs, gradients=False)
    wrong = differences(run(opt, inputs, gradients=False), run(original, inputs, gradients=False),
                        exact)
    assert not wrong, f"{wrong}; {describe(opt)}"


QUICK = {"unfolded", "tensor_unfold_biased", "table_biased", "rolled", "chunks_unfolded", "tiled",
         "cost_volume", "skewed_chunks"}


def quick_few(table: list[Local], quick: set[str]) -> list[object]:
    """The others are marked slow."""
    return [pytest.param(s, id=s.name, marks=[] if s.name in quick else pytest.mark.slow)
            for s in table]


@pytest.mark.parametrize("local", quick_few(TABLE, QUICK))
def test_spelling_is_attention_over_tokens(local: Local) -> None:
    original, opt, inputs = optimized(local, verify=False)
    (site,) = opt.report.sites
    assert site.status == "rewritten", describe(opt)
    assert site.mask.split(" & ")[0] == local.mask, (site.mask, site.tried)
    tokens = math.prod(local.shape[2:-1] if local.shape is spelled.SEQUENCE else local.shape[2:])
    keys = int(site.shapes.split()[1].split("x")[-2])
    assert tokens <= keys < 2 * tokens or local.forward is spelled.tiled, site.shapes  # no copies
    check(original, opt, inputs)


@pytest.mark.parametrize("local", quick_few(NEAR, {"other_values", "padding_mask"}))
def test_near_miss_is_left_alone(local: Local) -> None:
    original, opt, inputs = optimized(local, verify=False)
    (site,) = opt.report.sites
    assert "window" not in site.mask and "partition" not in site.mask, site.mask
    refused = [text for text in site.tried if text.startswith("local-attention")]
    assert not local.reason or any(local.reason in text for text in refused), site.tried
    check(original, opt, inputs)


@pytest.mark.slow
def test_padding_that_takes_mass_is_a_sink() -> None:
    _, opt, _ = optimized(Local(spelled.unfolded, "", spelled.MAP), verify=False)
    assert '"sinks"' in opt.report.sites[0].spec
    for masked in (spelled.unfolded_masked, spelled.padding_mask):
        local = next(s for s in TABLE if s.forward is masked)
        _, opt, _ = optimized(local, verify=False)
        assert '"sinks"' not in opt.report.sites[0].spec


@pytest.mark.slow
def test_key_norms_make_a_squared_distance() -> None:
    for fill, keys in ((-math.inf, 6 * 7), (-100.0, 8 * 9)):
        local = Local(spelled.matched, "", spelled.MAP, spelled.filling(fill))
        _, opt, _ = optimized(local, verify=False)
        site = opt.report.sites[0]
        assert '"score":"distance"' in site.spec and site.shapes.split()[1] == f"2x{keys}x8"


@pytest.mark.slow
def test_bias_on_padding_takes_the_padded_map() -> None:
    local = next(s for s in TABLE if s.forward is spelled.tensor_unfold_biased)
    _, opt, _ = optimized(local, verify=False)
    assert opt.report.sites[0].shapes.split()[1] == f"2x2x{8 * 9}x4"


def test_other_values_of_the_table_are_guarded() -> None:
    local = next(s for s in TABLE if s.forward is spelled.table_indexed)
    original, opt, inputs = optimized(local, verify=False)
    for module in (original, opt):
        with torch.no_grad():
            module.table.copy_(module.table.flip(0))
    check(original, opt, inputs)


def test_a_padding_mask_is_not_specialised() -> None:
    local = next(s for s in TABLE if s.forward is spelled.padding_mask)
    original, opt, inputs = optimized(local, verify=False)
    inputs[3] = torch.where(torch.arange(spelled.WIDTH) < 4, 0.0, -2.0).expand_as(inputs[3])
    check(original, opt, inputs)


@pytest.mark.slow
def test_squared_distances_decline_padding_in_the_softmax() -> None:
    def forward(self, q, k, v):
        q, k, v = spelled.heads(q), spelled.columns(k), spelled.columns(v)
        scores = -(q.unsqueeze(3) - k).pow(2).sum(-1)
        return (scores.softmax(-1).unsqueeze(3) @ v).squeeze(3)
    original, opt, inputs = optimized(Local(forward, "", spelled.MAP), verify=False)
    assert "window" not in opt.report.sites[0].mask
    check(original, opt, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    local = next(s for s in TABLE if s.forward is spelled.unfolded_finite)
    original = type("Local", (torch.nn.Module,), {
        "forward": lambda self, *x: spelled.shifted_slices(self, *x)})().eval()
    inputs = local.inputs(dtype)
    with torch.no_grad():
        opt = attnopt.optimize(copy.deepcopy(original), tuple(inputs), verify=False)
    assert opt.report.sites[0].mask == spelled.CROPPED, describe(opt)
    check(original, opt, inputs)


@pytest.mark.slow
def test_a_batch_of_any_size() -> None:
    def forward(self, q, k, v):
        place = (torch.arange(24) - 2).clamp(0, 19)[:, None] + torch.arange(5)
        weights = (q.unsqueeze(3) @ k[:, :, place].transpose(-1, -2)).softmax(-1)
        return (weights @ v[:, :, place]).squeeze(3)
    local = Local(forward)
    original, inputs = local.module(), local.inputs()
    dynamic = ({0: torch.export.Dim.AUTO},) * 3
    with torch.no_grad():
        opt = attnopt.optimize(copy.deepcopy(original), tuple(inputs), dynamic_shapes=dynamic,
                               verify=False)
    assert opt.report.sites[0].mask == "window 5", describe(opt)
    for batch in (1, 2, 5):
        check(original, opt, [x[:1].repeat(batch, 1, 1, 1) for x in inputs])


@pytest.mark.slow
def test_batch_and_tokens_in_one_axis() -> None:
    def forward(self, q, k, v):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
        b, n, d = q.shape
        k, v = (spelled.F.pad(x, (0, 0, 2, 2)).unfold(1, 5, 1).transpose(2, 3).reshape(b * n, 5, d)
                for x in (k, v))
        weights = (q.reshape(b * n, 1, d) @ k.transpose(1, 2)).softmax(-1)
        return (weights @ v).view(b, n, d)
    original, opt, inputs = optimized(Local(forward), verify=False)
    assert opt.report.sites[0].mask == "window 5 cropped at the borders", describe(opt)
    check(original, opt, inputs)


@pytest.mark.slow
def test_gradients_without_sinks() -> None:
    local = next(s for s in TABLE if s.forward is spelled.unfolded_masked)
    original, inputs = local.module(), local.inputs()
    opt = attnopt.optimize(copy.deepcopy(original), tuple(inputs), verify=False)
    exact = oracle(original, inputs, gradients=True)
    wrong = differences(run(opt, inputs, gradients=True), run(original, inputs, gradients=True),
                        exact)
    assert not wrong, f"{wrong}; {describe(opt)}"


@pytest.mark.slow
@pytest.mark.parametrize("local", TABLE, ids=lambda s: s.name)
def test_generated_kernel_is_verified(compiled: None, local: Local) -> None:
    original, opt, inputs = optimized(local)
    (site,) = opt.report.sites
    assert (site.status, site.lowering.partition(":")[0]) == ("rewritten", "cpp"), describe(opt)
    check(original, opt, inputs)


# -- tables ---------------------------------------------------------------------------------------
def table_of(dense: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Neighbours in a random order, and which places hold one."""
    width = int(dense.sum(1).max())
    table = torch.zeros(len(dense), width, dtype=torch.int64)
    held = torch.zeros(len(dense), width, dtype=torch.bool)
    for n, row in enumerate(dense):
        keys = row.nonzero()[:, 0]
        places = torch.randperm(width)[: len(keys)]
        table[n, places], held[n, places] = keys, True
    return table, held


def same(found: Structure, dense: torch.Tensor) -> None:
    assert torch.equal(found.mask().to_dense(*dense.shape), dense)
    count = torch.as_tensor(evaluate(found.count(), Env(tuple(dense.shape))))
    assert torch.equal(count.expand(len(dense), 1)[:, 0].long(), dense.sum(1))


@pytest.mark.parametrize("seed", range(40))
def test_neighborhoods_are_read_from_tables(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dims = rng.choice([1, 2, 3])
    length = tuple(rng.randint(4, (24, 9, 6)[dims - 1]) for _ in range(dims))
    dilation = tuple(rng.choice([1, 1, max(1, n // 3)]) for n in length)
    window = tuple(rng.randint(2, n // d) if n // d > 1 else 1
                   for n, d in zip(length, dilation, strict=True))
    mask = Neighborhood(window, tuple(rng.choice([1, rng.randint(1, w)]) for w in window), dilation,
                        tuple(rng.random() < 0.2 for _ in window), length)
    tokens = math.prod(length)
    dense = mask.to_dense(tokens, tokens)
    shown = [length] if rng.random() < 0.5 else [(tokens,)]
    same(structure(*table_of(dense), shown, shown), dense)


@pytest.mark.parametrize("block, step, low, high", [
    (1, 1, -2, 2), (1, 1, -4, 0), (4, 4, 0, 3), (4, 4, -4, 7), (1, 2, -1, 1), (3, 3, -1, 3)])
def test_cropped_windows_are_read_from_tables(block: int, step: int, low: int, high: int) -> None:
    rows, keys = (12, 8), (12 * step // block, 8 * step // block)
    runs = tuple(Run("clipped", n, 1, block, step, low, high) for n in keys)
    dense = Structure(rows, keys, runs, (0, 1)).mask().to_dense(math.prod(rows), math.prod(keys))
    same(structure(*table_of(dense), [rows], [keys]), dense)


def test_tables_without_structure_are_declined() -> None:
    rng = torch.Generator().manual_seed(0)
    table = torch.stack([torch.randperm(30, generator=rng)[:5] for _ in range(30)])
    held = torch.ones_like(table, dtype=torch.bool)
    with pytest.raises(Decline, match="no window"):
        structure(table, held, [(30,)], [(30,)])
    with pytest.raises(Decline, match="more than once"):
        structure(table.clamp(max=3), held, [(30,)], [(30,)])
