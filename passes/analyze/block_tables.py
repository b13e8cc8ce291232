"""Constant masks of queries x keys that have no closed form: what they keep, block by block.

    exact    keep[q, k] = kept[q // block_q, k // block_k]; the blocks are as large as the places
             allow at which rows, and columns, differ from the ones before them
    general  keep[q, k] = some[q // B, k // B] and (all[q // B, k // B] or mask[q, k])

Radial Attention (arXiv 2506.19852) and other patterns of video or long sequences come as such
tables. By the first form nothing of queries x keys is read any more; by the second, the mask itself
is read in the blocks alone that are neither empty nor full. The small tables are found once, from
values that are guarded, and travel in the rewritten graph as text (`attnopt.kernels.block_maps`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr

#: exact blocks are at least so long, and a table has at most so many entries
LEAST, MOST = 8, 1 << 20
#: blocks of the general form, and the share of the scores that must lie in empty ones
BLOCK, EMPTY_SHARE = 64, 0.1
#: elements that are compared at a time
_STEP = 1 << 22


@dataclass(frozen=True)
class BlockTable:
    """`kept` (H or 1, rows of blocks, columns of blocks), bool, over blocks of tokens."""

    kept: Tensor
    block_q: int
    block_k: int

    @property
    def heads(self) -> bool:
        return len(self.kept) > 1

    @property
    def words(self) -> str:
        by = "by h: " if self.heads else ""
        return f"{by}blocks of {self.block_q}x{self.block_k}"


@dataclass
class BlockTables:
    """The tables that were found in one graph, by the slot that loads them."""

    by_slot: dict[str, BlockTable] = field(default_factory=dict)
    seen: list[tuple[Tensor, BlockTable | None]] = field(default_factory=list)

    def __contains__(self, slot: object) -> bool:
        return slot in self.by_slot

    @property
    def operands(self) -> dict[str, Tensor]:
        """The tables as their loads index them."""
        return {slot: t.kept if t.heads else t.kept[0] for slot, t in self.by_slot.items()}

    def exact(self, mask: Tensor) -> Expr | None:
        """The predicate of a bool table (H or 1, Q, K) that is made of blocks."""
        for other, found in self.seen:
            if other.shape == mask.shape and torch.equal(other, mask):
                return None if found is None else self.load(found)
        found = blocks_of(mask)
        self.seen.append((mask, found))
        return None if found is None else self.load(found)

    def load(self, table: BlockTable) -> Expr:
        """The predicate of a table; equal tables have one slot."""
        slot = next((s for s, t in self.by_slot.items() if _equal(t, table)),
                    f"blocks{len(self.by_slot)}")
        self.by_slot[slot] = table
        lead = (E.index("h"),) if table.heads else ()
        return E.load(slot, *lead, E.index("q") // table.block_q, E.index("k") // table.block_k,
                      dtype=E.BOOL)

    def rows_kept(self, keep: Expr) -> bool:
        """Does every row keep a key by a predicate that is one of the tables?"""
        return keep.op == "load" and keep.value in self and bool(
            self.by_slot[keep.value].kept.any(-1).all())


def _equal(a: BlockTable, b: BlockTable) -> bool:
    return (a.block_q, a.block_k) == (b.block_q, b.block_k) and torch.equal(a.kept, b.kept)


# -- exact ----------------------------------------------------------------------------------------
def blocks_of(mask: Tensor) -> BlockTable | None:
    """The largest blocks that a bool table (H or 1, Q, K) is made of, None where they are small."""
    queries, keys = mask.shape[-2:]
    if min(queries, keys) < 2 * LEAST:
        return None
    block_q = _length(mask, queries)
    block_k = _length(mask.transpose(-1, -2), keys) if block_q >= LEAST else 1
    kept = mask[:, ::block_q, ::block_k]
    if min(block_q, block_k) < LEAST or kept.numel() > MOST or kept[0].numel() == 1:
        return None
    if len(kept) > 1 and torch.equal(kept, kept[:1].expand_as(kept)):
        kept = kept[:1]
    return BlockTable(kept.contiguous().cpu(), block_q, block_k)


def _length(mask: Tensor, length: int) -> int:
    """The greatest common divisor of the rows that differ from the one before."""
    found, step = 0, max(1, _STEP // max(1, mask[:, 0].numel()))
    for start in range(1, length, step):
        rows = mask[:, start - 1 : start + step]
        changed = (rows[:, 1:] != rows[:, :-1]).any(-1).any(0).nonzero().flatten() + start
        found = math.gcd(found, *changed.tolist())
        if found == 1:
            return 1
    return found or length


# -- general --------------------------------------------------------------------------------------
def tiles_of(mask: Tensor) -> tuple[BlockTable, BlockTable] | None:
    """(some, all) of the blocks of a bool table (H or 1, Q, K); None where few of them are empty.
    """
    queries, keys = mask.shape[-2:]
    rows, columns = -(-queries // BLOCK), -(-keys // BLOCK)
    if min(rows, columns) < 2 or rows * columns * len(mask) > MOST:
        return None
    some, whole = [], []
    for start in range(0, queries, BLOCK):
        strip = torch.nn.functional.pad(
            mask[:, start : start + BLOCK].sum(1, dtype=torch.int32),
            (0, columns * BLOCK - keys)).unflatten(-1, (columns, BLOCK)).sum(-1)
        size = torch.full((columns,), BLOCK, device=strip.device)
        size[-1] = keys - (columns - 1) * BLOCK
        some.append(strip > 0)
        whole.append(strip == size * min(BLOCK, queries - start))
    kept = torch.stack(some, 1)
    if float(kept.float().mean()) > 1 - EMPTY_SHARE:
        return None
    return (BlockTable(kept.cpu(), BLOCK, BLOCK),
            BlockTable(torch.stack(whole, 1).cpu(), BLOCK, BLOCK))
