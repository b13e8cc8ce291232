"""Logits: the input of a softmax, read as an expression over raw scores or over the keys alone."""

from __future__ import annotations

from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.axes import (
    Layout,
    axes_of,
    broadcast,
    meet,
    product,
    settle,
    shape_of,
)
from attnopt.passes.recognize.key_logits import key_logits, varies_with_feature
from attnopt.passes.recognize.normalizers import row_free
from attnopt.passes.recognize.program import SOFTMAX, Program
from attnopt.passes.recognize.reader import Reader
from attnopt.passes.recognize.roles import query_and_key, resolve_set
from attnopt.passes.recognize.scores import RawScore, raw_score
from attnopt.passes.recognize.sinks import Sink
from attnopt.rules import Decline

Operand = tuple[fx.Node, Layout]


def read_logits(program: Program, node: fx.Node, layout: Layout, outer: Reader, values: Operand,
            sink: Sink | None) -> tuple[RawScore | None, Reader, Expr]:
    """Read the softmax's input: raw scores and an expression over them."""
    if sink is not None:
        node, layout = sink.scores
    candidates = sorted((s for s in program.sources[node] if raw_score(s) is not None),
                        key=program.order.__getitem__)
    first: Decline | None = None
    # Of several the widest: a product over few channels is a bias of low rank.
    ranked = sorted(candidates, key=lambda s: (not is_activation_pair(program, s), -_width(s)))
    for candidate in ranked:
        try:
            return _logits_over(program, node, layout, outer, candidate)
        except Decline as no:
            first = first or no
    try:
        return _key_only(program, node, layout, outer, values)
    except Decline as no:
        raise first or no from None


def is_activation_pair(program: Program, node: fx.Node) -> bool:
    raw = raw_score(node)
    assert raw is not None
    return all(program.on_input(side[0]) for side in (raw.left, raw.right))


def _width(node: fx.Node) -> int:
    """Channels that the scores are summed over; 0 where it is not known."""
    raw = raw_score(node)
    width = product(raw.contracted) if raw is not None else 0
    return width if isinstance(width, int) else 0


def _logits_over(program: Program, node: fx.Node, layout: Layout, outer: Reader,
                 main: fx.Node) -> tuple[RawScore, Reader, Expr]:
    raw = raw_score(main)
    assert raw is not None
    reader = Reader(program, outer.keys, {}, key_order=outer.key_order,
                    operands=dict(outer.operands))

    def scores(at: fx.Node, where: Layout) -> Expr:
        meet(raw.layout, where)
        e = E.score if not raw.root else E.call("sqrt", E.score)
        if raw.alpha != 1:
            e = e * raw.alpha
        if raw.addend is not None:
            own = broadcast(where, shape_of(raw.addend.meta["val"]))
            term = reader.operand(raw.addend, settle(own))
            e = e + (term if raw.beta == 1 else term * raw.beta)
        return e

    reader.terminals = {main: scores}
    e = row_free(reader.read(node, layout), reader.markers)
    if not e.has("score") and e not in reader.mixes:
        raise Decline("the scores do not reach the softmax", main)
    if not _is_valued(e) and e not in reader.mixes:
        raise Decline("the scores only choose which keys there are", main)
    reader.interior += raw.inner
    query_and_key(raw, outer.keys)
    outer.operands.update(reader.operands)
    return raw, reader, e


def _is_valued(e: Expr) -> bool:
    """Is the score a term of `e`, rather than a part of conditions only?"""
    return e.op == "score" or any(a.dtype == E.FLOAT and _is_valued(a) for a in e.args)


def _key_only(program: Program, node: fx.Node, layout: Layout, outer: Reader,
              values: Operand) -> tuple[None, Reader, Expr]:
    """Logits that depend on the key alone: one number per key, no query row in them."""
    for source, path in key_logits(program, node):
        if op_name(source) in SOFTMAX or not program.on_input(source):
            continue
        reader = Reader(program, outer.keys, {}, key_order=outer.key_order,
                        operands=dict(outer.operands), path=path)
        spot: list[Layout] = []

        def whole(at: fx.Node, where: Layout, reader: Reader = reader,
                  spot: list[Layout] = spot) -> Expr:
            spot.append(where)
            return reader.operand(at, where, "score")

        reader.terminals = {source: whole}
        try:
            e = row_free(reader.read(node, layout), reader.markers)
        except Decline:
            continue
        if not spot:
            continue
        have, keys = axes_of(spot[0]), resolve_set(outer.keys)
        allowed = axes_of(values[1]) | keys
        if have <= allowed and keys <= have and not varies_with_feature(source, spot[0], keys):
            outer.operands.update(reader.operands)
            return None, reader, e
    raise Decline("the scores are not a contraction of queries with keys", node)
