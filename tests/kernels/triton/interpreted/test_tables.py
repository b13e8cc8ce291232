"""The gradient of tables that the logits gather from, in the interpreter."""

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal, KeyKeep
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.triton import backward
from attnopt.kernels.triton.attention import Attention
from attnopt.kernels.triton.backward_tables import copies
from tests.kernels.triton.cases import SCALED, Shape, check_gradients, h, k, q

TABLE = Operand("table", None, role="table")
OTHER = Operand("other", None, role="table")
PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
IDS = Operand("ids", None, E.INT, "other")
SHIFTED = E.load("table", h, q - k + 6)
SPECS = {
    "buckets": Spec(logits=SCALED + E.load("table", h, E.call(
        "minimum", E.call("floor", E.call("log1p", E.call("abs", k - q)) * 2.0), 9)),
        operands=(TABLE,)),
    "beyond its ends": Spec(logits=SCALED + SHIFTED, mask=Causal(), operands=(TABLE,)),
    "twice, in a softcap": Spec(
        logits=E.call("tanh", SCALED + SHIFTED * 0.5 + E.load("table", h, E.const(2))),
        mask=KeyKeep("pad"), empty_row="zero", operands=(TABLE, PAD)),
    "two of one axis": Spec(logits=SCALED + E.load("table", h, q // 4 - k // 4 + 3)
                            + E.load("other", q % 4 - k % 4 + 3), operands=(TABLE, OTHER)),
    "by an index": Spec(
        logits=SCALED * (1.0 + E.load("table", h, E.load("ids", q, k, dtype=E.INT))),
        operands=(TABLE, IDS)),
    "of a head": Spec(logits=SCALED * E.load("other", h), operands=(OTHER,))}
QUICK = ("beyond its ends", "two of one axis")
MADE = {"table": lambda shape: torch.randn(shape.heads, 10), "other": lambda shape: torch.randn(7),
        "pad": lambda shape: torch.rand(shape.batch, 1, 1, shape.keys) < 0.7,
        "ids": lambda shape: torch.randint(0, 10, (shape.queries, shape.keys))}


def operands(spec: Spec, shape: Shape) -> list[torch.Tensor]:
    return [MADE[o.slot](shape) for o in spec.operands]


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPECS])
def test_gradients(name: str) -> None:
    spec, shape = SPECS[name], Shape(2, 2, 13, 11)
    assert backward.kinds(spec, frozenset(o.slot for o in spec.operands if o.dtype == E.FLOAT), ())
    check_gradients(spec, shape.inputs(torch.float32), operands(spec, shape))


@pytest.mark.slow
def test_layouts_and_lengths() -> None:
    spec, shape = SPECS["beyond its ends"], Shape(1, 2, 70, 35)
    table = torch.randn(10, 2).t()
    check_gradients(spec, shape.inputs(torch.float32), [table])
    check_gradients(spec, Shape(1, 2, 1, 1).inputs(torch.float32), [table[:, ::2]])
    check_gradients(spec, shape.inputs(torch.bfloat16), [table.bfloat16()])


def test_where_the_order_of_sums_must_not_matter() -> None:
    spec, shape = SPECS["beyond its ends"], Shape(1, 2, 5, 6)
    inputs = shape.inputs(torch.float32)
    table = torch.randn(2, 10, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        assert Attention(spec)(*inputs, [table]) is None
        assert Attention(spec)(*inputs, [table.detach()]) is not None
    finally:
        torch.use_deterministic_algorithms(False)


def test_tables_that_are_not_taken() -> None:
    squared = Spec(logits=SCALED + E.load("table", h, E.call("floor", E.load("table", h, q))),
                   operands=(TABLE,))
    assert backward.kinds(squared, frozenset(("table",)), ()) is None


def test_copies() -> None:
    assert copies(1) == copies(1 << 16) == 64
    assert copies(1 << 20) == 4 and copies(1 << 30) == 1
