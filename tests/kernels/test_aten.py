"""The ATen lowerings against the float64 reference: values, gradients, lengths, layouts."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal, KeyKeep
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels import reference
from attnopt.kernels.aten.heads import collapse
from attnopt.kernels.bind import bind
from tests.kernels.cases import (
    CASES,
    PAD,
    SCHEDULES,
    B,
    D,
    H,
    K,
    Q,
    check,
    close,
    inputs,
    operands_of,
    s,
    tanh,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_every_case(case: str, schedule: str, dtype: torch.dtype) -> None:
    spec = CASES[case]
    operands = [t.to(dtype) if t.is_floating_point() else t for t in operands_of(spec)]
    check(spec, inputs(dtype=dtype), operands, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", ["chosen", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, schedule: str) -> None:
    spec = CASES[case]
    given = [t.requires_grad_() for t in inputs()]
    operands = [t.requires_grad_() if t.is_floating_point() else t for t in operands_of(spec)]
    leaves = [t for t in (*given, *operands) if t.requires_grad]
    used = [t for t in leaves if spec.score != "key" or t is not given[0] and t is not given[1]]
    ahead = torch.randn(B, H, Q, D)

    def gradients(out: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, of, ahead.to(out.dtype))

    found = gradients(bind(str(spec), SCHEDULES[schedule])(*given, *operands), used)
    composed = gradients(reference(spec)(*given, operands), used)
    twins = {id(t): t.detach().double().requires_grad_() for t in leaves}
    exact = gradients(
        reference(spec)(*(twins[id(t)] for t in given), [twins.get(id(t), t) for t in operands]),
        [twins[id(t)] for t in used])
    for parts in zip(found, exact, composed, strict=True):
        close(*parts)


@pytest.mark.parametrize("case", ["plain", "causal", "bias", "padding and causal", "gate",
                                  "softcap and sink", "statistics", "talking heads"])
def test_gradcheck_twice(case: str) -> None:
    spec = CASES[case]
    run = bind(str(spec))
    given = [torch.randn(1, H, n, 2, dtype=torch.float64, requires_grad=True) for n in (Q, K, K)]
    operands = [t.double().requires_grad_() if t.is_floating_point() else t[:1]
                for t in operands_of(spec)]
    if case == "gate":
        operands[0] = operands[0].detach()[:1].requires_grad_()
    assert torch.autograd.gradcheck(run, (*given, *operands))
    assert torch.autograd.gradgradcheck(run, (*given, *operands))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", ["plain", "padding", "padding and causal", "softcap", "sink"])
@pytest.mark.parametrize("batch, rows, keys, dim", [
    (0, 5, 7, 8), (1, 1, 1, 1), (1, 3, 3, 3), (2, 0, 7, 8), (2, 5, 0, 8), (1, 130, 129, 5),
    (3, 1, 300, 4), (1, 16, 16, 16)])
def test_lengths(case: str, schedule: str, batch: int, rows: int, keys: int, dim: int) -> None:
    spec = CASES[case]
    given = [torch.randn(batch, H, n, dim) for n in (rows, keys, keys)]
    operands = {"padding": [torch.rand(batch, 1, 1, keys) < 0.7],
                "padding and causal": [torch.rand(batch, 1, 1, keys) < 0.7],
                "sink": [torch.randn(H, 1, 1)]}.get(case, [])
    check(spec, given, operands, SCHEDULES[schedule])


@pytest.mark.parametrize("value_dim", [4, 8, 12, 40])
@pytest.mark.parametrize("case", ["plain", "causal", "softcap", "sink", "gate"])
def test_a_value_dim_of_its_own(case: str, value_dim: int) -> None:
    query, key, _ = inputs()
    given = [query, key, torch.randn(B, H, K, value_dim)]
    check(CASES[case], given, operands_of(CASES[case]))
    if case in ("plain", "causal"):
        run = bind(str(CASES[case]))
        for t in given:
            t.requires_grad_()
        assert torch.equal(run(*given).detach(), run(*(t.detach() for t in given)))


# -- layouts --------------------------------------------------------------------------------------
def strided(layout: str) -> list[Tensor]:
    query, key, value = inputs()
    match layout:
        case "heads last":
            return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
        case "transposed":
            return [t.mT.contiguous().mT for t in (query, key, value)]
        case "every second":
            return [torch.randn(B, H, t.shape[2], 2 * D)[..., ::2] for t in (query, key, value)]
        case "one key head":
            return [query, *(t[:, :1].expand(B, H, K, D) for t in (key, value))]
        case "key batch of one":
            return [query, key[:1].expand(B, H, K, D), value]
        case "broadcast":
            return [query[:1], key, value[:, :1]]
        case "query of one row":
            return [query[..., :1, :].expand(B, H, Q, D), key, value]
    raise ValueError(layout)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", ["plain", "bias", "softcap, padding and causal", "sink"])
@pytest.mark.parametrize("layout", ["heads last", "transposed", "every second", "one key head",
                                    "key batch of one", "broadcast", "query of one row"])
def test_strides(layout: str, case: str, schedule: str) -> None:
    spec = CASES[case]
    given, operands = strided(layout), operands_of(spec)
    check(spec, given, operands, SCHEDULES[schedule])
    for t in given:
        t.requires_grad_()
    check(spec, given, operands, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("leads, shared", [
    ((), 0), ((3,), 0), ((2, 3), 1), ((2, 3, 4), 0), ((2, 3, 4), 1), ((2, 3, 4), 2),
    ((2, 1, 3, 2), 1), ((1, 2, 2, 3), 0)])
def test_leading_axes(leads: tuple[int, ...], shared: int, schedule: str) -> None:
    """shared: counted from the right, the axis along which keys and values have length 1."""
    own = tuple(1 if shared and i == len(leads) - shared else n for i, n in enumerate(leads))
    given = [torch.randn(*lead, n, D) for lead, n in ((leads, Q), (own, K), (own, K))]
    bias = Operand("bias", ("h", "q", "k"), role="bias")
    for spec, operands in (
            (CASES["plain"], []), (CASES["softcap"], []),
            (Spec(logits=s * 0.3 + E.load("bias"), operands=(bias,)),
             [torch.randn(*leads[-1:], Q, K)]),
            (Spec(logits=tanh, mask=KeyKeep("pad") & Causal(), operands=(PAD,)),
             [(torch.rand(*leads[:1], *[1] * max(len(leads) - 1, 0), 1, K) < 0.6)
              .index_fill(-1, torch.tensor(0), True)])):
        check(spec, given, operands, SCHEDULES[schedule])
        check(spec, [t.clone().requires_grad_() for t in given], operands, SCHEDULES[schedule])


@pytest.mark.parametrize("mask", [(1, 4, 1), (2, 4, 3), (2, 1, 3), (1, 1, 3), (2, 1, 1)])
def test_masks_of_windows_are_not_written_out_more_than_needed(mask: tuple[int, ...]) -> None:
    given = [torch.randn(2, 4, 3, n, D) for n in (Q, K, K)]
    bias = torch.randn(*mask, Q, K)
    four = collapse(*given, bias)
    whole = torch.softmax(given[0] @ given[1].mT + bias, -1) @ given[2]
    small = torch.softmax(four[0] @ four[1].mT + four[3], -1) @ four[2]
    torch.testing.assert_close(small.view_as(whole), whole)
    full = [n == m for n, m in zip(mask, (2, 4, 3), strict=True)]
    if full in ([False, True, True], [True, True, False], [True, True, True]) or sum(full) == 1:
        assert four[3] is not None and four[3].numel() <= bias.numel() * 3
