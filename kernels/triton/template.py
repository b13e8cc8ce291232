"""Spec + Signature -> the source of a forward kernel.

Each program holds a tile of queries and walks over the key tiles that its rows visit, FULL ones
without a mask, with an online softmax in powers of two:

    p = exp2(x * c - peak * c)      c is log2(e) and, where the logits are c' * y, c' too, so that a
    total = total * alpha + sum(p)  plain scale costs nothing
    acc = acc * alpha + p @ V

Two passes over the keys are made where what meets the values needs a statistic of the whole row:
edited weights of a normaliser that divides. The second pass then starts from the log-sum-exp.
What a row without a key gets is Spec.empty_row: 0 / 0 makes the nan, a mean of all values the
uniform row, which only programs that have such a row compute.
"""

from __future__ import annotations

import functools

from attnopt.ir import expr as E
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.body import whole_rows
from attnopt.kernels.triton.intervals import Visits
from attnopt.kernels.triton.layout import Signature, Source, module
from attnopt.kernels.triton.plan import LOG2E
from attnopt.kernels.triton.printer import TritonPrinter, live, masked
from attnopt.kernels.triton.steps import LOWEST, Steps


@functools.lru_cache(maxsize=256)
def forward(spec: Spec, signature: Signature) -> Source:
    """The module with the kernel `forward`; its arguments say what it wants."""
    return module("Attention, forward, generated.", spec, [_Forward(spec, signature).kernel])


