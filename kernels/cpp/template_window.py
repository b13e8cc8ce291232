"""Spec + tile -> the C++ source of the kernel for few keys: `window.h` with its statements.

Terms of the logits that vary with query, key and head, but neither with the scores nor with any
other leading axis, are the same in all windows: such a bias is computed once for each head and
call, and then read, whatever look-ups it takes.
"""

from __future__ import annotations

import functools

from attnopt.cost.work import axes_of
from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels.cpp.template import Hoisted, Parts, Signature, Source, Tile
from attnopt.kernels.printing import LEVELS

#: the most keys of a window, for which a row of scores stays in registers
MOST_KEYS = 256


@functools.lru_cache(maxsize=1024)
def window_reasons(spec: Spec) -> tuple[str, ...]:
    """Why the kernel for few keys does not compute a Spec that generated C++ does; empty where it
    does."""
    found = []
    if spec.score != "dot":
        found.append(f"scores must be dot products, got {spec.score}")
    if spec.normalizer != "softmax" or spec.sinks is not None:
        found.append("rows must have a softmax without sinks")
    if spec.weights is not E.weight or spec.renormalize or spec.groups is not None:
        found.append("weights must have no epilogue")
    if spec.output is not E.out:
        found.append("the output must have no epilogue")
    if spec.empty_row == "uniform" and not spec.mask.row_always_kept():
        found.append("rows without a key must be nan or zero")
    return tuple(found)


@functools.lru_cache(maxsize=1024)
def split_shared(spec: Spec) -> tuple[Expr, tuple[Expr, ...]]:
    """The logits with loads of "shared_0", "shared_1" … for the largest parts that are the same in
    all windows of a head, and these parts."""
    scaled = Parts.of(spec).scaled
    found: dict[Expr, None] = {}
    seen: set[Expr] = set()
    stack = [scaled]
    while stack:
        node = stack.pop()
        if node in seen or node.op == "const":
            continue
        seen.add(node)
        if node.dtype == E.FLOAT and {"q", "k"} <= axes_of(node, spec) <= {"q", "k", "h"} \
                and not node.has("score"):
            found[node] = None
        elif node.op != "load":
            stack += node.args
    names = {term: E.load(f"shared_{n}") for n, term in enumerate(found)}
    return scaled.replace(names), tuple(found)


class WindowSource(Source):
    """The text of one kernel."""

    files = ("attention.h", "pairs.h", "lanes.h", "products.h", "window.h")

    def __init__(self, signature: Signature, tile: Tile, width: int) -> None:
        super().__init__(signature, tile, width)
        self.scaled = self.parts.scaled
        self.shared: tuple[Expr, ...] = ()
        if signature.rank > 1:
            self.scaled, self.shared = split_shared(self.spec)

    def constants(self) -> list[str]:
        return [*super().constants(), f"constexpr int SHARED = {len(self.shared)};"]

    def blocks(self) -> dict[str, list[str]]:
        logits = self.printer("x")
        logits.given(E.score, "score", "cell")
        for n in range(len(self.shared)):
            logits.given(E.load(f"shared_{n}"), f"load(given + {n} * TILE + j * W)", "cell")
        value = logits(self.scaled)
        keep = self.printer("m")
        kept = keep(self.parts.predicate)
        score, mask = Hoisted.of(logits, self.scaled), Hoisted.of(keep, self.parts.predicate)
        before = self.printer("f")
        stores = [f"store(to + {n} * TILE + j * W, vec({before(term)}));"
                  for n, term in enumerate(self.shared)]
        first = {level: list(before.lines[level]) for level in LEVELS}
        kept_here = [] if self.parts.predicate is E.TRUE else [f"kept &= mask({kept});"]
        return {
            **self.operand_blocks(),
            "shared_head": first["head"], "shared_row": first["row"],
            "shared_cell": [*first["column"], *first["cell"], *stores],
            "head": [*logits.lines["head"], *keep.lines["head"]],
            "columns": [*score.arrays, *mask.arrays],
            "score_columns": [*logits.lines["column"], *score.keep_column],
            "mask_columns": [*keep.lines["column"], *mask.keep_column],
            "row": [*logits.lines["row"], *keep.lines["row"]],
            "cell": [*score.take_column, *logits.lines["cell"], f"#define LOGIT {value}"],
            "mask": [*mask.take_column, *keep.lines["cell"], *kept_here]}
