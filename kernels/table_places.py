"""Where in a table a tabulated bias looks, remembered for as long as the model's indices say so.

A bias table[index[q, k], h] (Swin: arXiv 2103.14030) is tabulated at each call, because the table
is a parameter; which of its rows are read follows from a buffer of whole numbers, which hardly ever
changes. The rows are remembered together with a copy of the buffer, compared with it at each call
(some microseconds), and then the table is one `index_select`: `Rows`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr

#: tables that are remembered, and elements of all indices of one
_MOST, _LARGEST = 256, 1 << 20


@dataclass(frozen=True)
class _Known:
    """What a text's expression becomes, and the tensors from which it was made."""

    expr: Expr
    places: Mapping[str, Tensor]
    read: Mapping[str, Tensor]


@dataclass(frozen=True)
class Rows:
    """A tabulation that is one `index_select` of a tensor: table[place(k), h] or table[h, place(k)]
    as (h, count).

    table: the tensor, as a number; shape: its own; dim: along which is selected; place: the
    indices; read: copies of the tensors that these follow from, by their numbers
    """

    table: int
    shape: torch.Size
    dim: int
    place: Tensor
    read: tuple[tuple[int, Tensor], ...]

    def of(self, tensors: Sequence[Tensor]) -> Tensor | None:
        """The table; None where the tensors have changed."""
        table = tensors[self.table]
        if table.shape != self.shape or not all(_same(tensors[i], t) for i, t in self.read):
            return None
        return (table if self.dim else table.t()).index_select(1, self.place)


#: what identifies a tabulation: its text, lengths and device
Key = tuple[str, tuple[int, ...], torch.device]
_known: OrderedDict[Key, _Known] = OrderedDict()
_rows: OrderedDict[Key, Rows] = OrderedDict()


def with_places(key: Key, expr: Expr, operands: Mapping[str, Tensor],
                made: Mapping[str, Tensor], count: int) -> tuple[Expr, Mapping[str, Tensor]]:
    """The expression with whole numbers that points and whole-number operands decide as loads, and
    these. `expr` and `made`, operands of it beside those given, must follow from the key."""
    found = _known.get(key)
    if found is None or not all(_same(operands[s], t) for s, t in found.read.items()):
        found = _known[key] = _look(expr, operands, made, count, key[-1])
        if len(_known) > _MOST:
            _known.popitem(last=False)
    return found.expr, found.places


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)


def _look(expr: Expr, operands: Mapping[str, Tensor], made: Mapping[str, Tensor], count: int,
          device: torch.device) -> _Known:
    whole = {s: t for s, t in {**operands, **made}.items() if not t.is_floating_point()
             and t.numel() <= _LARGEST and t.device == device}
    loads: dict[Expr, Expr] = {}

    def place(node: Expr) -> Expr | None:
        if node.dtype != E.INT or not node.indices <= {"k"} or node.op == "index" \
                or node.has("size") or not node.slots or not node.slots <= whole.keys():
            return None
        return loads.setdefault(node, E.load(f"_row{len(loads)}", dtype=node.dtype))

    changed = expr.replace(place)
    used = [old for old, new in loads.items() if new.value in changed.slots]
    env = Env((1, count), whole, device=device)
    with torch.inference_mode(False), torch.no_grad():
        places = {str(loads[old].value): torch.as_tensor(evaluate(old, env), device=device)
                  for old in used}
        read = {s: whole[s].clone() for s in {s for old in used for s in old.slots} - made.keys()}
    return _Known(changed, places, read)


def remembered(key: Key, tensors: Sequence[Tensor]) -> Tensor | None:
    """The table of tensors as `remember` keeps it; None where it keeps none for these."""
    rows = _rows.get(key)
    return None if rows is None else rows.of(tensors)


def remember(key: Key, tensors: Sequence[Tensor], slots: Sequence[str], expr: Expr,
             operands: Mapping[str, Tensor], lead: Sequence[str], sizes: Mapping[str, int],
             count: int) -> Tensor | None:
    """The table as one `index_select`, which `remembered` does from now on; None where it is
    not that. `expr` and `operands` are those of `with_places` for the same key."""
    if expr.op != "load" or len(expr.args) != 2 or tuple(lead) != ("h",):
        return None
    at = [i for i, e in enumerate(expr.args) if e.op == "load" and not e.args]
    if len(at) != 1 or expr.args[1 - at[0]] is not E.index("h") or expr.value not in slots:
        return None
    (dim,), number = at, slots.index(str(expr.value))
    table, place = tensors[number], operands[expr.args[dim].value]
    if table.dim() != 2 or table.shape[1 - dim] != sizes["h"] or not table.shape[dim] \
            or place.numel() != count or place.shape[-1] != count:
        return None
    with torch.inference_mode(False), torch.no_grad():
        place = place.reshape(-1).clamp(0, table.shape[dim] - 1)
    read = tuple((slots.index(s), t) for s, t in _known[key].read.items())
    _rows[key] = rows = Rows(number, table.shape, dim, place, read)
    if len(_rows) > _MOST:
        _rows.popitem(last=False)
    return rows.of(tensors)
