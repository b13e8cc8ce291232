"""The `attn_mask` of fused attention: terms and masks as one tensor of their broadcast shape.

`where` and `masked_fill` take 7 times as long on a CPU as an addition, and fused attention turns a
bool mask into a float mask at each call. So every part of the mask becomes a float tensor of its
own small shape, 0 or the fill, and the parts are joined by minimum; a part that is index arithmetic
alone is kept for the next layers and calls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.kernels.aten.codegen import compiled
from attnopt.kernels.aten.tile import Tile

#: Largest mask that is kept from call to call, in entries.
_KEPT = 1 << 20


@dataclass(frozen=True)
class Masking:
    """term:      what is added to the scores, or None
    structure: the masks that read no operand, as one predicate, or None
    others:    the masks that do
    uniform:   a row without a key is uniform over all keys: the fill is the lowest number
    slot:      the operand that is the whole mask as it stands, by position, or None
    """

    term: Expr | None
    structure: Expr | None
    others: tuple[Expr, ...]
    uniform: bool
    slot: int | None

    @staticmethod
    def of(term: Expr | None, predicates: Sequence[Expr], slots: tuple[str, ...], uniform: bool
           ) -> Masking | None:
        """None where nothing is added and every key is kept."""
        predicates = [p for p in predicates if p is not E.TRUE]
        fixed = [p for p in predicates if not p.slots]
        others = tuple(p for p in predicates if p.slots)
        if term is None and not predicates:
            return None
        alone = [e for e in (term, *predicates) if e is not None]
        slot = None
        if len(alone) == 1 and alone[0].op == "load" and not alone[0].args and (
                alone[0] is term or not uniform):
            slot = slots.index(alone[0].value)
        structure = functools.reduce(Expr.__and__, fixed) if fixed else None
        return Masking(term, structure, others, uniform, slot)

    @property
    def may_give_nan(self) -> bool:
        """Whether a term of NaN at a key that is not kept would show."""
        return self.term is not None and (self.structure is not None or bool(self.others))

    def mask(self, query: Tensor, tile: Tile | None, operands: tuple[Tensor, ...], state: str
             ) -> Tensor:
        """A bool or float mask of at least two axes, of a dtype that goes with `query`."""
        if self.slot is not None:
            tensor = operands[self.slot]
            if self.term is not None:
                tensor = _fitting(tensor, query)
            return tensor if tensor.dim() >= 2 else torch.atleast_2d(tensor)
        assert tile is not None
        if self.term is None and self.structure is None and len(self.others) == 1 and (
                not self.uniform):
            return _bool(self.others[0], tile)
        # The lowest number swallows every score in float32: a row of it alone is uniform.
        fill = torch.finfo(tile.dtype).min if self.uniform else -torch.inf
        parts, plain = [], state != "traced"
        if self.structure is not None:
            shape = tile.shape
            if plain and shape[-2] * shape[-1] <= _KEPT:
                if not any(leaf.op in ("index", "size") and leaf.value not in ("q", "k")
                           for leaf in self.structure.leaves):
                    shape = shape[-2:]
                parts.append(_kept(self.structure, shape, fill, tile.dtype, str(tile.device)))
            else:
                parts.append(_filled(_bool(self.structure, tile), fill, tile.dtype, plain))
        parts += [_filled(_bool(e, tile), fill, tile.dtype, plain) for e in self.others]
        total = functools.reduce(torch.minimum, parts) if parts else None
        if self.term is not None:
            term = torch.as_tensor(compiled(self.term)(tile), device=tile.device)
            total = term if total is None else term + total
        assert total is not None
        return torch.atleast_2d(_fitting(total, query))


def _fitting(mask: Tensor, query: Tensor) -> Tensor:
    """Half precision may come with a float32 mask on a CPU; otherwise the dtypes must be equal."""
    dtype = query.dtype
    if mask.dtype == dtype or mask.dtype == torch.float32 and query.is_cpu and (
            dtype in (torch.float16, torch.bfloat16)):
        return mask
    if query.is_cpu and dtype in (torch.float16, torch.bfloat16):
        return mask.to(torch.float32)
    return mask.to(dtype)


def _bool(predicate: Expr, tile: Tile) -> Tensor:
    return torch.atleast_2d(torch.as_tensor(compiled(predicate)(tile), device=tile.device))


def _filled(keep: Tensor, fill: float, dtype: torch.dtype, once: bool = True) -> Tensor:
    """0 where keep, `fill` elsewhere; `once`: the two numbers are made once."""
    if once:
        return torch.where(keep, *_numbers(fill, dtype, str(keep.device)))
    return torch.where(keep, keep.new_zeros((), dtype=dtype), keep.new_full((), fill, dtype=dtype))


@functools.lru_cache(maxsize=16)
def _numbers(fill: float, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):
        zero, low = torch.tensor([0.0, fill], dtype=dtype, device=device).unbind()
        return zero, low


@functools.lru_cache(maxsize=16)
def _kept(predicate: Expr, shape: tuple[int, ...], fill: float, dtype: torch.dtype, device: str
          ) -> Tensor:
    """The float mask of index arithmetic alone."""
    with torch.inference_mode(False):
        tile = Tile(shape, {}, dtype, torch.device(device))
        return _filled(_bool(predicate, tile), fill, dtype)
