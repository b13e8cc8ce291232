"""Strips hold every row of an index matrix, and what does not repeat has none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.lanes import look_up
from attnopt.ir.mask_base import K, Q
from attnopt.kernels.tabulate import Points, literal_text
from attnopt.passes.analyze.bias_regions import region_of
from attnopt.passes.analyze.bias_strips import Strip, dimensions, strip_of
from tests.spellings import bias_spellings as spell


def toeplitz(queries: int, keys: int) -> Tensor:
    return torch.arange(keys)[None, :] - torch.arange(queries)[:, None] + queries


def every_other(side: int) -> Tensor:
    """Queries are every other token of each axis, as where LeViT halves the image."""
    whole = torch.arange(side)
    rows = whole[::2]
    far = (rows[:, None] - whole[None, :]).abs()
    both = far[:, None, :, None] * side + far[None, :, None, :]
    return both.reshape(len(rows) ** 2, side * side)


CASES = [
    (toeplitz(7, 7), 1), (toeplitz(5, 12), 1), (toeplitz(12, 5), 1),
    (spell.swin_index((5, 5)), 2), (spell.swin_index((3, 8)), 2), (spell.swin_index((5, 2, 3)), 3),
    (spell.beit_index((6, 6)), 2), (spell.levit_index((4, 6)), 2), (every_other(6), 2),
]


@pytest.mark.parametrize("matrix, dims", CASES)
def test_every_pair_finds_its_value(matrix: Tensor, dims: int) -> None:
    strip = strip_of([matrix])
    assert strip is not None and dimensions(matrix, strip) == dims
    queries, keys = matrix.shape
    count = strip.count.value
    assert count < queries * keys
    q, k = (torch.as_tensor(evaluate(e, Env((1, count)))).expand(1, count)[0]
            for e in strip.pair(K))
    table = matrix[q, k]
    among, others = (torch.as_tensor(evaluate(e, Env((queries, keys)))).expand(queries, keys)
                     for e in strip.places())
    places = torch.where(torch.arange(keys) < strip.extra, among, others)
    assert torch.equal(table[places], matrix)


@pytest.mark.parametrize("matrix", [
    torch.arange(64).view(8, 8), torch.zeros(1, 9, dtype=torch.int64),
    torch.randint(0, 5, (12, 12), generator=torch.Generator().manual_seed(1))], ids=str)
def test_what_does_not_repeat_has_no_strip(matrix: Tensor) -> None:
    strip = strip_of([matrix])
    assert strip is None or strip.count.value * 1.5 <= matrix.numel()


def test_lengths_may_be_symbols() -> None:
    assert str(Strip().count) == "(sub (add #k #q) 1)" or Strip().count.has("size")


def test_look_ups_that_are_loads() -> None:
    def fixed(e: E.Expr) -> bool:
        return "k" not in e.indices

    assert look_up([E.index("h"), Q + 3 + K], 16, fixed) == "run"
    assert look_up([Q // 8, K % 32], 16, fixed) == "run"
    assert look_up([Q, K // 32], 16, fixed) == "same"
    assert look_up([Q, K % 24], 16, fixed) == "gather"
    assert look_up([K, Q], 16, fixed) == "gather"
    assert look_up([K * 2], 16, fixed) == "gather"


def test_regions() -> None:
    mask = spell.shift_mask(8, 4)
    found = region_of(mask, ("b",), None)  # type: ignore[arg-type]
    assert found is not None and found.outside == -100.0
    same = found.ids[:, :, None] == found.ids[:, None, :]
    assert torch.equal(torch.where(same, 0.0, -100.0), mask)
    assert region_of(mask.triu(), ("b",), None) is None  # type: ignore[arg-type]


def test_texts() -> None:
    numbers = torch.randint(-9, 9, (3, 5), dtype=torch.int32)
    read = torch.ops.attnopt.literal([torch.zeros(1)], [], literal_text(numbers))
    assert torch.equal(read, numbers)
    strip = Strip()
    at = dict(zip((Q, K), strip.pair(K), strict=True))
    text = str(Points(str(E.load("t", K - Q + 4, E.index("h")).replace(at)), str(strip.count),
                      ("t",), ("q", "k", "h"), ("h",), True))
    assert str(Points.parse(text)) == text
    table = torch.randn(10, 2, requires_grad=True)
    made = torch.ops.attnopt.tabulate([table], [5, 6, 2], text)
    assert torch.equal(made, table.t())
    made.sum().backward()
    assert torch.equal(table.grad, torch.ones(10, 2))
