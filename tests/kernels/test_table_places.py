"""Tables whose rows are remembered follow the index, and the parameter keeps its gradient."""

import torch

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.kernels import tabulate as module
from attnopt.kernels.tabulate import Points, tabulate

EXPR = E.load("table", E.where(E.load("index", E.index("k") // 5, E.index("k") % 5, dtype=E.INT)
                               < 0, 0, E.load("index", E.index("k") // 5, E.index("k") % 5,
                                              dtype=E.INT)), E.index("h"))


def points(expr: E.Expr = EXPR, slots: tuple[str, ...] = ("table", "index")) -> str:
    return str(Points(str(expr), "25", slots, ("q", "k", "h"), ("h",), True))


def exact(table: torch.Tensor, index: torch.Tensor, expr: E.Expr = EXPR) -> torch.Tensor:
    env = Env((table.shape[1], 1, 25), {"table": table, "index": index},
              sizes={"q": 5, "k": 5, "h": table.shape[1]})
    return torch.as_tensor(evaluate(expr, env)).expand(table.shape[1], 1, 25)[:, 0]


def test_an_index_that_changes_is_followed() -> None:
    table, index = torch.randn(30, 3), torch.randint(-2, 34, (5, 5))
    for _ in range(2):
        assert torch.equal(tabulate([table, index], [5, 5, 3], points()), exact(table, index))
    index.data[2, 3] = 7  # without a new version
    table[7] = 100.0
    assert torch.equal(tabulate([table, index], [5, 5, 3], points()), exact(table, index))
    other = index.int()
    assert torch.equal(tabulate([table, other], [5, 5, 3], points()), exact(table, other))


def test_gradients_of_a_table() -> None:
    table = torch.randn(30, 3, dtype=torch.float64, requires_grad=True)
    index = torch.randint(0, 30, (5, 5))
    weight = torch.randn(3, 25, dtype=torch.float64)
    found, right = (torch.autograd.grad((t * weight).sum(), table)[0] for t in (
        tabulate([table, index], [5, 5, 3], points()), exact(table, index)))
    assert torch.allclose(found, right)
    assert torch.autograd.gradcheck(
        lambda t: tabulate([t, index], [5, 5, 3], points()), (table,))


def test_inference_mode_leaves_nothing_behind() -> None:
    table, index = torch.randn(30, 3, requires_grad=True), torch.randint(0, 30, (5, 5))
    module_text = points(EXPR + 0.0)
    with torch.inference_mode():
        tabulate([table, index], [5, 5, 3], module_text)
    tabulate([table, index], [5, 5, 3], module_text).sum().backward()
    assert table.grad is not None and module.tabulate is tabulate
