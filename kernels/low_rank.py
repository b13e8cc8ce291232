"""Low-rank terms as extra columns of query and key: no tensor of all scores, any kernel.

    scale * q·k + c * f·g       = scale * [q | c/scale * f]·[k | g]
    scale * (q·k) * (f·g) + …   = scale * [q*f_1 | … | q*f_R]·[k*g_1 | … | k*g_R]

with f (…, Q, R) and g (…, K, R), see "FlashBias: Fast Computation of Attention with Bias" (arXiv
2505.12044, section 3.2 and appendix J); the second is the row-wise Khatri-Rao product. V stays.

Positions and coordinates do not fit 16 bits (ALiBi at 16,384 keys: logits off by 8 in float16 and
by 68 in bfloat16), so that the call is float32 throughout where query and key are of 16 bits.

Terms of another kind stay in the logits. Gradients of factors come with those of query and key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.spec import Spec
from attnopt.kernels.aten.codegen import compiled
from attnopt.kernels.aten.linear import linear, varies
from attnopt.kernels.aten.tile import Tile, broadcast

Attention = Callable[..., Tensor]


@dataclass(frozen=True)
class Widening:
    """A Spec without its low-rank terms, and what the extra columns are.

    terms:  (coefficient / scale, query slot, key slot); a coefficient does not vary along the keys
    factor: (query slot, key slot) that multiplies the score, or None
    """

    spec: Spec
    terms: tuple[tuple[Expr, str, str], ...]
    factor: tuple[str, str] | None = None

    def width(self, head_dim: int, rank: int) -> int:
        """Columns of query and key; `rank` is the sum of those of the factors."""
        return head_dim + rank if self.factor is None else head_dim * rank


@functools.lru_cache(maxsize=1024)
def widening(spec: Spec) -> Widening | None:
    """How a Spec with low-rank terms is one without; None where it has none, or where they are no
    plain terms of the logits."""
    if spec.score != "dot" or not spec.logits.has("inner"):
        return None
    parts = linear(spec.logits)
    if parts is None or not parts.scale:
        return None
    factor = None
    if parts.factors:
        (first, *more) = parts.factors
        if first.op != "inner" or more:
            return None
        factor = first.value
    found: list[tuple[Expr, str, str]] = []
    rest = E.score * parts.scale
    for term in parts.terms:
        kept = _split(term, E.const(1.0), found)
        if kept is not None:
            rest = rest + kept
    others = (rest, spec.weights, spec.output, spec.groups, spec.sinks)
    if factor is not None and found or any(e is not None and e.has("inner") for e in others):
        return None
    if any("k" in varies(c, spec) for c, _, _ in found):
        return None
    scaled = tuple((c / parts.scale, f, g) for c, f, g in found)
    return Widening(spec.with_(logits=rest), scaled, factor)


def _split(term: Expr, by: Expr, found: list[tuple[Expr, str, str]]) -> Expr | None:
    """Puts the low-rank parts of by * term into `found`; what is left of it, None for nothing."""
    if term.op == "inner":
        found.append((by, *term.value))
        return None
    if not term.has("inner"):
        return term * by
    args = term.args
    if term.op == "neg":
        return _split(args[0], -by, found)
    if term.op in ("add", "sub"):
        sides = [_split(args[0], by, found),
                 _split(args[1], by if term.op == "add" else -by, found)]
        left = [s for s in sides if s is not None]
        return None if not left else left[0] if len(left) == 1 else left[0] + left[1]
    if term.op == "mul" and sum(a.has("inner") for a in args) == 1:
        inside = args[0] if args[0].has("inner") else args[1]
        other = args[1] if inside is args[0] else args[0]
        return _split(inside, by * other, found)
    if term.op == "div" and not args[1].has("inner"):
        return _split(args[0], by / args[1], found)
    return term * by


class Wide:
    """The function of a Spec with low-rank terms: the kernel of the Spec without, on more columns.

    run:   that kernel; whole: the Spec as it is, for autocast, which would round the factors
    """

    __slots__ = ("made", "slots", "own", "run", "whole")

    def __init__(self, spec: Spec, made: Widening, run: Attention, whole: Attention) -> None:
        self.made, self.run, self.whole = made, run, whole
        self.slots = tuple(o.slot for o in spec.operands)
        self.own = tuple(o.slot for o in made.spec.operands)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *operands: Tensor) -> Tensor:
        device = query.device.type
        if len(operands) != len(self.slots) or device != "meta" and torch.is_autocast_enabled(
                device):
            return self.whole(query, key, value, *operands)
        given = dict(zip(self.slots, operands, strict=True))
        dtype = query.dtype
        wide = torch.promote_types(dtype, torch.float32)
        query, key, value = (t.to(wide) for t in (query, key, value))
        query, key = columns(self.made, query, key, given)
        out = self.run(query, key, value, *(given[slot] for slot in self.own))
        return out.to(dtype)


def columns(made: Widening, query: Tensor, key: Tensor, given: dict[str, Tensor]
            ) -> tuple[Tensor, Tensor]:
    """Query and key with the columns of the factors, in the dtype of query."""
    dtype = query.dtype
    if made.factor is not None:
        f, g = (given[slot].to(dtype) for slot in made.factor)
        return ((query.unsqueeze(-2) * f.unsqueeze(-1)).flatten(-2),
                (key.unsqueeze(-2) * g.unsqueeze(-1)).flatten(-2))
    left, right = [query], [key]
    for by, f_slot, g_slot in made.terms:
        f, g = given[f_slot].to(dtype), given[g_slot].to(dtype)
        if by.op == "const":
            f = f * by.value
        else:
            leads = broadcast(query.shape[:-2], key.shape[:-2])
            tile = Tile((*leads, query.shape[-2], key.shape[-2]), given, dtype, query.device)
            f = f * compiled(by)(tile)
        left.append(f)
        right.append(g)
    return _beside(left), _beside(right)


def _beside(parts: Sequence[Tensor]) -> Tensor:
    leads = broadcast(*(t.shape[:-2] for t in parts))
    return torch.cat([t.expand(*leads, *t.shape[-2:]) for t in parts], -1)


def widened(spec: Spec, query: Sequence[int], key: Sequence[int], rank: int
            ) -> tuple[Spec, tuple[int, ...], tuple[int, ...]]:
    """A Spec and the shapes of query and key as a kernel sees them; the same where nothing is
    widened."""
    made = widening(spec)
    if made is None:
        return spec, tuple(query), tuple(key)
    return made.spec, (*query[:-1], made.width(query[-1], rank)), (
        *key[:-1], made.width(key[-1], rank))


def of_call(spec: Spec, tensors: Sequence[Tensor]) -> tuple[Spec, Sequence[Tensor]]:
    """The Spec and tensors of the same dtypes and shapes that the kernel of a call will see."""
    made = widening(spec)
    if made is None:
        return spec, tensors
    query, key, value, *operands = tensors
    given = dict(zip((o.slot for o in spec.operands), operands, strict=True))
    slots = [made.factor[0]] if made.factor else [f for _, f, _ in made.terms]
    rank = sum(int(given[slot].shape[-1]) for slot in slots)
    dtype = torch.promote_types(query.dtype, torch.float32)
    wide = [t.new_empty((*t.shape[:-1], made.width(int(t.shape[-1]), rank)), dtype=dtype)
            for t in (query, key)]
    return made.spec, [*wide, value.to(dtype), *(given[o.slot] for o in made.spec.operands)]
