"""Windows on a grid whose first length is symbolic, proved for every length.

A predicate of the coordinates `q // W`, `q % W` (and of further digits) splits into one part per
axis. What is inside a row is read as a table. The first axis, of symbolic length n, has a part
of linear comparisons of i, j and n in which every two terms differ by a constant; two such
formulas that agree for all n up to a bound agree always (difference logic has small models: a
formula over m variables whose constants sum to c that holds somewhere holds below m * (c + 1)).
So its part is compared with the candidate's own, which is read off at the captured length, on all
(i, j, n) up to the bound.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.mask import Neighborhood, Where
from attnopt.passes.analyze.logic import literals
from attnopt.passes.analyze.neighbourhoods import DIMS, GridMask, cut_of, read_grid, window_of
from attnopt.passes.analyze.tables import Runs, Table, runs_of

_Q, _K = E.index("q"), E.index("k")
_I, _J, _N = (E.load(slot, dtype=E.INT) for slot in "ijn")
_LINEAR = frozenset(("add", "sub", "neg", "minimum", "maximum", "abs", "le", "lt", "eq", "ne",
                     "and", "or", "not", "const", "load"))
#: lengths of the first axis that are tried
_LONGEST = 400


def read_symbolic(keep: Expr, queries: int, keys: int) -> GridMask | None:
    """The windows on a grid that `keep` is for all lengths; `queries` is the captured one."""
    if queries != keys:
        return None
    for width in sorted(_widths(keep), reverse=True):
        found = _on_rows(keep, width, queries)
        if found is not None:
            return found
    return None


def _widths(e: Expr) -> set[int]:
    """What the row index is divided by."""
    return {n.args[1].value for n in e.walk() if n.op == "floordiv" and n.args[0] in (_Q, _K)
            and n.args[1].op == "const" and n.args[1].value > 1}


def _on_rows(keep: Expr, width: int, queries: int) -> GridMask | None:
    """`keep` as a part over rows q // width, of symbolic number, and one over what is inside."""
    rows, inside = E.TRUE, E.TRUE
    for p in literals(keep, "and"):
        along = p.replace(_coordinates(width))
        if _plain(along):
            rows = rows & along
        elif _periodic(p, width):
            inside = inside & p
        else:
            return None
    if queries % width or queries // width < 2:
        return None
    found = read_grid(Table.of_predicate(inside, width, width, {}), range(1, DIMS))
    down = runs_of(_row_table(rows, queries // width))
    if found is None or down is None:
        return None
    return _window(rows, down, found, width) or _cut(rows, down, found, width)


def _periodic(p: Expr, width: int) -> bool:
    """Does it read q and k through digits only that start over every `width` tokens?"""
    def digit(n: Expr) -> Expr | None:
        if n.op != "mod" or n.args[1].op != "const" or n.args[1].value < 1:
            return None
        base, period = n.args[0], n.args[1].value
        if base.op == "floordiv" and base.args[1].op == "const" and base.args[1].value > 0:
            base, period = base.args[0], period * base.args[1].value
        return E.const(0) if base in (_Q, _K) and width % period == 0 else None
    own = p.replace(digit)
    return not own.indices and not own.slots and not own.has("size")


def _coordinates(width: int) -> Mapping[Expr, Expr]:
    sizes = {E.size(a) // width: _N for a in "qk"}
    return {_Q // width: _I, _K // width: _J, **sizes}


def _plain(e: Expr) -> bool:
    """Are its comparisons between sums of one of i, j, n with a sign each and constants?"""
    return not any(n.op not in _LINEAR or n.op == "load" and n.args for n in e.walk()) and \
        e.slots <= {"i", "j", "n"} and all(
            _balanced(n) for n in e.walk() if n.op in ("le", "lt", "eq", "ne"))


def _balanced(comparison: Expr) -> bool:
    """At most one variable on each side, however its cases are chosen."""
    a, b = comparison.args
    return a.dtype == E.INT and all(_variables(side) is not None for side in (a, b))


def _variables(e: Expr) -> int | None:
    """How many variables a side has, with a plus sign, in any of its cases; None beyond one."""
    if e.op == "const":
        return 0
    if e.op == "load":
        return 1
    if e.op in ("minimum", "maximum"):
        both = [_variables(a) for a in e.args]
        return None if None in both else max(n for n in both if n is not None)
    if e.op == "add" or e.op == "sub" and e.args[1].op == "const":
        both = [_variables(a) for a in e.args]
        total = None if None in both else sum(n for n in both if n is not None)
        return total if total is not None and total <= 1 else None
    return None


def _row_table(rows: Expr, length: int) -> Table:
    return Table.of_predicate(
        rows.replace({_I: _Q, _J: _K, _N: E.const(length)}), length, length, {})


def _same(a: Expr, b: Expr) -> bool:
    """Do two predicates of i, j, n agree for all n >= 0 and 0 <= i, j <= n?

    Row n itself is there where the tokens do not fill the last row.
    """
    if not _plain(a) or not _plain(b):
        return False
    constants = sum(abs(n.value) for e in (a, b) for n in e.walk()
                    if n.op == "const" and n.dtype == E.INT)
    bound = 4 * (constants + 1)
    if bound > _LONGEST:
        return False
    for n in range(bound + 1):
        at = torch.arange(n + 1)
        env = Env((n + 1, n + 1), {"i": at[:, None], "j": at[None], "n": torch.tensor(n)})
        one, other = (torch.as_tensor(evaluate(e, env), dtype=torch.bool).expand(env.shape)
                      for e in (a, b))
        if not torch.equal(one, other):
            return False
    return True


def _window(rows: Expr, down: Runs, found: GridMask, width: int) -> GridMask | None:
    own, inner = window_of(down), found.mask
    if own is None or own.stride * own.dilation != 1 or not isinstance(inner, Neighborhood):
        return None
    half = own.window // 2
    if own.causal:
        wanted = (_J <= _I) & (_I <= _J + (own.window - 1))
    else:
        start = E.call("minimum", E.call("maximum", _I - half, 0), _N - own.window)
        end = E.call("minimum", E.call("maximum", _I + (own.window - half), own.window), _N)
        wanted = (start <= _J) & (_J + 1 <= end)
    if not _same(rows, wanted):
        return None
    mask = Neighborhood(
        (own.window, *inner.window), (1, *inner.stride), (1, *inner.dilation),
        (own.causal, *inner.causal), (None, *inner.length))
    return GridMask(mask, f"{mask.describe()} of nx{'x'.join(map(str, inner.length))}")


def _cut(rows: Expr, down: Runs, found: GridMask, width: int) -> GridMask | None:
    own = cut_of(down, len(down.first))
    if own is None or own.step > 1 or not _same(rows, own.predicate(_I, _J)):
        return None
    inside = found.mask.predicate().replace({_Q: _Q % width, _K: _K % width})
    kept = own.predicate(_Q // width, _K // width) & inside
    return GridMask(Where(kept), f"{found.text} within window {own.text()} of rows of {width}")
