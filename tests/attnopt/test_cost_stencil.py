"""The time model of the stencil: what it counts, and that it orders what was measured."""

import dataclasses

import pytest

from attnopt.cost.devices import find_cpu
from attnopt.cost.stencil import COEFFICIENTS, Grid, features, grid_of, seconds
from attnopt.cost.work import Work

XEON = dataclasses.replace(find_cpu("Intel(R) Xeon(R) Processor @ 2.50GHz", "avx512"), cores=2)


def window(length: int, keys: int) -> list[tuple[int, int]]:
    return [(min(max(i - keys // 2, 0), length - keys), keys) for i in range(length)]


def square(length: int, keys: int, rows: int = 4) -> Grid:
    return grid_of([[(0, 1)], window(length, keys), window(length, keys)], rows)


def work(tokens: int, dim: int = 32, heads: int = 4) -> Work:
    return Work(heads, heads, tokens, tokens, dim, dim)


def test_grid() -> None:
    grid = square(56, 7)
    assert grid.length == (1, 56, 56) and grid.window == (1, 7, 7)
    assert 9 <= grid.shared <= 10  # four rows share ten rows of keys, fewer at the borders
    one = grid_of([[(0, 1)], [(0, 1)], window(40, 5)], 1)
    assert one == Grid((1, 1, 40), (1, 1, 5), 1.0, 1)
    cropped = grid_of([[(0, 1)], [(0, 2), (0, 3), (1, 2)], [(0, 1), (0, 2)]], 2)
    assert cropped.window == (1, 3, 2) and cropped.shared == pytest.approx((2 + 3) / 2)


def test_counts() -> None:
    counted = features(XEON, work(3136), square(56, 7))
    blocks = 4 * 14 * 4
    assert counted["stencil.block"] == blocks
    assert counted["stencil.score"] == blocks * 4 * 49
    assert counted["stencil.fma"] == blocks * 4 * 49 * 64
    assert counted["stencil.token"] == 8 * 3136 * 64
    assert set(counted) == set(COEFFICIENTS)


@pytest.mark.parametrize("length, keys, milliseconds", [
    (56, 3, 2.7), (56, 7, 3.8), (56, 13, 7.3), (28, 7, 1.1), (112, 7, 17.7), (64, 9, 6.3)])
def test_measured(length: int, keys: int, milliseconds: float) -> None:
    found = 1e3 * seconds(XEON, work(length * length), square(length, keys))
    assert found == pytest.approx(milliseconds, rel=0.25)


def test_larger_windows_and_fewer_threads_take_longer() -> None:
    alone = [seconds(XEON, work(3136), square(56, n)) for n in (3, 5, 9, 21)]
    assert alone == sorted(alone)
    assert seconds(XEON, work(3136), square(56, 9), 2) < alone[2]
