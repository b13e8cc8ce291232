"""Halos against masks that are written out: every key that a box sees, and none twice."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir import expr as E
from attnopt.ir.axis_tables import mask_states
from attnopt.ir.halos import boxes_of, grid_of, halo_sizes, halos
from attnopt.ir.intervals import EMPTY, FULL, GridTile, tile_lists, tile_states
from attnopt.ir.mask import ALL, Band, Causal, KeyKeep, Mask, Neighborhood, Reindex, Windows

q = E.index("q")


def check(mask: Mask, tokens: int, box: tuple[int, ...]) -> None:
    found = halos(mask, tokens, tokens, box)
    assert found is not None
    kept = mask.to_dense(tokens, tokens)
    rows = found.order[found.order >= 0]
    assert sorted(rows.tolist()) == list(range(tokens))
    assert found.order.shape[1] == math.prod(box)
    for i, order in enumerate(found.order):
        own = order[order >= 0].long()
        keys = found.keys[found.starts[i]:found.starts[i + 1]].long()
        full = keys[:int(found.full[i])]
        assert len(set(keys.tolist())) == len(keys)
        assert kept[own][:, full].all()
        hidden = torch.ones(tokens, dtype=torch.bool)
        hidden[keys] = False
        assert not kept[own][:, hidden].any()


@st.composite
def neighborhoods(draw: st.DrawFn) -> tuple[Neighborhood, int, tuple[int, ...]]:
    dims = draw(st.integers(1, 3))
    length = tuple(draw(st.integers(2, 8)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, max(1, n // 2))) for n in length)
    window = tuple(draw(st.integers(1, n // d)) for n, d in zip(length, dilation, strict=True))
    stride = tuple(draw(st.integers(1, w)) for w in window)
    causal = tuple(draw(st.booleans()) for _ in length)
    box = tuple(draw(st.integers(1, n)) for n in length)
    return Neighborhood(window, stride, dilation, causal, length), math.prod(length), box


@settings(max_examples=60, deadline=None)
@given(neighborhoods())
def test_neighborhoods(drawn: tuple[Neighborhood, int, tuple[int, ...]]) -> None:
    mask, tokens, box = drawn
    if grid_of(mask, tokens, tokens) is None:  # one axis without dilation needs no boxes
        assert len(box) == 1 and mask.dilation == (1,)
        return
    check(mask, tokens, box)


def test_what_is_joined_to_a_grid() -> None:
    near, parts = Neighborhood((3, 3), length=(6, 8)), Windows((2, 4), (6, 8))
    check(near & parts, 48, (2, 3))
    alone = halos(near, 48, 48, (4, 4))
    assert alone is not None and alone.full.sum() > 0
    for mask in (near & Causal(), near & KeyKeep("pad")):  # what else hides is left to the kernel
        found = halos(mask, 48, 48, (4, 4))
        assert found is not None and found.full.sum() == 0
        assert torch.equal(found.starts, alone.starts)


def test_masks_that_are_no_product_of_axes() -> None:
    check(Reindex((q + 5) % E.size("q"), Windows((3, 3), (6, 9))), 54, (3, 3))
    check(Neighborhood((3, 3), length=(5, 7)) | Causal(), 35, (2, 3))
    by_row = Neighborhood((3, 3), length=(None, 7))
    check(by_row, 35, (2, 3))
    check(by_row, 49, (2, 3))


def test_what_has_no_grid() -> None:
    for mask in (ALL, Causal(), Band(-3, 0), Neighborhood((5,), length=(20,)),
                 Neighborhood((3, 3), length=(6, 6)), Neighborhood((3, 3), length=(4, 5))
                 & Windows((2, 2), (5, 4))):
        assert grid_of(mask, 20, 20) is None and halos(mask, 20, 20, (2, 2)) is None
    assert halos(Neighborhood((3, 3), length=(4, 5)), 20, 20, (2,)) is None
    assert halo_sizes(Neighborhood((3, 3), length=(4, 5)), 0, 0, (2, 2)) is None


def test_a_halo_is_a_window_and_its_box() -> None:
    sizes = halo_sizes(Neighborhood((7, 7), length=(56, 56)), 3136, 3136, (7, 8))
    assert sizes is not None
    seen, full = sizes
    assert seen.max() == 13 * 14 and seen.min() == 10 * 11  # clamped where two borders meet
    # In a corner rows 0 to 6 share keys 3 to 6, columns 0 to 7 share 4 to 6; elsewhere none.
    assert full.max() == 4 * 3 and full[17] == 0


def test_boxes_waste_little() -> None:
    grid = grid_of(Neighborhood((3, 3), length=(14, 9)), 126, 126)
    assert grid is not None
    boxes = boxes_of(grid, 30)
    assert (7, 3) in boxes and (5, 3) in boxes
    assert all(12 <= math.prod(box) <= 30 for box in boxes)
    assert not any(box[0] in (4, 6) for box in boxes)  # 16 or 18 rows for 14


@pytest.mark.parametrize("mask", [
    Neighborhood((3, 5), length=(9, 10)), Neighborhood((3, 5), length=(9, 10)) & Windows(
        (3, 5), (9, 10)), Causal()])
def test_states_by_axes_are_those_of_intervals(mask: Mask) -> None:
    tiles = GridTile((9, 10), (2, 4)), GridTile((9, 10), (3, 3))
    found = mask_states(mask, 90, 90, *tiles)
    others = tile_states(mask.predicate(), 90, 90, *tiles)
    assert torch.equal(found == EMPTY, others == EMPTY)
    assert torch.equal(found == FULL, others == FULL)
    assert tile_lists(found).tiles.numel() == int((found != EMPTY).sum())
