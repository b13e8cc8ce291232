"""Values of what depends on no input, and index functions read off such values.

Two uses: a buffer or constant such as GPT-2's causal `bias` holds a pattern that no op in the graph
spells, and a sub-graph may use an op that has no lifting rule. A table is then compared, in row
blocks, with a few index functions (constant, arithmetic progression, bands and triangles, blocks);
what is used is proved for every element. Parameters are never read. Whoever uses a fact must guard
the placeholders named in `sources`.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.passes.analyze import by_rows
from attnopt.passes.analyze.lift_tables import Patterns
from attnopt.passes.analyze.logic import Logic

#: Bytes of one tensor, and of all tensors alive, that an evaluation may make.
LARGEST, TOTAL = 2**26, 2**28
_BLOCK = 2**22
#: Values up to this size are remembered.
_KEPT = 2**22
Function = Callable[[Logic, Expr, Expr], Expr]


class Values:
    """Evaluates input-free nodes of `graph` from buffers and constants.

    kind_of:  placeholder name -> "input", "parameter", "buffer" or "constant"
    value_of: placeholder name -> its tensor, or None where it is not at hand
    """

    def __init__(self, kind_of: Mapping[str, str],
                 value_of: Callable[[str], Tensor | None]) -> None:
        self.kind_of, self.value_of = kind_of, value_of
        #: constant masks that were named, each of them once
        self.patterns = Patterns()
        self._sources: dict[fx.Node, frozenset[str] | None] = {}
        self._values: dict[fx.Node, Tensor] = {}

    def sources(self, node: fx.Node) -> frozenset[str] | None:
        """Buffers and constants that `node` is made of; None if an input, a parameter or chance
        takes part."""
        for n in cone(node, self._sources):
            self._sources[n] = self._sources_of(n)
        return self._sources[node]

    def _sources_of(self, node: fx.Node) -> frozenset[str] | None:
        if node.meta.get("attnopt_opaque"):
            return None
        if node.op == "placeholder":
            kept = self.kind_of.get(node.name) in ("buffer", "constant")
            return frozenset((node.name,)) if kept else None
        if isinstance(node.meta.get("val"), torch.SymInt):
            return frozenset()  # a length, which is bound by name
        if node.op != "call_function" or not _deterministic(node.target):
            return None
        parts = [self._sources[a] for a in _read_by(node)]
        return None if None in parts else frozenset().union(*parts)  # type: ignore[arg-type]

    def read(self, name: str) -> Tensor | None:
        """The tensor of a buffer or constant, if there is a real one."""
        if self.kind_of.get(name) not in ("buffer", "constant"):
            return None
        value = self.value_of(name)
        if value is None or value.is_meta or isinstance(value, torch._subclasses.FakeTensor):
            return None
        return value.detach()

    def evaluate(self, node: fx.Node, symbols: Mapping[sympy.Symbol, int] | None = None) -> Tensor:
        """The value of an input-free node, with symbols of lengths bound to numbers.

        Raises LookupError where it takes an input or too much memory.
        """
        if symbols is None and node in self._values:
            return self._values[node]
        if self.sources(node) is None:
            raise LookupError(f"{node.name} depends on an input or a parameter")
        if self._goes_by_rows(node, symbols):
            with torch.no_grad():
                return by_rows.by_rows(
                    node, lambda n: tuple(number(x, symbols or {}) for x in n.meta["val"].shape),
                    lambda n: self.evaluate(n, symbols))
        done: dict[fx.Node, Any] = {}
        total = 0
        with torch.no_grad():
            for n in cone(node, done):
                done[n] = self._run(n, done, symbols or {})
                if n.op != "placeholder":
                    total += sum(t.nbytes for t in _tensors(done[n]))
                if total > TOTAL:
                    raise LookupError(f"{node.name} takes more than {TOTAL >> 20} MB to evaluate")
        if symbols is None and done[node].nbytes <= _KEPT:
            self._values[node] = done[node]
        return done[node]

    def _run(self, node: fx.Node, done: Mapping[fx.Node, Any],
             symbols: Mapping[sympy.Symbol, int]) -> Any:
        val = node.meta.get("val")
        if isinstance(val, torch.SymInt):
            return number(val, symbols)
        if node.op != "placeholder" and self._bytes(node, symbols) > LARGEST:
            raise LookupError(f"{node.name} is larger than {LARGEST >> 20} MB")
        if node.op == "placeholder":
            value = self.read(node.name)
            if value is None:
                raise LookupError(f"the value of {node.name} is not at hand")
            return value
        filled = _filled(node)
        if filled is not None:
            return torch.full([number(n, symbols) for n in val.shape], filled, dtype=val.dtype,
                              device=val.device)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: done[n])
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _goes_by_rows(self, node: fx.Node, symbols: Mapping[sympy.Symbol, int] | None) -> bool:
        """Is it a large mask, made of what is larger than may be?"""
        val = node.meta.get("val")
        return isinstance(val, Tensor) and val.dtype == torch.bool and val.dim() >= 2 \
            and by_rows.SMALL < self._bytes(node, symbols) <= LARGEST and any(
                self._bytes(n, symbols) > LARGEST for n in cone(node, {}))

    def _bytes(self, node: fx.Node, symbols: Mapping[sympy.Symbol, int] | None) -> int:
        """Of the largest tensor that a node gives."""
        return max((math.prod(number(n, symbols or {}) for n in t.shape) * t.element_size()
                    for t in _tensors(node.meta.get("val"))), default=0)


def number(n: Any, symbols: Mapping[sympy.Symbol, int]) -> int:
    """A length with its symbols bound.

    Raises:
        LookupError: it is not known (as where it follows from values: nonzero, …).
    """
    if not isinstance(n, torch.SymInt):
        return int(n)
    value = n.node.expr.xreplace({s: sympy.Integer(v) for s, v in symbols.items()})
    if not value.is_Integer:
        raise LookupError(f"size {n} is not known")
    return int(value)


def _tensors(x: Any) -> list[Tensor]:
    return [t for t in (x if isinstance(x, tuple | list) else (x,)) if isinstance(t, Tensor)]


def _deterministic(target: Any) -> bool:
    if isinstance(target, torch._ops.OpOverload):
        return (target.namespace == "aten" and not target._schema.is_mutable
                and torch.Tag.nondeterministic_seeded not in target.tags
                and not target._schema.name.startswith("aten::empty")
                and not target._schema.name.startswith("aten::new_empty"))
    return target is operator.getitem or getattr(target, "__module__", "") == "_operator"


def cone(node: fx.Node, known: Mapping[fx.Node, Any]) -> Iterator[fx.Node]:
    """`node` and what it is made of, arguments first, without what is known. Sizes are leaves."""
    seen: set[fx.Node] = set()
    stack = [(node, False)]
    while stack:
        n, ready = stack.pop()
        if n in known or n in seen and not ready:
            continue
        if ready:
            yield n
            continue
        seen.add(n)
        stack.append((n, True))
        if not isinstance(n.meta.get("val"), torch.SymInt):
            stack.extend((a, False) for a in _read_by(n))


def _filled(node: fx.Node) -> bool | int | float | None:
    """The number of all elements of a tensor that is made in the likeness of another one."""
    name = node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""
    fills: dict[str, Any] = {"aten::new_ones": 1, "aten::ones_like": 1, "aten::new_zeros": 0,
                             "aten::zeros_like": 0}
    fill = {"aten::full_like": 1, "aten::new_full": 2}.get(name)
    number = fills.get(name) if fill is None or len(node.args) <= fill else node.args[fill]
    return number if isinstance(number, bool | int | float) else None


def _read_by(node: fx.Node) -> list[fx.Node]:
    """The arguments whose values matter."""
    used = node.all_input_nodes
    return used if _filled(node) is None else [a for a in used if a is not node.args[0]]


# -- index functions of tables --------------------------------------------------------------------
def fit(table: Tensor, index: tuple[Expr, ...], logic: Logic) -> Expr | None:
    """The element of `table` at `index` as an index function, proved for the whole table; None
    where it is none of those that are tried."""
    if table.is_complex() or not table.numel():
        return None
    kept: list[Expr] = []
    for e in index:
        dim = len(kept)
        if table.shape[dim] == 1:
            table = table.select(dim, 0)
        elif e.op == "const" and 0 <= e.value < table.shape[dim]:
            table = table.select(dim, e.value)
        else:
            kept.append(e)
    for dim in range(len(kept) - 1, -1, -1):
        if _same(table, table.narrow(dim, 0, 1).expand_as(table)):
            table = table.select(dim, 0)
            del kept[dim]
    if not kept:
        number = table.item()
        return None if number != number else _constant(number)
    if len(kept) > 2:
        return None
    progression = _progression(table, kept, logic)
    if progression is not None:
        return progression
    if len(kept) == 1:
        table, kept = table[None], [E.const(0), kept[0]]
    return _pattern(table, kept, logic)


def _constant(number: Any) -> Expr:
    return E.const(number + 0.0 if isinstance(number, float) else number)


def _blocks(table: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, _BLOCK // max(1, table[0].numel())) if table.dim() else 1
    for start in range(0, table.shape[0], rows):
        yield start, table[start : start + rows]


def _same(a: Tensor, b: Tensor) -> bool:
    return all(torch.equal(block, b[start : start + len(block)]) for start, block in _blocks(a))


def _progression(table: Tensor, index: list[Expr], logic: Logic) -> Expr | None:
    """first + step * i (+ step * j) of whole numbers."""
    if table.dtype == torch.bool:
        return None
    origin = table[(0,) * table.dim()].item()
    steps = [table.select(d, 1)[(0,) * (table.dim() - 1)].item() - origin
             for d in range(table.dim())]
    if any(not math.isfinite(x) or x != int(x) for x in (origin, *steps)):
        return None
    if max(map(abs, (origin, *steps))) * sum(table.shape) > logic_limit(table.dtype):
        return None
    for start, block in _blocks(table):
        wanted = torch.full((), int(origin), dtype=torch.int64, device=table.device)
        for d, step in enumerate(steps):
            at = torch.arange(block.shape[d], device=table.device) + (start if d == 0 else 0)
            wanted = wanted + int(step) * at.view(-1, *[1] * (table.dim() - 1 - d))
        if not bool((block == wanted).all()):
            return None
    total = logic.sum((E.const(int(origin)), *(
        logic.mul(E.const(int(s)), i) for s, i in zip(steps, index, strict=True))))
    return E.call("float", total) if table.is_floating_point() else total


def logic_limit(dtype: torch.dtype) -> float:
    """Up to here a type holds every whole number."""
    return 2 / torch.finfo(dtype).eps if dtype.is_floating_point else torch.iinfo(dtype).max


def _pattern(table: Tensor, index: list[Expr], logic: Logic) -> Expr | None:
    """where(f(i, j), x, y) for a table of two values."""
    first = table[0, 0]
    others = [block[block != first][:1] for _, block in _blocks(table)]
    other = torch.cat(others)[0]
    pair = first.item(), other.item()
    if any(x != x for x in pair):
        return None
    if not all(bool(((b == first) | (b == other)).all()) for _, b in _blocks(table)):
        return None
    for (x, y), value in ((pair, first), (pair[::-1], other)):
        for function in _candidates(table, value):
            if _holds(function, table, value):
                return logic.choose(function(logic, *index), _constant(x), _constant(y))
    return None


def _candidates(table: Tensor, value: Tensor) -> Iterator[Function]:
    """Index functions that fit the first and last entry that is `value` of a few rows."""
    rows, columns = table.shape
    low: set[int | None] = {None}
    high: set[int | None] = {None}
    for i in sorted({0, 1, rows // 2, rows - 2, rows - 1} & set(range(rows))):
        places = (table[i] == value).nonzero()
        if len(places):
            start, end = int(places[0]), int(places[-1])
            low |= {start - i} if start > 0 else set()
            high |= {end - i} if end < columns - 1 else set()
            if i == 0 and 0 < end < columns - 1:
                yield _tiles(end + 1, equal=True)
                yield _tiles(end + 1, equal=False)
    for lo, hi in itertools.product(sorted(low, key=str), sorted(high, key=str)):
        if (lo, hi) != (None, None):
            yield _band(lo, hi)


def _band(lo: int | None, hi: int | None) -> Function:
    def function(logic: Logic, i: Expr, j: Expr) -> Expr:
        above, below = E.TRUE, E.TRUE
        if lo is not None:
            above = logic.compare("le", logic.add(i, E.const(lo)), j)
        if hi is not None:
            below = logic.compare("le", j, logic.add(i, E.const(hi)))
        return logic.conj(above, below)
    return function


def _tiles(width: int, equal: bool) -> Function:
    def function(logic: Logic, i: Expr, j: Expr) -> Expr:
        row, column = (logic.floordiv(x, E.const(width)) for x in (i, j))
        return logic.compare("eq" if equal else "le", column, row)
    return function


def _holds(function: Function, table: Tensor, value: Tensor) -> bool:
    rows, columns = table.shape
    predicate = function(Logic({"q": rows, "k": columns}), E.index("q"), E.index("k"))
    for start, block in _blocks(table):
        env = Env((len(block), columns), sizes={"q": rows}, rows=start, device=table.device)
        wanted = torch.as_tensor(evaluate(predicate, env), device=table.device)
        if not torch.equal(block == value, wanted.expand(block.shape)):
            return False
    return True
