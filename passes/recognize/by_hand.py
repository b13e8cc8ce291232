"""Sites without a softmax node: a normaliser written out, another function, or none."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.attention import Attention
from attnopt.passes.recognize.axes import (
    Layout,
    axes_of,
    broadcast,
    fresh,
    meet,
    resolve,
    settle,
    shape_of,
)
from attnopt.passes.recognize.contraction import Contraction
from attnopt.passes.recognize.layout import LAYOUT_OPS, back
from attnopt.passes.recognize.logits import is_activation_pair
from attnopt.passes.recognize.normalizers import by_hand
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.reader import Reader
from attnopt.passes.recognize.roles import (
    assemble,
    check_triangles,
    query_and_key,
    resolve_set,
)
from attnopt.passes.recognize.scores import RawScore, raw_score
from attnopt.passes.recognize.softmaxes import (
    computed_in,
    place_epilogue,
    selected,
    unmixed,
)
from attnopt.rules import Decline

Operand = tuple[fx.Node, Layout]


def read_by_hand(program: Program, second: Contraction, weights: Operand,
                 values: Operand) -> Attention:
    """No softmax on the way: a normaliser written out, or another function, or none."""
    keys = second.contracted
    order = {a: i for i, a in enumerate(x for dim in weights[1] for x in dim)}
    candidates = sorted((s for s in program.sources[weights[0]] if raw_score(s) is not None),
                        key=program.order.__getitem__)
    problem: Decline | None = None
    for main in sorted(candidates, key=lambda s: not is_activation_pair(program, s)):
        raw = raw_score(main)
        assert raw is not None
        reader = Reader(program, keys, {}, of_weights=True, key_order=order)

        def scores(at: fx.Node, where: Layout, raw: RawScore = raw) -> Expr:
            meet(raw.layout, where)
            e = E.score if not raw.root else E.call("sqrt", E.score)
            return e * raw.alpha if raw.alpha != 1 else e

        reader.terminals = {main: scores}
        try:
            if raw.addend is not None:
                raise Decline("an addend in the contraction of an unnormalised score", main)
            e = reader.read(*weights)
            query_and_key(raw, keys)
            return _finish(program, second, weights, values, raw, reader, e)
        except Decline as no:
            problem = problem or no
    raise problem or Decline("the scores are not a contraction of queries with keys", second.node)


def _finish(program: Program, second: Contraction, weights: Operand, values: Operand,
            raw: RawScore, reader: Reader, e: Expr) -> Attention:
    end, end_layout = second.node, second.out_layout
    late = _late_division(program, second, reader)
    if late is not None:
        if any(a.size == 0 for a in resolve(second.contracted)):
            raise Decline("a division by the sum over no keys", second.node)
        end, end_layout, divisor = late
        e = E.call("div", e, divisor)
    e, mixed_weights = reader.mixes.get(e, (e, None))
    normalizer = by_hand(e, reader.markers)
    logits, mixed_logits = unmixed(normalizer.logits, reader)
    normalizer = replace(normalizer, logits=logits)
    if any(leaf in reader.mixes for leaf in normalizer.weights.leaves):
        raise Decline("heads are mixed beside the normaliser", second.node)
    if normalizer.name != "softmax":
        for operand in (raw.left[0], raw.right[0], values[0]):
            if not program.on_input(operand):
                raise Decline("a product with a parameter, not with keys and values", raw.node)
    reader.interior += raw.inner
    site = assemble(program, second, weights, values, raw, reader, normalizer)
    site.end, site.out_layout = end, end_layout
    site.sinks = normalizer.sink
    if normalizer.sink is not None and any(axes_of(reader.operands[s].layout) & resolve_set(
            second.contracted) for s in normalizer.sink.slots):
        raise Decline("a term beside the row sum that varies along the keys", second.node)
    site.mix_logits, site.mix_weights = mixed_logits, mixed_weights
    site.fixed = selected(reader)
    site.dropout, site.detached = reader.dropout, reader.detached
    check_triangles(site, reader)
    if end is not second.node:
        site.interior.append(second.node)
    if site.dropout and normalizer.weights is not E.weight:
        raise Decline("weights are edited around a dropout", second.node)
    place_epilogue(site, normalizer.weights)
    site.compute = computed_in(reader.dtypes, second.node.meta["val"].dtype)
    return site


def _late_division(program: Program, second: Contraction,
                   reader: Reader) -> tuple[fx.Node, Layout, Expr] | None:
    """(exp(s) @ V) / sum exp(s): the division comes after the second contraction.

    Only views and casts may lie between them. Gives the division, its layout and the divisor.
    """
    node = second.node
    while True:
        users = program.users(node)
        if len(users) != 1 or users[0].op != "call_function":
            return None
        user = users[0]
        if op_name(user) == "div":
            break
        if user.args[:1] != (node,) or not (is_cast(user) or op_name(user) in LAYOUT_OPS):
            return None
        node = user
    bottom = user.args[1]
    if user.args[0] is not node or user.kwargs.get("rounding_mode") or not is_tensor(bottom) \
            or not reader.on_path(bottom):  # type: ignore[arg-type]
        return None
    shape = shape_of(user.meta["val"])
    if shape != shape_of(node.meta["val"]):
        return None
    layout = fresh(shape)
    at: tuple[fx.Node, Layout] | None = (node, layout)
    while at is not None and at[0] is not second.node:
        reader.interior.append(at[0])
        at = (at[0].args[0], at[1]) if is_cast(at[0]) else back(*at)  # type: ignore[assignment]
    if at is None:
        return None
    meet(second.out_layout, at[1])
    divisor = broadcast(settle(layout), shape_of(bottom.meta["val"]))  # type: ignore[union-attr]
    return user, settle(layout), reader.read(bottom, divisor)
