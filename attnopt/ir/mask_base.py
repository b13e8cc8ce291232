"""The algebra of masks: the base of all nodes, `&`, `|`, `~` and the mask that keeps everything.

What comes out of a combination is flat, free of duplicates and in a fixed order, so that equal
combinations are equal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

if TYPE_CHECKING:
    from attnopt.ir.mask_picture import Picture

Q, K = E.index("q"), E.index("k")
#: the keys that `Mask.keeps` is asked about: the first one, and the one at the row's own place
FIRST, DIAGONAL = E.const(0), Q


@dataclass(frozen=True)
class Mask:
    """Base of all nodes. A node says what it keeps in `_build`."""

    name: ClassVar[str] = ""
    #: axes along which operands that it loads by broadcasting vary
    loaded_axes: ClassVar[frozenset[str]] = frozenset()

    def _build(self) -> Expr:
        raise NotImplementedError

    @functools.cached_property
    def _predicate(self) -> Expr:
        return self._build()

    def predicate(self) -> Expr:
        """The bool Expr that is true where the key is kept."""
        return self._predicate

    @property
    def slots(self) -> frozenset[str]:
        """Names of the operands that it loads."""
        return self.predicate().slots

    @property
    def axes(self) -> frozenset[str]:
        """Names of the axes along which it varies, as far as the mask itself tells."""
        return self.predicate().indices.union(*(m.loaded_axes for m in self.walk()))

    def children(self) -> tuple[Mask, ...]:
        return ()

    def walk(self) -> list[Mask]:
        """This node and all masks inside it."""
        return [self, *(m for child in self.children() for m in child.walk())]

    def __and__(self, other: Mask) -> Mask:
        return _join(And, (self, other))

    def __or__(self, other: Mask) -> Mask:
        return _join(Or, (self, other))

    def __invert__(self) -> Mask:
        return self.mask if isinstance(self, Not) else Not(self)

    def __bool__(self) -> bool:
        raise TypeError(f"the truth of mask {self} is not known; compare with == or `is ALL`")

    def keeps(self, key: Expr, assume: Sequence[Expr] = ()) -> bool:
        """Proves that every query row keeps the key at index `key`; False where it cannot."""
        from attnopt.ir.facts import prove

        return prove(self.predicate().replace({K: key}), assume) is True

    def row_always_kept(self, query_within_keys: bool = False) -> bool:
        """Proves that every row keeps a key, for all sizes Q, K >= 1; False where it cannot.

        `query_within_keys` adds the assumption Q <= K, under which the diagonal exists.
        """
        if not query_within_keys:
            return self.keeps(FIRST)
        assume = (E.size("q") <= E.size("k"),)
        return self.keeps(FIRST, assume) or self.keeps(DIAGONAL, assume)

    def describe(self) -> str:
        """A short phrase for the report."""
        return self.name.replace("_", " ")

    def to_dense(self, queries: int, keys: int, leading: Sequence[int] = (),
                 operands: Mapping[str, torch.Tensor] | None = None) -> torch.Tensor:
        """The bool tensor (*leading, queries, keys); for tests and small problems only."""
        from attnopt.ir.evaluate import Env, evaluate

        shape = (*leading, queries, keys)
        kept = evaluate(self.predicate(), Env(shape, operands or {}))
        return torch.as_tensor(kept, dtype=torch.bool).expand(shape).clone()

    def picture(self, queries: int, keys: int | None = None, **options: Any) -> Picture:
        """Its tiles at these lengths, to be printed or shown, with density and waste; the options
        are those of `attnopt.ir.mask_picture.picture`."""
        from attnopt.ir.mask_picture import picture

        return picture(self, queries, keys, **options)

    def __str__(self) -> str:
        fields = [write_field(getattr(self, f.name)) for f in dataclasses.fields(self)]
        return f"({' '.join([self.name, *fields])})" if fields else self.name


def wrap_fields(mask: Mask, *names: str) -> None:
    """Turn plain numbers in the named fields into Expr, tuples into tuples of Expr."""
    for name in names:
        given = getattr(mask, name)
        new = tuple(map(E.wrap, given)) if isinstance(given, tuple | list) else E.wrap(given)
        object.__setattr__(mask, name, new)


def tuple_fields(mask: Mask, *names: str) -> None:
    """Turn lists and single values in the named fields into tuples."""
    for name in names:
        given = getattr(mask, name)
        object.__setattr__(
            mask, name, tuple(given) if isinstance(given, tuple | list) else (given,))


def write_field(content: Any) -> str:
    """A field of a node in the text form."""
    if isinstance(content, tuple):
        return f"[{' '.join(map(write_field, content))}]"
    return str(content).lower() if content is None or isinstance(content, bool) else str(content)


@dataclass(frozen=True)
class All(Mask):
    """Every key."""

    name = "all"

    def _build(self) -> Expr:
        return E.TRUE

    def __str__(self) -> str:
        return "all"

    def describe(self) -> str:
        return "none"


@dataclass(frozen=True)
class And(Mask):
    """Kept by all; build it with `&`."""

    masks: tuple[Mask, ...]
    name = "and"

    def children(self) -> tuple[Mask, ...]:
        return self.masks

    def _build(self) -> Expr:
        return functools.reduce(Expr.__and__, (m.predicate() for m in self.masks))

    def keeps(self, key: Expr, assume: Sequence[Expr] = ()) -> bool:
        return all(m.keeps(key, assume) for m in self.masks)

    def describe(self) -> str:
        return " & ".join(inside(m) for m in self.masks)


@dataclass(frozen=True)
class Or(Mask):
    """Kept by any; build it with `|`."""

    masks: tuple[Mask, ...]
    name = "or"

    def children(self) -> tuple[Mask, ...]:
        return self.masks

    def _build(self) -> Expr:
        return functools.reduce(Expr.__or__, (m.predicate() for m in self.masks))

    def keeps(self, key: Expr, assume: Sequence[Expr] = ()) -> bool:
        return any(m.keeps(key, assume) for m in self.masks)

    def describe(self) -> str:
        return " | ".join(inside(m) for m in self.masks)


@dataclass(frozen=True)
class Not(Mask):
    """What `mask` drops; build it with `~`."""

    mask: Mask
    name = "not"

    def children(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def _build(self) -> Expr:
        return ~self.mask.predicate()

    def describe(self) -> str:
        return "nothing kept" if self.mask == ALL else f"not {inside(self.mask)}"


ALL = All()
NONE = Not(ALL)


def inside(mask: Mask) -> str:
    text = mask.describe()
    return f"({text})" if isinstance(mask, And | Or) else text


def _opposed(mask: Mask, kind: type[And] | type[Or], flat: Container[Mask]) -> bool:
    """`mask` is the negation of others that are there."""
    if not isinstance(mask, Not):
        return False
    parts = mask.mask.masks if isinstance(mask.mask, kind) else (mask.mask,)
    return all(m in flat for m in parts)


def _join(kind: type[And] | type[Or], masks: Sequence[Mask]) -> Mask:
    """And / Or of masks: flat, without duplicates, in the order of their text."""
    neutral, absorbing = (ALL, NONE) if kind is And else (NONE, ALL)
    flat: dict[Mask, None] = {}
    for mask in masks:
        if mask.predicate().op == "const":
            mask = ALL if mask.predicate().value else NONE
        flat.update(dict.fromkeys(mask.masks if isinstance(mask, kind) else (mask,)))
    flat.pop(neutral, None)
    if absorbing in flat or any(_opposed(m, kind, flat) for m in flat):
        return absorbing
    ordered = sorted(flat, key=str)
    if not ordered:
        return neutral
    return ordered[0] if len(ordered) == 1 else kind(tuple(ordered))
