"""The canonical form of a site: its Spec, and each tensor with the dimensions the Spec wants.

Operands are stripped of permutations, copies and repetitions; constant factors and upcasts of the
query and key move into the Spec. What is left are tensors of the author's program and, for each,
the target dimensions (*L, Q, D), (*L, K, D), (*L, K, Dv) or (*L, Q, K).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Causal
from attnopt.ir.spec import Operand, Spec, leading_axes
from attnopt.kernels import placed
from attnopt.passes.normalize import op_name
from attnopt.passes.recognize.attention import Attention
from attnopt.passes.recognize.axes import Axis, Layout, axes_of, product, resolve, settle
from attnopt.passes.recognize.layout import strip
from attnopt.passes.recognize.pointwise import is_cast
from attnopt.passes.recognize.program import Program
from attnopt.passes.recognize.reader import Loaded
from attnopt.rules import Decline

Target = tuple[tuple[Axis, ...], ...]


@dataclass(frozen=True)
class Recipe:
    """How the rewritten graph makes a tensor that the author's does not have.

    op:      op(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor, along the dimensions of
             the target that its layout holds
    inputs:  tensors of the author's program, each brought to its own target
    lengths: of these dimensions
    """

    op: Any
    inputs: tuple[Tensor, ...]
    lengths: tuple[tuple[Axis, ...], ...]
    text: str
    dtype: torch.dtype
    #: tokens to an entry along each dimension of the target; () for one
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """A tensor of the functional view, its layout, and the dimensions it is to be brought to.

    With a recipe it is made from others, and `node` is the one that it stands for.
    """

    node: fx.Node
    layout: Layout
    target: Target
    recipe: Recipe | None = None

    @property
    def sources(self) -> tuple[Tensor, ...]:
        """The tensors of the author's program that it needs."""
        return (self,) if self.recipe is None else self.recipe.inputs


@dataclass
class Canonical:
    """A site with its Spec. `operands` are in the order of `spec.operands`."""

    site: Attention
    spec: Spec
    query: Tensor
    key: Tensor
    value: Tensor
    operands: dict[str, Tensor] = field(default_factory=dict)
    #: dimensions of the Spec's result
    result: Target = ()
    #: copies and repetitions of K and V that the Spec does without
    saved: tuple[str, ...] = ()
    #: what makes operands of the author that the Spec computes by itself
    computed: frozenset[fx.Node] = frozenset()
    #: of a local attention that is read over its tokens: how many groups of queries the author
    #: copies keys for, per leading index, and how many keys for each
    copies: tuple[int, int] | None = None
    #: what the model itself computes, where the user asked for an approximation
    exact: Spec | None = None
    #: its dense operands in place of which an approximation has factors, with a factor's slot
    cut: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the author's program that the rewrite reads."""
        named = [self.operands[o.slot] for o in self.spec.operands if o.slot in self.operands]
        return [s for t in (self.query, self.key, self.value, *named) for s in t.sources]

    def lengths(self, target: Sequence[Sequence[Axis]], layout: Layout) -> tuple[object, ...]:
        """Lengths of a tensor brought to `target`: 1 where it holds no axis."""
        have = axes_of(layout)
        return tuple(product(dim) if have & set(dim) else 1 for dim in map(resolve, target))

    def shapes(self) -> str:
        return " ".join("x".join(map(str, self.lengths(t.target, t.layout)))
                        for t in (self.query, self.key, self.value))


def canonicalize(program: Program, site: Attention) -> Canonical:
    """Build the Spec of `site` and find the tensors to call it with."""
    allowed, replaces = may_read(program, site.end)
    saved: list[str] = []

    def bring(node: fx.Node, layout: Layout, name: str = "",
              own: tuple[Axis, ...] = ()) -> tuple[fx.Node, Layout]:
        found = strip(node, layout, lambda source: replaces(source, node))
        if axes_of(((*resolve(own),),)) & (axes_of(layout) - axes_of(found[1])):
            found = node, layout  # a repetition along an axis that the Spec takes from this tensor
        if name and any(
                word in op_name(n) for n in _path(found[0], node) for word in ("repeat", "expand")):
            saved.append(name)
        if not allowed(found[0]):
            raise Decline("an operand is overwritten in place before the site ends", found[0])
        return found

    query = bring(*site.query, own=site.rows + site.inner)
    key = bring(*site.key, "key", site.keys + site.inner)
    value = bring(*site.value, "value", site.keys + site.columns)
    logits = site.logits
    if site.kind == "dot" and not site.sdpa:
        query, logits = _absorb_factor(query, logits, replaces)
        key, logits = _absorb_factor(key, logits, replaces)
        wanted = value[0].meta["val"].dtype
        query, key = (_absorb_upcast(x, wanted, replaces) for x in (query, key))
    loaded = {slot: replace(o) for slot, o in site.operands.items()}
    for operand in loaded.values():
        if operand.parts:
            held = tuple(p.axis for p in operand.parts)
            operand.node, operand.own = bring(operand.node, operand.own, own=held)
        else:
            operand.node, operand.layout = bring(operand.node, operand.layout)

    lead: list[tuple[Axis, ...]] = []
    for dim in settle(site.lead):
        lead += [(a,) for a in dim] or [()]
    names = leading_axes(len(lead))
    scores: Target = (*lead, resolve(site.rows), resolve(site.keys))
    axis_names = (*names, "q", "k")
    declared = []
    tensors: dict[str, Tensor] = {}
    for slot, operand in loaded.items():
        have = axes_of(operand.layout)
        axes = tuple(n for n, dim in zip(axis_names, scores, strict=True) if have & set(dim))
        declared.append(Operand(slot, axes, operand.dtype, _role(operand.role)))
        tensors[slot] = _placed(operand, scores) if operand.parts else Tensor(
            operand.node, settle(operand.layout), scores)
    inner, columns = resolve(site.inner), resolve(site.columns)
    if site.vector is not None:
        declared.append(Operand("score_weight", None, E.FLOAT, "score"))
        tensors["score_weight"] = Tensor(*site.vector, (inner,))
    mixes = {name: f"{name}_matrix" for name in ("mix_logits", "mix_weights")
             if getattr(site, name) is not None}
    if site.mix_weights is not None and site.mix_weights.bias is not None:
        mixes["mix_bias"] = "mix_weights_bias"
    declared += [Operand(slot, None, E.FLOAT, "mix") for slot in mixes.values()]
    spec = Spec(
        **mixes,  # type: ignore[arg-type]
        score=site.kind, logits=logits, mask=Causal() if site.causal else ALL,
        normalizer=site.normalizer.name, l1=site.normalizer.l1, empty_row=site.empty_row,
        weights=site.weights, renormalize=site.renormalize, output=site.output, sinks=site.sinks,
        dropout=site.dropout, compute=site.compute, operands=tuple(declared))
    spec = spec.with_()
    leading = scores[:-2]
    return Canonical(
        site, spec,
        Tensor(query[0], settle(query[1]), (*leading, scores[-2], inner)),
        Tensor(key[0], settle(key[1]), (*leading, scores[-1], inner)),
        Tensor(value[0], settle(value[1]), (*leading, scores[-1], columns)),
        {o.slot: tensors[o.slot] for o in spec.operands if o.slot in tensors},
        (*leading, scores[-2], columns), tuple(saved))


def may_read(program: Program, end: fx.Node
             ) -> tuple[Callable[[fx.Node], bool], Callable[[fx.Node, fx.Node], bool]]:
    """What calls that are put where `end` is may read: (allowed, replaces).

    allowed(node): does the author's tensor still hold the value of `node`?
    replaces(source, node): may `source` be read, and saved for the backward pass, in place of what
    is made of it?
    """
    view, at = program.view, program.view.author[end]
    region = at.meta.get("attnopt_region")

    def allowed(node: fx.Node) -> bool:
        return view.readable_at(node, at)

    def replaces(source: fx.Node, node: fx.Node) -> bool:
        if not allowed(source):
            return False
        owner, own = view.root_of(source), view.root_of(node)
        later = any(w > view.position[at] for w in view.writes_to.get(owner, ()))
        return (owner is own or not later) and all(
            view.author[n].meta.get("attnopt_region") == region for n in _path(source, node))

    return allowed, replaces


def _placed(operand: Loaded, scores: Target) -> Tensor:
    """An operand of a part of the scores, which the rewritten graph puts into its place."""
    target, starts = list(scores), {}
    for part in operand.parts:
        dim = -1 if resolve(part.of) == scores[-1] else -2
        target[dim], starts[dim] = resolve((part.axis,)), part.start
    recipe = Recipe(
        torch.ops.attnopt.placed.default,
        (Tensor(operand.node, settle(operand.own), tuple(target)),),
        tuple(scores[dim] for dim in starts), placed.text(starts), operand.node.meta["val"].dtype)
    return Tensor(operand.node, settle(operand.layout), scores, recipe)


def _role(role: str) -> str:
    return role if role in ("mask", "bias", "sink", "score", "gate") else "other"


def _path(start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """The operations from `end` back to `start`, without it, along first arguments."""
    found = []
    while end is not start and end.args and isinstance(end.args[0], fx.Node):
        found.append(end)
        end = end.args[0]
    return found


Replaces = Callable[[fx.Node, fx.Node], bool]


def _absorb_factor(operand: tuple[fx.Node, Layout], logits: Expr,
                   replaces: Replaces) -> tuple[tuple[fx.Node, Layout], Expr]:
    """q * c or q / c with a number c: c joins the scale."""
    node, layout = operand
    name = op_name(node) if node.op == "call_function" else ""
    if name not in ("mul", "div") or node.kwargs or len(node.args) != 2:
        return operand, logits
    factor, source = node.args[1], node.args[0]
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) \
            or not isinstance(source, fx.Node) or not replaces(source, node):
        return operand, logits
    if source.meta["val"].dtype != node.meta["val"].dtype:
        return operand, logits
    scaled = E.call(name, E.score, float(factor))
    return (source, layout), logits.replace({E.score: scaled})


def _absorb_upcast(operand: tuple[fx.Node, Layout], wanted: object,
                   replaces: Replaces) -> tuple[fx.Node, Layout]:
    """q.float() before the scores: the kernel accumulates in float32 as it is."""
    node, layout = operand
    if is_cast(node) and isinstance(node.args[0], fx.Node):
        source = node.args[0]
        wider = node.meta["val"].dtype.itemsize > source.meta["val"].dtype.itemsize
        if wider and source.meta["val"].dtype == wanted and replaces(source, node):
            return source, layout
    return operand
