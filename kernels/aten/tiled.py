"""The tiled lowering: block-sparse attention in plain ATen, for graphs that leave this process.

The queries are cut into tiles (boxes of a grid, or runs of tokens), the keys that a tile can see
are gathered, and every tile is a small dense attention (halo tiling, arXiv 2103.12731):

    q (*L, T, R, D) @ k[listed] (*L, T, S, D)^T -> (*L, T, R, S) -> softmax -> @ v[listed]

with T tiles of R rows and at most S keys each: T * R * S scores instead of Q * K. Where the lengths
are known, the lists are constants, and so is what the mask hides in a tile: most tiles of a window
hide the same, and only the different ones are held. Where they are not, a band of keys follows from
index arithmetic. It differentiates and exports; nothing of Q x K is ever made.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from attnopt.ir import expr as E
from attnopt.ir.axis_tables import mask_states
from attnopt.ir.density import known_part
from attnopt.ir.halos import boxes_of, grid_of, halos
from attnopt.ir.mask import ALL, Band, Mask, Where
from attnopt.ir.mask_base import And
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.aten.codegen import compiled
from attnopt.kernels.aten.dense import working_dtype
from attnopt.kernels.aten.scores import raw_scores
from attnopt.kernels.aten.steps import Steps, finish, steps, weigh
from attnopt.kernels.aten.tile import Tile, broadcast

#: slots of what the lists themselves hide
_HIDDEN, _LISTED = "tile_hides", "tile_lists"
#: pairs of tile and key that are asked one by one, and scores of the masks that are held
_MOST_PAIRS, _MOST_HELD = 1 << 24, 1 << 24
#: rows of a tile of a band, as tried, and of a box of a grid
_ROWS, _BOX = (32, 64, 128, 256), (16, 64)
#: a tiled attention must need so much less than a dense one
_PAYS = 0.6


@dataclass(frozen=True, eq=False)
class Tiles:
    """The tiles of a mask at known lengths.

    order: int64 (T * R,): the query of every row, the last one again where a tile has fewer
    place: int64 (Q,): the row of every query
    keys:  int64 (T, S), -1 where a tile has fewer
    rows:  R
    """

    order: Tensor
    place: Tensor
    keys: Tensor
    rows: int

    @property
    def scores(self) -> int:
        return len(self.order) * self.keys.shape[1]


def tiled_reasons(spec: Spec) -> list[str]:
    """Why tiles cannot compute a Spec, for any lengths."""
    found = []
    if spec.score not in ("dot", "distance"):
        found.append(f"score must be dot or distance, got {spec.score}")
    if spec.weights is not E.weight or spec.groups is not None:
        found.append("weights must be those of the normaliser: they are made of all keys")
    if spec.mix_logits or spec.mix_weights or spec.mix_bias:
        found.append("heads must not be mixed")
    if spec.dropout:
        found.append(f"dropout must be 0, got {spec.dropout}")
    if spec.empty_row == "uniform" and not spec.mask.row_always_kept():
        found.append("a row without keys must not be uniform over all keys")
    if spec.mask is ALL:
        found.append("the mask must hide something")
    return found


def tiled(spec: Spec, query: Tensor, key: Tensor, value: Tensor, operands: Sequence[Tensor],
          tiles: Tiles | None) -> Tensor:
    """Attention of (*L, Q, D), (*L, K, D), (*L, K, Dv): a contiguous (*L, Q, Dv), dtype of query.

    tiles: those of `tiles_of`; None for a band at lengths that are not known.
    """
    named = {o.slot: t for o, t in zip(spec.operands, operands, strict=True)}
    dtype = working_dtype(query)
    q, k, v = (t.to(dtype) for t in (query, key, value))
    if tiles is None:
        inner, lists, rows, take = _band(spec, q, k)
    else:
        inner, lists, rows, take = _listed(spec, q, k, tiles)
    leads = broadcast(q.shape[:-2], k.shape[:-2], v.shape[:-2])
    s = steps(inner)
    count, width = lists.keys.shape
    shape = (*leads, count * rows, width)
    tile = _GatheredTile(shape, {**named, **lists.slots}, dtype, q.device, q.shape[-2],
                         k.shape[-2], lists.queries, lists.keys, rows)
    q_tiles = q.index_select(-2, lists.queries).unflatten(-2, (count, rows))
    k_tiles, v_tiles = (t.index_select(-2, tile.flat_keys).unflatten(-2, (count, width))
                        for t in (k, v))
    product = torch.matmul if tiles is not None else _batched
    if inner.score == "dot":
        scores = product(q_tiles, k_tiles.transpose(-1, -2)).flatten(-3, -2)
    else:
        scores = raw_scores(inner, q_tiles, k_tiles, tile).flatten(-3, -2)
    if s.alpha != 1:
        scores = scores * s.alpha
    weight = weigh(s, tile, scores, "none", scaled=True).to(dtype)
    out = product(weight.expand(*weight.shape[:-1], width).unflatten(-2, (count, rows)),
                  v_tiles).flatten(-3, -2)
    out = take(out)
    whole = (*broadcast(leads, out.shape[:-2]), q.shape[-2], v.shape[-1])
    return _ended(inner, s, out.expand(whole), v, named, whole, tile).to(query.dtype).contiguous()


def _batched(a: Tensor, b: Tensor) -> Tensor:
    """torch.matmul, which asks whether the number of tiles is 1, for a number that is not known."""
    leads = broadcast(a.shape[:-3], b.shape[:-3])
    a, b = a.expand(*leads, *a.shape[-3:]), b.expand(*leads, *b.shape[-3:])
    flat = torch.bmm(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]))
    return flat.view(*a.shape[:-1], b.shape[-1])


def _ended(spec: Spec, s: Steps, out: Tensor, value: Tensor, named: Mapping[str, Tensor],
           whole: tuple[int, ...], tile: Tile) -> Tensor:
    if spec.output is E.out:
        return out
    end = Tile(whole, named, out.dtype, out.device, last=("q", "d"), sizes={"k": value.shape[-2]})
    return finish(s, out, value, end, "none")


@dataclass(frozen=True)
class _Lists:
    queries: Tensor
    keys: Tensor
    slots: Mapping[str, Tensor]


class _GatheredTile(Tile):
    """A tile whose rows and keys are listed: (*L, T * R, S), where row r has the keys of its tile.
    """

    __slots__ = ("queries", "keys", "rows", "flat_keys", "key_length")

    def __init__(self, shape: tuple[int, ...], operands: Mapping[str, Tensor], dtype: torch.dtype,
                 device: torch.device, query_length: int, key_length: int, queries: Tensor,
                 keys: Tensor, rows: int) -> None:
        super().__init__(shape, operands, dtype, device,
                         sizes={"q": query_length, "k": key_length})
        self.queries, self.keys, self.rows = queries, keys, rows
        self.flat_keys = keys.clamp(0, key_length - 1).flatten()
        self.key_length = key_length

    def index(self, axis: str) -> Tensor:
        if axis == "q":
            return self.queries[:, None]
        if axis == "k":
            return self.keys.repeat_interleave(self.rows, 0)
        return super().index(axis)

    def broadcast(self, slot: str) -> Tensor:
        tensor = self.operand(slot)
        if slot in (_HIDDEN, _LISTED):
            return tensor
        rows, keys = (tensor.dim() >= -a and tensor.shape[a] != 1 for a in (-2, -1))
        if keys and not rows:
            listed = tensor.index_select(-1, self.flat_keys).unflatten(-1, self.keys.shape)
            listed = listed.repeat_interleave(self.rows, -2)
            return listed.squeeze(-3) if tensor.dim() >= 2 else listed
        if rows:
            tensor = tensor.index_select(-2, self.queries)
        if keys:
            place = self.keys.clamp(0, self.key_length - 1).repeat_interleave(self.rows, 0)
            tensor = tensor.gather(-1, place.expand(*tensor.shape[:-1], -1))
        return tensor

    def inner(self, query_slot: str, key_slot: str) -> Tensor:
        query, key = self.operand(query_slot), self.operand(key_slot)
        count, width = self.keys.shape
        if query.shape[-2] != 1:
            query = query.index_select(-2, self.queries)
        else:
            query = query.expand(*query.shape[:-2], count * self.rows, query.shape[-1])
        if key.shape[-2] != 1:
            key = key.index_select(-2, self.flat_keys)
        else:
            key = key.expand(*key.shape[:-2], count * width, key.shape[-1])
        query = query.unflatten(-2, (count, self.rows))
        return (query @ key.unflatten(-2, (count, width)).transpose(-1, -2)).flatten(-3, -2)

    def gather(self, slot: str, places: tuple[Any, ...], names: tuple[str | None, ...]) -> Tensor:
        table = self.operand(slot)
        if table.dim() != len(places):
            raise ValueError(f"operand {slot!r} must have {len(places)} axes, got {table.dim()}")
        return table[tuple(
            place.clamp(0, table.shape[i] - 1) if torch.is_tensor(place)
            else min(max(place, 0), table.shape[i] - 1) for i, place in enumerate(places))]


# -- lists ---------------------------------------------------------------------------------------
def _listed(spec: Spec, q: Tensor, k: Tensor, tiles: Tiles) -> tuple[Spec, _Lists, int, Any]:
    """Lists that are constants, and what they hide as constants too."""
    known = known_part(spec.mask, frozenset())
    kinds, which, rows_kept = _hidden(known, q.shape[-2], k.shape[-2], tiles, q.dtype)
    spec = _with_hidden(spec, _without(spec.mask, known), rows_kept)
    place, order, keys, kinds, which = (
        constant(t, q.device) for t in (tiles.place, tiles.order, tiles.keys, kinds, which))
    held = kinds.index_select(0, which).flatten(0, 1)
    slots = {_HIDDEN: held} if _HIDDEN in spec.slots else {_LISTED: held == 0}
    return spec, _Lists(order, keys, slots), tiles.rows, lambda out: out.index_select(-2, place)


def constant(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor as a number that a trace holds."""
    if not torch._C._len_torch_dispatch_stack():
        return tensor.to(device)
    with _disable_current_modes():
        numbers = tensor.tolist()
    return torch.tensor(numbers, dtype=tensor.dtype, device=device)


