"""Runs one random program against its optimised self, shrinks what fails, and keeps count.

A program is optimised with verify=False and must agree with the original at its own shape, at a
second shape (twice where the choices say so, as a kind of call that comes back is captured too),
and again after its constants (parameters, buffers, plain tensor attributes) were changed in place
by one of several routes. See `tests.spellings.checking` for the acceptance rule.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import random
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.fuzz.choices import SIMPLEST, Choices, draw, legal
from tests.fuzz.generator import render
from tests.spellings.checking import (
    Result,
    describe,
    differences,
    double_rounding,
    oracle,
    run,
    sites,
)
from tests.spellings.program import draw as draw_inputs
from tests.spellings.program import dynamic_shapes


class Invalid(Exception):
    """The original program itself raises, so there is nothing to compare."""


@dataclass
class Outcome:
    """What became of one program; `failure` is None when all was right."""

    index: int
    choices: Choices
    status: str = "none"  # rewritten, canonical, kept, none; the weakest of its sites
    kinds: Counter = field(default_factory=Counter)
    reasons: list[str] = field(default_factory=list)
    failure: str | None = None
    stage: str = ""

    @property
    def taken(self) -> bool:
        return self.status in ("rewritten", "canonical")


def choices_of(seed: int, index: int) -> Choices:
    """The program of that index: any one can be run again alone."""
    return draw(random.Random(f"{seed}:{index}"))


def run_program(choices: Choices, index: int) -> Outcome:
    """Builds, optimises and compares one program. Failures are recorded, not raised."""
    import attnopt

    outcome = Outcome(index, choices)
    program, dtype = render(choices), getattr(torch, choices.dtype)
    training = choices.training == "yes"
    original = program.build(index).to(dtype).train(training)
    calls = {
        stage: _inputs(program.declared, choices, second=stage == "second shape", seed=index)
        for stage in ("first shape", "second shape")
    }
    expected = {stage: _expected(original, call, training) for stage, call in calls.items()}

    mine = copy.deepcopy(original)
    moving = "bqks" if choices.dynamic == "yes" else ""
    shapes = dynamic_shapes(program.declared, moving) if moving else None
    outcome.stage = "optimize"
    try:
        opt = attnopt.optimize(mine, calls["first shape"], verify=False, dynamic_shapes=shapes)
        _count(outcome, opt)
        for stage, call in calls.items():
            outcome.stage = stage
            _compare(outcome, opt, call, training, *expected[stage])
            if stage == "second shape" and choices.repeat == "yes":
                outcome.stage = "second shape again"
                _compare(outcome, opt, call, training, *expected[stage])
        outcome.stage = f"constants changed by {choices.route}"
        if change_constants(original, choices.route) and outcome.failure is None:
            change_constants(mine, choices.route)
            call = calls["first shape"]
            _compare(outcome, opt, call, training, *_expected(original, call, training))
    except Exception as error:  # the original did not raise: a crash of ours, whatever it is
        outcome.failure = f"{outcome.stage}: raised {type(error).__name__}: {error}"
    return outcome


def _inputs(declared: str, c: Choices, *, second: bool, seed: int) -> tuple[Tensor, ...]:
    drawn = draw_inputs(declared, c.sizes(second), getattr(torch, c.dtype), seed=seed + second)
    return tuple(laid_out(x, c.memory) for x in drawn)


def laid_out(x: Tensor, memory: str) -> Tensor:
    """The same values (or those of the first batch row, expanded) in another memory layout."""
    if not x.is_floating_point() or x.dim() < 2:
        return x
    if memory == "strided":
        wide = x.new_zeros(*x.shape[:-1], 2 * x.size(-1))
        wide[..., ::2] = x
        return wide[..., ::2]
    if memory == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if memory == "expanded" and x.size(0) > 1:
        return x[:1].expand_as(x)
    return x


def _expected(original: nn.Module, call: Sequence[Tensor], training: bool) -> tuple[Any, ...]:
    """The original's results, those in float64, and the rounding of a float64 program."""
    try:
        results = run(original, call, gradients=training, clone=False)
        exact = oracle(original, call, gradients=training)
        rounding = double_rounding(original, call, exact, gradients=training)
    except Exception as error:
        raise Invalid(f"{type(error).__name__}: {error}") from error
    return results, exact, rounding


def _compare(outcome: Outcome, opt: nn.Module, call: Sequence[Tensor], training: bool,
             results: Result, exact: Result, rounding: dict[str, float] | None) -> None:
    if outcome.failure is None:
        found = run(opt, call, gradients=training, clone=False)
        wrong = differences(found, results, exact, rounding)
        if wrong:
            outcome.failure = f"{outcome.stage}: {'; '.join(wrong)}"


def _count(outcome: Outcome, opt: Any) -> None:
    outcome.kinds = Counter(s.kind for s in opt.report.sites)
    statuses = [s.status for s in sites(opt)]
    outcome.reasons = [str(s.reason) for s in sites(opt) if s.status == "kept"]
    weakest = [s for s in ("kept", "canonical", "rewritten") if s in statuses]
    outcome.status = weakest[0] if weakest else "none"
    if not outcome.reasons and outcome.status == "none":
        outcome.reasons = [describe(opt)]


