"""Launch of generated kernels: no decorator chooses anything, the Schedule does.

`run_forward` computes one Problem. On devices with TMA, keys and values go through tensor
descriptors where their memory allows it: a last stride of 1, the others multiples of 16 bytes,
five axes at most. Where tiles are boxes of a grid, the grid's axes are axes of the descriptor, and
the leading ones must make a single one.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import KernelError
from attnopt.ir.spec import Spec
from attnopt.ir.tiling import GridTile, Tiling, tile_count
from attnopt.kernels.triton import boxes as grids
from attnopt.kernels.triton.body import inner_leaves
from attnopt.kernels.triton.boxes import Boxes
from attnopt.kernels.triton.intervals import interval
from attnopt.kernels.triton.layout import Signature, Source
from attnopt.kernels.triton.lists import Lists, tiles_of
from attnopt.kernels.triton.loading import kernel
from attnopt.kernels.triton.problem import Problem
from attnopt.kernels.triton.scores import BY_CHANNEL
from attnopt.kernels.triton.template import forward
from attnopt.kernels.triton.tiles import Tile, architecture, default, options, padded

#: axes of a tensor descriptor, and places of a block along one of them
_MOST_AXES, _LONGEST_SIDE = 5, 256


@functools.lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """The architecture's name in `tiles`: sm_90, gfx942; "sm_80" for the interpreter."""
    if device.type != "cuda":
        return "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def default_tile(spec: Spec, problem: Problem) -> Tile:
    query, value = problem.tensors["query"], problem.tensors["value"]
    return default(device_name(query.device), query.shape[-1], value.shape[-1],
                   query.element_size(), listed=not interval(spec).exact,
                   by_channel=spec.score in BY_CHANNEL)


def run_forward(spec: Spec, problem: Problem, tile: Tile, descriptors: bool | None = None,
                boxes: Boxes | None = None) -> tuple[Tensor, Tensor | None]:
    """(out (*L, Q, Dv) contiguous in the dtype of query, log-sum-exp (*L, Q) float32 or None).

    descriptors: use TMA or not; None where the device and the tensors decide
    boxes:       of a mask on a grid, in place of those that cost least
    """
    query, value = problem.tensors["query"], problem.tensors["value"]
    rows = (*problem.leading, problem.sizes["q"])
    outputs = {"out": query.new_empty(*rows, value.shape[-1])}
    if problem.signature.lse:
        outputs["lse"] = query.new_empty(rows, dtype=torch.float32)
    lists = tiles_of(spec, problem, tile, "q", boxes)
    source = forward(spec, with_lists(problem.signature, lists))
    cut = cut_of(lists, tile)
    fixed = constants(spec, problem, tile, lists, descriptors)
    passed = outputs if lists is None else outputs | lists.tensors
    launch(source, "forward", problem, passed, fixed, tile,
           tile_count(cut[0], problem.sizes["q"]) * problem.programs,
           {"key": cut[1], "value": cut[1]}, spec.score in BY_CHANNEL)
    return outputs["out"], outputs.get("lse")


def with_lists(signature: Signature, lists: Lists | None) -> Signature:
    """The signature of kernels that walk over these lists."""
    if lists is None:
        return signature
    grid = len(lists.boxes[0].shape) if lists.boxes else 0
    return dataclasses.replace(signature, lists=lists.axes, grid=grid)


def cut_of(lists: Lists | None, tile: Tile) -> tuple[Tiling, Tiling]:
    """How queries and keys fall into tiles."""
    return (tile.rows, tile.keys) if lists is None or lists.boxes is None else lists.boxes


def constants(spec: Spec, problem: Problem, tile: Tile, lists: Lists | None = None,
              descriptors: bool | None = None) -> dict[str, Any]:
    """The constexpr parameters of a forward kernel."""
    query, key, value = (problem.tensors[n] for n in ("query", "key", "value"))
    boxes = lists.boxes if lists else None
    return {
        "TMA": describable(problem, ("key", "value")[spec.score != "dot":], boxes)
        if descriptors is None else descriptors,
        "BM": tile.rows, "BN": tile.keys, "STAGES": tile.stages,
        "D": query.shape[-1], "DP": padded(query.shape[-1]),
        "V": value.shape[-1], "VP": padded(value.shape[-1]),
        "PRECISION": precision(query.dtype, query.device), "RAGGED": key.shape[-2] % tile.keys != 0,
        **ranks(spec, problem), **(grids.constants(boxes) if boxes else {})}


