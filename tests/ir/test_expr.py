"""Expr: types, simplification, text, replacement, and evaluation against Python's own meaning."""

import copy
import math
import operator
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr

q, k, h = E.index("q"), E.index("k"), E.index("h")

# -- random expressions ---------------------------------------------------------------------------
_ints = st.integers(-20, 20).map(E.const) | st.sampled_from(
    [q, k, h, E.size("q"), E.size("k"), E.load("ints", q, dtype=E.INT), E.stat("count")])
_floats = st.floats(width=32).map(E.const) | st.sampled_from(
    [E.score, E.weight, E.load("bias"), E.load("table", h, k), E.stat("lse"), E.inner("f", "g")])
_bools = st.booleans().map(E.const) | st.just(E.load("keep", dtype=E.BOOL))


def _grow(children: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def build(picked: tuple[str, Expr, Expr, Expr]) -> Expr:
        op, a, b, c = picked
        return E.call(op, *(a, b, c)[: E._ARITY.get(op, 2)])
    ops = sorted(E.OPS - set(E._LEAVES))
    return st.tuples(st.sampled_from(ops), children, children, children).map(build)


expressions = st.recursive(_ints | _floats | _bools, _grow, max_leaves=12)


# -- types ----------------------------------------------------------------------------------------
def test_types_are_promoted() -> None:
    assert (q + 1).dtype == E.INT and (q + 0.5).dtype == E.FLOAT and (q / 2).dtype == E.FLOAT
    assert (q // 2).dtype == E.INT and (E.score // 2).dtype == E.FLOAT
    assert (E.score % 2).dtype == E.FLOAT and (q % 2).dtype == E.INT
    keep = E.load("keep", dtype=E.BOOL)
    assert (keep + keep).dtype == E.INT and (keep * 1.0).dtype == E.FLOAT
    assert (q <= k).dtype == E.BOOL and (keep & q).dtype == E.BOOL and (~q).dtype == E.BOOL
    assert E.where(keep, q, 1.0).dtype == E.FLOAT and E.where(q, q, 1).dtype == E.INT
    assert E.call("floor", E.score).dtype == E.INT and E.call("exp", q).dtype == E.FLOAT


def test_equal_expressions_are_one_object() -> None:
    assert q + 1 is q + 1 and E.const(1) is not E.const(1.0) and E.const(1) is not E.const(True)
    assert E.const(math.nan) is E.const(math.nan) and E.const(0.0) is not E.const(-0.0)
    made = E.where(q < k, E.score * 2.0, E.load("bias", q, k))
    assert copy.deepcopy(made) is made and copy.copy(made) is made
    assert pickle.loads(pickle.dumps(made)) is made


def test_what_cannot_be_said_is_refused() -> None:
    for wrong in (lambda: E.index("x"), lambda: E.load("a b"), lambda: E.stat("mean"),
                  lambda: E.call("add", q), lambda: Expr("matmul")):
        with pytest.raises(ValueError):
            wrong()
    with pytest.raises(TypeError, match="truth"):
        bool(q < k)
    with pytest.raises(AttributeError, match="immutable"):
        q.value = "k"


# -- simplification -----------------------------------------------------------------------------
def test_neutral_elements_and_constants_vanish() -> None:
    keep = E.load("keep", dtype=E.BOOL)
    for made, expected in (
        (q + 0, q), (0 + q, q), (q * 1, q), (q // 1, q), (q % 1, E.const(0)), (q * 0, E.const(0)),
        (E.score + 0.0, E.score), (E.score * 1.0, E.score),
        (E.call("neg", -q), q), (~~keep, keep),
        (keep & True, keep), (keep & False, E.FALSE), (keep | True, E.TRUE), (keep | keep, keep),
        (E.where(True, q, k), q), (E.where(keep, q, q), q), (q <= q, E.TRUE), (q < q, E.FALSE),
        (E.const(7) // 2, E.const(3)), (E.const(-7) // 4, E.const(-2)),
        (E.const(-7) % 4, E.const(1)), (E.call("log", E.const(1)), E.const(0.0)),
    ):
        assert made is expected, (made, expected)
    # nan and inf make these no identities
    assert E.score * 0.0 is not E.const(0.0) and E.score.eq(E.score) is not E.TRUE
    assert E.score // 1.0 is not E.score


def test_constants_with_no_value_stay() -> None:
    for made in (E.const(1) // 0, E.const(1.0) / 0, E.call("log", E.const(0.0)),
                 E.call("pow", E.const(-1.0), 0.5), E.call("exp", E.const(1e4))):
        assert made.op != "const"
    found = evaluate(E.const(1.0) / 0, Env(()))
    assert math.isinf(found) and math.isnan(evaluate(E.call("pow", E.const(-1.0), 0.5), Env(())))


def test_replace_and_queries() -> None:
    made = E.where(q < k, E.load("table", E.load("ids", q, dtype=E.INT)), E.inner("f", "g"))
    assert made.slots == {"table", "ids", "f", "g"} and made.indices == {"q", "k"}
    assert made.has("where") and made.has("inner") and not made.has("score")
    assert made.replace({q: k}).op != "where"  # k < k is false
    assert (q + 1).replace({q: q + 1}) is q + 1 + 1
    assert made.replace(lambda e: E.const(0.0) if e.op == "inner" else None).args[2].value == 0.0


# -- text -----------------------------------------------------------------------------------------
@settings(max_examples=150)
@given(expressions)
def test_text_is_read_back_as_the_same_object(made: Expr) -> None:
    assert E.parse(str(made)) is made


@pytest.mark.parametrize("text", ["", "(", ")", "(add q", "(add q k) q", "(foo q)", "(add q)",
                                  "(inner f)", "(load)", "what", "(score q)", "#x", "@mean"])
def test_text_that_is_no_expression_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        E.parse(text)


# -- evaluation -----------------------------------------------------------------------------------
_PYTHON: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "neg": operator.neg, "abs": abs,
    "lt": operator.lt, "le": operator.le, "eq": operator.eq, "ne": operator.ne,
    "minimum": lambda a, b: math.nan if a != a or b != b else min(a, b),
    "maximum": lambda a, b: math.nan if a != a or b != b else max(a, b),
    "where": lambda a, b: b if a > b else a, "relu": lambda a: a if a != a else max(a, 0.0),
    "sign": lambda a: float((a > 0) - (a < 0)), "isnan": lambda a: a != a,
}
_numbers = st.floats(width=32) | st.integers(-50, 50).map(float)


def _agree(op: str, arguments: tuple[Any, ...]) -> None:
    try:
        expected = _PYTHON[op](*arguments)
    except (ZeroDivisionError, OverflowError):
        return
    kind, dtype = (E.INT, torch.int64) if isinstance(arguments[0], int) else (
        E.FLOAT, torch.float64)
    leaves = [E.load(f"x{i}", dtype=kind) for i in range(len(arguments))]
    made = E.where(leaves[0] > leaves[1], leaves[1], leaves[0]) if op == "where" else E.call(
        op, *leaves)
    constants = [E.const(a) for a in arguments]
    folded = made.replace(dict(zip(leaves, constants, strict=True)))
    operands = {f"x{i}": torch.tensor([a], dtype=dtype) for i, a in enumerate(arguments)}
    mixed = made.replace({leaves[-1]: constants[-1]})
    for form in (made, folded, mixed):
        found = evaluate(form, Env((1, 1), operands, dtype=torch.float64))
        found = found.item() if torch.is_tensor(found) else found
        assert found == expected or found != found and expected != expected, (form, expected)


@settings(max_examples=400)
@given(st.sampled_from(["add", "sub", "mul", "floordiv", "mod", "lt", "le", "eq", "ne", "minimum",
                        "maximum", "where", "div"]),
       st.integers(-50, 50), st.integers(-50, 50))
def test_ints_mean_what_python_means(op: str, a: int, b: int) -> None:
    _agree(op, (a, b))


@settings(max_examples=400)
@given(st.sampled_from(["add", "sub", "mul", "lt", "le", "eq", "ne", "minimum", "maximum", "where",
                        "div"]), _numbers, _numbers)
def test_floats_mean_what_python_means(op: str, a: float, b: float) -> None:
    _agree(op, (a, b))


@settings(max_examples=100)
@given(st.sampled_from(["neg", "abs", "relu", "sign", "isnan"]), _numbers)
def test_functions_of_one_float(op: str, a: float) -> None:
    _agree(op, (a,))


@pytest.mark.parametrize("a", [-7, -4, -1, 0, 3, 7])
@pytest.mark.parametrize("b", [-4, -3, 2, 5])
def test_division_floors_for_both_signs(a: int, b: int) -> None:
    _agree("floordiv", (a, b))
    _agree("mod", (a, b))
    _agree("floordiv", (float(a), float(b)))
    _agree("mod", (float(a), float(b)))


@pytest.mark.parametrize("x", [-800.0, -30.0, 0.0, 0.3, 20.5, 39.0, 45.0, 900.0, math.inf])
def test_softplus_and_sigmoid_have_no_threshold_and_no_overflow(x: float) -> None:
    env = Env((1, 1), {"x": torch.tensor([x], dtype=torch.float64)}, dtype=torch.float64)
    expected = torch.logaddexp(env.operands["x"], torch.zeros(1, dtype=torch.float64))
    for argument in (E.load("x"), E.const(x)):
        found = torch.as_tensor(evaluate(E.call("softplus", argument), env), dtype=torch.float64)
        torch.testing.assert_close(found.view(1), expected, rtol=1e-15, atol=0)
        sigmoid = torch.as_tensor(evaluate(E.call("sigmoid", argument), env), dtype=torch.float64)
        torch.testing.assert_close(sigmoid.view(1), torch.sigmoid(env.operands["x"]))


def test_indices_lie_on_their_axes() -> None:
    env = Env((2, 3, 4, 5))
    for axis, place in (("b", 0), ("h", 1), ("q", 2), ("k", 3)):
        shape = [1] * 4
        shape[place] = env.shape[place]
        found = evaluate(E.index(axis), env)
        assert torch.equal(found.expand(env.shape), torch.arange(shape[place]).view(shape).expand(
            env.shape))
        assert evaluate(E.size(axis), env) == env.shape[place]
    assert Env((1, 2, 3, 4, 5)).axes == ("b1", "b", "h", "q", "k")
    assert Env((4, 5)).axes == ("q", "k")
    with pytest.raises(ValueError, match="axis must be one of q, k, got 'h'"):
        evaluate(h, Env((4, 5)))
    with pytest.raises(ValueError, match="operands must have 'bias'"):
        evaluate(E.load("bias"), Env((4, 5)))
    with pytest.raises(ValueError, match="score has no value here"):
        evaluate(E.score, Env((4, 5)))
    with pytest.raises(ValueError, match="'t' must have 1 axes, got 2"):
        evaluate(E.load("t", q), Env((4, 5), {"t": torch.zeros(4, 5)}))


def test_loads_gather_and_clamp() -> None:
    table, ids = torch.randn(3, 7), torch.randint(0, 7, (4,))
    env = Env((3, 4, 5), {"table": table, "ids": ids})
    found = evaluate(E.load("table", h, E.load("ids", q, dtype=E.INT)), env)
    assert torch.equal(found.squeeze(-1), table[:, ids])
    relative = evaluate(E.load("table", h, q - k + 2), env)
    place = (torch.arange(4)[:, None] - torch.arange(5) + 2).clamp(0, 6)
    assert torch.equal(relative, table[:, place])
    by_size = Env((3, 7, 7), {"table": table})
    view = evaluate(E.load("table", h, k), by_size)
    assert view.shape == (3, 1, 7) and view.data_ptr() == table.data_ptr()
    swapped = evaluate(E.load("t", k, h), Env((3, 4, 5), {"t": torch.arange(15).view(5, 3)}))
    assert torch.equal(swapped[:, 0], torch.arange(15).view(5, 3).mT)


def test_a_block_of_rows_is_that_part_of_the_whole() -> None:
    operands = {"bias": torch.randn(2, 8, 6), "pad": torch.rand(6) < 0.5, "f": torch.randn(8, 3),
                "g": torch.randn(6, 3), "rows": torch.arange(8), "table": torch.randn(2, 13)}
    x = torch.randn(2, 8, 6)
    made = E.where((k <= q) & E.load("pad", dtype=E.BOOL), E.score + E.load("bias"),
                   E.inner("f", "g") * E.load("rows", q, dtype=E.INT)) / E.size("q")
    made = made + E.load("table", h, q - k + 5)
    whole = evaluate(made, Env((2, 8, 6), operands, {E.score: x}))
    for start, stop in ((0, 3), (3, 8), (7, 8)):
        env = Env((2, stop - start, 6), operands, {E.score: x[:, start:stop]}, {"q": 8}, start)
        torch.testing.assert_close(evaluate(made, env), whole[:, start:stop])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    made = E.where(k <= q, E.call("tanh", E.score * 0.5 + q) * 3.0, E.where(q.eq(0), 0.0, -1.0))
    env = Env((3, 4), leaves={E.score: torch.randn(3, 4, dtype=dtype)}, dtype=dtype)
    assert evaluate(made, env).dtype == dtype
    assert evaluate(E.where(k <= q, 1.0, 0.0), env).dtype == dtype


def test_sizes_may_be_symbolic() -> None:
    made = E.call("minimum", q, E.call("maximum", E.size("k") // 2 - 1, 0)) < E.size("q") % 5

    class Rows(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.where(evaluate(made, Env(tuple(x.shape))), x, 0.0)

    dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program = torch.export.export(Rows(), (torch.randn(4, 6),), dynamic_shapes=(dims,))
    for shape in ((4, 6), (9, 3), (7, 11)):
        x = torch.randn(shape)
        assert torch.equal(program.module()(x), Rows()(x))
