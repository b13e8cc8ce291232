"""Deformable attention by Triton kernels: the result of a call, and its gradients.

For float32, bfloat16 and float16 on a GPU, each tensor in a dtype of its own; everything is
computed in float32. `value` and `depth` may have any strides as long as a texel's channels, or
layers, lie next to each other; where they do not, and for other tensors, a contiguous copy is made.

Gradients of value and depth are summed by atomics, in an order that differs from run to run; where
torch.use_deterministic_algorithms asks for more, the caller computes them by ATen.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt import logs
from attnopt.errors import KernelError
from attnopt.kernels.deformable.corners import result_dtype
from attnopt.kernels.deformable.sampling import Sampling
from attnopt.kernels.deformable.triton_blocks import Block, block, width
from attnopt.kernels.deformable.triton_text import ADDED, source
from attnopt.kernels.deformable.triton_walk import Form, known
from attnopt.kernels.triton.declines import DTYPES, available, interpreted
from attnopt.kernels.triton.launch import device_name, start
from attnopt.kernels.triton.loading import kernel

#: channels of a head that a kernel is made for
MOST_CHANNELS = 1024
#: of which names have gradients, in the order of the op's arguments
NAMES = ("value", "locations", "weights", "depth")
_LARGEST_UNIT = 16
#: forms that did not compile here
_refused: set[Form] = set()


def takes(sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
          depth: Tensor | None) -> bool:
    """Whether kernels compute these tensors."""
    tensors = [t for t in (value, locations, weights, depth) if t is not None]
    return ((value.device.type == "cuda" or interpreted()) and available() and known(sampling)
            and all(t.dtype in DTYPES for t in tensors)
            and all(t.numel() > 0 for t in tensors)
            and value.shape[-1] <= MOST_CHANNELS
            and max(value.shape[1], sum(sampling.points)) < 2**31
            and math.prod(weights.shape[:3]) < 2**31)


def gather(sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
           depth: Tensor | None, shapes: Sequence[int], own: Block | None = None) -> Tensor | None:
    """(B, Q, H, C), or None where the kernel does not take the tensors or cannot be compiled.

    own: the block of a program in place of the default
    """
    if not takes(sampling, value, locations, weights, depth):
        return None
    call = _Call(sampling, value, locations, weights, depth, shapes)
    out = torch.empty(*weights.shape[:3], value.shape[-1], dtype=result_dtype(value, weights),
                      device=value.device)
    return out if call.run((), {"out": out}, own) else None


def gradients(sampling: Sampling, tensors: Sequence[Tensor | None], wanted: Sequence[str],
              grad: Tensor, shapes: Sequence[int], own: Block | None = None
              ) -> dict[str, Tensor] | None:
    """Gradients by name, of the names in `wanted`, where the gradient of the result is `grad`.

    tensors: those of NAMES. None where the kernels do not compute them, or where another run might
    give other last digits and must not.
    """
    value, locations, weights, depth = tensors
    assert value is not None and locations is not None and weights is not None
    if not takes(sampling, value, locations, weights, depth) or grad.dtype not in DTYPES or (
            torch.are_deterministic_algorithms_enabled() and set(ADDED) & set(wanted)):
        return None
    call = _Call(sampling, value, locations, weights, depth, shapes)
    named = {n: t for n, t in zip(NAMES, tensors, strict=True) if t is not None and n in wanted}
    found = {n: torch.zeros_like(t, dtype=torch.float32 if n in ADDED else t.dtype,
                                 memory_format=torch.contiguous_format)
             for n, t in named.items()}
    # The nearest texel does not move with a location.
    moving = tuple(n for n in named if n != "locations" or sampling.mode == "linear")
    outputs = {"grad_out": grad.contiguous(), **{f"grad_{n}": found[n] for n in moving}}
    if moving and not call.run(moving, outputs, own):
        return None
    return {n: g.to(named[n].dtype) for n, g in found.items()}


class _Call:
    """The tensors and numbers of one call."""

    def __init__(self, sampling: Sampling, value: Tensor, locations: Tensor, weights: Tensor,
                 depth: Tensor | None, shapes: Sequence[int]) -> None:
        self.sampling = sampling
        value = _rows(value)
        b, queries, heads, points = weights.shape
        self.value, self.batch, self.rows = value, b, b * queries * heads
        strides = _strides(value)
        self.unit = math.gcd(_LARGEST_UNIT, *strides)
        self.tensors = {"value": value, "locations": locations.contiguous(),
                        "weights": weights.contiguous(),
                        "levels": _levels(sampling, tuple(shapes), value.device)}
        steps = [s // self.unit for s in strides]
        self.numbers = {
            "queries": queries, "heads": heads, "points": points, "level_count": sampling.levels,
            "value_batch": steps[0], "value_texel": steps[1], "value_head": steps[2],
            "texels": value.shape[1]}
        # Of offsets within a batch entry.
        reach = [queries * heads * max(value.shape[-1], points * locations.shape[-1]),
                 value[0].numel(), _reach(value)]
        self.shared = False
        if depth is not None:
            depth = _rows(depth)
            self.shared = depth.shape[2] == 1
            self.tensors["depth"] = depth
            strides = _strides(depth)
            self.numbers |= {
                "layers": depth.shape[-1], "depth_heads": depth.shape[2],
                "depth_batch": strides[0], "depth_texel": strides[1], "depth_head": strides[2]}
            reach += [depth[0].numel(), _reach(depth)]
        self.wide = max(reach) >= 2**31

    def run(self, wanted: tuple[str, ...], outputs: dict[str, Tensor], own: Block | None) -> bool:
        """Compute the outputs; False where the kernel does not compile."""
        form = Form.of(self.sampling, "depth" in self.tensors, self.wide, wanted)
        if form in _refused:
            return False
        value, name = self.value, "backward" if wanted else "forward"
        arch, processors = _device(value.device)
        heads, channels = self.numbers["heads"], value.shape[-1]
        own = own or block(arch, self.rows, heads, channels, value.element_size(),
                           backward=bool(wanted), together=self.shared and "depth" in wanted,
                           processors=processors)
        made = source(form)
        given: dict[str, Any] = {**self.tensors, **outputs, **self.numbers}
        fixed = {"QUERIES": own.queries, "HEADS": own.heads, "C": channels,
                 "PADDED": width(channels), "UNIT": self.unit, "num_warps": own.warps,
                 **options(form, channels, arch)}
        programs = self.batch * -(-self.numbers["queries"] // own.queries) * -(-heads // own.heads)
        try:
            start(kernel(made, name), programs, [given[a.name] for a in made.arguments[name]],
                  fixed, value.device)
        except KernelError as error:
            _refused.add(form)
            logs.get("triton").warning("deformable attention is left to ATen: %s", error)
            return False
        return True


def options(form: Form, channels: int, arch: str) -> dict[str, Any]:
    """Of the compiler, for any block."""
    found: dict[str, Any] = {"num_stages": 1}
    if not form.linear:
        # A location in the middle of two texels must not become another one by fused rounding.
        found["enable_fp_fusion"] = False
    if arch.startswith("sm_"):
        # Left alone, ptxas would rather use its stack than give up a program of a multiprocessor.
        # With 64 registers, half of the warps that a multiprocessor can hold fit.
        found["maxnreg"] = (96 if form.wanted else 64) + 32 * (
            form.wide + (form.corners > 4) * (1 + bool(form.wanted)) + 2 * (channels % 4 > 0))
    return found


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor) -> list[int]:
    """Of the axes but the last; an axis of one place has none."""
    return [0 if n == 1 else s for n, s in zip(
        tensor.shape[:-1], tensor.stride()[:-1], strict=True)]


def _reach(tensor: Tensor) -> int:
    """Beyond the last number of a batch entry."""
    return 1 + sum((n - 1) * s for n, s in zip(
        tensor.shape[1:], tensor.stride()[1:], strict=True))


@functools.lru_cache(maxsize=64)
def _device(device: torch.device) -> tuple[str, int]:
    """The architecture's name, and how many multiprocessors there are."""
    count = (torch.cuda.get_device_properties(device).multi_processor_count
             if device.type == "cuda" else 1)
    return device_name(device), count


@functools.lru_cache(maxsize=256)
def _levels(sampling: Sampling, shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """Of each level the sizes of its axes, the fastest first, its first texel, its first point and
    the one after its last."""
    rows: list[int] = []
    texel = point = 0
    for grid, count in zip(sampling.grids(shapes), sampling.points, strict=True):
        rows += [*reversed(grid), texel, point, point + count]
        texel, point = texel + math.prod(grid), point + count
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.int32, device=device)
