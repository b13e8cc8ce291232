"""Roles: which axis is a query row, a key, a leading axis, and who is query and key.

The contractions decide: a key axis is contracted with the values and held by the key operand; a
query row is the last axis of the scores that only the query holds; what remains leads.
"""

from __future__ import annotations

from torch import fx

from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.attention import Attention
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
    axes_of,
    resolve,
    settle,
)
from attnopt.passes.recognize.contraction import Contraction
from attnopt.passes.recognize.normalizers import Normalizer
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.reader import Reader
from attnopt.passes.recognize.scores import RawScore
from attnopt.rules import Decline

Operand = tuple[fx.Node, Layout]


def resolve_set(axes: frozenset[Axis]) -> frozenset[Axis]:
    return frozenset(resolve(sorted(axes, key=lambda a: a.number)))


def query_and_key(raw: RawScore, keys: frozenset[Axis]) -> tuple[Operand, Operand]:
    """(query, key): the key operand is the one that varies along the keys."""
    mine = [bool(axes_of(layout) & resolve_set(keys)) for _, layout in (raw.left, raw.right)]
    if all(mine):
        raise Decline("both operands of the score contraction vary along the keys", raw.node)
    if not any(mine) and resolve_set(keys):
        raise Decline("no operand of the score contraction varies along the keys", raw.node)
    return (raw.right, raw.left) if mine[0] else (raw.left, raw.right)


def assemble(program: Program, second: Contraction, weights: Operand, values: Operand,
              raw: RawScore | None, reader: Reader, normalizer: Normalizer) -> Attention:
    """Decide the role of every axis and make the site."""
    keys = resolve_set(second.contracted)
    p_layout, v_layout = settle(weights[1]), settle(values[1])
    p_axes = [a for dim in p_layout for a in dim]
    k_axes = tuple(a for a in p_axes if a in keys)
    v_axes = axes_of(v_layout)
    if not keys <= v_axes:
        raise Decline("the values do not vary along the keys", values[0])
    out_axes = [a for dim in settle(second.out_layout) for a in dim]
    columns = tuple(a for a in out_axes if a not in p_axes)
    rows: tuple[Axis, ...] = ()
    inner: tuple[Axis, ...] = ()
    vector = None
    operands = dict(reader.operands)
    if raw is not None:
        query, key = query_and_key(raw, keys)
        if not program.on_input(key[0]) and program.on_input(values[0]):
            raise Decline("the keys are a parameter: a router or classifier, not attention",
                          raw.node)
        contracted = raw.contracted
        inner = tuple(a for dim in settle(query[1]) for a in dim if a in contracted)
        fixed = axes_of(key[1]) | v_axes
        rows = _rows(raw, p_axes, axes_of(query[1]), fixed, keys)
        vector = raw.vector
    else:
        query = key = values
        bound = v_axes | frozenset().union(*(
            axes_of(o.layout) for o in operands.values() if o.role == "score"))
        free = [a for a in p_axes if a not in keys and a not in bound]
        rows = tuple(free[-1:])
    lead = _lead(p_layout, keys, rows)
    return Attention(second.node, second.node, second.out_layout,
                     raw.kind if raw is not None else "key", query, key, values, lead, rows,
                     k_axes, inner, columns, normalizer.logits, normalizer,
                     operands=operands, vector=vector,
                     interior=list(dict.fromkeys([*reader.interior, *second.inner])))


def _lead(layout: Layout, keys: frozenset[Axis], rows: tuple[Axis, ...]) -> Layout:
    """The leading dimensions of the weights, in their order, those of length 1 too.

    Rows or keys of length 1 have a dimension as well; it is the last of those without an axis.
    """
    dims: list[tuple[Axis, ...]] = []
    before = True
    for dim in layout:
        left = tuple(a for a in dim if a not in keys and a not in rows)
        before = before and len(left) == len(dim)
        if left or (not dim and before):
            dims += [(a,) for a in left] or [()]
    for missing in (not keys, not rows):
        empty = [i for i, dim in enumerate(dims) if not dim]
        if missing and empty:
            del dims[empty[-1]]
    return tuple(dims)


def _rows(raw: RawScore, p_axes: list[Axis], query: frozenset[Axis], fixed: frozenset[Axis],
          keys: frozenset[Axis]) -> tuple[Axis, ...]:
    """The query rows: the last result dimension of the score contraction that only Q has."""
    for dim in reversed(settle(raw.layout)):
        if dim and all(a in query and a not in fixed and a not in keys and a in p_axes
                       for a in dim):
            return dim
    return ()


def check_triangles(site: Attention, *readers: Reader) -> None:
    """A tril, a triu or an assignment on the way must be over the query rows, whose index it reads
    as `q`."""
    for reader in readers:
        for rows, node in reader.triangles:
            if resolve(rows) != resolve(site.rows):
                what = "an assignment" if "scatter" in op_name(node) else "a triangle"
                raise Decline(f"{what} over other axes than queries and keys", node)
