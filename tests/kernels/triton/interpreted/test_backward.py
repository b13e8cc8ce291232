"""Backward kernels in the interpreter, against autograd through the reference in float64."""

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.spec import Spec
from attnopt.kernels.reference import reference
from attnopt.kernels.triton import backward
from attnopt.kernels.triton.attention import Attention, bind
from attnopt.kernels.triton.tiles import Tile
from tests.kernels.triton.cases import CASES, Shape, check_gradients

LEARNED = [name for name, spec in CASES.items() if not backward.reasons(spec) and
           backward.kinds(spec, frozenset(o.slot for o in spec.operands if o.dtype == E.FLOAT), ())
           is not None]
QUICK = ("causal", "softcap and sink", "scale per key", "padding and bias", "value residual",
         "low rank", "key and causal")


def test_most_cases_are_here() -> None:
    assert len(LEARNED) >= 39


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LEARNED])
def test_case(name: str) -> None:
    spec = CASES[name].with_(empty_row="zero")
    shape = Shape(batch=1, heads=2, queries=37, keys=37 if E.value in spec.output.leaves else 35)
    check_gradients(spec, shape.inputs(torch.float32), shape.operands(spec, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("causal", "padding and bias", "softcap and sink", "alibi"))
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    spec, shape = CASES[name], Shape(batch=1, heads=2, queries=40, keys=40)
    check_gradients(spec, shape.inputs(dtype), shape.operands(spec, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("plain", "causal", "wide band", "prefix and band", "globals"))
@pytest.mark.parametrize("queries, keys", ((1, 33), (33, 2), (64, 64), (65, 97)))
def test_lengths(name: str, queries: int, keys: int) -> None:
    spec = CASES[name].with_(empty_row="zero")
    check_gradients(spec, Shape(1, 1, queries, keys).inputs(torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("plain", "causal", "scale per key", "bias"))
def test_grouped_queries(name: str) -> None:
    spec, shape = CASES[name], Shape(2, 3, 35, 37, key_heads=1)
    check_gradients(spec, shape.inputs(torch.float32), shape.operands(spec, torch.float32))


def test_leading_axes_broadcast() -> None:
    check_gradients(CASES["causal"], (
        torch.randn(1, 3, 20, 8), torch.randn(2, 1, 24, 8), torch.randn(24, 8)))
    check_gradients(CASES["plain"], [torch.randn(n, 8) for n in (20, 24, 24)])


@pytest.mark.slow
@pytest.mark.parametrize("head_dim, value_dim", ((3, 5), (40, 16), (24, 72)))
def test_head_dims(head_dim: int, value_dim: int) -> None:
    check_gradients(CASES["plain"], Shape(1, 1, 20, 24, head_dim, value_dim).inputs(torch.float32))


@pytest.mark.slow
def test_bias_along_fewer_axes() -> None:
    spec, shape = CASES["bias"], Shape(2, 3, 20, 24)
    for bias in (torch.randn(3, 20, 1), torch.randn(1, 1, 24), torch.randn(20, 24)):
        check_gradients(spec, shape.inputs(torch.float32), [bias])


def test_rows_without_a_key_have_no_gradient() -> None:
    spec = CASES["causal from a later row"]
    inputs = [t.requires_grad_() for t in Shape(1, 1, 45, 50).inputs(torch.float32)]
    out = Attention(spec, Tile(32, 16, 4, 1), Tile(32, 16, 4, 1))(*inputs)
    assert out is not None
    out.sum().backward()
    assert inputs[0].grad is not None and (inputs[0].grad[..., :20, :] == 0).all()


def test_second_derivatives_are_those_of_the_composition() -> None:
    spec = CASES["causal"]
    inputs = [t.requires_grad_() for t in Shape(1, 1, 20, 20).inputs(torch.float32)]
    exact = [t.detach().double().requires_grad_() for t in inputs]

    def second(out: torch.Tensor, given: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(out.square().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), given)

    for mine, theirs in zip(second(bind(str(spec))(*inputs), inputs),
                            second(reference(spec)(*exact), exact), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def test_what_is_not_asked_for_is_not_computed() -> None:
    query, key, value = Shape(1, 1, 20, 20).inputs(torch.float32)
    for wanted in (query, key, value):
        for tensor in (query, key, value):
            tensor.requires_grad_(tensor is wanted)
        out = bind(str(Spec(logits=E.score * 0.3)))(query, key, value)
        out.sum().backward()
        assert wanted.grad is not None
