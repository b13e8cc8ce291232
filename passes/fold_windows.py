"""Rolls and partitions around an attention within windows become part of its call.

    x -> roll -> windows -> [linear] -> attention -> [linear] -> reverse -> roll back -> y

Where every row that an attention reads is one token of a map, and every row of its result ends as
the same token of a map, the windows are named by their tokens and `attnopt::window_attention` reads
and writes the maps; a linear layer, which treats every token alike, is then applied to the map. No
operation is known by its name: `attnopt.passes.analyze.window_rows` reads where each element
comes from, and query, key, value and result must have one table of tokens, the same for each map.
Done for calls of the kernel for few keys, which follows such a table; other lowerings would have to
copy.
"""

from __future__ import annotations

import logging
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from attnopt import kernels
from attnopt.ir.captured import Captured
from attnopt.ir.spec import Schedule
from attnopt.passes.analyze.movement import Unmoved, shape_of
from attnopt.passes.analyze.window_rows import No, Reader, Result, Rows
from attnopt.passes.normalize import View, functional_view
from attnopt.passes.recognize.layout import Arranger
from attnopt.passes.substitute import sweep

log = logging.getLogger("attnopt.passes")
aten = torch.ops.aten
#: the lowering whose kernel follows a table of tokens
_LOWERING = "cpp:window"


def fold_windows(captured: Captured) -> int:
    """Fold what can be folded, in place; the number of attentions for which it was done."""
    calls = [n for n in captured.graph.nodes
             if n.target is torch.ops.attnopt.attention.default and len(n.args) > 5
             and n.args[5] and Schedule.parse(n.args[5]).lowering == _LOWERING]
    if not calls or captured.training:
        return 0
    view = functional_view(captured.graph)
    found: list[_Plan] = []
    for call in calls:
        try:
            found.append(_plan(view, call))
        except (No, Unmoved) as why:
            log.debug("%s keeps its windows: %s", call.name, why)
    for plan in found:
        for node, rows in zip(plan.call.args[:3], plan.inputs, strict=True):
            _of_device(node, rows.node)  # type: ignore[arg-type]
        _emit(captured.graph, plan)
    if found:
        sweep(captured.graph, {plan.result.end for plan in found})
    return len(found)


@dataclass(frozen=True)
class _Plan:
    """A call, what reads its result, and the maps that it is of."""

    call: fx.Node
    out: fx.Node
    inputs: Sequence[Rows]
    result: Result
    maps: int
    places: Tensor


def _plan(view: View, call: fx.Node) -> _Plan:
    users = list(call.users)
    if len(users) != 1 or users[0].target is not operator.getitem or users[0].args[1] != 0:
        raise No("its log-sum-exp is used")
    reader = Reader(view, call)
    inputs = [reader.rows(node) for node in call.args[:3]]  # type: ignore[arg-type]
    result = reader.result(users[0])
    tokens = result.tokens
    if any(not torch.equal(rows.tokens, tokens) for rows in inputs):
        raise No("query, key, value and result have tokens of their own")
    if torch.equal(tokens.flatten(), torch.arange(tokens.numel())):
        raise No("nothing is moved")
    return _Plan(call, users[0], inputs, result,
                 *_maps(tokens, [shape_of(r.node)[:-1] for r in inputs]))


def _of_device(node: fx.Node, source: fx.Node) -> None:
    """Let constants that ask a tensor for its device ask another one."""
    for user in list(node.users):
        if user.target is torch.ops.attnopt.literal.default:
            user.replace_input_with(node, source)


def _maps(tokens: Tensor, shapes: Sequence[Sequence[Any]]) -> tuple[int, Tensor]:
    """How many maps the tokens (windows of all maps, rows) are of, and the places in one."""
    total = tokens.numel()
    counts = {math.prod(shape[:n]) for shape in shapes for n in range(len(shape))}
    for maps in sorted(counts, reverse=True):
        if not maps or total % maps or len(tokens) % maps:
            continue
        each = tokens.view(maps, -1, tokens.shape[1])
        starts = torch.arange(maps).view(-1, 1, 1) * (total // maps)
        if torch.equal(each, each[:1] + starts):
            return maps, each[0].contiguous()
    raise No("windows go across maps")


# -- writing --------------------------------------------------------------------------------------
def _emit(graph: fx.Graph, plan: _Plan) -> None:
    """Put the call of the maps in place of the attention and of what moves its rows."""
    call, old, inputs, result = plan.call, plan.out, plan.inputs, plan.result
    maps, places, end = plan.maps, plan.places, plan.result.end
    heads = int(call.args[0].meta["val"].shape[1])  # type: ignore[union-attr]
    tokens = places.numel()
    made: dict[Any, fx.Node] = {}
    with graph.inserting_before(call):
        arranger = Arranger(graph, old, {})
        tensors = [_of_map(arranger, rows, maps, heads, int(node.meta["val"].shape[3]), made)
                   for rows, node in zip(inputs, call.args[:3], strict=True)]  # type: ignore
        width = int(call.args[2].meta["val"].shape[3])  # type: ignore[union-attr]
        dtype = tensors[0].meta["val"].dtype
        out = arranger.call(kernels.window_maps.window_attention, *tensors, *call.args[3:6],
                            kernels.tabulate.literal_text(places),
                            shape=(maps, heads, tokens, width), dtype=dtype)
    with graph.inserting_before(end):
        arranger = Arranger(graph, end, {})
        shape = [int(n) for n in end.meta["val"].shape]
        own = [*shape[:-1], heads * width]
        out = arranger.call(aten.transpose.int, out, 1, 2, dtype=dtype,
                            shape=(maps, tokens, heads, width))
        out = arranger.call(aten.reshape.default, out, own, shape=own, dtype=dtype)
        if result.linear is not None:
            out = arranger.call(aten.linear.default, out, *result.linear.args[1:], shape=shape,
                                dtype=end.meta["val"].dtype)
    end.replace_all_uses_with(out)


def _of_map(arranger: Arranger, rows: Rows, maps: int, heads: int, width: int,
            made: dict[Any, fx.Node]) -> fx.Node:
    """The tokens of maps (maps, heads, tokens, width) in which the rows are found."""
    def view(op: Any, node: fx.Node, *args: Any, shape: Sequence[int]) -> fx.Node:
        key = op, node, *map(str, args)
        if key not in made:
            made[key] = arranger.call(op, node, *args, shape=shape, dtype=node.meta["val"].dtype)
        return made[key]

    node = rows.node
    shape = [int(n) for n in node.meta["val"].shape]
    if rows.linear is not None:
        shape[-1] = int(rows.linear.meta["val"].shape[-1])
        node = view(aten.linear.default, node, *rows.linear.args[1:], shape=shape)
    tokens, channels = math.prod(shape[:-1]) // maps, shape[-1]
    if rows.step == width or heads == 1:
        if channels != heads * width:
            shape[-1] = heads * width
            node = view(aten.slice.Tensor, node, -1, rows.first, rows.first + heads * width,
                        shape=shape)
        own = [maps, tokens, heads, width]
        node = view(aten.reshape.default, node, own, shape=own)
    else:
        own = [maps, tokens, heads, rows.step]
        node = view(aten.reshape.default, node, own, shape=own)
        own = [*own[:-1], width]
        node = view(aten.slice.Tensor, node, -1, rows.first, rows.first + width, shape=own)
    own = [maps, heads, tokens, width]
    return view(aten.transpose.int, node, 1, 2, shape=own)
