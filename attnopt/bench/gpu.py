"""Attention kernels on a CUDA device: every row beside eager code, SDPA, torch.compile, flex.

Wall time with a wait for the device. The rows stand in the order of their worth: a run ends when
its time is used up and says what is missing. Two rows are windows on an image and on a video whose
masks would not fit into memory: beside FlexAttention stands cuDNN over all keys, which computes
something else and is what a window replaces. Their share of the roofline is that of the scores
within the windows: the limit of the operations. Rows of deformable attention stand beside the
authors' chain of F.grid_sample; their ceiling is how fast corners can be read, and is not known.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt.bench import summary
from attnopt.bench.attentions import (
    Alibi,
    Attention,
    Causal,
    Neighborhood,
    SlidingWindow,
    Softcap,
)
from attnopt.bench.rows import chosen
from attnopt.bench.sampling import SMALL, SampledCase, run_sampled
from attnopt.bench.side_by_side import BASELINES, Case, run_case
from attnopt.bench.sparse_attentions import Grid

_FUSED = tuple(name for name in BASELINES if name != "eager")
_LONG = 8192
#: seconds that a row takes at least, compilers included; none is begun with less
_ROW_S = 10.0


def _row(name: str, make: Callable[[], Attention], length: int, head_dim: int = 128,
         **more: Any) -> Case:
    # Beyond this length the author's code would need tens of gigabytes for its scores.
    baselines = BASELINES if length <= _LONG else _FUSED
    return Case(f"{name} N{length} d{head_dim}", make, heads=16, length=length, head_dim=head_dim,
                dtype=torch.bfloat16, baselines=baselines, **more)


class WideGrid(Grid):
    """Windows on a grid of so many tokens that no mask of all pairs is made, by anyone."""

    def __init__(self, length: tuple[int, ...], window: tuple[int, ...]) -> None:
        super().__init__(length, window, "computed")
        self._flex: Callable[..., Tensor] | None = None

    def pairs(self, queries: int, keys: int) -> int | None:
        return queries * math.prod(self.window)

    def others(self) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        return {"flex": self.flexible, "cudnn, all keys": self.dense}

    def flexible(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """FlexAttention; its block mask is made by compiled code, tile by tile, and once."""
        if self._flex is None:
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            count = math.prod(self.length)
            mask = create_block_mask(lambda b, h, q, k: self.keep(b, h, q, k), None, None, count,
                                     count, device=query.device.type, _compile=True)
            self._flex = functools.partial(torch.compile(flex_attention, dynamic=False),
                                           block_mask=mask)
        return self._flex(query, key, value)

    def dense(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value)


def _grid(name: str, length: tuple[int, ...], window: tuple[int, ...], heads: int = 24,
          head_dim: int = 128) -> Case:
    return Case(name, functools.partial(WideGrid, length, window), heads=heads,
                length=math.prod(length), head_dim=head_dim, dtype=torch.bfloat16, baselines=())


CASES: tuple[Case | SampledCase, ...] = (
    _row("dense", Attention, 4096),
    _row("causal", Causal, 4096),
    _row("sliding window", functools.partial(SlidingWindow, 1024), 8192),
    _row("alibi", functools.partial(Alibi, 16), 4096),
    _row("softcap", Softcap, 4096),
    _row("neighbourhood", functools.partial(Neighborhood, 64, 64, 13), 4096, 64),
    _grid("2-D window 80 on 256x256", (256, 256), (80, 80)),
    _grid("3-D window 18x24x24 on 30x48x80", (30, 48, 80), (18, 24, 24)),
    SampledCase("sampling encoder", compiled=True),
    SampledCase("training sampling encoder", training=True, compiled=True),
    SampledCase("sampling decoder", queries=300),
    SampledCase("lifting 6 cameras", ((29, 50),), 4000, 8, batch=6, depths=64),
    SampledCase("training lifting 6 cameras", ((29, 50),), 4000, 8, batch=6, depths=64,
                training=True),
    SampledCase("sampling encoder bf16", dtype=torch.bfloat16),
    _row("training causal", Causal, 4096, training=True),
    _row("training alibi", functools.partial(Alibi, 16), 4096, training=True),
    SampledCase("training sampling encoder bf16", dtype=torch.bfloat16, training=True),
    SampledCase("training sampling decoder", queries=300, training=True),
    SampledCase("sampling encoder 640", SMALL, batch=4),
    _row("causal", Causal, 16384),
    _row("dense", Attention, 16384),
    _row("dense", Attention, 4096, 64),
    _row("causal", Causal, 16384, 64),
    _row("dense", Attention, 2048, 64),
    _row("causal", Causal, 2048, 64),
    _row("dense", Attention, 2048),
    _row("causal", Causal, 2048),
    _row("dense", Attention, 8192),
    _row("causal", Causal, 8192),
    _row("grouped queries causal", Causal, 8192, kv_heads=4),
    _row("dense", Attention, 16384, 64),
)
#: ten short rows, to see that everything runs
QUICK: tuple[Case | SampledCase, ...] = (
    *(_row(name, make, 256, 64, **more) for name, make, more in (
        ("dense", Attention, {}), ("causal", Causal, {}),
        ("sliding window", functools.partial(SlidingWindow, 64), {}),
        ("alibi", functools.partial(Alibi, 16), {}), ("softcap", Softcap, {}),
        ("neighbourhood", functools.partial(Neighborhood, 16, 16, 5), {}),
        ("training causal", Causal, {"training": True}))),
    _grid("3-D window", (4, 12, 16), (3, 5, 7), 4, 64),
    SampledCase("sampling", ((6, 8), (3, 4)), heads=2),
    SampledCase("training lifting", ((6, 8), (3, 4)), 5, 2, heads=2, channels=8, batch=2, depths=4,
                training=True),
)


def measure(
    optimize: Callable[..., Any],
    *,
    repeats: int | None = None,
    compiled: bool | None = None,
    quick: bool = False,
    cases: Iterable[str] | None = None,
    budget: float | None = None,
    device: str = "cuda",
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Rows by name; empty, with a line that says so, where there is no such device.

    As for the suite cpu. budget: seconds; a row that takes as long as the longest so far would is
    not begun any more, None for no end. An interrupt ends the run with the rows so far.
    """
    if device == "cuda" and not torch.cuda.is_available():
        say("left out: this torch finds no CUDA device")
        return {}
    repeats = repeats or (3 if quick else 15)
    compiled = not quick if compiled is None else compiled
    end = time.monotonic() + budget if budget else float("inf")
    rows: dict[str, Any] = {}
    wanted = chosen(QUICK if quick else CASES, cases)
    longest = _ROW_S
    for done, case in enumerate(wanted):
        begun = time.monotonic()
        if end - begun < longest:
            say(f"no time for: {', '.join(left.name for left in wanted[done:])}")
            break
        try:
            run: Callable[..., dict[str, Any]] = (
                run_sampled if isinstance(case, SampledCase) else run_case)
            row = run(case, optimize, device=device, repeats=repeats, compiled=compiled)
        except torch.cuda.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            say(f"{case.name}: left out, {str(error).splitlines()[0]}")
            continue
        except KeyboardInterrupt:
            say(f"interrupted at: {case.name}")
            break
        longest = max(longest, time.monotonic() - begun)
        rows[case.name] = row
        say(summary.line(case.name, row))
    for line in summary.table(rows):
        say(line)
    return rows
