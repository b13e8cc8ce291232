"""Fused attention without a compiler: products of the graph are columns, in training too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt.ir.spec import Spec
from tests.passes import test_low_rank as spell

N = 200


def optimized(function: Callable[..., Tensor], train: bool, **options: Any
              ) -> tuple[spell.Model, list[Tensor], Any, Any]:
    torch.manual_seed(0)
    model, inputs = spell.Model(function).train(train), spell.drawn(N)
    model.learned.data = 0.3 * torch.randn(spell.H, N, spell.R)
    opt = attnopt.optimize(model, tuple(inputs), backend="aten", **options)
    (site,) = opt.report.sites
    return model, inputs, opt, site


def gradients(run: Any, model: spell.Model, inputs: list[Tensor]) -> list[Tensor]:
    model.zero_grad()
    given = [t.detach().clone().requires_grad_() for t in inputs]
    run(*given).square().sum().backward()
    found = [t.grad for t in given] + [model.learned.grad]
    return [g.clone() for g in found if g is not None]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("function", [spell.plain, spell.learned, spell.causal])
def test_a_product_is_columns_and_no_mask(function: Callable[..., Tensor], train: bool) -> None:
    model, inputs, opt, site = optimized(function, train)
    assert (site.status, site.lowering) == ("rewritten", "aten:sdpa"), site.tried
    assert Spec.parse(site.spec).logits.has("inner") and "low rank 6" in site.bias
    torch.testing.assert_close(opt(*inputs), model(*inputs), atol=5e-6, rtol=1e-5)
    for ours, theirs in zip(gradients(opt, model, inputs), gradients(model, model, inputs),
                            strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_the_authors_own_fused_call_stays() -> None:
    *_, site = optimized(spell.given_to_sdpa, False)
    assert site.status == "canonical" and "nothing to add" in site.reason


def test_factors_of_the_scores_go_to_row_blocks() -> None:
    *_, site = optimized(spell.factor, True, prefer="memory")
    assert site.lowering == "aten:blocks" and "holds nothing" in site.memory


def test_row_blocks_train_where_memory_is_preferred() -> None:
    model, inputs, opt, site = optimized(spell.factor, True, prefer="memory")
    out = opt(*(t.requires_grad_() for t in inputs))
    names, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None:
            names.add(type(node).__name__)
            stack += [parent for parent, _ in node.next_functions]
    assert "_RowsBackward" in names
    for ours, theirs in zip(gradients(opt, model, inputs), gradients(model, model, inputs),
                            strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_without_a_preference_training_keeps_the_authors_composition() -> None:
    *_, site = optimized(spell.factor, True)
    assert site.status == "canonical" and "unless memory" in site.reason
