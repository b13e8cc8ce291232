"""Padding that is added: a bias along the keys that is so low in places that it hides them.

    logits + bias[b, k]    ->    the same, with the mask  bias[b, k] >= max_k bias[b, k] - margin

BERT and its kind add `(1 - attention_mask) * finfo.min`. What a kernel could skip, the keys of
padding, is known when the call comes, and whether a row keeps a key at all is not known before. The
floor (`attnopt.kernels.key_floor`) is computed then, from the values as they are: the mask leaves
out keys whose weight is zero, whatever the bias holds. It is put on only where nothing else can
hide keys, as another mask may hide the very key that makes others zero.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import ALL, Mask, Where
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels import key_floor
from attnopt.passes.analyze.inline_masks import is_added, is_term
from attnopt.passes.analyze.provenance import Analysis
from attnopt.passes.analyze.structure import LOW
from attnopt.passes.canonical import Canonical, Recipe, Tensor
from attnopt.passes.recognize.axes import axes_of, resolve

_FLOOR = "key_floor"


def with_floor(analysis: Analysis, canonical: Canonical) -> Canonical | None:
    """The site with the mask of its padding; None where it has none that can be skipped."""
    spec = canonical.spec
    if spec.normalizer != "softmax" or spec.mask != ALL or spec.weights is not E.weight \
            or spec.sinks is not None or spec.empty_row != "nan" or any(
                n.op == "const" and n.dtype == E.FLOAT and n.value <= LOW
                for n in spec.logits.walk()):
        return None
    slot = _padding(analysis, canonical)
    if slot is None or _FLOOR in canonical.operands:
        return None
    bias, axes = canonical.operands[slot], spec.operand(slot).axes
    assert axes is not None
    have = axes_of(bias.layout)
    layout = (*((dim if have & set(dim) else ()) for dim in map(resolve, bias.target[:-1])), ())
    recipe = Recipe(torch.ops.attnopt.key_floor.default, (bias,), (),
                    str(key_floor.margin(bias.node.meta["val"].dtype)),
                    bias.node.meta["val"].dtype)
    mask: Mask = Where(E.load(_FLOOR, dtype=E.FLOAT) <= E.load(slot, dtype=E.FLOAT))
    floor = Operand(_FLOOR, tuple(a for a in axes if a != "k"), E.FLOAT, "mask")
    changed = spec.with_([floor], mask=mask)
    operands = {**canonical.operands, _FLOOR: Tensor(bias.node, layout, bias.target, recipe)}
    return replace(canonical, spec=changed,
                   operands={o.slot: operands[o.slot] for o in changed.operands})


def _padding(analysis: Analysis, canonical: Canonical) -> str | None:
    """The one operand that a user's input may hide keys by; no other may."""
    spec: Spec = canonical.spec
    found = []
    for slot, tensor in canonical.operands.items():
        if not analysis.hides(tensor.node):
            continue
        if slot not in spec.logits.slots:
            return None
        found.append(slot)
    if len(found) != 1:
        return None
    operand = spec.operand(found[0])
    alone = operand.dtype == E.FLOAT and operand.axes is not None and operand.axes[-1:] == ("k",) \
        and "q" not in operand.axes and canonical.operands[found[0]].recipe is None
    parts = analysis.provenance(canonical.operands[found[0]].node).parts
    # A factor behind the sum may bring the margin of half precision too close to zero.
    half = canonical.operands[found[0]].node.meta["val"].dtype == torch.float16
    added = (is_term if half else is_added)(spec.logits, found[0])
    return found[0] if alone and added and "input" in parts and not (
        parts & {"parameter", "activation"}) else None