def ranks(spec: Spec, problem: Problem) -> dict[str, int]:
    """Widths of the factors of low-rank terms."""
    found: dict[str, int] = {}
    for i, leaf in enumerate(inner_leaves(spec)):
        rank = problem.tensors[f"op_{leaf.value[0]}"].shape[-1]
        found |= {f"R{i}": rank, f"R{i}P": padded(rank)}
    return found


def precision(dtype: torch.dtype, device: torch.device) -> str:
    """How products are computed: those of float32 as exactly as torch's own setting asks."""
    if dtype != torch.float32 or torch.version.hip or device.type != "cuda":
        return "ieee"
    # Three products of tf32 parts are as good as one of float32, on tensor cores.
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def describable(problem: Problem, names: Sequence[str], boxes: Boxes | None = None) -> bool:
    """Whether these tensors can be read through tensor descriptors."""
    device = problem.tensors["query"].device
    if device.type != "cuda" or not architecture(device_name(device)).tma:
        return False
    for name in names:
        tensor, axes = problem.tensors[name], problem.axes_of(name)
        size = tensor.element_size()
        steps = [tensor.stride(problem.dims[name][a]) * size for a in axes]
        steps.append(tensor.stride(-2) * size)
        leading = len(axes)
        if boxes is not None:
            one = merged(problem, name)
            if one is None or max(max(b.shape) for b in boxes) > _LONGEST_SIDE:
                return False
            steps = [one[1] * size, tensor.stride(-2) * size]
            leading = len(boxes[0].shape)
        if leading + 2 > _MOST_AXES or tensor.stride(-1) != 1 or tensor.data_ptr() % 16 or any(
                step % 16 or not 0 < step < 1 << 40 for step in steps):
            return False
    return True


def merged(problem: Problem, name: str) -> tuple[int, int] | None:
    """(length, stride) of the leading axes along which a tensor varies as one axis, None where
    they do not make one."""
    tensor, length, step = problem.tensors[name], 1, 0
    for axis in reversed(problem.axes_of(name)):
        place = problem.dims[name][axis]
        own = tensor.shape[place]
        if own == 1:
            continue
        if length > 1 and tensor.stride(place) != step * length:
            return None
        step = step if length > 1 else tensor.stride(place)
        length *= own
    return length, step or tensor.shape[-2] * tensor.stride(-2)


def described(problem: Problem, name: str, block: Tiling) -> Any:
    """A tensor descriptor of the leading axes along which a tensor varies, rows and channels."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensor, axes = problem.tensors[name], problem.axes_of(name)
    if isinstance(block, GridTile):
        leading = merged(problem, name)
        assert leading is not None
        inner = [tensor.stride(-2)]
        for n in reversed(block.length[1:]):
            inner.insert(0, inner[0] * n)
        return TensorDescriptor(
            tensor, [leading[0], *block.length, tensor.shape[-1]],
            [leading[1], *inner, tensor.stride(-1)],
            [1, *block.shape, padded(tensor.shape[-1])])
    rows = block
    places = [problem.dims[name][a] for a in axes] + [-2, -1]
    return TensorDescriptor(
        tensor, [tensor.shape[p] for p in places], [tensor.stride(p) for p in places],
        [*[1] * len(axes), rows, padded(tensor.shape[-1])])


def launch(source: Source, name: str, problem: Problem, more: Mapping[str, Tensor],
           fixed: Mapping[str, Any], tile: Tile, programs: int, blocks: Mapping[str, Tiling],
           by_channel: bool = False) -> None:
    """Start a kernel. Raises KernelError where it does not compile, or not fit the device.

    blocks: what TMA reads at a time, by tensor; by_channel: as for `tiles.options`
    """
    arguments = []
    for argument in source.arguments[name]:
        if fixed["TMA"] and argument.kind == "pointer" and argument.name in blocks:
            arguments.append(described(problem, argument.name, blocks[argument.name]))
        else:
            arguments.append(problem.value_of(argument, more))
    chosen = {c: fixed[c] for c in source.constants[name]}
    device = problem.tensors["query"].device
    start(kernel(source, name), programs, arguments,
          chosen | options(tile, device_name(device), by_channel), device)


def start(function: Any, programs: int, arguments: Sequence[Any], fixed: Mapping[str, Any],
          device: torch.device) -> None:
    """Start a kernel on a device. Raises KernelError where it does not compile or not fit."""
    from triton.errors import TritonError

    with _on(device):
        try:
            function[(programs,)](*arguments, **fixed)
        except TritonError as error:
            raise KernelError(f"a generated kernel cannot be compiled: {error}") from error


def _on(device: torch.device) -> AbstractContextManager[Any]:
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)

