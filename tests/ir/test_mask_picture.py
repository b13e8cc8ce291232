"""Density and pictures of masks against the dense mask."""

from __future__ import annotations

import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import Tensor

from attnopt.ir import density as counting
from attnopt.ir import expr as E
from attnopt.ir.density import count, density, known_part, tokens
from attnopt.ir.intervals import EMPTY, FULL, PARTIAL
from attnopt.ir.mask import (
    ALL,
    NONE,
    Band,
    BlockMap,
    Causal,
    Globals,
    KeyKeep,
    Mask,
    Neighborhood,
    Placed,
    Prefix,
    Reindex,
    Segments,
    Select,
    Where,
    Windows,
)
from attnopt.ir.mask_base import K, Q
from attnopt.ir.mask_picture import pooled
from attnopt.ir.tiling import GridTile, members

IDS = torch.tensor([0] * 5 + [1] * 9 + [2] * 1 + [3] * 20)
OPERANDS = {"rows": IDS[:, None], "columns": IDS[None], "pad": torch.rand(2, 1, 1, 35) > 0.4,
            "blocks": torch.rand(5, 3) > 0.5, "heads": torch.rand(3, 5, 3) > 0.5}
MASKS: dict[str, tuple[Mask, int, int]] = {
    "all": (ALL, 5, 7), "none": (NONE, 5, 7), "causal": (Causal(), 35, 35),
    "ends": (Causal(E.size("k") - E.size("q")), 9, 35), "wide": (Causal(), 5, 70),
    "band": (Band(-3, 2), 35, 30), "window": (Band(-6, 0) & Causal(), 35, 35),
    "prefix": (Prefix(4) | Causal(), 35, 35), "globals": (Globals(3) | Band(-2, 2), 35, 35),
    "inverse": (~Band(-3, 4), 35, 35), "line": (Neighborhood((5,)), 35, 35),
    "line, even, strided": (Neighborhood((6,), (4,)), 35, 35),
    "line, causal": (Neighborhood((6,), (3,), causal=(True,)), 35, 35),
    "dilated": (Neighborhood((3,), dilation=(4,)), 35, 35),
    "grid": (Neighborhood((3, 5), length=(5, 7)), 35, 35),
    "grid, open": (Neighborhood((3, 4), (2, 1), (1, 1), (True, False), (None, 7)), 35, 35),
    "video": (Neighborhood((2, 3, 3), length=(3, 5, 7)), 105, 105),
    "partition": (Windows((4,)), 35, 35), "boxes": (Windows((2, 3), (5, 7)), 35, 35),
    "rolled": (Reindex((Q - 2) % E.size("q"), Windows((5,))), 35, 35),
    "both": (Neighborhood((3, 5), length=(5, 7)) & Causal(), 35, 35),
    "segments": (Segments("rows", "columns") & Causal(), 35, 35),
    "padding": (KeyKeep("pad") & Causal(), 35, 35),
    "blocks": (BlockMap("blocks", 7, 12), 35, 35),
    "by head": (BlockMap("heads", 7, 12, ("h",)) & Causal(), 35, 35),
    "select": (Select("h", (Causal(), Band(-4, 0), ALL)), 35, 35),
    "select grids": (Select("h", (Windows((2, 3), (5, 7)), KeyKeep("pad"))), 35, 35),
    "placed": (Placed(Causal(), (E.const(4), E.const(20)), (E.const(4), E.const(20))), 35, 35),
    "where": (Where((Q * K % 3).eq(0)), 35, 35), "empty": (Causal(), 0, 4), "one": (Causal(), 1, 1),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_density_is_exact(name: str) -> None:
    mask, queries, keys = MASKS[name]
    leading = (2, 3)
    used = {slot: OPERANDS[slot] for slot in mask.slots}
    dense = mask.to_dense(queries, keys, leading, used)
    assert count(mask, queries, keys, leading, used) == int(dense.sum())
    shown = mask.picture(queries, keys, tile=8, leading=leading, operands=used)
    assert shown.density == pytest.approx(float(dense.double().mean()) if dense.numel() else 0)
    assert shown.tile_density >= shown.density - 1e-12
    assert shown.waste is not None and -1e-12 <= shown.waste <= 1
    assert str(shown).endswith("skipped") and ElementTree.fromstring(shown.svg()) is not None


def test_counting_gives_up() -> None:
    mask = Where((Q * K % 3).eq(0))
    assert density(mask, 300, 300, most=1000) is None
    shown = mask.picture(300, most=1000)
    assert shown.density is None and shown.waste is None and "density" not in repr(shown)
    assert "nothing" in NONE.describe()


def test_states_are_those_of_the_dense_mask() -> None:
    mask = Neighborhood((3, 5), length=(5, 7)) & Causal()
    tile = GridTile((5, 7), (2, 3))
    shown = mask.picture(35, tile=tile)
    dense = mask.to_dense(35, 35)
    place, there = tokens(tile, 35)
    assert torch.equal(place, members(tile, 35))
    kept = 0
    for i, row in enumerate(shown.panels[0].states.tolist()):
        for j, state in enumerate(row):
            part = dense[place[i][there[i]]][:, place[j][there[j]]]
            kept += part.numel() if state != EMPTY else 0
            assert state != FULL or bool(part.all())
            assert state != EMPTY or not bool(part.any())
    assert shown.tile_density == pytest.approx(kept / 35**2)
    assert "(2x3)x(2x3)" in repr(shown)


def test_a_text_picture() -> None:
    text = str(Band(-7, 0).picture(40, tile=8))
    assert text.splitlines() == [
        "causal window 8, 40 rows x 40 keys",
        "density 18.2%, in tiles of 8x8 36%, 0% of them full, waste 49.3%",
        "▒▒········", "▒▒▒▒······", "··▒▒▒▒····", "····▒▒▒▒··", "······▒▒▒▒",
        "██ full  ▒▒ partial  ·· skipped"]


def test_heads_have_their_own_pictures() -> None:
    shown = Select("h", (Causal(), Band(-9, 0), Causal())).picture(40, tile=8, leading=(2, 3))
    assert [p.label for p in shown.panels] == ["h0, h2", "h1"]
    many = BlockMap("map", 8, 8, ("h",)).picture(
        40, tile=8, leading=(9,), operands={"map": torch.eye(25)[:9].view(9, 5, 5) > 0})
    assert len(many.panels) == 4 and many.unseen == 5 and "and 5 more" in str(many)


def test_missing_operands_are_taken_to_keep() -> None:
    mask = Causal() & KeyKeep("pad") & Where((K > 2) & E.load("other", dtype=E.BOOL))
    assert known_part(mask, set()) == Causal() & Where(K > 2)
    shown = mask.picture(16)
    assert shown.open == ("other", "pad") and "may hide" in repr(shown)
    assert shown.density == float((Causal() & Where(K > 2)).to_dense(16, 16).double().mean())


def test_pooling() -> None:
    states = torch.tensor([[FULL, FULL, EMPTY], [FULL, FULL, EMPTY], [PARTIAL, EMPTY, FULL]])
    assert pooled(states.to(torch.int8), 2).tolist() == [[FULL, EMPTY], [PARTIAL, FULL]]
    assert pooled(states.to(torch.int8), 3).tolist() == states.tolist()


def test_nothing_large_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A video of 115,200 tokens: the scores would be 13 GB even as truth values."""
    largest = 0
    made: list[Tensor] = []

    def watched(*args: object, **options: object) -> Tensor:
        found = original(*args, **options)
        made.append(found)
        return found

    original = counting.tile_states
    monkeypatch.setattr(counting, "tile_states", watched)
    start = time.process_time()
    shown = Neighborhood((18, 24, 24), length=(30, 48, 80)).picture(
        115200, tile=GridTile((30, 48, 80), (2, 8, 8)))
    largest = max([largest, *(t.numel() for t in made)])
    assert shown.density == pytest.approx(18 * 24 * 24 / 115200)
    assert largest <= 2000**2 and time.process_time() - start < 60
    assert len(str(shown).splitlines()) < 40 and len(shown.svg()) < 500_000
