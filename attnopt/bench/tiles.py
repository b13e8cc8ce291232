"""Whether the cost model chooses good tiles: on shapes that no calibration has seen, every legal
tile is measured beside the one that is chosen.

A shape is missed where the chosen tile is slower than the best by more than the bound, and the
whole 95 % bootstrap interval of that ratio lies beyond the bound. The best is the one with the
least median, which is in favour of none but the best.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from attnopt import kernels
from attnopt.bench import calibrate, calibrate_cpu, calibrate_gpu
from attnopt.bench.shapes import Shape
from attnopt.bench.side_by_side import bootstrap_interval
from attnopt.cost.choose import Candidate, Choice, choose
from attnopt.ir.spec import Schedule
from attnopt.kernels import cache
from attnopt.kernels.choosing import Problem, device
from attnopt.kernels.cpp.toolchain import toolchain
from attnopt.timing import format_seconds, interleave

COUNT, ROUNDS = 40, 15
#: the chosen tile may be slower than the best by this share, on 90 % of the shapes
BOUND, GPU_BOUND, GOAL = 0.10, 0.05, 0.9
HEAD_DIMS = (32, 48, 64, 96, 128)
#: floating-point operations of both products: below a call costs more than its tiles, above the
#: suite would take too long
LEAST, MOST = 2e6, 8e8
#: query rows of the shapes that decode
DECODING = (1, 4)


def random_shapes(count: int = COUNT, seed: int = 0) -> list[Shape]:
    """Shapes of all kinds for a CPU; none has the lengths and head_dim of a calibration's."""
    seen = {(s.queries, s.keys, s.head_dim) for s, _, _ in calibrate_cpu.SHAPES}
    draw = random.Random(seed)
    found: list[Shape] = []
    while len(found) < count:
        shape = _draw(draw)
        flops = 4.0 * shape.batch * shape.heads * shape.queries * shape.keys * shape.head_dim
        if LEAST <= flops <= MOST and (shape.queries, shape.keys, shape.head_dim) not in seen:
            found.append(shape)
    return found


def _draw(draw: random.Random) -> Shape:
    group = draw.choice((1, 1, 2, 4))
    batch, heads = draw.choice((1, 1, 2, 3)), group * draw.randint(1, 6)
    if draw.random() < 0.1:
        return Shape("dense", batch, heads, group, draw.choice(DECODING), _length(draw, 256, 8192),
                     draw.choice((64, 128)))
    head_dim, queries = draw.choice(HEAD_DIMS), _length(draw, 17, 2048)
    if draw.random() < 0.4:
        more = _length(draw, 17, 512) if draw.random() < 0.25 else 0
        return Shape("causal", batch, heads, group, queries, queries + more, head_dim)
    keys = queries if draw.random() < 0.5 else _length(draw, 17, 2048)
    return Shape("dense", batch, heads, group, queries, keys, head_dim)


def _length(draw: random.Random, low: int, high: int) -> int:
    return round(math.exp(draw.uniform(math.log(low), math.log(high))))


def gpu_shapes(count: int = COUNT, seed: int = 0) -> list[Shape]:
    """Shapes for a GPU, of which few kernels are compiled: lengths are multiples of 128, and heads
    neither 1 nor multiples of 16, to which Triton adapts a kernel."""
    draw, found = random.Random(seed), []
    for _ in range(count):
        heads, queries = draw.randint(2, 15), 128 * _length(draw, 2, 48)
        kind = draw.choice(("dense", "causal"))
        keys = queries if kind == "causal" else 128 * _length(draw, 2, 48)
        found.append(Shape(kind, draw.randint(2, 4), heads, 1, queries, keys,
                           draw.choice((64, 128)), torch.bfloat16))
    return found


