"""The backward kernels, one class each; what they compute is said in `backward.py`."""

from __future__ import annotations

from types import MappingProxyType

from attnopt.ir import expr as E
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.backward_body import Backward, Factors, shared_axes, wanted
from attnopt.kernels.triton.body import Body
from attnopt.kernels.triton.intervals import Visits
from attnopt.kernels.triton.layout import Signature
from attnopt.kernels.triton.printer import live, masked


class RowDots(Body):
    def __init__(self, spec: Spec, signature: Signature) -> None:
        super().__init__(spec, signature, "row_dots", "The products of rows of out and grad.",
                         ("BM", "V", "VP"))
        k = self.kernel
        k.add(f"own_tiles = tl.cdiv({k.size('q')}, BM)")
        k.add("first = tl.program_id(0) % own_tiles * BM\nlead = tl.program_id(0) // own_tiles")
        k.indices("lead", signature.axes)
        for name in ("out", "grad"):
            k.add(f"{name}_here = {k.here(name, signature.axes)}")
            k.tile(f"{name}_tile", name, (), "q", "first", False, "BM", "V", descriptor=False)
        k.add("dots = tl.sum(tl.cast(out_tile, tl.float32) * tl.cast(grad_tile, tl.float32), 1)")
        k.add(f"rows = first + tl.arange(0, BM)\ndelta_here = {k.here('delta', signature.axes)}")
        k.add(f"tl.store(delta_here + rows, dots, mask=rows < {k.size('q')})")


class GradQuery(Backward):
    """slots: operands that do not vary along k; factors: of low-rank terms, those along q, by slot
    the numbers of the terms; weight: that of an additive score, too"""

    def __init__(self, spec: Spec, signature: Signature, slots: tuple[str, ...] = (),
                 factors: Factors = MappingProxyType({}), weight: bool = False) -> None:
        super().__init__(spec, signature, "grad_query", "dQ of one tile of queries.")
        self.slots, self.factors, self.weight = slots, factors, weight
        k, axes = self.kernel, signature.axes
        visits = Visits(k, spec, "q")
        k.add(f"own_tiles = {k.tiles('q')}\nown_tile = tl.program_id(0) % own_tiles")
        if visits.bounds.high is not None:
            k.add("own_tile = own_tiles - 1 - own_tile")
        k.add("lead = tl.program_id(0) // own_tiles")
        k.indices("lead", axes)
        k.place("q", "first", "own_tile")
        k.add("q = rows[:, None]\nq_inside = tl.minimum(q, size_q - 1)")
        self.own_rows("q")
        k.add(f"grad_here = {k.here('grad', axes)}")
        k.tile("grad_tile", "grad", (), "q", "first", False, "BM", "V", descriptor=False)
        self.matrix_of("k")
        self.matrix("value", signature.value)
        for i, leaf in enumerate(self.inners):
            self.factor(i, leaf)
        self.row_pointers()
        self.row_values()
        printer = self.printer("v")
        names = self.leaves(printer, slots, wanted(factors))
        k.add(printer.take("head") + printer.take("row"))
        k.uses(printer)
        visits.setup(self.printer("n"))
        if spec.score != "key":
            k.add("grad_query_tile = tl.zeros([BM, DP], tl.float32)")
        k.add([f"sum_{slot} = tl.zeros([BM], tl.float32)" for slot in slots])
        k.add([f"left_sum_{slot} = tl.zeros([BM, R{of[0]}P], tl.float32)"
               for slot, of in factors.items()])
        k.add(["weight_sum = tl.zeros([DP], tl.float32)"] if weight else [])
        lines = printer.take("column") + printer.take("cell")
        for full, opening, tile in visits.loops():
            depth = int(visits.edge and not full)
            k.add(["if RAGGED:"] if depth else [])
            k.add(opening, depth)
            self.step(full, tile, lines, names, depth + 1)
        if spec.score != "key":
            self.store("grad_query", self.times_slope("grad_query_tile"), "rows", "q", "D", axes)
        for slot in slots:
            k.add(f"sum_{slot}_here = {k.here(f'grad_{slot}', axes)}")
            k.add(f"tl.store(sum_{slot}_here + rows, sum_{slot}, mask=rows < size_q)")
        for slot, of in factors.items():
            self.store(f"left_grad_{slot}", f"left_sum_{slot}", "rows", "q", f"R{of[0]}", axes)
        if weight:
            place = k.argument("grad_weight", "pointer", "grad_weight")
            k.add("channels = tl.arange(0, DP)")
            k.add(f"tl.store({place} + tl.program_id(0) * D + channels, "
                  f"{self.times_slope('weight_sum')}, mask=channels < D)")

    def step(self, full: bool, tile: str, lines: list[str], names: dict[str, str], depth: int
             ) -> None:
        k, signature, slots = self.kernel, self.signature, self.slots
        k.place("k", "there", tile, depth)
        k.add("k = columns[None, :]", depth)
        self.rows_of("k", full, depth)
        k.tile("value_tile", "value", signature.value, "k", "there", full, "BN", "V", depth=depth)
        self.raw_scores(E.score in self.plan.inside.leaves, depth)
        for i, leaf in enumerate(self.inners):
            k.add([f"right{i} = {self.factor_tile(i, leaf.value[1], 'k', 'there', full)}",
                   f"inner{i} = tl.dot(left{i}, tl.trans(right{i}), input_precision=PRECISION)"],
                  depth)
        roots = [text for name, text in names.items() if not (full and name == "keep")]
        k.add(masked(live(lines, roots), None if full else f"k < {k.size('k')}"), depth)
        k.add("dw = tl.dot(grad_tile, tl.trans(value_tile), input_precision=PRECISION)", depth)
        self.gradient(full, names, depth)
        k.add([f"sum_{slot} += tl.sum(dx * {names[f'to_{slot}']}, 1)" for slot in slots], depth)
        self.add_factors("left", "right", self.factors, names, depth)
        self.of_score(names, depth)
        self.add_slopes("grad_query_tile", depth)
        if self.weight:
            self.add_weights("weight_sum", depth)


