"""Deformable attention by Triton against its oracle, wherever the kernels run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.kernels.deformable import Sampling, reference, triton_gather
from attnopt.kernels.deformable.triton_blocks import Block

SHAPES = {1: (7, 4), 2: (5, 6, 3, 2), 3: (3, 4, 5, 2, 2, 3)}
#: of locations
ODD = (torch.nan, torch.inf, -torch.inf, 1e30, -3e9, 2.0 ** 31, 0.5, 0.0, 1.0)


def leaves(given: Sequence[Tensor | None]) -> list[Any]:
    return [None if t is None else t.detach().clone().requires_grad_() for t in given]


def gradients(sampling: Sampling, given: Sequence[Tensor | None], names: Sequence[str],
              grad: Tensor, shapes: tuple[int, ...], block: Block | None = None
              ) -> dict[str, Tensor]:
    found = triton_gather.gradients(sampling, given, names, grad, shapes, block)
    assert found is not None
    return found


def check(sampling: Sampling, given: Sequence[Any], shapes: tuple[int, ...],
          block: Block | None = None, *, tolerance: float = 3e-6, backward: bool = True) -> None:
    """The result, and its gradients within ten times the tolerance."""
    out = triton_gather.gather(sampling, *given, shapes, block)
    assert out is not None
    exact = leaves([None if t is None else t.cpu() for t in given])
    wanted = reference(sampling, *exact, shapes)
    assert out.dtype == torch.promote_types(given[0].dtype, given[2].dtype)
    torch.testing.assert_close(out.cpu().double(), wanted.detach(), atol=tolerance,
                               rtol=tolerance, equal_nan=True)
    if not backward:
        return
    grad = torch.randn(out.shape).to(out.dtype)
    names = [n for n, t in zip(triton_gather.NAMES, given, strict=True) if t is not None]
    asked = [t for t in exact if t is not None]
    theirs = torch.autograd.grad(wanted, asked, grad.double(), allow_unused=True)
    mine = gradients(sampling, given, names, grad.to(out.device), shapes, block)
    for name, own, other in zip(names, asked, theirs, strict=True):
        if other is None:
            other = torch.zeros_like(own)
        assert mine[name].dtype == own.dtype and mine[name].shape == own.shape
        scale = max(1.0, other.nan_to_num(0.0).abs().max().item())
        torch.testing.assert_close(
            mine[name].cpu().double(), other.double(), rtol=10 * tolerance,
            atol=10 * tolerance * scale, equal_nan=True,
            msg=lambda text, name=name: f"gradient of {name}: {text}")
