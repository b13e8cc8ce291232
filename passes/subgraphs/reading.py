"""A pattern that is no single attention, read as the terms of its results.

It is captured at lengths of its own. Where its numbers depend on lengths (a scale d^-1/2), it is
read once more at those of each place of the model that it fits otherwise.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.passes.normalize import functional_view, is_tensor, op_name
from attnopt.passes.recognize.axes import Layout, fresh, shape_of
from attnopt.passes.recognize.program import Program
from attnopt.passes.subgraphs.terms import Constant, Item, Ref, Term, expand
from attnopt.rewrites import choosing, combinations
from attnopt.rules import Decline

if TYPE_CHECKING:
    from attnopt.ir.captured import Captured
    from attnopt.passes.patterns import PatternRule

_FIRST, _SECOND = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31), (3, 5, 7, 11, 13, 17, 19, 23, 29, 31,
                                                              37)
_MOST_TERMS = 2000


@dataclass(frozen=True, eq=False)
class Pattern:
    """roots: each result with its layout; names: of the arguments; sized: numbers of it depend on
    lengths."""

    tags: dict[str, str]
    roots: tuple[Ref, ...]
    names: Mapping[fx.Node, str]
    constant: Constant
    sized: bool = False


def patterns_of(rule: PatternRule) -> list[Pattern]:
    """The pattern with every combination of its alternatives. Raises Decline."""
    first, second = (_lengths(rule, primes) for primes in (_FIRST, _SECOND))
    with choosing({}) as seen:
        rule.pattern(*rule.tensors(first))
    found = []
    for tags in combinations(seen.found):
        pattern, other = pattern_at(rule, tags, first), pattern_at(rule, tags, second)
        sized = _numbers(pattern) != _numbers(other)
        found.append(Pattern(tags, pattern.roots, pattern.names, pattern.constant, sized))
    return found


def _lengths(rule: PatternRule, primes: Sequence[int]) -> dict[str, int]:
    words = dict.fromkeys(w for dims in rule.inputs.values() for w in dims if w != "1")
    return dict(zip(words, itertools.chain(primes, itertools.count(41, 2)), strict=False))


def pattern_at(rule: PatternRule, tags: Mapping[str, str], lengths: Mapping[str, int]) -> Pattern:
    """The pattern captured at these lengths; those that are not given are its own."""
    from attnopt.passes.capture.export import capture
    from attnopt.passes.patterns import AsModule

    sizes = {**_lengths(rule, _FIRST), **lengths}
    with choosing(tags), torch.no_grad():
        captured = capture(AsModule(rule.pattern), tuple(rule.tensors(sizes))).captured
    view = functional_view(captured.graph)
    constant = constants_of(captured, Program(view, _kinds(captured), _value_of(captured)))
    given = [n for n in view.graph.nodes if n.op == "placeholder"
             and captured.origins[n.name].kind == "input"]
    names = dict(zip(given, rule.inputs, strict=True))
    output = next(n for n in view.graph.nodes if n.op == "output").args[0]
    results = output if isinstance(output, (tuple, list)) else (output,)
    if not results or not all(map(is_tensor, results)):
        raise Decline("its pattern must give a tensor, or several")
    roots = tuple(Ref(n, _named_layout(n)) for n in results)
    pattern = Pattern(dict(tags), roots, names, constant)
    used: set[str] = set()
    for term in _walk(pattern):
        if isinstance(term, Ref):
            if term.node not in names:
                raise Decline(f"its pattern has {op_name(term.node)}, which is not understood")
            used.add(names[term.node])
    if missing := [n for n in rule.inputs if n not in used]:
        raise Decline(f"its pattern must use every argument, got no {missing[0]}")
    return pattern


def _named_layout(node: fx.Node) -> Layout:
    return fresh(shape_of(node.meta["val"]))


def _walk(pattern: Pattern) -> list[Item]:
    """Every term of the pattern, opened."""
    found: list[Item] = []
    stack: list[Item] = list(pattern.roots)
    while stack:
        term = expand(stack.pop(), pattern.constant)
        found.append(term)
        if len(found) > _MOST_TERMS:
            raise Decline(f"its pattern has more than {_MOST_TERMS} terms")
        if isinstance(term, Term):
            stack.extend(term.args)
    return found


def _numbers(pattern: Pattern) -> list[Any]:
    return [t.value for t in _walk(pattern) if isinstance(t, Term) and t.value]


# -- constants -------------------------------------------------------------------------------------
def _kinds(captured: Captured) -> dict[str, str]:
    return {name: origin.kind for name, origin in captured.origins.items()}


def _value_of(captured: Captured) -> Any:
    def value_of(name: str) -> torch.Tensor | None:
        held = captured.origins[name].kind in ("buffer", "constant")
        return captured.values.get(name) if held else None
    return value_of


def program_of(captured: Captured) -> Program:
    """Facts about the functional view of a graph."""
    return Program(functional_view(captured.graph), _kinds(captured), _value_of(captured))


def constants_of(captured: Captured, program: Program) -> Constant:
    """The number that a node is everywhere, or None."""
    known: dict[fx.Node, Any] = {}

    def constant(node: fx.Node) -> Any:
        if node not in known:
            known[node] = program.constant(node)
        return known[node]

    return constant
