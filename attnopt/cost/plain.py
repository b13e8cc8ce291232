"""Time of what torch itself offers on a CPU, to compare a rewrite with.

    sdpa    F.scaled_dot_product_attention: its flash kernel, or a composition where it has none
    dense   a composition of matrix products, pointwise operations and a softmax over all scores
    blocks  the same over blocks of query rows, which stay in the cache

Coefficients: a factor on the time that `Cpu.gemm` gives the matrix products, and nanoseconds per
score, per score and pass, per score and new tensor of all scores (`cold`, `far`), per head, and per
call. Such a tensor costs more once two of them leave the second-level cache (192 windows of 49
tokens take twice as long as 8 times 24 of them), and most where it is so large that the allocator
fetches fresh pages for it each time: an eager attention of 8 heads and 1024 tokens takes 3.4 times
as long as one of 4 heads.
"""

from __future__ import annotations

from collections.abc import Mapping

from attnopt.cost.devices import Cpu
from attnopt.cost.work import Work

COEFFICIENTS: Mapping[str, float] = {
    "sdpa.flop": 1.1, "sdpa.score": 0.7, "sdpa.mask": 0.25, "sdpa.head": 4000.0,
    "sdpa.call": 12000.0,
    "dense.flop": 1.2, "dense.softmax": 0.7, "dense.pass": 0.5, "dense.far": 2.4,
    "dense.cold": 1.0, "dense.call": 10000.0,
    "blocks.flop": 1.3, "blocks.softmax": 1.5, "blocks.pass": 0.45, "blocks.call": 35000.0,
}
#: bytes from which glibc gives a tensor fresh pages each time (its largest M_MMAP_THRESHOLD)
FRESH = 32 << 20
#: GFLOP/s of a core of which nothing is known, in float32; other dtypes relative to it
GEMM, RELATIVE = 60.0, {"float32": 1.0, "float64": 0.5, "bfloat16": 1.0, "float16": 0.1}


def features(device: Cpu, work: Work, lowering: str, density: float = 1.0) -> dict[str, float]:
    """Counted features of one call by one thread.

    lowering: "sdpa", "dense" or "blocks"; density: share of the scores that it computes (SDPA skips
    the upper triangle of `is_causal` only, a composition skips nothing)
    """
    rate = device.gemm.get(work.dtype) or (
        device.gemm.get("float32", GEMM) * RELATIVE.get(work.dtype, 1.0))
    scores = work.scores * density
    flop = work.flops * density / rate  # GFLOP/s are FLOP per nanosecond
    passes = scores * (work.author_ops + 1)
    masked = float(work.mask_ops > 0)
    backward = 3.0 if work.backward else 1.0
    if lowering == "sdpa" and (work.head_dim == work.value_dim or work.queries == 0):
        merged = work.scores * work.mask_passes
        return {"sdpa.flop": flop * backward, "sdpa.score": scores * backward,
                "sdpa.mask": scores * max(masked, work.bias_bytes > 0),
                "sdpa.head": work.leading * backward, "sdpa.call": 1.0,
                "dense.pass": merged, "dense.far": float(merged * (4 * work.scores >= FRESH))}
    if lowering == "blocks":
        return {"blocks.flop": flop * backward, "blocks.softmax": scores * backward,
                "blocks.pass": passes * backward, "blocks.call": 1.0 + work.queries / 256}
    if lowering not in ("dense", "sdpa"):
        raise ValueError(f"lowering must be sdpa, dense or blocks, got {lowering!r}")
    fresh = work.scores * work.score_bytes >= FRESH
    tensors = scores * (work.author_ops + 2) * work.score_bytes / 4
    outside = max(0.0, 1 - device.l2 / max(2 * work.scores * work.score_bytes, 1))
    return {"dense.flop": flop * backward, "dense.softmax": scores * backward,
            "dense.pass": passes * backward, "dense.far": tensors * backward * fresh,
            "dense.cold": tensors * backward * outside * (not fresh),
            "dense.call": 4.0 + work.author_ops}


def seconds(device: Cpu, work: Work, lowering: str, density: float = 1.0,
            threads: int = 1) -> float:
    """Predicted time of one call; threads share all but the calls."""
    given = {**COEFFICIENTS, **device.coefficients}
    counted = features(device, work, lowering, density)
    calls = sum(given[name] * n for name, n in counted.items() if name.endswith(".call"))
    rest = sum(given[name] * n for name, n in counted.items() if not name.endswith(".call"))
    return 1e-9 * (calls + rest / max(threads, 1))
