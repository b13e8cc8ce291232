"""What the default tiles of some typical kernels take, as recorded in budget.json.

The record is checked in: a change of the template, or of triton, that makes a kernel larger shows
as a difference of this file. `python -m attnopt.kernels.triton.budget` records it anew.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal, KeyKeep
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.triton.resources import (
    TARGETS,
    Resources,
    backward_resources,
    forward_resources,
)
from attnopt.kernels.triton.tiles import default, gradient_tile

PATH = Path(__file__).with_name("budget.json")
#: growth of registers, shared memory and code that is let through
SLACK = 0.10
_SCALED = E.score * 0.125
_SLOPES = Operand("slopes", ("h",), role="scale")
_PADDING = Operand("padding", ("b", "k"), E.BOOL, "mask")
_BIAS = Operand("bias", ("h", "q", "k"), role="bias")
SPECS = {
    "plain": Spec(logits=_SCALED),
    "causal": Spec(logits=_SCALED, mask=Causal()),
    "bias": Spec(logits=_SCALED + E.load("bias"), operands=(_BIAS,)),
    "softcap": Spec(
        logits=E.call("tanh", E.score * (0.125 / 30)) * 30.0 - E.load("slopes") * E.call(
            "float", E.index("q") - E.index("k")),
        mask=Causal() & KeyKeep("padding"), empty_row="zero", operands=(_SLOPES, _PADDING)),
}
#: name: (target, kernel, spec, head_dim)
CONFIGS = {
    f"{target} {kernel} {spec} {width}": (target, kernel, spec, width)
    for target in TARGETS for kernel, specs in (
        ("forward", ("plain", "causal", "bias", "softcap")), ("grad_query", ("causal", "softcap")),
        ("grad_key", ("causal", "softcap")))
    for spec in specs for width in (64, 128)}


def measure(name: str) -> Resources:
    """Compile one configuration of CONFIGS. Raises KernelError where it does not compile."""
    target, kernel, spec, width = CONFIGS[name]
    if kernel == "forward":
        return forward_resources(SPECS[spec], default(target, width, width), target, width)
    which = kernel.removeprefix("grad_")
    tile = gradient_tile(target, width, width, 2, which)
    return backward_resources(SPECS[spec], kernel, tile, target, width)


@cache
def recorded() -> dict[str, dict[str, int]]:
    """The record by configuration."""
    found: dict[str, dict[str, int]] = json.loads(PATH.read_text())["kernels"]
    return found


@cache
def version() -> str:
    """The triton that the record was made with."""
    return str(json.loads(PATH.read_text())["triton"])


def record() -> None:
    """Measure all configurations and write the record."""
    import triton

    lines = [f"  {json.dumps(name)}: {json.dumps(measure(name).as_dict)}" for name in CONFIGS]
    PATH.write_text('{"triton": "' + triton.__version__ + '", "kernels": {\n'
                    + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    record()
