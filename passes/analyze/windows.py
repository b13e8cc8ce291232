"""Windows made by moving tokens: partitions of a map, shifted ones, groups of a sequence.

A site whose leading axes count windows attends within them. Its tokens are followed back to the map
they were cut from (`token_places`), as numbers at the lengths of the capture, and the partition is
read off them: along each axis a shift, then boxes of equal size in row-major or any other order

    token (y, x) is in window ((y - s_y) mod H) // w_y, ((x - s_x) mod W) // w_x

(Swin: arXiv 2103.14030; with half of the heads shifted by half a group, S2-Attn: 2309.12307), or
boxes of every n-th token (the grid attention of MaxViT, 2204.01697). An additive constant that
is a fill between regions of one window (Swin's -100 where the map was wrapped around) is compared
with the regions that the shift makes, `[y' >= H - s_y]` and `[x' >= W - s_x]`. It stays in the
logits; what is found here says what the site computes, in the report and as a mask over the map.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.mask import Mask, Neighborhood, Regions, Reindex, Select, Windows
from attnopt.ir.spec import leading_axes
from attnopt.passes.analyze.by_value import number
from attnopt.passes.analyze.grid_check import captured_sizes
from attnopt.passes.analyze.lift import Layout, Lifter
from attnopt.passes.analyze.naming import named_layout
from attnopt.passes.analyze.neighbourhoods import grids
from attnopt.passes.analyze.provenance import Analysis, Term, parts_of
from attnopt.passes.analyze.token_places import PlaceLifter
from attnopt.passes.canonical import Canonical

log = logging.getLogger("attnopt.passes")
_Q = E.index("q")
#: tokens of one sample that are looked at
_LARGEST = 2**20
_HEADS = 128


@dataclass(frozen=True)
class Partition:
    """Boxes of a map: `window` by `shift` along axes of `length`; every `step`-th token of it."""

    length: tuple[int, ...]
    window: tuple[int, ...]
    shift: tuple[int, ...]
    step: tuple[int, ...]

    def order(self) -> Expr:
        """The place of token q after the shift."""
        place: Expr = E.const(0)
        inside = math.prod(self.length)
        for n, s in zip(self.length, self.shift, strict=True):
            inside //= n
            own = _Q // inside % n
            place = place + ((own + (n - s)) % n if s else own) * inside
        return place

    def regions(self, fill: float) -> Regions | None:
        """Where the shifted map was not wrapped around and where it was, by the place in it."""
        ids: Expr = E.const(0)
        inside = math.prod(self.length)
        for n, s in zip(self.length, self.shift, strict=True):
            inside //= n
            if s:
                ids = ids * 2 + E.call("int", E.const(n - s) <= _Q // inside % n)
        return Regions(ids, fill) if any(self.shift) else None

    def mask(self, inside: Mask | None = None) -> Mask:
        """Over the tokens of the map; `inside` is a mask over the shifted order besides."""
        boxes: Mask = Neighborhood(self.window, dilation=self.step, length=self.length)
        if set(self.step) == {1}:
            boxes = Windows(tuple(map(E.const, self.window)),
                            self.length if len(self.length) > 1 else (None,))
        boxes = boxes if inside is None else boxes & inside
        return Reindex(self.order(), boxes) if any(self.shift) else boxes

    @property
    def text(self) -> str:
        text = f"partition {_by(self.window)}"
        if set(self.step) != {1}:
            text += f" of every {_by(self.step)}-th token"
        if any(self.shift):
            text += f" shift {_by(self.shift)}"
        return f"{text} of {_by(self.length)}"


@dataclass(frozen=True)
class Moved:
    """The partitions of a site: one for all heads, or one for each. `fill`: between its regions.
    """

    partitions: tuple[Partition, ...]
    regions: Regions | None = None

    def mask(self, inside: Mask | None = None) -> Mask:
        """Over the tokens of the map; `inside` holds in the shifted order."""
        cases = tuple(p.mask(inside) for p in self.partitions)
        return cases[0] if len(set(cases)) == 1 else Select(E.index("h"), cases)

    @property
    def text(self) -> str:
        texts = list(dict.fromkeys(p.text for p in self.partitions))
        text = texts[0] if len(texts) == 1 else f"by h: {', '.join(texts)}"
        fill = "" if self.regions is None else f", regions (fill {self.regions.fill:g})"
        return text + fill


def _by(lengths: Sequence[int]) -> str:
    return "x".join(map(str, lengths))


# -- places of tokens -----------------------------------------------------------------------------
@dataclass(frozen=True)
class Places:
    """Tokens of one sample by the map that they come from: `at` (heads or 1, windows, rows, axes),
    and which windows (places along the flattened leading axes without heads) they are."""

    source: str
    length: tuple[int, ...]
    at: Tensor
    windows: Tensor


def places_of(lifter: Lifter, node: fx.Node, layout: Layout, lengths: Mapping[str, int],
              heads: bool) -> Places | None:
    """Where the rows of an operand come from; its rows are named q and its channels k.

    heads: the axis h holds heads, not windows
    """
    leading = [a for a in leading_axes(len(lengths) - 2) if a != "h" or not heads]
    e = lifter.lift(node, lifter.indices(layout)).expr
    e = e.replace({E.index("k"): E.const(0)})
    count = lengths["h"] if heads and _by_head(e) else 1
    if count > _HEADS:
        return None
    cases = [e.replace({E.index("h"): E.const(h)}) if heads else e for h in range(count)]
    cases = [lifter.logic.canonical(c) for c in cases]
    if any(c.op != "load" or not c.args for c in cases) or len({c.value for c in cases}) != 1:
        return None
    shape = [lengths[a] for a in leading] + [1] * heads
    windows = math.prod(shape)
    if not windows or count * windows * lengths["q"] > _LARGEST:
        return None
    source = lifter.nodes[cases[0].value]
    env = Env((*shape, lengths["q"], 1), sizes={**lengths})
    grid = torch.stack([torch.stack([
        torch.as_tensor(evaluate(i, env)).expand(env.shape).reshape(windows, -1)
        for i in c.args], -1) for c in cases])
    moves = (grid != grid[:, :, :1]).flatten(0, 2).any(0)  # dimensions that rows walk along
    batch = grid[0, :, 0][:, ~moves]
    own = (batch == batch[:1]).all(-1).nonzero().flatten()
    sizes = [n for n, walked in zip(source.meta["val"].shape, moves.tolist(), strict=True)
             if walked]
    if not sizes or not all(isinstance(n, int) for n in sizes):
        return None
    return Places(cases[0].value, tuple(sizes), grid[:, own][..., moves], own)


def _by_head(e: Expr) -> bool:
    """Do the heads choose tokens, rather than channels only?"""
    if e.op != "load":
        return "h" in e.indices
    return any("h" in i.indices and i.indices & {"q", "b", "b1", "b2"} for i in e.args)


def partition_of(at: Tensor, length: tuple[int, ...]) -> Partition | None:
    """The boxes that the tokens `at` (windows, rows, axes) are, if they are a whole partition."""
    if len(length) > 1:
        return _boxes(at, length)
    row = _row(at, length[0])
    found = _boxes(_rows_and_columns(at, row), (length[0] // row, row)) if row else _boxes(
        at, length)
    if found is None:  # which lengths the flat tokens have is not seen in their first window
        tries = ((grid, _rows_and_columns(at, grid[1])) for grid in grids(length[0], 2))
        found = next(filter(None, (_boxes(two, grid) for grid, two in tries)), None)
    return found


def _boxes(at: Tensor, length: tuple[int, ...]) -> Partition | None:
    flat = torch.zeros(at.shape[:2], dtype=torch.int64)
    for a, n in enumerate(length):
        flat = flat * n + at[..., a]
    total = math.prod(length)
    if flat.numel() != total or len(flat.unique()) != total or len(at) < 2:
        return None
    shift = tuple(int(x) for x in at[0, 0])
    window, step, ids = [], [], torch.zeros(len(at), dtype=torch.int64)
    for a, n in enumerate(length):
        own = (at[..., a] - shift[a]) % n
        width = len(own[0].unique())
        if n % width:
            return None
        blocks, residues = own // width, own % (n // width)
        if bool((blocks == blocks[:, :1]).all()):
            window.append(width)
            step.append(1)
            ids = ids * n + blocks[:, 0]
        elif bool((residues == residues[:, :1]).all()):
            window.append(width)
            step.append(n // width)
            ids = ids * n + residues[:, 0]
        else:
            return None
    if len(ids.unique()) != len(at) or math.prod(window) != at.shape[1]:
        return None
    shift = tuple(s % w if d == 1 else 0 for s, w, d in zip(shift, window, step, strict=True))
    if any(d > 1 for d in step) and any(d == 1 and w < n for d, w, n in zip(
            step, window, length, strict=True)):
        return None
    return Partition(length, tuple(window), shift, tuple(step))


def _row(at: Tensor, tokens: int) -> int:
    """The length of a row of flat tokens, as the first window shows it; 0 where it does not."""
    first = at[0, :, 0]
    gaps = (first.diff() != 1).nonzero().flatten()
    width = int(gaps[0]) + 1 if len(gaps) else len(first)
    row = int(first[width] - first[0]) if width < len(first) else 0
    return row if width < row < tokens and not tokens % row else 0


def _rows_and_columns(at: Tensor, row: int) -> Tensor:
    return torch.cat([at // row, at % row], -1)


# -- sites ----------------------------------------------------------------------------------------
def read_moves(analysis: Analysis, canonical: Canonical) -> Moved | None:
    """The partition that a site attends within; None where its tokens are in no windows."""
    try:
        return _read(analysis, canonical)
    except LookupError as why:
        log.debug("no windows: %s", why)
    except Exception as error:  # what is not found is no reason to fail
        log.warning("no windows: %s", error, exc_info=log.isEnabledFor(logging.DEBUG))
    return None


def _read(analysis: Analysis, canonical: Canonical) -> Moved | None:
    if not any(canonical.result[:-2]):
        return None
    for heads in (True, False):
        found = _places(analysis, canonical, heads)
        if found is None:
            continue
        made = [partition_of(at, found.length) for at in found.at]
        if None not in made:
            moved = Moved(tuple(p for p in made if p is not None))
            return Moved(moved.partitions, _regions(analysis, canonical, moved, found, heads))
    return None


def _places(analysis: Analysis, canonical: Canonical, heads: bool) -> Places | None:
    """The places of the query's tokens, where those of key and value are the same."""
    found: Places | None = None
    for tensor in (canonical.query, canonical.key, canonical.value):
        named = named_layout(canonical, tensor)
        if named is None:
            return None
        layout, lengths = named
        symbols = captured_sizes(lengths, [tensor.node.meta["val"]])
        known = {axis: number(n, symbols) for axis, n in lengths.items()}
        lifter = analysis.lifter(tensor.node, layout, lengths, PlaceLifter)
        own = places_of(lifter, tensor.node, layout, known, heads)
        if own is None or len(own.windows) < 2:
            return None
        if found is not None and not (found.source == own.source and torch.equal(
                found.at, own.at) and torch.equal(found.windows, own.windows)):
            return None
        found = own
    return found


