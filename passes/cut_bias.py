"""Biases in place of which an approximation has factors: their values, and the Spec with factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from attnopt import kernels
from attnopt.ir import expr as E
from attnopt.passes.analyze.constant_tiles import at_scores
from attnopt.passes.analyze.inline_operands import Operands
from attnopt.passes.analyze.low_rank_values import declare, free_of_rows, place_of
from attnopt.passes.analyze.provenance import Analysis
from attnopt.passes.canonical import Canonical
from attnopt.rules import Factors


def biases(analysis: Analysis, canonical: Canonical) -> dict[str, Tensor]:
    """Values (H or 1, Q, K), by slot, of what depends on no input and is added to the scores of a
    softmax that what all keys of a row share has no effect on."""
    found = {}
    for operand in canonical.spec.operands:
        if operand.dtype != E.FLOAT or operand.slot not in canonical.operands or not {
                "q", "k"} <= set(operand.axes or ()):
            continue
        node = canonical.operands[operand.slot].node
        if place_of(canonical.spec, operand.slot) != "term" or not free_of_rows(canonical.spec) \
                or analysis.values.sources(node) is None:
            continue
        try:
            found[operand.slot] = at_scores(
                analysis, canonical, operand, analysis.values.evaluate(node))
        except LookupError:  # too large, or along other axes
            continue
    return found


def reduced(canonical: Canonical, tables: Mapping[str, Any]) -> Canonical:
    """A site with factors in place of dense biases, as far as this form of it still has them."""
    spec, operands = canonical.spec, Operands(canonical)
    cut: dict[str, str] = {}
    for slot, table in tables.items():
        if not isinstance(table, Factors) or slot not in spec.slots:
            continue
        leads = [1] * (len(operands.scores) - 3)
        texts = [kernels.factors.numbers_text(t.reshape(*leads, *t.shape) if leads or (
            len(operands.scores) == 3) else t.squeeze(0)) for t in (table.query, table.key)]
        slots = declare(operands, canonical.operands[slot], table.query.shape[-1], texts)
        cut[slot] = slots[0]
        spec = spec.with_([operands.declared[s][0] for s in slots],
                          logits=spec.logits.replace({E.load(slot): E.inner(*slots)}))
    if not cut:
        return canonical
    tensors = canonical.operands | {s: t for s, (_, t) in operands.declared.items()}
    kept = {o.slot: tensors[o.slot] for o in spec.operands if o.slot in tensors}
    return replace(canonical, spec=spec, operands=kept, exact=canonical.spec, cut=cut)


def rank(canonical: Canonical) -> int:
    """Columns of the factors."""
    return sum(canonical.operands[f].target[-1][0].size for f in canonical.cut.values())
