"""Recognition: every contraction of normalised scores with values becomes an `Attention` site.

The anchor is the second contraction, weights with values. Its weight operand is read backwards to
the normaliser (a softmax, or one written by hand), and from there to the raw scores. What the
contractions say about axes decides who is query, key, batch and head; names and orders of
dimensions never do. Every softmax that no site takes is recorded with the reason.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.axes import (
    Axis,
    Layout,
    axes_of,
    broadcast,
    fresh,
    resolve,
    settle,
    shape_of,
)
from attnopt.passes.contraction import Contraction, contraction
from attnopt.passes.heads import HeadMix, head_mix
from attnopt.passes.layout import LAYOUT_OPS, back, strip
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.normalizers import Normalizer, by_hand, row_free
from attnopt.passes.pointwise import is_cast
from attnopt.passes.program import SDPA, SOFTMAX, Program
from attnopt.passes.reader import Loaded, Marker, Reader
from attnopt.passes.scores import RawScore, raw_score
from attnopt.rules import Decline

Operand = tuple[fx.Node, Layout]


@dataclass
class Attention:
    """One attention, by nodes of the functional view, each with its layout.

    lead, rows, keys, inner, columns: the axes of (*L, Q, K), of head_dim and of V's head_dim;
    a leading dimension of length 1 holds none.
    fixed: axes along which every operand is read at one index only.
    """

    anchor: fx.Node
    end: fx.Node
    out_layout: Layout
    kind: str
    query: Operand
    key: Operand
    value: Operand
    lead: Layout
    rows: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    logits: Expr
    normalizer: Normalizer
    weights: Expr = E.weight
    output: Expr = E.out
    renormalize: bool = False
    sinks: Expr | None = None
    dropout: float = 0.0
    causal: bool = False
    empty_row: str = "nan"
    compute: str | None = None
    operands: dict[str, Loaded] = field(default_factory=dict)
    vector: Operand | None = None
    #: matrices that mix heads, before and after the normaliser
    mix_logits: HeadMix | None = None
    mix_weights: HeadMix | None = None
    interior: list[fx.Node] = field(default_factory=list)
    #: interior nodes that others read as well
    escapes: list[fx.Node] = field(default_factory=list)
    #: author's own fused call, if it was one
    sdpa: bool = False
    fixed: dict[Axis, int] = field(default_factory=dict)
    detached: bool = False

    @property
    def softmax(self) -> bool:
        return self.normalizer.name == "softmax"


@dataclass
class Miss:
    """A node that is not attention, or not understood: why, and about which node."""

    anchor: fx.Node
    reason: str
    node: fx.Node | None
    kind: str = "attention"


def recognize(program: Program) -> tuple[list[Attention], list[Miss]]:
    """All sites of the program in topological order, and what was left."""
    found: list[Attention] = []
    reasons: dict[fx.Node, Miss] = {}
    reassociable: list[Miss] = []
    for node in program.nodes:
        if node not in program.live or node.op != "call_function":
            continue
        if op_name(node) in SDPA:
            from attnopt.passes.recognize_sdpa import read_sdpa
            try:
                found.append(read_sdpa(program, node))
            except Decline as no:
                reasons[node] = Miss(node, no.reason, no.node)
            continue
        mix = head_mix(node)
        second = contraction(node)
        if second is not None and (mix is None or program.on_input(mix.matrix)):
            _try_contraction(program, second, found, reasons, reassociable)
    taken = {a.anchor for a in found}
    for site in found:
        site.escapes = _escapes(program, site)
    for node in program.nodes:
        if op_name(node) in SOFTMAX and node in program.live and node.op == "call_function" \
                and node not in taken and node not in reasons and "log" not in op_name(node):
            reasons[node] = Miss(node, "no contraction over the softmax axis follows", node)
    misses = [m for n, m in reasons.items() if n not in taken]
    covered = {n for a in found for n in a.interior}
    misses += [m for m in reassociable if m.anchor not in covered and m.anchor not in taken]
    return found, sorted(misses, key=lambda m: program.order[m.anchor])


def _try_contraction(program: Program, second: Contraction, found: list[Attention],
                     reasons: dict[fx.Node, Miss], reassociable: list[Miss]) -> None:
    """Read either operand of `second` as attention weights."""
    for side in (0, 1):
        weights, values = second.sides()[side], second.sides()[1 - side]
        sources = program.sources[weights[0]]
        norms = [s for s in sources if op_name(s) in SOFTMAX]
        scores = [s for s in sources if raw_score(s) is not None]
        if not norms and not scores:
            continue
        try:
            sites = _read(program, second, weights, values, norms)
        except Decline as no:
            for norm in norms:
                reasons.setdefault(norm, Miss(norm, no.reason, no.node))
            continue
        plain = [s for s in sites if s.normalizer.name == "identity"
                 and s.normalizer.weights is E.weight]
        if plain:
            reassociable.extend(
                Miss(second.node, "linear attention: no normaliser between two contractions, "
                     "kept until a rule re-associates it", second.node, "reassociable")
                for s in plain if _is_linear(s))
            continue
        found.extend(sites)
        return


def _is_linear(site: Attention) -> bool:
    """(QK)V with activations on all three places and a key axis longer than head_dim may be."""
    return site.logits.op in ("score", "mul", "div") and bool(site.keys) and bool(site.rows)


def _read(program: Program, second: Contraction, weights: Operand, values: Operand,
          norms: list[fx.Node]) -> list[Attention]:
    keys = second.contracted
    order = {a: i for i, a in enumerate(x for dim in weights[1] for x in dim)}
    node, layout = weights
    if not norms:
        return [_by_hand(program, second, weights, values)]
    heads: dict[tuple[fx.Node, Layout], Expr] = {}

    def softmax(at: fx.Node, where: Layout) -> Expr:
        if (at, where) not in heads:
            heads[at, where] = E.load(f"__weight{len(heads)}") if heads else E.weight
        found = heads[at, where]
        return E.call("log", found) if "log" in op_name(at) else found

    reader = Reader(program, keys, dict.fromkeys(norms, softmax), of_weights=True,
                    key_order=order)
    sink: _Sink | None = None
    core = _sink_slice(program, node, layout, keys)
    if core is not None:
        sink = core
        reader.interior += sink.interior
        heads[sink.softmax, sink.layout] = E.weight
        expression: Expr = E.weight
    else:
        expression = reader.read(node, layout)
    if not heads:
        raise Decline("the softmax does not reach the contraction", node)
    if len(heads) > 1:
        return _several(program, second, weights, values, reader, heads, expression)
    (anchor, at), = heads
    return [_site(program, second, weights, values, reader, anchor, at, expression, sink)]


def _site(program: Program, second: Contraction, weights: Operand, values: Operand,
          reader: Reader, anchor: fx.Node, at: Layout, expression: Expr,
          sink: _Sink | None = None) -> Attention:
    """An attention around the softmax `anchor`, whose result has the layout `at`."""
    keys = reader.keys
    at = settle(at)
    dim = anchor.args[1]
    assert isinstance(dim, int)
    own = sink.keys if sink is not None else keys
    if frozenset(resolve(at[dim])) != resolve_set(own):
        raise Decline("the softmax runs over other axes than the contraction", anchor)
    expression, mixed = _unmixed(expression, reader)
    expression, renormalize = _renormalized(expression, reader.markers)
    if any(leaf in reader.markers for leaf in expression.leaves):
        raise Decline("a row reduction enters the weights", anchor)
    dtypes = set(reader.dtypes)
    precise = anchor.args[2] if len(anchor.args) > 2 else anchor.kwargs.get("dtype")
    raw, logits_reader, logits = _logits(program, anchor.args[0], at, reader, values,  # type: ignore
                                         sink)
    logits, mixed_logits = _unmixed(logits, logits_reader)
    site = _assemble(program, second, weights, values, raw, logits_reader,
                     Normalizer("softmax", False, logits, E.weight))
    site.anchor = anchor
    site.mix_logits, site.mix_weights = mixed_logits, mixed
    site.interior = list(dict.fromkeys([*reader.interior, *site.interior]))
    if sink is not None:
        site.sinks = sink.logit
        site.operands["sink"] = sink.operand
    site.renormalize, site.dropout = renormalize, reader.dropout
    here = axes_of(at)
    site.fixed = {a: i for axis, i in reader.fixed.items() for a in resolve((axis,)) if a in here}
    site.detached = reader.detached or logits_reader.detached
    if site.dropout and expression is not E.weight:
        raise Decline("weights are edited around a dropout", anchor)
    _place_epilogue(site, expression)
    if isinstance(precise, torch.dtype):
        dtypes.add(precise)
    site.compute = _compute(dtypes | logits_reader.dtypes, second.node.meta["val"].dtype)
    return site


def resolve_set(axes: frozenset[Axis]) -> frozenset[Axis]:
    return frozenset(resolve(sorted(axes, key=lambda a: a.number)))


def _compute(dtypes: set[torch.dtype], result: torch.dtype) -> str | None:
    """The wider type that the author's softmax used, if any."""
    wider = [d for d in dtypes if d.is_floating_point and d.itemsize > result.itemsize]
    return str(max(wider, key=lambda d: d.itemsize)).removeprefix("torch.") if wider else None


