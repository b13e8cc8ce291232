"""Compare the time of functions fairly on a machine that is busy with other things.

Each round calls every function once, in an order drawn anew, so that a slow phase of the machine
hits all of them alike; what is compared is the ratio within a round. The interval of the median
ratio comes from the order statistics of those ratios (the sign test turned around): it assumes
nothing of how times are distributed and draws no random numbers.

With one thread the clock is CPU time, which other processes do not lengthen. With several threads,
or on an accelerator, CPU time is not what a user waits for, so the clock is the wall's.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from attnopt.errors import OptionError

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
_CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Seconds per call of two functions, `baseline[i]` and `candidate[i]` from the same round.

    `fallbacks` counts calls of the candidate that ran the baseline's code after all.
    """

    baseline: tuple[float, ...]
    candidate: tuple[float, ...]
    names: tuple[str, str] = ("original", "optimised")
    clock: str = "cpu"
    threads: int = 1
    device: str = "cpu"
    fallbacks: int = 0
    #: filled in from the times
    ratios: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.baseline) != len(self.candidate) or not self.baseline:
            raise OptionError(
                "baseline and candidate must be of one length above 0, "
                f"got {len(self.baseline)} and {len(self.candidate)}")
        ratios = tuple(
            b / c if c > 0 else math.inf
            for b, c in zip(self.baseline, self.candidate, strict=True))
        object.__setattr__(self, "ratios", ratios)

    @property
    def speedup(self) -> float:
        """Median over the rounds of baseline time / candidate time; above 1 is faster."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the median ratio; with fewer than 6 rounds simply the range."""
        return median_interval(self.ratios)

    @property
    def medians(self) -> tuple[float, float]:
        """Median seconds per call of baseline and candidate."""
        return statistics.median(self.baseline), statistics.median(self.candidate)

    @property
    def p_value(self) -> float:
        """Two-sided sign test of "neither is faster"; rounds that tie are left out."""
        faster = sum(r > 1 for r in self.ratios)
        slower = sum(r < 1 for r in self.ratios)
        n = faster + slower
        tail = sum(math.comb(n, k) for k in range(min(faster, slower) + 1))
        return min(1.0, 2 * tail / 2**n)

    def __str__(self) -> str:
        low, high = self.interval
        base, new = self.medians
        verdict = f"{self.speedup:.2f}x"
        if low <= 1 <= high:
            verdict += ", no difference shown"
        clock = "CPU time" if self.clock == "cpu" else "wall time"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        text = (
            f"{self.names[0]} {format_seconds(base)}, {self.names[1]} {format_seconds(new)}: "
            f"{verdict} ({self._meaning} {low:.2f}x to {high:.2f}x; {len(self.ratios)} interleaved "
            f"pairs, {clock}, {threads}{'' if self.device == 'cpu' else ', ' + self.device})")
        if self.fallbacks:
            text += f"; {self.fallbacks} {self.names[1]} calls ran the module's own forward"
        return text

    @property
    def _meaning(self) -> str:
        return "95% interval" if len(self.ratios) >= 6 else "range"


def interleave(
    fns: Mapping[str, Callable[[], object]],
    repeats: int = 30,
    *,
    threads: int = 1,
    clock: str | None = None,
    synchronize: Callable[[], None] | None = None,
    min_seconds: float = 2e-3,
    warmup: int = 2,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Seconds per call of each function, one figure per round.

    A function that is faster than `min_seconds` is called several times per round. `synchronize`
    waits for an accelerator and goes with the wall clock. torch's thread count and the garbage
    collector are left as they were found.

    Raises:
        OptionError: repeats or threads below 1, or no such clock.
    """
    for name, number in (("repeats", repeats), ("threads", threads)):
        if number < 1:
            raise OptionError(f"{name} must be at least 1, got {number}")
    clock = clock or ("cpu" if threads == 1 and synchronize is None else "wall")
    if clock not in CLOCKS:
        raise OptionError(f"clock must be one of {', '.join(CLOCKS)}, got {clock!r}")
    now, order, draw = CLOCKS[clock], list(fns), random.Random(seed)
    wait = synchronize or (lambda: None)

    def sample(fn: Callable[[], object], calls: int) -> float:
        wait()
        start = now()
        for _ in range(calls):
            fn()
        wait()
        return (now() - start) / calls

    times: dict[str, list[float]] = {name: [] for name in fns}
    with _quiet(threads):
        calls = {}
        for name, fn in fns.items():
            once = min((sample(fn, 1) for _ in range(warmup)), default=min_seconds)
            calls[name] = max(1, min(1000, math.ceil(min_seconds / max(once, 1e-9))))
        for _ in range(repeats):
            draw.shuffle(order)
            for name in order:
                times[name].append(sample(fns[name], calls[name]))
    return times


def compare(
    baseline: Callable[[], object],
    candidate: Callable[[], object],
    repeats: int = 30,
    *,
    threads: int = 1,
    device: str = "cpu",
    names: tuple[str, str] = ("original", "optimised"),
    **options: Any,
) -> Comparison:
    """`interleave` of two functions; `device` other than "cpu" takes wall time with a wait."""
    wait = device_wait(device)
    times = interleave({"baseline": baseline, "candidate": candidate}, repeats, threads=threads,
                       synchronize=wait, **options)
    clock = options.get("clock") or ("cpu" if threads == 1 and wait is None else "wall")
    return Comparison(tuple(times["baseline"]), tuple(times["candidate"]), names, clock, threads,
                      device)


def device_wait(device: str) -> Callable[[], None] | None:
    """What waits for all work on a device of this type, None on the CPU."""
    kind = torch.device(device).type
    if kind in ("cpu", "meta"):
        return None
    return getattr(torch, kind).synchronize


def median_interval(values: tuple[float, ...]) -> tuple[float, float]:
    """Distribution-free 95 % interval of the median; the range where there are too few values."""
    ordered, n = sorted(values), len(values)
    below, cut = 0.0, 0
    for k in range(n // 2):
        below += math.comb(n, k) / 2**n
        if 2 * below > 1 - _CONFIDENCE:
            break
        cut = k
    return ordered[cut], ordered[n - 1 - cut]


def format_seconds(seconds: float) -> str:
    """"1.25 s", "12.5 ms", "830 us": three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if abs(seconds) >= size:
            return f"{_three(seconds / size)} {unit}"
    return f"{_three(seconds / 1e-6)} us"


def _three(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


@contextmanager
def _quiet(threads: int) -> Iterator[None]:
    """This many torch threads and no garbage collection in between."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    gc.collect()
    gc.disable()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()