class GradKey(Backward):
    """slots: operands that vary along k alone; factors: of low-rank terms, those along k"""

    across = True

    def __init__(self, spec: Spec, signature: Signature, slots: tuple[str, ...] = (),
                 factors: Factors = MappingProxyType({})) -> None:
        super().__init__(spec, signature, "grad_key", "dK and dV of one tile of keys.")
        self.slots, self.factors = slots, factors
        k = self.kernel
        shared = shared_axes(signature, bool(slots or factors))
        own = tuple(a for a in signature.axes if a not in shared)
        k.add(f"own_tiles = {k.tiles('k')}")
        k.add("own_tile = tl.program_id(0) % own_tiles\nlead = tl.program_id(0) // own_tiles")
        k.indices("lead", own)
        k.place("k", "first", "own_tile")
        k.add("k = columns[:, None]")
        self.own_rows("k")
        k.add(f"value_here = {k.here('value', signature.value)}")
        k.tile("value_tile", "value", (), "k", "first", False, "BN", "V", descriptor=False)
        if spec.score != "key":
            k.add("grad_key_tile = tl.zeros([BN, DP], tl.float32)")
        k.add("grad_value_tile = tl.zeros([BN, VP], tl.float32)")
        k.add([f"sum_{slot} = tl.zeros([BN], tl.float32)" for slot in slots])
        k.add([f"right_sum_{slot} = tl.zeros([BN, R{of[0]}P], tl.float32)"
               for slot, of in factors.items()])
        start = len(k.lines)
        if shared:
            k.indices("member", shared)
        self.walk()
        if shared:
            count = " * ".join(k.size(a) for a in shared)
            k.lines[start:] = [f"for member in tl.range(0, {count}, num_stages=1):",
                               *("    " + line for line in k.lines[start:])]
        if spec.score != "key":
            self.store("grad_key", self.times_slope("grad_key_tile"), "columns", "k", "D", own)
        self.store("grad_value", "grad_value_tile", "columns", "k", "V", own)
        for slot in slots:
            k.add(f"sum_{slot}_here = {k.here(f'grad_{slot}', own)}")
            k.add(f"tl.store(sum_{slot}_here + columns, sum_{slot}, mask=columns < size_k)")
        for slot, of in factors.items():
            self.store(f"right_grad_{slot}", f"right_sum_{slot}", "columns", "k", f"R{of[0]}", own)

    def walk(self) -> None:
        """Over the queries of one head."""
        k, signature = self.kernel, self.signature
        visits = Visits(k, self.spec, "k")
        self.matrix_of("q")
        self.matrix("grad", signature.axes)
        self.row_pointers()
        printer = self.printer("v")
        names = self.leaves(printer, self.slots, wanted(self.factors))
        inside = f"k < {k.size('k')}"
        k.add(masked(printer.take("head") + printer.take("column"), inside))
        k.uses(printer)
        for i, leaf in enumerate(self.inners):
            self.factor(i, leaf, by="k")
        visits.setup(self.printer("n"))
        lines = masked(printer.take("row") + printer.take("cell"), inside)
        for full, opening, tile in visits.loops():
            k.add(opening)
            self.step(full, tile, lines, names)

    def step(self, full: bool, tile: str, lines: list[str], names: dict[str, str]) -> None:
        k, signature = self.kernel, self.signature
        k.place("q", "there", tile, 1)
        k.add(["q = rows[None, :]", f"q_inside = tl.minimum(q, {k.size('q')} - 1)"], 1)
        self.rows_of("q", full, 1)
        k.tile("grad_tile", "grad", signature.axes, "q", "there", full, "BM", "V", depth=1)
        self.row_values(1)
        self.raw_scores(E.score in self.plan.inside.leaves, 1)
        for i, leaf in enumerate(self.inners):
            k.add([f"left{i} = {self.factor_tile(i, leaf.value[0], 'q', 'there', full)}",
                   f"inner{i} = tl.dot(right{i}, tl.trans(left{i}), input_precision=PRECISION)"], 1)
        roots = [text for name, text in names.items() if not (full and name == "keep")]
        k.add(live(lines, roots), 1)
        k.add("dw = tl.dot(value_tile, tl.trans(grad_tile), input_precision=PRECISION)", 1)
        self.gradient(full, names, 1)
        k.add("grad_value_tile = tl.dot(tl.cast(p, grad_tile.dtype), grad_tile, grad_value_tile, "
              "input_precision=PRECISION)", 1)
        k.add([f"sum_{slot} += tl.sum(dx * {names[f'to_{slot}']}, 1)" for slot in self.slots], 1)
        self.add_factors("right", "left", self.factors, names, 1)
        self.of_score(names, 1)
        self.add_slopes("grad_key_tile", 1)


