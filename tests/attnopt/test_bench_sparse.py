"""The suite `sparse`: all spellings of a row mean the same, and its rows are complete."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.bench import block_lists, sparse, summary
from attnopt.bench.exact import truth, visible
from attnopt.bench.side_by_side import OURS, Case
from attnopt.bench.sparse_attentions import document_lengths, sentence_lengths
from attnopt.report import Report

CPU = torch.device("cpu")
CASES = {case.name: case for case in sparse.every(quick=True)}


class Itself:
    """Stands for an optimised module."""

    def __init__(self, module: Any, args: tuple[Tensor, ...], **options: Any) -> None:
        self.module, self.report = module, Report()

    def __call__(self, *args: Tensor) -> Tensor:
        return self.module(*args)


@pytest.mark.parametrize("name", list(CASES))
def test_one_meaning_in_all_spellings(name: str) -> None:
    case = CASES[name]
    attention, (q, k, v) = case.make().eval(), case.inputs(CPU)
    attention.see(q, k, v)
    with torch.no_grad():
        exact = truth(attention, q, k, v, heads=2)
        assert exact.error((attention(q, k, v, *attention.extras()),)) < 5e-6
        options = attention.fused(q, k)
        assert options is not None
        assert exact.error((F.scaled_dot_product_attention(q, k, v, **options),)) < 5e-6
        for other in attention.others().values():
            assert exact.error((other(q, k, v),)) < 5e-6
    mask = options["attn_mask"].expand(case.batch, case.heads, case.length, case.length)[:, 0]
    kept = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min
    assert visible(attention, case.length, case.length, CPU, case.batch) == int(kept.sum())


def test_goals_are_those_of_the_project() -> None:
    goals = {case.name: case.goals for case in sparse.every()}
    assert goals["causal window"]["sdpa"] == (13, 22)
    assert goals["2-D window 7"]["unfold"][0] == 28
    least, aim = goals["packed causal"]["sdpa"]
    assert aim / least == pytest.approx(1.1 / 0.75)
    assert least == pytest.approx(2 * goals["packed"]["sdpa"][0])
    assert all(goal["flex"][0] == 1 for goal in goals.values())


def test_lengths() -> None:
    found = document_lengths(16, 4096)
    assert len(found) == 16 and sum(found) == 4096 and min(found) >= 1
    sentences = sentence_lengths(16)
    assert sentences[0] == 8 and sentences[-1] > 128 and list(sentences) == sorted(sentences)


def test_rows_and_their_table() -> None:
    said: list[str] = []
    rows = sparse.measure(Itself, quick=True, repeats=1, cases=["2-D window 7", "block lists"],
                          say=said.append)
    assert set(rows) == {"2-D window 7", "block lists"}
    assert {"eager", "sdpa", "unfold", OURS} == set(rows["2-D window 7"]["contestants"])
    assert rows["block lists"]["same_tiles"] is True
    assert "create_block_mask" in rows["block lists"]["contestants"]
    assert "unfold" in said[-3] and "create_block_mask" in said[-3]
    json.dumps(rows)


def test_limits_show() -> None:
    lists = block_lists.Lists("small", (4, 8, 8), (3, 3, 3), peer=False,
                              limits={"seconds": 1e-9, "peak_bytes": 1e12})
    row = block_lists.run(lists, 1)
    assert row["limits"]["seconds"]["missed"] and not row["limits"]["peak_bytes"]["missed"]
    assert "must not exceed 1 MB" not in summary.line("small", row)
    assert "MISSED" in summary.line("small", row)


def test_a_composition_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.bench.memory.free", lambda device: 10)
    case = Case("small", CASES["causal window"].make, 1, 16, 8, baselines=("eager", "sdpa"))
    from attnopt.bench.side_by_side import run_case

    row = run_case(case, Itself, repeats=1, compiled=False)
    assert "GB" in row["left_out"]["eager"] and set(row["contestants"]) == {"sdpa", OURS}
