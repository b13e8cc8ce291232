"""The backward kernels, one class each; what they compute is said in `backward.py`."""

from __future__ import annotations

from attnopt.ir.spec import Spec
from attnopt.kernels.triton.backward_body import Backward, shared_axes
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
    def __init__(self, spec: Spec, signature: Signature, slots: tuple[str, ...]) -> None:
        super().__init__(spec, signature, "grad_query", "dQ of one tile of queries.")
        k, axes = self.kernel, signature.axes
        visits = Visits(k, spec, "q")
        k.add(f"own_tiles = {k.tiles('q')}\nown_tile = tl.program_id(0) % own_tiles")
        if visits.bounds.high is not None:
            k.add("own_tile = own_tiles - 1 - own_tile")
        k.add("lead = tl.program_id(0) // own_tiles")
        k.indices("lead", axes)
        k.place("q", "first", "own_tile")
        k.add("q = rows[:, None]\nq_inside = tl.minimum(q, size_q - 1)")
        k.add([f"query_here = {k.here('query', signature.query)}",
               f"grad_here = {k.here('grad', axes)}"])
        k.tile("query_tile", "query", (), "q", "first", False, "BM", "D", descriptor=False)
        k.tile("grad_tile", "grad", (), "q", "first", False, "BM", "V", descriptor=False)
        self.matrix("key", signature.key)
        self.matrix("value", signature.value)
        for i, leaf in enumerate(self.inners):
            self.factor(i, leaf)
        self.row_pointers()
        self.row_values()
        printer = self.printer("v")
        names = self.leaves(printer, slots)
        k.add(printer.take("head") + printer.take("row"))
        k.uses(printer)
        visits.setup(self.printer("n"))
        k.add("grad_query_tile = tl.zeros([BM, DP], tl.float32)")
        k.add([f"sum_{slot} = tl.zeros([BM], tl.float32)" for slot in slots])
        lines = printer.take("column") + printer.take("cell")
        for full, opening, tile in visits.loops():
            depth = int(visits.edge and not full)
            k.add(["if RAGGED:"] if depth else [])
            k.add(opening, depth)
            self.step(full, tile, lines, names, slots, depth + 1)
        self.store("grad_query", self.times_slope("grad_query_tile"), "rows", "q", "D", axes)
        for slot in slots:
            k.add(f"sum_{slot}_here = {k.here(f'grad_{slot}', axes)}")
            k.add(f"tl.store(sum_{slot}_here + rows, sum_{slot}, mask=rows < size_q)")

    def step(self, full: bool, tile: str, lines: list[str], names: dict[str, str],
             slots: tuple[str, ...], depth: int) -> None:
        k, signature = self.kernel, self.signature
        k.place("k", "there", tile, depth)
        k.add("k = columns[None, :]", depth)
        k.tile("key_tile", "key", signature.key, "k", "there", full, "BN", "D", depth=depth)
        k.tile("value_tile", "value", signature.value, "k", "there", full, "BN", "V", depth=depth)
        k.add("score = tl.dot(query_tile, tl.trans(key_tile), input_precision=PRECISION)", depth)
        for i, leaf in enumerate(self.inners):
            k.add([f"right{i} = {self.factor_tile(i, leaf.value[1], 'k', 'there', full)}",
                   f"inner{i} = tl.dot(left{i}, tl.trans(right{i}), input_precision=PRECISION)"],
                  depth)
        roots = [text for name, text in names.items() if not (full and name == "keep")]
        k.add(masked(live(lines, roots), None if full else f"k < {k.size('k')}"), depth)
        k.add("dw = tl.dot(grad_tile, tl.trans(value_tile), input_precision=PRECISION)", depth)
        self.gradient(full, names, depth)
        k.add([f"sum_{slot} += tl.sum(dx * {names[f'to_{slot}']}, 1)" for slot in slots], depth)
        self.of_score(names, depth)
        k.add("grad_query_tile = tl.dot(tl.cast(dx, key_tile.dtype), key_tile, grad_query_tile, "
              "input_precision=PRECISION)", depth)


