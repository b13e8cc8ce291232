"""Rows whose gate is 0 are left out: every Spec as its float64 reference, on awkward gates."""

from __future__ import annotations

import math

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal, Where
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import gated_rows, reference
from attnopt.kernels.bind import bind

GATE = E.load("gate")
SCALED = Spec(logits=E.score * 0.5, output=E.out * GATE,
              operands=(Operand("gate", ("b", "h", "q"), E.FLOAT, "gate"),))
HEADS = Operand("slopes", ("h",), E.FLOAT, "bias")
ALIBI = E.score + E.load("slopes") * E.call("float", E.index("k") - E.index("q"))
SPECS = {
    "plain": SCALED,
    "causal": SCALED.with_(mask=Causal()),
    "by_head": SCALED.with_([HEADS], logits=ALIBI, mask=Where(
        E.index("k") <= E.index("q") + E.index("h"))),
    "key_padding": SCALED.with_([Operand("keep", ("b", "k"), E.BOOL, "mask")], empty_row="zero",
                                mask=Causal() & Where(E.load("keep", dtype=E.BOOL))),
    "truth": Spec(mask=Band(E.const(-3), E.const(2)), output=E.where(
        E.load("gate", dtype=E.BOOL), E.const(0.0), E.out * 2.0),
        operands=(Operand("gate", ("b", "h", "q"), E.BOOL, "gate"),)),
}
GATES = ("some", "whole_heads", "one_row", "none", "all", "batch", "head")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gated_rows, "FEWEST", 0)


def inputs(gates: str, lead=(2, 4), kv_heads=4, queries=37, keys=41) -> list[torch.Tensor]:
    batch, heads = lead
    q, k, v = (torch.randn(batch, h, n, 8) for h, n in (
        (heads, queries), (kv_heads, keys), (kv_heads, keys)))
    gate = torch.rand(batch, heads, queries, 1) + 0.5
    gate = {
        "some": gate * (torch.rand_like(gate) < torch.rand(batch, heads, 1, 1)),
        "whole_heads": gate * torch.cat([torch.ones(1, heads // 2, queries, 1), torch.rand(
            1, heads - heads // 2, queries, 1).round()], 1),
        "one_row": gate * (torch.arange(queries)[:, None] == 5),
        "none": gate * 0, "all": gate,
        "batch": (gate * (torch.arange(batch) % 2)[:, None, None, None])[:, :1, :1],
        "head": (gate * (torch.arange(heads) % 2)[:, None, None])[:1, :, :1]}[gates]
    return [q, k, v, gate]


def call(spec: Spec, schedule: str, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    q, k, v, gate = given
    own = {"gate": gate if spec.operand("gate").dtype == E.FLOAT else gate == 0,
           "slopes": torch.rand(1, q.shape[1], 1, 1),
           "keep": torch.rand(q.shape[0], 1, 1, k.shape[-2]) < 0.7}
    operands = [own[o.slot] for o in spec.operands]
    with torch.no_grad():
        exact = [t.double() if t.is_floating_point() else t for t in (q, k, v, *operands)]
        return bind(str(spec), schedule)(q, k, v, *operands), reference(
            spec)(*exact[:3], exact[3:])


@pytest.mark.parametrize("gates", GATES)
@pytest.mark.parametrize("name", SPECS)
def test_wanted_rows_are_as_in_the_reference(name: str, gates: str) -> None:
    found, exact = call(SPECS[name], str(Schedule("aten:dense")), inputs(gates))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lead, kv_heads, queries", [((1, 4), 1, 5), ((3, 1), 1, 1), ((0, 2), 2, 6),
                                                     ((2, 6), 6, 0)])
def test_awkward_shapes(lead: tuple[int, int], kv_heads: int, queries: int) -> None:
    given = inputs("some", lead, kv_heads, queries)
    found, exact = call(SPECS["causal"], "", given)
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_generated_kernel(name: str) -> None:
    for gates in GATES:
        found, exact = call(SPECS[name], str(Schedule("cpp")), inputs(gates, queries=150, keys=150))
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def rows_seen(monkeypatch: pytest.MonkeyPatch, spec: Spec, given: list[torch.Tensor]) -> list[int]:
    seen: list[int] = []
    made = gated_rows.Gated(spec, Schedule(""), lambda *_: given[0], lambda text, _: (
        lambda q, k, v, *_: seen.append(math.prod(q.shape[:-1])) or torch.zeros(
            *q.shape[:-1], v.shape[-1])))
    made(*given)
    return seen


def test_only_wanted_rows_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs("whole_heads")
    seen = rows_seen(monkeypatch, SCALED, given)
    wanted = int((given[3] != 0).sum())
    assert wanted <= sum(seen) < wanted * 1.4 and len(seen) >= 2
    assert rows_seen(monkeypatch, SCALED, inputs("all")) == []
    assert rows_seen(monkeypatch, SCALED, inputs("none")) == []


def test_rows_without_keys_keep_their_nan() -> None:
    """0 * NaN is NaN: a product is not skipped where a row may be empty."""
    assert gated_rows.gates_of(SCALED.with_(mask=Band(E.const(-3), E.const(-1)))) == ()
    biased = SCALED.with_([Operand("bias", ("q", "k"), E.FLOAT, "bias")],
                          logits=E.score + E.load("bias"))
    q, k, v, gate = inputs("some", (2, 4))
    bias = torch.zeros(37, 41)
    run = bind(str(biased), "")
    wanted = run.wanted(q, k, v, {"gate": gate, "bias": bias})
    assert wanted is not None
    bias[3] = -math.inf
    assert run.wanted(q, k, v, {"gate": gate, "bias": bias}) is None
    gate[:] = torch.arange(37)[:, None] > 20
    assert run(q, k, v, gate, bias)[:, :, 3].isnan().all()


def test_gradients_reach_the_gate() -> None:
    given = [t.double().requires_grad_() for t in inputs("some", (1, 2), 2, 5, 5)]
    torch.autograd.gradcheck(lambda *t: bind(str(SCALED), "")(*t), given)


def test_other_gates_are_no_reason_to_look() -> None:
    other = Spec(output=E.out * GATE, operands=(Operand("gate", ("b", "h", "q")),))
    assert gated_rows.gates_of(other) == ()
    assert gated_rows.gates_of(SCALED.with_(dropout=0.1)) == ()
    assert gated_rows.gates_of(SCALED) == (("gate", True),)
