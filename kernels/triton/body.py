"""What the text of every kernel of a Spec is made from: printers, tiles of keys, the normaliser."""

from __future__ import annotations

from collections.abc import Sequence

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.layout import Kernel, Signature
from attnopt.kernels.triton.printer import TritonPrinter, operand_axes


def whole_rows(text: str) -> str:
    """A value for each row of the tile, which it may not vary over."""
    return f"tl.reshape(tl.broadcast_to(tl.cast({text}, tl.float32), (BM, 1)), (BM,))"


def inner_leaves(spec: Spec) -> list[Expr]:
    """The low-rank terms of a Spec, in the order in which kernels number them."""
    return sorted({leaf for e in (spec.logits, spec.weights) for leaf in e.leaves
                   if leaf.op == "inner"}, key=str)


class Body:
    """A kernel while it is written."""

    def __init__(self, spec: Spec, signature: Signature, name: str, title: str,
                 constants: Sequence[str]) -> None:
        self.spec, self.signature = spec, signature
        self.axes_of = operand_axes(spec.operands, signature.axes)
        self.kernel = Kernel(name, title, signature, constants)
        self.inners = inner_leaves(spec)

    def printer(self, prefix: str, column: str = "k") -> TritonPrinter:
        printer = TritonPrinter(self.axes_of, column, self.signature.wide)
        printer.prefix = prefix
        if column == "k":
            printer.given(E.score, "score", "cell")
            for i, leaf in enumerate(self.inners):
                printer.given(leaf, f"inner{i}", "cell")
        return printer

    def matrix(self, name: str, axes: tuple[str, ...]) -> None:
        self.kernel.add(["if not TMA:", f"    {name}_here = {self.kernel.here(name, axes)}"])

    def factor(self, i: int, leaf: Expr, by: str = "q") -> None:
        """A low-rank term's side of the program's own tile; the other is loaded with each tile."""
        k = self.kernel
        for slot, side in zip(leaf.value, "qk", strict=True):
            axes = [a for a in self.axes_of(slot) if a not in ("q", "k")]
            k.add(f"op_{slot}_here = {k.here(f'op_{slot}', axes)}")
            self.kernel.constants += (f"R{i}", f"R{i}P") if side == "q" else ()
        name, slot = (f"left{i}", leaf.value[0]) if by == "q" else (f"right{i}", leaf.value[1])
        k.add(f"{name} = {self.factor_tile(i, slot, by, 'first', False)}")

    def factor_tile(self, i: int, slot: str, axis: str, first: str, whole: bool) -> str:
        k = self.kernel
        rows, tokens = ("BM", "rows") if axis == "q" else ("BN", "columns")
        if self.signature.grid:
            return (f"load_tokens(op_{slot}_here, {tokens}, {k.stride(f'op_{slot}', axis)}, "
                    f"{k.stride(f'op_{slot}', 'r')}, {k.size(axis)}, {whole}, R{i}, R{i}P)")
        return (f"load_rows(op_{slot}_here, {first}, {k.stride(f'op_{slot}', axis)}, "
                f"{k.stride(f'op_{slot}', 'r')}, {k.size(axis)}, {whole}, {rows}, R{i}, R{i}P)")

    def normalized(self, x: str, prefix: str) -> str:
        """The name of normalizer(x), printed as an expression."""
        leaf = E.load(f"{prefix}_x")
        expr = leaf if self.spec.normalizer == "identity" else E.call(self.spec.normalizer, leaf)
        printer = TritonPrinter(lambda slot: ("q", "k"), wide=self.signature.wide)
        printer.prefix = f"{prefix}_"
        printer.given(leaf, f"{prefix}_in", "cell")
        name = printer(expr)
        self.pending = [f"{prefix}_in = {x}", *printer.take("cell")]
        if prefix == "sinks":
            self.kernel.add(self.pending)
        self.kernel.uses(printer)
        return name

    def kept(self, full: bool, keep: str | None) -> str | None:
        """The condition under which a key counts; None in FULL tiles."""
        if full:
            return None
        inside = f"(k < {self.kernel.size('k')})"
        return inside if keep is None else f"{keep} & {inside}"
