"""The op `attnopt::deformable_attention`, its fake, its gradient and its batching.

    deformable_attention(Tensor value, Tensor locations, Tensor weights, Tensor? depth,
                         SymInt[] shapes, str sampling, str schedule="") -> Tensor

`Sampling` says what the tensors are; the schedule is "aten" where no kernel is to be generated. The
forward pass keeps nothing but its arguments; the backward pass makes the corners again, in blocks
of queries, so that neither holds more than the corners of one block. The gradient of the gradient
comes from a composition that holds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from attnopt.kernels.deformable import triton_gather
from attnopt.kernels.deformable.corners import compose, result_dtype
from attnopt.kernels.deformable.gather import gather, gradients
from attnopt.kernels.deformable.sampling import Sampling

#: corners of a block of queries, forward and backward
CORNERS, BACKWARD_CORNERS = 1 << 18, 1 << 21

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define(
    "deformable_attention(Tensor value, Tensor locations, Tensor weights, Tensor? depth, "
    "SymInt[] shapes, str sampling, str schedule='') -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,))


def deformable_attention(value: Tensor, locations: Tensor, weights: Tensor, shapes: Sequence[int],
                         sampling: Sampling, depth: Tensor | None = None) -> Tensor:
    """(B, Q, H, C) in the dtype that value and weights promote to; see `Sampling`.

    Raises ValueError where shapes, dtypes or devices do not go together.
    """
    out: Tensor = torch.ops.attnopt.deformable_attention.default(
        value, locations, weights, depth, list(shapes), str(sampling))
    return out


def _forward(value: Tensor, locations: Tensor, weights: Tensor, depth: Tensor | None,
             shapes: Sequence[int], sampling: str, schedule: str = "") -> Tensor:
    what = Sampling.parse(sampling)
    what.check(value, locations, weights, depth, shapes)
    b, queries, h = locations.shape[:3]
    sizes, dtype = (b, queries, h, value.shape[-1]), result_dtype(value, weights)
    if 0 not in sizes and schedule != "aten":
        for way in (triton_gather.gather, gather):
            generated = way(what, value, locations, weights, depth, shapes)
            if generated is not None:
                return generated
    out = torch.empty(sizes, dtype=dtype, device=value.device)
    if out.numel() == 0:
        return out
    with torch.no_grad():
        for start, stop in _blocks(what, locations, CORNERS):
            part = locations[:, start:stop], weights[:, start:stop]
            found = compose(what, value, *part, depth, shapes)
            if not torch.isfinite(found.sum(dtype=_wide(found))):
                found = compose(what, value, *part, depth, shapes, careful=True)
            out[:, start:stop] = found
    return out


def _blocks(sampling: Sampling, locations: Tensor, corners: int) -> list[tuple[int, int]]:
    """Ranges of queries of so many corners."""
    b, queries, h, points, _ = locations.shape
    each = max(1, b * h * points * 2 ** (sampling.axes if sampling.mode == "linear" else 0))
    step = max(1, corners // each)
    return [(i, min(queries, i + step)) for i in range(0, queries, step)]


def _wide(tensor: Tensor) -> torch.dtype:
    """A dtype in which a sum of finite numbers is finite."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _fake(value: Tensor, locations: Tensor, weights: Tensor, depth: Tensor | None,
          shapes: Sequence[int], sampling: str, schedule: str = "") -> Tensor:
    what = Sampling.parse(sampling)
    what.check(value, locations, weights, depth, shapes)
    b, queries, h = locations.shape[:3]
    return value.new_empty(b, queries, h, value.shape[-1], dtype=result_dtype(value, weights))


# -- gradients ------------------------------------------------------------------------------------
def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, locations, weights, depth, shapes, sampling, *schedule = inputs
    ctx.save_for_backward(value, locations, weights, depth)
    ctx.shapes, ctx.sampling = shapes, Sampling.parse(sampling)
    ctx.schedule, ctx.others = "".join(schedule), (None,) * (len(inputs) - 4)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    wanted = [i for i, need in enumerate(ctx.needs_input_grad[:4]) if need]
    if not wanted:
        return (None,) * 4 + tuple(ctx.others)
    traced = any(type(t) not in (Tensor, Parameter, type(None)) for t in (*tensors, grad))
    if traced or torch.is_grad_enabled():
        found = _whole(ctx, tensors, wanted, grad)
    else:
        found = _generated(ctx, tensors, wanted, grad) or _in_blocks(ctx, tensors, wanted, grad)
    return *(found.get(i) for i in range(4)), *ctx.others


