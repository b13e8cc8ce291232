"""A rewrite as two plain torch functions: what the author computes, and what to compute instead.

    attnopt.register_rewrite(
        pattern, replacement, {"q": "b h s d", "k": "b h t d", "v": "b h t e"})

The pattern is captured and read as a model is, so that it stands for every spelling with the same
normal form: another layout of the tensors, another place of the scale, casts, operands the other
way round. The replacement gets the site's tensors under the names and in the layouts of the
pattern's arguments. A pattern that is one attention over its arguments is compared with the Specs
of sites (`attnopt.passes.patterns`). Any other is compared term by term with the graph, before
sites are looked for (`attnopt.passes.subgraphs`): a norm and the projections behind it, a user's
own activation around an attention; it may have several results. It may consist of contractions,
sums, products, powers, reductions, softmaxes, norms and pointwise functions, and its arguments may
be any tensors of the model, parameters and intermediate results among them.

Lengths are named, one word for each dimension of an argument; equal words are equal lengths.
`one_of("tag", a=…, b=…)` in a pattern stands for either; a parameter of the replacement that is
called like the tag is told which one it was.
"""

from __future__ import annotations

import contextvars
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from attnopt.errors import OptionError
from attnopt.rules import register_rule

#: tag -> alternative while a pattern is read, and what was found of tags and their alternatives
_chosen: contextvars.ContextVar[dict[str, str] | None] = contextvars.ContextVar(
    "chosen", default=None)
_found: contextvars.ContextVar[dict[str, list[str]] | None] = contextvars.ContextVar(
    "found", default=None)


def one_of(tag: str, /, **alternatives: Callable[[], Any]) -> Any:
    """One of several sub-expressions of a pattern, each a function without arguments.

    Outside of a pattern that is being read the first one is computed.
    """
    if not alternatives or not all(map(callable, alternatives.values())):
        raise OptionError(f"the alternatives of {tag!r} must be functions, got {alternatives!r}")
    known = _found.get()
    if known is not None:
        known.setdefault(tag, list(alternatives))
    chosen = (_chosen.get() or {}).get(tag, next(iter(alternatives)))
    if chosen not in alternatives:
        raise OptionError(f"{tag!r} must be one of {', '.join(alternatives)}, got {chosen!r}")
    return alternatives[chosen]()


class choosing:
    """While it is entered, `one_of` takes these alternatives; `found` is what it has met."""

    def __init__(self, tags: Mapping[str, str]) -> None:
        self.tags, self.found = dict(tags), dict[str, list[str]]()

    def __enter__(self) -> choosing:
        self._tokens = _chosen.set(self.tags), _found.set(self.found)
        return self

    def __exit__(self, *_: object) -> None:
        _chosen.reset(self._tokens[0])
        _found.reset(self._tokens[1])


def combinations(found: Mapping[str, list[str]]) -> Iterator[dict[str, str]]:
    """Every choice of one alternative of each tag."""
    for names in itertools.product(*found.values()):
        yield dict(zip(found, names, strict=True))


def parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters."""
    return list(inspect.signature(function).parameters)


def replacement_arguments(replacement: Callable[..., Any],
                          tags: Mapping[str, str], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the replacement is called with: tensors by name, and the tags that it asks for."""
    return {name: given[name] if name in given else tags[name]
            for name in parameters(replacement) if name in given or name in tags}


def _dimensions(pattern: Callable[..., Any], inputs: Mapping[str, str]
                ) -> tuple[dict[str, list[str]], list[str]]:
    names = parameters(pattern)
    if not isinstance(inputs, Mapping) or set(inputs) != set(names):
        raise OptionError("inputs must name the dimensions of each argument of the pattern, "
                          f"{', '.join(names)}, got {inputs!r}")
    found, masks = {}, list[str]()
    for name in names:
        words = inputs[name].split() if isinstance(inputs[name], str) else []
        if words[:1] == ["bool"]:
            masks.append(words.pop(0) and name)
        longer = [w for w in words if w != "1"]
        if len(set(longer)) != len(longer) or not all(
                w.isidentifier() or w == "1" for w in words) or not words:
            raise OptionError(f"the dimensions of {name} must be distinct names such as 'b h s d', "
                              f"got {inputs[name]!r}")
        found[name] = words
    return found, masks


def register_rewrite(pattern: Callable[..., Any], replacement: Callable[..., Any],
                     inputs: Mapping[str, str], *, name: str | None = None, priority: int = 10,
                     register: bool = True) -> Any:
    """Compute `replacement` wherever a model computes what `pattern` does.

    Args:
        pattern: what to replace, as plain torch over tensor arguments: one attention, or any
            contractions, norms and pointwise functions; a tensor or a tuple of them.
        replacement: a function of some or all of these arguments by name, and of tags; it gives
            tensors of the same shapes.
        inputs: names of the dimensions of each argument, such as {"q": "b h s d"}; 1 for one of
            length 1, and "bool b 1 s t" for a mask.
        name: what the report calls it; the replacement's own name where nothing is said.
        priority: where it is tried among the rules; those of attnopt have 0.
        register: False to only make the rule, for `rules=[…]` and `check_rule`.

    Returns:
        The rule.

    Raises:
        OptionError: the dimensions or the parameters do not fit, or the name is taken.
    """
    from attnopt.passes.patterns import PatternRule

    for function, what in ((pattern, "pattern"), (replacement, "replacement")):
        if not callable(function):
            raise OptionError(f"the {what} must be a function, got {function!r}")
    given, masks = _dimensions(pattern, inputs)
    own = str(name or getattr(replacement, "__name__", "rewrite"))
    rule = PatternRule(pattern, replacement, given, masks, own, priority)
    return register_rule(rule) if register else rule
