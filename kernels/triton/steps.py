"""The steps of a forward kernel on one tile of scores: normaliser, edits, product with the values.

`online` carries the sums of the rows from tile to tile; `weigh` is the second pass, which knows
them. What the steps need of a row is in `attnopt.kernels.triton.plan`.
"""

from __future__ import annotations

from attnopt.ir import expr as E
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.layout import Signature
from attnopt.kernels.triton.plan import Plan
from attnopt.kernels.triton.printer import TritonPrinter, masked
from attnopt.kernels.triton.scores import Scores

LOWEST = "float('-inf')"
CONSTANTS = ("TMA", "BM", "BN", "D", "DP", "V", "VP", "STAGES", "PRECISION", "RAGGED")


class Steps(Scores):
    """A forward kernel while it is written."""

    def __init__(self, spec: Spec, signature: Signature) -> None:
        super().__init__(spec, signature, "forward",
                         "One tile of queries of one entry of the leading axes.", CONSTANTS)
        self.plan = Plan(spec, signature)

    def online(self, full: bool, x: str, keep: str | None, group: str, depth: int,
               sums_only: bool = False) -> None:
        """One step of the normaliser, and of the output unless `sums_only`."""
        k, plan = self.kernel, self.plan
        kept = self.kept(full, keep)
        k.add(f"x = {x}", depth)
        if kept:
            k.add(f"keep = tl.broadcast_to({kept}, (BM, BN))", depth)
        hidden = "x = tl.where(keep, x, float('-inf'))"
        if plan.softmax:
            self.exponentials(full, hidden if kept else "", depth)
        else:
            if plan.peaks:
                over = "tl.where(keep, x, float('-inf'))" if kept else "x"
                k.add(f"peak = tl.maximum(peak, tl.max({over}, 1))", depth)
            name = self.normalized("x", "w")
            k.add([*self.pending, f"p = tl.where(keep, {name}, 0.0)" if kept else f"p = {name}"],
                  depth)
            if plan.sums:
                k.add("total += tl.sum(p, 1)", depth)
        if plan.counts:
            k.add("count += tl.sum(tl.cast(keep, tl.int32), 1)" if kept else "count += BN", depth)
        for mass in plan.masses:
            name, number = f"mass_{mass[5:]}", int(mass[5:])
            scaled = f"{name} * alpha" if plan.softmax else name
            k.add(f"{name} = {scaled} + tl.sum(tl.where({group} == {number}, p, 0.0), 1)", depth)
        if not sums_only:
            if plan.edits:
                self.edit("p", full, depth)
            self.accumulate(full, depth, rescale=plan.softmax)

    def exponentials(self, full: bool, hide: str, depth: int) -> None:
        k, plan = self.kernel, self.plan
        if hide:
            k.add(hide, depth)
        k.add("highest = tl.maximum(peak, tl.max(x, 1))", depth)
        if plan.top:
            k.add("top = tl.maximum(top, tl.max(x, 1))", depth)
        if plan.hides or hide or plan.spec.sinks is not None:
            k.add(f"shift = tl.where(highest == {LOWEST}, 0.0, highest) * {plan.factor}", depth)
        else:
            k.add(f"shift = highest * {plan.factor}", depth)
        k.add([f"p = tl.exp2(x * {plan.factor} - shift[:, None])",
               f"alpha = tl.exp2(peak * {plan.factor} - shift)",
               "total = total * alpha + tl.sum(p, 1)", "peak = highest"], depth)

    def accumulate(self, full: bool, depth: int, rescale: bool) -> None:
        k = self.kernel
        k.tile("value_tile", "value", self.signature.value, "k", "there", full, "BN", "V",
               depth=depth)
        if rescale:
            k.add("acc = acc * alpha[:, None]", depth)
        k.add("acc = tl.dot(tl.cast(p, value_tile.dtype), value_tile, acc, "
              "input_precision=PRECISION)", depth)

    def weigh(self, full: bool, x: str, keep: str | None, depth: int) -> None:
        """What meets the values, from the statistics of whole rows."""
        k, plan, spec = self.kernel, self.plan, self.spec
        kept = self.kept(full, keep)
        k.add(f"x = {x}", depth)
        if kept:
            k.add(f"keep = tl.broadcast_to({kept}, (BM, BN))", depth)
        if plan.softmax:
            if kept:
                k.add("x = tl.where(keep, x, float('-inf'))", depth)
            k.add(f"p = tl.exp2(x * {plan.factor} - shift[:, None])", depth)
            if plan.everywhere and plan.may_be_empty and spec.empty_row != "zero":
                rest = "float('nan')" if spec.empty_row == "nan" else (
                    f"1.0 / tl.cast({k.size('k')}, tl.float32)")
                k.add(f"p = tl.where(some[:, None], p, {rest})", depth)
        else:
            name = self.normalized("x", "w")
            k.add([*self.pending, f"p = tl.where(keep, {name}, 0.0)" if kept else f"p = {name}"],
                  depth)
            if spec.l1:
                k.add("p = p / total[:, None]", depth)
        if plan.edits:
            self.edit("p", full, depth)
        self.accumulate(full, depth, rescale=False)

    def edit(self, weight: str, full: bool, depth: int) -> None:
        """The weights after their own epilogue."""
        k, spec = self.kernel, self.spec
        printer = self.printer("e")
        printer.given(E.weight, weight, "cell")
        self.stat(printer, whole=False)
        edited = k.cells(printer, spec.weights)
        lines = printer.all()
        k.uses(printer)
        mask = None if full else f"k < {k.size('k')}"
        k.add(masked(lines, mask), depth)
        k.add(f"p = {edited}" if full else
              f"p = tl.where(k < {k.size('k')}, {edited}, 0.0)", depth)
        if self.plan.totals:
            k.add("edited_total += tl.sum(p, 1)", depth)

    # -- statistics of whole rows -----------------------------------------------------------
    def statistics(self) -> None:
        """Name the statistics; those of a softmax are in the units of its logits."""
        k, plan = self.kernel, self.plan
        if plan.softmax:
            k.add(f"row_lse = peak * {plan.outer!r} + tl.log(total)")
            if plan.guard:
                k.add(f"some = {'count > 0' if plan.counts else 'total != 0.0'}")
        elif plan.sums:
            k.add("row_lse = tl.log(total)")
        for mass in plan.masses:
            if plan.softmax or self.spec.l1:
                k.add(f"mass_{mass[5:]} = mass_{mass[5:]} / total")

    def stat(self, printer: TritonPrinter, whole: bool = True) -> None:
        plan = self.plan
        peak = "top" if plan.top else "peak"
        outer = plan.outer if plan.softmax else 1.0
        texts = {"max": f"({peak} * {outer!r})", "lse": "row_lse", "count": "count",
                 "sum": "tl.exp(row_lse)" if plan.softmax else "total"}
        if whole:
            texts["total"] = "edited_total"
        texts |= {mass: f"mass_{mass[5:]}" for mass in plan.masses}
        for name in plan.stats & set(texts):
            printer.given(E.stat(name), f"({texts[name]})[:, None]", "row")
