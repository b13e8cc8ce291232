"""Pictures of a mask at given lengths: which tiles are visited, as text and as SVG, with numbers.

density:       share of the scores that are kept, counted exactly
tile density:  share of the scores in visited tiles, which is what a kernel computes
waste:         share of what it computes that is hidden: 1 - density / tile density

Nothing is N x N: tiles come from intervals, and more tiles than a picture has room for are drawn
together. Heads and batch entries whose tiles differ get a picture each.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

import torch
from torch import Tensor

from attnopt.ir.axis_tables import mask_states
from attnopt.ir.density import MOST, counting_boxes, density, known_part, tokens
from attnopt.ir.intervals import EMPTY, FULL, PARTIAL
from attnopt.ir.mask_base import Mask
from attnopt.ir.spec import leading_axes
from attnopt.ir.tiling import GridTile, Tiling, tile_count

_CELLS, _PANELS, _TILES = 32, 4, 512
#: a cell in the compact form, in a text and in an SVG
MARKS = {EMPTY: ".", PARTIAL: "+", FULL: "#"}
_SIGNS = {".": "··", "+": "▒▒", "#": "██"}
_COLOURS = {"+": "#86b6d9", "#": "#1f5f8b"}
LEGEND = "██ full  ▒▒ partial  ·· skipped"
_RUN = re.compile(r"#+|\++")
#: label and rows of marks
Cells = Sequence[tuple[str, Sequence[str]]]


@dataclass(frozen=True)
class Panel:
    """The tiles of the leading entries that `label` names; states is int8 (query, key tiles)."""

    label: str
    states: Tensor


@dataclass(frozen=True, repr=False)
class Picture:
    """A mask at given lengths; `str` draws it, `repr` gives its numbers, `svg()` a picture.

    density is None where counting would take too long. `open` names operands that are not given:
    what they hide is drawn and counted as kept.
    """

    title: str
    queries: int
    keys: int
    tiles: tuple[Tiling, Tiling]
    panels: tuple[Panel, ...]
    unseen: int
    density: float | None
    tile_density: float
    full_share: float
    open: tuple[str, ...] = ()

    @property
    def waste(self) -> float | None:
        """Share of what the visited tiles compute that is hidden."""
        if self.density is None:
            return None
        return 1 - self.density / self.tile_density if self.tile_density else 0.0

    @property
    def numbers(self) -> str:
        """Density, tile density and waste in one line."""
        tile = "x".join(f"({t})" if isinstance(t, GridTile) else str(t) for t in self.tiles)
        parts = [] if self.density is None else [f"density {_percent(self.density)}"]
        parts.append(f"in tiles of {tile} {_percent(self.tile_density)}")
        parts.append(f"{_percent(self.full_share)} of them full")
        if self.waste is not None:
            parts.append(f"waste {_percent(self.waste)}")
        if self.open:
            parts.append(f"without what {', '.join(self.open)} may hide")
        return ", ".join(parts)

    def __repr__(self) -> str:
        return f"<Picture of {self.title}, {self.queries} x {self.keys}: {self.numbers}>"

    def cells(self, most: int = _CELLS) -> Cells:
        """Label and rows of marks of each panel, at most `most` cells to each side."""
        found = [(p.label, ["".join(MARKS[s] for s in row)
                            for row in pooled(p.states, most).tolist()]) for p in self.panels]
        return [*found, (f"and {self.unseen} more", [])] if self.unseen else found

    def compact(self) -> str:
        """The numbers, then a line "= label" and rows of marks for each panel; see `parse`."""
        return "\n".join([self.numbers, *("\n".join([f"= {label}", *rows])
                                          for label, rows in self.cells())])

    def __str__(self) -> str:
        head = f"{self.title}, {self.queries} rows x {self.keys} keys"
        return "\n".join([head, self.numbers, *drawn(self.cells()), LEGEND])

    def svg(self, edge: int = 320) -> str:
        """One self-contained <svg>; tiles that are skipped are left open."""
        title = f"{self.title}, {self.queries} x {self.keys}"
        return svg(title, self.numbers, self.cells(2 * _CELLS), edge)

    def _repr_svg_(self) -> str:
        return self.svg()


def picture(mask: Mask, queries: int, keys: int | None = None, *,
            tile: Tiling | tuple[Tiling, Tiling] | None = None, leading: Sequence[int] = (),
            operands: Mapping[str, Tensor] | None = None, most: int = MOST) -> Picture:
    """Draw a mask.

    tile:     tokens of a tile or boxes of a grid, of rows and keys alike or of each; by default
              of 64 tokens, more for long sequences
    leading:  lengths of the leading axes in tensor order
    operands: tensors by slot; what those that are missing may hide counts as kept
    """
    keys = queries if keys is None else keys
    given = dict(operands or {})
    known = known_part(mask, set(given))
    tiles = tile if isinstance(tile, tuple) else (
        (tile, tile) if tile is not None else default_tiles(known, queries, keys))
    states = mask_states(known, queries, keys, *tiles, leading, given)
    areas = (tokens(tiles[0], queries)[1].sum(-1)[:, None] * tokens(tiles[1], keys)[1].sum(-1))
    entries, visited = math.prod(states.shape[:-2]), states != EMPTY
    total = max(entries * queries * keys, 1)
    panels = _panels(states)
    return Picture(
        mask.describe() if mask.describe() != "none" else "no mask", queries, keys, tiles,
        tuple(panels[:_PANELS]), len(panels[_PANELS:]),
        density(known, queries, keys, leading, given, most),
        int((visited * areas).sum()) / total,
        int((states == FULL).sum()) / max(int(visited.sum()), 1),
        tuple(sorted(mask.slots - known.slots)))


def default_tiles(mask: Mask, queries: int, keys: int) -> tuple[Tiling, Tiling]:
    """Runs of 64 tokens or small boxes of the mask's grid, larger where there are very many."""
    grid = counting_boxes(mask, queries, keys)
    if grid is not None and tile_count(grid, queries) <= 4 * _TILES:
        return grid, grid
    sides = []
    for count in (queries, keys):
        side = 64
        while -(-count // side) > _TILES:
            side *= 2
        sides.append(side)
    return sides[0], sides[1]


def pooled(states: Tensor, most: int = _CELLS) -> Tensor:
    """At most `most` cells to each side: full or empty where all tiles of the cell are."""
    rows, columns = (max(1, -(-n // most)) for n in states.shape)
    if rows == columns == 1:
        return states

    def least(x: Tensor) -> Tensor:  # of each cell, the cut-off ones included
        found = -torch.nn.functional.max_pool2d(
            -x.float()[None, None], (rows, columns), ceil_mode=True)[0, 0]
        return found.to(torch.int8)

    low, high = least(states), -least(-states)
    return torch.where(low == high, low, torch.full_like(low, PARTIAL))


def _panels(states: Tensor) -> list[Panel]:
    """One panel per distinct state of the tiles, with the leading entries that have it."""
    lead = states.shape[:-2]
    flat = states.reshape(math.prod(lead), *states.shape[-2:])
    if len(flat) == 1:
        return [Panel("", flat[0])]
    names = leading_axes(len(lead))
    groups: dict[bytes, list[int]] = {}
    for i, entry in enumerate(flat):
        groups.setdefault(entry.numpy(force=True).tobytes(), []).append(i)
    varying = [a for a, n in enumerate(lead) if n > 1]
    found = []
    for members in groups.values():
        texts = []
        for i in members[:8]:
            place = [int(x) for x in torch.unravel_index(torch.tensor(i), lead)]
            texts.append(" ".join(f"{names[a]}{place[a]}" for a in varying))
        more = f" and {len(members) - 8} more" if len(members) > 8 else ""
        found.append(Panel(("all" if len(groups) == 1 else ", ".join(texts) + more),
                           flat[members[0]]))
    return found


def parse(text: str) -> tuple[str, Cells]:
    """Numbers and cells of a compact form."""
    numbers, *lines = text.split("\n")
    found: list[tuple[str, list[str]]] = []
    for line in lines:
        if line.startswith("="):
            found.append((line[1:].strip(), []))
        elif found and line and set(line) <= set(_SIGNS):
            found[-1][1].append(line)
    return numbers, found


def drawn(cells: Cells) -> list[str]:
    """Lines of text, two columns for each cell."""
    lines = []
    for label, rows in cells:
        lines += [label] if label else []
        lines += ["".join(_SIGNS[mark] for mark in row) for row in rows]
    return lines


def svg(title: str, numbers: str, cells: Cells, edge: int = 320) -> str:
    """The panels side by side, each `edge` wide."""
    parts, left = [], 0
    for label, rows in cells:
        size = edge / max(len(rows), *map(len, rows), 1) if rows else 0.0
        parts.append(f"<g transform='translate({left} 40)'>")
        parts += [f"<text y='-6'>{escape(label)}</text>"] if label else []
        if rows:
            parts.append(f"<rect width='{len(rows[0]) * size:.5g}' height='{len(rows) * size:.5g}'"
                         " fill='none' stroke='#8884'/>")
        parts += [f"<rect x='{x * size:.5g}' y='{y * size:.5g}' width='{n * size:.5g}' "
                  f"height='{size:.5g}' fill='{_COLOURS[mark]}'/>" for y, x, n, mark in _runs(rows)]
        parts.append("</g>")
        left += edge + 20
    wide, high = max(left - 20, edge), edge + 50
    return (f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {wide} {high}' width='{wide}' "
            f"height='{high}' font-family='sans-serif' font-size='11' fill='currentColor'>"
            f"<title>{escape(f'{title}: {numbers}')}</title><text y='12'>{escape(title)}</text>"
            + "".join(parts) + "</svg>")


def _runs(rows: Sequence[str]) -> list[tuple[int, int, int, str]]:
    """(row, first column, cells, mark) of neighbouring cells of one kind, skipped ones left out."""
    return [(y, run.start(), len(run[0]), run[0][0])
            for y, row in enumerate(rows) for run in _RUN.finditer(row)]


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"
