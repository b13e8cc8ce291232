"""Every spelling is taken, and computes what the author's program computes.

Each pair is first compared with itself in float64, so that a slip in a spelling cannot pass for
one in attnopt; then both members go through `attnopt.optimize` unverified, so that a wrong rewrite
is seen here and not put back. The table of the peers runs in every setting; the default slice takes
a few settings of it and one of the rest, the full cross product is marked slow.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass

import pytest
import torch

import attnopt
from tests.spellings.attention_spellings import SDPA_ROWS, TABLE
from tests.spellings.checking import agree, describe, differences, oracle, run, sites, taken
from tests.spellings.mask_spellings import MASKS
from tests.spellings.normaliser_spellings import NORMALISERS
from tests.spellings.program import Spelling, build, draw, dynamic_shapes
from tests.spellings.score_spellings import SCORES
from tests.spellings.shift_spellings import SHIFTED

ROWS = TABLE + SDPA_ROWS
WIDER = MASKS + SCORES + NORMALISERS + SHIFTED


@dataclass(frozen=True)
class Setting:
    """How one program is optimised and called."""

    dtype: torch.dtype = torch.float32
    training: bool = False
    dynamic: bool = False
    batch: int = 2

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), "train" if self.training else "eval",
                 "dynamic" if self.dynamic else "static", f"batch {self.batch}"]
        return ", ".join(words)


EVERY = [
    Setting(*choice)
    for choice in itertools.product(
        (torch.float32, torch.bfloat16), (False, True), (False, True), (2, 1)
    )
]
FEW = [
    Setting(),
    Setting(dtype=torch.bfloat16, training=True, batch=1),
    Setting(training=True, dynamic=True),
]
LARGE = [s for s in EVERY if s.batch == 2 or s.dtype is torch.float32]
TWICE = Setting()
ONE = [Setting(training=True)]


def cases(spellings: list[Spelling], settings: list[Setting], default: list[Setting]) -> list:
    """(spelling, 0 or 1, setting); what is not among the default settings is marked slow."""
    return [
        pytest.param(
            spelling, form, setting, id=f"{spelling.name}-{'ab'[form]}-{setting}",
            marks=[] if setting in default else [pytest.mark.slow],
        )
        for spelling, form, setting in itertools.product(spellings, (0, 1), settings)
    ]


def check(spelling: Spelling, form: int, setting: Setting) -> None:
    """Optimises one program and compares it at its own shape and at others."""
    sizes = spelling.at(**({"b": setting.batch} if "b" in spelling.moving else {}))
    original = build(spelling.forms()[form], spelling.setup, sizes)
    original.to(setting.dtype).train(setting.training)
    inputs = draw(spelling.inputs, sizes, setting.dtype)
    shapes = dynamic_shapes(spelling.inputs, spelling.moving) if setting.dynamic else None

    opt = attnopt.optimize(
        copy.deepcopy(original), inputs, verify=False, dynamic_shapes=shapes
    )
    if spelling.required:
        kept = [s for s in sites(opt) if s.status == "kept"]
        assert taken(opt) and not kept, describe(opt)

    calls = [inputs, draw(spelling.inputs, spelling.elsewhere(), setting.dtype, seed=1)]
    if setting == TWICE:  # a kind of call that comes back is captured as well
        calls.append(calls[-1])
    if setting.dynamic and "b" in spelling.moving:  # outside the range of the captured symbol
        calls.append(draw(spelling.inputs, spelling.at(b=1), setting.dtype, seed=2))
    for call in calls:
        gradients = setting.training and spelling.gradients
        expected = run(original, call, gradients=gradients)
        exact = oracle(original, call, gradients=gradients)
        wrong = differences(run(opt, call, gradients=gradients), expected, exact)
        shape = [list(x.shape) for x in call]
        assert not wrong, f"at {shape}: {wrong}; {describe(opt)}"


@pytest.mark.parametrize("spelling", ROWS + WIDER, ids=lambda s: s.name)
def test_a_pair_is_one_program(spelling: Spelling) -> None:
    for sizes in (spelling.at(), spelling.elsewhere()):
        inputs = draw(spelling.inputs, sizes, torch.float64)
        results = [
            oracle(build(form, spelling.setup, spelling.at()).double(), inputs, gradients=True)
            for form in spelling.forms()
        ]
        assert agree(*results)


def test_the_table_is_whole() -> None:
    names = [s.name for s in ROWS]
    assert len(TABLE) == 39 and len(SDPA_ROWS) == 3
    assert len({s.name for s in ROWS + WIDER}) == len(ROWS + WIDER), names


@pytest.mark.parametrize(("spelling", "form", "setting"), cases(ROWS, EVERY, FEW))
def test_table(spelling: Spelling, form: int, setting: Setting) -> None:
    check(spelling, form, setting)


@pytest.mark.parametrize(("spelling", "form", "setting"), cases(WIDER, LARGE, ONE))
def test_wider(spelling: Spelling, form: int, setting: Setting) -> None:
    check(spelling, form, setting)


@pytest.mark.parametrize("spelling", ROWS[::7], ids=lambda s: s.name)
def test_verification_takes_the_same(spelling: Spelling) -> None:
    original = build(spelling.first, spelling.setup, spelling.at())
    inputs = draw(spelling.inputs, spelling.at())
    opt = attnopt.optimize(original, inputs, verify=True)
    assert taken(opt), describe(opt)
    assert all(s.error is not None for s in taken(opt)), describe(opt)


def test_example_inputs_that_are_one_tensor() -> None:
    """torch.export folds equal example tensors into one; other calls must not inherit that."""
    spelling = ROWS[0]
    original = build(spelling.first)
    q, k, v = draw(spelling.inputs, spelling.at())
    opt = attnopt.optimize(copy.deepcopy(original), (q, q, q), verify=False)
    for call in ((q, q, q), (q, k, v), (q, k, k)):
        exact = oracle(original, call, gradients=False)
        expected = run(original, call, gradients=False)
        with torch.no_grad():
            found = {"output 0": opt(*call)}
        assert not differences(found, expected, exact)
