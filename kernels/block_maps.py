"""Which blocks of keys a block of queries keeps, under published approximations of attention.

    block_map(tensors, lengths, text)    bool (*L, ceil(Q / block_q), ceil(K / block_k))

`text` is the JSON of a pattern with its parameters; lengths are Q and K. What depends on positions
alone (Radial) has no leading axes and takes `tensors` for the device only; what is selected at run
time reads tensors = (query (*L, Q, D), key (*L, K, D)), of which the leading axes broadcast.

    radial   Radial Attention (arXiv 2506.19852), the released definition in blocks: frames at
             distance d keep the places within P2(t) / P2(d) of each other, P2(x) the largest power
             of two up to x; those too thin for a block are kept for every so many distances
    moba     Mixture of Block Attention (arXiv 2502.13189): a query keeps its own block of keys and
             the blocks before it of largest q . mean(block), `top` in all
    hip      HiP (arXiv 2406.09827): a tree search for each block of queries halves groups of key
             blocks and keeps the better halves, judged by their first keys
    table    the map itself, (H, …) if it differs by head: `table_text` writes it down
"""

from __future__ import annotations

import base64
import functools
import json
import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: elements of a gathered tensor of the tree search
_GATHERED = 1 << 24
#: the released Radial Attention compares widths with this, whatever its blocks are
_THIN = 128