def _unmixed(e: Expr, reader: Reader) -> tuple[Expr, HeadMix | None]:
    """`e` before its heads were mixed, and by what."""
    if e in reader.mixes:
        inner, mix = reader.mixes[e]
        if not any(leaf in reader.mixes for leaf in inner.leaves):
            return inner, mix
    mixed = [leaf for leaf in e.leaves if leaf in reader.mixes]
    if mixed:
        raise Decline("something happens between the mixing of heads and the normaliser",
                      reader.mixes[mixed[0]][1].matrix)
    return e, None


def _renormalized(e: Expr, markers: dict[Expr, Marker]) -> tuple[Expr, bool]:
    if e.op == "div" and e.args[1] in markers:
        marker = markers[e.args[1]]
        if marker.kind == "sum" and marker.of is e.args[0]:
            return e.args[0], True
    return e, False


def _place_epilogue(site: Attention, expression: Expr) -> None:
    """Weights edited by a factor that is the same for all keys are an output scaled by it."""
    keys = frozenset(resolve(site.keys))

    def varies(e: Expr) -> bool:
        return bool(e.indices - {"q"}) or any(
            axes_of(site.operands[s].layout) & keys for s in e.slots)

    output = E.out
    while expression.op in ("mul", "div") and not site.renormalize:
        left, right = expression.args
        if expression.op == "mul" and right.has("weight") and not left.has("weight"):
            left, right = right, left
        if right.has("weight") or varies(right):
            break
        output, expression = E.call(expression.op, output, right), left
    if expression is not E.weight:
        site.weights = expression  # keep the author's order where anything is left over
        if output is not E.out:
            site.output = output
    else:
        site.weights, site.output = E.weight, output