# -- suites ---------------------------------------------------------------------------------------
def measure(
    optimize: Callable[..., Any] | None = None,
    *,
    repeats: int | None = None,
    quick: bool = False,
    budget: float | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The generated C++ kernel: results by shape, with every tile; empty without a compiler.

    repeats: rounds, by default 15, or 3 when quick; quick: two shapes with four tiles, to see that
    everything runs; budget: seconds after which no shape is begun. `optimize` plays no part here.
    """
    if toolchain().why_not():
        say(f"left out: {toolchain().why_not()}")
        return {}
    shapes = random_shapes()
    if quick:
        shapes = sorted(shapes, key=lambda s: s.work.flops)[:2]
    rounds = repeats or (3 if quick else ROUNDS)
    rows = {}
    for shape in _within(shapes, budget, say):
        rows[str(shape)] = row = _on_cpu(shape, rounds, 4 if quick else None)
        say(line(str(shape), row))
    return _result(rows, BOUND, rounds, device().source, say)


def measure_gpu(
    optimize: Callable[..., Any] | None = None,
    *,
    repeats: int | None = None,
    quick: bool = False,
    budget: float | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """The Triton kernel, as `measure`; empty where there is no CUDA device or no triton."""
    from attnopt.kernels import triton as generated

    if not torch.cuda.is_available() or not generated.available():
        say("left out: this torch finds no CUDA device" if generated.available()
            else "left out: triton is not installed")
        return {}
    rounds = repeats or (3 if quick else ROUNDS)
    facts = calibrate.known("gpu", cache.directory())
    rows = {}
    for shape in _within(gpu_shapes(2 if quick else COUNT), budget, say):
        rows[str(shape)] = row = _on_gpu(shape, rounds, 4 if quick else None, facts)
        say(line(str(shape), row))
    return _result(rows, GPU_BOUND, rounds, facts.source, say)


def _within(shapes: Sequence[Shape], budget: float | None, say: Callable[[str], None]
            ) -> Iterator[Shape]:
    end = time.monotonic() + budget if budget else math.inf
    for done, shape in enumerate(shapes):
        if time.monotonic() > end:
            say(f"no time for {len(shapes) - done} of {len(shapes)} shapes")
            return
        yield shape


def _on_cpu(shape: Shape, rounds: int, most: int | None) -> dict[str, Any]:
    choice = kernels.estimates(Problem(shape.spec, *shape.sizes, shape.dtype, threads=1), ("cpp",))
    predicted = _predicted(choice, most)
    tensors = shape.tensors()
    with torch.no_grad():
        kernels.prepare([(shape.spec, Schedule("cpp", tile), tensors) for tile in predicted])
        steps = {_name(tile): calibrate_cpu.kernel_call(shape, tile, tensors)  # type: ignore[arg-type]
                 for tile in predicted}
        return judged(interleave(steps, rounds), _named(predicted), BOUND)


def _on_gpu(shape: Shape, rounds: int, most: int | None, facts: Any) -> dict[str, Any]:
    from attnopt.kernels.triton import tiles
    from attnopt.kernels.triton.launch import device_name

    arch = device_name(torch.device("cuda", torch.cuda.current_device()))
    every = tiles.candidates(arch, shape.head_dim, shape.head_dim)
    with torch.no_grad():
        jobs = [(shape, tile) for tile in calibrate_gpu.spread(every, most or len(every))]
        ready, _ = calibrate_gpu.compiled(jobs, lambda line: None)
        candidates = [Candidate("triton", tile.texts, calibrate_gpu.usage_of(*job))
                      for job in ready for tile in job[1:]]
        predicted = _predicted(
            choose(candidates, shape.work, shape.spec.mask, facts), None)
        jobs = [(shape, tiles.Tile(*texts)) for texts in predicted]
        times = dict(zip(map(_name, predicted), calibrate_gpu.times(jobs, rounds), strict=True))
    return judged(times, _named(predicted), GPU_BOUND)


def _predicted(choice: Choice, most: int | None) -> dict[tuple[int, ...], float]:
    """Predicted seconds of the legal tiles of the tiled kernel, the chosen one first."""
    found = {e.candidate.tile: e.seconds for e in choice.table
             if not e.reason and e.candidate.seconds is None}
    return dict(list(found.items())[:most])


def _named(predicted: Mapping[tuple[int, ...], float]) -> dict[str, float]:
    return {_name(tile): seconds for tile, seconds in predicted.items()}


def _name(tile: Sequence[int]) -> str:
    return "x".join(map(str, tile))


# -- judgement ------------------------------------------------------------------------------------
def judged(times: Mapping[str, Sequence[float]], predicted: Mapping[str, float], bound: float
           ) -> dict[str, Any]:
    """What became of one shape.

    times: seconds of each tile by round; predicted: by tile, that of the chosen one first
    """
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    chosen, best = next(iter(predicted)), min(medians, key=lambda name: medians[name])
    ratios = [c / b for c, b in zip(times[chosen], times[best], strict=True)]
    low, high = bootstrap_interval(ratios) if chosen != best else (1.0, 1.0)
    regret = statistics.median(ratios) - 1
    errors = [abs(predicted[name] / medians[name] - 1) for name in medians]
    return {
        "chosen": chosen, "best": best, "regret": regret, "interval": [low - 1, high - 1],
        "within": medians[chosen] <= (1 + bound) * medians[best], "missed": low > 1 + bound,
        "prediction_error": statistics.mean(errors), "seconds": medians,
        "predicted": dict(predicted)}


def summary(rows: Mapping[str, Mapping[str, Any]], bound: float) -> dict[str, Any]:
    """What became of all shapes; "fulfilled" where 90 % of them are not missed."""
    if not rows:
        return {"shapes": 0, "fulfilled": False}
    regrets = [row["regret"] for row in rows.values()]
    missed = sum(row["missed"] for row in rows.values())
    return {
        "shapes": len(rows), "bound": bound, "goal": GOAL, "missed": missed,
        "within": sum(row["within"] for row in rows.values()),
        "fulfilled": len(rows) - missed >= GOAL * len(rows),
        "fewest_tiles": min(len(row["seconds"]) for row in rows.values()),
        "median_regret": statistics.median(regrets), "worst_regret": max(regrets),
        "prediction_error": statistics.mean(row["prediction_error"] for row in rows.values())}


def line(name: str, row: Mapping[str, Any]) -> str:
    """One shape as a line of text."""
    low, high = row["interval"]
    verdict = "missed" if row["missed"] else "within" if row["within"] else "not told apart"
    return (f"{name:36} {len(row['seconds'])} tiles, chosen {row['chosen']} "
            f"{format_seconds(row['seconds'][row['chosen']])}, best {row['best']} "
            f"{format_seconds(row['seconds'][row['best']])}: {row['regret']:+.1%} "
            f"({low:+.1%} to {high:+.1%}) {verdict}")


def _result(rows: dict[str, Any], bound: float, rounds: int, source: str,
            say: Callable[[str], None]) -> dict[str, Any]:
    if not rows:
        return {}
    found = summary(rows, bound)
    say(f"within {bound:.0%} of the best on {found['within']} of {found['shapes']} shapes, missed "
        f"{found['missed']}; median {found['median_regret']:.1%}, worst "
        f"{found['worst_regret']:.1%}; at least {found['fewest_tiles']} tiles each; predictions "
        f"off by {found['prediction_error']:.0%}")
    return {"summary": found, "rounds": rounds, "device": source, "shapes": rows}


