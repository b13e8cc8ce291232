"""Reshapes read backwards: which axes each dimension holds, also where an axis has no element."""

from __future__ import annotations

import pytest

from attnopt.passes.recognize.axes import Axis, Layout, reshape, settle
from attnopt.rules import Decline


def axes(*sizes: int) -> tuple[Axis, ...]:
    return tuple(Axis(s) for s in sizes)


def one_each(*own: Axis) -> Layout:
    return tuple((a,) for a in own)


@pytest.mark.parametrize("batch", [0, 3])
def test_dimensions_are_joined(batch: int) -> None:
    b, h, s, d = axes(batch, 4, 10, 16)
    assert reshape(one_each(b, h, s, d), (batch * 4, 10, 16)) == ((b, h), (s,), (d,))
    assert reshape(one_each(h, b, s, d), (batch * 4, 160)) == ((h, b), (s, d))
    assert reshape(one_each(b, s, h, d), (1, batch, 10, 64)) == ((), (b,), (s,), (h, d))


@pytest.mark.parametrize("batch", [0, 3])
def test_a_dimension_is_cut(batch: int) -> None:
    whole, s, c = axes(batch * 4, 10, 64)
    found = reshape(one_each(whole, s, c), (batch, 4, 10, 4, 16))
    assert [a.size for dim in found for a in dim] == [batch, 4, 10, 4, 16]
    assert settle(one_each(whole, s, c)) == (found[0] + found[1], (s,), found[3] + found[4])


@pytest.mark.parametrize("shape", [(0, 7, 16), (0, 0, 10, 16), (0, 4, 10, 3, 16)])
def test_an_empty_axis_is_not_guessed(shape: tuple[int, ...]) -> None:
    b, h, s, d = axes(0, 4, 10, 16)
    with pytest.raises(Decline):
        reshape(one_each(b, h, s, d), shape)
