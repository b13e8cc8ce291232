"""Rules: what they are given, what they answer, and the registry that holds them.

A rule looks at a Region and answers with a `Match` (the Spec to compute and the Schedule to compute
it by), or with a `Decline` that names the first condition that failed and the node that failed it.
A Decline is an answer, not an error: the report shows it. It is raised inside a rule and caught by
the pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnopt.errors import OptionError
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
    """

    spec: Spec
    schedule: Schedule
    predicted_speedup: float | None = None
    memory: str = ""


class Rule:
    """One rewrite rule. Subclasses set `name`, say in `recognizes` what they take, and match."""

    name: str = ""
    recognizes: str = ""
    #: of the sites that it is for: "attention" or "sampling"
    kind: str = "attention"

    def match(self, region: Region) -> Match:
        """Answer with a Match, or raise Decline(reason, node)."""
        raise Decline(f"{self.name} does not match anything")


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
    """Rules in the order in which they are tried."""

    rules: list[Rule] = field(default_factory=list)

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def add(self, rule: Rule) -> Rule:
        if any(known.name == rule.name for known in self.rules):
            raise OptionError(f"rule names must be distinct, got {rule.name!r} twice")
        self.rules.append(rule)
        return rule

    def pick(self, wanted: Sequence[Any] | None) -> list[Rule]:
        """The rules to use: all, or those named or given."""
        if wanted is None:
            return list(self.rules)
        names = {rule.name: rule for rule in self.rules}
        picked = []
        for item in wanted:
            if isinstance(item, str) and item not in names:
                raise OptionError(f"a rule must be one of {', '.join(names)}, got {item!r}")
            picked.append(names[item] if isinstance(item, str) else item)
        return picked
