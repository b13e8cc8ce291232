"""Every operation in Triton means what `attnopt.ir.evaluate` says."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from tests.kernels.triton.elementwise import run

s, q, k = E.score, E.index("q"), E.index("k")
Q, K = 8, 16
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.7, -3.7, 40.5, 100.0, -100.0,
           1e-30, -1e-30, 1e-4, -1e-4, 1e10, -1e10, math.inf, -math.inf, math.nan]
AXES: dict[str, tuple[str, ...] | None] = {
    "bias": ("q", "k"), "column": ("k",), "row": ("q",), "number": (), "ids": ("k",),
    "far": ("k",), "keep": ("k",), "table": None, "flags": None}
UNARY = ("neg", "abs", "exp", "exp2", "log", "log1p", "sqrt", "rsqrt", "tanh", "sigmoid",
         "softplus", "relu", "cos", "sin", "sign", "erf", "round", "isnan", "bool")
BINARY = ("add", "sub", "mul", "div", "minimum", "maximum", "lt", "le", "eq", "ne", "floordiv",
          "mod")
INTEGER = ("add", "sub", "mul", "minimum", "maximum", "floordiv", "mod", "lt", "le", "eq", "ne")


def scores() -> torch.Tensor:
    x = torch.randn(Q * K) * 3
    x[: len(SPECIAL)] = torch.tensor(SPECIAL)
    return x[torch.randperm(Q * K)].view(Q, K)


def operands() -> dict[str, torch.Tensor]:
    return {
        "bias": scores(), "column": scores()[:1], "row": scores()[:, :1],
        "number": torch.tensor([[-1.7]]), "ids": torch.randint(-9, 9, (1, K), dtype=torch.int32),
        "far": torch.randint(-(1 << 40), 1 << 40, (1, K)), "keep": torch.rand(1, K) < 0.5,
        "table": torch.randn(5, 7), "flags": torch.rand(6) < 0.5}


def agree(expr: E.Expr, wide: bool = False, score: torch.Tensor | None = None) -> None:
    score, given = scores() if score is None else score, operands()
    expected = torch.as_tensor(evaluate(expr, Env((Q, K), given, {s: score})))
    found = run(expr, score, given, AXES, wide)
    expected = expected.expand(Q, K).to(found.dtype)
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=1e-30, equal_nan=True)


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    small = scores().clamp(-80, 80) if name in ("cos", "sin") else None
    agree(E.call(name, s), score=small)


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    agree(E.call(name, s, E.load("bias")))
    for number in (2.5, -2.5):
        agree(E.call(name, s, number))
    agree(E.call(name, 1.5, E.load("column")))


@pytest.mark.slow
@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("wide", (False, True))
def test_integers_of_both_signs(name: str, wide: bool) -> None:
    values = [q - k, k - q * 3 - 7, E.const(-7), E.const(8), E.const(3), E.const(-5),
              E.load("ids", dtype=E.INT) * 2 + 1]
    for a, b in itertools.product(values[:2] + values[6:], values):
        agree(E.call(name, a, E.where(b.eq(0), 1, b)), wide)
    if name in ("floordiv", "mod"):
        for n in (1, 2, 3, 4, 7, 8, 64):
            agree(E.call(name, q - k * 5, n), wide)
            agree(E.call(name, q + k * 5, n), wide)
            agree(E.call(name, k * 5 - q, E.size("q")), wide)


def test_near_zero() -> None:
    x = torch.logspace(-20, 0, Q * K).view(Q, K)
    for name in ("tanh", "log1p", "softplus", "erf"):
        agree(E.call(name, s), score=x)
        agree(E.call(name, s), score=-x * 0.9)


@pytest.mark.parametrize("power", (2.0, 3.0, 4.0, 1.0, 0.5, -1.0, -2.0, 0.3, 0.0))
def test_powers(power: float) -> None:
    x = torch.randn(Q, K)
    x[0, :4] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    score = x if power == int(power) else x.abs()
    found = run(E.call("pow", s, power), score, {}, AXES)
    torch.testing.assert_close(found, score**power, rtol=2e-5, atol=0)


def test_powers_of_negative_numbers() -> None:
    x = torch.randn(Q, K)
    assert run(E.call("pow", s, 0.3), x, {}, AXES).isnan().equal(x < 0)


@pytest.mark.parametrize("wide", (False, True))
def test_casts(wide: bool) -> None:
    finite = torch.linspace(-70.3, 70.3, Q * K).view(Q, K)
    for op in ("int", "floor"):
        agree(E.call(op, s), wide, finite)
    agree(E.call("float", q - k), wide)
    agree(E.call("float", E.call("int", s < 0.0)), wide)
    agree(E.call("int", q < k) - E.call("int", k < 3), wide)


def test_truth() -> None:
    a, b, c = q < k, E.load("keep", dtype=E.BOOL), E.const(0.0) < s
    for expr in (a & b, a | c, a ^ b, ~c, a.eq(b), a.ne(c), E.where(b, ~a, c), ~(a & ~b) ^ c):
        agree(expr)


def test_where_does_not_mix_its_branches() -> None:
    agree(E.where(E.const(0.0) < s, E.call("log", s), E.load("bias")))
    agree(E.where(q < k, 1e-40, 2.0) * s)
    agree(E.where(E.load("keep", dtype=E.BOOL), s, -math.inf))
    agree(E.where(q < k, E.call("isnan", s), E.FALSE))


@pytest.mark.parametrize("wide", (False, True))
def test_loads(wide: bool) -> None:
    agree(s + E.load("bias") * E.load("column") - E.load("row") + E.load("number"), wide)
    agree(E.load("far", dtype=E.INT) + q, wide)
    agree(E.load("far", dtype=E.INT) < E.const(1 << 35), wide)
    agree(E.load("table", q - 2, k - q), wide)
    agree(E.load("table", E.const(1), E.load("ids", dtype=E.INT)), wide)
    agree(E.load("flags", E.call("abs", q - k), dtype=E.BOOL), wide)
    agree(E.load("table", E.call("int", E.load("flags", k, dtype=E.BOOL)), k % 7) * s, wide)


def test_wide_integers_do_not_overflow() -> None:
    agree((q * 1_000_003 + 5) * (k * 100_003 - 7), wide=True)


def test_what_python_cannot_compute() -> None:
    agree(E.where(q < k, E.call("div", 1.0, 0.0), s), score=torch.randn(Q, K))
    agree(s * E.call("log", -1.0))
    agree(s + 1e300)


LEAVES = st.sampled_from([s, E.load("bias"), E.load("column"), E.load("row"), E.const(0.3),
                          E.const(-2.0), E.call("float", q - k)])
WHOLE = st.sampled_from([q, k, E.const(3), E.const(-4), E.load("ids", dtype=E.INT), q - k])


def _integers() -> st.SearchStrategy[E.Expr]:
    def grow(inner: st.SearchStrategy[E.Expr]) -> st.SearchStrategy[E.Expr]:
        divisor = st.sampled_from([E.const(3), E.const(-5), E.const(8), E.size("k")])
        return st.one_of(
            st.builds(E.call, st.sampled_from(("add", "sub", "minimum", "maximum")), inner, inner),
            st.builds(E.call, st.sampled_from(("floordiv", "mod")), inner, divisor),
            st.builds(lambda a: E.call("abs", a), inner))
    return st.recursive(WHOLE, grow, max_leaves=6)


def _floats() -> st.SearchStrategy[E.Expr]:
    whole = _integers()

    def grow(inner: st.SearchStrategy[E.Expr]) -> st.SearchStrategy[E.Expr]:
        return st.one_of(
            st.builds(E.call, st.sampled_from(("add", "sub", "mul", "minimum", "maximum")), inner,
                      inner),
            st.builds(E.call, st.sampled_from(
                ("neg", "abs", "tanh", "sigmoid", "relu", "sign", "erf", "round")), inner),
            st.builds(lambda a, b, c, d: E.where(a < b, c, d), whole, whole, inner, inner),
            st.builds(lambda a, b, c: E.where(E.call("isnan", a) | (a < b), b, c), inner, inner,
                      inner),
            st.builds(lambda a: E.call("float", a), whole))
    return st.recursive(LEAVES, grow, max_leaves=12)


@pytest.mark.slow
@settings(max_examples=60, deadline=None, database=None, derandomize=True)
@given(_floats(), st.booleans(), st.integers(0, 1 << 20))
def test_random_expressions(expr: E.Expr, wide: bool, seed: int) -> None:
    """Against float64: an error may grow with the values, nan and inf must be the same."""
    torch.manual_seed(seed)
    score, given = scores(), operands()
    exact = torch.as_tensor(evaluate(expr, Env(
        (Q, K), {n: t.double() if t.is_floating_point() else t for n, t in given.items()},
        {s: score.double()}, dtype=torch.float64)), dtype=torch.float64).expand(Q, K)
    single = torch.as_tensor(
        evaluate(expr, Env((Q, K), given, {s: score})), dtype=torch.float32).expand(Q, K)
    found = run(expr, score, given, AXES, wide)
    # Where float32 itself is far from the truth there is nothing to compare.
    sound = (single.double() - exact).abs() <= 1e-5 * (1 + exact.abs())
    sound |= single.isnan() & exact.isnan() | (single.double() == exact)
    torch.testing.assert_close(
        found[sound].double(), exact[sound], rtol=1e-4, atol=1e-4, equal_nan=True)
