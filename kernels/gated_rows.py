"""Rows that a gate multiplies by 0 are not computed.

With `output` = out * gate, or where(gate, out, 0), and a gate per row (and head), the rows whose
gate is exactly 0 are 0, whatever the attention gives there. Which these are is looked up at each
call. Heads of which all rows are wanted are computed as they are, others with their wanted rows
gathered, heads of about equally many rows together; a head without any is left out. The places of
the gathered rows and heads are operands, from which the Spec reads the indices q, h and b. Any
lowering computes what is left (MoH, arXiv 2410.11842; routers between branches likewise).

A product is only skipped where no row can be without keys, as 0 * NaN is not 0. For NaN or inf
among the inputs it may still differ from what multiplies in the end: such rows are not read, as
hidden keys are not. A call that may be differentiated computes every row, for the gate's gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import Where
from attnopt.ir.spec import Operand, Schedule, Spec, leading_axes
from attnopt.kernels.aten.state import call_state
from attnopt.kernels.aten.steps import steps

ROWS, LENGTH = "listed_rows", "all_rows"
#: share of the rows from which on leaving the others out does not pay
MOST = 0.8
#: scores below which looking at the gates does not pay
FEWEST = 1 << 17
#: heads are computed together that have at least this share of the rows of the longest one
ALIKE = 0.75

Attention = Callable[..., Tensor]


@functools.lru_cache(maxsize=1024)
def gates_of(spec: Spec) -> tuple[tuple[str, bool], ...]:
    """The operands that say which rows are wanted, and whether by being true or not 0; empty where
    rows cannot be left out."""
    found: list[tuple[str, bool]] = []
    product, e = False, spec.output
    roles = {o.slot: o.role for o in spec.operands}
    while e.op in ("mul", "where"):
        if e.op == "where" and any(_zero(x) for x in e.args[1:]):
            gate, inner, wanted = e.args[0], e.args[1], True
            if _zero(inner):
                inner, wanted = e.args[2], False
        elif e.op == "mul":
            inner, gate = e.args
            gate, wanted = gate.args[0] if gate.op == "float" else gate, True
        else:
            break
        if gate.op == "load" and not gate.args and roles[str(gate.value)] == "gate":
            found.append((str(gate.value), wanted))
            product = product or e.op == "mul"
        e = inner
    exprs = [x for x in (spec.logits, spec.weights, spec.output, spec.groups, spec.sinks)
             if x is not None]
    whole = any(n.op in ("inner", "value") or n.op == "size" and n.value not in "qk"
                for x in (*exprs, spec.mask.predicate()) for n in x.leaves)
    if whole or spec.dropout or spec.mix_logits or spec.mix_weights or spec.score == "additive":
        return ()
    if product and spec.normalizer == "softmax" and spec.empty_row == "nan" \
            and not steps(spec).row_kept:
        return ()
    return tuple(found)


def _zero(e: Expr) -> bool:
    return e.op == "const" and e.value == 0


@functools.lru_cache(maxsize=1024)
def of_listed(spec: Spec, axes: tuple[str, ...] = ("q",)) -> Spec:
    """The Spec of gathered rows: its operand `listed_rows`, along `axes`, gives the place of each.
    """
    place = {E.index("q"): E.load(ROWS, dtype=E.INT),
             E.size("q"): E.load(LENGTH, 0, dtype=E.INT)}

    def moved(e: Expr | None) -> Expr | None:
        return None if e is None else e.replace(place)

    predicate = spec.mask.predicate()
    mask = spec.mask if predicate.replace(place) is predicate else Where(predicate.replace(place))
    return spec.with_(
        [Operand(ROWS, axes, E.INT), Operand(LENGTH, None, E.INT)], mask=mask,
        **{name: moved(getattr(spec, name))
           for name in ("logits", "weights", "output", "groups", "sinks")})


@functools.lru_cache(maxsize=1024)
def of_heads(spec: Spec, rank: int, flat: bool) -> Spec:
    """The Spec of some of the leading entries: operand `place_h` and so on gives the place of each.

    flat: they lie in one leading axis, else along as many as before
    """
    names = leading_axes(rank - 2)
    place: dict[Expr, Expr] = {E.index(n): E.load(f"place_{n}", dtype=E.INT) for n in names}

    def moved(e: Expr | None) -> Expr | None:
        return None if e is None else e.replace(place)

    def along(o: Operand) -> Operand:
        if not flat or o.axes is None:
            return o
        own = ("h",) if set(o.axes) & set(names) else ()
        return Operand(o.slot, (*own, *(a for a in o.axes if a in "qk")), o.dtype, o.role)

    predicate = spec.mask.predicate()
    told = [Operand(f"place_{n}", ("h",) if flat else (n,), E.INT) for n in names]
    changes: dict[str, Any] = {name: moved(getattr(spec, name))
                               for name in ("logits", "weights", "output", "groups", "sinks")}
    mask = spec.mask if predicate.replace(place) is predicate else Where(predicate.replace(place))
    return spec.with_(operands=(*map(along, spec.operands), *told)).with_(mask=mask, **changes)


class Gated:
    """`whole`, or the wanted rows alone where these are fewer."""

    __slots__ = ("spec", "slots", "schedule", "whole", "bind", "hides")

    def __init__(self, spec: Spec, schedule: Schedule, whole: Attention,
                 bind: Callable[[str, str], Attention]) -> None:
        self.spec, self.slots, self.whole, self.bind = spec, gates_of(spec), whole, bind
        # Other lengths want another tile.
        self.schedule = str(Schedule(schedule.lowering)) if schedule.lowering else ""
        product = any(n.op == "mul" for n in spec.output.walk())
        hides = product and spec.normalizer == "softmax" and spec.empty_row == "nan"
        self.hides = tuple(n.value for n in spec.logits.leaves if n.op == "load"
                           and n.dtype == E.FLOAT) if hides and steps(spec).hides else ()

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Tensor:
        if len(operands) == len(self.spec.operands) and self.looks(query, key, value, operands):
            given = dict(zip((o.slot for o in self.spec.operands), operands, strict=True))
            wanted = self.wanted(query, key, value, given)
            if wanted is not None:
                return self.gathered(query, key, value, given, wanted)
        return self.whole(query, key, value, *operands)

    def looks(self, query: Tensor, key: Tensor, value: Tensor, operands: tuple[Tensor, ...]
              ) -> bool:
        if not query.numel() or query.numel() * key.shape[-2] < FEWEST * query.shape[-1] \
                or torch.compiler.is_compiling() \
                or torch.is_autocast_enabled(query.device.type) \
                or call_state((query, key, value, *operands)) != "all":
            return False
        return not (query.is_cuda and torch.cuda.is_current_stream_capturing())

    def wanted(self, query: Tensor, key: Tensor, value: Tensor, given: Mapping[str, Tensor]
               ) -> Tensor | None:
        """bool (*L, Q): the rows to compute; None for all."""
        lead = torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2])
        found = torch.ones((), dtype=torch.bool, device=query.device)
        for slot, true in self.slots:
            gate = given[slot]
            found = found & (gate != 0 if true else gate == 0)
        if found.dim() < 2 or found.shape[-1] != 1 or any(
                n not in (1, m) for n, m in zip(found.shape[-3::-1], lead[::-1], strict=False)) \
                or found.dim() - 2 > len(lead):
            return None
        share = float(found.sum()) / max(found.numel(), 1)
        if share > MOST or any(bool(given[s].amin() == -math.inf) for s in self.hides
                               if given[s].numel()):
            return None
        return found.expand(*lead, query.shape[-2], 1).squeeze(-1).contiguous()

    def gathered(self, query: Tensor, key: Tensor, value: Tensor, given: Mapping[str, Tensor],
                 wanted: Tensor) -> Tensor:
        lead, queries = wanted.shape[:-1], query.shape[-2]
        counts = wanted.sum(-1).flatten()
        starts = counts.cumsum(0) - counts
        rows = wanted.view(-1, queries).nonzero(as_tuple=True)[1]
        out = query.new_zeros(*lead, queries, value.shape[-1])
        for heads, most in _groups(counts.tolist(), queries):
            heads.sort()
            entries = torch.tensor(heads, device=query.device)
            at = _unravel(entries, lead)
            box = _box(heads, lead)
            spec = of_heads(self.spec, len(lead) + 2, box is None)
            size = (len(heads),) if box is None else tuple(b - a for a, b in box)
            tensors = {o.slot: given[o.slot] if o.axes is None else _pick(given[o.slot], at, box)
                       for o in self.spec.operands}
            q, k, v = (_pick(t, at, box) for t in (query, key, value))
            if most < queries:
                # A short list is filled up with its last row, which is then computed again.
                last = (counts[entries, None] - 1).clamp(max=most - 1)
                step = torch.arange(most, device=query.device)
                places = rows[starts[entries, None] + torch.minimum(step, last)].view(*size, most)
                q = _rows(q, places)
                tensors = {o.slot: _rows(tensors[o.slot], places) if "q" in (o.axes or ())
                           and tensors[o.slot].shape[-2] == queries != 1 else tensors[o.slot]
                           for o in self.spec.operands}
                length = torch.tensor([queries], dtype=torch.int32, device=query.device)
                tensors |= {ROWS: places.int().unsqueeze(-1), LENGTH: length}
                spec = of_listed(spec, (*leading_axes(len(size)), "q"))
            for axis, n in enumerate(leading_axes(len(lead))):
                tensors[f"place_{n}"] = at[axis].int().view(-1, 1, 1) if box is None else (
                    torch.arange(*box[axis], dtype=torch.int32, device=query.device).view(
                        -1, *[1] * (len(lead) + 1 - axis)))
            found = self.bind(str(spec), self.schedule)(
                q, k, v, *(tensors[o.slot] for o in spec.operands))
            if most == queries and box is not None:
                _cut(out, box).copy_(found)
                continue
            target = entries[:, None] * queries + (
                places.view(-1, most) if most < queries else torch.arange(
                    queries, device=query.device))
            out.view(-1, value.shape[-1]).index_copy_(
                0, target.flatten(), found.reshape(-1, value.shape[-1]))
        return out


def _groups(counts: list[int], queries: int) -> list[tuple[list[int], int]]:
    """Entries with their longest list, those with about equally many rows together, none empty."""
    found: list[tuple[list[int], int]] = []
    for i in sorted((i for i, n in enumerate(counts) if n), key=lambda i: -counts[i]):
        most = found[-1][1] if found else 0
        if counts[i] < (most if most == queries else ALIKE * most) or not found:
            found.append(([], counts[i]))
        found[-1][0].append(i)
    return found


def _unravel(entries: Tensor, lead: tuple[int, ...]) -> tuple[Tensor, ...]:
    found = []
    for n in reversed(lead):
        found.append(entries % n)
        entries = entries // n
    return tuple(reversed(found))


def _box(entries: list[int], lead: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """[start, stop) along every leading axis where the entries are such a box."""
    found: list[tuple[int, int]] = []
    rest = sorted(entries)
    places = rest
    for n in reversed(lead):
        own = [i % n for i in places]
        found.append((min(own), max(own) + 1))
        places = [i // n for i in places]
    return found[::-1] if math.prod(b - a for a, b in found) == len(rest) else None


def _cut(x: Tensor, box: list[tuple[int, int]]) -> Tensor:
    """The part of x (*L, m, n) that lies in the box."""
    for axis, (start, stop) in enumerate(box):
        dim = axis - len(box) - 2
        if x.dim() >= -dim and x.shape[dim] != 1:
            x = x.narrow(dim, start, stop - start)
    return x


def _pick(x: Tensor, at: tuple[Tensor, ...], box: list[tuple[int, int]] | None) -> Tensor:
    """x (*L, m, n) at leading entries: as (R, m, n), or a view where they are a box."""
    own = x.shape[:-2]
    if box is not None or x.dim() < 2:
        return x if box is None else _cut(x, box)
    if math.prod(own) == 1:
        return x.reshape(1, *x.shape[-2:])
    near = at[len(at) - len(own):]
    return x[tuple(i if n != 1 else torch.zeros_like(i) for i, n in zip(near, own, strict=True))]


def _rows(x: Tensor, places: Tensor) -> Tensor:
    """x (*L, Q, n) at the places (*l, r) of its rows."""
    *size, count = places.shape
    x = x.expand(*size, *x.shape[-2:])
    entry = torch.arange(math.prod(size), device=x.device).view(*size, 1) * x.shape[-2]
    if x.is_contiguous():
        return x.view(-1, x.shape[-1]).index_select(0, (entry + places).flatten()).view(
            *places.shape, -1)
    index = tuple(torch.arange(n, device=x.device).view(-1, *[1] * (len(size) - i))
                  for i, n in enumerate(size))
    return x[(*index, places)]
