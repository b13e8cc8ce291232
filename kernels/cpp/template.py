"""Spec + tile -> the C++ source of one kernel.

The source is `instructions.h` and `vectors.h`, the constants of the Spec, and `attention.h`,
`products.h` and `forward.h`, with the statements of its expressions put in where a line says
`//@name`. Lengths and strides are arguments; head dimensions, element types and the tile are
constants, so that every loop of the inner products is unrolled.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Operand, Spec, leading_axes
from attnopt.kernels.aten.linear import linear
from attnopt.kernels.aten.steps import split_scale
from attnopt.kernels.cpp.printer import CppPrinter
from attnopt.kernels.printing import LEVELS

#: C++ types of elements in memory, by the name of the torch dtype
ELEMENTS = {"float32": "float", "float64": "double", "bfloat16": "bf16", "float16": "fp16",
            "int64": "int64_t", "int32": "int32_t", "bool": "bool"}
#: the lowering of the kernel for few keys in a Schedule
WINDOW = "cpp:window"
#: vectors of scores that are unrolled; statements from which on fewer are; those of a look-up
_UNROLLED, _LONG, _LOOK_UP = 16, 24, 4
_MARKER = re.compile(r"^( *)//@(\w+)$", re.MULTILINE)


@dataclass(frozen=True)
class Tile:
    """rows, keys: of a tile; block_rows, block_vectors: of the register block of its products.

    box: sides of the box of queries that the rows are, whose keys are gathered; () where tiles are
    runs of tokens (see `attnopt.ir.halos`)
    whole: of the kernel for few keys (`window.h`): all of them are in one tile, and the rows are
    the most queries that there may be
    """

    rows: int = 48
    keys: int = 64
    block_rows: int = 6
    block_vectors: int = 4
    box: tuple[int, ...] = ()
    whole: bool = False

    @staticmethod
    def of(numbers: Sequence[int], lowering: str = "cpp") -> Tile:
        """The tile of a Schedule: (rows, keys, block rows, block vectors, *box)."""
        rows, keys, block_rows, block_vectors, *box = numbers
        return Tile(rows, keys, block_rows, block_vectors, tuple(box), lowering == WINDOW)

    @property
    def aligned(self) -> Tile:
        """The same of runs of tokens."""
        return replace(self, box=())


@dataclass(frozen=True)
class Signature:
    """What a kernel is compiled for; lengths and strides are not.

    dtype:    of query, key, value and output; head_dim, value_dim: D and Dv
    rank:     number of leading axes
    operands: (dtype, number of axes) of every operand, in the order of the Spec
    """

    spec: Spec
    dtype: str
    head_dim: int
    value_dim: int
    rank: int
    operands: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Parts:
    """A Spec as the kernel computes it.

    alpha:      multiplies the queries; scaled: the logits of scores that are already times alpha
    factor:     the weights' epilogue keeps proportions: one sweep is enough
    two_passes: it needs statistics of whole rows first
    """

    alpha: float
    scaled: Expr
    predicate: Expr
    statistics: frozenset[str]
    groups: tuple[int, ...]
    two_passes: bool

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def of(spec: Spec) -> Parts:
        alpha, scaled = split_scale(spec.logits)
        if spec.score != "dot":
            alpha, scaled = 1.0, spec.logits
        asked = frozenset(leaf.value for e in (spec.weights, spec.output) for leaf in e.leaves
                          if leaf.op == "stat")
        parts = linear(spec.weights.replace({E.weight: E.score}))
        proportional = parts is not None and not parts.terms and not spec.weights.has("stat")
        names = {name[5:] for name in asked if name.startswith("mass:")}
        return Parts(alpha, scaled, spec.mask.predicate(), asked,
                     tuple(sorted(int(n) for n in names)), not proportional)


def source(signature: Signature, tile: Tile, width: int) -> str:
    """The text of the kernel for vectors of `width` floats."""
    if tile.whole:
        from attnopt.kernels.cpp.template_window import WindowSource

        return WindowSource(signature, tile, width).text()
    return Source(signature, tile, width).text()


def unrolled(cell: Sequence[str]) -> int:
    """How many vectors of scores are computed in one piece, by the statements of one of them.

    More of long ones would only keep the compiler busy: with six look-ups and sixteen vectors it
    takes a third of the time that it takes for all at once, and the kernel is as fast.
    """
    work = len(cell) + _LOOK_UP * sum("gather" in line for line in cell)
    return _UNROLLED if work <= _LONG else _UNROLLED // 4


@functools.lru_cache(maxsize=32)
def _file(name: str) -> str:
    return importlib.resources.files("attnopt.kernels.cpp").joinpath(name).read_text("utf-8")


def vectors(width: int) -> str:
    """The text with which every kernel begins: vectors of `width` floats."""
    return f"#define W {width}\n{_file('instructions.h')}\n{_file('vectors.h')}\n"


class Source:
    """The text of one kernel; the backward kernel is a subclass."""

    files: tuple[str, ...] = ("attention.h", "pairs.h", "lanes.h", "products.h", "gather.h",
                              "forward.h")

    def __init__(self, signature: Signature, tile: Tile, width: int) -> None:
        self.signature, self.tile, self.width = signature, tile, width
        self.spec = spec = signature.spec
        self.parts = Parts.of(spec)
        self.ranks = {o.slot: rank for o, (_, rank) in zip(
            spec.operands, signature.operands, strict=True)}
        self.axes = leading_axes(signature.rank)

    def printer(self, prefix: str, column: str = "k") -> CppPrinter:
        printer = CppPrinter(self.axes_of, self.ranks, column, prefix)
        printer.given(E.index(column), f"index_{column}", "column")
        if column != "q":
            printer.given(E.index("q"), "index_q", "row")
        for axis in self.axes:
            printer.given(E.index(axis), f"index_{axis}", "head")
        for axis in (*self.axes, "q", "k", "d"):
            printer.given(E.size(axis), f"size_{axis}", "head")
        return printer

    def axes_of(self, slot: str) -> Iterable[str]:
        axes = self.spec.operand(slot).axes
        return ("q", "k", "d", "h", "b") if axes is None else axes

    # -- the pieces -------------------------------------------------------------------------
    def text(self) -> str:
        body = "".join(_file(name) for name in self.files)
        blocks = self.blocks()
        left = {name for _, name in _MARKER.findall(body)} - set(blocks)
        if left:
            raise ValueError(f"every marker must have its statements, got none for {sorted(left)}")
        constants = "\n".join(self.constants())
        body = _MARKER.sub(lambda m: _indented(blocks[m[2]], m[1]), body)
        return f"// {self.spec}\n{vectors(self.width)}{constants}\n{body}"

    def constants(self) -> list[str]:
        spec, parts, s, t = self.spec, self.parts, self.signature, self.tile
        integers = {
            "RANK": s.rank, "D": s.head_dim, "DV": s.value_dim, "BQ": t.rows, "BK": t.keys,
            "MR": t.block_rows, "NV": t.block_vectors, "GROUPS": len(parts.groups)}
        flags = {
            "SOFTMAX": spec.normalizer == "softmax", "L1": spec.l1, "SINKS": spec.sinks is not None,
            "MASKED": parts.predicate is not E.TRUE, "TWO_PASSES": parts.two_passes,
            "TOPS": spec.normalizer == "softmax" or "max" in parts.statistics,
            "COUNTS": "count" in parts.statistics or spec.empty_row == "uniform",
            "TOTALS": "total" in parts.statistics or spec.renormalize,
            "RENORMALIZE": spec.renormalize, "GATHERED": bool(t.box)}
        normalize = {"softmax": "exp_", "exp": "exp_", "identity": ""}.get(
            spec.normalizer, spec.normalizer)
        return [
            *(f"constexpr int {name} = {value};" for name, value in integers.items()),
            *(f"constexpr bool {name} = {str(value).lower()};" for name, value in flags.items()),
            f"constexpr float ALPHA = {parts.alpha!r}f;" if "." in repr(parts.alpha)
            or "e" in repr(parts.alpha) else f"constexpr float ALPHA = {parts.alpha!r}.0f;",
            f"constexpr float SLACK = {0 if 'max' in parts.statistics else 5}.0f;",
            # Weights below e^-64 change no sum, but their products are denormal, which is slow.
            f"constexpr float FAINT = {-64 if spec.weights is E.weight else -87}.0f;",
            "enum { EMPTY_NAN, EMPTY_ZERO, EMPTY_UNIFORM };",
            f"constexpr int EMPTY_ROW = EMPTY_{spec.empty_row.upper()};",
            f"#define SCORE {spec.score.upper()}", f"#define NORMALIZE {normalize}",
            f"typedef {ELEMENTS[s.dtype]} T;", ""]

    def blocks(self) -> dict[str, list[str]]:
        """Statements by marker."""
        return {**self.operand_blocks(), **self.score_blocks(), **self.weight_blocks(),
                **self.sink_blocks(), **self.output_blocks()}

    def operand_blocks(self) -> dict[str, list[str]]:
        spec, fields, reads, names = self.spec, [], [], []
        for operand, (dtype, rank) in zip(spec.operands, self.signature.operands, strict=True):
            element, table = ELEMENTS[dtype], is_table(operand)
            kind = f"Table<{element}, {rank}>" if table else f"Operand<{element}>"
            fields.append(f"  {kind} {operand.slot};")
            reads.append(f"call.operands.{operand.slot}.read(r);")
            if not table:
                reads.append(f"call.operands.{operand.slot}.columns = (int32_t)r.word();")
            names += [f"const auto& op_{operand.slot} = call.operands.{operand.slot};",
                      f"(void)op_{operand.slot};"]
        for place, axis in enumerate(self.axes):
            names += [f"const int32_t index_{axis} = place.at[{place}], "
                      f"size_{axis} = call.length[{place}];", f"(void)index_{axis};",
                      f"(void)size_{axis};"]
        names += ["const int32_t size_q = call.queries, size_k = call.keys, size_d = DV;",
                  "(void)size_q;", "(void)size_k;", "(void)size_d;"]
        weight = []
        if spec.score == "additive":
            weight = ["for (int e = 0; e < D; e++) b.score_weight[e] = as_float(",
                      "    call.operands.score_weight.at(entry.place)"
                      "[e * call.operands.score_weight.column]);"]
        return {"operands": ["struct Operands {", *fields, "};"], "read_operands": reads,
                "names": names, "score_weight": weight}

    def score_blocks(self) -> dict[str, list[str]]:
        logits = self.printer("x")
        logits.given(E.score, "score", "cell")
        value = logits(self.parts.scaled)
        keep = self.printer("m")
        kept = keep(self.parts.predicate)
        score, mask = Hoisted.of(logits, self.parts.scaled), Hoisted.of(keep, self.parts.predicate)
        return {
            "head": [*logits.lines["head"], *keep.lines["head"]],
            "row_fields": ["struct RowValues {", *score.fields, *mask.fields, "};"],
            "row_values": [*logits.lines["row"], *score.keep_row, *keep.lines["row"],
                           *mask.keep_row],
            "row": [*score.take_row, *mask.take_row],
            "columns": [*score.arrays, *mask.arrays],
            "score_columns": [*logits.lines["column"], *score.keep_column],
            "mask_columns": [*keep.lines["column"], *mask.keep_column],
            "unrolled": [f"#pragma GCC unroll {unrolled(logits.lines['cell'])}"],
            "cell": [*score.take_column, *logits.lines["cell"], f"#define LOGIT {value}"],
            "mask": [*mask.take_column, *keep.lines["cell"], f"kept[j] &= mask({kept});"]}

    def weight_blocks(self) -> dict[str, list[str]]:
        spec = self.spec
        printer = self.printer("w")
        printer.given(E.weight, "weight", "cell")
        self.give_statistics(printer)
        value = printer(spec.weights)
        masses: list[str] = []
        if self.parts.groups:
            groups = self.printer("g")
            assert spec.groups is not None
            group = groups(spec.groups)
            for level in LEVELS:
                masses += groups.lines[level]
            masses += [f"mass[{i}] += vec({group}) == {number} ? weight : vf{{}};"
                       for i, number in enumerate(self.parts.groups)]
        statistics = self.statistics() if spec.weights.has("stat") else []
        return {"masses": masses, "statistics": statistics,
                "weights_row": [*printer.lines["head"], *printer.lines["row"]],
                "weights": [*printer.lines["column"], *printer.lines["cell"],
                            f"#define EDITED {value}"]}

    def sink_blocks(self) -> dict[str, list[str]]:
        if self.spec.sinks is None:
            return {"sink_head": [], "sink_row": ["#define SINK 0.0f"]}
        printer = self.printer("s")
        value = printer(self.spec.sinks)
        return {"sink_head": printer.lines["head"],
                "sink_row": [*printer.lines["row"], f"#define SINK {value}"]}

    def output_blocks(self) -> dict[str, list[str]]:
        spec = self.spec
        printer = self.printer("y", "d")
        printer.given(E.out, "x", "cell")
        printer.given(E.value, "value", "cell")
        self.give_statistics(printer)
        value = printer(spec.output)
        lines = [*printer.lines["column"], *printer.lines["cell"], f"#define RESULT {value}"]
        if E.value in spec.output.leaves:
            lines.insert(0, "const vf value = row_of(call.v, place, index_q, column);")
        return {"output_head": printer.lines["head"],
                "output_row": printer.lines["row"], "output": lines,
                "output_statistics": self.statistics() if spec.output.has("stat") else []}

    def give_statistics(self, printer: CppPrinter) -> None:
        for name in ("max", "sum", "count", "lse", "total"):
            printer.given(E.stat(name), f"stat_{name}", "row")
        for number in self.parts.groups:
            printer.given(E.stat(f"mass:{number}"), f"stat_mass_{number}", "row")

    def statistics(self) -> list[str]:
        softmax = self.spec.normalizer == "softmax"
        lse = ("b.shift[i] == -INF ? -INF : b.shift[i] + log_(b.sum[i])" if softmax
               else "log_(b.sum[i])")
        names = {"max": "b.top[i]", "lse": lse,
                 "sum": "exp_(stat_lse)" if softmax else "b.sum[i]",
                 "total": "b.total[i] * (TWO_PASSES ? 1.0f : b.inverse[i])"}
        lines = [f"const float stat_{n} = {text};" for n, text in names.items()]
        lines.append("const int32_t stat_count = COUNTS ? b.count[i] : size_k;")
        lines += [f"const float stat_mass_{number} = b.mass[i][{i}];"
                  for i, number in enumerate(self.parts.groups)]
        used = [line.split(" = ")[0].split()[-1] for line in lines]
        return [*lines, *(f"(void){name};" for name in used)]


@dataclass(frozen=True)
class Hoisted:
    """Statements that carry values from where they are computed to the loop over all scores.

    What depends on the row alone is computed once for each row of a query tile, what depends on the
    key alone once for each key tile, and kept in arrays: divisions and gathers then cost little.
    """

    fields: list[str]
    keep_row: list[str]
    take_row: list[str]
    arrays: list[str]
    keep_column: list[str]
    take_column: list[str]

    @staticmethod
    def of(printer: CppPrinter, *roots: Expr) -> Hoisted:
        """Those of expressions that were printed."""
        found = Hoisted([], [], [], [], [], [])
        nodes = dict.fromkeys(node for root in roots for node in root.walk())
        used = {*roots} | {a for node in nodes if printer.levels[node] == "cell"
                           for a in node.args}
        for node in nodes:
            name, level = printer.names[node], printer.levels[node]
            if node not in used or node.op in ("const", "index", "size") or (
                    level not in ("row", "column")):
                continue
            kind = printer.kind(node)
            if level == "row":
                found.fields.append(f"  {kind} {name};")
                found.keep_row.append(f"b.row_values[i].{name} = {name};")
                found.take_row.append(f"const {kind} {name} = b.row_values[i].{name};")
            else:
                found.arrays.append(f"{kind} of_{name}[NB];")
                found.keep_column.append(f"of_{name}[j] = {name};")
                found.take_column.append(f"const {kind} {name} = of_{name}[j];")
        return found


def is_table(operand: Operand) -> bool:
    """Whether the kernel gathers an operand with explicit indices."""
    return operand.axes is None and operand.slot != "score_weight"


def _indented(lines: list[str], indent: str) -> str:
    return "\n".join(line if line.startswith("#") else indent + line for line in lines)
