"""Spec + tile -> the C++ source of the kernel of its gradients: `backward.h` with its statements.

The derivatives of the logits are `attnopt.ir.derivative`s, printed beside the logits themselves, so
that what both need is computed once.
"""

from __future__ import annotations

from attnopt.ir import expr as E
from attnopt.ir.derivative import derivative
from attnopt.kernels.cpp.template import Signature, Source, Tile


def backward_source(signature: Signature, wanted: tuple[str, ...], tile: Tile, width: int) -> str:
    """The text of the kernel; `wanted` are slots of operands that want a gradient."""
    return _BackwardSource(signature, wanted, tile, width).text()


class _BackwardSource(Source):
    files = ("attention.h", "pairs.h", "products.h", "backward.h")

    def __init__(self, signature: Signature, wanted: tuple[str, ...], tile: Tile, width: int
                 ) -> None:
        super().__init__(signature, tile, width)
        self.wanted = wanted

    def constants(self) -> list[str]:
        return [f"constexpr int GRADIENTS = {len(self.wanted)};", *super().constants()]

    def blocks(self) -> dict[str, list[str]]:
        found = self.operand_blocks()
        found["gradients"] = [
            "struct Gradients {", *(f"  Matrix<float> {slot};" for slot in self.wanted), "};"]
        found["read_gradients"] = [f"call.gradients.{slot}.read(r);" for slot in self.wanted]
        return {**found, **self.gradient_blocks()}

    def gradient_blocks(self) -> dict[str, list[str]]:
        scaled = self.parts.scaled
        printer = self.printer("x")
        printer.given(E.score, "score", "cell")
        value, slope = printer(scaled), printer(derivative(scaled, E.score))
        slopes = {slot: printer(derivative(scaled, E.load(slot))) for slot in self.wanted}
        keep = self.printer("m")
        kept = keep(self.parts.predicate)
        found: dict[str, list[str]] = {
            name: [] for name in ("gradient_head", "gradient_cell", "gradient_row",
                                  "gradient_tile", "gradient_rows")}
        sums = []
        for number, slot in enumerate(self.wanted):
            printer(E.load(slot))
            level = printer.levels[E.load(slot)]
            of, lanes = f"call.gradients.{slot}", f"b.lanes[{number}]"
            found["gradient_head"] += [f"const auto& of_{slot} = {of};",
                                       f"float* const to_{slot} = of_{slot}.at(place);",
                                       f"(void)to_{slot};"]
            found["gradient_cell"] += [
                f"vf part_{slot} = change * {slopes[slot]};",
                f"if constexpr (PARTIAL) part_{slot} = kept[j] ? part_{slot} : vf{{}};"]
            if level == "column":
                found["gradient_head"].append(f"vf sums_{slot}[NB] = {{}};")
                found["gradient_cell"].append(f"sums_{slot}[j] += part_{slot};")
                found["gradient_tile"] += [
                    "for (int j = 0; j < NB; j++)",
                    f"  if (of_{slot}.column) add_lanes<true>(to_{slot}, k0 + j * W, "
                    f"size_k, sums_{slot}[j]);",
                    f"  else {lanes}[0] += sums_{slot}[j];"]
            else:
                sums.append(f"vf sum_{slot}{{}};")
                found["gradient_row"].append(f"{lanes}[i] += sum_{slot};")
                found["gradient_cell"] += [
                    f"if (of_{slot}.column) add_lanes<PARTIAL>(to_{slot} + (int64_t)index_q * "
                    f"of_{slot}.row, column, size_k, part_{slot});",
                    f"else sum_{slot} += part_{slot};"] if level == "cell" else [
                    f"sum_{slot} += part_{slot};"]
            found["gradient_rows"].append(
                f"if (!{of}.column) add_rows({of}, place, {lanes}, first, rows);")
        return {
            **found,
            "head": [*printer.lines["head"], *keep.lines["head"]],
            "row": [*printer.lines["row"], *keep.lines["row"], *sums],
            "cell": [*printer.lines["column"], *printer.lines["cell"],
                     f"#define LOGIT {value}", f"#define SLOPE {slope}"],
            "mask": [*keep.lines["column"], *keep.lines["cell"], f"kept[j] &= mask({kept});"]}
