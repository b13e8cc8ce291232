"""The grid of `cases.py` on a real device: forward, gradients, layouts, lengths that matter."""

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.spec import Spec
from attnopt.kernels.reference import reference
from attnopt.kernels.triton import backward, bind
from attnopt.kernels.triton.launch import device_name
from attnopt.kernels.triton.tiles import Tile, candidates, default
from tests.kernels.triton.cases import CASES, Shape, check_forward, check_gradients

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEARNED = [name for name, spec in CASES.items() if not backward.reasons(spec) and
           backward.kinds(spec, frozenset(o.slot for o in spec.operands if o.dtype == E.FLOAT), ())
           is not None]


def tile_of(shape: Shape, dtype: torch.dtype) -> Tile:

    return default(device_name(torch.device("cuda", 0)), shape.head_dim, shape.value_dim,
                   dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_case(name: str, dtype: torch.dtype) -> None:
    spec = CASES[name]
    shape = Shape(2, 3, 300, 300 if E.value in spec.output.leaves else 270, 64, 64)
    check_forward(spec, shape.inputs(dtype, "cuda"), shape.operands(spec, dtype, "cuda"),
                  tile_of(shape, dtype))


@pytest.mark.parametrize("descriptors", (None, False))
@pytest.mark.parametrize("head_dim, value_dim", (
    (1, 1), (16, 16), (40, 72), (80, 80), (96, 64), (128, 128), (192, 128), (256, 256)))
def test_head_dims(head_dim: int, value_dim: int, descriptors: bool | None) -> None:
    shape = Shape(1, 2, 200, 333, head_dim, value_dim)
    check_forward(CASES["causal"], shape.inputs(torch.bfloat16, "cuda"),
                  tile=tile_of(shape, torch.bfloat16), descriptors=descriptors)


@pytest.mark.parametrize("queries, keys", ((1, 1), (1, 4097), (63, 65), (1024, 1024), (2049, 4097)))
@pytest.mark.parametrize("name", ("plain", "causal", "wide band", "globals", "per head"))
def test_lengths(name: str, queries: int, keys: int) -> None:
    spec, shape = CASES[name].with_(empty_row="zero"), Shape(1, 3, queries, keys, 64, 64)
    check_forward(spec, shape.inputs(torch.bfloat16, "cuda"), tile=tile_of(shape, torch.bfloat16))


def test_every_legal_tile() -> None:

    shape = Shape(1, 2, 300, 260, 64, 64)
    inputs = shape.inputs(torch.bfloat16, "cuda")
    for tile in candidates(device_name(torch.device("cuda", 0)), 64, 64)[:24]:
        check_forward(CASES["wide band"], inputs, tile=tile)


def test_layouts() -> None:
    packed = torch.randn(2, 200, 3, 3, 64, device="cuda").bfloat16().permute(3, 0, 2, 1, 4)
    shape = Shape(head_dim=64, value_dim=64)
    check_forward(CASES["causal"], list(packed), tile=tile_of(shape, torch.bfloat16))
    shared = Shape(2, 8, 300, 300, 64, 64, key_heads=1)
    check_forward(CASES["causal"], shared.inputs(torch.bfloat16, "cuda"),
                  tile=tile_of(shape, torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LEARNED)
def test_gradients(name: str, dtype: torch.dtype) -> None:
    spec = CASES[name].with_(empty_row="zero")
    shape = Shape(2, 3, 150, 150 if E.value in spec.output.leaves else 140, 64, 64)
    check_gradients(spec, shape.inputs(dtype, "cuda"), shape.operands(spec, dtype, "cuda"),
                    tile=None)


@pytest.mark.parametrize("head_dim", (40, 128, 256))
def test_gradients_of_head_dims(head_dim: int) -> None:
    shape = Shape(1, 4, 200, 260, head_dim, head_dim, key_heads=1)
    check_gradients(CASES["causal"].with_(empty_row="zero"), shape.inputs(torch.bfloat16, "cuda"),
                    tile=None)


def test_bound_text_runs_under_autocast() -> None:
    spec = Spec(logits=E.score * 0.125)
    inputs = [torch.randn(2, 4, 128, 64, device="cuda") for _ in range(3)]
    with torch.autocast("cuda", torch.bfloat16):
        found = bind(str(spec))(*inputs)
    assert found.dtype == torch.bfloat16
    exact = reference(spec)(*(t.double() for t in inputs))
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)
