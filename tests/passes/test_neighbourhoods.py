"""Neighbourhoods (GNA) are recognised in plain PyTorch with their parameters, for random cases.

Three spellings: a bool buffer, an additive float buffer, index arithmetic in forward. What is
recognised must equal the definition exactly, key by key.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import attnopt
from attnopt.ir.mask import Band, Causal, Mask, Neighborhood, Windows
from attnopt.ir.spec import Spec
from attnopt.kernels.reference import reference
from attnopt.passes.analyze.neighbourhoods import grids
from tests.passes.lifting import find


@dataclass(frozen=True)
class Case:
    """Grid lengths, and per axis the window, stride, dilation and whether it is causal."""

    length: tuple[int, ...]
    window: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    causal: tuple[bool, ...]

    @property
    def tokens(self) -> int:
        return math.prod(self.length)

    @property
    def axes(self) -> list[tuple[int, int, int, int, bool]]:
        return list(zip(self.length, self.window, self.stride, self.dilation, self.causal,
                        strict=True))


def axis(n: int, w: int, s: int, d: int, causal: bool) -> list[list[bool]]:
    """The definition along one axis, query by query, in plain integers."""
    rows = []
    for i in range(n):
        group, p = i % d, i // d
        members = -(-(n - group) // d)
        if causal:
            leader = min(p // s * s + s - 1, members - 1)
            start, end = max(leader - w + 1, 0), p + 1
        else:
            leader = min(p // s * s + s // 2, members - 1)
            start = min(max(leader - w // 2, 0), members - w)
            end = start + w
        rows.append([j % d == group and start <= j // d < end for j in range(n)])
    return rows


def definition(case: Case) -> Tensor:
    kept = torch.ones(1, 1, dtype=torch.int8)
    for along in case.axes:
        kept = torch.kron(kept, torch.tensor(axis(*along), dtype=torch.int8))
    return kept.bool()


def draw(seed: int) -> Case:
    """A case whose windows are smaller than their axes, so that its parameters are its own."""
    pick = random.Random(seed)
    dims = pick.choice((1, 2, 2, 3))
    length, window, stride, dilation, causal = [], [], [], [], []
    for _ in range(dims):
        n = pick.randint(4, {1: 40, 2: 14, 3: 8}[dims])
        d = pick.choice([d for d in (1, 1, 1, 2, 3) if 2 * d < n])
        w = pick.randint(2, max(2, (n - 1) // d))
        length.append(n)
        dilation.append(d)
        window.append(w)
        stride.append(pick.choice((1, 1, pick.randint(1, w))))
        causal.append(pick.random() < 0.25)
    return Case(tuple(length), tuple(window), tuple(stride), tuple(dilation), tuple(causal))


# -- three spellings ------------------------------------------------------------------------------
def in_forward(case: Case) -> Tensor:
    """The same in index arithmetic, as an author writes it with tensors."""
    tokens = torch.arange(case.tokens)
    keep = torch.ones(case.tokens, case.tokens, dtype=torch.bool)
    inside = case.tokens
    for n, w, s, d, causal in case.axes:
        inside //= n
        place = tokens // inside % n
        group, p = place % d, place // d
        members = (n - group + d - 1) // d
        leader = torch.minimum(p // s * s + (s - 1 if causal else s // 2), members - 1)
        if causal:
            start, end = (leader - w + 1).clamp(min=0), p + 1
        else:
            start = torch.minimum((leader - w // 2).clamp(min=0), members - w)
            end = start + w
        keep = keep & (group[None, :] == group[:, None]) & (
            p[None, :] >= start[:, None]) & (p[None, :] < end[:, None])
    return keep


def spellings(case: Case) -> dict[str, tuple[Callable[..., Tensor], Callable[[Any], None]]]:
    kept = definition(case)

    def bool_buffer(self: Any) -> None:
        self.register_buffer("kept", kept)

    def float_buffer(self: Any) -> None:
        self.register_buffer("added", torch.zeros(kept.shape).masked_fill(~kept, -torch.inf))

    return {
        "bool buffer": (lambda self, q, k: self.kept[None, None], bool_buffer),
        "float buffer": (lambda self, q, k: self.added, float_buffer),
        "index arithmetic": (lambda self, q, k: in_forward(case), lambda self: None),
    }


def check(seed: int) -> None:
    case = draw(seed)
    wanted = definition(case)
    assert torch.equal(in_forward(case), wanted)
    for name, (forward, setup) in spellings(case).items():
        found = find(forward, sizes=(case.tokens, case.tokens), setup=setup)
        assert found.mask is not None and found.structural, (name, case, found.reason)
        assert found.exact and found.rows_kept, (name, case)
        kept = found.mask.to_dense(case.tokens, case.tokens)
        assert torch.equal(kept, wanted), (name, case, found.mask)
        assert same_parameters(found.mask, case), (name, case, str(found.mask))


def same_parameters(mask: Mask, case: Case) -> bool:
    """The case's own grid and windows axis by axis, or another reading that is as plain."""
    if isinstance(mask, Band | Causal):
        return len(case.length) == 1 and case.causal == (True,) and case.dilation == (1,)
    if isinstance(mask, Windows):
        return case.stride == case.window
    if not isinstance(mask, Neighborhood):
        return False
    own = zip(mask.length, mask.window, mask.stride, mask.dilation, mask.causal, strict=True)
    if mask.length == case.length:  # several strides may mean the same windows
        return all(axis(*a) == axis(*b) for a, b in zip(own, case.axes, strict=True))
    return _plainness(mask) <= _plainness(case)


