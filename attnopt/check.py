"""check_rule: does a rule compute what it replaces? Drawn inputs, and the smallest that say no.

Lengths are drawn small and odd, of 1 and 0, and all equal (where a wrong permutation shows only in
the numbers); masks hide whole rows. Each case is compared in float64, then in the types of models
by the bound of `attnopt.passes.verify`. A failing case is made smaller while it fails: first its
lengths, then its values (zeros, ones, whole numbers).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from attnopt.errors import OptionError, RuleError

_LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 33)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Subject(Protocol):
    """What is checked: two functions of drawn tensors, for each of some variants."""

    words: list[str]
    may_be_empty: list[str]
    variants: list[Any]

    def draw(self, variant: Any, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        """Inputs in float64 and bool."""
    def expected(self, variant: Any, tensors: Mapping[str, Tensor]) -> Tensor:
        """What the author computes."""
    def got(self, variant: Any, tensors: Mapping[str, Tensor]) -> Tensor | Inexact | None:
        """What the rule computes; None where it declines."""
    def name_of(self, variant: Any) -> str:
        """The variant in words."""


@dataclass(frozen=True)
class Inexact:
    """What an approximation means: its result, by how much its logits are off up to a constant per
    row, and the error that it declares of them; None where it declares none."""

    result: Tensor
    off: float | None = None
    declared: float | None = None


@dataclass(frozen=True)
class Change:
    """What an approximation changes: root mean square of the difference over that of the result."""

    deviation: float
    bounded: bool
    empty: bool


@dataclass
class Case:
    """One failing case: lengths, inputs, and what is wrong."""

    variant: str
    sizes: dict[str, int]
    dtype: torch.dtype
    tensors: dict[str, Tensor]
    reason: str

    def __str__(self) -> str:
        lengths = ", ".join(f"{w}={n}" for w, n in self.sizes.items())
        lines = [f"  {self.variant}: {self.reason}" if self.variant else f"  {self.reason}",
                 f"  at {lengths}, {str(self.dtype).removeprefix('torch.')}"]
        for name, tensor in self.tensors.items():
            shape = "x".join(map(str, tensor.shape))
            shown = f" = {tensor.tolist()}" if tensor.numel() <= 12 else ""
            lines.append(f"    {name} {shape}{shown}")
        return "\n".join(lines)


@dataclass
class CheckResult:
    """What `check_rule` found; true if nothing is wrong and something was looked at.

    compared: cases in which both sides were computed; declined: those that the rule left alone
    approximate: cases in which an approximation says what to compute: nothing that it must equal,
        so these are not compared; `deviation` is what it changes, root mean square, at most, and
        where it declares an error of the logits, that was checked in `bounded` cases
    """

    rule: str
    ok: bool
    compared: int
    declined: int
    counterexample: Case | None = None
    error: float = 0.0
    approximate: int = 0
    bounded: int = 0
    deviation: float = 0.0
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        head = f"{self.rule}: {'ok' if self.ok else 'WRONG'}, {self.compared} cases compared"
        if self.approximate and self.ok:
            head = (f"{self.rule}: an approximation, not compared; in {self.approximate} cases it "
                    f"changes the result by at most {100 * self.deviation:.3g}% (root mean square)")
            head += (f", its logits are within the error that it declares in {self.bounded} of them"
                     if self.bounded else ", and declares no error")
        head += f", {self.declined} declined" if self.declined else ""
        head += f", at most {self.error:.2g} off float64" if self.ok and self.compared else ""
        if self.counterexample is not None:
            return "\n".join([head, "smallest counterexample:", str(self.counterexample)])
        return "\n".join([head, *self.notes])

    def raise_if_wrong(self) -> CheckResult:
        """Raise RuleError unless it is ok."""
        if not self.ok:
            raise RuleError(str(self))
        return self


def check_rule(rule: Any, *, cases: int = 60, seed: int = 0) -> CheckResult:
    """Compare what a rule computes with what it replaces, on drawn lengths, values and types.

    Args:
        rule: a rule class or object, the rule that `register_rewrite` returns, or the name of a
            registered one.
        cases: how many to draw.
        seed: of the draws.

    Raises:
        OptionError: it is no rule. A wrong rule is no error: see the result.
    """
    if isinstance(cases, bool) or not isinstance(cases, int) or cases < 1:
        raise OptionError(f"cases must be a number of 1 or more, got {cases!r}")
    from attnopt.passes.check_subjects import subject_of

    name, subject = subject_of(rule)
    generator = random.Random(seed)
    result = CheckResult(name, True, 0, 0)
    empty = 0
    for number in range(cases):
        variant = subject.variants[number % len(subject.variants)]
        sizes = _sizes(subject, generator, number)
        dtype = _DTYPES[number // len(subject.variants) % len(_DTYPES)]
        tensors = subject.draw(variant, sizes, seed + number)
        found = _compare(subject, variant, tensors, dtype)
        if found is None:
            result.declined += 1
        elif isinstance(found, Change):
            result.approximate += 1
            result.bounded += found.bounded
            result.deviation = max(result.deviation, found.deviation)
            empty += found.empty
        elif isinstance(found, float):
            result.compared += 1
            result.error = max(result.error, found if dtype is torch.float64 else 0.0)
        else:
            result.compared, result.ok = result.compared + 1, False
            result.counterexample = _smallest(
                subject, variant, sizes, seed + number, dtype, tensors, found)
            return result
    if empty:
        result.notes.append(f"it leaves rows without a key in {empty} cases: a site where that "
                            "happens is kept as it was")
    if not result.compared and not result.approximate:
        result.ok = False
        result.notes.append("it took none of the cases: nothing was checked")
    return result


def _sizes(subject: Subject, generator: random.Random, number: int) -> dict[str, int]:
    if number % 5 == 4:  # all equal
        return dict.fromkeys(subject.words, generator.choice(_LENGTHS[1:8]))
    sizes = {word: generator.choice(_LENGTHS) for word in subject.words}
    if number % 7 == 3 and subject.may_be_empty:
        sizes[generator.choice(subject.may_be_empty)] = 0
    return sizes


def _compare(subject: Subject, variant: Any, tensors: Mapping[str, Tensor], dtype: torch.dtype
             ) -> float | str | Change | None:
    """The largest error, what is wrong, what an approximation changes, or None where the rule
    declines."""
    from attnopt.passes.custom import fault
    from attnopt.passes.verify import judge

    exact = dict(tensors)
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    exact = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    try:
        original, reference = (subject.expected(variant, x) for x in (given, exact))
    except RuntimeError:
        return None  # the author's own code does not take these lengths
    try:
        new = subject.got(variant, given)
    except RuleError as error:
        return str(error)
    except Exception as error:
        return fault(error)
    if new is None:
        return None
    if isinstance(new, Inexact):
        return _change(new, reference)
    if not isinstance(new, Tensor) or new.shape != reference.shape:
        got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
        return f"the result must be of shape {tuple(reference.shape)}, got {got}"
    if new.numel() == 0:
        return 0.0
    ok, off, own, bound = judge(new.to(original.dtype), original, reference)
    if not ok and off is not None and dtype is not torch.float64:
        ok = off <= 4 * bound  # both round, each in its own order
    if not ok and off is not None and dtype is torch.float64:
        ok = off <= 1e-10 * max(1.0, float(reference.nan_to_num(0, 0, 0).abs().max()))
    if ok:
        return off or 0.0
    if off is None:
        return "the result has NaN or inf where the original has none, or the reverse"
    return f"the result is off by {off:.3g}, the original by {own:.3g}, allowed are {bound:.3g}"


def _change(new: Inexact, reference: Tensor) -> Change | str:
    if new.result.shape != reference.shape:
        return (f"the result must be of shape {tuple(reference.shape)}, got "
                f"{tuple(new.result.shape)}")
    if new.off is not None and new.declared is not None and (
            new.off > new.declared * (1 + 1e-3) + 1e-5):
        return f"the logits are off by {new.off:.3g}, the rule declares {new.declared:.3g}"
    empty = bool((new.result.isnan() & ~reference.isnan()).any())
    both = new.result.isfinite() & reference.isfinite()
    truth, off = reference[both].double(), (new.result.double() - reference)[both]
    size = float(truth.square().mean().sqrt()) if truth.numel() else 0.0
    change = float(off.square().mean().sqrt()) / size if size else 0.0
    return Change(change, new.declared is not None, empty)


# -- shrinking -------------------------------------------------------------------------------------
def _smallest(subject: Subject, variant: Any, sizes: dict[str, int], seed: int, dtype: torch.dtype,
              tensors: dict[str, Tensor], reason: str) -> Case:
    """The case with lengths, then values, made smaller while it fails."""
    best = Case(subject.name_of(variant), sizes, dtype, tensors, reason)

    def fails(case_sizes: dict[str, int], values: dict[str, Tensor], kind: torch.dtype) -> bool:
        found = _compare(subject, variant, values, kind)
        if isinstance(found, str):
            best.sizes, best.tensors, best.dtype, best.reason = case_sizes, values, kind, found
        return isinstance(found, str)

    if dtype is not torch.float64:
        fails(sizes, tensors, torch.float64)
    changed = True
    while changed:
        changed = False
        equal = [[w for w in subject.words if best.sizes[w] == n] for n in set(best.sizes.values())]
        for words in (*equal, *([w] for w in subject.words)):
            for length in range(1, max(best.sizes[w] for w in words)):
                smaller = {**best.sizes, **dict.fromkeys(words, length)}
                if sum(smaller.values()) >= sum(best.sizes.values()):
                    continue
                if any(fails(smaller, subject.draw(variant, smaller, seed + i), best.dtype)
                       for i in range(2)):
                    changed = True
                    break
    simpler: tuple[Callable[[Tensor], Tensor], ...] = (
        torch.zeros_like, torch.ones_like, lambda t: t.round() if t.is_floating_point() else t,
        lambda t: (t * 4).round() / 4 if t.is_floating_point() else t)
    for name in list(best.tensors):
        for change in simpler:
            if fails(best.sizes, {**best.tensors, name: change(best.tensors[name])}, best.dtype):
                break
    return best
