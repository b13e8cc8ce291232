"""Facts: what is proven holds on every small grid, and what the passes rely on is proven."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.facts import linear, prove, simplify_int, slack

q, k, h = E.index("q"), E.index("k"), E.index("h")
Q, K = E.size("q"), E.size("k")
SIZES = list(itertools.product((1, 2, 5), (1, 3, 8), (1, 4, 11)))

_leaves = st.sampled_from([q, k, h, Q, K, E.load("ids", q, dtype=E.INT)]) | st.integers(
    -9, 9).map(E.const)


def _grow(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    pairs = st.tuples(st.sampled_from(["add", "sub", "mul", "minimum", "maximum"]), inner, inner)
    divided = st.tuples(st.sampled_from(["floordiv", "mod"]), inner, st.integers(1, 5))
    chosen = st.tuples(inner, inner, inner).map(lambda t: E.where(t[0] < t[1], t[2], t[0]))
    return st.one_of(pairs.map(lambda t: E.call(*t)), divided.map(lambda t: E.call(*t)), chosen,
                     inner.map(abs_))


def abs_(e: Expr) -> Expr:
    return E.call("abs", e)


ints = st.recursive(_leaves, _grow, max_leaves=7)


def on_grid(e: Expr, sizes: tuple[int, int, int]) -> torch.Tensor:
    ids = torch.arange(sizes[1]) * 3 - 4
    value = torch.as_tensor(evaluate(e, Env(sizes, {"ids": ids})))
    return value.expand(sizes)


@settings(max_examples=150)
@given(ints)
def test_a_simplified_int_is_the_same_int(e: Expr) -> None:
    found = simplify_int(e)
    assert simplify_int(found) is found
    for sizes in SIZES[::4]:
        assert torch.equal(on_grid(found, sizes), on_grid(e, sizes)), (e, found)


@settings(max_examples=150)
@given(ints, ints, st.sampled_from(["lt", "le", "eq", "ne"]), st.booleans())
def test_what_is_proven_holds_everywhere(a: Expr, b: Expr, op: str, negated: bool) -> None:
    claim = ~E.call(op, a, b) if negated else E.call(op, a, b)
    verdict = prove(claim)
    over = slack(claim)
    for sizes in SIZES[::4]:
        values = on_grid(claim, sizes)
        assert verdict is None or (values == verdict).all(), claim
        if over is not None:
            assert torch.equal(on_grid(over, sizes) >= 0, values), claim


@pytest.mark.parametrize(("claim", "verdict"), [
    (q >= 0, True), (q < Q, True), (q < 0, False), (k <= q, None), (q <= K, None),
    (q // 8 * 8 <= q, None), (q % 8 < 8, True), (q % 8 >= 0, True), ((q + 3) // 4 >= 0, True),
    (q - q + 1 > 0, True), (Q * K >= 1, True), (Q * K > 1, None), ((Q - 1) * K >= 0, True),
    (q.eq(q + 1), False), ((2 * q).ne(2 * q + 1), True), (q.eq(k), None),
    (E.call("minimum", q, 0) <= 0, None), (E.call("maximum", q, 3) >= 3, None),
    (E.call("maximum", q, 3) >= 0, True), ((q >= 0) & (k < K), True), ((q < 0) | (k <= q), None),
    ((q < 0) & (k <= q), False), (~(q < 0), True), (E.where(k < q, q >= 0, k >= 0), True),
    (E.score > 0.0, None), (E.load("keep", dtype=E.BOOL), None), (E.TRUE, True), (E.FALSE, False),
    (E.load("ids", q, dtype=E.INT) >= 0, None), (E.stat("count") >= 0, True),
])
def test_verdicts(claim: Expr, verdict: bool | None) -> None:
    assert prove(claim) is verdict


def test_assumptions() -> None:
    assert prove(q <= K, [Q <= K]) is True and prove(q < K, [Q <= K]) is True
    assert prove(q + K - Q >= 0, [Q <= K]) is True and prove(K < Q, [Q <= K]) is False
    with pytest.raises(ValueError, match="assume must hold facts size <= size"):
        prove(q <= K, [q <= K])


def test_normal_forms() -> None:
    for e, expected in (
        (q - 3 + 3, q), (q + k - q, k), ((q * 8 + 11) // 8, q + 1), (q % 8 // 8, E.const(0)),
        ((k * 4 + q % 4) % 4, q % 4), ((k * 4 + q % 4) // 4, k), (k - (q + 1) * 2, k - q * 2 - 2),
        (1 - q, E.const(1) - q), (2 + q * k - k * q, E.const(2)),
    ):
        assert simplify_int(e) is simplify_int(expected), (e, simplify_int(e))
    assert simplify_int(k - q) is simplify_int(-(q - k))
    assert slack(k <= q) is slack(k < q + 1) is slack(~(q < k)) is q - k
    assert slack(q.eq(k)) is None and slack(E.score < 1.0) is None
    assert linear(2 * q - k + 3) == ({q: 2, k: -1}, 3) and linear(q * k) is None
    with pytest.raises(ValueError, match="must be an int"):
        simplify_int(E.score)