def _plainness(x: Neighborhood | Case) -> int:
    return sum(s > 1 for s in x.stride) + sum(d > 1 for d in x.dilation)


@pytest.mark.parametrize("seed", range(20))
def test_random_cases(seed: int) -> None:
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(20, 300, 40))
def test_many_random_cases(first: int) -> None:
    for seed in range(first, first + 40):
        check(seed)


# -- borders --------------------------------------------------------------------------------------
CUT = "cut off at the borders"


def near(q: Tensor, k: Tensor, rows: int, columns: int, width: int) -> Tensor:
    dy, dx = q // width - k // width, q % width - k % width
    return (dy.abs() <= rows) & (dx.abs() <= columns)


def grid_mask(self: Any, query: Tensor, key: Tensor) -> Tensor:
    tokens = torch.arange(query.shape[2])
    return near(tokens[:, None], tokens[None], 2, 1, 9)


def clamped_mask(self: Any, query: Tensor, key: Tensor) -> Tensor:
    tokens = torch.arange(query.shape[2])
    y, x = tokens // 9, tokens % 9
    cy, cx = y.clamp(2, 8 - 1 - 2), x.clamp(1, 9 - 1 - 1)
    return ((cy[:, None] - y).abs() <= 2) & ((cx[:, None] - x).abs() <= 1)


def test_cut_and_pushed_windows_differ() -> None:
    cut = find(grid_mask, sizes=(72, 72))
    assert cut.text == f"window 5x3 of 8x9, {CUT}"
    pushed = find(clamped_mask, sizes=(72, 72))
    assert pushed.mask == Neighborhood((5, 3), length=(8, 9))
    tokens = torch.arange(72)
    assert cut.mask is not None
    assert torch.equal(cut.mask.to_dense(72, 72), near(tokens[:, None], tokens[None], 2, 1, 9))


def rows_of(tokens: Tensor) -> tuple[Tensor, Tensor]:
    return tokens // 9, tokens % 9


def any_cut(self: Any, query: Tensor, key: Tensor) -> Tensor:
    tokens = torch.arange((query + key).shape[2])  # one length for both
    return near(tokens[:, None], tokens[None], 2, 1, 9)


