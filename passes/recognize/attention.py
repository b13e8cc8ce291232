"""Attention: one site in the vocabulary of axes, before it becomes a Spec. Miss: what was left."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.recognize.axes import (
    Axis,
    Layout,
)
from attnopt.passes.recognize.heads import HeadMix
from attnopt.passes.recognize.normalizers import Normalizer
from attnopt.passes.recognize.reader import Loaded

Operand = tuple[fx.Node, Layout]


@dataclass
class Attention:
    """One attention, by nodes of the functional view, each with its layout.

    lead, rows, keys, inner, columns: the axes of (*L, Q, K), of head_dim and of V's head_dim;
    a leading dimension of length 1 holds none.
    fixed: axes along which every operand is read at one index only.
    """

    anchor: fx.Node
    end: fx.Node
    out_layout: Layout
    kind: str
    query: Operand
    key: Operand
    value: Operand
    lead: Layout
    rows: tuple[Axis, ...]
    keys: tuple[Axis, ...]
    inner: tuple[Axis, ...]
    columns: tuple[Axis, ...]
    logits: Expr
    normalizer: Normalizer
    weights: Expr = E.weight
    output: Expr = E.out
    renormalize: bool = False
    sinks: Expr | None = None
    dropout: float = 0.0
    causal: bool = False
    empty_row: str = "nan"
    compute: str | None = None
    operands: dict[str, Loaded] = field(default_factory=dict)
    vector: Operand | None = None
    #: matrices that mix heads, before and after the normaliser
    mix_logits: HeadMix | None = None
    mix_weights: HeadMix | None = None
    interior: list[fx.Node] = field(default_factory=list)
    #: interior nodes that others read as well
    escapes: list[fx.Node] = field(default_factory=list)
    #: author's own fused call, if it was one
    sdpa: bool = False
    fixed: dict[Axis, int] = field(default_factory=dict)
    #: share of the rows that gates behind the attention leave, as far as it can be foreseen
    rows_share: float = 1.0
    detached: bool = False

    @property
    def starts(self) -> list[fx.Node]:
        """The tensors that it was read from, before views of them were looked through."""
        return [self.query[0], self.key[0], self.value[0],
                *(o.node for o in self.operands.values())]

    @property
    def softmax(self) -> bool:
        return self.normalizer.name == "softmax"


@dataclass
class Miss:
    """A node that is not attention, or not understood: why, and about which node."""

    anchor: fx.Node
    reason: str
    node: fx.Node | None
    kind: str = "attention"
