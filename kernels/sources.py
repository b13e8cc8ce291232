"""The generated text of the kernel that a call runs, for people to read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from attnopt.ir.spec import Schedule, Spec
from attnopt.kernels import low_rank


def source_of(spec: Spec, schedule: Schedule, tensors: Sequence[torch.Tensor]) -> str:
    """C++ of a call (query, key, value, *operands) whose tile is chosen, "" for other lowerings.

    Only dtypes and shapes of the tensors are looked at.
    """
    if schedule.lowering == "cpp:stencil":
        return _stencil(spec, schedule, tensors)
    if schedule.lowering != "cpp" or len(schedule.tile) < 4:
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
