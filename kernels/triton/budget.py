"""What the default tiles of some typical kernels take, as recorded in budget.json.

The record is checked in: a change of the template, or of triton, that makes a kernel larger shows
as a difference of this file. `python -m attnopt.kernels.triton.budget` records it anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal, KeyKeep, Neighborhood, Segments
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.triton.boxes import boxes_of
from attnopt.kernels.triton.resources import (
    TARGETS,
    Resources,
    backward_resources,
    forward_resources,
)
from attnopt.kernels.triton.scores import BY_CHANNEL, WEIGHT
from attnopt.kernels.triton.tiles import default, gradient_tile

PATH = Path(__file__).with_name("budget.json")
#: growth of registers, shared memory and code that is let through
SLACK = 0.10
_SCALED = E.score * 0.125
_SLOPES = Operand("slopes", ("h",), role="scale")
_PADDING = Operand("padding", ("b", "k"), E.BOOL, "mask")
_BIAS = Operand("bias", ("h", "q", "k"), role="bias")
_IDS = tuple(Operand(name, ("b", axis), E.INT, "mask")
             for name, axis in (("query_ids", "q"), ("key_ids", "k")))
_FACTORS = tuple(Operand(name, ("h", axis), role="factor")
                 for name, axis in (("left", "q"), ("right", "k")))
SPECS = {
    "plain": Spec(logits=_SCALED),
    "causal": Spec(logits=_SCALED, mask=Causal()),
    "bias": Spec(logits=_SCALED + E.load("bias"), operands=(_BIAS,)),
    "softcap": Spec(
        logits=E.call("tanh", E.score * (0.125 / 30)) * 30.0 - E.load("slopes") * E.call(
            "float", E.index("q") - E.index("k")),
        mask=Causal() & KeyKeep("padding"), empty_row="zero", operands=(_SLOPES, _PADDING)),
    "documents": Spec(logits=_SCALED, mask=Segments("query_ids", "key_ids") & Causal(),
                      empty_row="zero", operands=_IDS),
    "image": Spec(logits=_SCALED, mask=Neighborhood((80, 80), length=(256, 256))),
    "video": Spec(logits=_SCALED, mask=Neighborhood((18, 24, 24), length=(30, 48, 80))),
    "low rank": Spec(logits=_SCALED + E.inner("left", "right"), operands=_FACTORS),
    "distance": Spec(score="distance", logits=E.score * -0.125),
    "additive": Spec(score="additive", operands=(Operand(WEIGHT, None, role="score"),)),
}
#: operands whose gradient the backward kernels find, too
WANTED = {"low rank": ("left", "right"), "additive": (WEIGHT,)}
#: of the specs that have lists of tiles, the leading axes along which these vary; and the tokens of
#: a grid, of which the tiles are boxes
LISTS = {"documents": ("b",), "image": (), "video": ()}
TOKENS = {"image": 256 * 256, "video": 30 * 48 * 80}
_OTHERS = ("low rank", "distance", "additive")
#: name: (target, kernel, spec, head_dim)
CONFIGS = {
    f"{target} {kernel} {spec} {width}": (target, kernel, spec, width)
    for target in TARGETS for kernel, specs in (
        ("forward", ("plain", "causal", "bias", "softcap", *LISTS, *_OTHERS)),
        ("grad_query", ("causal", "softcap", "documents", *_OTHERS)),
        ("grad_key", ("causal", "softcap", "documents", *_OTHERS)))
    for spec in specs for width in (64, 128)}


def measure(name: str) -> Resources:
    """Compile one configuration of CONFIGS. Raises KernelError where it does not compile."""
    target, kernel, text, width = CONFIGS[name]
    spec, lists, tokens = SPECS[text], LISTS.get(text), TOKENS.get(text)
    by_channel = spec.score in BY_CHANNEL
    tile = (default(target, width, width, 2, lists is not None, by_channel) if kernel == "forward"
            else gradient_tile(target, width, width, 2, kernel.removeprefix("grad_"), by_channel))
    boxes = boxes_of(spec.mask, tokens, tokens, tile.rows, tile.keys) if tokens else None
    if kernel == "forward":
        return forward_resources(spec, tile, target, width, lists=lists, boxes=boxes)
    return backward_resources(spec, kernel, tile, target, width, wanted=WANTED.get(text, ()),
                              lists=lists, boxes=boxes)


@cache
def recorded() -> dict[str, dict[str, int]]:
    """The record by configuration."""
    return read(PATH)[1]


@cache
def version() -> str:
    """The triton that the record was made with."""
    return read(PATH)[0]


def read(path: Path) -> tuple[str, dict[str, dict[str, int]]]:
    """The triton that a record was made with, and its numbers by configuration."""
    found = json.loads(path.read_text())
    return str(found["triton"]), found["kernels"]


def write(path: Path, numbers: Mapping[str, Mapping[str, int]]) -> None:
    """Store a record."""
    import triton

    lines = [f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in numbers.items()]
    path.write_text('{"triton": "' + triton.__version__ + '", "kernels": {\n'
                    + ",\n".join(lines) + "\n}}\n")


if __name__ == "__main__":
    write(PATH, {name: measure(name).as_dict for name in CONFIGS})
