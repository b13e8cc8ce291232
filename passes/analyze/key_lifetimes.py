"""Top-k per row of numbers that belong to the keys, as the rows for which each key lives.

Recognised is a choice along the keys, made row by row, of numbers m[q, k] that are the same for
every row where they are not filled with a low number:

    m = where(k <= q + offset & valid[k], delta[k], fill)
    chosen = scatter(zeros, -1, topk(m, count).indices, 1)      or  m >= topk(m, count).values[-1:]

as Dynamic Mask Attention writes it (arXiv 2508.02124; transformers' `doge`). Then, where a row may
see a key at all, `chosen[q, k]` is `q < death[k]`, and `attnopt.kernels.lifetimes` computes `death`
without the rows. What top-k does with filled numbers in rows that see fewer than `count` keys must
not matter: the operand has to be the same for both answers there, which is checked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import And, Causal, KeyLifetime, Mask, Where
from attnopt.ir.spec import Operand
from attnopt.kernels import lifetimes
from attnopt.passes.analyze.logic import literals
from attnopt.passes.normalize import is_tensor, op_name

if TYPE_CHECKING:
    from attnopt.passes.analyze.inline_operands import Operands
    from attnopt.passes.analyze.lift import Index, Lifted, Lifter

_Q, _K = E.index("q"), E.index("k")


@dataclass(frozen=True)
class Chosen:
    """A tensor that says which numbers of every row of `source` are its `count` largest.

    yes, no: the tensors or numbers that its elements come from, None for a truth value
    """

    source: fx.Node
    count: int
    rule: str
    sorted: bool
    yes: Any = None
    no: Any = None


def chosen(node: fx.Node) -> Chosen | None:
    """What `node` chooses along its last dimension, None where it is no choice."""
    name = op_name(node) if node.op == "call_function" else ""
    if name == "scatter" and len(node.args) == 4 and not node.kwargs:
        base, dim, index, value = node.args
        top = _piece(index, 1)
        if top is not None and dim in (-1, _rank(node) - 1):
            return Chosen(*top, value, base)
    sides = {"ge": (0, 1), "le": (1, 0)}.get(name)
    if sides is not None and len(node.args) == 2 and all(map(is_tensor, node.args)):
        numbers, least = (node.args[i] for i in sides)
        top = _piece(_threshold(least), 0)
        if top is not None and top[0] is numbers:
            smallest = isinstance(least, fx.Node) and op_name(least) == "amin"
            return Chosen(top[0], top[1], "least" if smallest else "kth", top[3])
    return None


def _rank(node: fx.Node) -> int:
    return int(node.meta["val"].dim())


def _piece(node: Any, number: int) -> tuple[fx.Node, int, str, bool] | None:
    """(source, count, "topk", sorted) of topk(source, count)[number] along the last dimension."""
    if not isinstance(node, fx.Node) or node.op != "call_function" or op_name(node) != "getitem" \
            or node.args[1] != number:
        return None
    top = node.args[0]
    if not isinstance(top, fx.Node) or op_name(top) != "topk" or top.kwargs:
        return None
    source, count, *rest = top.args
    rest = [*rest, *[-1, True, True][len(rest):]]
    dim, largest, ordered = rest
    if not isinstance(count, int) or count < 1 or largest is not True \
            or dim not in (-1, _rank(source) - 1):  # type: ignore[arg-type]
        return None
    return source, count, "topk", bool(ordered)  # type: ignore[return-value]


def _threshold(node: Any) -> Any:
    """The values behind their last or smallest one, kept as a dimension of length 1."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    name = op_name(node)
    if name == "amin" and len(node.args) == 3 and node.args[1] in ([-1], [_rank(node) - 1]) \
            and node.args[2] is True:
        return node.args[0]
    if name == "unsqueeze" and node.args[1] in (-1, _rank(node) - 1):
        inner = node.args[0]
        if isinstance(inner, fx.Node) and op_name(inner) == "select" and _is_last(inner):
            return inner.args[0]
    if name == "slice" and node.meta["val"].shape[-1] == 1 and _is_last(node):
        return node.args[0]
    return None


def _is_last(node: fx.Node) -> bool:
    """Does a selection, or a slice of length 1, take the last entry of the last dimension?"""
    source, dim, start, *_ = node.args
    shape = source.meta["val"].shape  # type: ignore[union-attr]
    return dim in (-1, len(shape) - 1) and start in (-1, shape[-1] - 1)


