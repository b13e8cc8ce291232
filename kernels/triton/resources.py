"""What a kernel takes of a device, found by compiling it ahead of time; no GPU is needed.

    compile_for(source, name, target, ...)   -> Resources: registers, spills, shared memory, code
    forward_resources(spec, tile, target)    of a forward kernel with plain contiguous tensors

The compilers come with triton: ptxas and cuobjdump for NVIDIA, LLVM for AMD. STACK is where spilled
registers show on NVIDIA; LOCAL stays 0 even then.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnopt.errors import KernelError
from attnopt.ir.expr import BOOL, INT
from attnopt.ir.spec import Spec, leading_axes
from attnopt.ir.tiling import GridTile
from attnopt.kernels.triton.backward import backward
from attnopt.kernels.triton.boxes import Boxes, constants
from attnopt.kernels.triton.layout import Argument, Signature, Source
from attnopt.kernels.triton.loading import kernel
from attnopt.kernels.triton.scores import BY_CHANNEL
from attnopt.kernels.triton.template import forward
from attnopt.kernels.triton.tiles import Tile, architecture, options, padded

#: targets that the portable template is made for
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
_TYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Resources:
    """registers: of a thread; spills: bytes of a thread's stack (of spilled vector registers on
    AMD, their number); shared: bytes of a program; code: instructions; matrix: tensor-core
    instructions of the target's own generation, older: of an earlier one; tma: loads through tensor
    descriptors; asynchronous: other asynchronous copies.
    """

    registers: int
    spills: int
    shared: int
    code: int
    matrix: int
    older: int
    tma: int
    asynchronous: int

    @property
    def as_dict(self) -> dict[str, int]:
        return dataclasses.asdict(self)


def forward_resources(spec: Spec, tile: Tile, target: str, head_dim: int = 128,
                      value_dim: int | None = None, dtype: str = "bfloat16", lse: bool = False,
                      ragged: bool = False, lists: tuple[str, ...] | None = None,
                      boxes: Boxes | None = None) -> Resources:
    """Of the forward kernel of a Spec on contiguous (B, H, N, D) tensors.

    target: a name of `tiles.ARCHITECTURES`; lists: axes along which lists of tiles vary, None for
    none; boxes: of queries and keys. Raises KernelError where it does not compile.
    """
    source = forward(spec, dataclasses.replace(_signature(lists, boxes), lse=lse))
    value_dim = head_dim if value_dim is None else value_dim
    fixed = {"TMA": architecture(target).tma, "BM": tile.rows, "BN": tile.keys,
             "STAGES": tile.stages, "D": head_dim, "DP": padded(head_dim), "V": value_dim,
             "VP": padded(value_dim), "PRECISION": exactness(dtype, target), "RAGGED": ragged,
             **(constants(boxes) if boxes else {})}
    fixed |= _ranks(source, "forward")
    key, value = (_block(tile.keys, boxes and boxes[1], width) for width in (head_dim, value_dim))
    return compile_for(source, "forward", target, fixed, tile, dtype, spec,
                       {"key": key, "value": value})


def _signature(lists: tuple[str, ...] | None, boxes: Boxes | None) -> Signature:
    axes = leading_axes(2)
    return Signature(axes, axes, axes, axes, lists=lists,
                     grid=len(boxes[0].shape) if boxes else 0)


def _ranks(source: Source, name: str) -> dict[str, int]:
    """Widths of factors: as few columns as a product of matrices has."""
    return {c: 16 for c in source.constants[name] if re.fullmatch(r"R\d+P?", c)}


def _block(tokens: int, box: GridTile | None, width: int) -> tuple[int, ...]:
    """The shape of what a tensor descriptor reads at a time."""
    return (1, *box.shape, padded(width)) if box else (1, 1, tokens, padded(width))


def backward_resources(spec: Spec, kind: str, tile: Tile, target: str, head_dim: int = 128,
                       value_dim: int | None = None, dtype: str = "bfloat16",
                       wanted: tuple[str, ...] = (), lists: tuple[str, ...] | None = None,
                       boxes: Boxes | None = None) -> Resources:
    """Of the backward kernel `kind`: grad_query, grad_key, row_dots or grad_<operand>."""
    signature = _signature(lists, boxes)
    source = backward(spec, signature, signature, wanted)
    value_dim = head_dim if value_dim is None else value_dim
    fixed = {"TMA": architecture(target).tma and kind in ("grad_query", "grad_key"),
             "BM": tile.rows, "BN": tile.keys, "STAGES": tile.stages, "D": head_dim,
             "DP": padded(head_dim), "V": value_dim, "VP": padded(value_dim),
             "PRECISION": exactness(dtype, target), "RAGGED": False,
             **_ranks(source, kind), **(constants(boxes) if boxes else {})}
    rows, keys = boxes or (None, None)
    blocks = ({"key": _block(tile.keys, keys, head_dim),
               "value": _block(tile.keys, keys, value_dim)} if kind == "grad_query" else
              {"query": _block(tile.rows, rows, head_dim),
               "grad": _block(tile.rows, rows, value_dim)})
    return compile_for(source, kind, target, fixed, tile, dtype, spec, blocks)


def compile_for(source: Source, name: str, target: str, fixed: Mapping[str, Any], tile: Tile,
                dtype: str, spec: Spec, blocks: Mapping[str, tuple[int, ...]]) -> Resources:
    """Compile one kernel.

    fixed: its constexpr parameters; dtype: of query, key, value and float operands
    blocks: by name the shape of what TMA reads at a time
    """
    function = kernel(source, name)
    kinds = {o.slot: o.dtype for o in spec.operands}
    whole = FLOAT32 | {f"grad_{a.of.removeprefix('copies_')}" for a in source.arguments[name]
                       if a.of.startswith("copies_")}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    values: dict[tuple[int], Any] = {}
    for i, argument in enumerate(source.arguments[name]):
        text = _type(argument, dtype, kinds, whole)
        if fixed["TMA"] and argument.kind == "pointer" and argument.name in blocks:
            shape = ", ".join(map(str, blocks[argument.name]))
            signature[argument.name] = f"tensordesc<{_TYPES[dtype]}[{shape}]>"
            continue
        if argument.kind == "stride" and argument.axis in ("d", "r") or (
                argument.kind == "stride" and argument.of in kinds and argument.axis == "k"):
            # The launcher of triton makes a stride of 1 a constant, too.
            signature[argument.name] = "constexpr"
            values[(i,)] = 1
            continue
        signature[argument.name] = text
        if argument.kind in ("pointer", "list", "stride") or argument.axis in ("q", "k"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    for constant in source.constants[name]:
        values[(len(signature),)] = fixed[constant]
        signature[constant] = "constexpr"
    more = options(tile, target, spec.score in BY_CHANNEL)
    return measured(build(function, signature, values, attributes, target, more.pop("num_warps"),
                          more.pop("num_stages"), **more), target)


def build(function: Any, signature: Mapping[str, str], values: Mapping[tuple[int], Any],
          attributes: Mapping[tuple[int], Any], target: str, warps: int, stages: int,
          **options: Any) -> Any:
    """A kernel compiled for a target. Raises KernelError where it does not compile.

    signature: the type of each argument; values: of constants, and attributes, by place
    """
    import triton
    from triton.compiler import ASTSource

    try:
        return triton.compile(
            ASTSource(function, signature=dict(signature), constexprs=dict(values),
                      attrs=dict(attributes)), target=gpu_target(target),
            options={"num_warps": warps, "num_stages": stages, **options})
    except Exception as error:
        raise KernelError(f"{function.__name__} must compile for {target}, got "
                          f"{type(error).__name__}: {error}") from error


def measured(compiled: Any, target: str) -> Resources:
    """What a compiled kernel takes."""
    return _amd(compiled) if target.startswith("gfx") else _nvidia(compiled, target)


def exactness(dtype: str, target: str) -> str:
    """How products are computed unless the user asks for less; see `launch.precision`."""
    return "tf32x3" if dtype == "float32" and target.startswith("sm_") else "ieee"


def gpu_target(name: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if name.startswith("gfx"):
        return GPUTarget("hip", name, 64)
    return GPUTarget("cuda", int(name[3:]), 32)


def _type(argument: Argument, dtype: str, kinds: Mapping[str, str], whole: frozenset[str]) -> str:
    if argument.kind == "list":
        return "*i32"
    if argument.kind == "number":
        return "fp32"
    if argument.kind != "pointer":
        return "i32"
    if argument.of in kinds:
        return {BOOL: "*u8", INT: "*i32"}.get(kinds[argument.of], f"*{_TYPES[dtype]}")
    return "*fp32" if argument.of in whole else f"*{_TYPES[dtype]}"


#: what the kernels keep in float32 whatever the inputs are
FLOAT32 = frozenset(("lse", "delta"))


def _nvidia(compiled: Any, target: str) -> Resources:
    usage, code = _inspect(compiled.asm["cubin"])
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise KernelError(f"cuobjdump must report registers, got {usage[:200]!r}")
    ptx = compiled.asm["ptx"]
    products = {name: len(re.findall(rf"\b{name}", ptx))
                for name in ("wgmma.mma_async", "tcgen05.mma", "mma.sync")}
    native = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}.get(target, "mma.sync")
    return Resources(
        registers=int(found[1]), spills=int(found[2]), shared=compiled.metadata.shared,
        code=len(re.findall(r"^\s+(?:/\*[0-9a-f]+\*/\s+)?@?!?[A-Z].*;", code, re.M)),
        matrix=products[native], older=sum(products.values()) - products[native],
        tma=len(re.findall(r"cp\.async\.bulk\.tensor", ptx)),
        asynchronous=len(re.findall(r"cp\.async\.c[ag]", ptx)))


def _inspect(cubin: bytes) -> tuple[str, str]:
    """(resource usage, disassembly) of a compiled kernel."""
    tools = _tools()
    with tempfile.TemporaryDirectory(prefix="attnopt-") as folder:
        path = os.path.join(folder, "kernel.cubin")
        Path(path).write_bytes(cubin)
        usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", path],
                               capture_output=True, text=True, check=False)
        code = subprocess.run([tools / "nvdisasm", "-c", path],
                              capture_output=True, text=True, check=False)
    return usage.stdout, code.stdout


@functools.cache
def _tools() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def _amd(compiled: Any) -> Resources:
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", text)
        return int(found[1]) if found else 0

    return Resources(
        registers=number("vgpr_count"), spills=number("vgpr_spill_count"),
        shared=compiled.metadata.shared,
        code=len(re.findall(r"^\s+[sv]_\w+|^\s+(?:ds|global|buffer|flat)_\w+", text, re.M)),
        matrix=len(re.findall(r"v_mfma", text)), older=0, tma=0,
        asynchronous=len(re.findall(r"buffer_load_\w+.* lds", text)))
