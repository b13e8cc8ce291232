"""What the backward kernels share: the weights of a tile again, and the gradient of its logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attnopt.ir import expr as E
from attnopt.ir.derivative import derivative
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.layout import Signature
from attnopt.kernels.triton.plan import LOG2E, Plan
from attnopt.kernels.triton.printer import TritonPrinter
from attnopt.kernels.triton.scores import Scores
from attnopt.kernels.triton.steps import CONSTANTS


def shared_axes(signature: Signature, columns: bool) -> tuple[str, ...]:
    """Leading axes along which neither keys nor values vary, over which `grad_key` sums."""
    if columns or signature.key != signature.value:
        return ()
    return tuple(a for a in signature.axes if a not in signature.key)


#: by slot of a factor, the numbers of the low-rank terms that it is part of
Factors = Mapping[str, tuple[int, ...]]


def wanted(factors: Factors) -> list[int]:
    """The terms of which these are factors."""
    return sorted({i for of in factors.values() for i in of})


class Backward(Scores):
    """The weights of a tile and the gradient of its logits; dK and dV want it transposed."""

    def __init__(self, spec: Spec, signature: Signature, name: str, title: str) -> None:
        super().__init__(spec, signature, name, title, CONSTANTS)
        self.plan = Plan(spec, signature)
        self.slope = derivative(spec.logits, E.score)

    def leaves(self, printer: TritonPrinter, slots: tuple[str, ...],
               inners: Iterable[int] = ()) -> dict[str, str]:
        """Print logits, mask, and the derivatives that are asked for; their names.

        inners: numbers of low-rank terms, whose derivatives are under "inner <number>"
        """
        k, spec = self.kernel, self.spec
        names = {"x": k.cells(printer, self.plan.inside, self.shape)}
        if spec.mask.predicate() is not E.TRUE:
            names["keep"] = printer(spec.mask.predicate())
        if self.slope.op != "const":
            names["slope"] = printer(self.slope)
        for slot in slots:
            names[f"to_{slot}"] = printer(derivative(spec.logits, E.load(slot)))
        for i in inners:
            names[f"inner {i}"] = printer(derivative(spec.logits, self.inners[i]))
        return names

    def by_row(self, name: str) -> str:
        return f"{name}[None, :]" if self.across else f"{name}[:, None]"

    def row_values(self, depth: int = 0) -> None:
        """What the forward kernel knows of the rows at hand."""
        k = self.kernel
        inside = f"mask=rows < {k.size('q')}, other=0.0"
        if self.plan.softmax or self.spec.l1:
            k.add([f"row_lse = tl.load(lse_here + rows, {inside})",
                   f"row_delta = tl.load(delta_here + rows, {inside})"], depth)
        if self.plan.softmax:
            k.add([f"shift = row_lse * {LOG2E!r}",
                   "shift = tl.where(row_lse == float('-inf'), float('inf'), shift)",
                   "row_delta = tl.where(row_lse == float('-inf'), 0.0, row_delta)"], depth)
        elif self.spec.l1:
            k.add("inverse = tl.exp(-row_lse)", depth)

    def row_pointers(self) -> None:
        k = self.kernel
        if self.plan.softmax or self.spec.l1:
            k.add([f"lse_here = {k.here('lse', self.signature.axes)}",
                   f"delta_here = {k.here('delta', self.signature.axes)}"])

    def start_tile(self, axes: tuple[str, ...]) -> None:
        """One program for each tile of queries by keys, of one entry of these leading axes."""
        k = self.kernel
        k.add(f"own_tiles = tl.cdiv({k.size('q')}, BM)\nkey_tiles = tl.cdiv({k.size('k')}, BN)")
        k.add("""
            number = tl.program_id(0)
            there = number % key_tiles * BN
            number = number // key_tiles
            first = number % own_tiles * BM
            lead = number // own_tiles
        """)
        k.indices("lead", axes)
        k.add("""
            rows = first + tl.arange(0, BM)
            columns = there + tl.arange(0, BN)
            q = rows[:, None]
            q_inside = tl.minimum(q, size_q - 1)
            k = columns[None, :]
        """)

    def tiles(self) -> None:
        """Load such a tile's rows of all tensors; its scores."""
        k, signature = self.kernel, self.signature
        for axis, place, count, name, axes in (
                ("q", "first", "BM", "grad", signature.axes),
                ("k", "there", "BN", "value", signature.value)):
            self.own_rows(axis, place)
            k.add(f"{name}_here = {k.here(name, axes)}")
            k.tile(f"{name}_tile", name, (), axis, place, False, count, "V", descriptor=False)
        self.row_pointers()
        self.row_values()
        self.raw_scores(E.score in self.plan.inside.leaves)
        for i, leaf in enumerate(self.inners):
            self.factor(i, leaf)
            k.add([f"right{i} = {self.factor_tile(i, leaf.value[1], 'k', 'there', False)}",
                   f"inner{i} = tl.dot(left{i}, tl.trans(right{i}), input_precision=PRECISION)"])

    def gradient(self, full: bool, names: dict[str, str], depth: int) -> None:
        """`p`, what meets the values, and `dx`, from score and dw."""
        k, plan = self.kernel, self.plan
        k.add(f"x = {names['x']}", depth)
        if not full:
            k.add(f"keep = tl.broadcast_to({self.inside(names)}, {self.shape})", depth)
        if plan.softmax:
            k.add([f"p = tl.exp2(x * {plan.factor} - {self.by_row('shift')})"]
                  + ([] if full else ["p = tl.where(keep, p, 0.0)"])
                  + [f"dx = p * (dw - {self.by_row('row_delta')})"], depth)
        else:
            self.other_normalizer(full, depth)
        if not full:
            k.add("dx = tl.where(keep, dx, 0.0)", depth)

    def other_normalizer(self, full: bool, depth: int) -> None:
        k, spec = self.kernel, self.spec
        leaf = E.load("x")
        weight = leaf if spec.normalizer == "identity" else E.call(spec.normalizer, leaf)
        printer = TritonPrinter(lambda slot: ("q", "k"), wide=self.signature.wide)
        printer.prefix = "f"
        printer.given(leaf, "x", "cell")
        value, change = printer(weight), printer(derivative(weight, leaf))
        k.add(printer.all(), depth)
        k.uses(printer)
        scale = f" * {self.by_row('inverse')}" if spec.l1 else ""
        k.add(f"p = {value}{scale}" if full else f"p = tl.where(keep, {value}{scale}, 0.0)", depth)
        inner = f"(dw - {self.by_row('row_delta')}){scale}" if spec.l1 else "dw"
        k.add(f"dx = {change} * {inner}", depth)

    def inside(self, names: dict[str, str]) -> str:
        bounds = f"(k < {self.kernel.size('k')}) & (q < {self.kernel.size('q')})"
        return f"{names['keep']} & {bounds}" if "keep" in names else bounds

    def add_factors(self, own: str, other: str, factors: Factors, names: dict[str, str],
                    depth: int) -> None:
        """What a tile adds to the gradients of factors: of left @ right^T, dL = dI @ R."""
        self.kernel.add(
            [f"{own}_sum_{slot} = tl.dot(tl.cast(dx * {names[f'inner {i}']}, {other}{i}.dtype), "
             f"{other}{i}, {own}_sum_{slot}, input_precision=PRECISION)"
             for slot, of in factors.items() for i in of], depth)

    def of_score(self, names: dict[str, str], depth: int) -> None:
        if "slope" in names:
            self.kernel.add(f"dx = dx * {names['slope']}", depth)

    def times_slope(self, name: str) -> str:
        constant = self.slope.value if self.slope.op == "const" else 1.0
        return name if constant == 1.0 else f"{name} * {constant!r}"

    def store(self, tensor: str, name: str, rows: str, axis: str, width: str,
              axes: tuple[str, ...]) -> None:
        """Store a matrix of a program's own rows."""
        k = self.kernel
        k.add(f"{tensor}_here = {k.here(tensor, axes)}")
        k.add(f"channel = tl.arange(0, {width}P)[None, :]")
        k.add(f"place = {tensor}_here + tl.cast({rows}, tl.int64)[:, None] * "
              f"{k.stride(tensor, axis)} + channel" if self.signature.grid else
              f"place = {tensor}_here + tl.cast(first, tl.int64) * {k.stride(tensor, axis)} + "
              f"({rows} - first)[:, None] * {k.stride(tensor, axis)} + channel")
        k.add(f"tl.store(place, tl.cast({name}, {tensor}.dtype.element_ty), "
              f"mask=({rows}[:, None] < {k.size(axis)}) & (channel < {width}))")
