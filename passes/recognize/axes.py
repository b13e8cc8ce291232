"""Axes: which part of each tensor dimension plays which role.

Recognition walks backwards from the second contraction and gives every tensor a *layout*: for each
dimension the axes that it is made of, in order. A dimension of length 1 holds no axis (it
broadcasts); a dimension of B*H rows holds two once a reshape further back has shown the split.
Axes are discovered: one may later turn out to be a product of finer axes, and all layouts that
mention it see that. Lengths are ints or symbolic expressions; nothing is compared by name, so a
permuted or square layout cannot be taken for another (peers did: pytorch#195320).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch.utils._sympy.functions import FloorDiv

from attnopt.rules import Decline

_numbers = itertools.count()


class Axis:
    """One axis of a site. Identity matters, not length."""

    __slots__ = ("size", "parts", "number")

    def __init__(self, size: Any) -> None:
        self.size = length(size)
        self.parts: tuple[Axis, ...] | None = None
        self.number = next(_numbers)

    def become(self, parts: Iterable[Axis]) -> None:
        """This axis turns out to be the product of `parts` (which may be a single other axis)."""
        finer = resolve(parts)
        if self.parts is not None:
            if resolve((self,)) != finer:
                raise Decline("one axis is split in two ways that do not agree")
            return
        if finer == (self,):
            return
        if not same_length(product(finer), self.size):
            raise Decline(f"an axis of length {self.size} meets axes of {product(finer)}")
        self.parts = finer

    def __repr__(self) -> str:
        return f"axis{self.number}[{self.size}]"


Layout = tuple[tuple[Axis, ...], ...]


def meet(own: Layout, given: Layout) -> None:
    """Identify the axes of a result, one a dimension, with those that others already use."""
    for mine, theirs in zip(own, given, strict=True):
        if len(mine) == 1:
            mine[0].become(theirs)
        elif theirs:
            raise Decline("a broadcast dimension meets an axis")


def length(size: Any) -> Any:
    """An int, or the sympy expression of a symbolic size."""
    if isinstance(size, torch.SymInt):
        expr = size.node.expr
        if not expr.is_Symbol:
            expr = sympy.expand(expr.replace(FloorDiv, _divided))
        return int(expr) if expr.is_number else expr
    return size


def _divided(a: Any, b: Any) -> Any:
    """a // b without the rounding where b divides a as a polynomial."""
    ratio = sympy.cancel(a / b)
    return ratio if ratio.as_numer_denom()[1] == 1 else FloorDiv(a, b)


def shape_of(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(length(s) for s in tensor.shape)


def same_length(a: Any, b: Any) -> bool:
    return bool(a == b) or (not (isinstance(a, int) and isinstance(b, int))
                            and sympy.expand(a - b) == 0)


def product(axes: Iterable[Axis]) -> Any:
    total: Any = 1
    for axis in axes:
        total = total * axis.size
    return total


def quotient(a: Any, b: Any) -> Any | None:
    """a / b where it is a whole number for every size, else None."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b if b and a % b == 0 else None
    ratio = sympy.cancel(sympy.sympify(a) / b)
    numerator, denominator = ratio.as_numer_denom()
    if denominator != 1:
        return None
    return int(ratio) if ratio.is_number else ratio


def resolve(axes: Iterable[Axis]) -> tuple[Axis, ...]:
    """The finest known axes, in order; axes of length 1 vanish."""
    found: list[Axis] = []
    for axis in axes:
        if axis.parts is not None:
            found.extend(resolve(axis.parts))
        elif axis.size != 1:
            found.append(axis)
    return tuple(found)


def settle(layout: Layout) -> Layout:
    return tuple(map(resolve, layout))


def axes_of(layout: Layout) -> frozenset[Axis]:
    return frozenset(itertools.chain.from_iterable(settle(layout)))


def fresh(shape: Sequence[Any]) -> Layout:
    """A new axis for every dimension that is longer than 1."""
    return tuple(() if length(s) == 1 else (Axis(s),) for s in shape)


def broadcast(layout: Layout, shape: Sequence[Any]) -> Layout:
    """The layout of an operand of `shape` that is broadcast against a result with `layout`."""
    aligned = layout[len(layout) - len(shape):] if shape else ()
    return tuple(() if length(s) == 1 else axes for axes, s in zip(aligned, shape, strict=True))


def reshape(layout: Layout, shape: Sequence[Any]) -> Layout:
    """The layout that a tensor of `shape` has if a reshape of it has `layout`."""
    atoms = list(itertools.chain.from_iterable(settle(layout)))
    sizes = [length(s) for s in shape]
    if any(atom.size == 0 for atom in atoms):
        return _reshape_empty(atoms, sizes)
    found = [_take(atoms, wanted) for wanted in sizes]
    if atoms:
        raise Decline("a reshape adds an axis")
    return tuple(found)


def _take(atoms: list[Axis], wanted: Any, *, backwards: bool = False) -> tuple[Axis, ...]:
    """Take axes of `wanted` elements off the front of `atoms`, or off the back."""
    taken: list[Axis] = []
    have: Any = 1
    while not same_length(have, wanted):
        if not atoms:
            raise Decline("a reshape drops an axis")
        rest = quotient(wanted, have)
        atom = atoms.pop(-1 if backwards else 0)
        if rest is None or quotient(rest, atom.size) is None:
            beyond = None if rest is None else quotient(atom.size, rest)
            if beyond is None:
                raise Decline(f"a reshape cuts an axis of length {atom.size} at {wanted}")
            near, far = Axis(rest), Axis(beyond)
            atom.become((far, near) if backwards else (near, far))
            atoms.insert(len(atoms) if backwards else 0, far)
            atom = near
        taken.append(atom)
        have = product(taken)
    return tuple(reversed(taken) if backwards else taken)


def _reshape_empty(atoms: list[Axis], sizes: list[Any]) -> Layout:
    """`reshape` where one axis has no element, as an empty batch has none.

    Dimensions before the empty one are matched from the left and those behind it from the right,
    as for any other length of that axis; the empty one takes what is left.
    """
    if sizes.count(0) != 1 or [a.size for a in atoms].count(0) != 1:
        raise Decline("a reshape of several empty axes")
    at = sizes.index(0)
    before = [_take(atoms, wanted) for wanted in sizes[:at]]
    behind = [_take(atoms, wanted, backwards=True) for wanted in reversed(sizes[at + 1:])]
    if not same_length(product(atoms), 0):
        raise Decline("a reshape moves an empty axis")
    return (*before, tuple(atoms), *reversed(behind))
