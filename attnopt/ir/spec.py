"""Spec: what an attention computes. Schedule: how, on one device. Both are frozen and have a text.

With raw scores s(q, k) between query rows and key rows, the normal form is

    x = logits(s, operands, indices)            pointwise `Expr`
    x = mix_logits over heads                   talking heads, optional
    keep = mask                                 `Mask`; a key that is not kept has x = -inf
    w = normalizer(x)                           with `sinks` as an extra logit that has no value
    w = weights(w, operands, row statistics)    pointwise `Expr`; renormalised if asked
    w = mix_weights over heads, plus mix_bias per head
    w = dropout(w)
    o = output(w @ V, operands)                 pointwise `Expr` at (…, q, d)

Row statistics are those of the normaliser, before `weights` (see `attnopt.ir.expr`); the
log-sum-exp is the log of what it divides by. `weights` sees every key, also those not kept.

Tensors have shapes query (*L, Q, D), key (*L, K, D), value (*L, K, Dv), where the leading axes L
broadcast as in torch (grouped queries: one axis of length 1 in K and V). Counted from the right
they are called h, b, b1, b2 …. Operands broadcast against (*L, Q, K) in `logits` and `weights`,
against (*L, Q, Dv) in `output`. A Spec holds no tensor and no length.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Mask, parse_mask

VERSION = 1
SCORES = ("dot", "distance", "additive", "key")
NORMALIZERS = ("softmax", "sigmoid", "relu", "softplus", "exp", "identity")
EMPTY_ROWS = ("nan", "zero", "uniform")
ROLES = ("bias", "mask", "scale", "table", "factor", "sink", "gate", "mix", "score", "other")


def leading_axes(count: int) -> tuple[str, ...]:
    """Names of `count` leading axes in tensor order: (…, b1, b, h)."""
    names = ["h", "b", *(f"b{i}" for i in range(1, max(count - 1, 1)))][:count]
    return tuple(reversed(names))


@dataclass(frozen=True)
class Operand:
    """An extra tensor of the op: its slot, the axes along which it varies, and its type.

    `axes` is None for a table that is gathered with explicit indices, otherwise a subset of the
    score's axes in tensor order; along the others its length is 1 (or the axis is absent).
    """

    slot: str
    axes: tuple[str, ...] | None
    dtype: str = E.FLOAT
    role: str = "other"

    def __post_init__(self) -> None:
        if self.role not in ROLES:
            raise ValueError(f"role must be one of {', '.join(ROLES)}, got {self.role!r}")


@dataclass(frozen=True)
class Spec:
    """What to compute; see the module docstring. `str(spec)` is canonical, `Spec.parse` reads it.

    score:        "dot" sum q*k; "distance" sum (q-k)^2; "additive" sum w*tanh(q+k) with w in slot
                  "score_weight" of shape (D,) or (*L, D); "key" no query enters, the score is 0
                  and `logits` loads it all
    normalizer:   "softmax"; the others are that function of x, divided by the row sum if `l1`
    empty_row:    what softmax gives where no key is kept: nan, zero, uniform over all K keys; with
                  `sinks` such a row is zero
    groups:       int Expr giving a group to each key; `stat("mass:g")` is the weight of group g
    sinks:        a logit per row that takes part in the normaliser and has no value
    mix_logits:   slot of a (heads out, heads in) matrix; mix_weights: likewise;
                  mix_bias: of a vector (heads out,) that is added to the mixed weights
    renormalize:  divide by the row sum again after `weights`
    dropout:      probability on the weights; the mask is drawn as torch draws it
    compute:      dtype name of the softmax when the author casts up, else None
    lse:          the log-sum-exp of every row is a second output
    """

    score: str = "dot"
    logits: Expr = E.score
    mask: Mask = ALL
    normalizer: str = "softmax"
    l1: bool = False
    empty_row: str = "nan"
    weights: Expr = E.weight
    renormalize: bool = False
    output: Expr = E.out
    groups: Expr | None = None
    sinks: Expr | None = None
    mix_logits: str | None = None
    mix_weights: str | None = None
    mix_bias: str | None = None
    dropout: float = 0.0
    compute: str | None = None
    lse: bool = False
    operands: tuple[Operand, ...] = field(default=())

    def __post_init__(self) -> None:
        for name, allowed in (("score", SCORES), ("normalizer", NORMALIZERS),
                              ("empty_row", EMPTY_ROWS)):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        known = {operand.slot for operand in self.operands}
        if len(known) != len(self.operands):
            raise ValueError("operands must have distinct slots")
        missing = self.slots - known
        if missing:
            raise ValueError(f"operands must declare every slot, got no {sorted(missing)}")
        if not 0.0 <= self.dropout <= 1.0:
            raise ValueError(f"dropout must be in [0, 1], got {self.dropout}")

    @property
    def slots(self) -> frozenset[str]:
        """Every operand that the expressions use."""
        exprs = (self.logits, self.weights, self.output, self.groups, self.sinks)
        named = {s for s in (self.mix_logits, self.mix_weights, self.mix_bias) if s}
        if self.score == "additive":
            named.add("score_weight")
        return frozenset(named).union(self.mask.slots, *(e.slots for e in exprs if e is not None))

    def operand(self, slot: str) -> Operand:
        return next(o for o in self.operands if o.slot == slot)

    def with_(self, more: Sequence[Operand] = (), **changes: Any) -> Spec:
        """A copy with fields changed and operands added; those no longer used are dropped."""
        if "operands" in changes:
            return dataclasses.replace(self, **changes)
        loose = dataclasses.replace(self, **changes, operands=(*self.operands, *more))
        kept = tuple(o for o in loose.operands if o.slot in loose.slots)
        return dataclasses.replace(loose, operands=kept)

    def __str__(self) -> str:
        return _text(self)

    @staticmethod
    def parse(text: str) -> Spec:
        """Read the text form; parsed once per text."""
        return _parse(text)


@functools.lru_cache(maxsize=4096)
def _text(spec: Spec) -> str:
    body: dict[str, Any] = {"attention": VERSION}
    for f in dataclasses.fields(spec):
        content = getattr(spec, f.name)
        if f.name == "operands":
            if content:
                body["operands"] = [[o.slot, o.axes, o.dtype, o.role] for o in content]
        elif content != f.default:
            body[f.name] = str(content) if isinstance(content, Expr | Mask) else content
    return json.dumps(body, separators=(",", ":"))


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> Spec:
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ValueError(f"spec must be a Spec's text form, got {text[:80]!r}") from error
    if not isinstance(body, dict) or body.pop("attention", None) != VERSION:
        raise ValueError(f"spec must be of version {VERSION}, got {text[:80]!r}")
    for name in ("logits", "weights", "output", "groups", "sinks"):
        if name in body:
            body[name] = E.parse(body[name])
    if "mask" in body:
        body["mask"] = parse_mask(body["mask"])
    body["operands"] = tuple(
        Operand(slot, None if axes is None else tuple(axes), dtype, role)
        for slot, axes, dtype, role in body.get("operands", ()))
    return Spec(**body)


@dataclass(frozen=True)
class Schedule:
    """How to compute a Spec on one device: the lowering and its tile.

    lowering: "aten:sdpa" (F.scaled_dot_product_attention), "aten:blocks" (row blocks of `tile`
              query rows, nothing N x N is held) or "aten:dense" (one composition).
    """

    lowering: str = "aten:dense"
    tile: tuple[int, ...] = ()

    def __str__(self) -> str:
        return json.dumps([self.lowering, *self.tile], separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=4096)
    def parse(text: str) -> Schedule:
        lowering, *tile = json.loads(text)
        return Schedule(lowering, tuple(tile))
