"""Lists of tiles that operands decide, and boxes of grids, in the interpreter."""

import math
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import (
    BlockMap,
    Causal,
    KeyKeep,
    KeyLifetime,
    Mask,
    Neighborhood,
    Segments,
    Select,
    Where,
    Windows,
)
from attnopt.ir.spec import Operand, Spec
from attnopt.ir.tiling import GridTile, tilings_of
from attnopt.kernels.reference import reference
from attnopt.kernels.triton.attention import Attention
from attnopt.kernels.triton.boxes import Boxes, boxes_of, part_on_grid
from attnopt.kernels.triton.tiles import Tile
from tests.kernels.cases import close, doubled
from tests.kernels.triton.cases import SCALED, Shape, check_forward, check_gradients

SMALL = Tile(16, 16, 4, 1)
PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
IDS = (Operand("rows", ("b", "q"), E.INT, "mask"), Operand("keys", ("b", "k"), E.INT, "mask"))
DEATH = Operand("death", ("b", "k"), E.INT, "mask")
BLOCKS = Operand("blocks", None, E.BOOL, "mask")
KEEP = Operand("keep", ("b", "q", "k"), E.BOOL, "mask")
DOCUMENTS = Spec(logits=SCALED, mask=Segments("rows", "keys") & Causal(), operands=IDS)
PADDED = Spec(logits=SCALED, mask=KeyKeep("pad"), operands=(PAD,))


def documents(batch: int, tokens: int) -> list[Tensor]:
    ids = torch.stack([torch.randint(0, 5, (tokens,)).sort().values for _ in range(batch)])
    return [ids[:, None, :, None], ids[:, None, None, :]]


