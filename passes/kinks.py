"""Where a sampled location lies on a texel, up to rounding: there its gradient has two values.

A linear sample is continuous in its location, but its slope jumps at every texel, and models do
sample there: reference points are centres of texels, and offsets start as whole numbers of them
(Deformable DETR's initialisation). Which slope a program gives is then a matter of its last digits,
so verification leaves the gradients of such locations out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from attnopt.kernels.deformable import Sampling
from attnopt.passes.normalize import View

if TYPE_CHECKING:
    from attnopt.passes.verify import Candidate

#: roundings of a location that two programs may differ by
ROUNDINGS = 16


def at_kinks(c: Candidate, view: View, known: Mapping[fx.Node, Any],
             env: Mapping[fx.Node, Any]) -> dict[fx.Node, Tensor]:
    """By input of the region, which of its elements are locations on a texel; empty where the
    region samples nothing."""
    from attnopt.passes.verify import given

    calls = [n for n in c.done.emitted
             if n.target is torch.ops.attnopt.deformable_attention.default]
    found: dict[fx.Node, Tensor] = {}
    for call in calls:
        sampling = Sampling.parse(call.args[5])  # type: ignore[arg-type]
        if sampling.mode != "linear":
            continue
        with torch.enable_grad():
            leaves = {n: v.detach().clone().requires_grad_() for n, v in known.items()
                      if isinstance(v, Tensor) and v.is_floating_point()}
            values = given(c, view, {**known, **leaves}, env)
            at = _value(call.args[1], c, values, env)
            shapes = fx.node.map_arg(call.args[4], lambda n, v=values: _value(n, c, v, env))
            if not at.requires_grad:
                continue
            near = _near(at.detach(), sampling, shapes)
            grads = torch.autograd.grad(at, list(leaves.values()), near.to(at.dtype),
                                        allow_unused=True)
        for node, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                found[node] = found.get(node, torch.zeros_like(grad, dtype=torch.bool)) | (
                    grad != 0)
    return found


def _value(wanted: Any, c: Candidate, values: dict[fx.Node, Any], env: Mapping[fx.Node, Any]
           ) -> Any:
    """The value of an emitted node."""
    for node in c.done.emitted:
        if wanted in values:
            break
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: values[n] if n in values else env[n])
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[wanted]


def _near(at: Tensor, sampling: Sampling, shapes: Any) -> Tensor:
    """(B, Q, H, T, R): is the coordinate a whole number of texels, up to rounding?"""
    sizes = [list(reversed(grid)) for grid, n in zip(
        sampling.grids(shapes), sampling.points, strict=True) for _ in range(n)]
    size = torch.tensor(sizes, dtype=torch.float64, device=at.device)
    x = at.double()[..., :sampling.axes]
    if sampling.range != "texels":
        unit = (x + 1) / 2 if sampling.range == "signed" else x
        x = unit * (size - 1) if sampling.align_corners else unit * size - 0.5
    slack = ROUNDINGS * torch.finfo(at.dtype).eps * (1 + size)
    near = (x - x.round()).abs() <= slack
    rest = torch.zeros_like(at[..., sampling.axes:], dtype=torch.bool)
    return torch.cat([near, rest], -1)
