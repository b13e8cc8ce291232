"""Constant masks are named: bands, segments, blocks, sinks, sub-ranges, one mask for each head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.ir.mask import (
    And,
    Band,
    Causal,
    KeyKeep,
    Mask,
    Neighborhood,
    Or,
    Placed,
    Prefix,
    Regions,
    Select,
    Where,
    Windows,
)
from attnopt.passes.analyze.table_reading import read
from attnopt.passes.analyze.tables import Table
from tests.passes.lifting import find
from tests.passes.test_neighbourhoods import Case, definition

N = 96
Q, K = torch.arange(N)[:, None], torch.arange(N)[None]
DOCUMENT = torch.tensor([0] * 20 + [1] * 5 + [2] * 40 + [3] * 31)
SAME = DOCUMENT[:, None] == DOCUMENT[None]
GRID = definition(Case((8, 10), (3, 5), (1, 1), (1, 1), (False, False)))
FULL = torch.ones(N, N, dtype=torch.bool)


def inside(rows: slice, columns: slice, outside: bool) -> Tensor:
    kept = FULL.clone() if outside else ~FULL
    kept[rows, columns] = GRID
    return kept


CASES: dict[str, tuple[Tensor, type[Mask], str]] = {
    "causal": (K <= Q, Causal, "causal"),
    "causal window": ((K <= Q) & (Q - K < 8), Band, "causal window 8"),
    "window": ((Q - K).abs() <= 8, Band, "window 17"),
    "lopsided": ((K - Q <= 3) & (Q - K <= 5), Band, "band -5..3"),
    "dilated": (((Q - K).abs() <= 9) & ((Q - K) % 3 == 0), Where, "window 7 dilation 3"),
    "prefix": (K < 10 + 0 * Q, Prefix, "prefix 10"),
    "prefix and causal": ((K < 10) | (K <= Q), Or, "causal | prefix 10"),
    "causal by blocks": (K // 8 <= Q // 8, Where, "causal by blocks of 8"),
    "late blocks": (K // 8 < Q // 8 + 2, Where, "causal by blocks of 8 (offset 1)"),
    "window of blocks": (((K // 8 - Q // 8).abs() <= 1), Where, "window 3 of blocks of 8"),
    "chunks": (K // 10 == Q // 10, Windows, "partition 10"),
    "causal chunks": ((K // 10 == Q // 10) & (K <= Q), And, "causal in partition 10"),
    "documents": (SAME, Regions, "4 segments"),
    "causal documents": (SAME & (K <= Q), And, "causal in 4 segments"),
    "sinks": ((K <= Q) & ((Q - K < 8) | (K < 4)), Or, "causal window 8 and 4 sinks"),
    "global tokens": (((Q - K).abs() < 8) | (K < 4) | (Q < 4), Or,
                      "window 15 and 4 global tokens"),
    "text, then video": (inside(slice(16, N), slice(16, N), True), Or,
                         "window 3x5 of 8x10 in [16:96, 16:96], all else kept"),
    "video, then text": (inside(slice(80), slice(80), True), Or,
                         "window 3x5 of 8x10 in [0:80, 0:80], all else kept"),
    "video only": (inside(slice(80), slice(80), False), Placed,
                   "window 3x5 of 8x10 in [0:80, 0:80]"),
    "class token": (torch.cat([FULL[:1, :81], torch.cat([FULL[:80, :1], GRID], 1)]), Or,
                    "window 3x5 of 8x10 in [1:81, 1:81], all else kept"),
    "more keys": (torch.ones(5, 12).tril(7).bool(), Causal, "causal (offset 7)"),
}


@pytest.mark.parametrize("name", CASES)
def test_named_tables(name: str) -> None:
    kept, kind, text = CASES[name]
    found = read(Table.of_values(kept, torch.tensor(True)))
    assert found is not None
    assert (type(found.mask), found.text) == (kind, text)
    assert torch.equal(found.mask.to_dense(*kept.shape), kept)


@pytest.mark.parametrize("name", CASES)
def test_near_misses(name: str) -> None:
    """One key more or less anywhere is another mask; what is said of it, if anything, is exact."""
    kept = CASES[name][0]
    torch.manual_seed(0)
    for _ in range(5):
        other = kept.clone()
        place = torch.randint(kept.shape[0], ()), torch.randint(kept.shape[1], ())
        other[place] = ~other[place]
        found = read(Table.of_values(other, torch.tensor(True)))
        assert found is None or torch.equal(found.mask.to_dense(*kept.shape), other)


@pytest.mark.parametrize("kept", [torch.rand(64, 64) > 0.5, torch.zeros(8, 8) > 0,
                                  torch.zeros(0, 4) > 0, torch.zeros(4, 0) > 0])
def test_no_structure(kept: Tensor) -> None:
    assert read(Table.of_values(kept, torch.tensor(True))) is None


# -- buffers of a module --------------------------------------------------------------------------
def buffer(kept: Tensor) -> Callable[[Any], None]:
    def setup(self: Any) -> None:
        self.register_buffer("kept", kept)
        self.register_buffer("dropped", ~kept)
        self.register_buffer("added", torch.zeros(kept.shape).masked_fill(~kept, -1e9))
        self.register_buffer("ones", kept.float())
    return setup


IDIOMS: dict[str, Callable[..., Tensor]] = {
    "bool": lambda self, q, k: self.kept,
    "inverted": lambda self, q, k: ~self.dropped[None],
    "additive": lambda self, q, k: self.added[None, None],
    "complement": lambda self, q, k: (1.0 - self.ones) * torch.finfo(torch.float32).min,
    "filled": lambda self, q, k: torch.zeros(96, 96).masked_fill(self.dropped, -torch.inf),
    "chosen": lambda self, q, k: torch.where(self.ones > 0, 0.0, -1e9),
}


@pytest.mark.parametrize("idiom", IDIOMS)
def test_idioms_of_a_constant(idiom: str) -> None:
    kept, _, text = CASES["text, then video"]
    found = find(IDIOMS[idiom], sizes=(N, N), setup=buffer(kept))
    assert found.structural and found.exact and found.guards and found.rows_kept
    assert found.text == text


def test_part_of_a_longer_buffer() -> None:
    longer = torch.zeros(128, 128, dtype=torch.bool)
    longer[:96, :96] = CASES["documents"][0]
    found = find(lambda self, q, k: self.kept[None, None, :96, :96], sizes=(N, N),
                 setup=buffer(longer))
    assert found.text == "4 segments"


def test_one_mask_for_each_head() -> None:
    heads = torch.stack([(Q - K).abs() <= w for w in (4, 8)] * 2)
    found = find(lambda self, q, k: self.kept, sizes=(N, N), setup=buffer(heads))
    assert isinstance(found.mask, Select) and found.text == "by h: window 9, window 17"
    assert torch.equal(found.mask.to_dense(N, N, (1, 4))[0], heads)
    same = find(lambda self, q, k: self.kept, sizes=(N, N), setup=buffer(heads[:1].expand(4, N, N)))
    assert same.mask == Band(-4, 4)


def test_heads_by_arithmetic() -> None:
    def forward(self: Any, query: Tensor, key: Tensor) -> Tensor:
        at, head = torch.arange(query.shape[2]), torch.arange(4).view(4, 1, 1)
        return (at[:, None] - at[None, :]).abs() <= 2 + 2 * head

    found = find(forward, sizes=(40, 40))
    assert found.mask is not None and found.structural
    assert found.text == "by h: window 5, window 9, window 13, window 17"
    at = torch.arange(40)
    kept = found.mask.to_dense(40, 40, (1, 4))
    for h in range(4):
        assert torch.equal(kept[0, h], (at[:, None] - at).abs() <= 2 + 2 * h)


def test_constant_and_padding_of_the_user() -> None:
    """The table becomes structure, the padding stays a vector that the user gives."""
    def forward(self: Any, query: Tensor, key: Tensor, keep: Tensor) -> Tensor:
        allowed = self.kept[None, None] & keep[:, None, None, :]
        return torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)

    kept = definition(Case((8, 12), (3, 5), (1, 1), (1, 1), (False, False)))
    found = find(forward, sizes=(N, N), setup=buffer(kept),
                 extra=(torch.ones(2, N, dtype=torch.bool),))
    assert isinstance(found.mask, And)
    kinds = {type(m) for m in found.mask.masks}
    assert kinds == {KeyKeep, Neighborhood} and found.text == "padding & window 3x5 of 8x12"
    assert list(found.loads) and not found.rest


class Masked(nn.Module):
    """Attention under a constant mask."""

    kept: Tensor

    def __init__(self, kept: Tensor) -> None:
        super().__init__()
        self.register_buffer("kept", kept)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, self.kept)


@pytest.mark.parametrize("name", ["sinks", "documents", "class token", "more keys"])
def test_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    kept, _, text = CASES[name]
    rows, keys = kept.shape
    given = [torch.randn(2, 2, n, 8, dtype=torch.float64) for n in (rows, keys, keys)]
    opt = attnopt.optimize(Masked(kept), tuple(given), backend="aten")
    (site,) = opt.report.sites
    assert site.mask == text
    wanted = F.scaled_dot_product_attention(*given, kept)
    assert torch.allclose(opt(*given), wanted, atol=1e-12)
