"""The generated C++ of deformable attention: one pass over the points, nothing held but the result.

For float32, bfloat16 and float16 values on a CPU, whose channels lie next to each other; everything
is computed in float32.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from attnopt.errors import AttnOptError
from attnopt.kernels.cpp.attention import warn_once
from attnopt.kernels.cpp.isa import Isa, isa
from attnopt.kernels.cpp.template import _file
from attnopt.kernels.cpp.toolchain import compile_all, load, toolchain
from attnopt.kernels.deformable.corners import result_dtype
from attnopt.kernels.deformable.sampling import MODES, RANGES, Sampling

ELEMENTS = {torch.float32: "float", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: channels of a head that a kernel is made for
MOST_CHANNELS = 1024


def takes(sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
          depth: Tensor | None) -> bool:
    """Whether the kernel computes these tensors."""
    others = [t for t in (locations, weights, depth) if t is not None]
    return (value.device.type == "cpu" and value.dtype in ELEMENTS
            and all(t.dtype in ELEMENTS for t in others)
            and value.stride(-1) == 1 and 0 < value.shape[-1] <= MOST_CHANNELS
            and value.shape[1] < 2**31 and not toolchain().why_not())


def gather(sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
           depth: Tensor | None, shapes: Sequence[int]) -> Tensor | None:
    """(B, Q, H, C), or None where the kernel does not take the tensors or cannot be compiled."""
    if not takes(sampling, value, locations, weights, depth):
        return None
    kernel = _kernel(sampling, value.dtype, value.shape[-1], depth is not None, isa())
    if kernel is None:
        return None
    at, weight = (t.float().contiguous() for t in (locations, weights))
    deep = None if depth is None else depth.float().contiguous()
    b, queries, h, points, _ = at.shape
    out = torch.empty(b, queries, h, value.shape[-1], dtype=torch.float32, device="cpu")
    level = _level(sampling, tuple(shapes))
    words = array("q", [
        torch.get_num_threads(), b, queries, h, points, 0 if deep is None else deep.shape[-1],
        1 if deep is None else deep.shape[2], value.shape[1], value.data_ptr(), value.stride(0),
        value.stride(1), value.stride(2), at.data_ptr(), weight.data_ptr(),
        0 if deep is None else deep.data_ptr(), out.data_ptr(), level.data_ptr()])
    kernel(words.buffer_info()[0])
    return out.to(result_dtype(value, weights))


@functools.lru_cache(maxsize=256)
def _level(sampling: Sampling, shapes: tuple[int, ...]) -> Tensor:
    """Of each point the sizes of its level's axes, the fastest first, their strides, and the first
    texel."""
    rows: list[int] = []
    first = 0
    for grid, count in zip(sampling.grids(shapes), sampling.points, strict=True):
        sizes, strides, step = [*reversed(grid)], [], 1
        for n in sizes:
            strides.append(step)
            step *= n
        rows += [*sizes, *strides, first] * count
        first += step
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device="cpu")


@functools.lru_cache(maxsize=256)
def _kernel(sampling: Sampling, dtype: torch.dtype, channels: int, depth: bool, target: Isa
            ) -> Callable[[int], None] | None:
    try:
        function = load(compile_all([source(sampling, dtype, channels, depth, target.width)],
                                    target)[0]).gather
    except AttnOptError as error:
        warn_once(str(error))
        return None
    function.argtypes, function.restype = [ctypes.c_void_p], None
    found: Callable[[int], None] = function
    return found


def source(sampling: Sampling, dtype: torch.dtype, channels: int, depth: bool, width: int) -> str:
    """The text of a kernel. It does not depend on sizes or numbers of points."""
    integers = {"AXES": sampling.axes, "RANGE": RANGES.index(sampling.range), "C": channels,
                "DEPTH": int(depth)}
    flags = {"LINEAR": sampling.mode == MODES[0], "BORDER": sampling.padding == "border",
             "ALIGN": sampling.align_corners,
             "LOST": sampling.not_finite == "nan" and sampling.padding == "zeros"
             and sampling.mode == MODES[0]}
    constants = [f"constexpr int {name} = {value};" for name, value in integers.items()]
    constants += [f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()]
    body = Path(__file__).with_name("gather.h").read_text("utf-8")
    return "\n".join([f"#define W {width}", _file("vectors.h"), *constants,
                      f"typedef {ELEMENTS[dtype]} T;", body])
