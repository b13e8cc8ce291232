"""One attention, computed by everything that can compute it, side by side in one process.

    eager     as the author wrote it
    sdpa      scaled_dot_product_attention, with a ready-made mask or bias where it needs one
    compile   torch.compile of the author's code
    flex      compiled FlexAttention, with block mask and score function
    unfold    or another name: a further spelling by an author, where the attention has one
    ours      attnopt.optimize of the author's code

A matrix product runs in the same rounds: its rate is the ceiling of which each row has a share. (A
CPU without bf16 instructions multiplies faster in fp32, then that is the ceiling of bf16 too.)
Work counts the visible scores only, 4 D operations each, and 3.5 times that with the gradients (the
usual count: five products going back, two of them forward again).
"""

from __future__ import annotations

import functools
import random
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import logs
from attnopt.bench import memory
from attnopt.bench.attentions import Attention
from attnopt.bench.exact import truth, visible
from attnopt.timing import device_wait, interleave

BASELINES = ("eager", "sdpa", "compile", "flex")
COMPILED = ("compile", "flex")
OURS = "ours"
_BACKWARD = 2.5
_RESAMPLES = 2000
#: edge of the square product that gives the ceiling
_PRODUCT = {"cpu": 768, "cuda": 8192}


@dataclass(frozen=True)
class Case:
    """One row: what is computed, on which sizes, and what the project asks of it.

    goals: by baseline, the ratio that must be reached and the one that is aimed at.
    """

    name: str
    make: Callable[[], Attention]
    heads: int = 8
    length: int = 2048
    head_dim: int = 64
    batch: int = 1
    kv_heads: int = 0
    dtype: torch.dtype = torch.float32
    training: bool = False
    baselines: tuple[str, ...] = BASELINES
    goals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @property
    def shape(self) -> str:
        """"B1 H32/8 N2048 d64"."""
        heads = f"{self.heads}/{self.kv_heads}" if self.kv_heads else str(self.heads)
        return f"B{self.batch} H{heads} N{self.length} d{self.head_dim}"

    @property
    def precision(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16",
                torch.float16: "fp16"}.get(self.dtype, str(self.dtype))

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, the same numbers at every call."""
        generator = torch.Generator().manual_seed(0)
        counts = (self.heads, *[self.kv_heads or self.heads] * 2)
        query, key, value = (
            torch.randn(self.batch, count, self.length, self.head_dim, generator=generator)
            .to(device, self.dtype).requires_grad_(self.training) for count in counts)
        return query, key, value


def run_case(
    case: Case,
    optimize: Callable[..., Any],
    *,
    device: str = "cpu",
    repeats: int = 15,
    compiled: bool = True,
    threads: int = 1,
) -> dict[str, Any]:
    """Everything that is known of one row, as plain numbers and strings; times in seconds.

    A baseline that cannot run is left out, with its reason under "left_out".
    """
    place = torch.device(device)
    attention = case.make().eval().to(place)
    inputs = case.inputs(place)
    attention.see(*inputs)
    gradient = torch.ones_like(inputs[0]) if case.training else None
    with torch.set_grad_enabled(case.training):
        steps, left_out = _baselines(case, attention, inputs, gradient, compiled)
        optimized = optimize(attention, (*inputs, *attention.extras()), verify=False)
        learned = tuple(attention.parameters())
        steps[OURS] = _step(_whole(optimized, attention), inputs, gradient, learned)
        exact = truth(attention, *inputs, gradient)
        errors = {name: exact.error(step()[:4]) for name, step in steps.items()}
        peaks = {name: memory.peak(step, place) for name, step in steps.items()}
        products = _products(case.dtype, place)
        before = _own_forward(optimized.report)
        times = interleave({**steps, **products}, repeats, threads=threads,
                           synchronize=device_wait(device))
    fastest = [min(round_) for round_ in zip(*(times[name] for name in products), strict=True)]
    rates = [2 * _PRODUCT[place.type]**3 / seconds for seconds in fastest]
    return {
        "shape": case.shape, "dtype": case.precision, "training": case.training,
        "device": place.type, "threads": threads, "rounds": repeats,
        "clock": "cpu" if threads == 1 and place.type == "cpu" else "wall",
        "ours": {**site(optimized.report),
                 "own_forward_calls": _own_forward(optimized.report) - before},
        "contestants": {name: {"seconds": statistics.median(times[name]), "error": errors[name],
                               "peak_bytes": peaks[name]} for name in steps},
        "left_out": left_out,
        "ratios": {name: ratio(times[name], times[OURS], case.goals.get(name))
                   for name in steps if name != OURS},
        **_share(case, attention, place, times[OURS], rates),
    }


def ratio(baseline: Iterable[float], ours: Iterable[float],
          goal: tuple[float, float] | None = None) -> dict[str, Any]:
    """Median over the rounds of baseline / ours with its 95 % bootstrap interval.

    With a goal: "missed" only where the whole interval lies below what must be reached.
    """
    values = [b / max(o, 1e-12) for b, o in zip(baseline, ours, strict=True)]
    low, high = bootstrap_interval(values)
    found: dict[str, Any] = {"ratio": statistics.median(values), "interval": [low, high]}
    if goal is not None:
        found |= {"at_least": goal[0], "aim": goal[1], "missed": high < goal[0]}
    return found


def hold_peak(row: dict[str, Any], share: float) -> None:
    """Hold the peak of memory against a share of eager's; a share of 0 is no limit."""
    most, ours = (row["contestants"].get(n, {}).get("peak_bytes") for n in ("eager", OURS))
    if share and most is not None and ours is not None:
        row["limits"] = {"peak_bytes": {
            "must_not_exceed": share * most, "missed": ours > share * most}}


