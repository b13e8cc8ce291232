"""The nodes of the mask algebra: what a row keeps by position, by operand, or by another mask.

Operands that are loaded without indices (`KeyKeep`, `Segments`, `KeyLifetime`) broadcast against
the score: a per-key vector of a batch has shape (B, 1, 1, K).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask_base import DIAGONAL, K, Mask, Q, tuple_fields, wrap_fields


@dataclass(frozen=True)
class Causal(Mask):
    """k <= q + offset. An offset of `size("k") - size("q")` aligns the ends."""

    offset: Expr = dataclasses.field(default=E.const(0))
    name = "causal"

    def __post_init__(self) -> None:
        wrap_fields(self, "offset")

    def _build(self) -> Expr:
        return K <= Q + self.offset

    def describe(self) -> str:
        if self.offset is E.const(0):
            return "causal"
        if self.offset is E.size("k") - E.size("q"):
            return "causal (ends aligned)"
        return f"causal (offset {self.offset})"


@dataclass(frozen=True)
class Band(Mask):
    """lo <= k - q <= hi, both included. A causal window of w keys is Band(1 - w, 0)."""

    lo: Expr
    hi: Expr
    name = "band"

    def __post_init__(self) -> None:
        wrap_fields(self, "lo", "hi")

    def _build(self) -> Expr:
        return (Q + self.lo <= K) & (K <= Q + self.hi)

    def describe(self) -> str:
        lo, hi = self.lo, self.hi
        if lo.op == hi.op == "const":
            if hi.value == 0:
                return f"causal window {1 - lo.value}"
            if hi.value == -lo.value:
                return f"window {2 * hi.value + 1}"
        return f"band {lo}..{hi}"


@dataclass(frozen=True)
class Segments(Mask):
    """Rows and keys of the same id: int operands that broadcast as (…, Q, 1) and (…, 1, K)."""

    query_ids: str
    key_ids: str
    name = "segments"
    loaded_axes = frozenset("qk")

    def _build(self) -> Expr:
        return E.load(self.query_ids, dtype=E.INT).eq(E.load(self.key_ids, dtype=E.INT))


@dataclass(frozen=True)
class Prefix(Mask):
    """The first `count` keys, for every row."""

    count: Expr
    name = "prefix"

    def __post_init__(self) -> None:
        wrap_fields(self, "count")

    def _build(self) -> Expr:
        return K < self.count

    def describe(self) -> str:
        return f"prefix {self.count}"


@dataclass(frozen=True)
class Globals(Mask):
    """The first `count` tokens see every key and are seen by every row."""

    count: Expr
    name = "globals"

    def __post_init__(self) -> None:
        wrap_fields(self, "count")

    def _build(self) -> Expr:
        return (Q < self.count) | (K < self.count)

    def describe(self) -> str:
        return f"globals {self.count}"


@dataclass(frozen=True)
class KeyKeep(Mask):
    """Keys whose entry in a bool operand of shape (…, 1, K) is true: padding."""

    slot: str
    name = "key_keep"
    loaded_axes = frozenset("k")

    def _build(self) -> Expr:
        return E.load(self.slot, dtype=E.BOOL)

    def describe(self) -> str:
        return "padding"


@dataclass(frozen=True)
class KeyLifetime(Mask):
    """k <= q < death[k], with an int operand of shape (…, 1, K): keys that are dropped for good."""

    slot: str
    name = "key_lifetime"
    loaded_axes = frozenset("k")

    def _build(self) -> Expr:
        return (K <= Q) & (Q < E.load(self.slot, dtype=E.INT))


@dataclass(frozen=True)
class BlockMap(Mask):
    """A bool operand of shape (*axes, ceil(Q / block_q), ceil(K / block_k)) says block by block."""

    slot: str
    block_q: int
    block_k: int
    leading: tuple[str, ...] = ()
    name = "block_map"

    def __post_init__(self) -> None:
        tuple_fields(self, "leading")
        if self.block_q < 1 or self.block_k < 1:
            raise ValueError(f"blocks must be positive, got {self.block_q} x {self.block_k}")

    def _build(self) -> Expr:
        lead = map(E.index, self.leading)
        return E.load(self.slot, *lead, Q // self.block_q, K // self.block_k, dtype=E.BOOL)

    def describe(self) -> str:
        return f"blocks {self.block_q}x{self.block_k}"


@dataclass(frozen=True)
class Where(Mask):
    """Any bool Expr of indices, sizes and operands."""

    expr: Expr
    name = "where"

    def __post_init__(self) -> None:
        if not isinstance(self.expr, Expr) or self.expr.dtype != E.BOOL:
            raise ValueError(f"expr must be a bool Expr, got {self.expr!r}")

    def _build(self) -> Expr:
        return self.expr

    def describe(self) -> str:
        both = "q" in self.axes and "k" in self.axes or not self.slots
        return "computed" if both else "operand"


@dataclass(frozen=True)
class Select(Mask):
    """One mask per value of an int Expr: a head or batch index, or a choice made at run time.

    `which` counts the cases from 0; `Select("h", masks)` gives one mask to each head.
    """

    which: Expr
    cases: tuple[Mask, ...]
    name = "select"

    def __post_init__(self) -> None:
        which = E.index(self.which) if isinstance(self.which, str) else self.which
        if which.dtype == E.BOOL:
            which = E.call("int", which)
        object.__setattr__(self, "which", which)
        tuple_fields(self, "cases")
        if not self.cases or which.dtype != E.INT:
            raise ValueError("select must have an int choice and at least one case")

    def children(self) -> tuple[Mask, ...]:
        return self.cases

    def _build(self) -> Expr:
        kept = self.cases[-1].predicate()
        for i in reversed(range(len(self.cases) - 1)):
            kept = E.where(self.which.eq(i), self.cases[i].predicate(), kept)
        return kept

    def keeps(self, key: Expr, assume: Sequence[Expr] = ()) -> bool:
        return all(m.keeps(key, assume) for m in self.cases)

    def describe(self) -> str:
        inner = ", ".join(dict.fromkeys(m.describe() for m in self.cases))
        return f"by {self.which}: {inner}"


@dataclass(frozen=True)
class Placed(Mask):
    """`mask` for the rows [start, stop) and keys [start, stop) of a longer sequence.

    Inside, indices count from the start of the range and sizes are its lengths; outside nothing is
    kept. Operands that `mask` loads by broadcasting keep the coordinates of the whole.
    """

    mask: Mask
    query: tuple[Expr, Expr]
    key: tuple[Expr, Expr]
    name = "placed"

    def __post_init__(self) -> None:
        wrap_fields(self, "query", "key")

    def children(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def _build(self) -> Expr:
        (q0, q1), (k0, k1) = self.query, self.key
        local = self.mask.predicate().replace({
            Q: Q - q0, K: K - k0, E.size("q"): q1 - q0, E.size("k"): k1 - k0})
        return (q0 <= Q) & (Q < q1) & (k0 <= K) & (K < k1) & local

    def describe(self) -> str:
        span = f"{self.query[0]}:{self.query[1]}, {self.key[0]}:{self.key[1]}"
        return f"{self.mask.describe()} in [{span}]"


def _as_key(of_query: Expr) -> Expr:
    """The same function of the token, read at the key."""
    return of_query.replace({Q: K, E.size("q"): E.size("k")})


@dataclass(frozen=True)
class Reindex(Mask):
    """`mask` over tokens in another order: `order` gives the place of token q in it.

    A roll by s, as in shifted windows, is `(q - s) % size("q")`.
    """

    order: Expr
    mask: Mask
    name = "reindex"

    def children(self) -> tuple[Mask, ...]:
        return (self.mask,)

    def _build(self) -> Expr:
        return self.mask.predicate().replace({Q: self.order, K: _as_key(self.order)})

    def keeps(self, key: Expr, assume: Sequence[Expr] = ()) -> bool:
        # With a size in it, the order is the same for rows and keys only where Q is K.
        return (key is DIAGONAL and not self.order.has("size")
                and self.mask.keeps(key, assume))

    def describe(self) -> str:
        return f"{self.mask.describe()}, reordered"


@dataclass(frozen=True)
class Regions(Mask):
    """Rows and keys of the same region; `ids` is the region of token q.

    `fill` is what a bias adds elsewhere (Swin: -100); see `attnopt.ir.bias.RegionFill`. As a mask
    it keeps or drops.
    """

    ids: Expr
    fill: float = -math.inf
    name = "regions"

    def _build(self) -> Expr:
        return self.ids.eq(_as_key(self.ids))

    def keeps(self, key: Expr, assume: Sequence[Expr] = ()) -> bool:
        return key is DIAGONAL and not self.ids.has("size")
