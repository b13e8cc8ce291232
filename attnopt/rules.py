"""Rules: what they are given, what they answer, and the registry that holds them.

A rule looks at a Region and answers with a `Match` (the Spec to compute and the Schedule to compute
it by), or with a `Decline` that names the first condition that failed and the node that failed it.
A Decline is an answer, not an error: the report shows it. It is raised inside a rule and caught by
the pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from attnopt.errors import OptionError, RuleError
from attnopt.ir.mask_base import Mask
from attnopt.ir.spec import Schedule, Spec


class Decline(Exception):
    """A rule says no: `reason` is one sentence for the user, `node` the fx node it is about."""

    def __init__(self, reason: str, node: Any = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.node = node

    def at(self, node: Any) -> Decline:
        """The same answer, about `node` unless it named one already."""
        if self.node is None:
            self.node = node
        return self


@dataclass(frozen=True)
class Region:
    """What a rule sees of a site.

    spec:      its normal form, with the structure that was proven
    authored:  what the author's own code is: "sdpa" for one fused call, "composition" otherwise
    gained:    what the normal form already saves: masks proven away, repetitions of K and V
    lengths:   (leading axes…, Q, K, D, Dv); ints, or symbolic expressions
    dtypes:    of query, key and value
    training:  the model was captured in training mode
    operand_grad: an operand depends on a parameter
    shapes:    of query, key and value as the Spec has them, at the lengths of the example inputs
    fixed:     these are the shapes of every call
    lowerings: those that the user allows, of "aten", "cpp", "triton"
    inlined:   the same with operands that are index arithmetic computed, for kernels that can
    saved:     elements of the tensors that are then not made, shared ones by the site's share
    copies:    of a local attention: how many groups of queries the author copies keys for, per
               leading index, and how many keys for each
    approximate: the user asked for fewer keys than the model sees: it need not pay
    prefer:    "speed", or "memory": what holds no tensor of queries x keys need not pay
    rank:      columns of the low-rank terms of `inlined`
    biases:    values (H or 1, Q, K) of biases by slot that depend on no input, for approximations
    tables:    operands of the mask by slot as they are on the example inputs, for costs alone
    rows:      share of the rows that gates behind the attention are expected to leave
    """

    spec: Spec
    authored: str
    gained: tuple[str, ...]
    lengths: tuple[Any, ...]
    dtypes: tuple[Any, ...]
    device: str
    training: bool
    operand_grad: bool
    shapes: tuple[tuple[int, ...], ...] = ()
    fixed: bool = True
    lowerings: tuple[str, ...] = ("aten", "cpp", "triton")
    inlined: Spec | None = None
    saved: tuple[float, ...] = ()
    copies: tuple[int, int] | None = None
    approximate: bool = False
    prefer: str = "speed"
    rank: int = 0
    biases: Mapping[str, Any] = field(default_factory=dict, compare=False)
    tables: Mapping[str, Any] = field(default_factory=dict, compare=False)
    rows: float = 1.0


@dataclass(frozen=True)
class Match:
    """A rule says yes: compute `spec` by `schedule`.

    memory: with `prefer="memory"`, what is held of queries x keys and what that costs
    seconds: of one call, as predicted
    compute: a function (query, key, value, and the operands by slot) -> result, all as the Spec
        has them, that is traced into the graph in place of `schedule`
    """

    spec: Spec
    schedule: Schedule = field(default_factory=Schedule)
    predicted_speedup: float | None = None
    memory: str = ""
    seconds: float | None = None
    compute: Callable[..., Any] | None = field(default=None, compare=False)


class Rule:
    """One rewrite rule. Subclasses set `name`, say in `recognizes` what they take, and match.

    A rule may also define `rewrite(match)`, which is asked next and answers with a Spec (computed
    as the other rules choose), a Rewrite or a function (traced into the graph), or a Decline.
    Rules of higher priority are tried first, those of the same in the order of registration.
    An answer that no longer reads an operand of the region (a mask that is an input, say) is taken
    only from a rule that says in `assumes` what it knows of it; the report repeats that.
    """

    name: str = ""
    recognizes: str = ""
    assumes: str = ""
    priority: int = 0
    #: of the sites that it is for: "attention" or "sampling"
    kind: str = "attention"

    def match(self, region: Region) -> Match:
        """Answer with a Match, or raise Decline(reason, node)."""
        raise Decline(f"{self.name} does not match anything")

    def rewrite(self, match: Match) -> Any:
        """What to put in for a match: the match itself, unless a rule says more."""
        return match


@dataclass(frozen=True)
class BlockTable:
    """A bool table over blocks of queries and keys that the rewritten graph makes.

    text:  the pattern with its parameters, as `kernels.block_maps` reads it
    reads: whether it is chosen from the query and the key, for each leading entry
    """

    text: str
    reads: bool = False


@dataclass(frozen=True, eq=False)
class Factors:
    """A bias (H or 1, Q, K) that is nearly a product.

    query, key: float32 (H or 1, Q, R) and (H or 1, K, R)
    error: largest difference of a logit, up to a constant per row
    """

    query: Any
    key: Any
    error: float


class Approximation(Rule):
    """Fewer keys than the model's own attention sees, or a bias that is nearly its own: not exact,
    so never used unless a user puts an instance into `rules=`. It changes what is computed; the
    other rules then say how.

    Subclasses set `name` and `path`, a pattern of the module paths that it is for, and define
    `reduce`.
    """

    path: str = "*"

    def match(self, region: Region) -> Match:
        raise Decline(f"{self.name} says what to compute, not how")

    def reduce(self, region: Region) -> tuple[Mask, Mapping[str, BlockTable | Factors]]:
        """The keys to keep, of those that the region's own mask keeps, and by slot the tables that
        this mask loads and the factors of biases (`Region.biases`); or raise Decline(reason)."""
        raise NotImplementedError

    def describe(self) -> str:
        """The rule with its parameters, for the report."""
        own = {name: given for name, given in vars(self).items() if name != "path"}
        return f"{self.name} ({', '.join(f'{name} {given}' for name, given in own.items())})"


@dataclass
class Registry:
    """Rules in the order in which they are tried: by priority, then by registration."""

    rules: list[Rule] = field(default_factory=list)

    def __iter__(self) -> Iterator[Rule]:
        return iter(sorted(self.rules, key=lambda rule: -getattr(rule, "priority", 0)))

    def add(self, rule: Rule) -> Rule:
        if any(known.name == rule.name for known in self.rules):
            raise OptionError(f"rule names must be distinct, got {rule.name!r} twice")
        self.rules.append(rule)
        return rule

    def remove(self, name: str) -> Rule:
        """Take a rule out again, by its name."""
        for i, rule in enumerate(self.rules):
            if rule.name == name:
                return self.rules.pop(i)
        known = ", ".join(rule.name for rule in self)
        raise OptionError(f"a rule must be one of {known}, got {name!r}")

    def pick(self, wanted: Sequence[Any] | None) -> list[Rule]:
        """The rules to use: all that are exact, or those named or given. A name that is not
        registered is looked for among the entry points of the group "attnopt.rules"."""
        if wanted is None:
            return [rule for rule in self if not isinstance(rule, Approximation)]
        names = {rule.name: rule for rule in self}
        return [item if not isinstance(item, str) else names[item] if item in names
                else installed(item, names) for item in wanted]


GROUP = "attnopt.rules"


def installed(name: str, known: Iterable[str] = ()) -> Rule:
    """The rule that an installed package offers by this name. Nothing is loaded but by name."""
    for entry in entry_points(group=GROUP, name=name):
        try:
            found = entry.load()
            return checked(found() if isinstance(found, type) else found)
        except Exception as error:
            raise RuleError(f"the rule {name!r} of {entry.value} cannot be loaded: "
                            f"{type(error).__name__}: {error}") from error
    raise OptionError(f"a rule must be one of {', '.join(known)}, or an entry point of the group "
                      f"{GROUP!r}, got {name!r}")


def checked(rule: Any) -> Rule:
    """The rule itself, if it is one."""
    name = getattr(rule, "name", "")
    if not callable(getattr(rule, "match", None)):
        raise OptionError(f"a rule must have a method match(region), got {rule!r}")
    if not isinstance(name, str) or not name:
        raise OptionError(f"the name of a rule must be a text, got {name!r} of {rule!r}")
    if isinstance(priority := getattr(rule, "priority", 0), bool) or not isinstance(priority, int):
        raise OptionError(f"the priority of {name} must be an int, got {priority!r}")
    found: Rule = rule
    return found


# -- what a user calls -----------------------------------------------------------------------------
#: every rule that is used without being named; the rules of attnopt are in it like anybody's
REGISTRY = Registry()


def register_rule(rule: Any = None, *, priority: int | None = None, replace: bool = False
                  ) -> Any:
    """Register a rule: a decorator of a class with `match`, or a call with a class or object.

    Args:
        rule: a class that can be made without arguments, or a rule object. It needs no base
            class; `name` is the class's own name where it sets none.
        priority: where it is tried; rules of attnopt have 0, this is 10 where nothing is said.
        replace: take the place of a rule of the same name, for notebooks.

    Raises:
        OptionError: it is no rule, or its name is taken.
    """
    if rule is None:
        return lambda given: register_rule(given, priority=priority, replace=replace)
    made = rule() if isinstance(rule, type) else rule
    if not getattr(made, "name", "") and hasattr(made, "match"):
        made.name = type(made).__name__
    checked(made)
    if priority is not None:
        made.priority = priority
    elif "priority" not in {**vars(type(made)), **vars(made)}:
        made.priority = 10
    checked(made)
    _complete()
    if replace and any(known.name == made.name for known in REGISTRY):
        REGISTRY.remove(made.name)
    REGISTRY.add(made)
    return rule


def unregister(name: str) -> None:
    """Take a registered rule out, by its name; models that are optimised already keep it."""
    _complete()
    REGISTRY.remove(name)


def registered() -> list[Rule]:
    """All registered rules, in the order in which they are tried."""
    _complete()
    return list(REGISTRY)


def _complete() -> None:
    """The rules of attnopt are registered when they are imported."""
    import_module("attnopt.passes.rules")
