"""Lengths of a site's tensors as numbers: those of the example inputs where they are symbolic."""

from __future__ import annotations

from typing import Any

import sympy

from attnopt.ir.sizes import UNKNOWN
from attnopt.passes.analyze.grid_check import captured_sizes
from attnopt.passes.canonical import Canonical


def example_shapes(canonical: Canonical) -> tuple[tuple[int, ...], ...]:
    """Of query, key and value as the Spec has them."""
    tensors = (canonical.query, canonical.key, canonical.value)
    known = captured_sizes({}, [t.node.meta["val"] for t in tensors])
    return tuple(tuple(_at_example(n, known) for n in canonical.lengths(t.target, t.layout))
                 for t in tensors)


def _at_example(length: Any, known: dict[sympy.Symbol, int]) -> int:
    """A length as a number."""
    if isinstance(length, int):
        return length
    exact = sympy.sympify(length)
    sizes = dict.fromkeys(exact.free_symbols, UNKNOWN) | known
    return max(1, int(exact.xreplace(sizes)))