class _Forward(Steps):
    def __init__(self, spec: Spec, signature: Signature) -> None:
        super().__init__(spec, signature)
        self.visits = Visits(self.kernel, spec, "q")
        self.write()

    # -- the kernel -------------------------------------------------------------------------
    def write(self) -> None:
        k, plan = self.kernel, self.plan
        self.start()
        first = self.printer("v")
        x = k.cells(first, plan.inside)
        keep = None if self.spec.mask.predicate() is E.TRUE else first(self.spec.mask.predicate())
        group = first(self.spec.groups) if plan.masses and self.spec.groups is not None else ""
        sink = None if self.spec.sinks is None else first(self.spec.sinks)
        k.add(first.take("head") + first.take("row"))
        k.uses(first)
        self.visits.setup(self.printer("n"))
        self.state(sink)
        self.walk(first, x, keep, group, values=not plan.two_passes)
        self.statistics()
        if plan.two_passes:
            self.second_pass()
        self.finish()
        self.store()

    def start(self) -> None:
        k, signature = self.kernel, self.signature
        k.add(f"own_tiles = {k.tiles('q')}")
        k.add("own_tile = tl.program_id(0) % own_tiles")
        if self.visits.bounds.high is not None:
            k.add("# the longest rows start first\nown_tile = own_tiles - 1 - own_tile")
        k.add("lead = tl.program_id(0) // own_tiles")
        k.indices("lead", signature.axes)
        k.place("q", "first", "own_tile")
        k.add("q = rows[:, None]\nq_inside = tl.minimum(q, size_q - 1)")
        self.own_rows("q")
        self.matrix_of("k")
        for i, leaf in enumerate(self.inners):
            self.factor(i, leaf)
        self.matrix("value", signature.value)

    def state(self, sink: str | None) -> None:
        """What a row carries from tile to tile."""
        k, plan = self.kernel, self.plan
        row = "tl.full([BM], {}, tl.float32)".format
        if plan.softmax and sink is not None:
            k.add(f"sink = {whole_rows(sink)}")
            k.add(f"peak = sink * {1 / plan.outer!r}")
            k.add("total = tl.where(sink == float('-inf'), 0.0, 1.0)")
        elif plan.peaks:
            k.add(f"peak = {row(LOWEST)}")
        if plan.top:
            k.add(f"top = {row(LOWEST)}")
        if plan.sums and not (plan.softmax and sink is not None):
            start = row("0.0")
            if sink is not None:
                name = self.normalized(f"tl.cast({sink}, tl.float32)", "sinks")
                start = whole_rows(name)
            k.add(f"total = {start}")
        if plan.counts:
            k.add("count = tl.full([BM], 0, tl.int32)")
        for mass in plan.masses:
            k.add(f"mass_{mass[5:]} = {row('0.0')}")
        if not plan.two_passes:
            k.add("acc = tl.zeros([BM, VP], tl.float32)")
            if plan.totals:
                k.add(f"edited_total = {row('0.0')}")

    # -- over the keys ----------------------------------------------------------------------
    def walk(self, printer: TritonPrinter, x: str, keep: str | None, group: str, values: bool,
             everything: bool = False) -> None:
        lines = printer.take("column") + printer.take("cell")
        loops = self.visits.loops()
        if everything:
            loops = [(False, [f"for j in tl.range(0, {self.kernel.tiles('k')}, "
                              "num_stages=STAGES):"], "j")]
        for full, opening, tile in loops:
            depth = 0
            if self.visits.edge and not full and not everything:
                self.kernel.add("if RAGGED:")
                depth = 1
            self.kernel.add(opening, depth)
            roots = [x, group, "" if full else keep or ""]
            self.scores(full, tile, live(lines, roots), depth + 1)
            if values and not everything and not self.plan.two_passes:
                self.online(full, x, keep, group, depth + 1)
            elif values:
                self.weigh(full, x, keep, depth + 1)
            else:
                self.online(full, x, keep, group, depth + 1, sums_only=True)

    def scores(self, full: bool, tile: str, lines: list[str], depth: int) -> None:
        """The raw scores of a tile and what the expressions make of them."""
        k = self.kernel
        k.place("k", "there", tile, depth)
        k.add("k = columns[None, :]", depth)
        self.rows_of("k", full, depth)
        self.raw_scores(E.score in self.plan.inside.leaves, depth)
        for i, leaf in enumerate(self.inners):
            k.add([f"right{i} = {self.factor_tile(i, leaf.value[1], 'k', 'there', full)}",
                   f"inner{i} = tl.dot(left{i}, tl.trans(right{i}), input_precision=PRECISION)"],
                  depth)
        mask = None if full else f"k < {k.size('k')}"
        k.add(masked(lines, mask), depth)

    # -- second pass --------------------------------------------------------------------------
    def second_pass(self) -> None:
        k, plan, spec = self.kernel, self.plan, self.spec
        again = self.printer("w")
        self.stat(again, whole=False)
        x = k.cells(again, plan.inside)
        keep = None if spec.mask.predicate() is E.TRUE else again(spec.mask.predicate())
        k.add(again.take("head") + again.take("row"))
        if plan.softmax:
            k.add(f"shift = row_lse * {LOG2E!r}")
            if plan.guard:
                k.add("shift = tl.where(some, shift, float('inf'))")
        k.add("acc = tl.zeros([BM, VP], tl.float32)")
        if plan.totals:
            k.add("edited_total = tl.zeros([BM], tl.float32)")
        k.uses(again)
        self.walk(again, x, keep, "", values=True, everything=plan.everywhere)

    # -- output -------------------------------------------------------------------------------
    def finish(self) -> None:
        """The output of whole rows."""
        k, plan, spec = self.kernel, self.plan, self.spec
        if spec.renormalize:
            k.add("acc = acc / edited_total[:, None]")
        elif not plan.two_passes and plan.softmax:
            zero = spec.empty_row == "zero" and spec.sinks is None and plan.guard
            total = "tl.where(some, total, 1.0)" if zero else "total"
            k.add(f"acc = acc / {total}[:, None]")
            if plan.uniform:
                self.mean_of_values()
        elif not plan.two_passes and spec.l1:
            k.add("acc = acc / total[:, None]")
        elif plan.two_passes and plan.softmax and not plan.everywhere and plan.may_be_empty and (
                spec.empty_row == "nan"):
            k.add("acc = tl.where(some[:, None], acc, float('nan'))")

    def mean_of_values(self) -> None:
        k = self.kernel
        k.add([f"if tl.min(tl.where(some | (rows >= {k.size('q')}), 1, 0), 0) == 0:",
               "    mean = tl.zeros([VP], tl.float32)",
               f"    for j in tl.range(0, {k.tiles('k')}, num_stages=1):"])
        k.place("k", "there", "j", 2)
        k.tile("value_tile", "value", self.signature.value, "k", "there", False, "BN", "V", depth=2)
        k.add("mean += tl.sum(tl.cast(value_tile, tl.float32), 0)", 2)
        k.add([f"    mean = mean / tl.cast({k.size('k')}, tl.float32)",
               "    acc = tl.where(some[:, None], acc, mean[None, :])"])

    def store(self) -> None:
        k, spec = self.kernel, self.spec
        k.add("channels = tl.arange(0, VP)\nd = channels[None, :]")
        result = "acc"
        if spec.output is not E.out:
            result = self.epilogue()
        k.add(f"out_here = {k.here('out', self.signature.axes)}")
        place = (f"out_here + tl.cast(q, tl.int64) * {k.stride('out', 'q')} + d"
                 if self.signature.grid else
                 f"out_here + tl.cast(first, tl.int64) * {k.stride('out', 'q')} + "
                 f"(q - first) * {k.stride('out', 'q')} + d")
        k.add(f"inside = (q < {k.size('q')}) & (d < V)")
        k.add(f"tl.store({place}, tl.cast({result}, out.dtype.element_ty), mask=inside)")
        if self.signature.lse:
            k.add(f"lse_here = {k.here('lse', self.signature.axes)}")
            k.add(f"tl.store(lse_here + rows, row_lse, mask=rows < {k.size('q')})")

    def epilogue(self) -> str:
        k, spec = self.kernel, self.spec
        printer = self.printer("z", "d")
        printer.given(E.out, "acc", "cell")
        self.stat(printer)
        if E.value in spec.output.leaves:
            here = k.here("value", self.signature.value, "value_rows")
            k.add(f"value_rows_here = {here}")
            k.add(f"row_value = tl.load(value_rows_here + tl.cast(q_inside, tl.int64) * "
                  f"{k.stride('value', 'k')} + d * {k.stride('value', 'd')}, mask=d < V, other=0.0)"
                  ".to(tl.float32)")
            printer.given(E.value, "row_value", "cell")
        result = k.cells(printer, spec.output, "(BM, VP)")
        lines = printer.all()
        k.uses(printer)
        k.add(masked(lines, "d < V"))
        return result
