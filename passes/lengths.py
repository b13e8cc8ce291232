"""Lengths of a site's tensors as numbers: those of the example inputs where they are symbolic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from attnopt.passes.canonical import Canonical


def example_shapes(canonical: Canonical) -> tuple[tuple[int, ...], ...]:
    """Of query, key and value as the Spec has them."""
    tensors = (canonical.query, canonical.key, canonical.value)
    known = _example_lengths([t.node.meta["val"] for t in tensors])
    return tuple(tuple(_at_example(n, known) for n in canonical.lengths(t.target, t.layout))
                 for t in tensors)


def _example_lengths(values: Sequence[torch.Tensor]) -> dict[Any, int]:
    """What every symbol of a length was in the example inputs."""
    for value in values:
        for n in value.shape:
            if isinstance(n, torch.SymInt):
                env = n.node.shape_env
                found = getattr(env, "backed_var_to_val", None) or getattr(env, "var_to_val", {})
                return {symbol: int(number) for symbol, number in found.items()}
    return {}


def _at_example(length: Any, known: dict[Any, int]) -> int:
    """A length as a number."""
    if isinstance(length, int):
        return length
    return max(1, int(sympy.sympify(length).xreplace(known)))
