"""The grid of `cases.py` on a real device: forward, gradients, layouts, lengths that matter."""

import math

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import KeyKeep, Mask, Neighborhood, Windows
from attnopt.ir.spec import Operand, Spec
from attnopt.ir.tiling import tilings_of
from attnopt.kernels.reference import reference
from attnopt.kernels.triton import Attention, backward, bind, lists
from attnopt.kernels.triton.boxes import part_on_grid
from attnopt.kernels.triton.launch import device_name
from attnopt.kernels.triton.tiles import Tile, candidates, default
from tests.kernels.triton.cases import CASES, Shape, check_forward, check_gradients

pytestmark = pytest.mark.gpu
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEARNED = [name for name, spec in CASES.items() if not backward.reasons(spec) and
           backward.kinds(spec, frozenset(o.slot for o in spec.operands if o.dtype == E.FLOAT), ())
           is not None]


def tile_of(shape: Shape, dtype: torch.dtype, listed: bool = False) -> Tile:
    return default(device_name(torch.device("cuda", 0)), shape.head_dim, shape.value_dim,
                   dtype.itemsize, listed)


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


# -- lists that operands decide, and boxes of grids ------------------------------------------------
def padding(batch: int, tokens: int) -> torch.Tensor:
    lengths = torch.linspace(tokens // 3, tokens, batch).long()
    return (torch.arange(tokens) < lengths[:, None])[:, None, None, :].cuda()


@pytest.fixture
def listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small calls make their lists from operands, too."""
    monkeypatch.setattr(lists, "_WORTH", 0)


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("name, dtype", (
    *(("segments", dtype) for dtype in DTYPES), ("block map", torch.bfloat16),
    ("lifetime", torch.bfloat16), ("padding and causal", torch.bfloat16),
    ("nan where nothing is kept", torch.bfloat16)), ids=str)
def test_lists_from_operands(name: str, dtype: torch.dtype) -> None:
    spec, shape = CASES[name], Shape(2, 3, 700, 650, 64, 64)
    check_forward(spec, shape.inputs(dtype, "cuda"), shape.operands(spec, dtype, "cuda"),
                  tile_of(shape, dtype, listed=True))


@pytest.mark.usefixtures("listed")
def test_hidden_tiles_are_not_read() -> None:
    spec = CASES["zero where nothing is kept"]
    query, key, value = Shape(2, 2, 500, 1024, 64, 64).inputs(torch.bfloat16, "cuda")
    pad = padding(2, 1024)
    exact = reference(spec)(*(t.cpu().double() for t in (query, key, value)), [pad.cpu()])
    key[0, :, 512:], value[0, :, 512:] = torch.nan, torch.nan
    found = Attention(spec)(query, key, value, [pad])
    assert found is not None
    torch.testing.assert_close(found.cpu().double(), exact, rtol=2e-2, atol=2e-2)


@pytest.mark.usefixtures("listed")
def test_a_graph_reads_its_masks_at_every_replay() -> None:
    spec = CASES["zero where nothing is kept"]
    attention, inputs = Attention(spec), Shape(2, 2, 512, 512, 64, 64).inputs(
        torch.bfloat16, "cuda")
    pad = padding(2, 512)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            attention(*inputs, [pad])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attention(*inputs, [pad])
    assert found is not None
    for _ in range(3):
        pad.copy_(torch.rand(pad.shape) < 0.3)
        pad[..., 128:384] = False
        graph.replay()
        exact = reference(spec)(*(t.cpu().double() for t in inputs), [pad.cpu()])
        torch.testing.assert_close(found.cpu().double(), exact, rtol=2e-2, atol=2e-2)


GRIDS = (Neighborhood((9, 9), length=(24, 28)), Neighborhood((3, 7, 5), length=(5, 12, 10)),
         Neighborhood((5, 8), (3, 2), (2, 1), (False, True), (20, 31)),
         Neighborhood((2, 5, 5), (1, 2, 5), (1, 1, 2), (True, False, False), (4, 11, 13)),
         Windows((7, 7), length=(28, 28)))


@pytest.mark.parametrize("mask, descriptors, dtype", (
    *((mask, None, torch.bfloat16) for mask in GRIDS),
    *((mask, False, torch.bfloat16) for mask in GRIDS[:2]),
    *((GRIDS[0], None, dtype) for dtype in DTYPES[:2])), ids=str)
def test_boxes(mask: Neighborhood | Windows, descriptors: bool | None, dtype: torch.dtype) -> None:
    tokens = math.prod(n for n in mask.length if n is not None)
    shape = Shape(2, 4, tokens, tokens, 64, 64, key_heads=1)
    tile = tile_of(shape, dtype, listed=True)
    boxes = [t[len(t) // 2] for t in (tilings_of(mask.length, n) for n in (tile.rows, tile.keys))]
    spec = Spec(logits=E.score * 0.125, mask=mask)
    check_forward(spec, shape.inputs(dtype, "cuda"), (), tile, descriptors, (boxes[0], boxes[1]))


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize("mask", (GRIDS[0] & KeyKeep("pad"), GRIDS[1]), ids=str)
def test_gradients_over_lists(mask: Mask) -> None:
    part = part_on_grid(mask)
    tokens = math.prod(part.length) if part is not None else 500
    pad = (Operand("pad", ("b", "k"), E.BOOL, "mask"),) if mask.slots else ()
    spec = Spec(logits=E.score * 0.125, mask=mask, empty_row="zero", operands=pad)
    check_gradients(spec, Shape(2, 2, tokens, tokens, 64, 64).inputs(torch.bfloat16, "cuda"),
                    [padding(2, tokens)][: len(pad)], tile=None)


def test_bound_text_runs_under_autocast() -> None:
    spec = Spec(logits=E.score * 0.125)
    inputs = [torch.randn(2, 4, 128, 64, device="cuda") for _ in range(3)]
    with torch.autocast("cuda", torch.bfloat16):
        found = bind(str(spec))(*inputs)
    assert found.dtype == torch.bfloat16
    exact = reference(spec)(*(t.double() for t in inputs))
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2)
