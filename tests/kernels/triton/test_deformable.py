"""What can be known of the compiled kernels of deformable attention without a GPU: they fit, do not
spill, read and add in vectors where the target can, and have not grown. And which blocks they get.
"""

from __future__ import annotations

import ast

import pytest
import torch

triton = pytest.importorskip("triton")

from attnopt.kernels.deformable import Sampling, triton_gather  # noqa: E402
from attnopt.kernels.deformable.triton_blocks import Block, block, width  # noqa: E402
from attnopt.kernels.deformable.triton_budget import (  # noqa: E402
    CONFIGS,
    SAMPLINGS,
    found,
    measure,
    recorded,
    version,
)
from attnopt.kernels.deformable.triton_text import source  # noqa: E402
from attnopt.kernels.deformable.triton_walk import Form  # noqa: E402
from attnopt.kernels.triton.budget import SLACK  # noqa: E402
from attnopt.kernels.triton.resources import TARGETS  # noqa: E402
from attnopt.kernels.triton.tiles import ARCHITECTURES, architecture  # noqa: E402

NAMES = triton_gather.NAMES
QUICK = ("sm_90 forward plain bfloat16 32", "sm_90 backward plain bfloat16 32")


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS])
def test_budget(name: str) -> None:
    target, text, backward, _, _ = CONFIGS[name]
    sampling, depth = SAMPLINGS[text]
    made, known = measure(name), recorded()[name]
    corners = 2 ** sampling.axes
    assert made.resources.spills == 0 and made.resources.shared == 0 and made.barriers == 0
    assert made.wide >= corners, "each corner is a load of 16 bytes, or 8"
    adds = corners if backward else 0
    layers = 2 * corners if backward and depth else 0
    if architecture(target).capability >= 90:
        assert (made.vectors, made.single) == (adds, layers)
    else:
        assert (made.vectors, made.single) == (0, 4 * adds + layers)
    if version() != triton.__version__:
        pytest.skip(f"the record is of triton {version()}")
    for what, number in made.as_dict.items():
        assert number <= known[what] * (1 + SLACK), (
            f"{what} must be at most {known[what]} + {SLACK:.0%}, got {number}")


def test_record_is_of_these_configurations() -> None:
    assert set(recorded()) == set(CONFIGS)


#: (sampling, depth, 64-bit offsets, gradients, dtype, channels)
FORMS = [
    (Sampling((4,), 1, not_finite="nan"), False, False, (), "bfloat16", 24),
    (Sampling((4,), 2, "nearest"), True, True, (), "float32", 24),
    (Sampling((4,), 2, "nearest", "border"), True, False, (), "float32", 5),
    (Sampling((4,), 2, "nearest", "border"), False, False, ("value", "weights"), "bfloat16", 5),
    (Sampling((4,), 2, not_finite="nan"), True, True, (), "bfloat16", 32),
    (Sampling((4,), 2, not_finite="nan"), True, True, NAMES, "float32", 8),
    (Sampling((4,), 3, padding="border"), True, True, (), "float32", 4),
    (Sampling((4,), 3, range="texels"), True, False, NAMES, "bfloat16", 32),
    (Sampling((4,), 2, align_corners=True), False, False, (), "bfloat16", 1024),
    (Sampling((4,), 2, range="signed"), False, False, NAMES[:3], "bfloat16", 1024),
    (Sampling((4,), 2), True, False, ("locations",), "float32", 256),
    (Sampling((4,), 2, padding="reflection"), True, True, NAMES, "bfloat16", 32),
    (Sampling((4,), 3, padding="reflection", align_corners=True), False, False, NAMES[:3],
     "float32", 32),
    (Sampling((4,), 1), False, False, ("value",), "bfloat16", 1)]


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sampling, depth, wide, wanted, dtype, channels", FORMS)
def test_other_forms(sampling: Sampling, depth: bool, wide: bool, wanted: tuple[str, ...],
                     dtype: str, channels: int, target: str) -> None:
    made = found(Form.of(sampling, depth, wide, wanted), target, dtype, channels)
    assert made.resources.spills == 0
    assert made.resources.shared <= architecture(target).shared


def test_text_is_readable_python() -> None:
    for sampling, depth, wide, wanted, _, _ in FORMS:
        form = Form.of(sampling, depth, wide, wanted)
        made = source(form)
        (name,) = made.arguments
        functions = {f.name: f for f in ast.parse(made.text).body if isinstance(f, ast.FunctionDef)}
        assert [a.arg for a in functions[name].args.args] == [
            *(a.name for a in made.arguments[name]), *made.constants[name]]
        assert max(map(len, made.text.splitlines())) <= 100
        assert ("atomic_add" in made.text) == bool({"value", "depth"} & set(wanted))
        assert source(form) is made


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks(arch: str) -> None:
    wave = architecture(arch).wave
    for channels in (1, 4, 5, 32, 64, 100, 256, 1024):
        for itemsize in (2, 4):
            for backward, together in ((False, False), (True, False), (True, True)):
                for rows, heads in ((8, 8), (2400, 8), (1 << 20, 3)):
                    own = block(arch, rows, heads, channels, itemsize, backward=backward,
                                together=together, processors=132)
                    count = own.queries * own.heads
                    assert count & (count - 1) == 0 and own.heads & (own.heads - 1) == 0
                    held = count * width(channels) / (own.warps * wave)
                    assert held >= 1 and (count == 1 or held in (4, 8))
                    assert own.heads == 1 or together and own.heads < 2 * heads


def test_blocks_of_typical_calls() -> None:
    many, few = 8400 * 8, 300 * 8
    assert block("sm_90", many, 8, 32, 2, processors=132) == Block(32, 1, 4)
    assert block("sm_90", many, 8, 32, 4, processors=132) == Block(16, 1, 4)
    assert block("sm_90", few, 8, 32, 2, processors=132) == Block(8, 1, 1)
    assert block("sm_90", many, 8, 32, 2, backward=True, processors=132) == Block(4, 1, 1)
    assert block("sm_90", many, 8, 32, 2, backward=True, together=True,
                 processors=132) == Block(1, 4, 1)


def test_declined_on_a_cpu_that_does_not_interpret() -> None:
    value, at = torch.randn(1, 4, 1, 8), torch.rand(1, 2, 1, 1, 2)
    assert triton_gather.gather(Sampling((1,)), value, at, at[..., 0], None, (2, 2)) is None
