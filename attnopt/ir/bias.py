"""Bias: what is added to a score before the normaliser, by its cheapest exact form.

Every form is a small frozen dataclass that says what it is in one `Expr`: `bias.term()`. The forms
from cheap to dear: constant per row, vector per key, closed form in the indices, separable per
grid axis, table by index difference, look-up in a table per query, per key or for all, region
fill, exact low rank, dense. A Spec holds the term inside `logits`; the form is for rules, kernels
and the report.

Operands that are loaded without indices broadcast against the score (*L, Q, K).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask_base import K, Q
from attnopt.ir.mask_grid import coordinates
from attnopt.ir.mask_nodes import Regions


@dataclass(frozen=True)
class Bias:
    """Base of all forms."""

    name: ClassVar[str] = ""

    def term(self) -> Expr:
        """The float Expr that is added to the score."""
        raise NotImplementedError

    @property
    def slots(self) -> frozenset[str]:
        return self.term().slots

    def describe(self) -> str:
        """A short phrase for the report."""
        return self.name


@dataclass(frozen=True)
class RowConstant(Bias):
    """The same for all keys: softmax does not see it, only the log-sum-exp does."""

    expr: Expr
    name = "row constant"

    def __post_init__(self) -> None:
        if "k" in self.expr.indices or self.expr.has("score"):
            raise ValueError(f"expr must not depend on the key, got {self.expr}")

    def term(self) -> Expr:
        return self.expr


@dataclass(frozen=True)
class KeyVector(Bias):
    """One number per key: an operand of shape (…, 1, K)."""

    slot: str
    name = "key vector"

    def term(self) -> Expr:
        return E.load(self.slot)


@dataclass(frozen=True)
class ClosedForm(Bias):
    """Arithmetic of indices and sizes, with factors per head or row at most (ALiBi's slopes)."""

    expr: Expr
    name = "closed form"

    def __post_init__(self) -> None:
        if self.expr.has("score") or not self.expr.indices & {"q", "k"}:
            raise ValueError(f"expr must be a form in the indices q, k, got {self.expr}")

    def term(self) -> Expr:
        return self.expr

    def describe(self) -> str:
        return f"{self.name} {self.expr}"


@dataclass(frozen=True)
class Separable(Bias):
    """Sum over grid axes of a table per query and key coordinate: rel_h + rel_w of SAM.

    slots_by_axis: operand of each axis, of shape (*leading, Q, length of the axis)
    length:        lengths of the row-major grid of keys
    """

    slots_by_axis: tuple[str, ...]
    length: tuple[int, ...]
    leading: tuple[str, ...] = ()
    name = "separable"

    def term(self) -> Expr:
        lead = [E.index(a) for a in self.leading]
        parts = [E.load(slot, *lead, Q, j) for slot, (j, _) in zip(
            self.slots_by_axis, coordinates(K, self.length), strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def describe(self) -> str:
        return f"separable {'x'.join(map(str, self.length))}"


@dataclass(frozen=True)
class DifferenceTable(Bias):
    """A table of shape (*leading, *differences), read at q - k + offset on every grid axis.

    length: lengths of the row-major grid of tokens, the first may be None; offset: place of
    difference 0 on each axis (length - 1 for a full table).
    """

    slot: str
    offset: tuple[Expr, ...]
    length: tuple[int | None, ...] = (None,)
    leading: tuple[str, ...] = ("h",)
    name = "difference table"

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", tuple(map(E.wrap, self.offset)))

    def term(self) -> Expr:
        lead = [E.index(a) for a in self.leading]
        places = [i - j + offset for (i, _), (j, _), offset in zip(
            coordinates(Q, self.length), coordinates(K, self.length), self.offset, strict=True)]
        return E.load(self.slot, *lead, *places)

    def describe(self) -> str:
        return f"table by difference, {len(self.length)}-D"


@dataclass(frozen=True)
class Lookup(Bias):
    """A table of shape (*leading, [Q or K,] entries) read at `index(q, k)`.

    by: "" for a table that all tokens share (T5's buckets, Swin's index buffer), "q" or "k" for a
    row of its own per query or key (Shaw, Transformer-XL, DeBERTa).
    """

    slot: str
    index: Expr
    leading: tuple[str, ...] = ("h",)
    by: str = ""
    name = "look-up"

    def __post_init__(self) -> None:
        if self.by not in ("", "q", "k"):
            raise ValueError(f"by must be '', 'q' or 'k', got {self.by!r}")
        if self.index.dtype != E.INT:
            raise ValueError(f"index must be an int Expr, got {self.index}")

    def term(self) -> Expr:
        axes = [E.index(a) for a in (*self.leading, *self.by)]
        return E.load(self.slot, *axes, self.index)

    def describe(self) -> str:
        return {"": "table look-up", "q": "query table look-up", "k": "key table look-up"}[self.by]


@dataclass(frozen=True)
class RegionFill(Bias):
    """`regions.fill` where row and key are of different regions, 0 elsewhere (Swin's -100)."""

    regions: Regions
    name = "region fill"

    def __post_init__(self) -> None:
        if not math.isfinite(self.regions.fill):
            raise ValueError(f"fill must be finite, got {self.regions.fill}; use it as a mask")

    def term(self) -> Expr:
        return E.where(self.regions.predicate(), 0.0, float(self.regions.fill))

    def describe(self) -> str:
        return f"region fill {self.regions.fill:g}"


@dataclass(frozen=True)
class LowRank(Bias):
    """Factors (…, Q, R) and (…, K, R) whose product, times a number, is the bias.

    Kernels take them as further columns of query and key. What is known of ranks R, and by how
    much they are lower where rows may be shifted: ALiBi m (k - q) 2 and 1, squared distances in D
    dimensions D + 2 and D + 1, rel_h + rel_w on a grid h + w - 1 and h + w - 2, r regions r and
    r - 1. A table by difference is of full rank as a rule: `DifferenceTable`.
    """

    query_slot: str
    key_slot: str
    scale: float = 1.0
    name = "low rank"

    def term(self) -> Expr:
        return E.inner(self.query_slot, self.key_slot) * self.scale


@dataclass(frozen=True)
class Dense(Bias):
    """An operand that varies along q and k, or a computed term of no cheaper form."""

    expr: Expr
    name = "dense"

    def term(self) -> Expr:
        return self.expr

    def describe(self) -> str:
        return self.name if self.expr.op == "load" else "computed"


def form_of(term: Expr, axes: Mapping[str, tuple[str, ...] | None]) -> Bias:
    """The form that the structure of `term` shows; `axes` are those of the operands by slot."""
    loads = [leaf for leaf in term.leaves if leaf.op == "load"]
    along = set(term.indices)
    for leaf in loads:
        if not leaf.args:
            along.update(axes.get(leaf.value) or ("q", "k"))
    if term.op == "inner":
        return LowRank(*term.value)
    if term.op == "mul" and term.args[0].op == "inner" and term.args[1].op == "const":
        query, key = term.args[0].value
        return LowRank(query, key, scale=float(term.args[1].value))
    if term.has("score") or term.has("inner"):
        return Dense(term)
    if "k" not in along:
        return RowConstant(term)
    if term.op == "load" and not term.args:
        return Dense(term) if "q" in along else KeyVector(term.value)
    if all(not leaf.args and not {"q", "k"} & set(axes.get(leaf.value) or "qk")
           for leaf in loads):
        return ClosedForm(term)
    if term.op == "load" and term.args:
        *lead, index = term.args
        names = tuple(e.value for e in lead if e.op == "index")
        if len(names) == len(lead) and index.dtype == E.INT:
            by = names[-1] if names and names[-1] in ("q", "k") else ""
            leading = names[: len(names) - len(by)]
            if not {"q", "k"} & set(leading):
                return Lookup(term.value, index, leading, by)
    return Dense(term)

