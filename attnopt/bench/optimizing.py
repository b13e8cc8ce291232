"""What `optimize` itself costs, verification included, beside torch's own capture.

The yardstick is torch.export followed by run_decompositions({}). The slope over 12, 24 and 48
layers shows whether the cost per site stays the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from attnopt.bench.encoder import encoder
from attnopt.timing import format_seconds, interleave

LAYERS = (12, 24, 48)
SIZE, HEADS, BATCH, LENGTH = 384, 12, 2, 64


def export(model: torch.nn.Module, args: tuple[Any, ...]) -> object:
    """The yardstick."""
    return torch.export.export(model, args, strict=False).run_decompositions({})


def measure(
    optimize: Callable[..., Any], *, repeats: int = 5, say: Callable[[str], None] = print
) -> dict[str, Any]:
    """Seconds of both per number of layers, their ratio, and the steps that `optimize` reports."""
    results: dict[str, Any] = {}
    for layers in LAYERS:
        model, args = encoder(layers, SIZE, HEADS, BATCH, LENGTH)
        times = interleave(
            {"optimize": lambda: optimize(model, args),  # noqa: B023
             "export": lambda: export(model, args),  # noqa: B023
             "forward": lambda: model(*args)},  # noqa: B023
            repeats, warmup=1, min_seconds=0)
        pairs = zip(times["optimize"], times["export"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        report = optimize(model, args).report
        medians = {name: statistics.median(t) for name, t in times.items()}
        results[f"{layers} layers"] = {
            "ratio": ratio, "sites": len(report.sites), "steps_s": dict(report.timings),
            **{f"{name}_s": t for name, t in medians.items()}}
        say(f"{layers} layers: optimize {format_seconds(medians['optimize'])}, export "
            f"{format_seconds(medians['export'])}, ratio {ratio:.2f}; "
            f"{format_seconds(medians['optimize'] / layers)} per layer")
    first, last = (results[f"{n} layers"]["optimize_s"] / n for n in (LAYERS[0], LAYERS[-1]))
    results["growth"] = last / first
    say(f"time per layer at {LAYERS[-1]} layers / at {LAYERS[0]}: {last / first:.2f}")
    return results
