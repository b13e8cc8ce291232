"""Scores that are no product of matrices, and gradients of low-rank terms, in the interpreter."""

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal, KeyKeep, Neighborhood
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.triton import backward
from attnopt.kernels.triton.attention import Attention
from attnopt.kernels.triton.tiles import Tile
from tests.kernels.cases import LEFT, RIGHT, WEIGHT
from tests.kernels.triton.cases import SCALED, TILE, Shape, check_forward, check_gradients

s = E.score
PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
BIAS = Operand("bias", ("h", "q", "k"), role="bias")
TERM = E.inner("left", "right")
DISTANCE = Spec(score="distance", logits=s * -0.2)
ADDITIVE = Spec(score="additive", operands=(WEIGHT,))
LOW_RANK = Spec(logits=SCALED + TERM, operands=(LEFT, RIGHT))
SPECS = {
    "distance, causal": DISTANCE.with_(mask=Causal(), empty_row="zero"),
    "root of a distance": DISTANCE.with_(logits=E.call("sqrt", s + 0.5) * -1.0 + E.load("bias"),
                                         more=(BIAS,)),
    "inverse distance": DISTANCE.with_(logits=1.0 / (s + 1.0), normalizer="relu", l1=True),
    "additive, band": ADDITIVE.with_(mask=Band(-9, 3), empty_row="zero"),
    "additive, padding": ADDITIVE.with_(mask=KeyKeep("pad"), empty_row="zero", more=(PAD,)),
    "additive, sigmoid": ADDITIVE.with_(logits=s * 0.5 + 0.1, normalizer="sigmoid"),
    "softcap of a low rank": Spec(logits=E.call("tanh", SCALED + TERM * 0.5) + TERM,
                                  mask=Causal(), operands=(LEFT, RIGHT)),
    "low rank times score": Spec(logits=SCALED * (1.0 + TERM) + E.load("bias"),
                                 mask=Band(-20, 6), empty_row="zero",
                                 operands=(LEFT, RIGHT, BIAS)),
}
QUICK = ("distance, causal", "additive, band")


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in SPECS])
def test_gradients(name: str) -> None:
    spec, shape = SPECS[name], Shape(2, 2, 19, 21, 5, 3)
    inputs, operands = shape.inputs(torch.float32), shape.operands(spec, torch.float32)
    check_forward(spec, inputs, operands)
    check_gradients(spec, inputs, operands)


@pytest.mark.slow
@pytest.mark.parametrize("spec", (DISTANCE, ADDITIVE, SPECS["softcap of a low rank"]),
                         ids=("distance", "additive", "low rank"))
def test_layouts_and_lengths(spec: Spec) -> None:
    for shape in (Shape(1, 2, 1, 1, 3, 2), Shape(1, 2, 33, 2), Shape(2, 3, 7, 9, key_heads=1)):
        check_gradients(spec, shape.inputs(torch.float32), shape.operands(spec, torch.float32))
    packed = torch.randn(2, 20, 3, 2, 8).permute(2, 0, 3, 1, 4)
    operands = Shape(2, 2, 20, 20, 8).operands(spec, torch.float32)
    check_gradients(spec, list(packed), operands)
    check_gradients(spec, [packed[0], *packed[1:].flip(-1)], [t.flip(-1) for t in operands])
    half = Shape(1, 2, 20, 20, 8)
    for dtype in (torch.float16, torch.bfloat16):
        check_gradients(spec, half.inputs(dtype), half.operands(spec, dtype))


@pytest.mark.parametrize("descriptors", (
    False, pytest.param(True, marks=pytest.mark.slow)))
def test_descriptors_hold_values_only(descriptors: bool) -> None:
    for spec in (DISTANCE, ADDITIVE):
        shape = Shape(1, 1, 20, 24, 8, 16)
        check_forward(spec, shape.inputs(torch.float32), shape.operands(spec, torch.float32),
                      descriptors=descriptors)


def test_small_distances_keep_their_digits() -> None:
    """|q|^2 - 2 q.k + |k|^2 would be off by more than the distances are."""
    query, key = (torch.randn(1, 1, 20, 8) * 1e-2 + 100.0 for _ in range(2))
    check_gradients(DISTANCE.with_(logits=s * -1e3), (query, key, torch.randn(1, 1, 20, 4)))


