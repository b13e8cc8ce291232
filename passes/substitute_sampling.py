"""The call of `attnopt::deformable_attention` for a sampling site, put into the author's graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from attnopt.passes.canonical import Tensor
from attnopt.passes.normalize import View
from attnopt.passes.recognize.axes import axes_of, product, resolve, same_length, settle, shape_of
from attnopt.passes.recognize.layout import Arranger
from attnopt.passes.sampled import Sampled
from attnopt.passes.substitute import Substitution, needs_strides

aten = torch.ops.aten


def substitute_sampling(graph: fx.Graph, view: View, sampled: Sampled, schedule: str = ""
                        ) -> Substitution:
    """Emit the call right before the author's end, without re-wiring."""
    site = sampled.site
    end = view.author[site.end]
    with graph.inserting_before(end):
        arranger = Arranger(graph, end, {})
        for tensor in sampled.tensors:
            arranger.learn(view.author[tensor.node], tensor.layout)
        shapes = [arranger.length(n) for n in sampled.grids]
        wanted = end.meta["val"].dtype
        value = _brought(arranger, view, sampled.value, 1, wanted)
        depth = _brought(arranger, view, sampled.depth, 1, wanted, shared=2) \
            if sampled.depth else None
        each = [_brought(arranger, view, found, 3, torch.float32) for found in sampled.locations]
        weights = _brought(arranger, view, sampled.weights, 3, wanted) if sampled.weights else None
        locations = each[0]
        if len(locations.meta["val"].shape) < 5:
            shape = [*_shape(locations), len(each)]
            locations = arranger.call(aten.stack.default, each, -1, shape=shape,
                                      dtype=locations.meta["val"].dtype)
        order = sampled.order
        if order != tuple(range(len(order))):
            parts = [arranger.call(aten.select.int, locations, -1, i, shape=_shape(locations)[:-1],
                                   dtype=locations.meta["val"].dtype) for i in order]
            locations = arranger.call(aten.stack.default, parts, -1, shape=_shape(locations),
                                      dtype=locations.meta["val"].dtype)
        if sampled.not_places is not None:
            locations = arranger.call(aten.nan_to_num.default, locations, *sampled.not_places,
                                      shape=_shape(locations), dtype=locations.meta["val"].dtype)
        shape = [product(resolve(dim)) for dim in sampled.result]
        if weights is None:
            first = arranger.call(aten.select.int, locations, -1, 0, shape=_shape(locations)[:-1],
                                  dtype=locations.meta["val"].dtype)
            weights = arranger.call(aten.ones_like.default, first, shape=_shape(first),
                                    dtype=first.meta["val"].dtype)
        dtype = torch.promote_types(value.meta["val"].dtype, weights.meta["val"].dtype)
        if wanted is torch.float64 is not dtype:  # its locations are
            value, dtype = _converted(arranger, value, wanted), wanted
        out = arranger.call(torch.ops.attnopt.deformable_attention.default, value, locations,
                            weights, depth, shapes, str(sampled.spec), schedule,
                            shape=shape, dtype=dtype)
        if site.scale != 1.0:
            out = arranger.call(aten.mul.Tensor, out, site.scale, shape=shape, dtype=dtype)
        result = arranger.arrange(out, sampled.result, settle(site.out_layout))
        lengths = [product(dim) for dim in settle(site.out_layout)]
        if dtype != wanted:
            result = arranger.call(aten.to.dtype, result, wanted, shape=lengths, dtype=wanted)
        if needs_strides(end):
            result = arranger.call(aten.contiguous.default, result, shape=lengths, dtype=wanted)
    inputs = list(dict.fromkeys(view.author[t.node] for t in sampled.tensors))
    return Substitution(end, inputs, arranger.emitted, result)


def _brought(arranger: Arranger, view: View, parts: Sequence[Tensor], dim: int,
             whole: torch.dtype, shared: int | None = None) -> fx.Node:
    """The parts brought to their targets, whole dimensions, one behind the other along `dim`.

    whole:  the dtype for whole numbers; of coordinates, which float32 holds exactly, that
    shared: a dimension that stays of length 1 where no part has an axis of it
    """
    have = frozenset().union(*(axes_of(t.layout) for t in parts))
    nodes = []
    for tensor in parts:
        node = arranger.arrange(view.author[tensor.node], tensor.layout, tensor.target)
        shape = [1 if i == shared and not have & set(resolve(axes)) else product(resolve(axes))
                 for i, axes in enumerate(tensor.target)]
        if not all(map(same_length, _shape(node), shape)):
            node = arranger.call(aten.expand.default, node, [arranger.length(n) for n in shape],
                                 shape=shape, dtype=node.meta["val"].dtype)
        if not node.meta["val"].is_floating_point():
            node = _converted(arranger, node, whole)
        nodes.append(node)
    if len(nodes) == 1:
        return nodes[0]
    shape = list(_shape(nodes[0]))
    shape[dim] = sum(_shape(n)[dim] for n in nodes)
    return arranger.call(aten.cat.default, nodes, dim, shape=shape,
                         dtype=nodes[0].meta["val"].dtype)


def _converted(arranger: Arranger, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return arranger.call(aten.to.dtype, node, dtype, shape=_shape(node), dtype=dtype)


def _shape(node: fx.Node) -> tuple[Any, ...]:
    return shape_of(node.meta["val"])
