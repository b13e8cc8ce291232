"""Deformable attention on this CPU, each row beside the author's own code and torch.compile.

The arithmetic of locations and the softmax over levels and points are part of both sides. Encoder
and decoder are spelled as Deformable DETR (Zhu et al., ICLR 2021) and Transformers do, lifting with
the volume of DFA3D (Li et al., ICCV 2023) built; rows "aten" have no generated kernel. Clock and
columns are those of the suite cpu.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

from attnopt.bench.rows import chosen, measured
from attnopt.bench.sampling import LARGE, SampledCase, run_sampled

#: of an image of 400 x 536: 4,484 texels
HALF = ((50, 67), (25, 34), (13, 17), (7, 9))
_TINY = ((6, 8), (3, 4))
_CAMERA = ((29, 50),)


def every(quick: bool = False) -> list[SampledCase]:
    """The rows. quick: the same on tiny maps, without goals."""
    whole = SampledCase("", whole=True)
    encoder = dataclasses.replace(whole, shapes=HALF, compiled=True)
    decoder = dataclasses.replace(whole, shapes=LARGE, queries=300, compiled=True)
    lifting = dataclasses.replace(whole, shapes=_CAMERA, queries=2500, points=8, depths=64)
    found = [
        _named(encoder, "encoder 4,500", (12, 25)),
        _named(encoder, "encoder 17,800", (12, 25), shapes=LARGE, compiled=False),
        _named(decoder, "decoder 300", (5, 10)),
        _named(lifting, "lifting 29x50", (18, 45), most=1 / 30),
        _named(encoder, "training encoder 4,500", (3, 3), training=True),
        _named(encoder, "aten encoder 4,500", (2.2, 2.2), composed=True, compiled=False),
        _named(decoder, "aten decoder 300", (2, 2), composed=True, compiled=False),
        _named(lifting, "aten lifting 29x50", (6, 6), composed=True),
    ]
    return [_shrunk(case) for case in found] if quick else found


def _named(case: SampledCase, name: str, goal: tuple[float, float], **change: Any) -> SampledCase:
    return dataclasses.replace(case, name=name, goals={"eager": goal}, **change)


def _shrunk(case: SampledCase) -> SampledCase:
    return dataclasses.replace(case, shapes=_TINY[:len(case.shapes)], heads=2, channels=8,
                               queries=min(case.queries, 30), depths=min(case.depths, 4),
                               goals={}, most=0.0)


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
    run = functools.partial(run_sampled, optimize=optimize, repeats=repeats, compiled=compiled)
    return measured(chosen(every(quick), cases), run, say)
