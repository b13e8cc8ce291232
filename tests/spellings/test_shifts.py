"""Rows that softmax cannot normalise, and empty batches, give what the author's program gives."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch

import attnopt
from tests.spellings import shift_spellings as spelled
from tests.spellings.attention_spellings import TABLE
from tests.spellings.checking import describe, differences, oracle, run, taken
from tests.spellings.program import SIZES, Spelling, build, draw


@pytest.mark.parametrize("fill", [-math.inf, math.inf, math.nan, -1e4, -3e38])
@pytest.mark.parametrize("whole", [True, False], ids=["whole row", "one key"])
@pytest.mark.parametrize("program", [spelled.scaled_maximum, spelled.scaled_maximum_by_hand],
                         ids=lambda f: f.__name__)
def test_rows_without_a_finite_maximum(program: Callable, whole: bool, fill: float) -> None:
    original = build(program)
    q, k, v, mask = draw(spelled.MASKED, SIZES)
    mask = torch.zeros_like(mask)
    mask[0, ..., slice(None) if whole else 3] = fill
    opt = attnopt.optimize(copy.deepcopy(original), (q, k, v, torch.zeros_like(mask)))
    assert taken(opt), describe(opt)
    call = (q, k, v, mask)
    exact = oracle(original, call, gradients=False)
    wrong = differences(run(opt, call, gradients=False), run(original, call, gradients=False),
                        exact)
    assert not wrong, f"{wrong}; {describe(opt)}"


@pytest.mark.parametrize("spelling", TABLE[::3], ids=lambda s: s.name)
def test_an_empty_batch_is_taken(spelling: Spelling) -> None:
    sizes = spelling.at(b=0)
    original = build(spelling.first, spelling.setup, sizes)
    inputs = draw(spelling.inputs, sizes)
    opt = attnopt.optimize(copy.deepcopy(original), inputs)
    assert taken(opt), describe(opt)
    expected = run(original, inputs, gradients=False)
    found = run(opt, inputs, gradients=False)
    assert {n: x.shape for n, x in found.items()} == {n: x.shape for n, x in expected.items()}
    call = draw(spelling.inputs, spelling.at())
    exact = oracle(original, call, gradients=False)
    assert not differences(run(opt, call, gradients=False),
                           run(original, call, gradients=False), exact)