def block_map(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """The map; see above. Raises ValueError for an unknown pattern and lengths that do not fit."""
    parameters = dict(_parameters(text))
    pattern = parameters.pop("pattern")
    if pattern not in _PATTERNS:
        raise ValueError(f"pattern must be one of {', '.join(_PATTERNS)}, got {pattern!r}")
    return _PATTERNS[pattern](tensors, int(lengths[0]), int(lengths[1]), **parameters)


@functools.lru_cache(maxsize=256)
def _parameters(text: str) -> Mapping[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def blocks_of(text: str) -> tuple[int, int]:
    """(block_q, block_k) of a pattern's text."""
    parameters = _parameters(text)
    block = int(parameters["block"])
    return int(parameters.get("block_q", 1 if parameters["pattern"] == "moba" else block)), block


# -- written down ---------------------------------------------------------------------------------
def table_text(kept: Tensor, block_q: int, block_k: int) -> str:
    """The text of a bool map (rows, columns) or (H, rows, columns)."""
    bits = zlib.compress(_packed(kept), 9)
    return json.dumps({"pattern": "table", "block_q": block_q, "block": block_k,
                       "shape": list(kept.shape), "bits": base64.b85encode(bits).decode()})


def _packed(kept: Tensor) -> bytes:
    """Eight entries to a byte, the first one lowest."""
    flat = kept.flatten().to(device="cpu", dtype=torch.uint8)
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return bytes((flat << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8).tolist())


def _table(tensors: Sequence[Tensor], queries: int, keys: int, **parameters: Any) -> Tensor:
    shape, blocks = tuple(parameters["shape"]), (parameters["block_q"], parameters["block"])
    wanted = tuple(-(-n // b) for n, b in zip((queries, keys), blocks, strict=True))
    if shape[-2:] != wanted:
        raise ValueError(f"lengths must give {shape[-2:]} blocks, got {wanted}")
    found = _unpacked(parameters["bits"], shape)
    return found.to(tensors[0].device, copy=True) if tensors else found.clone()


@functools.lru_cache(maxsize=256)
def _unpacked(bits: str, shape: tuple[int, ...]) -> Tensor:
    packed = torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(bits))),
                              dtype=torch.uint8)
    flat = (packed[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
    return flat[: math.prod(shape)].view(shape).clone()


# -- radial ---------------------------------------------------------------------------------------
def _radial(tensors: Sequence[Tensor], queries: int, keys: int, **parameters: Any) -> Tensor:
    if queries != keys:
        raise ValueError(f"lengths must be equal, got {queries} and {keys}")
    found = radial(queries, **parameters)
    return found.to(tensors[0].device) if tensors else found.clone()


@functools.lru_cache(maxsize=16)
def radial(length: int, frames: int, tokens: int, decay: float, sink: bool, block: int) -> Tensor:
    """(blocks, blocks) of `length` tokens, of which the first frames * tokens are the video; rows
    and columns of what follows are kept whole."""
    video, side = frames * tokens, -(-length // block)
    if length < video:
        raise ValueError(f"length must be at least {frames} x {tokens} tokens, got {length}")
    kept = torch.zeros(side, side, dtype=torch.bool)
    kept[video // block:] = True
    kept[:, video // block:] = True
    starts = [i * tokens for i in range(frames)]
    for i in range(frames):
        for j in range(frames):
            width = tokens if sink and j == 0 else band(abs(i - j), tokens, decay, block)
            if width is None:
                continue
            part = _dense_blocks(tokens, width, starts[i] % block, starts[j] % block, block)
            row, column = starts[i] // block, starts[j] // block
            rows, columns = min(len(part), side - row), min(part.shape[1], side - column)
            kept[row : row + rows, column : column + columns] |= part[:rows, :columns]
    return kept


def band(distance: int, tokens: int, decay: float, block: int) -> float | None:
    """How far apart places of two frames may be; None where the pair of frames is left out."""
    if distance <= 1:
        return tokens
    reach = 2 ** (tokens.bit_length() - 1) / 2 ** (distance.bit_length() - 1)
    if reach < _THIN and distance % int(_THIN / reach):
        return None
    return max(reach * decay, block)


@functools.lru_cache(maxsize=256)
def _dense_blocks(tokens: int, width: float, below: int, right: int, block: int) -> Tensor:
    """Blocks of a band |k - l| <= width that are dense enough: of the columns that hold anything,
    more than 0.6 must hold more than a third of their entries.

    The band starts `below` and `right` of a block's corner; what lies beyond ceil(tokens / block)
    blocks is dropped, as the released code does.
    """
    count = -(-tokens // block)
    row = torch.arange(count + 1)[:, None] * block - below  # places at which rows of blocks start
    column = torch.arange(count * block) - right
    inside = (column >= 0) & (column < tokens)
    low, high = (column - width).clamp(min=0).ceil(), (column + width).floor() + 1
    high = high.clamp(max=tokens)
    first, last = row[:-1].clamp(min=0), row[1:].clamp(max=tokens)
    held = (torch.minimum(last, high) - torch.maximum(first, low)).clamp(min=0) * inside
    share = held.view(count, count, block) / block
    return (share > 1 / 3).sum(-1) / ((share > 0).sum(-1) + 1e-9) > 0.6


# -- chosen at run time ---------------------------------------------------------------------------
def _moba(tensors: Sequence[Tensor], queries: int, keys: int, block: int, top: int) -> Tensor:
    query, key = (t.detach() for t in tensors)
    count = -(-keys // block)
    sums = torch.nn.functional.pad(key.float(), (0, 0, 0, count * block - keys))
    sizes = torch.full((count, 1), float(block), device=key.device)
    sizes[-1:] = keys - (count - 1) * block
    means = sums.unflatten(-2, (count, block)).sum(-2) / sizes
    gate = query.float() @ means.transpose(-1, -2)
    own = torch.arange(queries, device=key.device)[:, None] // block
    place = torch.arange(count, device=key.device)
    gate = gate.masked_fill(place > own, -math.inf).masked_fill(place == own, math.inf)
    best = gate.topk(min(top, count), -1).indices
    return torch.zeros_like(gate, dtype=torch.bool).scatter_(-1, best, True) & (place <= own)


def _hip(tensors: Sequence[Tensor], queries: int, keys: int, block_q: int, block: int, keep: int,
         window: int) -> Tensor:
    query, key = torch.broadcast_tensors(*(t.detach().float() for t in tensors)) \
        if tensors[0].shape[-2:] == tensors[1].shape[-2:] else (t.float() for t in tensors)
    lead = query.shape[:-2]
    if queries != keys:
        raise ValueError(f"lengths must be equal, got {queries} and {keys}")
    query, key = query.reshape(-1, queries, query.shape[-1]), key.reshape(-1, keys, key.shape[-1])
    rows, columns = -(-queries // block_q), -(-keys // block)
    kept = torch.zeros(len(query), rows, columns, dtype=torch.bool, device=key.device)
    for row in range(rows):
        before = min((row + 1) * block_q, queries) - window
        if before <= 0:
            continue
        count, groups = -(-before // block), -(-keep // block)
        if before <= keep:
            kept[:, row, :count] = True
            continue
        some = query[:, row * block_q : (row + 1) * block_q]
        some = some[:, 1::2] if some.shape[1] > 1 else some
        chosen = _search(some, key[:, :before], count, groups, block)
        kept[:, row].scatter_(-1, chosen, True)
    return kept.view(*lead, rows, columns)


def _search(query: Tensor, key: Tensor, count: int, groups: int, block: int) -> Tensor:
    """(L, groups) key blocks that the tree search ends with."""
    edges = torch.tensor([int(count / groups * i) for i in range(groups)] + [count],
                         device=key.device)
    start = edges[:-1].expand(len(key), -1)
    size = (edges[1:] - edges[:-1]).expand(len(key), -1)
    for _ in range(max(1, int((edges[1:] - edges[:-1]).max())).bit_length()):
        left = size // 2
        start = torch.cat([start, start + left], -1)
        size = torch.cat([left, size - left], -1)
        best = _first_keys(query, key, start, block).masked_fill(size == 0, -math.inf)
        order = best.topk(groups, -1).indices
        start, size = start.gather(-1, order), size.gather(-1, order)
    return start


def _first_keys(query: Tensor, key: Tensor, start: Tensor, block: int) -> Tensor:
    """(L, groups): the largest score of any row with the first block of keys of a group."""
    place = start[..., None] * block + torch.arange(block, device=key.device)
    there = place < key.shape[1]
    place = place.clamp(max=key.shape[1] - 1)
    found = []
    step = max(1, _GATHERED // max(1, len(key) * block * key.shape[-1]))
    for part in place.split(step, 1):
        picked = key.gather(1, part.flatten(1)[..., None].expand(-1, -1, key.shape[-1]))
        found.append((query @ picked.transpose(-1, -2)).amax(-2).view(part.shape))
    return torch.cat(found, 1).masked_fill(~there, -math.inf).amax(-1)


_PATTERNS: dict[str, Callable[..., Tensor]] = {
    "radial": _radial, "moba": _moba, "hip": _hip, "table": _table}

# -- the op ---------------------------------------------------------------------------------------
_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define("block_map(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))


def _fake(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    block_q, block_k = blocks_of(text)
    parameters = _parameters(text)
    leads = [tuple(t.shape[:-2]) for t in tensors]
    if parameters["pattern"] in ("radial", "table"):
        leads = [tuple(parameters.get("shape", ())[:-2])]
    shape = (*torch.broadcast_shapes(*leads), -(-lengths[0] // block_q), -(-lengths[1] // block_k))
    return tensors[0].new_empty(shape, dtype=torch.bool)


_library.impl("block_map", block_map, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::block_map", _fake, lib=_library)
