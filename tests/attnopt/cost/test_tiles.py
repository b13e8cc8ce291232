"""Tile counts: the published simulator, products of axes against whole states, other masks."""

import csv
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.cost.tiles import axis_states, count_tiles, ideal_density
from attnopt.ir.intervals import EMPTY, FULL, GridTile, tile_states
from attnopt.ir.mask import (
    ALL,
    Band,
    Causal,
    KeyKeep,
    Mask,
    Neighborhood,
    Prefix,
    Where,
    Windows,
)

DATA = Path(__file__).parent / "data"


def read(name: str) -> list[dict[str, str]]:
    with open(DATA / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


TABLE = read("natten_simulator.csv")
#: share of the time that attention takes in the published models
SHARE = {"flux": 0.518, "hunyuan": 0.607}


@pytest.mark.parametrize("row", TABLE, ids=[f"{r['case']} {r['stride']}" for r in TABLE])
def test_the_published_simulator_is_reproduced(row: dict[str, str]) -> None:
    length = numbers(row["length"])
    mask = Neighborhood(numbers(row["window"]), numbers(row["stride"]), length=length)
    tiles = [GridTile(length, numbers(row[name])) for name in ("query_tile", "key_tile")]
    n = math.prod(length)
    counts = count_tiles(mask, n, n, *tiles)
    assert (counts.worst, counts.key_tiles) == (int(row["visited"]), int(row["total"]))
    assert counts.speedup == pytest.approx(float(row["speedup"]), abs=0.01)
    if row["end_to_end"]:
        f = SHARE[row["case"]]
        assert 1 / (1 - f + f / counts.speedup) == pytest.approx(float(row["end_to_end"]), abs=0.01)


def test_shares_of_full_tiles() -> None:
    """Figures that a count by hand gave: 50 % (2-D), 17 % and 45 % (3-D), 89 % (1-D)."""
    line = count_tiles(Neighborhood(2048, length=32768), 32768, 32768, 128, 128)
    assert round(line.full_share, 2) == 0.89 and line.average_speedup > line.speedup
    length = (30, 48, 80)
    video = Neighborhood((18, 24, 24), length=length)
    for shape, share in (((2, 8, 8), 0.17), ((4, 4, 4), 0.45)):
        tile = GridTile(length, shape)
        counts = count_tiles(video, 115200, 115200, tile, tile, tail=True)
        assert round(counts.full_share, 2) == share


@settings(max_examples=40)
@given(st.data())
def test_axes_give_the_same_as_the_whole(data: st.DataObject) -> None:
    length = tuple(data.draw(st.lists(st.integers(3, 7), min_size=1, max_size=3)))
    window = tuple(data.draw(st.integers(2, n)) for n in length)
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    causal = tuple(data.draw(st.booleans()) for _ in length)
    first = data.draw(st.sampled_from([length[0], None]))
    mask: Mask = data.draw(st.sampled_from([
        Neighborhood(window, stride, length=(first, *length[1:])), Windows(window, length),
        Neighborhood(window, stride, causal=causal, length=length),
        Neighborhood(window, length=length) & Windows(stride, length)]))
    tiles = [GridTile(length, tuple(data.draw(st.integers(1, 4)) for _ in length))
             for _ in range(2)]
    n = math.prod(length)
    assert axis_states(mask, n, n, *tiles) is not None
    counts = count_tiles(mask, n, n, *tiles)
    states = tile_states(mask.predicate(), n, n, *tiles)
    assert torch.equal(counts.full, (states == FULL).sum(-1))
    assert torch.equal(counts.visited, (states != EMPTY).sum(-1))
    counts = count_tiles(mask, n, n, *tiles, tail=True)
    whole = count_tiles(Where(mask.predicate()), n, n, *tiles, tail=True)
    assert torch.equal(counts.full, whole.full) and torch.equal(counts.partial, whole.partial)


def test_other_masks() -> None:
    counts = count_tiles(Causal(), 512, 512, 64, 64)
    assert counts.visited.tolist() == list(range(1, 9)) and counts.partial.tolist() == [1] * 8
    assert counts.density == 36 / 64 and counts.worst == 8 and counts.total == 64
    counts = count_tiles(Causal() & KeyKeep("pad"), 512, 512, 64, 64, (2, 4))
    assert counts.full.sum() == 0 and counts.visited.tolist() == [[list(range(1, 9))]]
    pad = torch.arange(512) < torch.tensor([512, 256]).view(2, 1, 1, 1)
    counts = count_tiles(Causal() & KeyKeep("pad"), 512, 512, 64, 64, (2, 4), {"pad": pad})
    assert counts.visited.shape == (2, 1, 8) and counts.full[0, 0].tolist() == list(range(8))
    assert counts.visited[1, 0].tolist() == [1, 2, 3, 4, 4, 4, 4, 4]
    counts = count_tiles(ALL, 100, 100, 64, 32, (3,))
    assert counts.full.tolist() == [[4, 4]] and counts.density == 1.0
    for mask in (ALL, Prefix(100)):
        assert count_tiles(mask, 100, 100, 64, 32, tail=True).partial.tolist() == [1, 1]
        assert count_tiles(mask, 100, 96, 64, 32, tail=True).partial.tolist() == [0, 0]
    assert count_tiles(~ALL, 100, 100, 64, 32).worst == 0


def test_masks_that_are_no_product_of_axes() -> None:
    tile = GridTile((8, 8), (4, 4))
    grid = Neighborhood((3, 3), length=(8, 8))
    assert axis_states(grid & Causal(), 64, 64, tile, tile) is None
    assert axis_states(grid, 64, 64, 16, 16) is None
    assert axis_states(Neighborhood((3, 3), length=(4, 16)), 64, 64, tile, tile) is None
    assert count_tiles(grid & Causal(), 64, 64, tile, tile).visited.tolist() == [2, 2, 4, 4]


def test_multi_dimensional_tiles_visit_less() -> None:
    """The image of FLUX, window 80: row-major tiles of 128 visit 160 of 512, boxes 68 on average.
    """
    n, mask = 256 * 256, Neighborhood((80, 80), length=(256, 256))
    box = GridTile((256, 256), (16, 8))
    assert count_tiles(mask, n, n, 128, 128).worst == 160
    boxes = count_tiles(mask, n, n, box, box)
    assert boxes.worst == 77 and round(float(boxes.visited.double().mean())) == 68


def test_densities() -> None:
    assert ideal_density(Neighborhood((3, 3), length=(8, 8)), 64, 64) == 9 / 64
    assert ideal_density(Windows((4, 4), (8, 8)), 64, 64) == 0.25
    assert ideal_density(ALL, 64, 64) == 1.0
    assert ideal_density(Band(-3, 0), 64, 64) is ideal_density(Prefix(3), 64, 64) is None
