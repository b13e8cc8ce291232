"""Options: what the user asked of `optimize`, checked once and handed to every pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from attnopt.errors import OptionError
from attnopt.rules import REGISTRY, Approximation, registered

PREFERENCES = ("speed", "memory")
LOWERINGS = ("aten", "cpp", "triton")


@dataclass(frozen=True)
class Options:
    """The keyword options of `attnopt.optimize`.

    rules:       None for all registered rules, or the names or rule objects to use
    only:        None, or a pattern of module paths ("encoder.*") outside which nothing is rewritten
    approximate: None, or a tolerance by kind. "output": what an approximation among the rules may
                 change of a site's result, root mean square over root mean square
    prefer:      "speed", or "memory": what holds least in tensors of queries x keys
    verify:      compare every rewrite with the original in float64
    backend:     "auto", or the lowerings allowed, one of or several of "aten", "cpp", "triton"
    freeze:      what depends on parameters and buffers alone is computed once, and guarded
    strict:      raise if anything is left as it was
    """

    rules: tuple[Any, ...] | None = None
    only: str | None = None
    approximate: Mapping[str, float] | None = None
    prefer: str = "speed"
    verify: bool = True
    backend: str | tuple[str, ...] = "auto"
    freeze: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        for name in ("verify", "freeze", "strict"):
            if not isinstance(getattr(self, name), bool):
                raise OptionError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.only is not None and not (isinstance(self.only, str) and self.only):
            raise OptionError(
                f"only must be a pattern of module paths such as 'encoder.*', got {self.only!r}")
        if self.prefer not in PREFERENCES:
            raise OptionError(f"prefer must be 'speed' or 'memory', got {self.prefer!r}")
        object.__setattr__(self, "rules", _rules(self.rules))
        object.__setattr__(self, "approximate", _tolerances(self.approximate))
        object.__setattr__(self, "backend", _backend(self.backend))

    @property
    def lowerings(self) -> tuple[str, ...]:
        """The lowerings that may be used."""
        if self.backend == "auto":
            return LOWERINGS
        return (self.backend,) if isinstance(self.backend, str) else self.backend

    @property
    def approximations(self) -> tuple[Approximation, ...]:
        """The rules of the user that are not exact."""
        return tuple(r for r in self.rules or () if isinstance(r, Approximation))

    @property
    def exact_rules(self) -> tuple[Any, ...] | None:
        """The other rules, None for all registered ones."""
        others = tuple(r for r in self.rules or () if not isinstance(r, Approximation))
        return others or (None if self.rules is None or self.approximations else ())

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Options from keyword arguments; an unknown name is an OptionError."""
        known = [f.name for f in fields(cls)]
        unknown = [name for name in given if name not in known]
        if unknown:
            raise OptionError(f"an option must be one of {', '.join(known)}, got {unknown[0]!r}")
        return cls(**given)


def _rules(given: Any) -> tuple[Any, ...] | None:
    if given is None:
        return None
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise OptionError(f"rules must be a list of rules or their names, got {given!r}")
    for rule in given:
        if not isinstance(rule, str) and not hasattr(rule, "match"):
            raise OptionError(f"a rule must be a name or have a match method, got {rule!r}")
    known = {rule.name: rule for rule in registered()}
    picked = REGISTRY.pick(given)
    return tuple(item if isinstance(item, str) and item in known
                 and not isinstance(rule, Approximation) else rule
                 for item, rule in zip(given, picked, strict=True))


def _tolerances(given: Any) -> dict[str, float] | None:
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise OptionError(
            f"approximate must be None or a mapping such as {{'logits': 1e-3}}, got {given!r}")
    for name, bound in given.items():
        number = isinstance(bound, (int, float)) and not isinstance(bound, bool)
        if not isinstance(name, str) or not number or not (0 <= bound < math.inf):
            raise OptionError("approximate must map names to finite tolerances of 0 or more, "
                              f"got {name!r}: {bound!r}")
    return dict(given)


def _backend(given: Any) -> str | tuple[str, ...]:
    names = (given,) if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not names:
        raise OptionError(f"backend must be 'auto' or one of {', '.join(LOWERINGS)}, got {given!r}")
    if names == ("auto",):
        return "auto"
    for name in names:
        if name not in LOWERINGS:
            raise OptionError(
                f"backend must be 'auto' or one of {', '.join(LOWERINGS)}, got {name!r}")
    return given if isinstance(given, str) else tuple(given)
