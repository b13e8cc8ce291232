"""Neighbourhoods mean what NATTEN's own operators compute, on the CPU.

Peer test: it is skipped where natten is not installed. A plain install would fetch a CUDA build of
torch; next to a CPU torch use

    pip install numpy setuptools wheel
    pip install --no-deps --no-build-isolation natten==0.21.7

NATTEN has no float64 on a CPU, so that its float32 is compared with the float64 reference.
"""

from __future__ import annotations

import math

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import Neighborhood
from attnopt.ir.spec import Spec
from attnopt.kernels.reference import reference

natten = pytest.importorskip("natten")

#: length, window, stride, dilation, causal
CASES = [
    ((20,), (7,), (1,), (1,), (False,)),
    ((24,), (6,), (4,), (1,), (False,)),
    ((30,), (5,), (2,), (3,), (False,)),
    ((33,), (8,), (1,), (2,), (True,)),
    ((9, 10), (5, 3), (1, 1), (1, 1), (False, False)),
    ((8, 12), (4, 6), (2, 3), (1, 1), (False, False)),
    ((10, 9), (3, 4), (1, 1), (3, 2), (False, True)),
    ((8, 8), (4, 4), (4, 4), (1, 1), (False, False)),
    ((4, 6, 6), (2, 3, 5), (1, 1, 1), (1, 1, 1), (True, False, False)),
    ((4, 6, 8), (4, 2, 3), (2, 1, 2), (1, 3, 2), (False, False, False)),
]
QUICK = (6,)


def marked() -> list[object]:
    return [c if i in QUICK else pytest.param(*c, marks=pytest.mark.slow)
            for i, c in enumerate(CASES)]


@pytest.mark.parametrize("length,window,stride,dilation,causal", marked())
def test_against_natten(length: tuple[int, ...], window: tuple[int, ...], stride: tuple[int, ...],
                        dilation: tuple[int, ...], causal: tuple[bool, ...]) -> None:
    torch.manual_seed(0)
    heads, dim = 2, 16
    given = [torch.randn(1, *length, heads, dim) for _ in range(3)]
    run = getattr(natten.functional, f"na{len(length)}d")
    with torch.no_grad():
        wanted = run(*given, kernel_size=window, stride=stride, dilation=dilation,
                     is_causal=causal)
    tokens = math.prod(length)
    flat = [x.reshape(1, tokens, heads, dim).transpose(1, 2).double() for x in given]
    spec = Spec(logits=E.score * dim**-0.5,
                mask=Neighborhood(window, stride, dilation, causal, length))
    got = reference(spec)(*flat).transpose(1, 2).reshape(wanted.shape)
    assert torch.allclose(got.float(), wanted, atol=2e-6), (got - wanted).abs().max()
