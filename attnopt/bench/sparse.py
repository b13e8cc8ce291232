"""Attention whose scores are mostly hidden, on this CPU: each row beside the author's own code,
SDPA with the mask, torch.compile and FlexAttention.

Clock and columns are those of the suite cpu. What SDPA and FlexAttention need of a mask is made
beforehand and not counted; what the author's code makes of it at each call is. The last rows
measure how lists of tiles are made.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from attnopt.bench import block_lists
from attnopt.bench.attentions import Attention, SlidingWindow
from attnopt.bench.rows import chosen, measured
from attnopt.bench.side_by_side import Case, run_case
from attnopt.bench.sparse_attentions import (
    BlockPattern,
    DynamicMask,
    Grid,
    Packed,
    Padded,
    document_lengths,
    sentence_lengths,
)

_WINS = {"flex": (1.0, 1.5)}


def every(quick: bool = False) -> list[Case]:
    """The rows. quick: the same structures on short sequences, without goals."""
    less = 8 if quick else 1
    length = 4096 // less
    documents, sentences = document_lengths(16, length), sentence_lengths(16, 8, 256 // less)
    batch, longest = len(sentences), max(sentences)
    ideal = length**2 / sum(n**2 for n in documents)
    padding = batch * longest / sum(sentences)
    edge, small = (14, 3) if quick else (56, 7)
    window = functools.partial(SlidingWindow, 256 // less)
    found = [
        _case("causal window", window, length, sdpa=(13, 22)),
        _case("causal window long", window, 2 * length, sdpa=(22, 40)),
        _case("block pattern", functools.partial(BlockPattern, 16, 256 // less, 64 // less),
              length, sdpa=(2.3, 3.3)),
        *(_case(name, functools.partial(Packed, documents, causal), length,
                sdpa=(0.75 * factor * ideal, 1.1 * factor * ideal))
          for name, causal, factor in (("packed", False, 1), ("packed causal", True, 2))),
        _case("padded batch", functools.partial(Padded, sentences), longest, 12, 32, batch,
              sdpa=(min(1.5, padding), padding)),
        _case("2-D window 7", functools.partial(Grid, (edge,) * 2, (small,) * 2), edge**2, 4, 32,
              sdpa=(18, 35), unfold=(28, 50)),
        _case("2-D window 13", functools.partial(Grid, (edge,) * 2, (13 - 8 * quick,) * 2),
              edge**2, 4, 32, sdpa=(11, 20)),
        _case("2-D window 31", functools.partial(Grid, (edge,) * 2, (31 - 22 * quick,) * 2),
              edge**2, 4, sdpa=(2.3, 4)),
    ]
    video = ((4, 12, 12), (3, 5, 5)) if quick else ((8, 32, 32), (3, 7, 7))
    tokens = video[0][0] * video[0][1] * video[0][2]
    found += [_case(name, functools.partial(Grid, *video, made), tokens, 4, sdpa=(6.5, 20))
              for name, made in (("3-D window", "buffer"), ("3-D window computed", "computed"))]
    found.append(_case("dynamic mask", functools.partial(DynamicMask, 8, 64, length // 8), length,
                       eager=(3, 8)))
    return [dataclasses.replace(case, goals={}) for case in found] if quick else found


def _case(name: str, make: Callable[[], Attention], length: int, heads: int = 8,
          head_dim: int = 64, batch: int = 1, **goals: tuple[float, float]) -> Case:
    return Case(name, make, heads, length, head_dim, batch, goals={**goals, **_WINS})


def measure(
    optimize: Callable[..., Any],
    *,
    repeats: int | None = None,
    compiled: bool | None = None,
    quick: bool = False,
    cases: Iterable[str] | None = None,
    full: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Rows by name.

    repeats: rounds, by default 7, or 3 when quick; compiled, quick and cases: as for the suite cpu;
    full: also create_block_mask at 16,384 tokens, which takes a minute and 7 GB.
    """
    repeats = repeats or (3 if quick else 7)
    compiled = not quick if compiled is None else compiled

    def run(case: Case | block_lists.Lists) -> dict[str, Any]:
        if isinstance(case, block_lists.Lists):
            return block_lists.run(case, repeats)
        return run_case(case, optimize, repeats=repeats, compiled=compiled)

    rows: list[Case | block_lists.Lists] = [*every(quick), *block_lists.cases(quick, full)]
    return measured(chosen(rows, cases), run, say)
