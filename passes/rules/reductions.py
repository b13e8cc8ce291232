"""What approximations ask of a site and of their parameters."""

from __future__ import annotations

from typing import Any

from attnopt.errors import OptionError
from attnopt.ir import expr as E
from attnopt.ir.facts import prove
from attnopt.ir.mask import Band, Causal
from attnopt.ir.mask_base import And, Mask
from attnopt.rules import Decline, Region


def whole(name: str, number: Any) -> int:
    """A whole number above 0."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise OptionError(f"{name} must be a whole number above 0, got {number!r}")
    return number


def square(region: Region) -> Any:
    """The number of queries, which must be that of the keys; symbolic where it may change."""
    queries, keys = region.lengths[-4:-2]
    if queries != keys:
        raise Decline(f"queries and keys must be the same tokens, got {queries} and {keys}")
    if region.spec.normalizer != "softmax" or region.spec.mix_logits or region.spec.mix_weights:
        raise Decline("an approximation is for softmax attention of independent heads")
    return queries


def causal(region: Region) -> None:
    """Decline what is not proven to be causal."""
    square(region)
    if not any(_is_causal(spec.mask) for spec in (region.spec, region.inlined) if spec is not None):
        raise Decline("its own mask must be proven to be causal")


def _is_causal(mask: Mask) -> bool:
    """Does a mask of as many queries as keys hide all that comes later?"""
    parts = mask.masks if isinstance(mask, And) else (mask,)
    ends = E.size("k") - E.size("q")
    return any(isinstance(m, Causal) and m.offset in (E.const(0), ends) or
               isinstance(m, Band) and prove(m.hi <= 0) is True for m in parts)
