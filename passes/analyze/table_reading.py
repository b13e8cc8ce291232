"""Name the structure of a constant mask: band, segments, windows, neighbourhood, sub-ranges.

Tried from plain to rich: bands and prefixes, equal blocks and contiguous segments (also causal
inside), windows of whole blocks, neighbourhoods on a grid (`neighbourhoods`), sinks (the first keys
beside a band), and a sub-range with one of these in it, beside rows and columns that are all kept
or all dropped (text and video, global tokens, a class token). Each is compared with the whole
table before it is returned. Heads that keep different keys become one case each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import (
    ALL,
    Band,
    Causal,
    Globals,
    Mask,
    Placed,
    Prefix,
    Regions,
    Select,
    Where,
    Windows,
)
from attnopt.passes.analyze.neighbourhoods import GridMask, cut_of, read_grid, width_of, window_of
from attnopt.passes.analyze.tables import LARGEST, Runs, Table, runs_of

_Q, _K = E.index("q"), E.index("k")
#: A segment mask with more documents than this is not written out.
_SEGMENTS = 32
_HEADS = 128


def read(table: Table, inside: bool = False) -> GridMask | None:
    """The mask that `table` is, with words for it; None where none of the forms is.

    `inside`: it is the middle of another table already.
    """
    if not table.queries or not table.keys or table.queries * table.keys > LARGEST:
        return None
    runs = runs_of(table)
    if runs is not None:
        for named in _by_runs(runs, table.keys):
            if table.equals(named.mask):
                return named
    found = read_grid(table) if table.queries == table.keys else None
    if found is None:
        found = _sinks(table)
    if found is None and not inside:
        found = _placed(table)
    return found


def read_heads(tables: Sequence[Table], axis: str) -> GridMask | None:
    """One mask per index of a leading axis."""
    if len(tables) > _HEADS:
        return None
    found: list[GridMask] = []
    for i, table in enumerate(tables):
        own = found[i - 1] if i and table.equals(found[i - 1].mask) else read(table)
        if own is None:
            return None
        found.append(own)
    if len({f.mask for f in found}) == 1:
        return found[0]
    text = ", ".join(dict.fromkeys(f.text for f in found))
    return GridMask(Select(E.index(axis), tuple(f.mask for f in found)), f"by {axis}: {text}")


def _said(mask: Mask) -> GridMask:
    return GridMask(mask, mask.describe())


# -- rows that are runs ---------------------------------------------------------------------------
def _by_runs(runs: Runs, keys: int) -> Iterator[GridMask]:
    first, last = runs.first, runs.last
    at = torch.arange(len(first))
    if bool((first == 0).all()) and bool((last == keys - 1).all()) and runs.step == 1:
        yield _said(ALL)
        return
    cut = cut_of(runs, keys)
    if cut is not None and runs.step == 1:
        yield _said(_band(cut.lo, cut.hi, len(first), keys))
    elif cut is not None and (len(first) != keys or window_of(runs) is None):
        yield GridMask(Where(cut.predicate(_Q, _K)), f"window {cut.text()} dilation {cut.step}")
    if runs.step > 1:
        return
    if bool((first == 0).all()):
        least = int(last[0])
        yield _said(Prefix(E.const(least + 1)))
        offset = int((last - at)[-1])
        yield _said(Prefix(E.const(least + 1)) | Causal(E.const(offset)))
    if bool((last == torch.minimum(at, torch.tensor(keys - 1))).all()):
        for own in _segments(first, len(first)):
            yield GridMask(Causal() & own.mask, f"causal in {own.text}")
    width = width_of(runs) if len(first) == keys else None
    if width is not None:
        yield _said(Windows((E.const(width),)))
    elif bool((last[first] == last).all()) if len(first) == keys else False:
        yield from _segments(first, len(first))
    if len(first) == keys:
        yield from _block_windows(runs, keys)


def _band(lo: int, hi: int, queries: int, keys: int) -> Mask:
    if lo <= 1 - queries:
        return Causal(E.const(hi))
    return Band(E.const(lo), E.const(hi if hi < keys - 1 else keys - 1))


def _segments(first: torch.Tensor, tokens: int) -> Iterator[GridMask]:
    """Contiguous documents, by the first token of every token's own."""
    at = torch.arange(tokens)
    starts = (first == at).nonzero().flatten()
    if len(starts) < 2 or not torch.equal(
            starts[torch.searchsorted(starts, at, right=True) - 1], first):
        return
    steps = starts.diff()
    if bool((steps == steps[0]).all()) and tokens - int(starts[-1]) <= int(steps[0]):
        yield _said(Windows((E.const(int(steps[0])),)))
    elif len(starts) <= _SEGMENTS:
        ids = E.const(0)
        for start in starts[1:].tolist():
            ids = ids + E.call("int", E.const(start) <= _Q)
        yield GridMask(Regions(ids), f"{len(starts)} segments")


