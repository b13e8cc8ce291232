"""Sizes as numbers, where an estimate or a picture needs one."""

from __future__ import annotations

import torch

#: assumed of a size that follows from values (nonzero, …): it is known at each call only
UNKNOWN = 512


def assumed(n: int | torch.SymInt) -> int:
    """What a size was in the example inputs; no decision on results may depend on it."""
    if not isinstance(n, torch.SymInt):
        return n
    known = n.node.hint
    return UNKNOWN if known is None else int(known)
