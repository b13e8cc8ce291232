"""Spec + Signature -> the source of the backward kernels; only that of a table adds by atomics.

With x the logits, w the weights, g the gradient of the output and delta(q) = g . out:

    dw = g @ V^T                    dx = w * (dw - delta)        softmax
    dV = w^T @ g                    dx = f'(x) * (dw - delta)/s  normaliser f, divided by its sum s
    ds = dx * d logits / d score    dx = f'(x) * dw              not divided
    dQ = ds @ K, dK = ds^T @ Q

    row_dots         delta, one program per tile of queries
    grad_query       dQ, and row by row the gradient of operands that do not vary along k
    grad_key         dK and dV, and key by key that of operands that vary along k alone; one program
                     walks over all heads that share its keys
    grad_<operand>   of an operand that varies along q and k; one program per tile of it walks over
                     the leading axes along which it does not vary. Of a table that is gathered
                     from, see `backward_tables`.

The derivatives of the logits are those of `attnopt.ir.derivative`. The weights are computed again
from the log-sum-exp (of what the sum is for other normalisers) that the forward kernel stored.
"""

from __future__ import annotations

import dataclasses
import functools

from attnopt.ir import expr as E
from attnopt.ir.derivative import derivative
from attnopt.ir.spec import Spec
from attnopt.kernels.triton.backward_kernels import GradKey, GradQuery, GradTile, RowDots
from attnopt.kernels.triton.backward_tables import GradTable, gathers
from attnopt.kernels.triton.body import Body, inner_leaves
from attnopt.kernels.triton.layout import Signature, Source, module
from attnopt.kernels.triton.plan import Plan
from attnopt.kernels.triton.scores import WEIGHT

_POSITIVE = ("sigmoid", "relu", "softplus", "exp")


def reasons(spec: Spec) -> list[str]:
    """Why the backward kernels do not serve a Spec; empty where they do."""
    found = []
    plan = Plan(spec, Signature((), (), (), ()))
    if plan.edits:
        found.append("the gradient is not made for edited weights")
    if any(leaf.op == "stat" for leaf in spec.output.leaves):
        found.append("the gradient is not made for outputs that read row statistics")
    if plan.uniform:
        found.append("the gradient is not made for rows without a key that are uniform")
    if spec.l1 and spec.normalizer not in _POSITIVE:
        found.append(f"the gradient of a divided {spec.normalizer} is not made")
    try:
        derivative(spec.logits, E.score)
    except ValueError as error:
        found.append(str(error))
    return found


def kinds(spec: Spec, slots: frozenset[str], leading: tuple[str, ...]) -> dict[str, str] | None:
    """How the gradient of each operand is found: "row", "column", "tile", "table", "factor" (of
    low-rank terms), "weight" (of an additive score) or "sink".

    None where one of them has no kernel: it enters in several of these ways.
    """
    found = {}
    for slot in sorted(slots):
        if slot in (spec.output.slots if spec.output is not E.out else ()):
            if slot in spec.logits.slots or spec.sinks is not None and slot in spec.sinks.slots:
                return None
            continue
        leaf = E.load(slot)
        if spec.sinks is not None and slot in spec.sinks.slots:
            if slot in spec.logits.slots or spec.normalizer != "softmax":
                return None
            found[slot] = "sink"
            continue
        if slot == WEIGHT and spec.score == "additive":
            if slot in spec.logits.slots:
                return None
            found[slot] = "weight"
            continue
        if leaf not in spec.logits.leaves:
            kind = "factor" if any(sides(spec, slot)) else "table" if gathers(spec, slot) else ""
            if not kind:
                return None
            found[slot] = kind
            continue
        if any(x.op in ("load", "inner") and slot in x.slots and x is not leaf
               for x in spec.logits.leaves):
            return None
        axes = spec.operand(slot).axes or ()
        found[slot] = ("tile" if {"q", "k"} <= set(axes) else "column" if "k" in axes else "row")
    return found


def sides(spec: Spec, slot: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Numbers of the low-rank terms of which a slot is the factor along q, and along k.

    None at all where it enters the logits in another way, too.
    """
    if any(slot in x.slots for x in spec.logits.leaves if x.op != "inner"):
        return (), ()
    pairs = [x.value for x in inner_leaves(spec)]
    left, right = (tuple(i for i, pair in enumerate(pairs) if pair[side] == slot)
                   for side in (0, 1))
    return left, right


@functools.lru_cache(maxsize=256)
def backward(spec: Spec, signature: Signature, by_keys: Signature, wanted: tuple[str, ...]
             ) -> Source:
    """The module of the backward kernels.

    signature: of the forward kernel; by_keys: the same with lists of the query tiles of key tiles;
    wanted: operands whose gradient is asked for (not sinks)
    """
    found = kinds(spec, frozenset(wanted), signature.axes) or {}
    rows = tuple(s for s in wanted if found.get(s) == "row")
    columns = tuple(s for s in wanted if found.get(s) == "column")
    lefts, rights = ({s: sides(spec, s)[side] for s in wanted if found.get(s) == "factor"
                      and sides(spec, s)[side]} for side in (0, 1))
    runs = dataclasses.replace(signature, lists=None, grid=0)
    bodies: list[Body] = [
        RowDots(spec, runs),
        GradQuery(spec, signature, rows, lefts, "weight" in found.values()),
        GradKey(spec, by_keys, columns, rights)]
    bodies += [GradTile(spec, runs, s) for s in wanted if found.get(s) == "tile"]
    bodies += [GradTable(spec, runs, s) for s in wanted if found.get(s) == "table"]
    return module("Attention, backward, generated.", spec, [b.kernel for b in bodies])
