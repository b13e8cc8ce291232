"""Cost: what the cost model is asked about a site, and sites too small for a rewrite to pay.

A fused call has a fixed price (its checks, its own set-up) that a few small matrix products do not
have. Measured on a CPU, one thread, float32, head_dim 64, against the authors' compositions: below
some 32,000 scores the composition is as fast or faster (0.75 to 0.95), above it the fused call wins
(1.1 at 131,000 scores, 2.1 to 2.3 at 2 million). In bfloat16 and float16, whose pointwise
operations are slow on a CPU, it wins at every size that was measured.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from attnopt import kernels
from attnopt.cost import plain
from attnopt.ir.spec import Spec
from attnopt.rules import Decline, Region

#: scores (leading axes * Q * K) from which a rewrite pays on a CPU in float32 and float64
FEWEST_SCORES = 32_768
#: nanoseconds per element of K and V that a local attention copies: for a single query each, with
#: all that is done to it (measured 5.7 for a gather to 19 for F.unfold, head_dim 32, 7x7, on a CPU,
#: one thread, float32; on a GPU some six passes of 4 bytes), and for a block of queries
COPIED = {"cpu": (5.0, 1.0), "cuda": (0.01, 0.004)}
#: what gathering the rows that a gate leaves adds, as a share of the seconds of all rows (measured
#: 0.06 to 0.15 at 1024 and 2048 keys, head_dim 64, on a CPU, one thread, float32)
GATHERED = 0.1
#: elements of an operand whose values are looked at to count the tiles that it hides
LARGEST_TABLE = 1 << 20
#: take what a rule can take, whether it pays or not: for tests
TAKE_ALL = False


def pays(region: Region) -> None:
    """Decline a region of known lengths that is too small; unknown lengths are taken to be large.
    """
    lengths = region.lengths[:-2]
    if region.approximate or region.prefer == "memory":
        return
    if region.device != "cpu" or not all(isinstance(n, int) for n in lengths):
        return
    if any(d in (torch.float16, torch.bfloat16) for d in region.dtypes):
        return
    scores = math.prod(lengths)
    if scores < FEWEST_SCORES:
        raise Decline(f"cost: {scores} scores are too few for a fused call to pay, "
                      f"{FEWEST_SCORES} are needed")


def problem_of(region: Region, spec: Spec | None = None) -> kernels.Problem:
    """A region, with another form of its Spec if given, as the cost model takes it; lengths that
    are not known are those of the example."""
    query, key, value = region.shapes
    spec = spec or region.spec
    dtype, made = region.dtypes[0], kernels.low_rank.widening(spec)
    if made is not None and (region.device == "cpu" or made.factor is None):
        # A GPU kernel has the second product of its own, which costs as much.
        spec, query, key = kernels.low_rank.widened(spec, query, key, region.rank)
        dtype = torch.promote_types(dtype, torch.float32) if region.device == "cpu" else dtype
    tables = {slot: t for slot, t in region.tables.items() if t.numel() <= LARGEST_TABLE}
    return kernels.Problem(spec, query, key, value, dtype,
                           region.training, device=region.device, tables=kernels.Tables(tables))


def construction(region: Region) -> float:
    """Predicted seconds in which the author makes the tensors that the inlined form does without.
    """
    each, fresh = (plain.COEFFICIENTS[name] for name in ("dense.pass", "dense.far"))
    total = sum(n * (each + (fresh if 4 * n >= plain.FRESH else 0.0)) for n in region.saved)
    return 1e-9 * total / torch.get_num_threads()


def original(region: Region, problem: kernels.Problem) -> float:
    """Predicted seconds of the author's own code, without what `construction` counts.

    A local attention is bound by the keys and values that it copies; where a block of queries
    shares them, a dense composition over every block comes on top.
    """
    if region.copies is None:
        return kernels.original(problem, region.authored)
    (*lead, queries, dim), _, value = region.shapes
    blocks, keys = region.copies
    rows = queries // blocks
    alone, shared = COPIED.get(region.device, COPIED["cuda"])
    copied = math.prod(lead) * blocks * keys * (dim + value[-1])
    threads = torch.get_num_threads() if region.device == "cpu" else 1
    seconds = 1e-9 * (alone if rows == 1 else shared) * copied / threads
    if rows == 1:
        return seconds
    whole = replace(problem, query=(*lead, blocks, rows, dim), key=(*lead, blocks, keys, dim),
                    value=(*lead, blocks, keys, value[-1]))
    return seconds + kernels.original(whole, region.authored)


def predicted(region: Region, spec: Spec, lowering: str) -> float | None:
    """Seconds of a call by an ATen lowering, where the cost model knows it."""
    best = kernels.estimates(problem_of(region, spec), (lowering,)).best
    return None if best is None else best.seconds


def rows(region: Region) -> float:
    """Share of the seconds of all rows that those cost which a gate leaves, gathered (`GATHERED`).
    """
    return min(1.0, region.rows + GATHERED) if region.rows < 1 else 1.0


def local(region: Region) -> None:
    """Decline a local attention: over all its tokens a dense composition does far more work."""
    if region.copies is not None:
        raise Decline("a local attention: nothing but a kernel that skips does less work")
