"""Pictures of the sites' masks, as text and as SVG, from the compact form that a record holds."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from attnopt.ir.mask_picture import LEGEND, drawn, parse, svg
from attnopt.ir.site import SiteRecord
from attnopt.report.rows import fold
from attnopt.report.text import LONGEST, paragraph, printable


def render(sites: Sequence[SiteRecord]) -> str:
    """Text of all distinct pictures, each below the paths and the mask that it belongs to."""
    by_picture: dict[tuple[str, str], list[str]] = {}
    for row in fold(sites):
        if row.first.picture:
            by_picture.setdefault((row.first.mask, row.first.picture), []).append(row.path)
    blocks = []
    for (mask, compact), paths in by_picture.items():
        numbers, cells = parse(compact)
        cells = [(printable(label, LONGEST), rows) for label, rows in cells]
        head = f"{', '.join(paths)}: {mask}"
        blocks.append("\n".join([*paragraph(printable(head, 2 * LONGEST)),
                                 *paragraph(printable(numbers, LONGEST)), *drawn(cells), LEGEND]))
    return "\n\n".join(blocks) or "no mask with a known structure was found"


def figure(site: SiteRecord) -> str:
    """HTML: the numbers and the picture."""
    numbers, cells = parse(site.picture)
    return (f"{escape(printable(numbers, LONGEST))}<br>"
            + svg(printable(site.mask, LONGEST), printable(numbers, LONGEST),
                  [(printable(label, LONGEST), rows) for label, rows in cells]))