def is_choice(node: fx.Node, idx: Index) -> bool:
    """Is the element a choice among all keys, made for a row?"""
    return (bool(idx) and idx[-1] is _K and any("q" in i.indices for i in idx[:-1])
            and chosen(node) is not None)


@dataclass(frozen=True)
class Lifetime:
    """What is chosen from, read at a score: see `attnopt.kernels.lifetimes.Choice`."""

    values: Expr
    keep: Expr
    valid: Expr
    offset: Expr
    causal: bool
    fill: float
    what: Chosen
    death: Expr
    #: the key that a row with a tie leaves out
    hidden: Expr | None

    @property
    def made(self) -> frozenset[Expr]:
        """Loads of what the rewritten graph makes."""
        return frozenset((self.death,) if self.hidden is None else (self.death, self.hidden))

    def alive(self, lifter: Lifter) -> list[Expr]:
        """The literals that say that a key which the row sees is chosen."""
        compare = lifter.logic.compare
        found = [compare("lt", _Q, self.death)]
        return found if self.hidden is None else [*found, compare("ne", _K, self.hidden)]

    @property
    def loads(self) -> frozenset[Expr]:
        return frozenset(n for e in (self.values, self.keep) for n in e.leaves if n.op == "load")


def resolve(lifter: Lifter, lifted: Lifted, operand: fx.Node) -> tuple[Lifted, list[Lifetime]]:
    """`lifted` with every choice as `q < death`, and what was found of them.

    Raises Unliftable where a choice is of another kind.
    """
    from attnopt.passes.analyze.lift import Lifted

    e, found = lifted.expr, []
    for n in sorted(lifted.expr.leaves, key=str):
        if n.op == "load" and n.args and n.value in lifter.nodes \
                and is_choice(lifter.nodes[n.value], n.args):
            life = _read(lifter, n, operand)
            _demand_no_other(lifter, e, n, life)
            alive = lifter.logic.conj(*life.alive(lifter))
            yes, no = (_element(lifter, x, n) for x in (life.what.yes, life.what.no))
            here = alive if yes is None or no is None else lifter.logic.choose(alive, yes, no)
            e = lifter.logic.canonical(e.replace({n: here}))
            found.append(life)
    if not found:
        return lifted, []
    made = frozenset().union(*(life.made for life in found))
    read = frozenset(n for n in e.leaves if n.op == "load").union(*(x.loads for x in found)) - made
    return Lifted(e, {n.value: lifter.nodes[n.value] for n in read}, lifted.guards), found


def shortened(lifter: Lifter, keep: Expr, lives: Sequence[Lifetime]) -> Expr:
    """`keep` without conditions that follow from a key being alive: only seen keys live."""
    parts = literals(keep, "and")
    implied = [p for life in lives if life.alive(lifter)[0] in parts
               for p in literals(life.valid, "and")]
    return lifter.logic.conj(*(p for p in parts if p not in implied))


def seen(lifter: Lifter, keep: Expr, lives: Sequence[Lifetime]) -> Expr:
    """`keep` without the choices: a row that sees a key keeps the best of those that it sees."""
    alive = [p for life in lives for p in life.alive(lifter)]
    return lifter.logic.conj(*(p for p in literals(keep, "and") if p not in alive))


def _element(lifter: Lifter, x: Any, at: Expr) -> Expr | None:
    """The number that a chosen key, or another one, has in the author's tensor."""
    from attnopt.passes.analyze.lift import Unliftable

    if x is None:
        return None
    number = lifter.element(x, at.args) if is_tensor(x) else E.wrap(x)
    if number.op != "const":
        raise Unliftable("a choice that is marked by what varies")
    if at.dtype == E.BOOL:
        return E.const(bool(number.value))
    return E.const(float(number.value) if at.dtype == E.FLOAT else int(number.value))


