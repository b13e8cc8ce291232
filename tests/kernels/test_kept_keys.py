"""Keys that are kept for all rows are gathered: every form as its float64 reference."""

from __future__ import annotations

import math

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal, Where
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import aten, kept_keys, living_keys, reference
from attnopt.kernels.bind import bind

KEEP = Operand("keep", ("b", "h", "k"), E.BOOL, "mask")
BIAS = Operand("bias", ("b", "h", "k"), E.FLOAT, "bias")
SEEN, ADDED = E.load("keep", dtype=E.BOOL), E.load("bias")
Q, K = E.index("q"), E.index("k")
LOW = torch.finfo(torch.float32).min
SPECS = {
    "mask": Spec(mask=Where(SEEN), operands=(KEEP,), empty_row="zero"),
    "causal": Spec(mask=Causal() & Where(SEEN), operands=(KEEP,)),
    "dropped": Spec(mask=Where(~SEEN) & Band(E.const(-40), E.const(9)), operands=(KEEP,)),
    "bias": Spec(logits=E.score + ADDED, operands=(BIAS,)),
    "causal_bias": Spec(logits=E.score * 0.5 + ADDED, mask=Causal(), operands=(BIAS,)),
    "low": Spec(logits=E.where(SEEN & (K <= Q), E.score + ADDED, LOW), operands=(KEEP, BIAS)),
    "low_everywhere": Spec(logits=E.where(SEEN, E.score, LOW), operands=(KEEP,)),
    "infinite": Spec(logits=E.where(SEEN & (K <= Q + 3), E.score, -math.inf), operands=(KEEP,)),
}
OTHERS = {
    "by_row": Spec(mask=Where(SEEN), operands=(Operand("keep", ("q", "k"), E.BOOL, "mask"),)),
    "by_index": Spec(mask=Where((K % 3).eq(0))),
    "either": Spec(mask=Where(SEEN | (K <= Q)), operands=(KEEP,)),
    "low_and_a_mask": Spec(logits=E.where(SEEN, E.score, LOW), mask=Causal(), operands=(KEEP,)),
    "uniform": Spec(mask=Where(SEEN), operands=(KEEP,), empty_row="uniform"),
    "dropout": Spec(mask=Where(SEEN), operands=(KEEP,), dropout=0.5),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(living_keys, "ROWS", 16)
    monkeypatch.setattr(kept_keys, "TILE", 8)


def inputs(kept: str, lead=(2, 3), heads=3, queries=83, keys=90) -> list[torch.Tensor]:
    q = torch.randn(*lead, queries, 8)
    k, v = (torch.randn(lead[0], heads, keys, 8) for _ in range(2))
    share = {"few": 0.15, "none": 0.0, "all": 1.0, "late": 0.3}[kept]
    keep = torch.rand(lead[0], heads, 1, keys) < share
    if kept == "late":
        keep &= torch.arange(keys) > 30
    return [q, k, v, keep]


def call(spec: Spec, run, given: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v, keep = given
    own = {"keep": ~keep if spec is SPECS["dropped"] else keep}
    added = torch.randn(keep.shape)
    own["bias"] = added if "keep" in spec.slots else added.masked_fill(~keep, -math.inf)
    operands = [own[o.slot] for o in spec.operands]
    exact = [t.double() if t.is_floating_point() else t for t in (q, k, v, *operands)]
    return run(q, k, v, *operands), reference(spec)(*exact[:3], exact[3:])


def keeping(spec: Spec, seen: list[int] | None = None) -> kept_keys.Keeping:
    def made(text: str, schedule: str):
        def run(q, k, v, *more):
            if seen is not None:
                seen.append(k.shape[-2])
            return aten.bind(text, "")(q, k, v, *more)
        return run
    return kept_keys.Keeping(spec, ("", ""), "", aten.bind(str(spec)), made)


@pytest.mark.parametrize("kept", ["few", "late", "none", "all"])
@pytest.mark.parametrize("name", SPECS)
def test_as_in_the_reference(name: str, kept: str) -> None:
    seen: list[int] = []
    found, exact = call(SPECS[name], keeping(SPECS[name], seen), inputs(kept))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert not seen if kept == "all" else seen or kept == "none"
    if kept == "few":
        assert min(seen) <= 30


@pytest.mark.parametrize("lead, heads, queries, keys", [
    ((1, 4), 1, 40, 90), ((0, 2), 2, 40, 90), ((2, 2), 2, 0, 90), ((2, 2), 2, 33, 31)])
def test_awkward_shapes(lead, heads, queries, keys) -> None:
    spec = SPECS["causal"]
    found, exact = call(spec, keeping(spec), inputs("few", lead, heads, queries, keys))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", OTHERS)
def test_other_masks_are_computed_as_they_are(name: str) -> None:
    assert kept_keys.kept_of(OTHERS[name]) is None


def test_keys_in_a_row_are_left_to_the_tiles() -> None:
    given = inputs("few")
    given[3] = (torch.arange(90) < 20).expand(2, 3, 1, 90)
    seen: list[int] = []
    call(SPECS["mask"], keeping(SPECS["mask"], seen), given)
    assert not seen


@pytest.mark.parametrize("low", [-math.inf, LOW, -2e9])
def test_kept_keys_that_a_bias_hides_beside_a_finite_fill(low: float) -> None:
    """The keys that are not kept have the larger logits then."""
    spec = Spec(logits=E.where(SEEN, E.score + ADDED, -1e9), operands=(KEEP, BIAS))
    q, k, v, keep = inputs("few")
    for bias in (torch.zeros(keep.shape), torch.zeros(keep.shape).masked_fill(keep, low)):
        found = keeping(spec)(q, k, v, keep, bias)
        torch.testing.assert_close(found, aten.bind(str(spec))(q, k, v, keep, bias))


def test_gradients() -> None:
    q, k, v, keep = inputs("few", (1, 1), 1, 33, 34)
    run = keeping(SPECS["low"])
    given = [t.double().requires_grad_() for t in (q, k, v, torch.randn(keep.shape))]
    torch.autograd.gradcheck(lambda q, k, v, bias: run(q, k, v, keep, bias), given)


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_generated_kernel(name: str) -> None:
    run = bind(str(SPECS[name]), str(Schedule("cpp")))
    assert isinstance(run, kept_keys.Keeping)
    for kept in ("few", "late", "none"):
        found, exact = call(SPECS[name], run, inputs(kept, queries=150, keys=140))
        torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4, equal_nan=True)