# -- logits ------------------------------------------------------------------------------------
def _logits(program: Program, node: fx.Node, layout: Layout, outer: Reader, values: Operand,
            sink: _Sink | None) -> tuple[RawScore | None, Reader, Expr]:
    """Read the softmax's input: raw scores and an expression over them."""
    if sink is not None:
        node, layout = sink.scores
    candidates = sorted((s for s in program.sources[node] if raw_score(s) is not None),
                        key=program.order.__getitem__)
    first: Decline | None = None
    ranked = sorted(candidates, key=lambda s: not _is_activation_pair(program, s))
    for candidate in ranked:
        try:
            return _read_logits(program, node, layout, outer, candidate)
        except Decline as no:
            first = first or no
    try:
        return _key_only(program, node, layout, outer, values)
    except Decline as no:
        raise first or no from None


def _is_activation_pair(program: Program, node: fx.Node) -> bool:
    raw = raw_score(node)
    assert raw is not None
    return all(program.on_input(side[0]) for side in (raw.left, raw.right))


def _sub_reader(program: Program, outer: Reader) -> Reader:
    return Reader(program, outer.keys, {}, operands=outer.operands, interior=outer.interior,
                  key_order=outer.key_order)


def _read_logits(program: Program, node: fx.Node, layout: Layout, outer: Reader,
                 main: fx.Node) -> tuple[RawScore, Reader, Expr]:
    raw = raw_score(main)
    assert raw is not None
    reader = Reader(program, outer.keys, {}, key_order=outer.key_order,
                    operands=dict(outer.operands))

    def scores(at: fx.Node, where: Layout) -> Expr:
        raw.meet(where)
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
    reader.interior += raw.inner
    _sides(raw, outer.keys)
    outer.operands.update(reader.operands)
    return raw, reader, e


