"""Rules of users: registered, named, listed, removed; what they return, raise, and lie about."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt import rules
from attnopt.errors import OptionError, RuleError, StrictError
from attnopt.ir.mask import Band
from attnopt.ir.spec import Schedule
from attnopt.rules import Decline, Match, Region


class Model(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT * 0.25).softmax(-1) @ value


def tensors(length: int = 7, **more: Any) -> tuple[Tensor, ...]:
    return tuple(torch.randn(2, 3, length, 16, **more) for _ in range(3))


class Own:
    """Takes plain softmax attention with its own function."""

    name = "own"

    def match(self, region: Region) -> Match | Decline:
        if region.spec.operands or region.spec.normalizer != "softmax":
            return Decline("not plain")
        return Match(region.spec)

    def rewrite(self, match: Match) -> Any:
        def compute(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scores = (query @ key.mT * 0.25).exp()
            return scores / scores.sum(-1, keepdim=True) @ value
        return compute


@pytest.fixture(autouse=True)
def _registry() -> Iterator[None]:
    before = [r.name for r in rules.registered()]
    yield
    for rule in rules.registered():
        if rule.name not in before:
            rules.unregister(rule.name)


def site(model: nn.Module, args: tuple[Any, ...], **options: Any) -> Any:
    optimized = attnopt.optimize(model, args, **options)
    assert torch.allclose(optimized(*args), model(*args), atol=1e-5, equal_nan=True)
    return optimized.report.sites[0]


def test_registry() -> None:
    built_in = [r.name for r in rules.registered()]
    attnopt.register_rule(Own)
    assert [r.name for r in rules.registered()] == ["own", *built_in]
    with pytest.raises(OptionError, match="distinct"):
        attnopt.register_rule(Own)
    attnopt.register_rule(Own, priority=-1, replace=True)
    assert [r.name for r in rules.registered()] == [*built_in, "own"]
    rules.unregister("own")
    assert [r.name for r in rules.registered()] == built_in
    with pytest.raises(OptionError, match="must be one of"):
        rules.unregister("own")
    for wrong in (3, type("Empty", (), {})):
        with pytest.raises(OptionError, match="match"):
            attnopt.register_rule(wrong)


def test_registered_named_and_given() -> None:
    args = tensors()
    attnopt.register_rule(Own)
    for given in (None, ["own"], [Own()]):
        found = site(Model(), args, rules=given)
        assert (found.status, found.rule, found.lowering) == ("rewritten", "own", "custom")


def test_dynamic_length_and_training() -> None:
    length = torch.export.Dim("length")
    args = tensors(9)
    optimized = attnopt.optimize(Model().train(), args, rules=[Own()],
                                 dynamic_shapes=[{2: length}] * 3)
    assert optimized.report.sites[0].rule == "own"
    for n in (2, 5, 31):
        args = tensors(n, requires_grad=True)
        grads = torch.autograd.grad(optimized(*args).square().sum(), args)
        wanted = torch.autograd.grad(Model()(*args).square().sum(), args)
        for a, b in zip(grads, wanted, strict=True):
            assert torch.allclose(a, b, atol=1e-4)


def test_a_rule_that_raises() -> None:
    class Raises:
        name = "raises"

        def match(self, region: Region) -> Match:
            raise KeyError("nothing here")

    found = site(Model(), tensors(), rules=[Raises()])
    assert found.status == "canonical"
    assert "the rule raises raised KeyError: 'nothing here' (test_custom_rules.py:" in found.reason
    assert site(Model(), tensors(), rules=[Raises(), Own()]).rule == "own"
    with pytest.raises(RuleError, match="'raises' raised KeyError"):
        attnopt.optimize(Model(), tensors(), rules=[Raises()], strict=True)


@pytest.mark.parametrize(("compute", "reason"), [
    (lambda query, key, value: value * 1.0, "the rule liar: the result is off by"),
    (lambda query, key, value: value[..., :1], "must give a tensor of shape"),
    (lambda query, key, value: 1 / 0, "raised ZeroDivisionError"),
    (lambda query, key, value: (query @ key.mT * 0.25).softmax(-1).detach() @ value, "gradient"),
    (lambda query, key, value: None, "must give a tensor"),
])
def test_a_function_that_lies(compute: Any, reason: str) -> None:
    class Liar:
        name = "liar"

        def match(self, region: Region) -> Match:
            return Match(region.spec, compute=compute)

    found = site(Model(), tensors(), rules=[Liar()])
    assert found.status in ("kept", "canonical") and reason in found.reason
    assert any(t.startswith("liar: ") for t in found.tried)


def test_a_lie_is_an_error_with_strict() -> None:
    class Liar:
        name = "liar"

        def match(self, region: Region) -> Match:
            return Match(region.spec, compute=lambda query, key, value: value * 1.0)

    with pytest.raises(StrictError, match="the rule liar: the result is off by"):
        attnopt.optimize(Model(), tensors(), rules=[Liar()], strict=True)


def test_a_length_that_is_asked_about_is_declined() -> None:
    class Asks:
        name = "asks"

        def match(self, region: Region) -> Match:
            def compute(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
                if query.shape[-2] == 9:
                    return (query @ key.mT * 0.25).softmax(-1) @ value
                return value
            return Match(region.spec, compute=compute)

    found = site(Model(), tensors(9), rules=[Asks()],
                 dynamic_shapes=[{2: torch.export.Dim("length")}] * 3)
    assert found.status == "canonical" and "a length that may change" in found.reason


class Banded(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        scores = (query @ key.mT * 0.25).masked_fill(~keep, -math.inf)
        return scores.softmax(-1) @ value


@pytest.mark.parametrize("width", [3, 4])
def test_a_mask_form(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule knows what an input of the user holds; where it is wrong, that is seen."""
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)

    class Window:
        name = "window"
        assumes = "every mask is a window of 3"

        def match(self, region: Region) -> Any:
            return region.spec.with_(mask=Band(-2, 0))

    place = torch.arange(20)
    gap = place[:, None] - place
    found = site(Banded(width), (*tensors(20), (gap >= 0) & (gap < width)), rules=[Window()],
                 backend="aten")
    if width == 3:
        assert found.status == "rewritten" and found.rule.startswith(
            "window (assumes every mask is a window of 3), ")
        monkeypatch.setattr(Window, "assumes", "")
        found = site(Banded(width), (*tensors(20), (gap >= 0) & (gap < width)), rules=[Window()],
                     backend="aten")
        assert found.rule == "" and "does not read" in found.reason
    else:
        assert found.status == "kept" and "off by" in found.reason


def test_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []

    class Entry:
        value = "package:Own"

        def load(self) -> Any:
            loaded.append(1)
            return Own

    def entry_points(*, group: str, name: str) -> list[Entry]:
        return [Entry()] if (group, name) == ("attnopt.rules", "own") else []

    monkeypatch.setattr(rules, "entry_points", entry_points)
    site(Model(), tensors())
    assert not loaded
    assert site(Model(), tensors(), rules=["own"]).rule == "own"
    with pytest.raises(OptionError, match="must be one of"):
        attnopt.optimize(Model(), tensors(), rules=["other"])


def test_a_schedule_of_the_rule() -> None:
    class Blocks:
        name = "blocks"

        def match(self, region: Region) -> Match:
            return Match(region.spec, Schedule("aten:blocks", (2,)))

    found = site(Model(), tensors(), rules=[Blocks()])
    assert (found.rule, found.lowering, found.tile) == ("blocks", "aten:blocks", "2")
