"""Gates behind an attention: its result times numbers of which some are exactly 0, per row.

    o[b, h, q, :] * g[b, h, q]             heads of a mixture (MoH, arXiv 2410.11842), routed tokens
    z * full + (1 - z) * sparse            branches by a router (Flux Attention, arXiv 2604.07394)
    where(m, o, 0), masked_fill(o, ~m, 0)  likewise
    where(m, full, sparse)                 two attentions of which each row wants one

The gate, which the author multiplies with after all rows of all heads are computed, becomes part
of the site: `output` of its Spec, with an operand of the role "gate". Rows that it would multiply
by 0 may then be left out (`attnopt.kernels.gated_rows`). Only gates that have such zeros by the way
they are made are taken (`zeros`), so that a sigmoid stays where it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
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
    resolve,
    settle,
    shape_of,
)
from attnopt.passes.recognize.contraction import contraction
from attnopt.passes.recognize.layout import LAYOUT_OPS, back, strip
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.reader import Loaded
from attnopt.passes.recognize.zeros import HALF, nonzero_share
from attnopt.rules import Decline

_MOVES = frozenset(n for n in LAYOUT_OPS if "repeat" not in n and "expand" not in n) - {
    "tile", "broadcast_to"}


@dataclass(frozen=True)
class Step:
    """One operation behind an attention: `node` of `source`.

    kind:  "move" for another arrangement, "scale" by a number, "mul" by `gate`, "keep" where `gate`
           is true, "drop" where it is, "first" and "second" of where(gate, first, second)
    share: of the rows that are kept, None for a gate that is never 0
    """

    node: fx.Node
    source: fx.Node
    kind: str
    gate: Any = None
    share: float | None = None


def take_gates(program: Program, sites: list[Attention]) -> None:
    """Move the ends of sites behind the gates that follow them."""
    by_end: dict[fx.Node, list[Attention]] = {}
    for site in sites:
        by_end.setdefault(site.end, []).append(site)
    branches: dict[fx.Node, list[tuple[list[Attention], list[Step]]]] = {}
    for end, members in by_end.items():
        steps = _steps(program, end)
        if steps and steps[-1].kind in ("first", "second"):
            branches.setdefault(steps[-1].node, []).append((members, steps))
            continue
        while steps and steps[-1].share is None:
            steps.pop()
        if steps:
            _take([(members, steps)])
    for pair in branches.values():
        if sorted(steps[-1].kind for _, steps in pair) == ["first", "second"]:
            _take(pair)


def _steps(program: Program, end: fx.Node) -> list[Step]:
    """The operations behind `end`, each the only reader of the one before."""
    found: list[Step] = []
    node = end
    region = program.view.author[end].meta.get("attnopt_region")
    while True:
        users = _readers(program, node)
        if len(users) != 1 or users[0].op != "call_function" or users[0].meta.get(
                "attnopt_opaque") or not is_tensor(users[0]):
            return found
        (user,) = users
        step = _step(program, node, user)
        if step is None or user.meta["val"].dtype != end.meta["val"].dtype \
                or program.view.author[user].meta.get("attnopt_region") != region:
            return found
        found.append(step)
        node = user
        if step.kind in ("first", "second"):
            return found


def _readers(program: Program, node: fx.Node) -> list[fx.Node]:
    """The users of a node, without zeros_like and its kind that another user reads."""
    users = program.users(node)
    return [u for u in users if program.constant(u) is None or not set(program.users(u)) <= {
        v for v in users if v is not u}]


def _step(program: Program, node: fx.Node, user: fx.Node) -> Step | None:
    name, args = op_name(user), user.args
    if name in _MOVES and list(user.all_input_nodes) == [node]:
        return Step(user, node, "move")
    if user.kwargs or shape_of(user.meta["val"]) != shape_of(node.meta["val"]):
        return None
    if name == "einsum":
        read = contraction(user)
        if read is None or read.contracted or (read.left is node) == (read.right is node):
            return None
        gate = read.right if read.left is node else read.left
        return Step(user, node, "mul", gate, nonzero_share(program, gate))
    if name == "mul" and len(args) == 2 and args[0] is not args[1]:
        other = args[1] if args[0] is node else args[0]
        if not is_tensor(other):
            return Step(user, node, "scale", other) if isinstance(other, int | float) else None
        return Step(user, node, "mul", other, nonzero_share(program, other))
    if name == "masked_fill" and args[0] is node and _is_zero(program, args[2]):
        share = nonzero_share(program, args[1])
        return Step(user, node, "drop", args[1], 1 - (HALF if share is None else share))
    if name == "where" and args[0] is not node:
        return _where(program, node, user)
    return None


def _where(program: Program, node: fx.Node, user: fx.Node) -> Step | None:
    gate, first, second = user.args
    if (first is node) == (second is node) or not is_tensor(gate):
        return None
    share = nonzero_share(program, gate)
    share = HALF if share is None else share
    other, kept = (second, share) if first is node else (first, 1 - share)
    if _is_zero(program, other):
        return Step(user, node, "keep" if first is node else "drop", gate, kept)
    if is_tensor(other) and shape_of(other.meta["val"]) == shape_of(node.meta["val"]):
        return Step(user, node, "first" if first is node else "second", gate, kept)
    return None


def _is_zero(program: Program, x: Any) -> bool:
    number = program.constant(x) if isinstance(x, fx.Node) else x
    return isinstance(number, int | float) and number == 0


def _take(ends: list[tuple[list[Attention], list[Step]]]) -> None:
    """Give all sites their gates, or none of them."""
    try:
        found = [(site, steps, *_read(site, steps)) for members, steps in ends
                 for site in members]
        if len(ends) == 2:
            _align([(site, layout) for site, *_, layout in found])
    except Decline:
        return
    for site, steps, output, operands, layout in found:
        site.operands.update(operands)
        site.output, site.out_layout, site.end = output, layout, steps[-1].node
        passed = [n for s in steps for n in (s.source, *s.source.users) if n is not s.node]
        site.interior += [n for n in dict.fromkeys(passed) if n not in site.interior
                          and n is not site.end]
        for share in (s.share for s in steps):
            site.rows_share = min(site.rows_share, 1.0 if share is None else share)


def _read(site: Attention, steps: list[Step]) -> tuple[Expr, dict[str, Loaded], Layout]:
    """The output with its gates, their operands, and the layout of the last step."""
    if not resolve(site.rows) or site.mix_weights is not None:
        raise Decline("no rows to leave out")
    whole = layout = fresh(shape_of(steps[-1].node.meta["val"]))
    gates: list[tuple[Step, Layout]] = []
    for step in reversed(steps):
        if step.kind == "move":
            found = back(step.node, layout)
            assert found is not None
            layout = found[1]
        elif op_name(step.node) == "einsum":
            read = contraction(step.node)
            assert read is not None
            for own, given in zip(settle(read.out_layout), settle(layout), strict=True):
                if len(own) == 1:
                    own[0].become(given)
            left = read.left is step.source
            gates.append((step, settle(read.right_layout if left else read.left_layout)))
            layout = settle(read.left_layout if left else read.right_layout)
        elif step.kind != "scale":
            gates.append((step, broadcast(layout, shape_of(step.gate.meta["val"]))))
    _identify(layout, site.out_layout)
    output, operands = site.output, dict[str, Loaded]()
    rows = axes_of((*site.lead, site.rows))
    of_gate = dict((id(step), where) for step, where in gates)
    for step in steps:
        if step.kind == "scale":
            output = E.call("mul", output, float(step.gate))
        elif step.kind != "move":
            node, where = strip(step.gate, settle(of_gate[id(step)]), lambda _: True)
            if not axes_of(where) <= rows:
                raise Decline("a gate that varies along the features")
            slot = f"gate{len(site.operands) + len(operands)}"
            dtype = node.meta["val"].dtype
            kind = E.BOOL if dtype == torch.bool else (
                E.FLOAT if dtype.is_floating_point else E.INT)
            operands[slot] = Loaded(step.gate, of_gate[id(step)], "gate", kind)
            output = _gated(output, step.kind, E.load(slot, dtype=kind))
    return output, operands, whole


def _gated(e: Expr, kind: str, gate: Expr) -> Expr:
    if kind == "mul":
        return E.call("mul", e, gate if gate.dtype == E.FLOAT else E.call("float", gate))
    if gate.dtype != E.BOOL:
        raise Decline("a condition that is no truth value")
    return E.where(gate, e, 0.0) if kind in ("keep", "first") else E.where(gate, 0.0, e)


def _identify(own: Layout, given: Layout) -> None:
    """The axes of a layout that was read from behind are those of the site."""
    for mine, theirs in zip(settle(own), settle(given), strict=True):
        if len(mine) == 1:
            mine[0].become(theirs)
        elif [a.size for a in mine] == [a.size for a in theirs]:
            for a, b in zip(mine, theirs, strict=True):
                a.become((b,))
        else:
            raise Decline("a result that is cut otherwise than the heads")


def _align(found: list[tuple[Attention, Layout]]) -> None:
    """Results that are added must lie along the same axes, in one order: those of the first."""
    (first, goal), *others = found
    for site, layout in others:
        for mine, theirs in zip(settle(layout), settle(goal), strict=True):
            if [a.size for a in mine] != [a.size for a in theirs]:
                raise Decline("branches that are cut differently")
            for a, b in zip(mine, theirs, strict=True):
                a.become((b,))
        if any(settle(mine) != settle(theirs) for mine, theirs in (
                (site.lead, first.lead), ((site.rows, site.columns), (first.rows, first.columns)))):
            raise Decline("branches of other axes")
