"""Generated code against the evaluation of the expression, in every mode and window."""

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.kernels.aten.codegen import MODES, compiled, source
from attnopt.kernels.aten.tile import Tile
from tests.kernels.cases import (
    INF,
    SLOTS,
    B,
    H,
    K,
    Q,
    k,
    q,
    s,
)


def pointwise() -> list[Expr]:
    i, j = q - 3, k - 4
    unary = [E.call(op, s) for op in (
        "exp", "exp2", "tanh", "sigmoid", "softplus", "relu", "cos", "sin", "sign", "erf", "round",
        "neg", "abs", "floor", "isnan", "int")]
    positive = s * s + 0.5
    return [
        *unary, *(E.call(op, positive) for op in ("log", "log1p", "sqrt", "rsqrt")),
        i // 2, i % 3, i // j.replace({k: k + 9}), (i + 1) % 5 - i, E.call("pow", positive, 1.5),
        s + E.load("row"), E.load("row") - s, s * E.load("row") / 3.0, 2.0 / positive, s - s * 2.0,
        E.call("minimum", s, 0.1), E.call("maximum", s, E.load("row")), E.call("minimum", 0.2, s),
        E.where(i < j, s, -INF), E.where(i <= j, -1.0, s), E.where(i.eq(j), 1.0, 0.0),
        E.where((i < 0) & ~(j < 0) | i.ne(j) ^ (s < 0.0), s * 2.0, E.load("row")),
        s + E.call("float", i * j) * 0.1 + E.size("k") / 3 + E.index("h") * E.size("h"),
        E.call("log", E.size("k")) * s, E.call("minimum", E.size("q"), 4) + s,
        E.load("table", E.index("h"), i), E.load("table", E.index("h"), E.call("abs", j)) * s,
        E.inner("left", "right") + s, E.call("abs", s) + s, E.call("tanh", s) * s + s]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("expr", pointwise(), ids=str)
def test_generated_code_means_what_the_expression_means(expr: Expr, mode: str) -> None:
    slots = {n: SLOTS[n]() for n in ("row", "table", "left", "right")}
    score = torch.randn(B, H, Q, K)
    expected = evaluate(expr, Env(score.shape, slots, {s: score}))
    tile = Tile(tuple(score.shape), slots, torch.float32, score.device)
    tile.leaves[s] = score.clone()
    before = {n: t.clone() for n, t in slots.items()}
    found = compiled(expr, mode)(tile)
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), equal_nan=True)
    assert all(torch.equal(before[n], slots[n]) for n in slots)
    if mode == "none":
        assert "_(" not in source(expr, mode) and "_into(" not in source(expr, mode)


@pytest.mark.parametrize("expr", [e for e in pointwise() if e.dtype == E.FLOAT], ids=str)
def test_generated_code_may_be_differentiated(expr: Expr) -> None:
    slots = {n: SLOTS[n]().requires_grad_() for n in ("row", "table", "left", "right")}
    score = torch.randn(B, H, Q, K, requires_grad=True)
    given = [score, *slots.values()]

    def gradient(mode: str) -> list[Tensor | None]:
        tile = Tile(tuple(score.shape), slots, torch.float32, score.device)
        tile.leaves[s] = score * 1.0
        out = torch.as_tensor(compiled(expr, mode)(tile))
        if not out.requires_grad:
            return []
        return list(torch.autograd.grad(out.nan_to_num(0.0, 0.0, 0.0).sum(), given,
                                        allow_unused=True))

    for plain, in_place in zip(gradient("none"), gradient("safe"), strict=True):
        torch.testing.assert_close(in_place, plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("expr", pointwise(), ids=str)
def test_a_window_of_the_tile_is_a_window_of_the_whole(expr: Expr, mode: str) -> None:
    slots = {n: SLOTS[n]() for n in ("row", "table", "left", "right")}
    score = torch.randn(B, H, Q, K)
    whole = torch.as_tensor(evaluate(expr, Env(score.shape, slots, {s: score})))
    starts, lengths = (1, 0, 2, 1), (1, 2, 3, 5)
    window = tuple(slice(a, a + n) for a, n in zip(starts, lengths, strict=True))
    tile = Tile(lengths, slots, torch.float32, score.device, tuple(score.shape), starts)
    tile.leaves[s] = score[window].clone()
    found = torch.as_tensor(compiled(expr, mode)(tile))
    torch.testing.assert_close(found.expand(lengths), whole.expand(score.shape)[window],
                               equal_nan=True)
