"""Spec + grid + tile -> the C++ source of one stencil kernel: `stencil.h` with its statements.

Everything that depends on a query or on a key is a vector over W queries; what the grid knows of an
index, its coordinates, is given to the printer, so that no lane divides.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Where
from attnopt.kernels.cpp.grid_windows import Windows3d, coordinate_names
from attnopt.kernels.cpp.printer import _SCALARS, _VECTORS, CppPrinter
from attnopt.kernels.cpp.template import ELEMENTS, Signature, Source, Tile

#: bytes of packed keys and values that are worked on at a time
BUDGET = 1 << 20
_QUERY = """\
const int32_t query_at_z = call.axis[Z].order[b.z];
const int32_t query_at_y = call.axis[Y].order[b.first + r];
const vi query_z = vec(query_at_z), query_y = vec(query_at_y);
const vi query_x = load_int(call.axis[X].order + b.block * W), index_q = load_int(b.token[r]);
(void)query_z, (void)query_y, (void)query_x, (void)index_q;""".split("\n")


@dataclass(frozen=True)
class StencilTile:
    """rows: of the grid that share a key; taps: keys of a register block of scores; channels: of
    one of values."""

    rows: int = 4
    taps: int = 4
    channels: int = 4


def stencil_source(signature: Signature, windows: Windows3d, tile: StencilTile, width: int) -> str:
    """The text of the kernel for vectors of `width` floats; of the mask only its rest is in it."""
    mask = ALL if windows.rest is E.TRUE else Where(windows.rest)
    spec = signature.spec.with_(mask=mask, operands=signature.spec.operands)
    signature = dataclasses.replace(signature, spec=spec)
    return _StencilSource(signature, windows, tile, width).text()


class _LanePrinter(CppPrinter):
    """C++ in which rows are lanes: only what depends on neither query nor key is a scalar."""

    neighbours = False

    def wide(self, node: Expr) -> bool:
        return self.levels[node] != "head" and node.op != "const"

    def assign(self, node: Expr, level: str, name: str, text: str) -> str:
        kind = _SCALARS if level == "head" else _VECTORS
        return f"const {kind[node.dtype]} {name} = {text};"

    def load(self, node: Expr, args: list[str]) -> str:
        level = self.levels[node]
        if node.args or level == "head":
            return super().load(node, args)
        row = "index_q" if level in ("row", "cell") else "vi{}"
        column = f"index_{self.column}" if level in ("column", "cell") else "vi{}"
        return f"lanes_at<{_SCALARS[node.dtype]}>(op_{node.value}, place, {row}, {column})"


class _StencilSource(Source):
    files = ("attention.h", "lanes.h", "stencil.h", "stencil_cells.h",
             "stencil_run.h")

    def __init__(self, signature: Signature, windows: Windows3d, tile: StencilTile, width: int
                 ) -> None:
        super().__init__(signature, Tile(), width)
        self.windows, self.shape = windows, tile

    def printer(self, prefix: str, column: str = "k") -> CppPrinter:
        printer = _LanePrinter(self.axes_of, self.ranks, column, prefix)
        queries, keys = coordinate_names(self.windows.grid)
        names = "xyz"[len(self.windows.grid) - 1::-1]
        for place, axis in queries.items():
            printer.given(place, f"query_{names[axis]}", "row")
        if column == "k":
            for place, axis in keys.items():
                printer.given(place, f"key_{names[axis]}", "column")
        printer.given(E.index("q"), "index_q", "row")
        printer.given(E.index(column), f"index_{column}", "column")
        for name in self.axes:
            printer.given(E.index(name), f"index_{name}", "head")
        for name in (*self.axes, "q", "k", "d"):
            printer.given(E.size(name), f"size_{name}", "head")
        return printer

    def constants(self) -> list[str]:
        spec, parts, s, t = self.spec, self.parts, self.signature, self.shape
        softmax, rest = spec.normalizer == "softmax", self.windows.rest is not E.TRUE
        integers = {"RANK": s.rank, "D": s.head_dim, "DV": s.value_dim, "BK": self.width,
                    "ROWS": t.rows, "TAPS": t.taps, "CHANNELS_AT_ONCE": t.channels}
        flags = {
            "SOFTMAX": softmax, "L1": spec.l1, "SINKS": spec.sinks is not None, "MASKED": rest,
            "PLAIN": softmax and not rest and parts.scaled is E.score,
            "EMPTY_ZERO": softmax and spec.empty_row == "zero"}
        normalize = {"softmax": "exp_", "exp": "exp_", "identity": ""}.get(
            spec.normalizer, spec.normalizer)
        return [
            *(f"constexpr int {name} = {value};" for name, value in integers.items()),
            *(f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()),
            f"constexpr int64_t BUDGET = {BUDGET};",
            f"constexpr float ALPHA = (float){float(parts.alpha)!r};",
            # Weights below e^-64 change no sum, but their products are denormal, which is slow.
            "constexpr float FAINT = -64.0f;",
            f"#define SCORE {spec.score.upper()}", f"#define NORMALIZE {normalize}",
            f"typedef {ELEMENTS[s.dtype]} T;", ""]

    def blocks(self) -> dict[str, list[str]]:
        return {**self.operand_blocks(), **self.score_blocks(), **self.sink_blocks(),
                **self.output_blocks(), "query": _QUERY}

    def score_blocks(self) -> dict[str, list[str]]:
        logits = self.printer("x")
        logits.given(E.score, "score", "cell")
        value = logits(self.parts.scaled)
        keep = self.printer("m")
        kept = keep(self.windows.rest)
        return {
            "head": [*logits.lines["head"], *keep.lines["head"]],
            "row": [*logits.lines["row"], *keep.lines["row"]],
            "cell": [*logits.lines["column"], *logits.lines["cell"], f"#define LOGIT {value}"],
            "mask": [*keep.lines["column"], *keep.lines["cell"], f"kept &= mask({kept});"]}

    def output_blocks(self) -> dict[str, list[str]]:
        printer = self.printer("y", "d")
        printer.given(E.out, "x", "cell")
        value = printer(self.spec.output)
        return {"output_head": printer.lines["head"], "output_row": printer.lines["row"],
                "output": [*printer.lines["column"], *printer.lines["cell"],
                           f"#define RESULT {value}"]}
