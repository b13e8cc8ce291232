"""A constant bias of low rank: factors in its place, where they cost less than reading it.

The rank is proven on the values themselves, in float64, by a cross approximation with complete
pivoting (`attnopt.kernels.factors`), which gives up one step after the last rank that would pay on
the device (`attnopt.cost.bias`); float32 factors then have to give back every element. What is
known of such ranks: rel_h + rel_w of an S x S grid 2 S - 1, any separable sum of axes the lengths'
sum less one, cos(w (i - j)) 2, squared distances in three dimensions 5, each lower by one where the
rows may be shifted. Learned tables are of full rank, and are read.

The values are guarded. Nothing is cut off: what is only nearly of low rank is left as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attnopt import kernels
from attnopt.cost.bias import Reading, low_rank_pays
from attnopt.cost.devices import Device
from attnopt.ir import expr as E
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.factors import Cross, cross, factors, shifted
from attnopt.passes.analyze.constant_tiles import at_scores
from attnopt.passes.analyze.inline_operands import Operands
from attnopt.passes.analyze.lift import Unliftable
from attnopt.passes.canonical import Recipe
from attnopt.passes.canonical import Tensor as Brought
from attnopt.passes.recognize.axes import Axis, resolve

if TYPE_CHECKING:
    from attnopt.passes.analyze.inline_bias import _Inlining

#: columns beyond which no device gains
MOST = 256
#: what an element may be off in float32: always, never, and relative to the largest
NEAREST, FARTHEST, ROUNDING = 4e-6, 2.5e-4, 16 * 2.0**-23


def take(made: _Inlining, operand: Operand) -> None:
    """Put the factors of a constant operand into the logits. Raises LookupError where it is not
    constant, not of low rank, or as cheap to read."""
    spec, slot = made.spec, operand.slot
    tensor = made.canonical.operands[slot]
    sources = made.analysis.values.sources(tensor.node)
    if sources is None or operand.dtype != E.FLOAT:
        raise Unliftable("depends on an input")
    if torch.float64 in (x.node.meta["val"].dtype for x in (tensor, made.canonical.query)):
        raise Unliftable("float64, of which factors in float32 lose digits")
    form = place_of(spec, slot)
    if form is None:
        raise Unliftable("not added to the scores, nor a factor of them")
    bias = at_scores(made.analysis, made.canonical, operand,
                     made.analysis.values.evaluate(tensor.node))
    most = largest(kernels.device(tensor.node.meta["val"].device.type),
                   reading(made, tensor, bias), form)
    if not most:
        raise Unliftable("cost: a load is as cheap as any second product")
    found = exact(bias, most, form == "term" and free_of_rows(spec))
    if found is None:
        raise Unliftable(f"no rank up to {most}")
    slots = declare(made.operands, tensor, found.rank, [found.text(side) for side in "qk"])
    more = [made.operands.declared[s][0] for s in slots]
    made.spec = spec.with_(more, **made.put(slot, E.inner(*slots)))
    made.taken[slot] = f"exact low rank {found.rank}"
    made.guards |= sources


def place_of(spec: Spec, slot: str) -> str | None:
    """Whether a product in place of an operand is a "term" of the scores or a "factor" of them."""
    if any(slot in e.slots for e in (spec.weights, spec.output, spec.mask)) or (
            spec.sinks is not None and slot in spec.sinks.slots):
        return None
    put = spec.logits.replace({E.load(slot): E.inner("f_", "g_")})
    more = (Operand("f_", ("q",), E.FLOAT, "factor"), Operand("g_", ("k",), E.FLOAT, "factor"))
    made = kernels.low_rank.widening(spec.with_(more, logits=put))
    return None if made is None else "term" if made.factor is None else "factor"


def exact(bias: Tensor, most: int, shift: bool) -> Cross | None:
    """The pivots of a bias (H, Q, K) of rank at most `most`; with `shift`, of its rows less their
    first element where that is of lower rank."""
    if not bias.numel() or not bool(bias.isfinite().all()):
        return None
    tolerance = min(FARTHEST, max(NEAREST, ROUNDING * float(bias.abs().max())))
    best: Cross | None = None
    for column in (None, 0) if shift else (None,):
        heads = []
        for matrix in shifted(bias, column):
            found = cross(matrix, most, tolerance / 2)
            if found is None:
                break
            heads.append(found)
        if len(heads) < bias.shape[0]:
            continue
        made = Cross(tuple(heads), column)
        if made.rank and (best is None or made.rank < best.rank) and _holds(bias, made, tolerance):
            best = made
    return best


def _holds(bias: Tensor, found: Cross, tolerance: float) -> bool:
    """Do the float32 factors give every element, and lose no digits in their sum?"""
    f, g = (x.double() for x in factors(bias, found))
    off = (f @ g.mT - shifted(bias, found.shift)).abs().max()
    lost = 2.0**-23 * (f.abs() @ g.abs().mT).max()
    return bool(off <= tolerance and lost <= 4 * tolerance)


def largest(device: Device, read: Reading, form: str = "term") -> int:
    """The largest rank that pays on a device; a factor of the scores takes R times their columns.
    """
    columns = (lambda r: r) if form == "term" else (lambda r: (r - 1) * read.head_dim)
    return max((r for r in range(1, MOST + 1) if low_rank_pays(device, read, columns(r))),
               default=0)


def free_of_rows(spec: Spec) -> bool:
    """Is what all keys of a row have in common without any effect?"""
    stats = any(e.has("stat") for e in (spec.weights, spec.output))
    return spec.normalizer == "softmax" and spec.sinks is None and not spec.lse and not stats


def reading(made: _Inlining, tensor: Brought, bias: Tensor) -> Reading:
    """What reading the bias takes."""
    query, value = (t.node.meta["val"] for t in (made.canonical.query, made.canonical.value))
    item = tensor.node.meta["val"].dtype.itemsize
    leads = math.prod(a.size for dim in made.operands.scores[:-2] for a in resolve(dim)
                      if isinstance(a.size, int))
    site = made.canonical.site
    dims = [math.prod(a.size for a in resolve(x) if isinstance(a.size, int))
            for x in (site.inner, site.columns)]
    return Reading(item, item * bias.numel(), max(leads // bias.shape[0], 1), dims[0], dims[1],
                   str(value.dtype if query is None else query.dtype).removeprefix("torch."))


def declare(operands: Operands, tensor: Brought, rank: int, texts: Sequence[str]) -> list[str]:
    """Operands (*L, Q, R) and (*L, K, R) that the rewritten graph makes from the bias."""
    place = dict(zip(operands.names, map(resolve, operands.scores), strict=True))
    own = {a for dim in tensor.layout for a in resolve(dim)}
    slots = []
    for axis, text in zip("qk", texts, strict=True):
        columns = (Axis(rank),)
        leads = [place[a] if own & set(place[a]) else () for a in operands.names[:-2]]
        layout = (*leads, place[axis], columns)
        target = (*map(resolve, operands.scores[:-2]), place[axis], columns)
        source = Brought(tensor.node, tensor.layout, operands.scores, tensor.recipe)
        recipe = Recipe(torch.ops.attnopt.factor.default, (source,), (), text, torch.float32)
        slot = operands.new_slot()
        along = tuple(a for a in operands.names if place[a] and (
            a == axis or a not in "qk" and own & set(place[a])))
        operands.declared[slot] = (Operand(slot, along, E.FLOAT, "factor"),
                                   Brought(tensor.node, layout, target, recipe))
        slots.append(slot)
    return slots
