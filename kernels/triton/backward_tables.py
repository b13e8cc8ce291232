"""The gradient of a table that the logits gather from: buckets of positions, offsets in a window.

    grad_table[index(h, q, k)] += dx(q, k) * d logits / d table[index]

One program for each tile of each entry of the leading axes adds what it finds by atomics in
float32. Many pairs meet in few entries, so there are several copies of the table, and programs with
neighbouring numbers add to different ones; the copies are summed after.
"""

from __future__ import annotations

from attnopt.ir import expr as E
from attnopt.ir.derivative import depends, derivative
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.backward_body import Backward
from attnopt.kernels.triton.layout import Signature
from attnopt.kernels.triton.printer import masked

#: numbers of all copies together, and copies
_MOST_NUMBERS, _MOST_COPIES = 1 << 22, 64


def copies(numbers: int) -> int:
    """How many copies a table of so many numbers gets."""
    return max(1, min(_MOST_COPIES, _MOST_NUMBERS // max(numbers, 1)))


def gathers(spec: Spec, slot: str) -> tuple[Expr, ...]:
    """The look-ups in a table that the logits change with; () where it enters another way too."""
    leaves = [x for x in spec.logits.leaves if x.op in ("load", "inner") and slot in x.slots]
    if any(x.op != "load" or x.value != slot or not x.args or any(
            slot in a.slots for a in x.args) for x in leaves):
        return ()
    try:
        return tuple(sorted((x for x in leaves if depends(spec.logits, x)), key=str))
    except ValueError:
        return ()


class GradTable(Backward):
    def __init__(self, spec: Spec, signature: Signature, slot: str) -> None:
        super().__init__(spec, signature, f"grad_{slot}",
                         f"What one tile adds to the gradient of the table {slot}.")
        k = self.kernel
        self.start_tile(signature.axes)
        self.tiles()
        printer = self.printer("v")
        names = self.leaves(printer, ())
        own = f"grad_{slot}"
        found = []
        for leaf in gathers(spec, slot):
            change = printer(derivative(spec.logits, leaf))
            place = printer.gathered(E.load(own, *leaf.args), [printer(a) for a in leaf.args])
            found.append((change, place))
        k.add(masked(printer.all(), f"k < {k.size('k')}"))
        k.uses(printer)
        k.add("dw = tl.dot(grad_tile, tl.trans(value_tile), input_precision=PRECISION)")
        self.gradient(False, names, 0)
        count = k.argument("copies", "length", f"copies_{slot}", "0")
        step = k.argument("copy_step", "stride", f"copies_{slot}", "0")
        k.add(f"copy = tl.program_id(0) % {count} * {step} + tl.zeros([BM, BN], tl.int32)")
        for change, place in found:
            k.add([f"tl.atomic_add({place} + copy, tl.broadcast_to(dx * {change}, (BM, BN)),",
                   '              mask=keep, sem="relaxed")'])
