"""Sites around a softmax: one, or a linear combination of several (differential attention)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
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
from attnopt.passes.recognize.heads import HeadMix
from attnopt.passes.recognize.logits import read_logits
from attnopt.passes.recognize.normalizers import Normalizer
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.reader import Marker, Reader
from attnopt.passes.recognize.roles import assemble, check_triangles, resolve_set
from attnopt.passes.recognize.sinks import Sink, sink_slice
from attnopt.rules import Decline

Operand = tuple[fx.Node, Layout]


def read_softmaxes(program: Program, second: Contraction, weights: Operand, values: Operand,
                   norms: list[fx.Node]) -> list[Attention]:
    """The sites whose weights reach `second` from the softmaxes `norms`."""
    keys = second.contracted
    order = {a: i for i, a in enumerate(x for dim in weights[1] for x in dim)}
    node, layout = weights
    heads: dict[tuple[fx.Node, Layout], Expr] = {}

    def softmax(at: fx.Node, where: Layout) -> Expr:
        if (at, where) not in heads:
            heads[at, where] = E.load(f"__weight{len(heads)}") if heads else E.weight
        found = heads[at, where]
        return E.call("log", found) if "log" in op_name(at) else found

    reader = Reader(program, keys, dict.fromkeys(norms, softmax), of_weights=True,
                    key_order=order)
    sink: Sink | None = None
    core = sink_slice(program, node, layout, keys)
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
    return [softmax_site(program, second, weights, values, reader, anchor, at, expression, sink)]


def softmax_site(program: Program, second: Contraction, weights: Operand, values: Operand,
                 reader: Reader, anchor: fx.Node, at: Layout, expression: Expr,
                 sink: Sink | None = None) -> Attention:
    """An attention around the softmax `anchor`, whose result has the layout `at`."""
    keys = reader.keys
    at = settle(at)
    dim = anchor.args[1]
    assert isinstance(dim, int)
    own = sink.keys if sink is not None else keys
    if frozenset(resolve(at[dim])) != resolve_set(own):
        raise Decline("the softmax runs over other axes than the contraction", anchor)
    expression, mixed = unmixed(expression, reader)
    expression, renormalize = _renormalized(expression, reader.markers)
    if any(leaf in reader.markers for leaf in expression.leaves):
        raise Decline("a row reduction enters the weights", anchor)
    dtypes = set(reader.dtypes)
    precise = anchor.args[2] if len(anchor.args) > 2 else anchor.kwargs.get("dtype")
    raw, logits_reader, logits = read_logits(program, anchor.args[0], at, reader, values,  # type: ignore
                                         sink)
    logits, mixed_logits = unmixed(logits, logits_reader)
    site = assemble(program, second, weights, values, raw, logits_reader,
                     Normalizer("softmax", False, logits, E.weight))
    site.anchor = anchor
    site.mix_logits, site.mix_weights = mixed_logits, mixed
    site.interior = list(dict.fromkeys([*reader.interior, *site.interior]))
    if sink is not None:
        site.sinks = sink.logit
        if sink.operand is not None:
            site.operands["sink"] = sink.operand
    site.renormalize, site.dropout = renormalize, reader.dropout
    site.fixed = selected(reader, axes_of(at)) | selected(logits_reader)
    site.detached = reader.detached or logits_reader.detached
    if any(n.op == "log" and n.args[0].op == "weight" for n in expression.walk()):
        raise Decline("the logarithm of the weights is used itself", anchor)
    check_triangles(site, reader, logits_reader)
    if site.dropout and expression is not E.weight:
        raise Decline("weights are edited around a dropout", anchor)
    place_epilogue(site, expression)
    if isinstance(precise, torch.dtype):
        dtypes.add(precise)
    site.compute = computed_in(dtypes | logits_reader.dtypes, second.node.meta["val"].dtype)
    return site


def selected(reader: Reader, among: frozenset[Axis] | None = None) -> dict[Axis, int]:
    """The axes, as fine as they are known now, that `reader` met a selection along."""
    found: dict[Axis, int] = {}
    for axis, number in reader.fixed.items():
        first, *minor = resolve((axis,))
        for part in reversed(minor):
            if number and not isinstance(part.size, int):
                raise Decline("a selection along an axis that is split at an unknown length")
            number, found[part] = divmod(number, part.size) if number else (0, 0)
        found[first] = number
    return {a: i for a, i in found.items() if among is None or a in among}


def computed_in(dtypes: set[torch.dtype], result: torch.dtype) -> str | None:
    """The wider type that the author's softmax used, if any."""
    wider = [d for d in dtypes if d.is_floating_point and d.itemsize > result.itemsize]
    return str(max(wider, key=lambda d: d.itemsize)).removeprefix("torch.") if wider else None


def unmixed(e: Expr, reader: Reader) -> tuple[Expr, HeadMix | None]:
    """`e` before its heads were mixed, and by what."""
    if e in reader.mixes:
        inner, mix = reader.mixes[e]
        if not any(leaf in reader.mixes for leaf in inner.leaves):
            return inner, mix
    if e.op == "add":
        for result, term in (e.args, e.args[::-1]):
            slot = term.value if term.op == "load" and not term.args else ""
            if result in reader.mixes and slot in reader.operands:  # a bias per head, added after
                inner, mix = reader.mixes[result]
                loaded = reader.operands[slot]
                if mix.bias is None and axes_of(loaded.layout).isdisjoint(reader.keys) \
                        and len(axes_of(loaded.layout)) == 1:
                    del reader.operands[slot]
                    return inner, replace(mix, bias=loaded.node)
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


def place_epilogue(site: Attention, expression: Expr) -> None:
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
        site = softmax_site(program, second, weights, values, own, anchor, at, _tidy(alone))
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
