"""Lifting in two stages, as the compiled extensions of DFA3D have it (Li et al., ICCV 2023).

    depth_score(Tensor depth, Tensor locations, Tensor shapes, Tensor starts, str sampling)
        -> Tensor

is the depth at each corner of a point, in the order (low y, low x), (low, high), (high, high),
(high, low), 0 for a corner outside of its grid and for a point that no texel of the volume reaches:

    s_corner = (1 - fz) * depth[corner, z0] + fz * depth[corner, z0 + 1]

    scored_attention(Tensor value, Tensor locations, Tensor weights, Tensor score, Tensor shapes,
                     Tensor starts, str sampling) -> Tensor

is deformable attention whose corners are weighted by such scores:

    out[b,q,h,:] = sum over points and corners of  weights * share * score * value[corner]

Both are made of ATen's operations; sizes are read when the ops run. One after the other they are
`deformable_attention` with depths, which stores no scores: what a capture puts in their place
(`attnopt.passes.capture.two_stage`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnopt.kernels.deformable.corners import result_dtype, working_dtype
from attnopt.kernels.deformable.sampling import Sampling

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "depth_score(Tensor depth, Tensor locations, Tensor shapes, Tensor starts, str sampling) "
    "-> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_library.define(
    "scored_attention(Tensor value, Tensor locations, Tensor weights, Tensor score, Tensor shapes, "
    "Tensor starts, str sampling) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))


class _Corner(NamedTuple):
    """Of each point (B, Q, H, T): its texel, whether there is one, and its share."""

    texel: Tensor
    inside: Tensor
    share: Tensor


def _corners(locations: Tensor, shapes: Tensor, starts: Tensor, sampling: Sampling
             ) -> Iterator[_Corner]:
    """The corners of locations (B, Q, H, T, 2) in 0 to 1, in the order of the scores."""
    sizes = shapes[:, :2].flip(-1)  # x, y
    at = _places(locations, sizes, sampling)
    width, height = (_of_points(n, sampling, torch.int64) for n in sizes.unbind(-1))
    first = _of_points(starts, sampling, torch.int64)
    low = at.floor()
    part = at - low
    for dy, dx in ((0, 0), (0, 1), (1, 1), (1, 0)):
        x, y = low[..., 0].long() + dx, low[..., 1].long() + dy
        inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
        share = (part[..., 0] if dx else 1 - part[..., 0]) * (
            part[..., 1] if dy else 1 - part[..., 1])
        yield _Corner(torch.where(inside, first + y * width + x, 0), inside, share)


def _of_points(levels: Tensor, sampling: Sampling, dtype: torch.dtype) -> Tensor:
    """A number (L, ...) of each level, for each of its points (T, ...)."""
    return torch.cat([levels[i:i + 1].expand(n, *levels.shape[1:])
                      for i, n in enumerate(sampling.points)]).to(dtype)


def _places(locations: Tensor, sizes: Tensor, sampling: Sampling) -> Tensor:
    """Coordinates in texels; what is far outside, infinite or NaN is just outside."""
    dtype = working_dtype(locations)
    lengths = _of_points(sizes, sampling, dtype)
    at = (locations.to(dtype) * lengths - 0.5).nan_to_num(-2.0)
    return at.clamp(min=-2.0).minimum(lengths + 1)


def _rows(tensor: Tensor, texel: Tensor) -> tuple[Tensor, ...]:
    """What to index a tensor (B, S, H or 1, ...) with for the texels (B, Q, H, T)."""
    b, _, h = tensor.shape[:3]
    return (torch.arange(b, device=texel.device).view(-1, 1, 1, 1), texel,
            torch.arange(h, device=texel.device).view(-1, 1))


def _depth_score(depth: Tensor, locations: Tensor, shapes: Tensor, starts: Tensor, sampling: str
                 ) -> Tensor:
    """(B, Q, H, T, 4) of depth (B, S, H or 1, D), locations (B, Q, H, T, 3) in 0 to 1 and shapes
    (L, 3), the slowest axis first and the number of depths last."""
    what, count = Sampling.parse(sampling), depth.shape[-1]
    sizes = shapes[:, [1, 0, 2]]  # x, y, depth
    at = _places(locations, sizes, what)
    reached = ((at > -1) & (at < _of_points(sizes, what, at.dtype))).all(-1)
    low = at[..., 2].floor()
    fz, z = at[..., 2] - low, low.long()
    scores = []
    for corner in _corners(locations[..., :2], shapes, starts, what):
        score = torch.zeros_like(fz)
        for layer, share in ((z, 1 - fz), (z + 1, fz)):
            found = depth[(*_rows(depth, corner.texel), layer.clamp(0, count - 1))].to(fz.dtype)
            there = corner.inside & reached & (layer >= 0) & (layer < count)
            score = score + torch.where(there, found * share, 0.0)
        scores.append(score)
    return torch.stack(scores, -1).to(depth.dtype)


def _scored(value: Tensor, locations: Tensor, weights: Tensor, score: Tensor, shapes: Tensor,
            starts: Tensor, sampling: str) -> Tensor:
    """(B, Q, H, C) of value (B, S, H, C), locations (B, Q, H, T, 2), weights (B, Q, H, T) and
    score (B, Q, H, T, 4)."""
    out: Tensor | None = None
    for i, corner in enumerate(_corners(locations, shapes, starts, Sampling.parse(sampling))):
        factor = torch.where(corner.inside, weights * corner.share * score[..., i], 0.0)
        rows = value[_rows(value, corner.texel)]
        part = torch.einsum("bqht,bqhtc->bqhc", factor,
                            torch.where(corner.inside[..., None], rows, 0.0).to(factor.dtype))
        out = part if out is None else out + part
    assert out is not None
    return out.to(result_dtype(value, weights))


def _fake_score(depth: Tensor, locations: Tensor, shapes: Tensor, starts: Tensor, sampling: str
                ) -> Tensor:
    return depth.new_empty(*locations.shape[:-1], 4)


def _fake_scored(value: Tensor, locations: Tensor, weights: Tensor, score: Tensor, shapes: Tensor,
                 starts: Tensor, sampling: str) -> Tensor:
    return value.new_empty(*locations.shape[:3], value.shape[-1],
                           dtype=result_dtype(value, weights))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, sampling = inputs
    ctx.save_for_backward(*tensors)
    ctx.sampling = sampling


def _backward(forward: Callable[..., Tensor], ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """By running `forward` once more, made of operations that have gradients."""
    tensors = ctx.saved_tensors
    wanted = [i for i, need in enumerate(ctx.needs_input_grad) if need]
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [t.view_as(t) for t in tensors]  # one tensor may be in two roles
        parts = torch.autograd.grad(forward(*own, ctx.sampling), [own[i] for i in wanted], grad,
                                    allow_unused=True, create_graph=again)
    found: list[Tensor | None] = [None] * (len(tensors) + 1)
    for i, part in zip(wanted, parts, strict=True):
        found[i] = part
    return tuple(found)


for _name, _forward, _fake in (("depth_score", _depth_score, _fake_score),
                               ("scored_attention", _scored, _fake_scored)):
    _library.impl(_name, _forward, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnopt::{_name}", _fake, lib=_library)
    torch.library.register_autograd(
        f"attnopt::{_name}", lambda ctx, grad, forward=_forward: _backward(forward, ctx, grad),
        setup_context=_setup, lib=_library)
