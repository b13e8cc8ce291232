"""F.scaled_dot_product_attention calls, read into the same form as spelled-out attention."""

from __future__ import annotations

from typing import Any

from torch import fx

from attnopt.ir import expr as E
from attnopt.passes.recognize.attention import Attention
from attnopt.passes.recognize.axes import Axis, Layout, broadcast, fresh, settle, shape_of
from attnopt.passes.recognize.normalizers import Normalizer
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.reader import Loaded
from attnopt.rules import Decline

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")


def read_sdpa(program: Program, node: fx.Node) -> Attention:
    """softmax(scale * Q Kᵀ + mask) V; a boolean mask keeps where True; fully masked rows give 0."""
    args: dict[str, Any] = dict(zip(_NAMES, node.args, strict=False)) | dict(node.kwargs)
    query, key, value = (args[n] for n in _NAMES[:3])
    shapes = [shape_of(x.meta["val"]) for x in (query, key, value)]
    inner, rows, keys, columns = (
        Axis(shapes[0][-1]), Axis(shapes[0][-2]), Axis(shapes[1][-2]), Axis(shapes[2][-1]))
    batch = fresh(shape_of(node.meta["val"])[:-2])
    key_batch, value_batch = (_batch(batch, s[:-2], args.get("enable_gqa", False), node)
                              for s in shapes[1:])
    q_layout: Layout = (*broadcast(batch, shapes[0][:-2]), (rows,), (inner,))
    scale = args.get("scale")
    if scale is None:
        if not isinstance(shapes[0][-1], int):
            raise Decline("head_dim must be known, got a symbolic length", node)
        scale = shapes[0][-1] ** -0.5
    if not isinstance(scale, (int, float)):
        raise Decline("a symbolic scale", node)
    operands: dict[str, Loaded] = {}
    logits = E.score * float(scale)
    mask = args.get("attn_mask")
    if isinstance(mask, fx.Node):
        full: Layout = (*batch, (rows,), (keys,))
        layout = settle(broadcast(full, shape_of(mask.meta["val"])))
        boolean = not mask.meta["val"].is_floating_point()
        slot = "mask0" if boolean else "bias0"
        operands[slot] = Loaded(mask, layout, "mask" if boolean else "bias",
                                E.BOOL if boolean else E.FLOAT)
        load = E.load(slot, dtype=operands[slot].dtype)
        logits = E.where(load, logits, float("-inf")) if boolean else logits + load
    site = Attention(
        node, node, (*batch, (rows,), (columns,)), "dot", (query, q_layout),
        (key, (*key_batch, (keys,), (inner,))), (value, (*value_batch, (keys,), (columns,))),
        tuple((a,) for dim in settle(batch) for a in dim) if args.get("enable_gqa") else
        settle(batch), settle(((rows,),))[0],
        settle(((keys,),))[0], settle(((inner,),))[0], settle(((columns,),))[0], logits,
        Normalizer("softmax", False, logits, E.weight), operands=operands, sdpa=True,
        dropout=float(args.get("dropout_p", 0.0)), causal=bool(args.get("is_causal", False)),
        empty_row="zero")
    site.interior = [node]
    return site


def _batch(batch: Layout, shape: tuple[Any, ...], grouped: bool, node: fx.Node) -> Layout:
    """Leading axes of K or V; with enable_gqa a head of K serves consecutive heads of Q."""
    layout = list(broadcast(batch, shape)) if not grouped else []
    if grouped:
        from attnopt.passes.recognize.axes import quotient
        layout = list(broadcast(batch[:-1], shape[:-1]))
        (heads,) = batch[-1] or (Axis(1),)
        groups = quotient(heads.size, shape[-1])
        if groups is None:
            raise Decline("query heads must be a multiple of key heads", node)
        if groups == 1:
            layout.append(batch[-1])
        else:
            if heads.parts is None:
                heads.become((Axis(shape[-1]), Axis(groups)))
            layout.append(heads.parts[:1] if shape[-1] != 1 else ())  # type: ignore[index]
    return tuple(layout)
