"""Operands that a kernel can compute: biases and masks that are index arithmetic.

An operand that varies along both queries and keys, such as an ALiBi or a causal mask combined with
padding, is lifted to the author's own arithmetic (`attnopt.passes.analyze.lift_floats`) and put
into the logits, weights and mask of a second Spec, next to the one that carries it as a tensor.
What the expression loads (slopes, positions, padding) becomes operands of that Spec; none of them
varies along both axes. A kernel that evaluates expressions takes the second Spec: no queries x keys
tensor is read, the author's construction of it is dead, and tiles that the mask hides are skipped.
Every other lowering is better off with the tensor, which is made once for all layers.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from attnopt.cost.work import instructions
from attnopt.ir import expr as E
from attnopt.ir.bias import ClosedForm, form_of
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Mask, Where
from attnopt.ir.sizes import assumed
from attnopt.ir.spec import Operand, Spec
from attnopt.passes.analyze import (
    bias_tables,
    constant_tiles,
    key_lifetimes,
    low_rank,
    low_rank_values,
    relative_tables,
    sampled_bias,
)
from attnopt.passes.analyze.bias_lifter import BiasLifter, grid_layout
from attnopt.passes.analyze.bias_tables import BiasTables
from attnopt.passes.analyze.grid_check import agrees
from attnopt.passes.analyze.inline_masks import (
    Computed,
    fill_of,
    filled,
    in_mask,
    is_added,
    is_term,
)
from attnopt.passes.analyze.inline_operands import Operands
from attnopt.passes.analyze.lift import Lifted, Unliftable
from attnopt.passes.analyze.lift_floats import FloatLifter, decides
from attnopt.passes.analyze.logic import leaves_of, literals
from attnopt.passes.analyze.mask_reading import Reader
from attnopt.passes.analyze.padding import with_floor
from attnopt.passes.analyze.placing import Place
from attnopt.passes.analyze.provenance import Analysis, rows_kept
from attnopt.passes.analyze.selections import block_map, is_block_table
from attnopt.passes.analyze.structure import LOW
from attnopt.passes.canonical import Canonical
from attnopt.passes.normalize import is_tensor
from attnopt.passes.recognize.program import INPUT, PARAMETER, Program

log = logging.getLogger("attnopt.passes")

#: vector instructions per score from which on an operand is cheaper to load
DEAREST = 24.0
#: the same for what is looked up by blocks, where whole tiles may be skipped
DEAREST_BLOCKS = 64.0
_BOTH = frozenset("qk")
_LOADED = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32,
           torch.bool)


@dataclass(frozen=True)
class Inlined:
    """A second form of a site.

    slots:  operands of the first form that the Spec of this one computes, with words for the
            report
    guards: buffers and constants whose values were used for it
    rank:   columns of its low-rank terms
    saved:  elements of the tensors that are not made then; one that several sites read counts for
            each of them with its share
    """

    canonical: Canonical
    slots: Mapping[str, str]
    guards: frozenset[str]
    saved: tuple[float, ...]
    rank: int = 0


def inline(analysis: Analysis, program: Program, canonical: Canonical) -> Inlined | None:
    """The form of a site in which operands that are index arithmetic are computed; None where
    there is none."""
    made = _Inlining(analysis, program, canonical)
    for operand in canonical.spec.operands:
        if operand.slot in canonical.operands and _BOTH <= set(operand.axes or ()):
            try:
                take(made, operand)
            except Exception as error:  # what is not found is no reason to fail
                log.warning("the operand %s is carried as it is: %s", operand.slot, error,
                            exc_info=log.isEnabledFor(logging.DEBUG))
    found = made.result() if made.taken or made.read else None
    padded = with_floor(analysis, canonical if found is None else found.canonical)
    if padded is None:
        return found
    return Inlined(padded, {}, frozenset(), ()) if found is None else replace(
        found, canonical=padded)


def take(made: _Inlining, operand: Operand) -> None:
    """Compute an operand by its arithmetic, or else by the values that it has without any input, as
    a whole or where some of a tile is hidden; leave it as it is where none of that works."""
    for way in (made.take, functools.partial(made.take, by_value=True),
                functools.partial(low_rank_values.take, made),
                functools.partial(constant_tiles.take, made)):
        try:
            return way(operand)
        except LookupError as why:
            log.debug("%s is carried as it is: %s", operand.slot, why)


@dataclass
class _Inlining:
    """The second form as it grows, operand by operand."""

    analysis: Analysis
    program: Program
    canonical: Canonical
    #: words for the operands that are computed
    taken: dict[str, str] = field(default_factory=dict)
    guards: set[str] = field(default_factory=set)
    interior: set[fx.Node] = field(default_factory=set)
    #: words for operands that are read in some tiles
    read: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spec = self.canonical.spec
        self.operands = Operands(self.canonical)
        self.blocks = self.analysis.values.patterns.blocks

    def take(self, operand: Operand, by_value: bool = False) -> None:
        """Compute `operand`, by the values that it has without any input if so asked. Raises
        LookupError where that is not possible or does not pay."""
        slot, tensor = operand.slot, self.canonical.operands[operand.slot]
        place = Place.of(tensor)
        if place is not None:
            tensor = place.tensor
        named = grid_layout(self.canonical, tensor)
        if named is None:
            raise Unliftable("a dimension has no name")
        layout, lengths = named
        lifter = self.analysis.lifter(tensor.node, layout, lengths, BiasLifter)
        idx = lifter.indices(layout)
        lifted, lives = key_lifetimes.resolve(lifter, (
            lifter.by_value if by_value else lifter.lift)(tensor.node, idx), tensor.node)
        if not lives and agrees(lifted, tensor.node, idx, self.analysis.values, lengths,
                                exact=False) is False:
            log.warning("the arithmetic of %s is not what it evaluates to", tensor.node.name)
            raise Unliftable("its lift does not equal its own values")
        kept = E.TRUE if place is not None else relative_tables.kept(lifter.logic, self.spec, slot)
        lifted = relative_tables.seen(lifter.logic, lifted, kept)
        interior = self.region(slot, set(lifted.loads.values()))
        found = Computed(lifted.expr) if place is not None else (
            self.split(slot, lifter, lifted.expr, lives))
        if found.fill is not None:
            found = replace(found, keep=key_lifetimes.shortened(lifter, found.keep, lives))
        tables = BiasTables(lifter, self.analysis.values, self.operands.names,
                            _numbers(lengths["q"], lengths["k"]), kept)
        if found.expr.slots - self.blocks.by_slot.keys() or not found.expr.slots:
            found = replace(found, expr=tables.of(found.expr))
        lifted = replace(lifted, expr=found.expr if found.fill is None else
                         E.where(found.keep, found.expr, found.fill))
        self.check(lifter, lifted, lives, tables.found)
        if place is not None:
            lifted = replace(lifted, expr=place.put(lifted.expr, lives, tables.found))
            found = Computed(lifted.expr)
        operands = self.operands.copy()
        bias_tables.declare(operands, found.expr, tables.found)
        for life in lives:
            key_lifetimes.declare(operands, lifter, life)
        whole, inner, keep = (operands.bind(lifter, e)
                              for e in (lifted.expr, found.expr, found.keep))
        blind = key_lifetimes.blind(operands, lifter, lives[0]) if found.blind else E.FALSE
        inner = E.where(blind, found.fill, inner)
        dearest = DEAREST if not self.has_block_table(lifter, lifted) and not (
            relative_tables.has_rows(tables.found) or sampled_bias.has_samplings(tables.found)
        ) else DEAREST_BLOCKS
        if instructions(low_rank.without(whole), Spec(operands=operands.described)) > dearest:
            raise Unliftable("more arithmetic than a load costs")
        changes = self.put(slot, inner)
        rank = low_rank.admit(operands, self.spec, changes)
        if found.fill is not None:
            mask = self.mask(lifter, tensor.node, found.keep, keep)
            changes["mask"] = self.spec.mask & (mask if blind is E.FALSE else mask | Where(blind))
        elif slot in self.spec.mask.slots:
            changes["mask"] = in_mask(
                self.spec.mask, slot, whole, lifted.expr, lifter.logic,
                lambda keep: self.named(lifter, tensor.node, keep, operands))
        present = {o.slot for o in self.spec.operands}
        self.spec = self.spec.with_(
            [o for o in operands.described if o.slot not in present], **changes)
        self.operands = operands
        forms = dict.fromkeys(
            t.words for name, t in tables.found.items() if name in lifted.expr.slots)
        forms.update((self.blocks.by_slot[s].words, None) for s in sorted(
            lifted.expr.slots & self.blocks.by_slot.keys()))
        if self.has_block_table(lifter, lifted) and lifted.expr.dtype == E.FLOAT:
            forms["separable per axis"] = None
        if rank:
            forms[f"low rank {rank}"] = None
        forms.update((f"best {life.what.count} keys of a row", None) for life in lives)
        axes = {o.slot: o.axes for o in operands.described}
        if not forms and isinstance(form_of(inner, axes), ClosedForm):
            forms["closed form, computed in the kernel"] = None
        self.taken[slot] = " & ".join(forms) or "computed in the kernel"
        self.guards |= lifted.guards | tables.guards
        self.interior |= interior

    # -- what may be taken ------------------------------------------------------------------
    def check(self, lifter: FloatLifter, lifted: Lifted,
              lives: Sequence[key_lifetimes.Lifetime], tables: Iterable[str]) -> None:
        """Nothing of queries x keys is loaded, and nothing that rounds decides."""
        made = frozenset[Expr]().union(*(life.made for life in lives))
        for node in lifted.expr.walk():
            if node.op == "load" and node not in made and node.value not in tables \
                    and node.value not in self.blocks:
                along = frozenset().union(*(i.indices for i in node.args))
                source = lifted.loads[node.value]
                val = source.meta.get("val")
                if not isinstance(val, torch.Tensor) or val.dtype not in _LOADED:
                    raise Unliftable(f"{source.name} cannot be an operand")
                if is_block_table(lifter, source, node.args):
                    continue
                if _BOTH <= along or any(i.has("load") for i in node.args):
                    raise Unliftable(f"{source.name} is a table of queries x keys")
            elif node.op == "const" and node.dtype == E.FLOAT and math.isnan(node.value):
                raise Unliftable("holds nan")
        if decides(lifted.expr):
            raise Unliftable("a choice by what is rounded")

    def has_block_table(self, lifter: BiasLifter, lifted: Lifted) -> bool:
        return any(n.value in self.blocks or n.value in lifted.loads and is_block_table(
            lifter, lifted.loads[n.value], n.args) for n in lifted.expr.leaves
            if n.args and n.value not in lifter.samplings)

    def region(self, slot: str, loads: set[fx.Node]) -> set[fx.Node]:
        """The nodes between the loads and the operand, which the Spec computes in their place.

        Raises Unliftable where a load may be overwritten by then, or where the author computed
        without gradients what now would have one.
        """
        view, site = self.program.view, self.canonical.site
        end = view.author[site.end]
        inside: set[fx.Node] = set()
        stack = [self.canonical.operands[slot].node]
        if slot in site.operands:
            stack.append(site.operands[slot].node)
        read = set(loads)
        while stack:
            node = stack.pop()
            if node in inside or node in loads:
                continue
            if node.op == "placeholder":
                read.add(node)
                continue
            inside.add(node)
            if isinstance(node.meta.get("val"), torch.SymInt):  # a size: its tensor is only asked
                sizes = [a for a in node.all_input_nodes
                         if isinstance(a.meta.get("val"), torch.Tensor)]
                read.update(sizes)
                stack.extend(a for a in node.all_input_nodes if a not in sizes)
            else:
                stack.extend(node.all_input_nodes)
        for node in read:
            if isinstance(node.meta.get("val"), torch.Tensor) and not view.readable_at(node, end):
                raise Unliftable(f"{node.name} is overwritten before the site ends")
        differentiable = any(
            is_tensor(n) and n.meta["val"].is_floating_point()
            and self.program.depends[n] & {INPUT, PARAMETER} for n in loads)
        own = end.meta.get("attnopt_region")
        if differentiable and any(
                view.author[n].meta.get("attnopt_region") != own
                for n in inside if n in view.author and is_tensor(n)
                and self.program.depends[n] & {INPUT, PARAMETER}):
            raise Unliftable("made in a no_grad or autocast region")
        return inside - read

    # -- expressions ------------------------------------------------------------------------
    def put(self, slot: str, new: Expr) -> dict[str, Expr | Mask]:
        """What changes in the Spec with `new` in place of the operand."""
        spec = self.spec
        exprs = {"logits": spec.logits, "weights": spec.weights}
        if spec.output.slots & {slot} or spec.sinks is not None and slot in spec.sinks.slots:
            raise Unliftable("used beside the scores")
        return {name: e.replace({leaf: new for leaf in e.leaves
                                 if leaf.op == "load" and leaf.value == slot})
                for name, e in exprs.items() if slot in e.slots}

    def split(self, slot: str, lifter: FloatLifter, e: Expr,
              lives: Sequence[key_lifetimes.Lifetime]) -> Computed:
        """An additive operand that hides keys as a mask and the rest, where that is the same."""
        spec = self.spec
        found = filled(lifter.logic, e)
        if found is None or spec.normalizer != "softmax" or slot in spec.mask.slots \
                or not is_added(spec.logits, slot) or slot in spec.weights.slots:
            return Computed(e)
        keep = key_lifetimes.seen(lifter, found.keep, lives)
        kept = not keep.slots and rows_kept(lifter.logic, [spec.mask, Where(keep)]) \
            or spec.mask is ALL and self.blocks.rows_kept(keep)
        if found.fill == -math.inf:
            # Where a table leaves a row without a key, its gradients are NaN only if it is added.
            blind = not kept and keep.slots & self.blocks.by_slot.keys()
            return found if kept or spec.empty_row == "nan" and not blind else Computed(e)
        # A finite fill: no row may lose all keys, and nothing else may hide keys on its own.
        others = [t.node for s, t in self.canonical.operands.items()
                  if s != slot and s not in self.taken]
        alone = not any(map(self.analysis.hides, others)) and not any(
            n.op == "const" and n.dtype == E.FLOAT and n.value <= LOW for n in spec.logits.walk())
        if kept and alone:
            return found
        # The lowest number absorbs what is added to it: a row of nothing else is all keys with it.
        dtype = self.canonical.operands[slot].node.meta["val"].dtype
        lowest = dtype != torch.float16 and found.fill == torch.finfo(dtype).min and all(
            fill_of(x) in (None, found.fill) for x in leaves_of(e))
        whole = len(lives) == 1 and keep is lives[0].keep and is_term(spec.logits, slot)
        if lowest and whole and alone and spec.mask is ALL and spec.sinks is None \
                and spec.weights is E.weight:
            return replace(found, blind=True)
        return Computed(e)

    def named(self, lifter: FloatLifter, node: fx.Node, keep: Expr,
              operands: Operands) -> Mask:
        """A Mask for a truth value that was lifted."""
        if keep.op == "const":
            if not keep.value:
                raise Unliftable("hides everything")
            return ALL
        return self.mask(lifter, node, keep, operands.bind(lifter, keep))

    def mask(self, lifter: FloatLifter, node: fx.Node, keep: Expr, bound: Expr) -> Mask:
        """A Mask for `keep`, by name where it has one; `bound` is `keep` with its operands."""
        if not keep.slots:
            return Reader(lifter, node).mask(keep)
        plain = [p for p in literals(keep, "and") if not p.slots]
        rest = [p for p in literals(bound, "and") if p.slots]
        found: Mask = ALL
        if plain:
            found = Reader(lifter, node).mask(lifter.logic.conj(*plain))
        for p in rest:
            found = key_lifetimes.joined(found, p) if p.op == "le" else found & block_map(p)
        return found

    # -- result -----------------------------------------------------------------------------
    def result(self) -> Inlined:
        old = {s: t for s, t in self.canonical.operands.items() if s not in self.taken}
        tensors = old | {slot: tensor for slot, (_, tensor) in self.operands.declared.items()}
        operands = {o.slot: tensors[o.slot] for o in self.spec.operands if o.slot in tensors}
        loaded = {s.node for t in operands.values() for s in t.sources}
        canonical = replace(self.canonical, spec=self.spec, operands=operands,
                            computed=frozenset(self.interior - loaded))
        return Inlined(canonical, self.taken | self.read, frozenset(self.guards), self.saved(),
                       self.operands.rank(self.spec.logits))

    def saved(self) -> tuple[float, ...]:
        if not self.taken:
            return ()
        readers = max(len(self.program.users(self.canonical.operands[s].node)) for s in self.taken)
        sizes = [math.prod(map(assumed, n.meta["val"].shape)) for n in self.interior
                 if is_tensor(n) and not _is_view(n) for _ in range(sampled_bias.passes(n))]
        # What is of a part of the scores would be expanded, and put where it lies.
        for at in filter(None, (Place.of(self.canonical.operands[s]) for s in self.taken)):
            lengths = self.canonical.lengths(at.tensor.target, at.tensor.layout)
            if all(isinstance(n, int) for n in lengths):
                sizes += [math.prod(lengths) * readers] * 2  # type: ignore[arg-type]
        return tuple(size / max(readers, 1) for size in sizes if size > 1)


def _numbers(*lengths: int | torch.SymInt) -> tuple[int, int] | None:
    """Two lengths where both are known."""
    q, k = lengths
    return (q, k) if isinstance(q, int) and isinstance(k, int) else None


def _is_view(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        a.alias_info is not None for a in target._schema.returns)
