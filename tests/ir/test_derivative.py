"""The derivative of every operation is torch's own, by autograd through `evaluate`."""

import math

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.derivative import ZERO, depends, derivative
from attnopt.ir.evaluate import Env, evaluate

s, bias = E.score, E.load("bias")
SHAPE = (7, 9)
POSITIVE = ("log", "sqrt", "rsqrt")
UNARY = ("neg", "abs", "exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid",
         "softplus", "relu", "cos", "sin", "sign", "erf", "round")


def compare(expr: E.Expr, scores: torch.Tensor, added: torch.Tensor) -> None:
    scores, added = scores.requires_grad_(), added.requires_grad_()
    env = Env(SHAPE, {"bias": added}, {s: scores}, dtype=torch.float64)
    value = torch.as_tensor(evaluate(expr, env)).expand(SHAPE)
    for leaf, tensor in ((s, scores), (bias, added)):
        expected = torch.autograd.grad(value.sum(), tensor, retain_graph=True, allow_unused=True,
                                       materialize_grads=True)[0]
        found = torch.as_tensor(evaluate(derivative(expr, leaf), env), dtype=torch.float64)
        torch.testing.assert_close(found.detach().expand(SHAPE), expected, rtol=1e-12, atol=1e-12)


def draw(positive: bool = False) -> torch.Tensor:
    x = torch.randn(SHAPE, dtype=torch.float64) * 2
    return x.abs() + 0.1 if positive else x


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    x = draw(name in POSITIVE)
    if name == "log1p":
        x = x.clamp(min=-0.9)
    compare(E.call(name, s) * bias, x, draw())


def test_inside_of_a_chain() -> None:
    compare(E.call("tanh", E.call("sin", s * 0.3 + bias) * s), draw(), draw())


@pytest.mark.parametrize("expr", [
    s + bias, s - bias, bias - s, s * bias, s / (bias * bias + 1.0), 1.0 / (s * s + 1.0),
    E.call("minimum", s, bias), E.call("maximum", s, bias), E.call("maximum", s, 0.5),
    E.call("pow", E.call("abs", s), bias), E.call("pow", s, 2.0), E.call("pow", s, 3.0),
    E.call("mod", s, 1.7), E.where(s < bias, s * s, bias),
    E.where(E.index("q") < E.index("k"), s * 0.3, s * s - s),
    E.call("relu", s) * E.call("relu", s)],
    ids=str)
def test_two_leaves(expr: E.Expr) -> None:
    compare(expr, draw(), draw())


def test_corners_are_those_of_autograd() -> None:
    zeros = torch.zeros(SHAPE, dtype=torch.float64)
    for expr in (E.call("abs", s), E.call("relu", s), E.call("maximum", s, bias),
                 E.call("minimum", s, bias), E.call("maximum", s, 0.0)):
        compare(expr, zeros.clone(), zeros.clone())


def test_what_the_leaf_does_not_reach_has_none() -> None:
    assert derivative(bias * 2.0, s) is ZERO
    assert not depends(E.where(s < 0.0, 1.0, 2.0), s)
    assert derivative(s * (1 / math.sqrt(8)), s) is E.const(1 / math.sqrt(8))


def test_branch_that_is_not_taken_gives_nothing() -> None:
    # autograd has 0 * nan here
    expr = derivative(E.where(E.const(0.0) < s, E.call("sqrt", s), bias), s)
    scores = torch.tensor([-1.0, 4.0], dtype=torch.float64).view(1, 2)
    env = Env((1, 2), {"bias": scores}, {s: scores}, dtype=torch.float64)
    assert evaluate(expr, env).tolist() == [[0.0, 0.25]]


def test_leaf_must_be_a_float_leaf() -> None:
    for bad in (E.index("q"), s * 2.0, E.const(1.0)):
        with pytest.raises(ValueError, match="leaf must be"):
            derivative(s, bad)
