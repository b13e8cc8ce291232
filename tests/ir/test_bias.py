"""Bias: every form against the tensor that a model would build, and the form read from a term."""

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.bias import (
    Bias,
    ClosedForm,
    Dense,
    DifferenceTable,
    KeyVector,
    Lookup,
    LowRank,
    RegionFill,
    RowConstant,
    Separable,
    form_of,
)
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.mask import Regions

from .checking import draw

q, k, h = E.index("q"), E.index("k"), E.index("h")
SHAPE = (2, 3, 12, 12)  # 2 samples, 3 heads, 12 tokens = 3 x 4


def value_of(bias: Bias, **operands: torch.Tensor) -> torch.Tensor:
    assert bias.slots == set(operands)
    found = evaluate(bias.term(), Env(SHAPE, operands, dtype=torch.float64))
    return torch.as_tensor(found).expand(SHAPE)


def test_vectors_dense_and_low_rank() -> None:
    row, key, dense = draw(2, 3, 12, 1), draw(2, 1, 1, 12), draw(1, 3, 12, 12)
    left, right = draw(3, 12, 4), draw(2, 3, 12, 4)
    assert torch.equal(value_of(RowConstant(E.load("row")), row=row), row.expand(SHAPE))
    assert torch.equal(value_of(KeyVector("key"), key=key), key.expand(SHAPE))
    assert torch.equal(value_of(Dense(E.load("d")), d=dense), dense.expand(SHAPE))
    found = value_of(LowRank("left", "right"), left=left, right=right)
    assert torch.equal(found, left @ right.mT)


def test_closed_form() -> None:
    slopes = draw(3, 1, 1)
    distance = (torch.arange(12)[:, None] - torch.arange(12)).abs().double()
    alibi = ClosedForm(-E.load("slopes") * E.call("abs", q - k))
    assert torch.equal(value_of(alibi, slopes=slopes), (-slopes * distance).expand(SHAPE))
    assert alibi.describe() == "closed form (mul (neg (load slopes)) (float (abs (sub q k))))"


def test_separable_per_axis() -> None:
    rel_h, rel_w = draw(2, 3, 12, 3), draw(2, 3, 12, 4)
    expected = (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)
    form = Separable(("rel_h", "rel_w"), (3, 4), ("b", "h"))
    assert torch.equal(value_of(form, rel_h=rel_h, rel_w=rel_w), expected)
    assert form.describe() == "separable 3x4"


def test_table_by_difference() -> None:
    i = torch.arange(12)
    line = draw(3, 23)
    form = DifferenceTable("table", (E.size("k") - 1,))
    expected = line[:, i[:, None] - i + 11].expand(SHAPE)
    assert torch.equal(value_of(form, table=line), expected)

    grid = draw(3, 5, 7)
    rows, columns = i // 4, i % 4
    expected = grid[:, rows[:, None] - rows + 2, columns[:, None] - columns + 3].expand(SHAPE)
    for length in ((3, 4), (None, 4)):
        form = DifferenceTable("table", (2, 3), length)
        assert torch.equal(value_of(form, table=grid), expected)
    assert form.describe() == "table by difference, 2-D"


def test_look_ups() -> None:
    index = torch.randint(0, 9, (12, 12))
    at = E.load("index", q, k, dtype=E.INT)
    shared, own = draw(3, 9), draw(2, 3, 12, 9)
    found = value_of(Lookup("t", at), t=shared, index=index)
    assert torch.equal(found, shared[:, index].expand(SHAPE))
    wide = index.expand(SHAPE)
    found = value_of(Lookup("t", at, ("b", "h"), "q"), t=own, index=index)
    assert torch.equal(found, own.gather(-1, wide))
    found = value_of(Lookup("t", at, ("b", "h"), "k"), t=own, index=index)
    assert torch.equal(found, own.gather(-1, wide.mT).mT)


def test_region_fill() -> None:
    ids = torch.randint(0, 3, (12,))
    form = RegionFill(Regions(E.load("ids", q, dtype=E.INT), -100.0))
    expected = torch.where(ids[:, None] == ids, 0.0, -100.0).double().expand(SHAPE)
    assert torch.equal(value_of(form, ids=ids), expected)
    assert form.describe() == "region fill -100"


def test_what_is_no_such_form_is_refused() -> None:
    for wrong in (lambda: RowConstant(k * 1.0), lambda: ClosedForm(E.load("x")),
                  lambda: ClosedForm(E.score * q), lambda: RegionFill(Regions(q)),
                  lambda: Lookup("t", q - k, by="d"), lambda: Lookup("t", E.score)):
        with pytest.raises(ValueError, match="must"):
            wrong()


@pytest.mark.parametrize("form", [
    RowConstant(E.load("row")), RowConstant(E.call("float", q)), KeyVector("key"),
    ClosedForm(-E.load("head") * E.call("abs", q - k)), ClosedForm(E.call("cos", q - k)),
    Lookup("table", q - k + 3), Lookup("table", E.load("index", q, k, dtype=E.INT), (), ""),
    Lookup("table", q - k, ("b", "h"), "q"), Lookup("table", k - q, ("h",), "k"),
    LowRank("left", "right"), LowRank("left", "right", -0.5),
    Dense(E.load("dense")), Dense(E.load("unknown")),
    Dense(E.load("key") * E.load("row")), Dense(E.score * 2.0),
    Dense(E.load("key") * E.call("float", q)),
])
def test_the_form_of_a_term(form: Bias) -> None:
    axes = {"row": ("b", "h", "q"), "key": ("b", "k"), "head": ("h",), "dense": ("h", "q", "k")}
    assert form_of(form.term(), axes) == form
