"""What follows from a Spec for its kernels: statistics, passes over the keys, empty rows."""

from __future__ import annotations

import math

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels.aten.steps import may_be_infinite
from attnopt.kernels.triton.layout import Signature

LOG2E = math.log2(math.e)


def peel(logits: Expr) -> tuple[float, Expr]:
    """(c, y) with logits = c * y and a number c > 0."""
    scale = 1.0
    while logits.op in ("mul", "div") and logits.args[1].op == "const":
        by = logits.args[1].value
        if logits.op == "div":
            by = 1.0 / by if by else math.nan
        if not 1e-30 < scale * by < 1e30:
            break
        scale, logits = scale * by, logits.args[0]
    return scale, logits


def vanishes(expr: Expr) -> bool:
    """Whether an edit gives 0 for a weight of 0, so that keys which are not kept can be skipped."""
    match expr.op:
        case "weight":
            return True
        case "mul":
            return any(map(vanishes, expr.args))
        case "div" | "neg" | "abs" | "relu" | "sqrt":
            return vanishes(expr.args[0])
        case "add" | "sub" | "minimum" | "maximum":
            return all(map(vanishes, expr.args))
        case "where":
            return all(map(vanishes, expr.args[1:]))
        case "pow":
            exponent = expr.args[1]
            return vanishes(expr.args[0]) and exponent.op == "const" and exponent.value > 0
    return expr.op == "const" and expr.value == 0


class Plan:
    """What follows from a Spec: which statistics are kept and how often the keys are read."""

    def __init__(self, spec: Spec, signature: Signature) -> None:
        self.spec = spec
        self.softmax = spec.normalizer == "softmax"
        exprs = (spec.weights, spec.output)
        self.stats = {leaf.value for e in exprs for leaf in e.leaves if leaf.op == "stat"}
        self.masses = sorted(s for s in self.stats if s.startswith("mass:"))
        in_weights = any(leaf.op == "stat" for leaf in spec.weights.leaves)
        self.edits = (spec.weights is not E.weight or spec.renormalize or "total" in self.stats)
        #: the sum of the edited weights is asked for
        self.totals = spec.renormalize or "total" in self.stats
        divides = self.softmax or spec.l1
        self.two_passes = in_weights or divides and (self.edits or signature.two_passes)
        #: rows may keep no key at all, for some lengths
        self.hides = may_be_infinite(spec.logits)
        kept = spec.mask.row_always_kept() or spec.sinks is not None
        self.may_be_empty = self.softmax and spec.sinks is None and (not kept or self.hides)
        self.guard = self.may_be_empty or self.hides or spec.sinks is not None
        self.uniform = self.softmax and not kept and spec.empty_row == "uniform"
        special = self.may_be_empty and spec.empty_row != "zero"
        #: the second pass has to see every key
        self.everywhere = self.two_passes and self.edits and (
            special or not vanishes(spec.weights))
        self.sums = self.softmax or spec.l1 or bool({"sum", "lse"} & self.stats) or signature.lse
        self.peaks = self.softmax or "max" in self.stats
        self.counts = "count" in self.stats or self.uniform and self.hides
        #: the peak of a softmax with sinks is not that of the keys
        self.top = "max" in self.stats and spec.sinks is not None and self.softmax
        self.outer, self.inside = peel(spec.logits) if self.softmax else (1.0, spec.logits)
        self.factor = repr(self.outer * LOG2E)
