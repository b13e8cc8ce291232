"""Gradients by blocks of query rows: those of the reference, twice differentiable, nothing kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import reference
from attnopt.kernels.aten import rows
from attnopt.kernels.bind import bind
from tests.kernels.cases import (
    BIAS,
    CASES,
    GATE,
    B,
    D,
    H,
    K,
    Q,
    close,
    doubled,
    inputs,
    operands_of,
    s,
    tanh,
)
from tests.kernels.test_aten_rows import empty_rows

BLOCKS = str(Schedule("aten:blocks"))
VALUES = Spec(logits=s * 0.3 + E.load("bias"), mask=Causal(),
              output=E.out * E.load("gate") + E.value, operands=(BIAS, GATE))


@pytest.fixture(autouse=True)
def by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of two rows, however small the scores are."""
    monkeypatch.setattr(rows, "LEAST_BYTES", 0)
    monkeypatch.setattr(rows, "LEAST_ROWS", 1)
    monkeypatch.setattr(rows, "MOST_ROWS", 2)


def in_rows(out: Tensor) -> bool:
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [parent for parent, _ in node.next_functions]
    return any(type(node).__name__ == "_RowsBackward" for node in seen)


def check(spec: Spec, given: list[Tensor], operands: list[Tensor], taken: bool = True) -> None:
    """Output and gradients are as near to float64 as those of the composition."""
    leaves = [t.detach().requires_grad_() if t.is_floating_point() else t
              for t in (*given, *operands)]
    ahead = torch.randn(reference(spec)(*given, operands).shape)
    found, truth, composed = [], [], []
    for into, kind in ((found, "bound"), (truth, "exact"), (composed, "composed")):
        mine = doubled(leaves) if kind == "exact" else leaves
        mine = [t.detach().requires_grad_() if t.is_floating_point() else t for t in mine]
        out = bind(str(spec), BLOCKS)(*mine) if kind == "bound" else (
            reference(spec)(*mine[:3], mine[3:]))
        if kind == "bound" and taken:
            assert in_rows(out)
        wanted = [t for t in mine if t.requires_grad]
        into += [out.detach(), *torch.autograd.grad(
            out, wanted, ahead.to(out.dtype), allow_unused=True, materialize_grads=True)]
    for ours, right, theirs in zip(found, truth, composed, strict=True):
        assert ours.dtype == theirs.dtype or ours.dtype == given[0].dtype
        largest = right.nan_to_num(0.0, 0.0, 0.0).abs().max().item() if right.numel() else 0.0
        if theirs.isnan().any() or right.isnan().any():
            continue  # what a row without a key gives is compared where it is defined
        off, own = ((t.double() - right).abs().max().item() if t.numel() else 0.0
                    for t in (ours, theirs))
        assert off <= max(2 * own, 64 * torch.finfo(ours.dtype).eps * largest)


@pytest.mark.parametrize("case", [c for c in CASES if c != "talking heads"])
def test_every_case(case: str) -> None:
    spec = CASES[case]
    check(spec, inputs(), operands_of(spec), taken=False)


@pytest.mark.parametrize("spec", [VALUES, CASES["talking heads"], CASES["softcap and sink"],
                                  CASES["low rank"], CASES["bias of a table"]])
def test_blocks_are_taken(spec: Spec) -> None:
    given = inputs()
    if spec is VALUES:  # as many rows as keys
        given[0] = torch.randn(B, H, K, D)
        check(spec, given, [torch.randn(H, K, K), torch.randn(B, H, K, 1)])
    else:
        check(spec, given, operands_of(spec))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    spec = CASES["softcap and sink"]
    check(spec, inputs(dtype=dtype), [t.to(dtype) for t in operands_of(spec)])


@pytest.mark.parametrize("case", list(empty_rows()))
def test_rows_without_a_key(case: str) -> None:
    spec, operands = empty_rows()[case]
    given = [t.requires_grad_() for t in inputs()]
    out = bind(str(spec), BLOCKS)(*given, *operands)
    close(out, reference(spec)(*doubled(given), doubled(operands)), reference(spec)(
        *given, operands))
    grads = torch.autograd.grad(out.nan_to_num(0.0).sum(), given)
    if spec.empty_row != "nan":
        assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("leads", [((B, H), (B, 1), (B, 1)), ((B, H), (1, 1), (1, H)),
                                   ((H,), (H,), (H,)), ((1, 1), (B, H), (B, H))])
def test_leading_axes_broadcast(leads: tuple[tuple[int, ...], ...]) -> None:
    given = [torch.randn(*lead, n, D) for lead, n in zip(leads, (Q, K, K), strict=True)]
    check(CASES["softcap"], given, [])


def test_expanded_and_permuted_inputs() -> None:
    query = torch.randn(B, Q, H, D).transpose(1, 2)
    key, value = (torch.randn(B, 1, D, K).mT.expand(-1, H, -1, -1) for _ in range(2))
    check(CASES["softcap"], [query, key, value], [])


def test_a_gradient_of_the_gradient() -> None:
    spec = Spec(logits=tanh + E.load("bias"), mask=Causal(), operands=(BIAS,))
    given = [t.double().requires_grad_() for t in (*inputs(), torch.randn(H, Q, K))]
    run = bind(str(spec), BLOCKS)
    assert in_rows(run(*given))
    assert torch.autograd.gradgradcheck(run, given)


def test_only_what_is_wanted() -> None:
    spec = CASES["softcap and sink"]
    query, key, value = inputs()
    bias, sink = operands_of(spec)
    out = bind(str(spec), BLOCKS)(query, key, value, bias.requires_grad_(), sink)
    (grad,) = torch.autograd.grad(out.sum(), [bias])
    assert grad.shape == bias.shape and key.grad is None


@pytest.mark.parametrize("sizes", [(0, 2, 5, 7), (1, 2, 1, 1), (2, 3, 5, 0), (2, 3, 0, 7)])
def test_odd_lengths(sizes: tuple[int, int, int, int]) -> None:
    batch, heads, queries, keys = sizes
    given = [torch.randn(batch, heads, n, D) for n in (queries, keys, keys)]
    check(Spec(logits=tanh, mask=Causal()), given, [], taken=False)


def test_dropout_is_drawn_once() -> None:
    spec = Spec(logits=s * 0.3, dropout=0.5)
    assert not rows.block_rows(spec, *inputs())


def test_the_dense_schedule_stays_dense() -> None:
    given = [t.requires_grad_() for t in inputs()]
    assert not in_rows(bind(str(CASES["softcap"]), str(Schedule("aten:dense")))(*given))


def test_nothing_of_queries_times_keys_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MOST_ROWS", 16)
    n, heads = 1024, 4
    table = Operand("table", None, role="table")
    spec = Spec(logits=tanh + E.load("table", E.index("h"), E.index("q") - E.index("k") + n),
                operands=(table,))
    given = [torch.randn(1, heads, n, D, requires_grad=True) for _ in range(3)]
    given.append(torch.randn(heads, 2 * n, requires_grad=True))
    run = bind(str(spec), BLOCKS)
    run(*given).sum().backward()
    with torch.profiler.profile(profile_memory=True) as profile:
        run(*given).sum().backward()
    assert max(e.self_cpu_memory_usage for e in profile.events()) < 4 * heads * n * n // 2
