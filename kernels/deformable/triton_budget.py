"""What the Triton kernels of deformable attention take, as recorded in triton_budget.json.

Compiled ahead of time, no GPU is needed. As for `attnopt.kernels.triton.budget`, the record shows
where a change makes a kernel larger. `python -m attnopt.kernels.deformable.triton_budget` records
it anew.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from attnopt.kernels.deformable.sampling import Sampling
from attnopt.kernels.deformable.triton_blocks import Block, block, width
from attnopt.kernels.deformable.triton_gather import NAMES, options
from attnopt.kernels.deformable.triton_text import source
from attnopt.kernels.deformable.triton_walk import Form
from attnopt.kernels.triton import budget
from attnopt.kernels.triton.loading import kernel
from attnopt.kernels.triton.resources import TARGETS, Resources, build, measured

PATH = Path(__file__).with_name("triton_budget.json")
_TYPES = {"float32": "*fp32", "float16": "*fp16", "bfloat16": "*bf16"}
_SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
#: rows of a call that fills any device
_MANY = 1 << 20
#: name: (sampling, with a depth)
SAMPLINGS = {
    "plain": (Sampling((4,) * 4), False),
    "depth": (Sampling((8,) * 4), True),
    "border": (Sampling((4,), 2, "linear", "border", True, "signed"), False),
    "volume": (Sampling((4,), 3), False)}
#: name: (target, sampling, backward, dtype of value, channels)
CONFIGS = {
    f"{target} {'backward' if backward else 'forward'} {name} {dtype} {channels}":
        (target, name, backward, dtype, channels)
    for target in TARGETS for name in SAMPLINGS for backward in (False, True)
    for dtype, channels in (("bfloat16", 32), ("float32", 32), ("bfloat16", 64))
    if name in ("plain", "depth") or (dtype, channels) == ("bfloat16", 32)}


@dataclass(frozen=True)
class Found:
    """resources: of the kernel; wide: loads of 16 or 8 bytes of a thread; vectors: atomic additions
    of four numbers; single: of one; barriers: of a program."""

    resources: Resources
    wide: int
    vectors: int
    single: int
    barriers: int

    @property
    def as_dict(self) -> dict[str, int]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)[1:]}
        kept = ("registers", "spills", "shared", "code")
        return {name: getattr(self.resources, name) for name in kept} | own


def measure(name: str) -> Found:
    """Compile one configuration of CONFIGS. Raises KernelError where it does not compile."""
    target, text, backward, dtype, channels = CONFIGS[name]
    sampling, depth = SAMPLINGS[text]
    wanted = NAMES[:3 + depth] if backward else ()
    return found(Form.of(sampling, depth, False, wanted), target, dtype, channels)


def found(form: Form, target: str, dtype: str = "bfloat16", channels: int = 32,
          own: Block | None = None) -> Found:
    """Of the kernel of a Form on contiguous tensors, locations, weights and depth in float32.

    own: the block of a program in place of that of a call that fills the device
    """
    own = own or block(target, _MANY, 8, channels, _SIZES[dtype], backward=bool(form.wanted),
                       together="depth" in form.wanted)
    made, name = source(form), "backward" if form.wanted else "forward"
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for i, argument in enumerate(made.arguments[name]):
        if argument.name == "depth_heads":  # the launcher makes a number 1 a constant, too
            signature[argument.name], values[(i,)] = "constexpr", 1
            continue
        signature[argument.name] = {"pointer": _pointer(argument.name, dtype),
                                    "list": "*i32"}.get(argument.kind, "i32")
        if argument.kind in ("pointer", "list") or argument.name in ("points", "layers"):
            attributes[(i,)] = [["tt.divisibility", 16]]
    fixed = {"QUERIES": own.queries, "HEADS": own.heads, "C": channels, "PADDED": width(channels),
             "UNIT": 16}
    for constant in made.constants[name]:
        values[(len(signature),)] = fixed[constant]
        signature[constant] = "constexpr"
    more = options(form, channels, target)
    compiled = build(kernel(made, name), signature, values, attributes, target, own.warps,
                     more.pop("num_stages"), **more)
    return _counted(compiled, measured(compiled, target))


def _pointer(name: str, dtype: str) -> str:
    return _TYPES[dtype] if name in ("value", "out", "grad_out") else "*fp32"


def _counted(compiled: Any, resources: Resources) -> Found:
    text = compiled.asm.get("ptx") or compiled.asm["amdgcn"]

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    if "ptx" in compiled.asm:
        return Found(resources, count(r"ld\.global\.v[248]\.b(?:32|64)"),
                     count(r"atom\.global\.[\w.]*add\.v4\.f32"),
                     count(r"atom\.global\.[\w.]*add\.f32"), count(r"bar\.sync"))
    return Found(resources, count(r"(?:global|buffer)_load_dwordx[24]"), 0,
                 count(r"(?:global|buffer)_atomic_add_f32"), count(r"s_barrier"))


@cache
def recorded() -> dict[str, dict[str, int]]:
    """The record by configuration."""
    return budget.read(PATH)[1]


@cache
def version() -> str:
    """The triton that the record was made with."""
    return budget.read(PATH)[0]


if __name__ == "__main__":
    budget.write(PATH, {name: measure(name).as_dict for name in CONFIGS})
