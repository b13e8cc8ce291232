"""bf16 products by pairs (`kernels/cpp/pairs.h`), on CPUs without the instruction by its emulation:
the same packing and the same loops, each dot product of a pair as two multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.spec import Spec
from attnopt.kernels import cpp, reference
from attnopt.kernels.cpp.isa import AVX512, isas
from attnopt.kernels.cpp.toolchain import toolchain
from tests.kernels.cases import CASES, close, doubled, inputs, operands_of
from tests.kernels.cpp.test_forward import SPECS, given_for

EMULATED = replace(AVX512, flags=(*AVX512.flags, "-DEMULATE_PAIRS"))
pytestmark = [
    pytest.mark.skipif(bool(toolchain().why_not()), reason=toolchain().why_not()),
    pytest.mark.skipif(isas()[0].width < AVX512.width, reason="no AVX-512 here")]
TARGETS = [EMULATED, *(i for i in isas() if i.bf16)]


def check(spec: Spec, given: Sequence[torch.Tensor], operands: Sequence[torch.Tensor],
          tile: Sequence[int] = (48, 64, 6, 4)) -> None:
    exact = reference(spec)(*doubled(given), doubled(operands))
    plain = reference(spec)(*given, operands).to(torch.bfloat16)
    for target in TARGETS:
        found = cpp.Attention(spec, tile, target)(*given, operands)
        assert found is not None, "the kernel must take the call"
        close(found, exact, plain)


@pytest.mark.parametrize("dim", [1, 2, 7, 64, pytest.param(33, marks=pytest.mark.slow),
                                 pytest.param(128, marks=pytest.mark.slow)])
def test_head_dims(dim: int) -> None:
    spec = SPECS["plain"]
    for queries, keys, value_dim in ((70, 131, dim), (1, 1, dim), (33, 65, max(1, dim // 2 + 3))):
        check(spec, *given_for(spec, 1, 2, queries, keys, dim, value_dim, torch.bfloat16))


@pytest.mark.parametrize("name", ["softcap, causal", "window", "padding", "documents"])
def test_masks_and_lengths(name: str) -> None:
    spec = SPECS[name]
    for queries, keys in ((1, 1), (2, 3), (17, 15), (49, 63), (129, 1), (200, 257)):
        check(spec, *given_for(spec, 2, 2, queries, keys, 16, 16, torch.bfloat16))


def test_strides_and_tiles() -> None:
    spec = SPECS["plain"]
    for tile in ((16, 32, 4, 1), (96, 128, 6, 4), (7, 16, 7, 1)):
        given, operands = given_for(spec, 2, 2, 101, 203, 40, 72, torch.bfloat16)
        turned = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in given]
        check(spec, turned, operands, tile)


def test_scale_is_not_rounded() -> None:
    """Queries go in as they are: a scale that bf16 does not hold is applied to the scores."""
    spec = Spec(logits=E.score * 0.3337)
    check(spec, *given_for(spec, 1, 1, 48, 64, 64, 64, torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if not cpp.spec_reasons(CASES[c])])
def test_every_case(case: str) -> None:
    check(CASES[case], [x.to(torch.bfloat16) for x in inputs()], operands_of(CASES[case]),
          (12, 32, 6, 2))
