"""Lists of the tiles that each tile visits: FULL ones, which run no mask, then PARTIAL ones.

A mask without an interval rule (`attnopt.kernels.triton.intervals`) gets a table of tile numbers
with a row for each tile of the program's own axis, and two counts for each row. Where the mask
depends on sizes alone, it is made once for them. Where it loads operands (padding, documents, block
maps, lifetimes), it is made anew from their values at every call, on their device, and without
waiting for it unless a table is gathered; the values are never remembered. A call that is too small
for that to pay takes the list of what the mask hides whatever its operands hold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.axis_tables import mask_states
from attnopt.ir.expr import Expr
from attnopt.ir.intervals import EMPTY, FULL, PARTIAL
from attnopt.ir.mask import And, Mask
from attnopt.ir.spec import Spec
from attnopt.ir.tiling import GridTile, Tiling, tile_count
from attnopt.kernels.triton.boxes import Boxes, boxes_of
from attnopt.kernels.triton.intervals import interval
from attnopt.kernels.triton.problem import Problem
from attnopt.kernels.triton.tiles import Tile

#: lists are made for masks of up to so many pairs of tiles
_MOST_PAIRS = 1 << 22
#: an operand of more numbers is not read for a list
_MOST_NUMBERS = 1 << 28
#: head dims beyond which the coordinates of three axes do not fit the registers
_WIDEST = 128
#: operations of both products below which making a list, some dozens of launches, is taken to cost
#: more than it saves: a tenth of a millisecond at 350 TFLOP/s
_WORTH = 1 << 35


@dataclass(frozen=True, eq=False)
class Lists:
    """axes: leading axes along which they vary; boxes: of queries and keys, None for runs;
    tensors: int32 "full" and "partial" (rows,), counts; "tiles" (rows, tiles of the other axis)."""

    axes: tuple[str, ...]
    tensors: dict[str, Tensor]
    boxes: Boxes | None = None


@dataclass(frozen=True)
class Recipe:
    """How the lists of a mask are made at some lengths.

    slots: operands that they are made from at each call; where there are none, they are kept
    cut:   how queries and keys fall into tiles; by: the axis that has the rows, "q" or "k"
    """

    mask: Mask
    queries: int
    keys: int
    cut: tuple[Tiling, Tiling]
    leading: tuple[int, ...]
    axes: tuple[str, ...]
    by: str
    device: str
    slots: frozenset[str] = frozenset()

    def make(self, tensors: Mapping[str, Tensor]) -> Lists | None:
        """The lists, None where no tile would be left out or be FULL; tensors: as in a Problem."""
        if not self.slots:
            return _kept(self)
        with torch.no_grad():
            return self.of(_states(self, {s: tensors[f"op_{s}"] for s in self.slots}))

    def of(self, states: Tensor) -> Lists:
        """`states`: (*leading or 1, query tiles, key tiles)."""
        listed, tokens = (self.cut[1], self.keys) if self.by == "q" else (self.cut[0], self.queries)
        if self.by == "k":
            states = states.transpose(-1, -2)
        # Beyond the end a tile has places that are no tokens: it needs its mask.
        states = torch.where(_cut_off(listed, tokens, str(states.device)) & (states == FULL),
                             PARTIAL, states)
        vary = tuple(a for a, n in zip(self.axes, states.shape[:-2], strict=True) if n > 1)
        states = states.reshape(-1, states.shape[-1]).contiguous()  # and so what is sorted
        # A stable sort by kind keeps the order of the tiles within a kind.
        tiles = torch.sort(states, dim=-1, descending=True, stable=True).indices
        counts = [(states == kind).sum(-1, dtype=torch.int32) for kind in (FULL, PARTIAL)]
        first, second = self.cut
        boxes = (first, second) if isinstance(first, GridTile) and isinstance(
            second, GridTile) else None
        return Lists(vary, {"full": counts[0], "partial": counts[1], "tiles": tiles.int()}, boxes)


def recipe(spec: Spec, problem: Problem, tile: Tile, by: str, boxes: Boxes | None = None
           ) -> Recipe | None:
    """How a call gets its lists; None where an interval rule serves or lists would be too long.

    by: "q" for the key tiles of each query tile, "k" for the query tiles of each key tile
    boxes: in place of those that cost least
    """
    if interval(spec).exact:
        return None
    queries, keys = problem.sizes["q"], problem.sizes["k"]
    if boxes is None:
        boxes = boxes_of(spec.mask, queries, keys, tile.rows, tile.keys)
        width = max(problem.tensors[n].shape[-1] for n in ("query", "value"))
        if boxes is not None and len(boxes[0].shape) > 2 and width > _WIDEST:
            boxes = None
    cut: tuple[Tiling, Tiling] = boxes or (tile.rows, tile.keys)
    predicate = spec.mask.predicate()
    loaded = {s: problem.tensors[f"op_{s}"] for s in predicate.slots}
    pairs = tile_count(cut[0], queries) * tile_count(cut[1], keys)
    found = Recipe(spec.mask, queries, keys, cut, problem.leading, problem.signature.axes, by,
                   str(problem.tensors["query"].device))
    if loaded and _pays(problem, predicate, loaded):
        entries = math.prod(n for i, (a, n) in enumerate(zip(
            found.axes, problem.leading, strict=True)) if a in predicate.indices or any(
            _length(t, i - len(found.axes) - 2) > 1 for t in loaded.values()))
        if recorded(problem.tensors["query"].device) and waits(predicate):
            return None
        if pairs * entries <= _MOST_PAIRS:
            return Recipe(**vars(found) | {"slots": frozenset(loaded)})
    # Along axes that the static part of the mask does not name, one list serves all.
    named = tuple(n if a in predicate.indices else 1
                  for a, n in zip(found.axes, problem.leading, strict=True))
    if pairs * math.prod(named) > _MOST_PAIRS:
        return None
    return Recipe(**vars(found) | {"leading": named})


def tiles_of(spec: Spec, problem: Problem, tile: Tile, by: str, boxes: Boxes | None = None
             ) -> Lists | None:
    """The lists of a call; None where every tile is visited, or those of an interval rule."""
    how = recipe(spec, problem, tile, by, boxes)
    return None if how is None else how.make(problem.tensors)


def _pays(problem: Problem, predicate: Expr, loaded: Mapping[str, Tensor]) -> bool:
    """Whether the operands are read for the lists of this call."""
    if any(t.numel() > _MOST_NUMBERS for t in loaded.values()):
        return False
    query, value = problem.tensors["query"], problem.tensors["value"]
    if query.device.type != "cuda":
        return True
    work = 2 * problem.programs * problem.sizes["q"] * problem.sizes["k"] * (
        query.shape[-1] + value.shape[-1])
    return work >= _WORTH


def recorded(device: torch.device) -> bool:
    """Whether calls become part of a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def waits(predicate: Expr) -> bool:
    """Whether `tile_states` asks the device for a value, which a CUDA graph cannot record."""
    return any(x.op == "load" and (x.args or x.dtype == E.FLOAT) for x in predicate.leaves)


