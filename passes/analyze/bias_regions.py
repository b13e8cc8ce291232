"""Region fills: a number between tokens of different regions, 0 within one.

Shifted windows (Swin, arXiv 2103.14030) add -100 between tokens of a window that were no neighbours
before the shift:

    mask[w, q, k] = 0 if region[w, q] == region[w, k] else fill

One number per window and token says the same as a matrix of all pairs. It is read off the values of
a term that depends on no input: the region of a token is the first key that it is together with,
and all pairs are then compared. -100 is no -inf: a row keeps what it had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.spec import leading_axes

#: terms with more elements are not looked at
LARGEST = 2**24


@dataclass(frozen=True)
class Region:
    """ids: int32 (*lead, tokens); where they are equal the term is `inside`, else `outside`."""

    ids: Tensor
    lead: tuple[str, ...]
    inside: float
    outside: float
    node: fx.Node

    @property
    def words(self) -> str:
        return f"regions with fill {self.outside:g}" if self.outside else "regions"


def evaluated(e: Expr, operands: Mapping[str, Tensor], sizes: Mapping[str, int],
              names: tuple[str, ...]) -> tuple[Tensor, tuple[str, ...]] | None:
    """A term (*lead, Q, K) with the leading axes that it varies along; None where it is large."""
    lead = tuple(a for a in names if a in e.indices and a not in "qk")
    if any(a not in sizes for a in (*lead, "q", "k")):
        return None
    every = leading_axes(len(names) - 2)
    full = tuple(sizes[a] if a in lead else 1 for a in every)
    shape = (*full, sizes["q"], sizes["k"])
    if torch.Size(shape).numel() > LARGEST:
        return None
    found = torch.as_tensor(evaluate(e, Env(shape, operands, sizes=sizes)), dtype=torch.float32)
    return found.expand(shape).reshape(*(sizes[a] for a in lead), *shape[-2:]), lead


def region_of(matrix: Tensor, lead: tuple[str, ...], node: fx.Node) -> Region | None:
    """The regions of a term (*lead, Q, K); None where it has none."""
    if matrix.shape[-1] != matrix.shape[-2] or not bool(matrix.isfinite().all()):
        return None
    inside = matrix[..., 0, 0].reshape(-1)[0]
    others = matrix[matrix != inside]
    if not others.numel() or not bool((others == others[0]).all()):
        return None
    together = matrix == inside
    ids = together.to(torch.uint8).argmax(-1).to(torch.int32)
    if not torch.equal(ids[..., :, None] == ids[..., None, :], together):
        return None
    return Region(ids, lead, float(inside) + 0.0, float(others[0]) + 0.0, node)
