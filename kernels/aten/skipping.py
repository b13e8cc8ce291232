"""Keys that no row of a block keeps, read from causal, banded and prefix masks."""

from __future__ import annotations

import functools

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import And, Band, Causal, Mask, Prefix
from attnopt.ir.spec import Spec


@functools.lru_cache(maxsize=1024)
def skips_keys(spec: Spec) -> bool:
    """Whether there may be keys outside of `key_range`, and they have no part in the output."""
    if spec.weights is not E.weight or (
            spec.empty_row == "uniform" and not spec.mask.row_always_kept()):
        return False
    return any(isinstance(m, Causal | Band | Prefix) for m in _conjuncts(spec.mask))


def key_range(mask: Mask, first: int, stop: int, queries: int, keys: int) -> tuple[int, int]:
    """[a, b) with every key that a row in [first, stop) keeps; never empty."""
    def number(e: Expr, unknown: int) -> int:
        if e.op != "const":
            e = e.replace({E.size("q"): E.const(queries), E.size("k"): E.const(keys)})
        return int(e.value) if e.op == "const" else unknown

    low, high = 0, keys
    for m in _conjuncts(mask):
        if isinstance(m, Causal):
            high = min(high, stop + number(m.offset, keys))
        elif isinstance(m, Band):
            low = max(low, first + number(m.lo, -first))
            high = min(high, stop + number(m.hi, keys))
        elif isinstance(m, Prefix):
            high = min(high, number(m.count, keys))
    return (low, high) if low < high else (0, 1)


def _conjuncts(mask: Mask) -> tuple[Mask, ...]:
    return mask.masks if isinstance(mask, And) else (mask,)
