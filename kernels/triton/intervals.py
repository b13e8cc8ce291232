"""Which key tiles the rows of a query tile visit, and which query tiles see the keys of a key tile.

Causal, band and prefix masks keep, in every row, an interval of keys whose ends do not move back
from row to row; so the tiles that some row visits, and those that every row keeps whole, follow
from the first and the last row of a tile and need no list. Any other mask has lists
(`attnopt.kernels.triton.lists`), which hold for each tile the FULL and the PARTIAL tiles of the
other axis. Without them its conjuncts of that kind are used, and the tiles inside are PARTIAL.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, And, Band, Causal, Prefix
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.layout import Kernel
from attnopt.kernels.triton.printer import TritonPrinter


@dataclass(frozen=True)
class Interval:
    """Row q keeps no keys but q + low <= k <= q + high and k < count, of which `exact` says that
    it keeps all of them; None is no bound."""

    low: Expr | None = None
    high: Expr | None = None
    count: Expr | None = None
    exact: bool = True

    @property
    def everything(self) -> bool:
        """Whether every key is kept."""
        return self == Interval()


@functools.lru_cache(maxsize=1024)
def interval(spec: Spec) -> Interval:
    """The bounds that follow from the conjuncts of the mask."""
    low = high = count = None
    exact = True
    mask = spec.mask
    for part in mask.masks if isinstance(mask, And) else (mask,):
        if isinstance(part, Causal) and per_head(part.offset, spec):
            high = _both("minimum", high, part.offset)
        elif isinstance(part, Band) and per_head(part.lo, spec) and per_head(part.hi, spec):
            low, high = _both("maximum", low, part.lo), _both("minimum", high, part.hi)
        elif isinstance(part, Prefix) and per_head(part.count, spec):
            count = _both("minimum", count, part.count)
        elif part != ALL:
            exact = False
    return Interval(low, high, count, exact)


def _both(op: str, a: Expr | None, b: Expr) -> Expr:
    return b if a is None else E.call(op, a, b)


def per_head(expr: Expr, spec: Spec) -> bool:
    """Whether an int varies along leading axes only."""
    if expr.dtype != E.INT or expr.indices & {"q", "k"}:
        return False
    loads = [leaf for leaf in expr.leaves if leaf.op == "load" and not leaf.args]
    return not any({"q", "k"} & set(spec.operand(leaf.value).axes or ()) for leaf in loads)


class Visits:
    """The text of the loops over the tiles of the other axis.

    by:  the axis of a program's own tile, "q" or "k"
    `partial` and `full` say whether there are such tiles; `edge`, that PARTIAL tiles are only those
    at the end of the axis, so that a constexpr RAGGED may rule them out.
    """

    def __init__(self, kernel: Kernel, spec: Spec, by: str) -> None:
        self.kernel, self.by = kernel, by
        self.bounds = interval(spec)
        self.listed = kernel.signature.lists is not None
        self.full = self.listed or self.bounds.exact
        self.edge = not self.listed and self.bounds.everything

    def setup(self, printer: TritonPrinter) -> None:
        """Compute the tiles to visit; `printer` prints the bounds, its "head" lines come first."""
        if self.listed:
            self._lists()
            return
        offsets = {"low": self.bounds.low, "high": self.bounds.high, "count": self.bounds.count}
        named = {name: f"tl.cast({printer(e)}, tl.int32)" if printer.wide else printer(e)
                 for name, e in offsets.items() if e is not None}
        self.kernel.add(printer.take("head"))
        self.kernel.uses(printer)
        if self.by == "q":
            self._of_rows(named)
        else:
            self._of_keys(named)

    def _of_rows(self, bound: dict[str, str]) -> None:
        k, size = self.kernel, self.kernel.size("k")
        if "count" in bound:
            k.add(f"stop = tl.minimum({bound['count']}, {size})")
            size = "stop"
        k.add(f"last = tl.minimum(first + BM, {k.size('q')}) - 1")
        low, low_last, high, high_last = "0", "0", size, size
        if "low" in bound:
            low, low_last = f"first + {bound['low']}", f"last + {bound['low']}"
        if "high" in bound:
            high = f"tl.minimum(first + {bound['high']} + 1, {size})"
            high_last = f"tl.minimum(last + {bound['high']} + 1, {size})"
        self._limits(low, low_last, high, high_last, "BN")

    def _of_keys(self, bound: dict[str, str]) -> None:
        k, size = self.kernel, self.kernel.size("q")
        k.add(f"last = tl.minimum(first + BN, {k.size('k')}) - 1")
        low, low_last, high, high_last = "0", "0", size, size
        if "high" in bound:
            low, low_last = f"first - {bound['high']}", f"last - {bound['high']}"
        if "low" in bound:
            high = f"tl.minimum(first - {bound['low']} + 1, {size})"
            high_last = f"tl.minimum(last - {bound['low']} + 1, {size})"
        self._limits(low, low_last, high, high_last, "BM")
        if "count" in bound:
            k.add(f"end = tl.where(first >= {bound['count']}, begin, end)")
            if self.full:
                for name in ("full_begin", "full_end"):
                    k.add(f"{name} = tl.minimum(tl.where(last >= {bound['count']}, begin, {name}),"
                          " end)")

    def _limits(self, low: str, low_last: str, high: str, high_last: str, size: str) -> None:
        k = self.kernel
        clamp = "tl.maximum({}, 0)".format
        k.add(f"begin = {low if low == '0' else clamp(low)} // {size}")
        k.add(f"end = tl.maximum(tl.cdiv({clamp(high_last)}, {size}), begin)")
        if self.full:
            k.add(f"full_begin = tl.minimum(tl.cdiv("
                  f"{low_last if low_last == '0' else clamp(low_last)}, {size}), end)")
            k.add(f"full_end = tl.minimum(tl.maximum({clamp(high)} // {size}, full_begin), end)")

    def _lists(self) -> None:
        k = self.kernel
        row = ""
        for axis in k.signature.lists or ():
            row = f"({row}) * {k.size(axis)} + {axis}" if row else axis
        full, partial, tiles = (
            k.argument(name, "list", name) for name in ("full", "partial", "tiles"))
        k.add(f"list_row = {f'({row}) * own_tiles + ' if row else ''}own_tile")
        k.add(f"full_list = list_row * {k.argument('list_width', 'length', 'tiles', '1')}")
        k.add(f"partial_list = full_list + tl.load({full} + list_row)")
        k.add(f"list_end = partial_list + tl.load({partial} + list_row)")
        self.tiles = tiles

    def loops(self) -> list[tuple[bool, list[str], str]]:
        """(FULL, the lines that open the loop, the text of the visited tile's number)."""
        stages = ", num_stages=STAGES"
        if self.listed:
            return [(full, [f"for j in tl.range({ends}{stages}):"], f"tl.load({self.tiles} + j)")
                    for full, ends in ((True, "full_list, partial_list"),
                                       (False, "partial_list, list_end"))]
        if not self.full:
            return [(False, [f"for j in tl.range(begin, end{stages}):"], "j")]
        bounded = self.bounds.low is not None if self.by == "q" else self.bounds.high is not None
        found = [(True, [f"for j in tl.range(full_begin, full_end{stages}):"], "j")]
        both = "full_begin - begin + end - full_end"
        place = "tl.where(j < full_begin - begin, begin + j, full_end + j - (full_begin - begin))"
        if bounded:
            found.append((False, [f"for j in tl.range(0, {both}{stages}):"], place))
        else:
            found.append((False, [f"for j in tl.range(full_end, end{stages}):"], "j"))
        return found
