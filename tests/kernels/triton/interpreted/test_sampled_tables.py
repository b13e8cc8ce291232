"""A table sampled at key positions, as `attnopt.passes.analyze.sampled_bias` writes it, in the
interpreter."""

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.reference import reference
from attnopt.kernels.triton import backward
from attnopt.kernels.triton.attention import Attention
from tests.kernels.cases import doubled
from tests.kernels.triton.cases import SCALED, TILE, Shape, h, k, q

WIDTH, LENGTH = 9, 63
OPERANDS = (Operand("rows", None, E.INT, "table"), Operand("places", None, role="table"),
            Operand("table", None, role="table"))


def place(axis: int) -> E.Expr:
    return E.load("places", k, E.const(axis)) * -2.0 + 2.0


def corner(step: int) -> E.Expr:
    whole = [E.call("floor", E.call("minimum", E.call("maximum", place(i), -1.0), 4.0))
             for i in (0, 1)]
    return E.load("table", h, (E.load("rows", q, dtype=E.INT) + step) + (
        whole[0] * WIDTH + whole[1]))


def between(axis: int, first: E.Expr, second: E.Expr) -> E.Expr:
    fraction = place(axis) - E.call("floor", E.call(
        "minimum", E.call("maximum", place(axis), -1.0), 4.0))
    return (1.0 - fraction) * first + fraction * second


SPEC = Spec(operands=OPERANDS, logits=SCALED + between(
    0, between(1, corner(0), corner(1)), between(1, corner(WIDTH), corner(WIDTH + 1))))


def operands(shape: Shape) -> list[torch.Tensor]:
    rows = torch.arange(shape.queries) % 5 + WIDTH + 1
    return [rows.int(), torch.rand(shape.keys, 2) * 2.4 - 1.2, torch.randn(shape.heads, LENGTH)]


def test_forward() -> None:
    shape = Shape(2, 2, 13, 11)
    inputs, given = shape.inputs(torch.float32), operands(shape)
    found = Attention(SPEC, TILE)(*inputs, given)
    assert found is not None
    wanted = reference(SPEC)(*doubled(inputs), doubled(given))
    torch.testing.assert_close(found.double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_gradients_of_positions_are_composed() -> None:
    """The kernel has none of what a place in a table is computed from."""
    shape = Shape(1, 2, 5, 6)
    inputs, (rows, places, table) = shape.inputs(torch.float32), operands(shape)
    assert backward.kinds(SPEC, frozenset(("places", "table")), ()) is None
    assert Attention(SPEC, TILE, TILE)(*inputs, [rows, places.requires_grad_(), table]) is None
