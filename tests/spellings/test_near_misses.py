"""What is not attention stays as it was; what is attention with a trap stays right."""

from __future__ import annotations

import copy

import pytest
import torch

import attnopt
from tests.spellings.checking import describe, differences, oracle, run, sites, taken
from tests.spellings.near_misses import NEAR_MISSES, NearMiss
from tests.spellings.program import OTHER, SIZES, build, draw, dynamic_shapes


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("near", NEAR_MISSES, ids=lambda n: n.name)
@pytest.mark.parametrize(
    ("dtype", "dynamic"),
    [
        pytest.param(torch.float32, False, id="float32, static"),
        pytest.param(torch.float32, True, id="float32, dynamic", marks=pytest.mark.slow),
        pytest.param(torch.bfloat16, False, id="bfloat16, static", marks=pytest.mark.slow),
    ],
)
def test_near_miss(near: NearMiss, training: bool, dtype: torch.dtype, dynamic: bool) -> None:
    original = build(near.forward, near.setup).to(dtype).train(training)
    inputs = draw(near.inputs, SIZES, dtype)
    shapes = dynamic_shapes(near.inputs, near.moving) if dynamic else None
    opt = attnopt.optimize(
        copy.deepcopy(original), inputs, verify=False, dynamic_shapes=shapes
    )

    if near.expect in ("untouched", "reassociable"):
        assert not taken(opt), describe(opt)
    if near.expect == "unrewritten":
        assert all(s.status != "rewritten" for s in sites(opt)), describe(opt)
    if near.expect == "reassociable":
        found = sites(opt, "reassociable")
        assert found and all(s.status == "kept" for s in found), describe(opt)

    gradients = training and near.gradients
    for call in (inputs, draw(near.inputs, {**SIZES, **OTHER}, dtype, seed=1)):
        exact = oracle(original, call, gradients=gradients)
        expected = run(original, call, gradients=gradients)
        wrong = differences(run(opt, call, gradients=gradients), expected, exact)
        assert not wrong, f"{wrong}; {describe(opt)}"
    for (name, buffer), (_, new) in zip(
        original.named_buffers(), opt.named_buffers(), strict=True
    ):
        assert torch.allclose(buffer, new, atol=1e-6), name


@pytest.mark.parametrize("near", [n for n in NEAR_MISSES if "overwritten" in n.name],
                         ids=lambda n: n.name)
def test_inputs_are_left_as_the_program_leaves_them(near: NearMiss) -> None:
    original = build(near.forward, near.setup)
    inputs = draw(near.inputs, SIZES)
    opt = attnopt.optimize(copy.deepcopy(original), draw(near.inputs, SIZES), verify=False)
    expected, found = [x.clone() for x in inputs], [x.clone() for x in inputs]
    with torch.no_grad():
        original(*expected)
        opt(*found)
    for before, after in zip(expected, found, strict=True):
        assert torch.equal(before, after)


def test_optimize_leaves_the_example_inputs_alone() -> None:
    near = next(n for n in NEAR_MISSES if n.name == "inputs overwritten")
    inputs = draw(near.inputs, SIZES)
    before = [x.clone() for x in inputs]
    attnopt.optimize(build(near.forward), inputs, verify=True)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