def _sides(raw: RawScore, keys: frozenset[Axis]) -> tuple[Operand, Operand]:
    """(query, key): the key operand is the one that varies along the keys."""
    mine = [bool(axes_of(layout) & resolve_set(keys)) for _, layout in (raw.left, raw.right)]
    if all(mine):
        raise Decline("both operands of the score contraction vary along the keys", raw.node)
    if not any(mine) and resolve_set(keys):
        raise Decline("no operand of the score contraction varies along the keys", raw.node)
    return (raw.right, raw.left) if mine[0] else (raw.left, raw.right)


def _key_only(program: Program, node: fx.Node, layout: Layout, outer: Reader,
              values: Operand) -> tuple[None, Reader, Expr]:
    """Logits that depend on the key alone: one number per key, no query row in them."""
    for source in sorted(program.sources[node], key=program.order.__getitem__):
        if op_name(source) in SOFTMAX or not program.on_input(source):
            continue
        reader = Reader(program, outer.keys, {}, key_order=outer.key_order,
                        operands=dict(outer.operands))
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
        have = axes_of(spot[0])
        allowed = axes_of(values[1]) | resolve_set(outer.keys)
        feature = op_name(source) == "linear" and have & frozenset(resolve(
            spot[0][-1])) & resolve_set(outer.keys)
        if have <= allowed and resolve_set(outer.keys) <= have and not feature:
            outer.operands.update(reader.operands)
            return None, reader, e
    raise Decline("the scores are not a contraction of queries with keys", node)


# -- several softmaxes, none, sinks -------------------------------------------------------------
def _several(program: Program, second: Contraction, weights: Operand, values: Operand,
             reader: Reader, heads: dict[tuple[fx.Node, Layout], Expr],
             expression: Expr) -> list[Attention]:
    """a1*softmax1 + a2*softmax2 (differential attention): one site per softmax, by linearity."""
    sites = []
    symbols = list(heads.values())
    for (anchor, at), symbol in heads.items():
        others = {s: E.const(0.0) for s in symbols if s is not symbol}
        alone = expression.replace({**others, symbol: E.weight})
        _check_linear(expression, symbols, anchor)
        own = replace(reader, operands=dict(reader.operands), interior=list(reader.interior),
                      dtypes=set(reader.dtypes))
        site = _site(program, second, weights, values, own, anchor, at, _tidy(alone))
        if site.weights is not E.weight:
            raise Decline("a combination of softmaxes whose factors vary along the keys", anchor)
        sites.append(site)
    return sites


def _check_linear(e: Expr, symbols: list[Expr], node: fx.Node) -> None:
    inside = [n for n in e.walk() if n not in symbols and n.leaves & set(symbols)]
    for n in inside:
        holds = [bool(a.leaves & set(symbols)) for a in n.args]
        if n.op in ("add", "sub", "neg") or (n.op == "mul" and sum(holds) == 1) or (
                n.op == "div" and holds == [True, False]):
            continue
        raise Decline(f"{n.op} of several softmaxes", node)
    for n in inside:
        if n.op in ("add", "sub") and not all(a.leaves & set(symbols) for a in n.args):
            raise Decline("a term added to several softmaxes", node)


