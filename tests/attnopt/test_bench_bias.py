"""The suite `bias`: all spellings of a row mean the same, and its rows are complete."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.bench import bias
from attnopt.bench.bias_attentions import SwinStages
from attnopt.bench.exact import truth
from attnopt.bench.side_by_side import OURS, hold_peak
from attnopt.report import Report

CASES = {case.name: case for case in bias.every(quick=True)}


class Itself:
    """Stands for an optimised module."""

    def __init__(self, module: Any, args: tuple[Tensor, ...], **options: Any) -> None:
        self.module, self.report = module, Report()

    def __call__(self, *args: Tensor) -> Tensor:
        return self.module(*args)


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if not c.training])
def test_one_meaning_in_all_spellings(name: str) -> None:
    case = CASES[name]
    attention, (q, k, v) = case.make().eval(), case.inputs(torch.device("cpu"))
    attention.see(q, k, v)
    with torch.no_grad():
        exact = truth(attention, q, k, v, heads=2)
        assert exact.error((attention(q, k, v, *attention.extras()),)) < 2e-5
        options = attention.fused(q, k)
        assert options is not None
        assert exact.error((F.scaled_dot_product_attention(q, k, v, **options),)) < 2e-5


def test_rows_and_their_table() -> None:
    said: list[str] = []
    names = ["pair bias", "training t5 buckets", "swin stages"]
    rows = bias.measure(Itself, quick=True, repeats=1, cases=names, say=said.append)
    assert set(rows) == set(names)
    assert {"eager", "sdpa", OURS} == set(rows["pair bias"]["contestants"])
    assert {"eager", OURS} == set(rows["swin stages"]["contestants"])
    assert rows["swin stages"]["contestants"][OURS]["error"] < 2e-5
    json.dumps(rows)


def test_goals_are_those_of_the_project() -> None:
    goals = {case.name: case.goals for case in bias.every()}
    assert goals["alibi"]["eager"][0] == 5 and goals["alibi"]["compile"][0] == 2.2
    assert goals["t5 buckets"]["eager"][0] == 4 and goals["t5 buckets"]["compile"][0] == 1.8
    assert goals["swin 24x24"]["eager"][0] == 2.5 and goals["sam 64x64"]["eager"][0] == 3
    assert goals["pair bias"]["eager"][0] == 2
    assert goals["training t5 buckets"]["eager"][0] == 1.5


def test_a_peak_is_held_against_that_of_eager_code() -> None:
    row: dict[str, Any] = {"contestants": {
        "eager": {"peak_bytes": 1000}, OURS: {"peak_bytes": 200}}}
    hold_peak(row, 0.1)
    assert row["limits"]["peak_bytes"] == {"must_not_exceed": 100.0, "missed": True}


def test_stages_differ_by_shift() -> None:
    model = SwinStages(side=28, heads=(3, 6), depths=(2, 2)).eval()
    with torch.no_grad():
        out = model(*model.inputs())
    assert [tuple(x.shape) for x in out] == [(1, 28, 28, 96)] * 2 + [(1, 14, 14, 192)] * 2
    assert (out[0] - out[1]).abs().max() > 0.1