# -- constants ------------------------------------------------------------------------------------
def change_constants(module: nn.Module, route: str, seed: int = 5) -> bool:
    """Gives every constant of the module new values by one route; False where it has none."""
    rng = torch.Generator().manual_seed(seed)
    named = [(owner, name, value) for owner in module.modules()
             for name, value in [*owner._parameters.items(), *owner._buffers.items(),
                                 *owner.__dict__.items()] if isinstance(value, Tensor)]
    for owner, name, old in named:
        _change(owner, name, old, _other_values(old, rng), route)
    return bool(named)


def _other_values(old: Tensor, rng: torch.Generator) -> Tensor:
    if old.dtype is torch.bool:
        new = torch.rand(old.shape, generator=rng) < 0.5
        new[..., 0] = True
        return new
    if old.numel() < 2:
        return old.detach() * 1.5
    spread = old.detach().float().std().item()  # as before: scores must not become extreme
    return (torch.randn(old.shape, generator=rng) * spread).to(old.dtype)


def _change(owner: nn.Module, name: str, old: Tensor, new: Tensor, route: str) -> None:
    if route == "numpy" and old.dtype is not torch.bfloat16:
        old.detach().numpy()[...] = new.numpy()
    elif route == "slice" and old.dim() > 0:
        with torch.no_grad():
            old[: max(1, old.size(0) // 2)] = new[: max(1, old.size(0) // 2)]
    elif route == "new data":
        old.data = new
    elif route == "assign":
        wanted = nn.Parameter(new) if isinstance(old, nn.Parameter) else new
        setattr(owner, name, wanted)
    elif route in ("data", "numpy"):
        old.data.copy_(new)
    else:
        with torch.no_grad():
            old.copy_(new)


# -- shrinking and statistics ---------------------------------------------------------------------
def shrink(failed: Outcome) -> Outcome:
    """The simplest program that still fails: answers go back to their defaults one by one."""
    changed = True
    while changed:
        changed = False
        for name in (f.name for f in fields(Choices)):
            if getattr(failed.choices, name) == SIMPLEST[name]:
                continue
            simpler = legal(replace(failed.choices, **{name: SIMPLEST[name]}))
            with contextlib.suppress(Invalid):
                tried = run_program(simpler, failed.index)
                if tried.failure is not None and simpler != failed.choices:
                    failed, changed = tried, True
    return failed


def reproduction(failed: Outcome) -> str:
    """The source, shapes and failure of one program."""
    c = failed.choices
    unusual = {f.name: getattr(c, f.name) for f in fields(c)
               if getattr(c, f.name) != SIMPLEST[f.name]}
    program = render(c)
    shapes = {
        stage: [(name, list(x.shape)) for (name, _), x in zip(
            program.inputs, _inputs(program.declared, c, second=second, seed=failed.index),
            strict=True)]
        for stage, second in (("first", False), ("second", True))
    }
    return (f"program {failed.index}: {failed.failure}\n  choices: {unusual}\n"
            f"  shapes: {shapes}\n\n{program.text}")


@dataclass
class Tally:
    """Counts over many programs."""

    outcomes: list[Outcome] = field(default_factory=list)
    invalid: list[str] = field(default_factory=list)

    @property
    def failures(self) -> list[Outcome]:
        return [o for o in self.outcomes if o.failure is not None]

    @property
    def attention(self) -> list[Outcome]:
        """All but the programs that are no attention on purpose."""
        return [o for o in self.outcomes if o.choices.family != "near miss"]

    @property
    def taken(self) -> float:
        """The fraction of attention programs that are wholly taken."""
        return sum(o.taken for o in self.attention) / max(1, len(self.attention))

    def table(self) -> str:
        """Families by size, with what became of their programs."""
        lines = [f"{'family':32} {'programs':>8} {'taken':>7} {'rewritten':>9} {'canonical':>9} "
                 f"{'kept':>5} {'none':>5} {'failed':>6}"]
        families = Counter(o.choices.family for o in self.outcomes)
        for family, count in [*families.most_common(), ("all attention", len(self.attention))]:
            mine = [o for o in self.outcomes if o.choices.family == family]
            mine = mine or self.attention
            of = Counter(o.status for o in mine)
            lines.append(
                f"{family:32} {count:8} {sum(o.taken for o in mine) / max(1, count):7.1%} "
                f"{of['rewritten']:9} {of['canonical']:9} {of['kept']:5} {of['none']:5} "
                f"{sum(o.failure is not None for o in mine):6}")
        return "\n".join(lines)


@contextlib.contextmanager
def _only_errors(*names: str) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def fuzz(indices: Sequence[int], seed: int, tally: Tally | None = None) -> Tally:
    """Runs the programs of the given indices."""
    tally = tally or Tally()
    with warnings.catch_warnings(), _only_errors("attnopt", "torch._export", "torch.fx"):
        warnings.simplefilter("ignore")
        for index in indices:
            try:
                tally.outcomes.append(run_program(choices_of(seed, index), index))
            except Invalid as error:
                tally.invalid.append(f"{index}: {error}")
    return tally