class GradKey(Backward):
    across = True

    def __init__(self, spec: Spec, signature: Signature, slots: tuple[str, ...]) -> None:
        super().__init__(spec, signature, "grad_key", "dK and dV of one tile of keys.")
        k = self.kernel
        shared = shared_axes(signature, bool(slots))
        own = tuple(a for a in signature.axes if a not in shared)
        k.add(f"own_tiles = {k.tiles('k')}")
        k.add("own_tile = tl.program_id(0) % own_tiles\nlead = tl.program_id(0) // own_tiles")
        k.indices("lead", own)
        k.place("k", "first", "own_tile")
        k.add("k = columns[:, None]")
        for name, width in (("key", "D"), ("value", "V")):
            k.add(f"{name}_here = {k.here(name, getattr(signature, name))}")
            k.tile(f"{name}_tile", name, (), "k", "first", False, "BN", width, descriptor=False)
        k.add("grad_key_tile = tl.zeros([BN, DP], tl.float32)\n"
              "grad_value_tile = tl.zeros([BN, VP], tl.float32)")
        k.add([f"sum_{slot} = tl.zeros([BN], tl.float32)" for slot in slots])
        start = len(k.lines)
        if shared:
            k.indices("member", shared)
        self.walk(slots)
        if shared:
            count = " * ".join(k.size(a) for a in shared)
            k.lines[start:] = [f"for member in tl.range(0, {count}, num_stages=1):",
                               *("    " + line for line in k.lines[start:])]
        self.store("grad_key", self.times_slope("grad_key_tile"), "columns", "k", "D", own)
        self.store("grad_value", "grad_value_tile", "columns", "k", "V", own)
        for slot in slots:
            k.add(f"sum_{slot}_here = {k.here(f'grad_{slot}', own)}")
            k.add(f"tl.store(sum_{slot}_here + columns, sum_{slot}, mask=columns < size_k)")

    def walk(self, slots: tuple[str, ...]) -> None:
        """Over the queries of one head."""
        k, signature = self.kernel, self.signature
        visits = Visits(k, self.spec, "k")
        self.matrix("query", signature.query)
        self.matrix("grad", signature.axes)
        self.row_pointers()
        printer = self.printer("v")
        names = self.leaves(printer, slots)
        inside = f"k < {k.size('k')}"
        k.add(masked(printer.take("head") + printer.take("column"), inside))
        k.uses(printer)
        for i, leaf in enumerate(self.inners):
            self.factor(i, leaf, by="k")
        visits.setup(self.printer("n"))
        lines = masked(printer.take("row") + printer.take("cell"), inside)
        for full, opening, tile in visits.loops():
            k.add(opening)
            self.step(full, tile, lines, names, slots)

    def step(self, full: bool, tile: str, lines: list[str], names: dict[str, str],
             slots: tuple[str, ...]) -> None:
        k, signature = self.kernel, self.signature
        k.place("q", "there", tile, 1)
        k.add(["q = rows[None, :]", f"q_inside = tl.minimum(q, {k.size('q')} - 1)"], 1)
        k.tile("query_tile", "query", signature.query, "q", "there", full, "BM", "D", depth=1)
        k.tile("grad_tile", "grad", signature.axes, "q", "there", full, "BM", "V", depth=1)
        self.row_values(1)
        k.add("score = tl.dot(key_tile, tl.trans(query_tile), input_precision=PRECISION)", 1)
        for i, leaf in enumerate(self.inners):
            k.add([f"left{i} = {self.factor_tile(i, leaf.value[0], 'q', 'there', full)}",
                   f"inner{i} = tl.dot(right{i}, tl.trans(left{i}), input_precision=PRECISION)"], 1)
        roots = [text for name, text in names.items() if not (full and name == "keep")]
        k.add(live(lines, roots), 1)
        k.add("dw = tl.dot(value_tile, tl.trans(grad_tile), input_precision=PRECISION)", 1)
        self.gradient(full, names, 1)
        k.add("grad_value_tile = tl.dot(tl.cast(p, grad_tile.dtype), grad_tile, grad_value_tile, "
              "input_precision=PRECISION)", 1)
        k.add([f"sum_{slot} += tl.sum(dx * {names[f'to_{slot}']}, 1)" for slot in slots], 1)
        self.of_score(names, 1)
        k.add("grad_key_tile = tl.dot(tl.cast(dx, query_tile.dtype), query_tile, grad_key_tile, "
              "input_precision=PRECISION)", 1)


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
