"""Selections of key blocks that the model makes at run time: block maps instead of token masks.

MoBA, VMoBA, HiP and their kind score pooled blocks of keys, keep the best of them for every query
(or block of queries) and spread that choice over the tokens:

    keep[b, h, q, k] = sel[b, h, q // block_q, k // block_k]      (and causal, own block, padding)

The choice itself stays the author's. What a kernel needs is `sel`, not `keep`: it is smaller by
the size of the blocks, and whole tiles are skipped by looking at few of its entries. Sources: MoBA
(arXiv 2502.13189), VMoBA (arXiv 2506.23858), HiP (arXiv 2406.09827).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import BlockMap, Mask, Where

if TYPE_CHECKING:
    from attnopt.passes.analyze.lift import Index, Lifter

#: scores to one entry from which on a table is read through its indices
LEAST_SCORES = 8
_AXES = frozenset("qk")


def is_block_table(lifter: Lifter, node: fx.Node, idx: Index) -> bool:
    """Does a tensor along queries and keys hold one entry for many scores?

    Every dimension follows the queries, the keys or neither, so that an entry is a whole block.
    """
    from attnopt.passes.analyze.lift import Unliftable, hint

    axes = frozenset().union(*(i.indices for i in idx))
    if not _AXES <= axes or any(_AXES <= i.indices or i.has("load") for i in idx):
        return False
    try:
        lengths = [_at_example(lifter, axis) for axis in axes]
        entries = math.prod(map(hint, node.meta["val"].shape))
    except (Unliftable, LookupError):
        return False
    return entries * LEAST_SCORES <= math.prod(lengths)


def _at_example(lifter: Lifter, axis: str) -> int:
    from attnopt.passes.analyze.lift import hint

    length = lifter.axis_lengths[axis]
    return hint(length) if isinstance(length, torch.SymInt) else int(length)


def block_map(p: Expr) -> Mask:
    """A conjunct as `BlockMap` where it is one entry of a bool table per block, else `Where`."""
    if p.op == "load" and p.dtype == E.BOOL and len(p.args) >= 2:
        *leading, rows, keys = p.args
        sizes = [_block(e, axis) for e, axis in ((rows, "q"), (keys, "k"))]
        plain = all(e.op == "index" and e.value not in "qk" for e in leading)
        if plain and None not in sizes:
            names = tuple(str(e.value) for e in leading)
            return BlockMap(str(p.value), sizes[0], sizes[1], names)  # type: ignore[arg-type]
    return Where(p)


def _block(e: Expr, axis: str) -> int | None:
    """b where `e` is the axis' index // b."""
    if e is E.index(axis):
        return 1
    if e.op == "floordiv" and e.args[0] is E.index(axis) and e.args[1].op == "const":
        return int(e.args[1].value)
    return None
