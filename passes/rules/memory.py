"""Memory: what computing a site holds in tensors of queries x keys, and `prefer="memory"`.

Counted in elements, at the lengths of the example, of all heads and batches:

    operands  those of the Spec that vary along both queries and keys; they are made by the author's
              own program, or are the model's or the user's
    scores    and weights: a composition holds both, a generated kernel and row blocks neither
    mask      fused attention is handed terms and masks as one tensor of their broadcast shape

With `prefer="memory"` whatever holds least is taken, and the faster of those that hold the same; a
rewrite that holds less than the author's own code need not pay. What that costs is in the report.
"""

from __future__ import annotations

import math

import torch

from attnopt import kernels
from attnopt.cost.choose import duration
from attnopt.cost.work import axes_of
from attnopt.ir.spec import Spec, leading_axes
from attnopt.rules import Region

_BOTH = frozenset("qk")
#: bytes of the scores of a row block; the operations that make them hold some ten times as much
BLOCK_BYTES = 1 << 20
#: least and most rows of a block; the middle where the number of keys changes from call to call
ROWS = (8, 64, 256)


def wanted(region: Region) -> bool:
    """Whether the user prefers memory to speed."""
    return region.prefer == "memory"


def held(region: Region, spec: Spec, lowering: str) -> int:
    """Elements of queries x keys tensors that `lowering` ("cpp", "aten:sdpa" …, or the author's:
    "sdpa", "composition") needs for `spec`."""
    lengths = _lengths(region)
    made = kernels.low_rank.widening(spec) if lowering == "aten:sdpa" else None
    spec = spec if made is None else made.spec
    exprs = [e for e in (spec.logits, spec.weights, spec.output, spec.sinks,
                         spec.mask.predicate()) if e is not None]
    whole = {n.value for e in exprs for n in e.walk() if n.op == "load" and not n.args}
    operands = sum(math.prod(lengths.get(axis, 1) for axis in o.axes) for o in spec.operands
                   if o.slot in whole and o.axes is not None and set(o.axes) >= _BOTH)
    scores = math.prod(lengths.values())
    if lowering in ("composition", "aten:dense"):
        return operands + 2 * scores
    if lowering == "aten:sdpa":
        return operands + _mask(spec, lengths)
    return operands


def _mask(spec: Spec, lengths: dict[str, int]) -> int:
    """Elements of the mask that fused attention makes of the Spec."""
    parts = kernels.fused_mask(spec)
    axes = frozenset[str]().union(*(axes_of(e, spec) for e in parts))
    return math.prod(lengths[a] for a in axes if a in lengths) if axes >= _BOTH else 0


def _lengths(region: Region) -> dict[str, int]:
    """Length of each axis of the scores."""
    query, key, value = region.shapes
    lead = torch.broadcast_shapes(query[:-2], key[:-2], value[:-2])
    named = dict(zip(leading_axes(len(lead)), lead, strict=True))
    return {**named, "q": query[-2], "k": key[-2]}


def of_author(region: Region) -> int:
    """The same of the author's own code. Local attention copies its keys, and holds scores of its
    neighbours alone."""
    if region.copies is not None:
        query, key, value = region.shapes
        lead = math.prod(torch.broadcast_shapes(query[:-2], key[:-2], value[:-2]))
        blocks, keys = region.copies
        return 2 * lead * query[-2] * keys + lead * blocks * keys * (query[-1] + value[-1])
    # What the Spec says of keys besides a triangle, a fused call was handed as a mask.
    return held(region, region.spec,
                "aten:sdpa" if region.authored == "sdpa" else region.authored)


def saves(region: Region, spec: Spec, lowering: str) -> bool:
    """Whether this is to be taken for its memory, whether it is faster or not."""
    return wanted(region) and held(region, spec, lowering) < of_author(region)


def in_blocks(region: Region) -> Spec | None:
    """The form of the Spec that row blocks compute and that holds least, None where they cannot."""
    if region.copies is not None or "aten" not in region.lowerings:
        return None
    forms = [spec for spec in (region.inlined, region.spec) if spec is not None
             and not kernels.reasons(spec, "aten:blocks", dtypes=region.dtypes,
                                     requires_grad=region.training)]
    return min(forms, key=lambda spec: held(region, spec, "aten:blocks"), default=None)


def block_tile(region: Region) -> tuple[int, ...]:
    """Rows and leading entries of a block: smaller ones than the fastest."""
    least, middle, most = ROWS
    if not region.fixed:
        return middle, 1
    query, key, _ = region.shapes
    width = 4 * max(1, key[-2]) * (query[-1] if region.spec.score == "additive" else 1)
    return max(least, min(most, BLOCK_BYTES // width)), 1


def words(region: Region, spec: Spec, lowering: str, seconds: tuple[float, float] | None = None
          ) -> str:
    """What the preference changed, and what it costs: `seconds` of the fastest way and of this one,
    as they were predicted."""
    if not wanted(region):
        return ""
    size = max(d.itemsize for d in region.dtypes)
    before, after = of_author(region) * size, held(region, spec, lowering) * size
    text = f"holds {_bytes(after)} of queries x keys instead of {_bytes(before)}"
    if seconds is not None and seconds[0] < seconds[1]:
        text += f"; predicted {duration(seconds[1])} instead of {duration(seconds[0])}"
    return text


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1 << 30), ("MB", 1 << 20), ("KB", 1 << 10)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} bytes" if count else "nothing"