def _with_hidden(spec: Spec, rest: Mask, rows_kept: bool) -> Spec:
    """The Spec with the lists' own mask: as a number that is added where every row keeps a key,
    which is faster, and as a mask otherwise."""
    if rest is ALL and rows_kept and spec.normalizer == "softmax":
        return spec.with_(mask=ALL, logits=spec.logits + E.load(_HIDDEN),
                          more=[Operand(_HIDDEN, ("q", "k"))])
    listed = Where(E.load(_LISTED, dtype=E.BOOL))
    return spec.with_(mask=listed if rest is ALL else rest & listed,
                      more=[Operand(_LISTED, ("q", "k"), E.BOOL, "mask")])


def _without(mask: Mask, known: Mask) -> Mask:
    """What a mask says besides a part of it."""
    if known == mask:
        return ALL
    if isinstance(mask, And):
        parts = known.masks if isinstance(known, And) else (known,)
        rest: Mask = ALL
        for part in mask.masks:
            rest = rest if part in parts else rest & part
        return rest
    return mask


@functools.lru_cache(maxsize=64)
def _hidden(mask: Mask, queries: int, keys: int, tiles: Tiles, dtype: torch.dtype
            ) -> tuple[Tensor, Tensor, bool]:
    """The different (R, S) of 0 where a key is seen and -inf elsewhere, which of them each tile
    has, and whether every row sees a key."""
    with _disable_current_modes(), torch.inference_mode(False):
        count, width = tiles.keys.shape
        tile = _GatheredTile((count * tiles.rows, width), {}, dtype, torch.device("cpu"), queries,
                             keys, tiles.order, tiles.keys, tiles.rows)
        seen = torch.as_tensor(compiled(mask.predicate())(tile)).expand(tile.shape)
        seen = (seen & (tile.index("k") >= 0)).unflatten(0, (count, tiles.rows))
        kinds, which = torch.unique(seen, dim=0, return_inverse=True)
        hidden = torch.where(kinds, 0.0, -math.inf).to(dtype)
        return hidden, which, bool(seen.any(-1).all())


