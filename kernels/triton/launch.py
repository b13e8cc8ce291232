"""Launch of generated kernels: no decorator chooses anything, the Schedule does.

`run_forward` computes one Problem. On devices with TMA, keys and values go through tensor
descriptors where their memory allows it: a last stride of 1, the others multiples of 16 bytes,
five axes at most. Lists of tiles, which depend on sizes alone, are made once and kept.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from attnopt.errors import KernelError
from attnopt.ir.intervals import tile_lists, tile_states
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.body import inner_leaves
from attnopt.kernels.triton.intervals import interval
from attnopt.kernels.triton.layout import Signature, Source
from attnopt.kernels.triton.loading import kernel
from attnopt.kernels.triton.problem import Problem
from attnopt.kernels.triton.template import forward
from attnopt.kernels.triton.tiles import Tile, architecture, default, padded

#: lists are made for masks of up to so many tiles
_MOST_TILES = 1 << 22


@functools.lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """The architecture's name in `tiles`: sm_90, gfx942; "sm_80" for the interpreter."""
    if device.type != "cuda":
        return "sm_80"
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName).split(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def default_tile(problem: Problem) -> Tile:
    query, value = problem.tensors["query"], problem.tensors["value"]
    return default(device_name(query.device), query.shape[-1], value.shape[-1],
                   query.element_size())


def run_forward(spec: Spec, problem: Problem, tile: Tile, descriptors: bool | None = None
                ) -> tuple[Tensor, Tensor | None]:
    """(out (*L, Q, Dv) contiguous in the dtype of query, log-sum-exp (*L, Q) float32 or None).

    descriptors: use TMA or not; None where the device and the tensors decide.
    """
    query, value = problem.tensors["query"], problem.tensors["value"]
    rows = (*problem.leading, problem.sizes["q"])
    outputs = {"out": query.new_empty(*rows, value.shape[-1])}
    if problem.signature.lse:
        outputs["lse"] = query.new_empty(rows, dtype=torch.float32)
    lists = tiles_of(spec, problem, tile, "q")
    signature = with_lists(problem.signature, lists)
    source = forward(spec, signature)
    fixed = constants(spec, problem, tile, descriptors)
    passed = outputs if lists is None else outputs | lists[1]
    grid = math.ceil(problem.sizes["q"] / tile.rows) * problem.programs
    launch(source, "forward", problem, passed, fixed, tile, grid)
    return outputs["out"], outputs.get("lse")


def constants(spec: Spec, problem: Problem, tile: Tile, descriptors: bool | None = None
              ) -> dict[str, Any]:
    """The constexpr parameters of a forward kernel."""
    query, key, value = (problem.tensors[n] for n in ("query", "key", "value"))
    return {
        "TMA": describable(problem, ("key", "value")[spec.score != "dot":])
        if descriptors is None else descriptors,
        "BM": tile.rows, "BN": tile.keys, "STAGES": tile.stages,
        "D": query.shape[-1], "DP": padded(query.shape[-1]),
        "V": value.shape[-1], "VP": padded(value.shape[-1]),
        "PRECISION": precision(query.dtype, query.device), "RAGGED": key.shape[-2] % tile.keys != 0,
        **ranks(spec, problem)}


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


def describable(problem: Problem, names: Sequence[str]) -> bool:
    """Whether these tensors can be read through tensor descriptors."""
    device = problem.tensors["query"].device
    if device.type != "cuda" or not architecture(device_name(device)).tma:
        return False
    for name in names:
        tensor, axes = problem.tensors[name], problem.axes_of(name)
        size = tensor.element_size()
        steps = [tensor.stride(problem.dims[name][a]) * size for a in axes]
        steps.append(tensor.stride(-2) * size)
        if len(axes) > 3 or tensor.stride(-1) != 1 or tensor.data_ptr() % 16 or any(
                step % 16 or not 0 < step < 1 << 40 for step in steps):
            return False
    return True


def described(problem: Problem, name: str, rows: int) -> Any:
    """A tensor descriptor of the leading axes along which a tensor varies, rows and channels."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    tensor, axes = problem.tensors[name], problem.axes_of(name)
    places = [problem.dims[name][a] for a in axes] + [-2, -1]
    return TensorDescriptor(
        tensor, [tensor.shape[p] for p in places], [tensor.stride(p) for p in places],
        [*[1] * len(axes), rows, padded(tensor.shape[-1])])


def launch(source: Source, name: str, problem: Problem, more: Mapping[str, Tensor],
           fixed: Mapping[str, Any], tile: Tile, programs: int,
           descriptors: Mapping[str, int] | None = None) -> None:
    """Start a kernel. Raises KernelError where it does not compile, or not fit the device.

    descriptors: rows of a block of what TMA reads; by default those of a forward kernel
    """
    arguments = []
    blocks = descriptors if descriptors is not None else {"key": tile.keys, "value": tile.keys}
    for argument in source.arguments[name]:
        if fixed["TMA"] and argument.kind == "pointer" and argument.name in blocks:
            arguments.append(described(problem, argument.name, blocks[argument.name]))
        else:
            arguments.append(problem.value_of(argument, more))
    chosen = {c: fixed[c] for c in source.constants[name]}
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    start(kernel(source, name), programs, arguments, chosen | options,
          problem.tensors["query"].device)


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


# -- lists of tiles -----------------------------------------------------------------------------
Lists = tuple[tuple[str, ...], dict[str, Tensor]]


def with_lists(signature: Signature, lists: Lists | None) -> Signature:
    return signature if lists is None else dataclasses.replace(signature, lists=lists[0])


def tiles_of(spec: Spec, problem: Problem, tile: Tile, by: str) -> Lists | None:
    """(leading axes along which they vary, lists of tiles); None where an interval rule serves.

    by: "q" for the key tiles of each query tile, "k" for the query tiles of each key tile
    """
    if interval(spec).exact:
        return None
    queries, keys = problem.sizes["q"], problem.sizes["k"]
    if math.ceil(queries / tile.rows) * math.ceil(keys / tile.keys) > _MOST_TILES:
        return None
    device = problem.tensors["query"].device
    return _lists(spec, queries, keys, tile.rows, tile.keys, problem.leading,
                  problem.signature.axes, by, str(device))


@functools.lru_cache(maxsize=256)
def _lists(spec: Spec, queries: int, keys: int, rows: int, columns: int, leading: tuple[int, ...],
           axes: tuple[str, ...], by: str, device: str) -> Lists | None:
    # Along axes that the static part of the mask does not name, one list serves all.
    named = spec.mask.predicate().indices
    lengths = tuple(n if a in named else 1 for a, n in zip(axes, leading, strict=True))
    with torch.inference_mode(False):
        states = tile_states(spec.mask.predicate(), queries, keys, rows, columns, lengths,
                             missing=True)
        if bool((states == 1).all()):
            return None
        # Beyond the end a tile has places that are not keys (or queries): it needs its mask.
        edge = states[..., -1] if keys % columns else states[..., :0]
        edge[edge == 2] = 1
        if by == "k":
            edge = states[..., -1, :] if queries % rows else states[..., :0, :0]
            edge[edge == 2] = 1
            states = states.transpose(-1, -2).contiguous()
        found = tile_lists(states)
        vary = tuple(a for a, n in zip(axes, states.shape[:-2], strict=True) if n > 1)
        return vary, {"starts": found.starts.to(device).contiguous(),
                      "partial": found.partial.to(device).contiguous(),
                      "tiles": found.tiles.to(device).contiguous()}