def _read(lifter: Lifter, at: Expr, operand: fx.Node) -> Lifetime:
    from attnopt.passes.analyze.inline_masks import filled
    from attnopt.passes.analyze.lift import Unliftable
    from attnopt.passes.analyze.mask_reading import Reader

    what = chosen(lifter.nodes[at.value])
    assert what is not None
    m = lifter.element(what.source, at.args)
    split = filled(lifter.logic, m)
    values, keep = (m, E.TRUE) if split is None else (split.expr, split.keep)
    fill = -math.inf if split is None or split.fill is None else split.fill
    if values.op != "load" or "q" in values.indices or "k" not in values.indices \
            or values.dtype != E.FLOAT:
        raise Unliftable(f"{what.source.name}: its numbers are not those of the keys")
    reader = Reader(lifter, operand)
    valid, offsets = E.TRUE, []
    for p in literals(keep, "and"):
        offset = reader.beyond(p, 1)
        if offset is not None:
            offsets.append(offset)
        elif "q" in p.indices:
            raise Unliftable(f"{what.source.name}: rows see keys that are no growing run")
        else:
            valid = lifter.logic.conj(valid, p)
    if len(offsets) > 1:
        raise Unliftable(f"{what.source.name}: causal twice")
    names = [i for i in at.args[:-1] if "q" not in i.indices]
    death = E.load(f"{at.value}_death", *names, _K, dtype=E.INT)
    hidden = E.load(f"{at.value}_hidden", *names, _Q, dtype=E.INT) if what.rule == "topk" else None
    return Lifetime(values, keep, valid, offsets[0] if offsets else E.const(0), bool(offsets),
                    fill, what, death, hidden)


def _demand_no_other(lifter: Lifter, e: Expr, choice: Expr, life: Lifetime) -> None:
    """Where a row does not see a key, the operand must not depend on the choice."""
    from attnopt.passes.analyze.lift import Unliftable

    for p in literals(life.keep, "and"):
        if p is E.TRUE:
            continue
        hidden = e.replace({p: E.FALSE, lifter.logic.negate(p): E.TRUE})
        if choice in lifter.logic.canonical(hidden).leaves:
            raise Unliftable(f"{choice.value}: chooses among keys that the row does not see")


def declare(operands: Operands, lifter: Lifter, life: Lifetime) -> None:
    """Bind the loads of what a lifetime is made of to new operands.

    Raises Unliftable where what it is made of does not broadcast against the scores.
    """
    operands.bound[life.death] = _made(operands, lifter, life, "death", "qk")
    if life.hidden is not None:
        operands.bound[life.hidden] = _made(operands, lifter, life, "hidden", "q")


def blind(operands: Operands, lifter: Lifter, life: Lifetime) -> Expr:
    """Does the row see no key at all? With operands of the Spec."""
    return lifter.logic.compare("lt", _Q, _made(operands, lifter, life, "blind", ""))


def _made(operands: Operands, lifter: Lifter, life: Lifetime, give: str, along: str) -> Expr:
    """A load of a new operand that `key_lifetimes` gives."""
    from attnopt.passes.analyze.lift import Unliftable
    from attnopt.passes.canonical import Recipe, Tensor
    from attnopt.passes.recognize.axes import axes_of, resolve

    values, keep, valid = (operands.bind(lifter, e) for e in (
        life.values, life.keep, life.valid))
    loads = {n for e in (values, keep, valid) for n in e.leaves if n.op == "load"}
    if any(n.args for n in loads) or not (keep.indices | valid.indices) <= {"q", "k"}:
        raise Unliftable("a choice by a table")
    slots = tuple(sorted(keep.slots | valid.slots))
    given = [operands.of(str(s)) for s in (values.value, *slots)]
    place = dict(zip(operands.names, map(resolve, operands.scores), strict=True))
    leading = axes_of(tuple(place[a] for a in operands.names if a not in "qk"))
    have = leading & frozenset().union(*(axes_of(t.layout) for _, t in given))
    have |= axes_of(tuple(place[a] for a in along))
    text = lifetimes.Choice(
        life.what.count, slots, str(keep), str(valid), str(life.offset), life.causal, life.fill,
        life.what.rule, life.what.sorted, give)
    recipe = Recipe(torch.ops.attnopt.key_lifetimes.default, tuple(t for _, t in given),
                    (place["q"],), str(text), torch.int32)
    layout = tuple(dim if have & set(dim) else () for dim in place.values())
    axes = tuple(a for a in operands.names if have & set(place[a]))
    slot = operands.new_slot()
    operands.declared[slot] = (
        Operand(slot, axes, E.INT, "mask"),
        Tensor(life.what.source, layout, operands.scores, recipe))
    return E.load(slot, dtype=E.INT)


def joined(mask: Mask, p: Expr) -> Mask:
    """`mask & Where(p)`, as `KeyLifetime` where `p` is q < death and the mask is causal."""
    parts = mask.masks if isinstance(mask, And) else (mask,)
    if p.args[0] is _Q + 1 and p.args[1].op == "load" and not p.args[1].args \
            and p.args[1].dtype == E.INT and Causal() in parts:
        found: Mask = KeyLifetime(str(p.args[1].value))
        for part in parts:
            found = found if part == Causal() else part & found
        return found
    return mask & Where(p)
