"""The fuzzer with a small budget, and tests of the fuzzer itself."""

from __future__ import annotations

import random

import pytest
import torch

from tests.fuzz.choices import OPTIONS, SIMPLEST, Choices, draw, legal
from tests.fuzz.generator import render
from tests.fuzz.runner import (
    change_constants,
    choices_of,
    fuzz,
    laid_out,
    reproduction,
    shrink,
)

SEED = 0


def check(indices: range) -> None:
    tally = fuzz(indices, SEED)
    assert not tally.failures, "\n\n".join(reproduction(shrink(f)) for f in tally.failures[:3])
    assert len(tally.invalid) < len(indices) / 20, tally.invalid[:5]
    assert tally.taken >= 0.6, tally.table()


def test_a_few_programs() -> None:
    check(range(60))


@pytest.mark.slow
@pytest.mark.parametrize("start", range(0, 3000, 500))
def test_many_programs(start: int) -> None:
    check(range(start, start + 500))


def test_every_answer_is_drawn_and_legal() -> None:
    drawn = [draw(random.Random(i)) for i in range(4000)]
    for name, options in OPTIONS.items():
        assert {getattr(c, name) for c in drawn} == set(options), name
    assert all(legal(c) == c for c in drawn[:200])
    assert all(getattr(Choices(), name) == value for name, value in SIMPLEST.items())


def test_an_index_names_one_program() -> None:
    assert render(choices_of(1, 17)).text == render(choices_of(1, 17)).text
    assert len({render(choices_of(1, i)).text for i in range(50)}) > 40


@pytest.mark.parametrize("memory", ["contiguous", "strided", "transposed"])
def test_layouts_keep_values(memory: str) -> None:
    x = torch.randn(2, 3, 4)
    assert torch.equal(laid_out(x, memory), x)


@pytest.mark.parametrize("route", list(OPTIONS["route"]))
def test_every_route_changes_the_constants(route: str) -> None:
    choices = legal(Choices(bias="buffer", bias_too="table", mask="attribute"))
    module, untouched = render(choices).build(3), render(choices).build(3)
    assert change_constants(module, route)
    for name in ("buffer_0", "table_1", "kept"):
        assert not torch.equal(getattr(module, name), getattr(untouched, name)), name
