"""The report for `rich.print` and rich consoles: the same text, as wide as the terminal, coloured.

Nothing here imports rich unless rich asks for the rendering. The text goes in as `rich.text.Text`,
so that brackets in a user's names are not read as markup.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from attnopt.report import table

if TYPE_CHECKING:
    from attnopt.report.report import Report

_STYLES = {"rewritten": "green", "canonical": "cyan", "kept": "yellow"}
_NARROWEST, _WIDEST = 60, 160


class Rendering:
    """What `Report.__rich__` gives: rich calls it back with the width that there is."""

    def __init__(self, report: Report) -> None:
        self.report = report

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        from rich.text import Text

        total = min(max(options.max_width, _NARROWEST), _WIDEST)
        text = Text(table.render(self.report, total))
        for word, style in _STYLES.items():
            text.highlight_words([word], style)
        yield text
