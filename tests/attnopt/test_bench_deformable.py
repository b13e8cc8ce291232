"""The suite `deformable`: all spellings of a row mean the same, and its rows are complete."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import attnopt
from attnopt.bench import deformable
from attnopt.bench.sampling import by_hand, composed
from attnopt.bench.side_by_side import OURS
from attnopt.kernels.deformable import ops

CASES = {case.name: case for case in deformable.every(quick=True)}


@pytest.mark.parametrize("name", CASES)
def test_one_meaning_by_hand_and_by_the_author(name: str) -> None:
    case = CASES[name]
    inputs, hand = case.inputs(torch.device("cpu")), by_hand(case)
    expected = case.module()(*inputs)
    torch.testing.assert_close(hand(*inputs), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(composed()(hand)(*inputs), expected, atol=1e-5, rtol=1e-5)


def test_composed_is_without_kernels_for_its_time_only() -> None:
    before = ops.gather, ops.gradients
    with composed():
        assert ops.gather() is None and ops.gradients() is None
    assert (ops.gather, ops.gradients) == before


@pytest.mark.parametrize("names", [
    ["aten decoder 300"],
    pytest.param(["lifting 29x50", "training encoder 4,500"], marks=pytest.mark.slow)])
def test_rows_and_their_table(names: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    said: list[str] = []
    rows = deformable.measure(attnopt.optimize, quick=True, repeats=1, cases=names,
                              say=said.append)
    assert set(rows) == set(names)
    for name, row in rows.items():
        hand = set() if name.startswith("aten") else {"op"}
        assert set(row["contestants"]) == {"eager", OURS} | hand
        assert row["ours"]["status"] == "rewritten"
        assert all(found["error"] < 2e-5 for found in row["contestants"].values())
        assert not name.startswith("aten") or row["ours"]["lowering"] == "aten"
        assert any(line.startswith(name) for line in said)
    json.dumps(rows)


def test_goals_are_those_of_the_project() -> None:
    cases: dict[str, Any] = {case.name: case for case in deformable.every()}
    goals = {name: case.goals["eager"] for name, case in cases.items()}
    assert goals["encoder 4,500"] == goals["encoder 17,800"] == (12, 25)
    assert goals["decoder 300"] == (5, 10) and goals["lifting 29x50"] == (18, 45)
    assert goals["training encoder 4,500"][0] == 3 and cases["lifting 29x50"].most == 1 / 30
    assert [goals[name][0] for name in cases if name.startswith("aten")] == [2.2, 2, 6]
    texels = [cases[f"encoder {n}"].texels for n in ("4,500", "17,800")]
    assert texels == [4484, 17821]
