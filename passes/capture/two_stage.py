"""Lifting in two stages joined into one: depth scores, then deformable attention weighted by them.

    score = depth_score(depth, locations)                 (DFA3D, Li et al., ICCV 2023)
    out = scored_attention(value, locations[..., :2], weights, score)

is deformable attention with depths, which stores no scores. It is so only where both stages sample
at the same places of grids of the same sizes: the locations of the second are the first two
coordinates of those of the first, cut from them or joined with a depth to give them, and the sizes
are cut or joined likewise, or known.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from attnopt.passes.normalize import is_tensor, op_name

_SCORE = torch.ops.attnopt.depth_score.default
_OF_LEVELS = torch.ops.attnopt.deformable_attention_of_levels.default

#: the same elements one after another
_SAME_ORDER = frozenset((
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "contiguous", "clone", "alias",
    "unsqueeze", "squeeze",
))


class _Source(NamedTuple):
    """A tensor whose elements, converted to `dtypes` one after another, are those asked for."""

    node: Any
    dtypes: tuple[torch.dtype, ...]


def join_stages(node: fx.Node, written: set[fx.Node], number: Callable[[Any], Any]) -> None:
    """Make a `scored_attention` whose scores are of its own points one `deformable_attention`.

    written: nodes that are written to in place, which are not read through
    number:  what a node holds whatever the inputs are, None where that is not known
    """
    value, locations, weights, score, shapes, starts, sampling = node.args
    first, dtypes = _source(score, 4, written)
    if not isinstance(first, fx.Node) or first.target is not _SCORE or dtypes:
        return
    depth, deep, sizes, begin, same = first.args
    if same != sampling or any(n in written for n in (deep, depth, first)) \
            or not _leads(deep, locations, 3, written):
        return
    if not _leads(sizes, shapes, 3, written):
        known, other = number(sizes), number(shapes)
        if known is None or other is None or not torch.equal(known[:, :2], other):
            return
    if _source(begin, 0, written) != _source(starts, 0, written):
        known, other = number(begin), number(starts)
        if known is None or other is None or not torch.equal(known, other):
            return
    node.target = _OF_LEVELS
    node.args = (value, deep, weights, depth, shapes, starts, sampling)


def drop_scores(graph: fx.Graph) -> None:
    """Take out scores that nothing reads."""
    for node in reversed(graph.nodes):
        if not node.users and getattr(_source(node, 4, set()).node, "target", None) is _SCORE:
            graph.erase_node(node)


def _source(node: Any, last: int, written: set[fx.Node]) -> _Source:
    """What `node` rearranges and converts; its last dimension is `last` all the way, if not 0."""
    dtypes: tuple[torch.dtype, ...] = ()
    while isinstance(node, fx.Node) and node.op == "call_function" and node not in written:
        name, source = op_name(node), node.args[0] if node.args else None
        if not is_tensor(source) or name not in _SAME_ORDER and name != "to":
            break
        old, new = source.meta["val"], node.meta["val"]  # type: ignore[union-attr]
        if last and not (old.dim() and isinstance(old.shape[-1], int) and old.shape[-1] == last):
            break
        if old.dtype != new.dtype:
            dtypes = (new.dtype, *dtypes)
        node = source
    return _Source(node, dtypes)


def _leads(whole: Any, part: Any, rank: int, written: set[fx.Node]) -> bool:
    """Is `part` (..., rank - 1) the first coordinates of `whole` (..., rank)?"""
    mine, own = _source(part, rank - 1, written), _source(whole, rank, written)
    if any(s.node in written for s in (mine, own)):
        return False
    if op_name(own.node) in ("cat", "concat", "concatenate"):
        parts, *rest = own.node.args
        dim = rest[0] if rest else own.node.kwargs.get("dim", 0)
        head = _source(parts[0], rank - 1, written)
        if dim in (-1, own.node.meta["val"].dim() - 1) \
                and parts[0].meta["val"].shape[-1] == rank - 1 \
                and _Source(head.node, head.dtypes + own.dtypes) == mine \
                and parts[0].meta["val"].dtype == own.node.meta["val"].dtype:
            return True
    cut = mine.node
    if not isinstance(cut, fx.Node) or op_name(cut) != "slice":
        return False
    source, dim, start, stop, *step = cut.args
    if dim not in (-1, cut.meta["val"].dim() - 1) or start not in (0, None) or stop != rank - 1 \
            or step not in ([], [1]):
        return False
    before = _source(source, rank, written)
    return before.node not in written \
        and _Source(before.node, before.dtypes + mine.dtypes) == own