def _band(spec: Spec, q: Tensor, k: Tensor) -> tuple[Spec, _Lists, int, Any]:
    """Lists by index arithmetic: of a band, for lengths that are not known."""
    band = band_of(spec.mask)
    assert band is not None
    low, high = band
    rows = _band_rows(low, high)
    queries, keys = q.shape[-2], k.shape[-2]
    count = (queries + rows - 1) // rows + 1  # one more than needed: two or more, which is known
    device = q.device
    firsts = torch.arange(count, device=device)[:, None] * rows
    listed = firsts + low + torch.arange(rows + high - low, device=device)
    asked = (firsts + torch.arange(rows, device=device)).flatten().clamp(max=queries - 1)
    inside = (listed >= 0) & (listed < keys)
    kept = inside.repeat_interleave(rows, 0)
    spec = spec.with_(mask=spec.mask & Where(E.load(_LISTED, dtype=E.BOOL)),
                      more=[Operand(_LISTED, ("q", "k"), E.BOOL, "mask")])
    return spec, _Lists(asked, listed, {_LISTED: kept}), rows, lambda out: out.index_select(
        -2, torch.arange(queries, device=device))


def band_of(mask: Mask) -> tuple[int, int] | None:
    """(lo, hi) with every kept key in q + lo .. q + hi, whatever the lengths; else None."""
    for part in mask.masks if isinstance(mask, And) else (mask,):
        if isinstance(part, Band) and part.lo.op == part.hi.op == "const":
            return int(part.lo.value), int(part.hi.value)
    return None


