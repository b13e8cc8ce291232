"""check_rule: right rules pass, wrong ones are shown on the smallest input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnopt
from attnopt.approximations import MoBA, SinkWindow
from attnopt.errors import OptionError, RuleError
from attnopt.ir.mask import ALL
from attnopt.rules import Approximation, Decline, Factors, Match, Region

DIMENSIONS = {"q": "b h s d", "k": "b h t d", "v": "b h t e"}


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


def rule_of(pattern: Any, replacement: Any, **more: str) -> Any:
    return attnopt.register_rewrite(pattern, replacement, {**DIMENSIONS, **more}, register=False)


def test_right() -> None:
    found = attnopt.check_rule(rule_of(plain, F_sdpa))
    assert found and found.compared == 60 and found.error < 1e-12
    assert "ok, 60 cases" in str(found) and found.raise_if_wrong() is found


def F_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def test_wrong_scale_is_shrunk() -> None:
    found = attnopt.check_rule(
        rule_of(plain, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.25)))
    assert not found and found.counterexample is not None
    assert found.counterexample.sizes == {"b": 1, "h": 1, "s": 1, "d": 1, "t": 2, "e": 1}
    assert "smallest counterexample" in str(found)
    with pytest.raises(RuleError, match="WRONG"):
        found.raise_if_wrong()


def test_a_permutation_that_fits_square_lengths_only() -> None:
    found = attnopt.check_rule(rule_of(plain, lambda q, k, v: F_sdpa(
        q, k.transpose(1, 2) if k.shape[1] == k.shape[2] else k, v)))
    assert not found and found.counterexample is not None
    assert found.counterexample.sizes["h"] == found.counterexample.sizes["t"] == 2


def test_rows_without_keys() -> None:
    def masked(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = q @ k.mT * q.shape[-1] ** -0.5
        return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v

    def fused(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    found = attnopt.check_rule(rule_of(masked, fused, keep="bool b 1 s t"))
    assert not found and found.counterexample is not None
    assert not found.counterexample.tensors["keep"].any()
    assert "NaN" in found.counterexample.reason


def test_an_alternative_is_named() -> None:
    def either(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = attnopt.one_of("scale", usual=lambda: q @ k.mT * q.shape[-1] ** -0.5,
                                none=lambda: q @ k.mT)
        return scores.softmax(-1) @ v

    found = attnopt.check_rule(rule_of(either, F_sdpa))
    assert found.counterexample is not None and found.counterexample.variant == "scale=none"


def test_classes() -> None:
    class Deaf:
        name = "deaf"

        def match(self, region: Region) -> Match:
            return Match(region.spec, compute=lambda query, key, value, **operands: (
                query @ key.mT * 0.3).softmax(-1) @ value)

    found = attnopt.check_rule(Deaf)
    assert found.counterexample is not None and found.counterexample.variant != "plain"

    class Raises:
        name = "raises"

        def match(self, region: Region) -> Match:
            raise KeyError("x")

    found = attnopt.check_rule(Raises())
    assert not found and "raised KeyError: 'x' (test_check_rule.py:" in str(found)
    with pytest.raises(OptionError, match="match"):
        attnopt.check_rule(3)
    with pytest.raises(OptionError, match="cases"):
        attnopt.check_rule(Raises(), cases=0)


def test_a_rule_that_takes_nothing_is_not_ok() -> None:
    class Never:
        name = "never"

        def match(self, region: Region) -> None:
            return None

    found = attnopt.check_rule(Never, cases=5)
    assert not found and found.declined == 5 and "nothing was checked" in str(found)


def test_a_rule_of_attnopt() -> None:
    assert attnopt.check_rule("fused-softmax")


def test_values_do_not_change() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    attnopt.check_rule(rule_of(plain, F_sdpa), cases=3)
    assert torch.equal(before, torch.get_rng_state())


class _Cut(Approximation):
    """Half of the columns of a bias."""

    name = "cut"

    def __init__(self, told: float) -> None:
        self.told = told

    def reduce(self, region: Region) -> tuple[Any, dict[str, Factors]]:
        if not region.biases:
            raise Decline("no bias")
        (slot, bias), = region.biases.items()
        left, values, right = torch.linalg.svd(bias.double(), full_matrices=False)
        kept = max(1, values.shape[-1] // 2)
        query, key = left[..., :kept] * values[..., None, :kept], right[..., :kept, :].mT
        gap = query @ key.mT - bias
        gap = gap - (gap.amax(-1, True) + gap.amin(-1, True)) / 2
        return ALL, {slot: Factors(query.float(), key.float(), self.told * float(gap.abs().max()))}


def test_an_approximation_is_not_counted_as_compared() -> None:
    for rule in (SinkWindow(3), MoBA(2, 1)):
        found = attnopt.check_rule(rule)
        assert found and not found.compared and found.approximate and not found.bounded
        assert found.deviation > 0.01
        assert "an approximation, not compared" in str(found) and "cases compared" not in str(found)
        assert "declares no error" in str(found)


def test_the_error_that_an_approximation_declares_is_checked() -> None:
    right = attnopt.check_rule(_Cut(1.0))
    assert right and right.bounded == right.approximate > 0
    assert "within the error that it declares" in str(right)
    wrong = attnopt.check_rule(_Cut(0.5))
    assert not wrong and "the rule declares" in str(wrong)
    assert wrong.counterexample is not None and set(wrong.counterexample.tensors) == {
        "query", "key", "value", "bias"}
