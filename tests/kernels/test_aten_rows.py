"""Rows without a key, numbers that are none, operands of other dtypes, dropout."""

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import Where
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels import reference
from attnopt.kernels.bind import bind
from tests.kernels.cases import (
    CASES,
    INF,
    SCHEDULES,
    B,
    D,
    H,
    K,
    Q,
    check,
    doubled,
    inputs,
    operands_of,
    s,
    tanh,
)


def empty_rows() -> dict[str, tuple[Spec, list[Tensor]]]:
    keep = torch.rand(B, 1, Q, K) < 0.5
    keep[0, :, 1] = False
    operand = Operand("keep", ("b", "q", "k"), E.BOOL, "mask")
    term = Operand("term", ("b", "q", "k"), role="mask")
    mask = Where(E.load("keep", dtype=E.BOOL))
    found = {}
    for row in ("nan", "zero", "uniform"):
        for name, logits in (("", s * 0.3), ("softcap ", tanh)):
            found[f"{name}{row}"] = (
                Spec(logits=logits, mask=mask, empty_row=row, operands=(operand,)), [keep])
    for name, fill in (("-inf", -INF), ("lowest", torch.finfo(torch.float32).min), ("-100", -100.0),
                       ("-1e9", -1e9)):
        for kind, logits in (("", s * 0.3), ("softcap ", tanh)):
            found[f"{kind}term {name}"] = (
                Spec(logits=logits + E.load("term"), operands=(term,)),
                [torch.zeros(B, 1, Q, K).masked_fill(~keep, fill)])
    return found


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", list(empty_rows()))
def test_rows_without_a_key(case: str, schedule: str, grad: bool) -> None:
    spec, operands = empty_rows()[case]
    given = [t.requires_grad_(grad) for t in inputs()]
    found = check(spec, given, operands, SCHEDULES[schedule])
    if grad and spec.empty_row != "nan":
        assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), given))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_is_what_fused_attention_gives(schedule: str) -> None:
    """A float mask of -inf hides keys, too, and F.scaled_dot_product_attention gives 0 there."""
    given, mask = inputs(), torch.zeros(B, 1, Q, K)
    mask[0, :, 1] = -INF
    spec = Spec(logits=s * 0.3 + E.load("term"), empty_row="zero",
                operands=(Operand("term", ("b", "q", "k"), role="mask"),))
    found = bind(str(spec), SCHEDULES[schedule])(*given, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(*given, mask, scale=0.3)
    torch.testing.assert_close(found, expected)
    assert found[0, :, 1].eq(0).all()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", ["plain", "causal", "padding", "bias", "softcap", "sink",
                                  "softcap, padding and causal", "sigmoid"])
@pytest.mark.parametrize("what, where, number", [
    ("query", 3, float("nan")), ("key", 0, float("nan")), ("value", 0, float("nan")),
    ("query", 3, INF), ("key", 0, INF), ("value", 0, INF)])
def test_numbers_that_are_none_are_not_lost(
        what: str, where: int, number: float, case: str, schedule: str, grad: bool) -> None:
    spec, given = CASES[case], inputs()
    given["query key value".split().index(what)][:, :, where] = number
    operands = operands_of(spec)
    for t in given:
        t.requires_grad_(grad)
    exact = reference(spec)(*doubled(given), doubled(operands))
    found = bind(str(spec), SCHEDULES[schedule])(*given, *operands)
    assert (found.isnan() == exact.isnan()).all()
    assert (found.isinf() == exact.isinf()).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows", [5, 200])
def test_a_query_of_nan_gives_nan(rows: int, schedule: str) -> None:
    """torch's flash kernel without a mask gives 0 there."""
    for spec in (CASES["plain"], CASES["causal"]):
        given = [torch.randn(1, 2, rows, D) for _ in range(3)]
        given[0][:, :, 3] = float("nan")
        found = bind(str(spec), SCHEDULES[schedule])(*given)
        assert found[:, :, 3].isnan().all() and not found[:, :, :3].isnan().any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("number", [float("nan"), INF, -INF])
def test_a_key_that_is_hidden_cannot_spoil_the_row(number: float, schedule: str) -> None:
    spec = CASES["softcap, padding and causal"]
    pad = torch.ones(B, 1, 1, K, dtype=torch.bool)
    pad[..., 2] = False
    given = inputs()
    given[1][:, :, 2] = number
    found = check(spec, given, [pad], SCHEDULES[schedule])
    assert found.isfinite().all()


# -- dtypes of operands, dropout ------------------------------------------------------------------
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_bias", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_bias_of_another_dtype(dtype: torch.dtype, of_bias: torch.dtype, schedule: str) -> None:
    for case in ("bias", "bias and causal"):
        spec, given = CASES[case], inputs(dtype=dtype)
        bias = torch.randn(H, Q, K).to(of_bias)
        exact = reference(spec)(*doubled(given), [bias.double()])
        found = bind(str(spec), SCHEDULES[schedule])(*given, bias)
        assert found.dtype == dtype
        bound = 8 * torch.finfo(dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= bound


def test_dropout_draws_as_torch_does() -> None:
    query, key, value = inputs()
    torch.manual_seed(3)
    weight = torch.dropout(torch.softmax(query @ key.mT * 0.3, -1), 0.4, True)
    torch.manual_seed(3)
    found = bind(str(Spec(logits=s * 0.3, dropout=0.4)))(query, key, value)
    torch.testing.assert_close(found, weight @ value)


def test_talking_heads_may_change_the_number_of_heads() -> None:
    mix = Operand("mix", None, role="mix")
    spec = Spec(logits=s * 0.3, mix_logits="mix", operands=(mix,))
    query, key, _ = inputs()
    check(spec, [query, key, torch.randn(B, 4, K, D)], [torch.randn(4, H)])