def _band_rows(low: int, high: int) -> int:
    """Rows of a tile: about as many as half of what a row sees."""
    wanted = max(1, (high - low + 1) // 2)
    return min(_ROWS, key=lambda r: abs(math.log(r / wanted)))


# -- which tiles ---------------------------------------------------------------------------------
@functools.lru_cache(maxsize=64)
def tiles_of(mask: Mask, queries: int, keys: int) -> Tiles | None:
    """The tiles that cost least at known lengths; None where a dense attention costs less."""
    known = known_part(mask, frozenset())
    with _disable_current_modes(), torch.inference_mode(False):
        found = [t for t in _candidates(known, queries, keys) if t is not None]
    if not found:
        return None
    best = min(found, key=_cost)
    dense = float(queries) * keys
    held = best.scores <= _MOST_HELD
    return best if held and _cost(best) < _PAYS * dense else None


def _cost(tiles: Tiles) -> float:
    """In scores: each listed key is gathered, twice, which costs as much as some 3 of its scores;
    a tile has a price of its own."""
    count, width = tiles.keys.shape
    return tiles.scores + 6.0 * count * width + 2000.0 * count


def _candidates(mask: Mask, queries: int, keys: int) -> list[Tiles | None]:
    if mask is ALL or not queries or not keys:
        return []
    grid = grid_of(mask, queries, keys)
    if grid is not None:
        boxes = boxes_of(grid, _BOX[1], _BOX[0])[:40]
        return [_box_tiles(mask, queries, keys, box) for box in boxes]
    rows = [r for r in _ROWS if r < queries] or [min(_ROWS)]
    return [_run_tiles(mask, queries, keys, r) for r in rows]


def _box_tiles(mask: Mask, queries: int, keys: int, box: tuple[int, ...]) -> Tiles | None:
    found = halos(mask, queries, keys, box)
    if found is None:
        return None
    starts = found.starts.flatten()
    sizes = starts[1:] - starts[:-1]
    width = int(sizes.max())
    lists = torch.full((len(sizes), width), -1, dtype=torch.int64)
    column = torch.arange(len(found.keys)) - torch.repeat_interleave(starts[:-1], sizes)
    lists[torch.repeat_interleave(torch.arange(len(sizes)), sizes), column] = found.keys.long()
    lists = _sorted(lists)
    return _tiles(found.order.long(), lists, queries)


def _run_tiles(mask: Mask, queries: int, keys: int, rows: int) -> Tiles | None:
    count = -(-queries // rows)
    if count * keys > _MOST_PAIRS:
        return None
    states = mask_states(mask, queries, keys, rows, 1, missing=True)
    states = states.reshape(-1, *states.shape[-2:]).amax(0)  # of all heads together
    seen = states != 0
    width = int(seen.sum(-1).max()) if count else 0
    if not width:
        return None
    places = torch.where(seen, torch.arange(keys), keys).sort(-1).values[:, :width]
    lists = torch.where(places == keys, -1, places)
    order = torch.arange(count * rows).view(count, rows)
    return _tiles(torch.where(order < queries, order, -1), lists, queries)


def _sorted(lists: Tensor) -> Tensor:
    """Each tile's keys in their order, what is missing last."""
    top = int(lists.max()) + 1
    found = torch.where(lists < 0, top, lists).sort(-1).values
    return torch.where(found == top, -1, found)


def _tiles(order: Tensor, lists: Tensor, queries: int) -> Tiles:
    place = torch.empty(queries, dtype=torch.int64)
    own = torch.nonzero(order.flatten() >= 0)[:, 0]
    place[order.flatten()[own]] = own
    # A row that is missing is its tile's last one: it has keys, and so no NaN for a gradient.
    column = torch.arange(order.shape[1])
    last = torch.where(order >= 0, column, 0).amax(-1, keepdim=True)
    return Tiles(order.gather(1, torch.minimum(column, last)).flatten(), place, lists,
                 order.shape[1])
