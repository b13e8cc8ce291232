"""A replacement called with a site's tensors, in the layouts that its pattern's arguments have.

A site gives tensors with the dimensions of its Spec, (*L, Q, D), (*L, K, D), (*L, K, Dv) and
(*L, Q, K), of length 1 where they do not vary. Each is expanded to the dimensions that the
pattern's argument has, permuted, and flattened where the argument has several in one; the result
goes the other way. Leading axes that the site has beyond the pattern's are part of its first one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnopt.ir.spec import leading_axes
from attnopt.rewrites import replacement_arguments
from attnopt.rules import Decline, Region

if TYPE_CHECKING:
    from attnopt.passes.patterns import PatternRule, Read

_NAMES = ("query", "key", "value")


def rebound(rule: PatternRule, read: Read, region: Region, names: Mapping[str, str],
            turned: Collection[str]) -> Callable[..., Any]:
    """The function of the site's tensors that calls the replacement; or Decline.

    turned: slots of masks that the site has the other way round
    """
    leading = len(region.shapes[0]) - 2
    extra = leading - read.leading
    if extra > 0 and read.leading == 0:
        raise Decline(f"{leading} leading axes, its pattern has none")
    _check(rule, read, region, names, extra)

    def compute(query: Any, key: Any, value: Any, **operands: Any) -> Any:
        own = {"query": query, "key": key, "value": value,
               **{s: ~t if s in turned else t for s, t in operands.items()}}
        lead = [_longest([t.shape[i] for t in (query, key, value)]) for i in range(leading)]
        whole = _folded(lead, extra)
        lengths = {"query": [*whole, query.shape[-2], query.shape[-1]],
                   "key": [*whole, key.shape[-2], key.shape[-1]],
                   "value": [*whole, value.shape[-2], value.shape[-1]]}
        scores = [*whole, query.shape[-2], key.shape[-2]]
        given = {}
        for name, (slot, places) in read.arguments.items():
            tensor = own[slot if slot in _NAMES else names[slot]]
            given[name] = _arranged(
                tensor, places, lead, lengths.get(slot, scores), extra)
        out = rule.replacement(
            **replacement_arguments(rule.replacement, read.tags, given))
        return _back(out, read.result, lead, [*whole, query.shape[-2], value.shape[-1]], extra)

    return compute


def _check(rule: PatternRule, read: Read, region: Region, names: Mapping[str, str],
           extra: int) -> None:
    """Does every tensor of the site vary only where its argument does, and do lengths agree?"""
    axes = {name: (*leading_axes(len(shape) - 2), "q", "k")
            for name, shape in zip(_NAMES, region.shapes, strict=True)}
    leading = len(region.shapes[0]) - 2
    all_axes = (*leading_axes(leading), "q", "k")
    query, key, value = region.shapes
    lead = [max(n) for n in zip(query[:-2], key[:-2], value[:-2], strict=True)]
    known: dict[str, int] = {}
    for name, (slot, places) in read.arguments.items():
        held = {p for dim in places for p in dim}
        if slot in _NAMES:
            shape = region.shapes[_NAMES.index(slot)]
            varies = {i for i in range(leading) if shape[i] != 1}
            sizes = [*_folded(lead, extra), *shape[-2:]]
        else:
            operand = region.spec.operand(names[slot])
            if operand.axes is None:
                raise Decline(f"{operand.slot} is a table")
            varies = {all_axes.index(a) for a in operand.axes}
            sizes = [*_folded(lead, extra), query[-2], key[-2]]
        for i in varies:
            place = i - extra if i >= leading else max(0, i - extra)
            if place not in held and sizes[place] != 1:
                raise Decline(f"{slot} varies along {axes['query'][i]}, {name} of its pattern "
                              "does not")
        for word, dims in zip(rule.inputs[name], places, strict=True):
            size = 1
            for place in dims:
                size *= sizes[place]
            if word != "1" and dims and known.setdefault(word, size) != size:
                raise Decline(f"{word} is one length in its pattern, here {known[word]} and {size}")


def _longest(sizes: Sequence[Any]) -> Any:
    """The length that the others broadcast to."""
    return next((n for n in sizes if not isinstance(n, int) or n != 1), 1)


def _folded(lead: Sequence[Any], extra: int) -> list[Any]:
    """Leading lengths as the pattern counts them."""
    if extra <= 0:
        return [1] * -extra + list(lead)
    first: Any = 1
    for n in lead[:extra + 1]:
        first = first * n
    return [first, *lead[extra + 1:]]


def _arranged(tensor: Any, places: Sequence[Sequence[int]], lead: Sequence[Any],
              lengths: Sequence[Any], extra: int) -> Any:
    held = {p for dim in places for p in dim}
    while tensor.dim() < len(lead) + 2:
        tensor = tensor.unsqueeze(0)
    if extra > 0:
        if 0 in held:
            tensor = tensor.expand(*lead[:extra + 1], *tensor.shape[extra + 1:])
        tensor = tensor.flatten(0, extra)
    for _ in range(-extra):
        tensor = tensor.unsqueeze(0)
    tensor = tensor.expand(*(n if i in held else -1 for i, n in enumerate(lengths)))
    for place in reversed(range(len(lengths))):
        if place not in held:
            tensor = tensor.select(place, 0)
    left = [p for p in range(len(lengths)) if p in held]
    tensor = tensor.permute([left.index(p) for dim in places for p in dim])
    at = 0
    for dim in places:
        if not dim:
            tensor = tensor.unsqueeze(at)
        elif len(dim) > 1:
            tensor = tensor.flatten(at, at + len(dim) - 1)
        at += 1
    return tensor


def _back(out: Any, places: Sequence[Sequence[int]], lead: Sequence[Any],
          lengths: Sequence[Any], extra: int) -> Any:
    if out.dim() != len(places):
        raise Decline(f"its replacement must give {len(places)} dimensions, got {out.dim()}")
    flat = [p for dim in places for p in dim]
    out = out.reshape([lengths[p] for p in flat])
    for place in range(len(lengths)):
        if place not in flat:
            out, flat = out.unsqueeze(-1), [*flat, place]
    out = out.permute([flat.index(p) for p in range(len(lengths))])
    if extra > 0:
        return out.unflatten(0, lead[:extra + 1])
    for _ in range(-extra):
        out = out.squeeze(0)
    return out
