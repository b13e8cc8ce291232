"""What a Spec computes at given lengths, in numbers: the input of every time model."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnopt.ir.expr import Expr
from attnopt.ir.lanes import look_up
from attnopt.ir.spec import Spec

#: bytes of an element; tfloat32: float32 in products of lower precision
ITEM_SIZE = {"float64": 8, "float32": 4, "tfloat32": 4, "bfloat16": 2, "float16": 2}
#: vector instructions of an operation in a kernel; 1 where it is not listed
INSTRUCTIONS = {
    "div": 4.0, "floordiv": 12.0, "mod": 14.0, "exp": 11.0, "exp2": 10.0, "log": 14.0,
    "log1p": 16.0, "sqrt": 5.0, "rsqrt": 5.0, "tanh": 18.0, "sigmoid": 15.0, "softplus": 26.0,
    "pow": 28.0, "cos": 20.0, "sin": 20.0, "erf": 22.0, "sign": 2.0, "round": 2.0, "inner": 32.0,
    "const": 0.0, "index": 0.0, "size": 0.0, "stat": 0.0, "score": 0.0, "weight": 0.0, "out": 0.0,
    "value": 0.0, "int": 1.0, "float": 1.0, "bool": 1.0,
}
#: vector instructions of a load: at each score, and gathered by an index
READ, GATHER = 2.0, 10.0
#: share of them that remains per score where something varies along the keys but not with the rows:
#: kernels compute it once for all rows of a tile
HOISTED = 1 / 16
#: lanes of the vectors for which a look-up is one load
LANES = 16


@dataclass(frozen=True)
class Work:
    """One attention.

    leading:    product of the leading axes of the scores; owners: of those along which keys differ
    score_ops:  vector instructions per score, besides scale and softmax
    mask_ops:   vector instructions per score where the mask is applied
    bias_bytes: bytes of operands per score that are not shared by rows, keys or heads
    author_ops: passes over all scores that the author's own composition makes, besides its softmax
    mask_passes: of these, the ones that make one tensor of all that is added to the scores, for
                 fused attention
    score_bytes: size of a score in that composition
    sweeps:     2 where statistics of whole rows are needed first
    backward:   gradients are computed too
    """

    leading: int
    owners: int
    queries: int
    keys: int
    head_dim: int
    value_dim: int
    dtype: str = "float32"
    score_ops: float = 0.0
    mask_ops: float = 0.0
    bias_bytes: float = 0.0
    author_ops: int = 1
    mask_passes: int = 0
    score_bytes: int = 4
    sweeps: int = 1
    backward: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in ITEM_SIZE:
            raise ValueError(f"dtype must be one of {', '.join(ITEM_SIZE)}, got {self.dtype!r}")

    @property
    def item(self) -> int:
        return ITEM_SIZE[self.dtype]

    @property
    def scores(self) -> int:
        return self.leading * self.queries * self.keys

    @property
    def flops(self) -> float:
        """Of both products over all scores; a multiply-add counts as two."""
        return 2.0 * self.scores * (self.head_dim + self.value_dim)

    @property
    def tensor_bytes(self) -> float:
        """Query, key, value and output, once each."""
        return float(self.item * (
            self.leading * self.queries * (self.head_dim + self.value_dim)
            + self.owners * self.keys * (self.head_dim + self.value_dim)))


def work_of(spec: Spec, query: Sequence[int], key: Sequence[int], value: Sequence[int],
            dtype: str = "float32", backward: bool = False) -> Work:
    """The Work of a Spec at shapes query (*L, Q, D), key (*L, K, D) and value (*L, K, Dv)."""
    rank = max(len(query), len(key), len(value)) - 2
    lengths = [[1] * (rank + 2 - len(s)) + list(s[:-2]) for s in (query, key, value)]
    leading = [max(column) if min(column) else 0 for column in zip(*lengths, strict=True)]
    owners = [max(k, v) for k, v in zip(lengths[1], lengths[2], strict=True)]
    predicate = spec.mask.predicate()
    per_score = [spec.logits, spec.weights]
    passes = sum(_passes(e, spec) for e in (*per_score, predicate))
    return Work(
        math.prod(leading), math.prod(owners), query[-2], key[-2], query[-1], value[-1], dtype,
        score_ops=sum(instructions(e, spec) for e in per_score),
        mask_ops=instructions(predicate, spec),
        bias_bytes=sum(_bytes(slot, spec, dtype) for e in per_score for slot in e.slots),
        author_ops=passes + (predicate.op != "const"),
        mask_passes=_mask_passes(spec.logits, spec), score_bytes=ITEM_SIZE[spec.compute or dtype],
        sweeps=2 if spec.weights.has("stat") else 1, backward=backward)


def instructions(expr: Expr, spec: Spec) -> float:
    """Vector instructions per score; what does not vary along the keys costs nothing."""
    total = 0.0
    for node in expr.walk():
        axes = axes_of(node, spec)
        if "k" not in axes:
            continue
        times = 1.0 if "q" in axes else HOISTED
        if node.op == "load":
            total += times * (GATHER if node.args and look_up(
                node.args, LANES, lambda e: "k" not in axes_of(e, spec)) == "gather" else READ)
        else:
            total += times * INSTRUCTIONS.get(node.op, 1.0)
    return total


def _passes(expr: Expr, spec: Spec) -> int:
    """Operations of a composition that go over all scores."""
    return sum(1 for node in expr.walk() if node.args and node.op != "load"
               and axes_of(node, spec) >= {"q", "k"})


def _mask_passes(expr: Expr, spec: Spec) -> int:
    """Operations that make one tensor over all scores of what is added to them."""
    terms = sum(1 for node in expr.walk() if node.op in ("add", "sub") and node.has("score")
                and any(a.slots and not a.has("score") for a in node.args))
    inner = sum(1 for node in expr.walk() if node.args and node.op != "load" and not node.has(
        "score") and axes_of(node, spec) >= {"q", "k"})
    return max(terms - 1, 0) + inner


@functools.lru_cache(maxsize=4096)
def axes_of(expr: Expr, spec: Spec) -> frozenset[str]:
    """Axes along which a part of a Spec's expressions varies."""
    own: set[str] = set()
    if expr.op == "index":
        own.add(expr.value)
    elif expr.op in ("score", "weight", "inner"):
        own |= {"q", "k"}
    elif expr.op == "stat":
        own.add("q")
    elif expr.op == "load" and not expr.args:
        axes = spec.operand(expr.value).axes
        own |= {"q", "k"} if axes is None else set(axes)
    return frozenset(own).union(*(axes_of(a, spec) for a in expr.args))


def _bytes(slot: str, spec: Spec, dtype: str) -> float:
    axes = spec.operand(slot).axes
    return float(ITEM_SIZE[dtype]) if axes is not None and {"q", "k"} <= set(axes) else 0.0