class GradTile(Backward):
    """Of one operand that varies along q and k."""

    def __init__(self, spec: Spec, signature: Signature, slot: str) -> None:
        super().__init__(spec, signature, f"grad_{slot}",
                         f"The gradient of one tile of the operand {slot}.")
        k = self.kernel
        own = tuple(a for a in signature.axes if a in self.axes_of(slot))
        rest = tuple(a for a in signature.axes if a not in own)
        self.start_tile(own)
        k.add("gradient = tl.zeros([BM, BN], tl.float32)")
        start = len(k.lines)
        if rest:
            k.indices("member", rest)
        self.step(slot)
        if rest:
            count = " * ".join(k.size(a) for a in rest)
            k.lines[start:] = [f"for member in tl.range(0, {count}, num_stages=1):",
                               *("    " + line for line in k.lines[start:])]
        tensor = f"grad_{slot}"
        k.add(f"{tensor}_here = {k.here(tensor, own)}")
        k.add(f"place = {tensor}_here + tl.cast(q, tl.int64) * {k.stride(tensor, 'q')} + k")
        k.add(f"tl.store(place, tl.cast(gradient, {tensor}.dtype.element_ty), "
              "mask=(q < size_q) & (k < size_k))")

    def step(self, slot: str) -> None:
        k = self.kernel
        self.tiles()
        printer = self.printer("v")
        names = self.leaves(printer, (slot,))
        k.add(masked(printer.all(), f"k < {k.size('k')}"))
        k.uses(printer)
        k.add("dw = tl.dot(grad_tile, tl.trans(value_tile), input_precision=PRECISION)")
        self.gradient(False, names, 0)
        k.add(f"gradient += tl.broadcast_to(dx * {names[f'to_{slot}']}, (BM, BN))")
