"""The counter itself: live and dead nodes, writes through views, sub-graphs, eager calls."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models import counter


class Wrap(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def _count(function: Callable[[Tensor], Tensor]) -> counter.Count:
    return counter.count(Wrap(function), {"x": torch.randn(2, 3, 4, 8)})


def test_every_way_to_call_softmax_and_sdpa() -> None:
    def program(x: Tensor) -> Tensor:
        y = F.softmax(x, -1) + torch.softmax(x, -1, dtype=torch.float32) + x.softmax(2)
        return y + nn.Softmax(1)(x) + F.scaled_dot_product_attention(x, x, x)

    count = _count(program)
    assert (count.total, count.sdpa, count.exported) == (5, 1, True)


def test_a_dead_softmax_is_counted_apart() -> None:
    def program(x: Tensor) -> Tensor:
        x.softmax(-1).sum()
        return x.softmax(-1) * 2

    count = _count(program)
    assert (count.total, sum(count.dead.values())) == (1, 1)


def test_a_softmax_written_into_a_view_is_live() -> None:
    def program(x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        out[:, 1:].transpose(2, 3).copy_(x[:, 1:].softmax(-1).transpose(2, 3))
        unused = torch.zeros_like(x)
        unused[0].copy_(x[0].softmax(-1))
        return out

    count = _count(program)
    assert (count.total, sum(count.dead.values())) == (1, 1)


def test_subgraphs_are_looked_into() -> None:
    def program(x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x.softmax(-1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return x.softmax(-1)

    assert _count(program).total == 2


def test_without_an_export_the_eager_calls_are_counted() -> None:
    def program(x: Tensor) -> Tensor:
        y = F.softmax(x, -1) + F.scaled_dot_product_attention(x, x, x)
        return y if x.sum() > 0 else y.softmax(-1)

    count = counter.count(Wrap(program), {"x": torch.ones(1, 2, 3, 4)})
    assert (count.total, count.sdpa, count.exported) == (2, 1, False)