def padding(batch: int, tokens: int) -> Tensor:
    lengths = torch.linspace(tokens // 3, tokens, batch).long()
    return (torch.arange(tokens) < lengths[:, None])[:, None, None, :]


def grid(length: Sequence[int], rows: Sequence[int], columns: Sequence[int]) -> Boxes:
    return GridTile(tuple(length), tuple(rows)), GridTile(tuple(length), tuple(columns))


# -- operands -------------------------------------------------------------------------------------
def test_documents() -> None:
    shape = Shape(2, 1, 50, 50)
    check_forward(DOCUMENTS, shape.inputs(torch.float32), documents(2, 50), SMALL)


@pytest.mark.parametrize("empty_row", ("nan", "zero", "uniform"))
def test_hidden_tiles_are_not_read(empty_row: str) -> None:
    """Keys in them are NaN here, which a mask would not take out of a product."""
    pad = padding(2, 48)
    pad[1] = False
    pad[1, ..., 20] = True
    mask = KeyKeep("pad") & Causal(-3) if empty_row != "uniform" else KeyKeep("pad")
    spec = Spec(logits=SCALED, mask=mask, empty_row=empty_row, operands=(PAD,))
    query, key, value = Shape(2, 1, 40, 48).inputs(torch.float32)
    exact = reference(spec)(*doubled((query, key, value)), [pad])
    for tensor in (key, value):
        tensor[0, :, 16:] = torch.nan  # of one tile of 16, the other tiles are hidden
        tensor[1, :, :16], tensor[1, :, 32:] = torch.nan, torch.nan
    found = Attention(spec, SMALL)(query, key, value, [pad])
    assert found is not None
    close(found, exact, exact.float())


def test_values_are_never_remembered() -> None:
    """The second call of a layout has other operands, and the third has them changed in place."""
    attention, inputs = Attention(PADDED, SMALL), Shape(2, 1, 20, 48).inputs(torch.float32)
    pad = padding(2, 48)
    for _ in range(3):
        found = attention(*inputs, [pad])
        exact = reference(PADDED)(*doubled(inputs), [pad])
        assert found is not None and len(attention.known) == 1
        close(found, exact, exact.float())
        pad.copy_(torch.rand(pad.shape) < 0.3)
        pad[..., 5] = True


@pytest.mark.slow
@pytest.mark.parametrize("axes", (("h",), ("b", "h"), ()))
def test_block_maps(axes: tuple[str, ...]) -> None:
    spec = Spec(logits=SCALED, mask=BlockMap("blocks", 16, 8, axes), empty_row="zero",
                operands=(BLOCKS,))
    blocks = torch.rand(*(2 for _ in axes), 3, 6) < 0.3
    inputs = Shape(2, 2, 45, 47).inputs(torch.float32)
    for tile in (SMALL, Tile(32, 16, 4, 1)):
        check_forward(spec, inputs, [blocks], tile)


def test_block_map_of_heads() -> None:
    spec = Spec(logits=SCALED, mask=BlockMap("blocks", 16, 16, ("h",)), empty_row="zero",
                operands=(BLOCKS,))
    blocks = torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 1]]]) > 0
    check_forward(spec, Shape(1, 2, 30, 32).inputs(torch.float32), [blocks], SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("empty_row", ("zero", "nan"))
def test_lifetimes(empty_row: str) -> None:
    spec = Spec(logits=SCALED, mask=KeyLifetime("death"), empty_row=empty_row, operands=(DEATH,))
    death = torch.randint(0, 20, (2, 1, 1, 50)) + torch.arange(50)
    check_forward(spec, Shape(2, 1, 50, 50).inputs(torch.float32), [death], SMALL)
    death[0] = 0
    check_forward(spec, Shape(2, 1, 50, 50).inputs(torch.float32), [death], SMALL)


@pytest.mark.slow
def test_any_mask_of_a_user() -> None:
    keep = torch.rand(2, 1, 40, 44) < 0.3
    keep[0, :, :, 16:32], keep[:, :, 3] = False, False
    for mask in (Where(E.load("keep", dtype=E.BOOL)),
                 Where(E.load("keep", dtype=E.BOOL)) & Causal()):
        spec = Spec(logits=SCALED, mask=mask, operands=(KEEP,))
        check_forward(spec, Shape(2, 1, 40, 44).inputs(torch.float32), [keep], SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    shape = Shape(2, 2, 40, 40, key_heads=1)
    check_forward(DOCUMENTS, shape.inputs(dtype), documents(2, 40), SMALL)
    check_forward(PADDED, shape.inputs(dtype), [padding(2, 40)], SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("queries, keys", ((1, 1), (1, 40), (40, 1), (33, 65)))
def test_lengths(queries: int, keys: int) -> None:
    shape = Shape(3, 1, queries, keys)
    check_forward(PADDED, shape.inputs(torch.float32), [padding(3, keys + 3)[..., 1:-2]], SMALL)


@pytest.mark.slow
def test_statistics_and_edits_over_lists() -> None:
    pad = padding(2, 48)
    for spec in (PADDED.with_(weights=E.weight * E.weight, renormalize=True),
                 PADDED.with_(output=E.out * E.call("float", E.stat("count"))),
                 PADDED.with_(sinks=E.const(0.3)), PADDED.with_(normalizer="sigmoid", l1=True)):
        check_forward(spec, Shape(2, 1, 40, 48).inputs(torch.float32), [pad], SMALL)


# -- grids ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("descriptors", (False, True))
def test_image(descriptors: bool) -> None:
    """Boxes are cut off at both far edges; TMA reads them as blocks with two axes."""
    spec = Spec(logits=SCALED, mask=Neighborhood((3, 3), length=(None, 7)))
    inputs = Shape(1, 2, 35, 35, key_heads=1).inputs(torch.float32)
    check_forward(spec, inputs, (), SMALL, descriptors, grid((5, 7), (4, 4), (2, 8)))


GRIDS: tuple[tuple[Mask, tuple[int, ...], tuple[int, ...], tuple[int, ...]], ...] = (
    (Neighborhood((3, 3, 3), length=(3, 4, 5)), (3, 4, 5), (1, 4, 4), (2, 2, 4)),
    (Neighborhood((2, 3, 4), (1, 3, 2), (1, 1, 1), (True, False, False), (3, 4, 5)), (3, 4, 5),
     (2, 2, 4), (1, 2, 8)),
    (Neighborhood((3, 2), (2, 2), (2, 3), (False, True), (7, 9)), (7, 9), (4, 4), (4, 4)),
    (Neighborhood((4, 5), (3, 1), length=(8, 8)), (8, 8), (8, 2), (2, 8)),
    (Windows((3, 4), length=(7, 9)), (7, 9), (4, 4), (4, 4)),
    (Neighborhood((3, 3), length=(7, 9)) & Causal(), (7, 9), (4, 4), (2, 8)),
    (Select("h", (Neighborhood((3, 3), length=(7, 9)), Windows((7, 2), length=(7, 9)))), (7, 9),
     (2, 8), (4, 4)))


@pytest.mark.slow
@pytest.mark.parametrize("descriptors", (False, True))
@pytest.mark.parametrize("case", GRIDS, ids=lambda case: str(case[0].describe()))
def test_grids(case: tuple[Mask, tuple[int, ...], tuple[int, ...], tuple[int, ...]],
               descriptors: bool) -> None:
    mask, length, *sides = case
    shape = Shape(2, 2, math.prod(length), math.prod(length))
    check_forward(Spec(logits=SCALED, mask=mask), shape.inputs(torch.float32), (), SMALL,
                  descriptors, grid(length, *sides))


@pytest.mark.slow
@pytest.mark.parametrize("dimensions", (1, 2, 3))
def test_random_neighbourhoods(dimensions: int) -> None:
    draw = random.Random(dimensions)
    for _ in range(6):
        length = tuple(draw.randint(2, {1: 60, 2: 9, 3: 5}[dimensions]) for _ in range(dimensions))
        window = tuple(draw.randint(1, n) for n in length)
        mask = Neighborhood(
            window, tuple(draw.randint(1, w) for w in window),
            tuple(draw.randint(1, n // w) for n, w in zip(length, window, strict=True)),
            tuple(draw.random() < 0.3 for _ in length), length)
        tokens = math.prod(length)
        boxes = None
        if dimensions > 1:
            shapes = tilings_of(length, 16)
            boxes = (draw.choice(shapes), draw.choice(shapes)) if shapes else None
        check_forward(Spec(logits=SCALED, mask=mask), Shape(1, 1, tokens, tokens).inputs(
            torch.float32), (), SMALL, draw.random() < 0.5, boxes)


@pytest.mark.slow
def test_chosen_boxes_with_padding_and_half_precision() -> None:
    mask, tokens = Neighborhood((3, 3), length=(6, 28)), 168
    assert boxes_of(mask, tokens, tokens, 16, 16) is not None
    spec = Spec(logits=SCALED, mask=mask & KeyKeep("pad"), empty_row="zero", operands=(PAD,))
    pad = torch.rand(1, 1, 1, tokens) < 0.5
    pad[..., :80] = False
    check_forward(spec, Shape(1, 2, tokens, tokens, key_heads=1).inputs(torch.bfloat16), [pad],
                  SMALL)


@pytest.mark.slow
def test_other_terms_at_places_of_boxes() -> None:
    """A bias, a low-rank term, an epilogue and rows without a key that are uniform."""
    mask = Neighborhood((3, 3), length=(5, 7))
    q, k = E.index("q"), E.index("k")
    left, right = (Operand(n, ("h", a), role="factor") for n, a in (("left", "q"), ("right", "k")))
    bias = Operand("bias", ("h", "q", "k"), role="bias")
    boxes, inputs = grid((5, 7), (4, 4), (4, 4)), Shape(1, 2, 35, 35).inputs(torch.float32)
    factors = [torch.randn(2, 35, 2), torch.randn(2, 35, 2)]
    check_forward(Spec(logits=SCALED + E.inner("left", "right"), mask=mask,
                       operands=(left, right)), inputs, factors, SMALL, None, boxes)
    check_forward(Spec(logits=SCALED + E.load("bias") - E.call("float", E.call("abs", q - k)) * 0.1,
                       mask=mask, output=E.out * 0.5 + E.value, operands=(bias,)), inputs,
                  [torch.randn(2, 35, 35)], SMALL, None, boxes)
    check_forward(Spec(logits=SCALED, mask=mask & Causal(-3), empty_row="uniform"), inputs, (),
                  SMALL, None, boxes)
    check_forward(Spec(logits=SCALED, mask=mask, weights=E.weight + 0.01), inputs, (), SMALL, None,
                  boxes)


# -- gradients ------------------------------------------------------------------------------------
def test_gradient_over_lists() -> None:
    spec = DOCUMENTS.with_(empty_row="zero")
    check_gradients(spec, Shape(1, 2, 40, 40, key_heads=1).inputs(torch.float32),
                    documents(1, 40), SMALL)


@pytest.mark.slow
def test_gradient_of_heads_that_share_keys_but_not_lists() -> None:
    spec = Spec(logits=SCALED, mask=BlockMap("blocks", 16, 16, ("h",)), empty_row="zero",
                operands=(BLOCKS,))
    blocks = torch.tensor([[[1, 0], [0, 0]], [[0, 1], [1, 1]]]) > 0
    check_gradients(spec, Shape(1, 2, 30, 32, key_heads=1).inputs(torch.float32), [blocks], SMALL)


@pytest.mark.slow
@pytest.mark.parametrize("mask", (
    KeyKeep("pad"), KeyKeep("pad") & Neighborhood((3, 3), (2, 1), length=(6, 28)),
    Neighborhood((2, 2, 2), length=(4, 5, 9)), Windows((3, 4), length=(6, 28))), ids=str)
def test_gradients(mask: Mask) -> None:
    part = part_on_grid(mask)
    tokens = 60 if part is None else math.prod(part.length)
    assert part is None or boxes_of(mask, tokens, tokens, 16, 16) is not None
    pad = torch.rand(1, 1, 1, tokens) < 0.5
    pad[..., tokens // 2 :] = False
    operands = (PAD,) if mask.slots else ()
    check_gradients(Spec(logits=SCALED, mask=mask, empty_row="zero", operands=operands),
                    Shape(1, 1, tokens, tokens).inputs(torch.float32), [pad][: len(operands)],
                    SMALL)
