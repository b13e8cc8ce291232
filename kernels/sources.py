"""The generated text of the kernel that a call runs, for people to read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from attnopt.ir.sizes import assumed
from attnopt.ir.spec import Schedule, Spec
from attnopt.ir.tiling import GridTile
from attnopt.kernels import low_rank
from attnopt.kernels.cpp.template import WINDOW


def source_of(spec: Spec, schedule: Schedule, tensors: Sequence[torch.Tensor]) -> str:
    """C++ of a call (query, key, value, *operands) whose tile is chosen, Triton of any, "" for
    other lowerings.

    Only dtypes and shapes of the tensors are looked at.
    """
    if schedule.lowering == "triton":
        return _triton(spec, schedule, tensors)
    if schedule.lowering == "cpp:stencil":
        return _stencil(spec, schedule, tensors)
    if schedule.lowering not in ("cpp", WINDOW) or len(schedule.tile) < 4:
        return ""
    from attnopt.kernels.cpp.attention import signature_of
    from attnopt.kernels.cpp.isa import isas
    from attnopt.kernels.cpp.template import Tile, source

    wide, given = low_rank.of_call(spec, tensors)
    query, key, value, *operands = given
    return source(signature_of(wide, query, key, value, operands),
                  Tile.of(schedule.tile, schedule.lowering), isas()[0].width)


def _stencil(spec: Spec, schedule: Schedule, tensors: Sequence[torch.Tensor]) -> str:
    from attnopt.kernels.cpp.attention import signature_of
    from attnopt.kernels.cpp.grid_windows import windows_of
    from attnopt.kernels.cpp.isa import isa
    from attnopt.kernels.cpp.stencil_source import StencilTile, stencil_source

    query, key, value, *operands = tensors
    windows = windows_of(spec.mask, query.shape[-2])
    if isinstance(windows, str) or len(schedule.tile) != 3:
        return ""
    return stencil_source(signature_of(spec, query, key, value, operands), windows,
                          StencilTile(*schedule.tile), isa().width)


def _triton(spec: Spec, schedule: Schedule, tensors: Sequence[torch.Tensor]) -> str:
    """The forward kernel, with the lists of tiles that it walks over where the mask has any."""
    from attnopt.kernels.triton.lists import recipe
    from attnopt.kernels.triton.problem import describe
    from attnopt.kernels.triton.template import forward
    from attnopt.kernels.triton.tiles import Tile, default

    query, key, value, *operands = (_plain(t) for t in tensors)
    problem = describe(spec, query, key, value, operands)
    if isinstance(problem, str):
        return ""
    tile = Tile(*schedule.tile) if len(schedule.tile) == 4 else default(
        "sm_90", query.shape[-1], value.shape[-1], query.element_size())
    made = recipe(spec, problem, tile, "q")
    signature = problem.signature
    if made is not None:
        grid = len(made.cut[0].shape) if isinstance(made.cut[0], GridTile) else 0
        vary = tuple(a for a, n in zip(made.axes, made.leading, strict=True) if n > 1)
        signature = dataclasses.replace(
            signature, grid=grid, lists=vary if spec.mask.axes - {"q", "k"} else ())
    return forward(spec, signature).text


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same look without memory; symbolic lengths are those of the example."""
    return torch.empty_strided([assumed(n) for n in tensor.shape],
                               [assumed(n) for n in tensor.stride()],
                               dtype=tensor.dtype, device="meta")
