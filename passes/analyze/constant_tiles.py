"""A constant mask without a form: the second form of a site looks at it in some of its tiles only.

    mask[q, k]              ->  some[b] and (all[b] or mask[q, k])      b = q // 64, k // 64
    logits + bias[q, k]     ->  the same with the mask  bias[q, k] > LOW, if it hides keys

`some` and `all` are tables over blocks, made once from the values (`block_tables`), which are
guarded. Kernels skip blocks where nothing is kept, and read the mask nowhere but in blocks of both.
A bias is only added where it holds more than zeros and numbers so low that they hide a key.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, And, Mask, Where
from attnopt.ir.spec import Operand
from attnopt.passes.analyze import lift_tables
from attnopt.passes.analyze.block_tables import BlockTable, tiles_of
from attnopt.passes.analyze.inline_masks import is_added
from attnopt.passes.analyze.lift import Lifter, Unliftable
from attnopt.passes.analyze.naming import named_layout
from attnopt.passes.analyze.selections import block_map
from attnopt.passes.analyze.structure import LOW

if TYPE_CHECKING:
    from attnopt.passes.analyze.inline_bias import _Inlining
    from attnopt.passes.analyze.provenance import Analysis
    from attnopt.passes.canonical import Canonical


def take(made: _Inlining, operand: Operand) -> None:
    """Put the tables of a constant operand into the mask. Raises LookupError where it is none, or
    hides too little."""
    values = made.analysis.values
    tensor = made.canonical.operands[operand.slot]
    sources = values.sources(tensor.node)
    if sources is None:
        raise Unliftable("depends on an input")
    table = at_scores(made.analysis, made.canonical, operand, values.evaluate(tensor.node))
    load = E.load(operand.slot, dtype=operand.dtype)
    if operand.dtype == E.BOOL:
        literal, mask = _in_mask(made.spec.mask, load)
        kept = table if literal is load else ~table
        changes: dict[str, Expr | Mask] = {}
    else:
        kept, mask, literal = _hiding(made, operand, table), made.spec.mask, E.const(LOW) < load
        changes = {} if bool((table[kept] != 0).any()) else made.put(operand.slot, E.const(0.0))
    tiles = tiles_of(kept)
    if tiles is None:
        raise Unliftable("hides too few tiles")
    some, whole = (made.blocks.load(t) for t in tiles)
    for expr in (some, whole):
        made.operands.declare_blocks(str(expr.value), made.blocks.by_slot[str(expr.value)])
    present = {o.slot for o in made.spec.operands}
    made.spec = made.spec.with_(
        [o for o in made.operands.described if o.slot not in present],
        mask=mask & block_map(some) & (block_map(whole) | Where(literal)), **changes)
    made.read[operand.slot] = f"looked at in tiles, {_words(tiles)}"
    made.guards |= sources


def _words(tiles: tuple[BlockTable, BlockTable]) -> str:
    some, whole = (float(t.kept.float().mean()) for t in tiles)
    return f"{1 - some:.0%} empty and {whole:.0%} full"


def at_scores(analysis: Analysis, canonical: Canonical, operand: Operand, table: Tensor) -> Tensor:
    """The values of an operand as (H or 1, Q, K)."""
    tensor = canonical.operands[operand.slot]
    named = named_layout(canonical, tensor)
    if named is None or any(not isinstance(n, int) for n in named[1].values()):
        raise Unliftable("a dimension has no name")
    lifter = analysis.lifter(tensor.node, *named, Lifter)
    found = lift_tables.at_score(table, lifter.indices(named[0]), lifter.logic.lengths)
    if found is None or found.numel() > lift_tables.LARGEST:
        raise Unliftable("its axes are not those of the scores")
    return found


def _in_mask(mask: Mask, load: Expr) -> tuple[Expr, Mask]:
    """(the literal that an operand is in a conjunction, the rest of it)."""
    parts = mask.masks if isinstance(mask, And) else (mask,)
    for part in parts:
        if isinstance(part, Where) and part.expr in (load, ~load):
            others = [p for p in parts if p is not part]
            rest: Mask = ALL
            for other in others:
                rest = rest & other
            if load.value not in rest.slots:
                return part.expr, rest
    raise Unliftable("no conjunct of the mask")


def _hiding(made: _Inlining, operand: Operand, table: Tensor) -> Tensor:
    """Where an added constant keeps its keys; a row that keeps none must stay what it is."""
    spec, slot = made.spec, operand.slot
    if spec.normalizer != "softmax" or not is_added(spec.logits, slot) \
            or spec.weights is not E.weight or slot in spec.mask.slots:
        raise Unliftable("not added to the scores of a softmax")
    if bool((table.isnan() | (table == math.inf)).any()):
        raise Unliftable("holds nan or inf")
    kept = table > LOW
    finite = bool((table[~kept] > -math.inf).any())
    rows = bool(kept.any(-1).all()) and not spec.mask.predicate().has("load")
    others = [t.node for s, t in made.canonical.operands.items() if s != slot]
    alone = not any(map(made.analysis.hides, others)) and not any(
        n.op == "const" and n.dtype == E.FLOAT and n.value <= LOW for n in spec.logits.walk())
    if not rows or finite and not (alone and spec.mask.predicate() is E.TRUE):
        raise Unliftable("a row may keep no key")
    return kept.to(torch.bool)