def _tidy(e: Expr) -> Expr:
    """Drop the zeros that replacing the other softmaxes by 0 leaves."""
    def rule(n: Expr) -> Expr | None:
        return None
    def zero(n: Expr) -> bool:
        return n.op == "const" and n.value == 0
    done: dict[Expr, Expr] = {}
    for n in e.walk():
        args = [done[a] for a in n.args]
        if n.op == "mul" and any(map(zero, args)) or n.op == "div" and zero(args[0]) \
                or n.op == "neg" and zero(args[0]):
            done[n] = E.const(0.0)
        elif n.op == "add" and any(map(zero, args)):
            done[n] = args[1] if zero(args[0]) else args[0]
        elif n.op == "sub" and zero(args[1]):
            done[n] = args[0]
        elif n.op == "sub" and zero(args[0]):
            done[n] = _negated(args[1])
        else:
            done[n] = E.rebuild(n, tuple(args)) if n.args else n
    return done[e]


def _negated(e: Expr) -> Expr:
    return E.call("mul", e, -1.0)


def _by_hand(program: Program, second: Contraction, weights: Operand,
             values: Operand) -> Attention:
    """No softmax on the way: a normaliser written out, or another function, or none."""
    keys = second.contracted
    order = {a: i for i, a in enumerate(x for dim in weights[1] for x in dim)}
    candidates = sorted((s for s in program.sources[weights[0]] if raw_score(s) is not None),
                        key=program.order.__getitem__)
    problem: Decline | None = None
    for main in sorted(candidates, key=lambda s: not _is_activation_pair(program, s)):
        raw = raw_score(main)
        assert raw is not None
        reader = Reader(program, keys, {}, of_weights=True, key_order=order)

        def scores(at: fx.Node, where: Layout, raw: RawScore = raw) -> Expr:
            raw.meet(where)
            e = E.score if not raw.root else E.call("sqrt", E.score)
            return e * raw.alpha if raw.alpha != 1 else e

        reader.terminals = {main: scores}
        try:
            if raw.addend is not None:
                raise Decline("an addend in the contraction of an unnormalised score", main)
            e = reader.read(*weights)
            _sides(raw, keys)
            return _finish_by_hand(program, second, weights, values, raw, reader, e)
        except Decline as no:
            problem = problem or no
    raise problem or Decline("the scores are not a contraction of queries with keys", second.node)


def _finish_by_hand(program: Program, second: Contraction, weights: Operand, values: Operand,
                    raw: RawScore, reader: Reader, e: Expr) -> Attention:
    end, end_layout = second.node, second.out_layout
    late = _late_division(program, second, reader)
    if late is not None:
        end, end_layout, divisor = late
        e = E.call("div", e, divisor)
    normalizer = by_hand(e, reader.markers)
    if normalizer.name != "softmax":
        for operand in (raw.left[0], raw.right[0], values[0]):
            if not program.on_input(operand):
                raise Decline("a product with a parameter, not with keys and values", raw.node)
    reader.interior += raw.inner
    site = _assemble(program, second, weights, values, raw, reader, normalizer)
    site.end, site.out_layout = end, end_layout
    site.dropout, site.detached = reader.dropout, reader.detached
    if end is not second.node:
        site.interior.append(second.node)
    if site.dropout and normalizer.weights is not E.weight:
        raise Decline("weights are edited around a dropout", second.node)
    _place_epilogue(site, normalizer.weights)
    site.compute = _compute(reader.dtypes, second.node.meta["val"].dtype)
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
    for own, given in zip(second.out_layout, at[1], strict=True):
        if len(own) == 1:
            own[0].become(given)
        elif given:
            return None
    divisor = broadcast(settle(layout), shape_of(bottom.meta["val"]))  # type: ignore[union-attr]
    return user, settle(layout), reader.read(bottom, divisor)


@dataclass
class _Sink:
    """softmax(cat([scores, sink]))[..., :K]: a logit without a value."""

    softmax: fx.Node
    layout: Layout
    keys: frozenset[Axis]
    scores: Operand
    logit: Expr
    operand: Loaded
    interior: list[fx.Node]