def _regions(analysis: Analysis, canonical: Canonical, moved: Moved, places: Places,
             heads: bool) -> Regions | None:
    """The finite fill between the regions of shifted windows, if an operand adds one."""
    shifted = next((p for p in moved.partitions if any(p.shift)), None)
    if shifted is None or len(moved.partitions) > 1:
        return None
    ids = torch.zeros(places.at.shape[1:3], dtype=torch.int64)
    at = places.at[0]
    if len(places.length) < len(shifted.length):
        at = _rows_and_columns(at, shifted.length[-1])
    for a, (n, s) in enumerate(zip(shifted.length, shifted.shift, strict=True)):
        ids = ids * 2 + ((at[..., a] - s) % n >= n - s if s else 0)
    same = ids[:, :, None] == ids[:, None]
    for tensor in canonical.operands.values():
        named = named_layout(canonical, tensor)
        if named is None:
            continue
        layout, lengths = named
        for term in parts_of(Term(tensor.node, layout, "additive")):
            values = _values(analysis, canonical, term, lengths, places.windows, heads)
            if values is None:
                continue
            fills = values[~same.expand_as(values)].unique()
            if len(fills) == 1 and math.isfinite(fill := float(fills[0])) and fill < 0 \
                    and bool((values[same.expand_as(values)] == 0).all()):
                return shifted.regions(fill)
    return None


def _values(analysis: Analysis, canonical: Canonical, term: Term, lengths: Mapping[str, object],
            windows: Tensor, heads: bool) -> Tensor | None:
    """A constant term of the logits in the windows of one sample, (windows, rows, keys)."""
    if analysis.values.sources(term.node) is None:
        return None
    symbols = captured_sizes(lengths, [term.node.meta["val"]])
    known = {axis: number(n, symbols) for axis, n in lengths.items()}  # type: ignore[arg-type]
    leading = leading_axes(len(known) - 2)
    alike = heads and "h" not in term.layout
    shape = (*(1 if a == "h" and alike else known[a] for a in leading), known["q"], known["k"])
    if math.prod(shape) > 2**26:
        return None
    idx = analysis.lifter(term.node, term.layout, lengths, Lifter).indices(  # type: ignore[arg-type]
        term.layout)
    env = Env(shape, {"value": analysis.values.evaluate(term.node, symbols or None).cpu()},
              sizes=known)
    whole = torch.as_tensor(evaluate(E.load("value", *idx), env)).expand(shape)
    if heads:
        if not bool((whole == whole[..., :1, :, :]).all()):
            return None
        whole = whole[..., 0, :, :]
    return whole.reshape(-1, *shape[-2:])[windows]