def any_clamped(self: Any, query: Tensor, key: Tensor) -> Tensor:
    count = (query + key).shape[2]
    y, x = rows_of(torch.arange(count))
    cy, cx = y.clamp(2, count // 9 - 1 - 2), x.clamp(1, 9 - 1 - 1)
    return ((cy[:, None] - y).abs() <= 2) & ((cx[:, None] - x).abs() <= 1)


def any_started(self: Any, query: Tensor, key: Tensor) -> Tensor:
    count = (query + key).shape[2]
    y, x = rows_of(torch.arange(count))
    first = torch.minimum((y - 2).clamp(min=0), torch.full_like(y, count // 9 - 5))[:, None]
    left = (x - 1).clamp(0, 6)[:, None]
    return (y >= first) & (y < first + 5) & (x >= left) & (x < left + 3)


def any_wrong(self: Any, query: Tensor, key: Tensor) -> Tensor:
    """Right at the captured length only."""
    count = (query + key).shape[2]
    y, x = rows_of(torch.arange(count))
    cy, cx = y.clamp(2, 8 - 1 - 2), x.clamp(1, 9 - 1 - 1)
    return ((cy[:, None] - y).abs() <= 2) & ((cx[:, None] - x).abs() <= 1)


@pytest.mark.parametrize("forward", [any_clamped, any_started])
def test_windows_for_every_length(forward: Callable[..., Tensor]) -> None:
    found = find(forward, sizes=(72, 72), dynamic=True)
    assert found.mask == Neighborhood((5, 3), length=(None, 9))
    assert found.text == "window 5x3 of nx9"
    for rows in (1, 3, 5, 6, 13):
        given = torch.zeros(1, 1, 9 * rows, 1)
        assert torch.equal(found.mask.to_dense(9 * rows, 9 * rows), forward(None, given, given))


def test_cut_windows_for_every_length() -> None:
    found = find(any_cut, sizes=(72, 72), dynamic=True)
    assert found.mask is not None
    assert found.text == f"window 3, {CUT} within window 5 of rows of 9"
    for count in (9, 30, 90):
        given = torch.zeros(1, 1, count, 1)
        assert torch.equal(found.mask.to_dense(count, count), any_cut(None, given, given))


def test_windows_of_one_length_are_not_those_of_another() -> None:
    found = find(any_wrong, sizes=(72, 72), dynamic=True)
    assert found.mask is not None and not isinstance(found.mask, Neighborhood)
    given = torch.zeros(1, 1, 90, 1)
    assert torch.equal(found.mask.to_dense(90, 90), any_wrong(None, given, given))


def test_one_key_less_is_no_neighbourhood() -> None:
    def setup(self: Any) -> None:
        kept = definition(Case((6, 7), (3, 3), (1, 1), (1, 1), (False, False)))
        kept[20, 20] = False
        self.register_buffer("kept", kept)

    assert find(lambda self, q, k: self.kept, sizes=(42, 42), setup=setup).mask is None


def test_grids_are_all_factorisations() -> None:
    assert set(grids(12, 2)) == {(2, 6), (6, 2), (3, 4), (4, 3)}
    assert grids(7, 2) == [] and grids(7, 1) == [(7,)]
    assert all(a * b * c == 96 for a, b, c in grids(96, 3))


# -- in a model -----------------------------------------------------------------------------------
class Local(torch.nn.Module):
    """2-D attention whose window is a dense buffer."""

    kept: Tensor

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.register_buffer("kept", definition(case))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, self.kept)


def test_report_and_result() -> None:
    case = Case((8, 9), (5, 4), (1, 2), (1, 2), (False, False))
    model = Local(case).double()
    given = [torch.randn(2, 3, 72, 8, dtype=torch.float64) for _ in range(3)]
    opt = attnopt.optimize(model, tuple(given), backend="aten")
    (site,) = opt.report.sites
    assert site.mask == "window 5x4 stride 1x2 dilation 1x2 of 8x9"
    wanted = F.scaled_dot_product_attention(*given, definition(case))
    assert torch.allclose(opt(*given), wanted, atol=1e-12)
    model.kept[:, 0] = True  # the buffer's values are guarded
    changed = F.scaled_dot_product_attention(*given, model.kept)
    assert torch.allclose(opt(*given), changed, atol=1e-12)


@pytest.mark.parametrize("seed", range(0, 40, 8))
def test_reference_of_the_mask(seed: int) -> None:
    """What a Spec with the recognised mask means, in float64."""
    case = draw(seed)
    query, key, value = (torch.randn(1, 2, case.tokens, 4, dtype=torch.float64) for _ in range(3))
    mask = Neighborhood(case.window, case.stride, case.dilation, case.causal, case.length)
    out = reference(Spec(mask=mask))(query, key, value, {})
    scores = (query @ key.mT).masked_fill(~definition(case), -torch.inf)
    assert torch.allclose(out, scores.softmax(-1) @ value, atol=1e-12)