def _sink_slice(program: Program, node: fx.Node, layout: Layout,
                keys: frozenset[Axis]) -> _Sink | None:
    """Match the slice of a softmax over scores with extra columns; None where it is not that."""
    path: list[fx.Node] = []
    while True:
        if is_cast(node) or op_name(node) in ("contiguous", "clone") or (
                op_name(node) == "dropout" and not node.args[2]):
            path.append(node)
            node = node.args[0]  # type: ignore[assignment]
        else:
            break
    if op_name(node) != "slice" or not program.sources[node]:
        return None
    source, dim, *bounds = node.args
    softmax = source
    inner = [node]
    while isinstance(softmax, fx.Node) and (is_cast(softmax) or (
            op_name(softmax) == "dropout" and not softmax.args[2])):
        inner.append(softmax)
        softmax = softmax.args[0]
    if not isinstance(softmax, fx.Node) or op_name(softmax) not in SOFTMAX:
        return None
    rank = len(layout)
    at = dim % rank  # type: ignore[operator]
    if frozenset(resolve(layout[at])) != resolve_set(keys) or len(layout[at]) != 1:
        return None
    joined: fx.Node = softmax.args[0]  # type: ignore[assignment]
    while True:
        if is_cast(joined):
            inner.append(joined)
            joined = joined.args[0]  # type: ignore[assignment]
        elif op_name(joined) == "sub" and _is_row_max(joined.args[1], joined.args[0]):
            inner += [joined, joined.args[1]]  # type: ignore[list-item]
            joined = joined.args[0]  # type: ignore[assignment]
        else:
            break
    if op_name(joined) not in ("cat", "concat") or len(joined.args[0]) != 2:  # type: ignore
        return None
    parts = list(joined.args[0])  # type: ignore[arg-type]
    cat_dim = (joined.args[1] if len(joined.args) > 1 else 0) % rank  # type: ignore[operator]
    sizes = [shape_of(p.meta["val"])[cat_dim] for p in parts]  # type: ignore[union-attr]
    key_size = layout[at][0].size
    start = bounds[0] if bounds else 0
    if cat_dim != at or (softmax.args[1] % rank) != at:  # type: ignore[operator]
        return None
    if sizes[1] == 1 and sizes[0] == key_size and start in (0, None):
        scores, logit = parts
    elif sizes[0] == 1 and sizes[1] == key_size and start == 1:
        logit, scores = parts
    else:
        return None
    wide = Axis(key_size + 1)
    own = tuple((wide,) if i == at else axes for i, axes in enumerate(layout))
    one = tuple(() if i == at else axes for i, axes in enumerate(layout))
    assert isinstance(scores, fx.Node) and isinstance(logit, fx.Node)
    operand = Loaded(logit, broadcast(one, shape_of(logit.meta["val"])), "sink", E.FLOAT)
    return _Sink(softmax, own, frozenset((wide,)), (scores, layout), E.load("sink"), operand,
                 [*path, *inner, softmax, joined])  # type: ignore[list-item]


def _is_row_max(node: object, of: object) -> bool:
    """Is `node` the maximum of `of` along its last dimension?"""
    while isinstance(node, fx.Node) and op_name(node) in ("detach", "unsqueeze"):
        node = node.args[0]
    if isinstance(node, fx.Node) and node.target is operator.getitem:
        node = node.args[0]
    return (isinstance(node, fx.Node) and op_name(node) in ("max", "amax")
            and node.args[0] is of and len(node.args) > 1)


# -- putting it together -------------------------------------------------------------------------
def _assemble(program: Program, second: Contraction, weights: Operand, values: Operand,
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
        query, key = _sides(raw, keys)
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


def _escapes(program: Program, site: Attention) -> list[fx.Node]:
    """Live users of the site's inside that are not part of it, nor read by it alone."""
    inside = {*site.interior, site.end}
    loaded = {o.node for o in site.operands.values()}
    found: list[fx.Node] = []
    pending = [u for node in site.interior if node is not site.end for u in program.users(node)]
    for user in sorted(set(pending) - inside, key=program.order.__getitem__):
        if not _only_feeds(program, user, inside, loaded):
            found.append(user)
    return found


def _only_feeds(program: Program, node: fx.Node, inside: set[fx.Node], loaded: set[fx.Node],
                depth: int = 6) -> bool:
    """Does `node` end in the site, and not as an operand that it would still have to be for?"""
    if node in inside:
        return True
    users = program.users(node)
    return depth > 0 and bool(users) and node.op == "call_function" and node not in loaded \
        and all(_only_feeds(program, u, inside, loaded, depth - 1) for u in users)
