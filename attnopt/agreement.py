"""Does what was made compute what the model computes? Two runs, compared as a whole.

The bound is 1e-4 of the largest number of the outputs, or what half precision rounds away. NaN must
be where the model has it. (A rewrite is held to a stricter bound, alone and against float64, before
it gets here: `attnopt.passes.verify`.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.errors import VerificationError
from attnopt.module import OptimizedModule, users_module

BOUND = 1e-4
BOUND_HALF = 2e-2


def original(model: Any) -> Callable[..., Any]:
    """The author's own model, of an optimised module or a program too."""
    if isinstance(model, OptimizedModule):
        return users_module(model)
    return model.module() if isinstance(model, torch.export.ExportedProgram) else model


def outputs(tree: Any) -> list[Tensor]:
    """The tensors of a result."""
    return [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def allowed(expected: list[Tensor]) -> float:
    """The difference that is allowed."""
    size = max((float(x.double().abs().nan_to_num(0, 0, 0).max()) for x in expected if x.numel()),
               default=1.0)
    half = any(x.dtype in (torch.float16, torch.bfloat16) for x in expected)
    return max(size, 1e-3) * (BOUND_HALF if half else BOUND)


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest absolute difference; infinite where one of both alone is NaN."""
    if len(found) != len(expected):
        raise VerificationError(
            f"the exported file must give {len(expected)} tensors, got {len(found)}")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        if a.shape != b.shape:
            raise VerificationError(
                f"an output must be of shape {tuple(b.shape)}, got {tuple(a.shape)}")
        a, b = a.double(), b.double()
        if not torch.equal(a.isnan(), b.isnan()):
            return float("inf")
        same = (a == b) | a.isnan()
        gap = (a - b).abs()[~same]
        worst = max(worst, float(gap.max()) if gap.numel() else 0.0)
    return worst


def compare(made: Callable[..., Any], model: Callable[..., Any], args: tuple[Any, ...],
            kwargs: Mapping[str, Any]) -> float:
    """The difference on one call.

    Raises:
        VerificationError: it is beyond the bound.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        expected = outputs(model(*args, **kwargs))
        found = outputs(made(*args, **kwargs))
    gap, most = distance(found, expected), allowed(expected)
    if not gap <= most:
        raise VerificationError("the program must compute what the model computes, got a "
                                f"difference of {gap:.1e}, allowed are {most:.1e}")
    return gap
