"""Attention kernels on this CPU: every row beside eager code, SDPA, torch.compile, FlexAttention.

One thread and CPU time, so that other programs hardly count; only the row of two threads takes wall
time, and needs an idle machine. `goals` are what the project asks of each row.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.bench.attentions import Alibi, Attention, Causal, Softcap
from attnopt.bench.rows import chosen, measured
from attnopt.bench.side_by_side import OURS, Case, ratio, run_case, site
from attnopt.timing import interleave

_DENSE = {"sdpa": (1.1, 1.4)}
_SCORE = {"eager": (5.0, 7.0), "compile": (2.2, 3.0)}
_TRAINING = {"eager": (1.5, 3.0), "sdpa": (0.9, 1.2)}
CASES = (
    Case("dense", Attention, goals={"sdpa": (1.15, 1.4)}),
    Case("dense bf16", Attention, dtype=torch.bfloat16, goals={"sdpa": (2.0, 2.8)}),
    Case("dense d32", Attention, head_dim=32, goals=_DENSE),
    Case("dense d128", Attention, head_dim=128, goals=_DENSE),
    Case("dense batch", Attention, batch=4, length=1024, goals=_DENSE),
    Case("grouped queries", Attention, heads=32, kv_heads=8, length=1024, goals=_DENSE),
    Case("alibi", functools.partial(Alibi, 8), goals=_SCORE),
    Case("softcap", Softcap, goals=_SCORE),
    Case("causal", Causal, length=4096, goals=_DENSE),
    Case("training dense", Attention, training=True, goals=_TRAINING),
    Case("training alibi", functools.partial(Alibi, 8), training=True, goals=_TRAINING),
    Case("training softcap", Softcap, training=True, goals={"eager": _TRAINING["eager"]}),
)
TWO_THREADS = Case("two threads", Attention, baselines=("1 thread",),
                   goals={"1 thread": (1.7, 1.9)})
#: lengths are divided by this in the quick mode
_QUICK = 8


def measure(
    optimize: Callable[..., Any],
    *,
    repeats: int | None = None,
    compiled: bool | None = None,
    quick: bool = False,
    cases: Iterable[str] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Rows by name.

    repeats: rounds, by default 15, or 3 when quick; compiled: also what torch.compile makes, by
    default unless quick; quick: short sequences, to see that everything runs; cases: patterns of
    names, None for all.
    """
    repeats = repeats or (3 if quick else 15)
    compiled = not quick if compiled is None else compiled

    def run(case: Case) -> dict[str, Any] | None:
        if quick:
            case = dataclasses.replace(case, length=case.length // _QUICK, goals={})
        if case.name != TWO_THREADS.name:
            return run_case(case, optimize, repeats=repeats, compiled=compiled)
        if (os.cpu_count() or 1) > 1:
            return run_threads(case, optimize, repeats)
        say(f"{case.name}: left out, this machine has one processor")
        return None

    return measured(chosen([*CASES, TWO_THREADS], cases), run, say)


def run_threads(case: Case, optimize: Callable[..., Any], repeats: int) -> dict[str, Any]:
    """Ours with one thread against ours with two, in wall time; `goals` by "1 thread"."""
    attention, inputs = case.make().eval(), case.inputs(torch.device("cpu"))
    with torch.no_grad():
        optimized = optimize(attention, inputs, verify=False)
        steps = {name: functools.partial(_with_threads, count, optimized, inputs)
                 for name, count in (("1 thread", 1), (OURS, 2))}
        times = interleave(steps, repeats, clock="wall")
    return {
        "shape": case.shape, "dtype": case.precision, "training": False, "device": "cpu",
        "threads": 2, "rounds": repeats, "clock": "wall", "ours": site(optimized.report),
        "contestants": {name: {"seconds": statistics.median(t)} for name, t in times.items()},
        "left_out": {},
        "ratios": {"1 thread": ratio(times["1 thread"], times[OURS], case.goals.get("1 thread"))},
    }


def _with_threads(count: int, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        module(*inputs)
    finally:
        torch.set_num_threads(before)
