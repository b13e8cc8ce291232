"""The log-sum-exp output, merging by it, and lists of query rows, on every lowering."""

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal
from attnopt.ir.spec import Spec
from attnopt.kernels import ops, reference
from attnopt.kernels.merging import bind_with_lse, merge
from attnopt.kernels.row_lists import attend_rows
from tests.kernels.cases import CASES, SCHEDULES, D, H, K, Q, close, doubled, inputs, operands_of, s

WITH_LSE = [c for c, spec in CASES.items() if not spec.mix_logits
            and spec.normalizer in ("softmax", "exp")]


@pytest.mark.parametrize("schedule", ["chosen", "cpp"])
@pytest.mark.parametrize("case", WITH_LSE)
def test_log_sum_exp(case: str, schedule: str) -> None:
    spec, given = CASES[case].with_(lse=True), inputs()
    operands = operands_of(spec)
    found, lse = bind_with_lse(str(spec), SCHEDULES[schedule])(*given, *operands)
    exact, exact_lse = reference(spec)(*doubled(given), doubled(operands), with_lse=True)
    composed = reference(spec)(*given, operands)
    close(found, exact, composed)
    assert lse.shape == exact_lse.shape
    torch.testing.assert_close(lse.double(), exact_lse, rtol=1e-5, atol=1e-5)


def test_the_op_gives_it_where_it_is_asked_for() -> None:
    given = inputs()
    plain = ops.attention(*given, [], str(CASES["plain"]))
    asked = ops.attention(*given, [], str(CASES["plain"].with_(lse=True)))
    torch.testing.assert_close(plain[0], asked[0])
    assert plain[1].numel() == 0 and asked[1].shape == given[0].shape[:-1]


@pytest.mark.parametrize("schedule", ["chosen", "cpp"])
def test_merged_parts_are_the_whole(schedule: str) -> None:
    spec = Spec(logits=s * 0.3, lse=True)
    query, key, value = inputs()
    run = bind_with_lse(str(spec), SCHEDULES[schedule])
    parts = [run(query, key[:, :, a:b], value[:, :, a:b]) for a, b in ((0, 2), (2, 3), (3, K))]
    out, lse = merge(*map(list, zip(*parts, strict=True)))
    whole, whole_lse = run(query, key, value)
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)


def test_a_part_without_a_key_takes_no_part() -> None:
    outs = [torch.randn(1, 2, 3), torch.full((1, 2, 3), torch.nan)]
    lses = [torch.zeros(1, 2), torch.full((1, 2), -torch.inf)]
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out, outs[0])
    assert lse.eq(0).all()
    with pytest.raises(ValueError, match="as many"):
        merge(outs, lses[:1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", [
    "plain", "causal", "aligned", "bias", "padding and causal", "gate", "alibi", "bias of a table",
    "sink", "softcap and sink"])
def test_listed_rows(case: str, schedule: str) -> None:
    spec, given = CASES[case], inputs()
    operands = operands_of(spec)
    rows = torch.tensor([4, 0, 2])
    whole = reference(spec)(*doubled(given), doubled(operands))
    exact = torch.zeros_like(whole).index_copy(-2, rows, whole.index_select(-2, rows))
    found = attend_rows(spec, SCHEDULES[schedule], rows, *given, operands)
    close(found, exact, reference(spec)(*given, operands))
    none = attend_rows(spec, SCHEDULES[schedule], rows[:0], *given, operands)
    assert none.shape == (given[0].shape[0], H, Q, D) and not none.any()


def test_listed_rows_have_gradients() -> None:
    spec = Spec(logits=s * 0.3, mask=Band(-2, 1))
    given = [t.double().requires_grad_() for t in inputs()]
    rows = torch.tensor([1, 3])
    assert torch.autograd.gradcheck(
        lambda *tensors: attend_rows(spec, "", rows, *tensors), tuple(given))
    with pytest.raises(ValueError, match="row q"):
        attend_rows(Spec(output=E.out + E.value, mask=Causal()), "", rows, *given)