def bootstrap_interval(values: list[float]) -> tuple[float, float]:
    """Percentile bootstrap of the median, 95 %; the same at every call."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(values, k=len(values)))
                     for _ in range(_RESAMPLES))
    cut = round(0.025 * _RESAMPLES)
    return medians[cut], medians[-1 - cut]


def site(report: Any) -> dict[str, Any]:
    """What became of the one attention: status, rule, lowering, tile, reason, prediction."""
    found = report.sites[0] if report.sites else None
    texts = {name: str(getattr(found, name, None) or "")
             for name in ("status", "rule", "lowering", "tile", "reason")}
    return {**texts, "predicted_speedup": getattr(found, "predicted_speedup", None)}


Step = Callable[[], tuple[Tensor, ...]]


def _baselines(
    case: Case, attention: Attention, inputs: tuple[Tensor, Tensor, Tensor],
    gradient: Tensor | None, compiled: bool,
) -> tuple[dict[str, Step], dict[str, str]]:
    """What can run here, by name, and why others cannot."""
    builders = {"eager": _eager, "sdpa": _sdpa, "compile": _compile, "flex": _flex}
    steps: dict[str, Step] = {}
    left_out: dict[str, str] = {}
    others = attention.others()
    for name in dict.fromkeys((*case.baselines, *others)):
        if name in COMPILED and not compiled:
            continue
        need = _composed_bytes(case) if name == "eager" else 0
        room = memory.free(inputs[0].device)
        if room is not None and need > room:
            left_out[name] = f"needs {need / 1e9:.0f} GB, {room / 1e9:.0f} GB are free"
            continue
        try:
            fn = others[name] if name in others else builders[name](attention, inputs)
            learned = () if name in ("sdpa", "flex") else tuple(attention.parameters())
            step = _step(fn, inputs, gradient, learned)
            step()
        except Exception as error:  # a peer's limit is a finding, not an error of ours
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
            logs.get("bench").debug("%s: %s left out", case.name, name, exc_info=True)
            continue
        steps[name] = step
    return steps, left_out


def _composed_bytes(case: Case) -> int:
    """Of an author's composition at its peak: scores, masked scores and weights."""
    return 3 * case.batch * case.heads * case.length**2 * case.dtype.itemsize


def _step(fn: Callable[..., Tensor], inputs: tuple[Tensor, ...], gradient: Tensor | None,
          learned: tuple[Tensor, ...] = ()) -> Step:
    """One call; with a gradient of the output also those of the inputs and of what is learned."""
    if gradient is None:
        return lambda: (fn(*inputs),)

    def train() -> tuple[Tensor, ...]:
        out = fn(*inputs)
        return (out, *torch.autograd.grad(out, (*inputs, *learned), gradient))

    return train


def _whole(module: Callable[..., Tensor], attention: Attention) -> Callable[..., Tensor]:
    """The author's module, or what became of it, as a function of query, key and value."""
    extras = attention.extras()
    return (lambda *inputs: module(*inputs, *extras)) if extras else module


def _eager(attention: Attention, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    return _whole(attention, attention)


def _sdpa(attention: Attention, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    query, key, _ = inputs
    options = attention.fused(query, key)
    if options is None:
        raise NotImplementedError("SDPA cannot express these scores")
    if key.shape[1] != query.shape[1]:
        options["enable_gqa"] = True
    return functools.partial(F.scaled_dot_product_attention, **options)


def _compile(attention: Attention, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    torch.compiler.reset()
    return _whole(torch.compile(attention, dynamic=False), attention)


def _flex(attention: Attention, inputs: tuple[Tensor, ...]) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, _ = inputs
    if query.device.type == "cpu" and query.requires_grad:
        raise NotImplementedError("FlexAttention on a CPU gives no gradients")
    options: dict[str, Any] = {"enable_gqa": key.shape[1] != query.shape[1]}
    # Functions, because FlexAttention counts the arguments and takes bound methods for others.
    if attention.has_score:
        options["score_mod"] = lambda score, b, h, q, k: attention.score(score, b, h, q, k)
    if attention.has_keep:
        options["block_mask"] = create_block_mask(
            lambda b, h, q, k: attention.keep(b, h, q, k),
            query.shape[0] if attention.by_batch else None, None, query.shape[-2],
            key.shape[-2], device=query.device.type)
    torch.compiler.reset()
    return functools.partial(torch.compile(flex_attention, dynamic=False), **options)


def _own_forward(report: Any) -> int:
    """Calls of the optimised module that ran the author's code after all."""
    return sum(count for why, count in report.calls.items() if why != "hits")


def _products(dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], Tensor]]:
    edge = _PRODUCT[device.type]
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    a, b = (torch.randn(edge, edge, device=device) for _ in range(2))
    return {f"product {kind}": functools.partial(torch.mm, a.to(kind), b.to(kind))
            for kind in dtypes}


def _share(case: Case, attention: Attention, device: torch.device, seconds: list[float],
           rates: list[float]) -> dict[str, Any]:
    pairs = visible(attention, case.length, case.length, device, case.batch) * case.heads
    work = 4 * case.head_dim * pairs * (1 + _BACKWARD * case.training)
    share = statistics.median(work / s / rate for s, rate in zip(seconds, rates, strict=True))
    return {"work": work, "density": pairs / (case.batch * case.heads * case.length**2),
            "rate": work / statistics.median(seconds), "ceiling": statistics.median(rates),
            "roofline_share": share}