def _whole(ctx: Any, tensors: Sequence[Tensor | None], wanted: Sequence[int], grad: Tensor
           ) -> dict[int, Tensor | None]:
    """Gradients that have gradients, or are being traced."""
    with torch.enable_grad():
        own = [None if t is None else t.view_as(t) for t in tensors]  # one may be in two roles
        value, locations, weights, depth = own
        assert value is not None and locations is not None and weights is not None
        out = compose(ctx.sampling, value, locations, weights, depth, ctx.shapes, careful=True,
                      bags=False)
    given = [t for i in wanted if (t := own[i]) is not None]
    found = torch.autograd.grad(out, given, grad, create_graph=True, allow_unused=True)
    return dict(zip(wanted, found, strict=True))


def _generated(ctx: Any, tensors: Sequence[Tensor | None], wanted: Sequence[int], grad: Tensor
               ) -> dict[int, Tensor | None] | None:
    """By a generated kernel; None where there is none for these tensors."""
    if ctx.schedule == "aten":
        return None
    names = triton_gather.NAMES
    made = triton_gather.gradients(
        ctx.sampling, tensors, [names[i] for i in wanted], grad, ctx.shapes)
    if made is not None:
        return {i: made[names[i]] for i in wanted}
    found = gradients(ctx.sampling, tensors, wanted, grad, ctx.shapes)
    return None if found is None else dict(found)


def _in_blocks(ctx: Any, tensors: Sequence[Tensor | None], wanted: Sequence[int], grad: Tensor
               ) -> dict[int, Tensor | None]:
    locations = tensors[1]
    assert locations is not None
    total = {i: torch.zeros_like(t) for i in wanted if (t := tensors[i]) is not None}
    for start, stop in _blocks(ctx.sampling, locations, BACKWARD_CORNERS):
        block = [None if t is None else t.detach() for t in tensors]
        for i in (1, 2):
            whole = block[i]
            assert whole is not None
            block[i] = whole[:, start:stop]
        given = [t.requires_grad_() for i in wanted if (t := block[i]) is not None]
        found = _gradients(ctx, block, given, grad[:, start:stop])
        for i, part in zip(wanted, found, strict=True):
            if part is None:
                continue
            if i in (1, 2):
                total[i][:, start:stop] = part
            else:
                total[i] += part
    return dict(total)


def _gradients(ctx: Any, block: Sequence[Tensor | None], given: Sequence[Tensor], grad: Tensor
               ) -> tuple[Tensor | None, ...]:
    """Of one block, again with care where a number is not finite."""
    value, locations, weights, depth = block
    assert value is not None and locations is not None and weights is not None
    found: tuple[Tensor | None, ...] = ()
    for careful in (False, True):
        with torch.enable_grad():
            out = compose(ctx.sampling, value, locations, weights, depth, ctx.shapes,
                          careful=careful)
        if not out.requires_grad:
            return (None,) * len(given)
        found = torch.autograd.grad(out, given, grad.contiguous(), allow_unused=True)
        if all(f is None or torch.isfinite(f.sum(dtype=_wide(f))) for f in (*found, out.detach())):
            break
    return found


# -- batching -------------------------------------------------------------------------------------
def _batched(info: Any, in_dims: tuple[Any, ...], value: Tensor, locations: Tensor,
             weights: Tensor, depth: Tensor | None, shapes: Sequence[int], sampling: str,
             schedule: str = "") -> tuple[Tensor, int]:
    def folded(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        whole = tensor.expand(info.batch_size, *tensor.shape) if dim is None \
            else tensor.movedim(dim, 0)
        return whole.flatten(0, 1)

    tensors = [folded(t, d) for t, d in zip(
        (value, locations, weights, depth), in_dims[:4], strict=True)]
    out = torch.ops.attnopt.deformable_attention.default(*tensors, shapes, sampling, schedule)
    return out.unflatten(0, (info.batch_size, -1)), 0


_library.impl("deformable_attention", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::deformable_attention", _fake, lib=_library)
torch.library.register_autograd("attnopt::deformable_attention", _backward, setup_context=_setup,
                                lib=_library)
torch.library.register_vmap("attnopt::deformable_attention", _batched, lib=_library)
