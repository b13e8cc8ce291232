"""Spec + tile -> the C++ source of the kernel of its gradients: `backward.h` with its statements.

The derivatives of the logits are `attnopt.ir.derivative`s, printed beside the logits themselves, so
that what both need is computed once. The gradient of an operand is a sum of dX * d logits / d load
over all scores that one element of it meets. Parts of that sum are kept in registers as far as the
place of the element allows, by the level at which it is known:

    cell     added where the score reads it: a vector for neighbouring keys, else lane by lane
    row      summed over the keys of a tile first
    column   summed over the rows of a tile first
    head     summed over the tile
"""

from __future__ import annotations

from attnopt.ir import expr as E
from attnopt.ir.derivative import depends, derivative
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels.cpp.printer import CppPrinter
from attnopt.kernels.cpp.template import Hoisted, Parts, Signature, Source, Tile, is_table


def backward_source(signature: Signature, wanted: tuple[str, ...], tile: Tile, width: int) -> str:
    """The text of the kernel; `wanted` are slots of operands that want a gradient."""
    kind = _WindowSource if tile.whole else _BackwardSource
    return kind(signature, wanted, tile, width).text()


def loads_of(spec: Spec, slot: str) -> list[Expr]:
    """The loads of an operand that the logits change with."""
    scaled = Parts.of(spec).scaled
    return sorted((n for n in scaled.leaves if n.op == "load" and n.value == slot
                   and n.dtype == E.FLOAT and depends(scaled, n)), key=str)


class _BackwardSource(Source):
    files = ("attention.h", "pairs.h", "lanes.h", "products.h", "gradients.h", "backward.h")

    def __init__(self, signature: Signature, wanted: tuple[str, ...], tile: Tile, width: int
                 ) -> None:
        super().__init__(signature, tile, width)
        self.wanted = wanted
        self.found: dict[str, list[str]] = {}

    def constants(self) -> list[str]:
        return [f"constexpr int GRADIENTS = {len(self.wanted)};", *super().constants()]

    def blocks(self) -> dict[str, list[str]]:
        kinds = {slot: f"TableSum<{self.ranks[slot]}>" if is_table(self.spec.operand(slot))
                 else "Sum" for slot in self.wanted}
        return {
            **self.operand_blocks(),
            "gradients": ["struct Gradients {",
                          *(f"  {kind} {slot};" for slot, kind in kinds.items()), "};"],
            "read_gradients": [f"call.gradients.{slot}.read(r);" for slot in self.wanted],
            **self.gradient_blocks()}

    def gradient_blocks(self) -> dict[str, list[str]]:
        scaled = self.parts.scaled
        printer = self.printer("x")
        printer.given(E.score, "score", "cell")
        slopes = [derivative(scaled, E.score)]
        value, slope = printer(scaled), printer(slopes[0])
        keep = self.printer("m")
        kept = keep(self.parts.predicate)
        found = self.found = {name: [] for name in (
            "gradient_head", "sums", "gradient_cell", "gradient_row", "gradient_tile",
            "gradient_rows")}
        places: list[Expr] = []
        for number, slot in enumerate(self.wanted):
            of = f"call.gradients.{slot}"
            found["gradient_head"] += [f"const auto& of_{slot} = {of};",
                                       f"float* const to_{slot} = of_{slot}.at(place, b.block);",
                                       f"(void)of_{slot}, (void)to_{slot};"]
            for i, load in enumerate(loads_of(self.spec, slot)):
                slopes.append(derivative(scaled, load))
                name = f"{slot}_{i}"
                found["gradient_cell"] += [
                    f"vf part_{name} = change * {printer(slopes[-1])};",
                    f"if constexpr (PARTIAL) part_{name} = kept[j] ? part_{name} : vf{{}};"]
                if load.args:
                    self.gathered(printer, load, name)
                    places += load.args
                else:
                    self.broadcast(printer.levels[load], slot, name, f"b.lanes[{number}]")
        score = Hoisted.of(printer, scaled, *slopes, *places)
        mask = Hoisted.of(keep, self.parts.predicate)
        tile = found["gradient_tile"]
        if tile:
            tile[:0] = ["for (int j = 0; j < NB; j++) {", "  const int32_t column = k0 + j * W;",
                        "  const vi index_k = column + lanes();", "  (void)index_k;",
                        *(f"  {line}" for line in score.take_column)]
            tile.append("}")
        return {
            **found,
            "head": [*printer.lines["head"], *keep.lines["head"]],
            "row_fields": ["struct RowValues {", *score.fields, *mask.fields, "};"],
            "row_values": [*printer.lines["row"], *score.keep_row, *keep.lines["row"],
                           *mask.keep_row],
            "row": [*score.take_row, *mask.take_row, *found["sums"]],
            "columns": [*score.arrays, *mask.arrays],
            "score_columns": [*printer.lines["column"], *score.keep_column],
            "mask_columns": [*keep.lines["column"], *mask.keep_column],
            "cell": [*score.take_column, *printer.lines["cell"], f"#define LOGIT {value}",
                     f"#define SLOPE {slope}"],
            "mask": [*mask.take_column, *keep.lines["cell"], f"kept[j] &= mask({kept});"]}

    def broadcast(self, level: str, slot: str, name: str, lanes: str) -> None:
        """Where a part of the gradient of an operand goes that broadcasts."""
        found, of = self.found, f"of_{slot}"
        if level == "column":
            found["gradient_head"].append(f"vf sums_{name}[NB] = {{}};")
            found["gradient_cell"].append(f"sums_{name}[j] += part_{name};")
            found["gradient_tile"] += [
                f"  if ({of}.column) add_lanes<true>(to_{slot}, column, size_k, sums_{name}[j]);",
                f"  else {lanes}[0] += sums_{name}[j];"]
        else:
            found["sums"].append(f"vf sum_{name}{{}};")
            found["gradient_row"].append(f"{lanes}[i] += sum_{name};")
            found["gradient_cell"] += [
                f"if ({of}.column) add_lanes<PARTIAL>(to_{slot} + (int64_t)index_q * {of}.row, "
                f"column, size_k, part_{name});", f"else sum_{name} += part_{name};"
                ] if level == "cell" else [f"sum_{name} += part_{name};"]
        found["gradient_rows"] += [
            f"if (!call.gradients.{slot}.column) add_rows(call.gradients.{slot}.at(place, b.block),"
            f" call.gradients.{slot}.row, {lanes}, first, rows);"]

    def gathered(self, printer: CppPrinter, load: Expr, name: str) -> None:
        """Where a part of the gradient of a table goes."""
        found, slot, level = self.found, load.value, printer.levels[load]
        for place in load.args:
            printer(place)
        places = ", ".join(printer.names[a] for a in load.args)
        how = f"of_{slot}.add_{printer.look_up(load)}"
        if level == "cell":
            found["gradient_cell"].append(f"{how}(to_{slot}, part_{name}, {places});")
        elif level == "row":
            found["sums"].append(f"vf sum_{name}{{}};")
            found["gradient_cell"].append(f"sum_{name} += part_{name};")
            found["gradient_row"].append(f"{how}(to_{slot}, sum_{name}, {places});")
        else:
            found["gradient_head"].append(f"vf sums_{name}[NB] = {{}};")
            found["gradient_cell"].append(f"sums_{name}[j] += part_{name};")
            found["gradient_tile"].append(f"  {how}(to_{slot}, sums_{name}[j], {places});")


class _WindowSource(_BackwardSource):
    """Of the kernel for few keys."""

    files = (*_BackwardSource.files[:-1], "window_backward.h")
