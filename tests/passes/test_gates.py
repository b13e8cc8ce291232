"""Gates with exact zeros become part of the site, whose kernel leaves the other rows out."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import attnopt
from attnopt.kernels import gated_rows
from attnopt.passes.normalize import functional_view
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.sites import recognize
from attnopt.passes.rules import blocks, cost, sdpa
from tests.spellings import gate_spellings as spelled
from tests.spellings.checking import describe, differences, oracle, run
from tests.spellings.gate_spellings import NEAR, SHARED, TABLE, TOP, B, C, Gating, H, N


@pytest.fixture(autouse=True)
def _taken(monkeypatch: pytest.MonkeyPatch, by_aten: None) -> None:
    monkeypatch.setattr(gated_rows, "FEWEST", 0)
    for rule in (blocks, sdpa):
        monkeypatch.setattr(rule, "pays", lambda region: None)
    monkeypatch.setattr(cost, "pays", lambda region: None)


def optimized(gating: Gating, **options: object):
    original, x = gating.module(), torch.randn(B, N, C)
    with torch.no_grad():
        return original, attnopt.optimize(copy.deepcopy(original), (x,), **options), x


def check(original, opt, x, gradients: bool = False) -> None:
    exact = oracle(original, [x], gradients=gradients)
    wrong = differences(run(opt, [x], gradients=gradients),
                        run(original, [x], gradients=gradients), exact)
    assert not wrong, f"{wrong}; {describe(opt)}"


def gated(opt) -> list[object]:
    return [s for s in opt.report.sites if '"gate"]' in s.spec and s.status == "rewritten"]


QUICK = {"mixture", "mixture_of_norms", "mixture_where", "branches_blended", "branches_chosen"}


@pytest.mark.parametrize("gating", [
    pytest.param(g, id=g.name, marks=[] if g.name in QUICK else pytest.mark.slow) for g in TABLE])
def test_gate_is_part_of_the_site(gating: Gating) -> None:
    original, opt, x = optimized(gating)
    sites = gated(opt)
    assert len(sites) == gating.gates, (describe(opt), [s.reason for s in opt.report.sites])
    assert not any(s.bias for s in sites)
    check(original, opt, x)
    for _ in range(2):  # another input, another choice
        check(original, opt, torch.randn(B, N, C))


@pytest.mark.parametrize("gating", [
    pytest.param(g, id=g.name, marks=[] if i < 2 else pytest.mark.slow)
    for i, g in enumerate(NEAR)])
def test_near_miss_has_no_gate(gating: Gating) -> None:
    original, opt, x = optimized(gating)
    assert not gated(opt)
    assert any(s.status in ("rewritten", "canonical") for s in opt.report.sites)
    check(original, opt, x)


@pytest.mark.slow
@pytest.mark.parametrize("gating", [TABLE[1], TABLE[4], TABLE[7], TABLE[8]], ids=lambda g: g.name)
def test_gradients(gating: Gating) -> None:
    original, opt, x = optimized(gating)
    check(original, opt, x, gradients=True)


@pytest.mark.slow
def test_a_batch_of_any_size() -> None:
    original, x = TABLE[1].module(), torch.randn(3, N, C)
    with torch.no_grad():
        opt = attnopt.optimize(copy.deepcopy(original), (x,),
                               dynamic_shapes={"x": {0: torch.export.Dim.AUTO}})
    assert len(gated(opt)) == 1, describe(opt)
    for batch in (3, 1, 5, 2):
        check(original, opt, torch.randn(batch, N, C))


def test_rows_without_keys_stay_nan() -> None:
    """A padding mask of the input may empty a row: 0 * NaN is NaN, as the author has it."""
    def forward(self, x, seen):
        q, k, v = spelled.projected(self, x)
        keep = seen[:, None, :, None] & seen[:, None, None]
        gate = spelled.chosen(self, x).transpose(1, 2).unsqueeze(-1)
        return (spelled.attend(q, k, v, keep) * gate).transpose(1, 2)
    original, x = Gating(forward).module(), torch.randn(B, N, C)
    seen = torch.arange(N).expand(B, N) < torch.tensor([[N], [N - 5]])
    with torch.no_grad():
        opt = attnopt.optimize(copy.deepcopy(original), (x, seen))
        (site,) = gated(opt)
        found, expected = opt(x, seen), original(x, seen)
    assert math.isnan(float(expected[1, N - 1].sum()))
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_rows_that_are_left_can_be_foreseen() -> None:
    """They are what the cost model counts."""
    for gating, share in ((TABLE[0], (SHARED + TOP) / H), (TABLE[7], 0.5)):
        original, x = gating.module(), torch.randn(B, N, C)
        graph = torch.export.export(original, (x,), strict=False).graph
        program = Program(functional_view(graph), {})
        found, _ = recognize(program)
        assert [s.rows_share for s in found] == [pytest.approx(share)] * gating.gates
