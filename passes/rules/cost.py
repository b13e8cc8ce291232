"""Cost: a site that is too small for a rewrite to pay.

A fused call has a fixed price (its checks, its own set-up) that a few small matrix products do not
have. Measured on a CPU, one thread, float32, head_dim 64, against the authors' compositions: below
some 32,000 scores the composition is as fast or faster (0.75 to 0.95), above it the fused call wins
(1.1 at 131,000 scores, 2.1 to 2.3 at 2 million). In bfloat16 and float16, whose pointwise
operations are slow on a CPU, it wins at every size that was measured.
"""

from __future__ import annotations

import math

import torch

from attnopt.rules import Decline, Region

#: scores (leading axes * Q * K) from which a rewrite pays on a CPU in float32 and float64
FEWEST_SCORES = 32_768


def pays(region: Region) -> None:
    """Decline a region of known lengths that is too small; unknown lengths are taken to be large.
    """
    lengths = region.lengths[:-2]
    if region.device != "cpu" or not all(isinstance(n, int) for n in lengths):
        return
    if any(d in (torch.float16, torch.bfloat16) for d in region.dtypes):
        return
    scores = math.prod(lengths)
    if scores < FEWEST_SCORES:
        raise Decline(f"cost: {scores} scores are too few for a fused call to pay, "
                      f"{FEWEST_SCORES} are needed")