def _length(tensor: Tensor, place: int) -> int:
    return tensor.shape[place] if place >= -tensor.dim() else 1


@functools.lru_cache(maxsize=256)
def _kept(how: Recipe) -> Lists | None:
    states = _fixed(how)
    if bool((states == PARTIAL).all()):
        return None
    with torch.inference_mode(False):
        made = how.of(states)
        return Lists(made.axes, {n: t.to(how.device) for n, t in made.tensors.items()}, made.boxes)


@functools.lru_cache(maxsize=256)
def _fixed(how: Recipe, device: str = "cpu") -> Tensor:
    """The states of a mask of which operands hide nothing."""
    with torch.inference_mode(False):
        return mask_states(how.mask, how.queries, how.keys, *how.cut, how.leading,
                           missing=True).to(device)


def _states(how: Recipe, operands: Mapping[str, Tensor]) -> Tensor:
    """The states by what operands hold; conjuncts that load none are judged once."""
    parts = how.mask.masks if isinstance(how.mask, And) else (how.mask,)
    moving = functools.reduce(Mask.__and__, (m for m in parts if m.slots))
    states = mask_states(moving, how.queries, how.keys, *how.cut, how.leading, operands)
    if len(fixed := [m for m in parts if not m.slots]):
        other = Recipe(**vars(how) | {"mask": functools.reduce(Mask.__and__, fixed),
                                      "slots": frozenset()})
        # EMPTY < PARTIAL < FULL: what all of them leave is the least.
        states = torch.minimum(states, _fixed(other, how.device))
    return states


@functools.lru_cache(maxsize=256)
def _cut_off(tiling: Tiling, tokens: int, device: str) -> Tensor:
    """bool (tiles,): those that the end of an axis cuts off."""
    grid = tiling if isinstance(tiling, GridTile) else GridTile((tokens,), (tiling,))
    with torch.inference_mode(False):
        cut = torch.zeros(1, dtype=torch.bool)
        for n, side in zip(grid.length, grid.shape, strict=True):
            own = torch.arange(1, -(-n // side) + 1) * side > n
            cut = (cut[:, None] | own).flatten()
        return cut.to(device)


assert EMPTY < PARTIAL < FULL  # what sorts and joins states relies on it