def _block_windows(runs: Runs, tokens: int) -> Iterator[GridMask]:
    """A band of whole blocks: first and last change together, every `width` tokens."""
    changed = ((runs.first.diff() != 0) | (runs.last.diff() != 0)).nonzero().flatten() + 1
    if not len(changed):
        return
    width = int(changed[0]) if len(changed) == 1 else int(changed.diff().min())
    if width < 2 or bool((changed % width != 0).any()) or bool(
            (runs.first % width != 0).any()) or bool((((runs.last + 1) % width != 0) & (
                runs.last != tokens - 1)).any()):
        return
    blocks = Runs(runs.first[::width] // width, runs.last[::width] // width, 1)
    cut = cut_of(blocks, -(-tokens // width))
    if cut is None:
        return
    row, column = _Q // width, _K // width
    if cut.lo <= 1 - len(blocks.first):
        late = f" (offset {cut.hi})" if cut.hi else ""
        yield GridMask(Where(column <= row + cut.hi), f"causal by blocks of {width}{late}")
    else:
        yield GridMask(Where(cut.predicate(row, column)),
                       f"window {cut.text()} of blocks of {width}")


# -- sinks, and a part of the tokens --------------------------------------------------------------
def _sinks(table: Table) -> GridMask | None:
    """A band beside the first keys: what the last row keeps from its start on."""
    last = table.take(torch.tensor([table.queries - 1]))[0]
    gaps = (~last).nonzero().flatten()
    if not len(gaps) or not int(gaps[0]):
        return None
    count = int(gaps[0])
    own = table.part(range(table.queries // 2, table.queries), range(count, table.keys))
    runs = runs_of(own)
    if runs is None:
        return None
    at = torch.arange(own.queries) + table.queries // 2
    lo, hi = int((runs.first + count - at).max()), int((runs.last + count - at).max())
    band = Band(E.const(lo), E.const(hi))
    for mask in (band | Prefix(E.const(count)), band | Prefix(E.const(count)) & Causal(
            E.const(hi))):
        if table.equals(mask):
            return GridMask(mask, f"{band.describe()} and {count} sinks")
    return None


def _border(same: torch.Tensor) -> range:
    """The places between the first and the last run of true ones."""
    rest = (~same).nonzero().flatten()
    return range(int(rest[0]), int(rest[-1]) + 1) if len(rest) else range(0)


def _placed(table: Table) -> GridMask | None:
    """Structure in a sub-range; the rows around it keep all or nothing, and so do the columns."""
    kept = torch.cat([rows.sum(1) for _, rows in table.blocks()])
    rows = _border((kept == 0) | (kept == table.keys))
    if not len(rows):
        return None
    middle = table.part(rows, range(table.keys))
    by_column = sum(block.sum(0) for _, block in middle.blocks())
    assert isinstance(by_column, torch.Tensor)
    columns = _border((by_column == 0) | (by_column == len(rows)))
    if not len(columns) or (len(rows), len(columns)) == (table.queries, table.keys):
        return None
    inner = read(middle.part(range(len(rows)), columns), inside=True)
    if inner is None:
        return None
    span = [(E.const(r.start), E.const(r.stop)) for r in (rows, columns)]
    placed: Mask = Placed(inner.mask, span[0], span[1])
    text = f"{inner.text} in [{rows.start}:{rows.stop}, {columns.start}:{columns.stop}]"
    if isinstance(inner.mask, Band | Causal) and rows.start == columns.start:
        shifted = inner.mask | Globals(E.const(rows.start))
        if table.equals(shifted):
            return GridMask(shifted, f"{inner.text} and {rows.start} global tokens")
    outside_rows = ~_within(_Q, rows, table.queries)
    outside_columns = ~_within(_K, columns, table.keys)
    seen = _within(_Q, rows, table.queries) & outside_columns
    for extra, words in (
            (E.FALSE, ""), (outside_rows | outside_columns, ", all else kept"),
            (outside_rows, ", the other rows see all"),
            (seen, ", the other keys seen by its rows")):
        mask = placed if extra is E.FALSE else placed | _border_mask(
            extra, rows, columns, table, words)
        if table.equals(mask):
            return GridMask(mask, text + words)
    return None


def _border_mask(extra: E.Expr, rows: range, columns: range, table: Table, words: str) -> Mask:
    """Globals where the first tokens see all and are seen by all, else the predicate."""
    front = rows.start == columns.start and rows.stop == table.queries \
        and columns.stop == table.keys
    return Globals(E.const(rows.start)) if front and "all else" in words else Where(extra)


def _within(at: E.Expr, span: range, length: int) -> E.Expr:
    inside = E.TRUE
    if span.start:
        inside = inside & (E.const(span.start) <= at)
    if span.stop < length:
        inside = inside & (at < span.stop)
    return inside
