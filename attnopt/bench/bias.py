"""Attention with a bias, on this CPU: each row beside the author's own code and torch.compile.

Clock and columns are those of the suite cpu, with SDPA and FlexAttention where they can say the
same; the bias that these take is made beforehand and not counted. The row of training counts the
gradient of the table as well. The last row is a whole model's share of attention: all that a Swin
model does between its linear layers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from attnopt.bench import memory
from attnopt.bench.attentions import Alibi
from attnopt.bench.bias_attentions import AxisRows, Buckets, PairBias, SwinStages, Window
from attnopt.bench.rows import chosen, measured
from attnopt.bench.side_by_side import OURS, Case, hold_peak, ratio, run_case, site
from attnopt.timing import interleave

_STAGES = "swin stages"
#: the share of the peak of eager code that a row may take
_PEAKS = {"sam 64x64": 0.1}


def every(quick: bool = False) -> list[Case]:
    """The rows but the last. quick: the same on short sequences, without goals."""
    n = 256 if quick else 2048
    window, edge, pairs, rows = (6, 16, 32, 4) if quick else (24, 64, 256, 128)
    found = [
        Case("alibi", functools.partial(Alibi, 8), length=n,
             goals={"eager": (5, 7), "compile": (2.2, 3)}),
        Case("t5 buckets", functools.partial(Buckets, 8), length=n,
             goals={"eager": (4, 6), "compile": (1.8, 2.5)}),
        Case("swin 24x24", functools.partial(Window, 8, window), length=window**2, batch=4,
             head_dim=32, goals={"eager": (2.5, 4)}),
        Case("sam 64x64", functools.partial(AxisRows, edge, 64), length=edge**2,
             goals={"eager": (3, 5)}),
        Case("pair bias", functools.partial(PairBias, 4, pairs), heads=4, length=pairs,
             head_dim=32, batch=rows, goals={"eager": (2, 3)}),
        Case("training t5 buckets", functools.partial(Buckets, 8), length=n, training=True,
             baselines=("eager", "compile"), goals={"eager": (1.5, 3)}),
    ]
    return [dataclasses.replace(case, goals={}) for case in found] if quick else found


def measure(
    optimize: Callable[..., Any],
    *,
    repeats: int | None = None,
    compiled: bool | None = None,
    quick: bool = False,
    cases: Iterable[str] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Rows by name; the options are those of the suite cpu, repeats 7 by default."""
    repeats = repeats or (3 if quick else 7)
    compiled = not quick if compiled is None else compiled

    def run(case: Case) -> dict[str, Any]:
        if case.name == _STAGES:
            return run_stages(optimize, repeats, compiled, quick)
        row = run_case(case, optimize, repeats=repeats, compiled=compiled)
        hold_peak(row, 0.0 if quick else _PEAKS.get(case.name, 0.0))
        return row

    rows = [*every(quick), Case(_STAGES, functools.partial(Alibi, 8))]
    return measured(chosen(rows, cases), run, say)


def run_stages(optimize: Callable[..., Any], repeats: int, compiled: bool,
               quick: bool) -> dict[str, Any]:
    """The row of `SwinStages`: plain numbers and strings as `run_case` gives them."""
    options = {"side": 28, "heads": (3, 6), "depths": (2, 2)} if quick else {}
    model = SwinStages(**options).eval()  # type: ignore[arg-type]
    inputs = model.inputs()
    goals = {} if quick else {"eager": (3.0, 6.0)}
    with torch.no_grad():
        optimized = optimize(model, inputs, verify=False)
        steps: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "eager": functools.partial(model, *inputs)}
        if compiled:
            torch.compiler.reset()
            steps["compile"] = functools.partial(torch.compile(model, dynamic=False), *inputs)
        steps[OURS] = functools.partial(optimized, *inputs)
        exact = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        errors = {name: max((a - b).abs().max().item() for a, b in zip(step(), exact, strict=True))
                  for name, step in steps.items()}
        peaks = {name: memory.peak(step, torch.device("cpu")) for name, step in steps.items()}
        times = interleave(steps, repeats)
    heads = "/".join(map(str, model.heads))
    return {
        "shape": f"B1 H{heads} map {model.sides[0]} window {model.window} d{model.head_dim}",
        "dtype": "fp32", "training": False, "device": "cpu", "threads": 1, "rounds": repeats,
        "clock": "cpu",
        "ours": {**site(optimized.report),
                 "rewritten": sum(s.status == "rewritten" for s in optimized.report.sites),
                 "sites": len(optimized.report.sites)},
        "contestants": {name: {"seconds": statistics.median(times[name]), "error": errors[name],
                               "peak_bytes": peaks[name]} for name in steps},
        "left_out": {},
        "ratios": {name: ratio(times[name], times[OURS], goals.get(name))
                   for name in steps if name != OURS},
    }