@pytest.mark.slow
def test_nan_and_inf_come_through() -> None:
    for spec in (DISTANCE, ADDITIVE):
        shape = Shape(1, 1, 37, 40, 8)
        query, key, value = shape.inputs(torch.float32)
        query[0, 0, 3], key[0, 0, 7, 0], value[0, 0, 9] = torch.nan, torch.inf, torch.nan
        operands = shape.operands(spec, torch.float32)
        check_forward(spec, (query, key, value), operands)


@pytest.mark.slow
def test_a_weight_for_every_head() -> None:
    shape = Shape(2, 3, 20, 24, 5)
    for weight in (torch.randn(3, 5), torch.randn(1, 5), torch.randn(2, 1, 5),
                   torch.randn(5, 2, 3).permute(1, 2, 0)):
        check_gradients(ADDITIVE, shape.inputs(torch.float32), [weight])
    assert Attention(ADDITIVE)(*shape.inputs(torch.float32), [torch.randn(4, 5)]) is None
    assert Attention(ADDITIVE)(*shape.inputs(torch.float32), [torch.randn(6)]) is None


@pytest.mark.slow
@pytest.mark.parametrize("left, right", (
    ((3, 20, 1), (3, 24, 1)), ((3, 20, 17), (3, 24, 17)), ((1, 20, 2), (3, 24, 2)),
    ((20, 2), (24, 2)), ((2, 3, 20, 4), (1, 24, 4)), ((3, 1, 2), (3, 24, 2))))
def test_factors_of_any_rank_and_axes(left: tuple[int, ...], right: tuple[int, ...]) -> None:
    factors = tuple(Operand(n, ("b", "h", a), role="factor")
                    for n, a in (("left", "q"), ("right", "k")))
    spec = Spec(logits=SCALED + TERM * 0.3, operands=factors)
    for key_heads in (0, 1):
        inputs = Shape(2, 3, 20, 24, key_heads=key_heads).inputs(torch.float32)
        check_gradients(spec, inputs, [torch.randn(left), torch.randn(right)])


@pytest.mark.slow
def test_a_factor_of_several_terms() -> None:
    third = Operand("third", ("h", "k"), role="factor")
    spec = Spec(logits=SCALED + TERM * 0.3 - E.inner("left", "third"),
                operands=(LEFT, RIGHT, third))
    inputs = Shape(1, 2, 20, 24).inputs(torch.float32)
    factors = [torch.randn(2, n, 3) for n in (20, 24, 24)]
    check_gradients(spec, inputs, factors)
    both = Operand("both", ("h",), role="factor")
    same = Spec(logits=SCALED + E.inner("both", "both"), operands=(both,))
    check_gradients(same, inputs, [torch.randn(2, 1, 3)])


@pytest.mark.slow
def test_gradients_over_boxes_of_a_grid() -> None:
    mask = Neighborhood((3, 5), length=(8, 12))
    for spec in (DISTANCE, ADDITIVE, LOW_RANK):
        shape = Shape(1, 2, 96, 96, 8)
        check_gradients(spec.with_(mask=mask), shape.inputs(torch.float32),
                        shape.operands(spec, torch.float32), tile=Tile(16, 16, 4, 1))


def test_only_factors_that_learn_have_a_gradient() -> None:
    shape = Shape(1, 2, 20, 24)
    inputs, factors = shape.inputs(torch.float32), shape.operands(LOW_RANK, torch.float32)
    for wanted in factors:
        for factor in factors:
            factor.requires_grad_(factor is wanted).grad = None
        out = Attention(LOW_RANK, TILE, TILE)(*inputs, factors)
        assert out is not None
        out.sum().backward()
        assert [f.grad is not None for f in factors] == [f is wanted for f in factors]



def test_what_enters_in_two_ways_is_left_to_the_composition() -> None:
    squared = LOW_RANK.with_(output=E.out * E.load("left"))
    assert backward.kinds(squared, frozenset(("left",)), ()) is None
    assert backward.kinds(squared, frozenset(("right",)), ()) == {"right": "factor"}
    weighted = ADDITIVE.with_(logits=s * E.load("score_weight"))
    assert backward.kinds(weighted, frozenset(("score_weight",)), ()) is None
