"""Plain text in columns: what is safe to print, how wide it is, where it may break.

Names of modules and files come from the user's program and may hold anything: line ends, terminal
escapes, wide or zero-width characters. A width is counted in terminal cells, not in characters.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence

WIDTH = 100
#: a cell holds at most so many characters of what it shows
LONGEST = 240
_BREAK_AFTER = " ,./:;_)]}-|&+*="


def printable(text: object, limit: int | None = None) -> str:
    """The text in one line, unprintable characters as escapes, cut in the middle at `limit`."""
    out = "".join(c if c.isprintable() else _escape(c) for c in str(text))
    if limit is not None and len(out) > limit:
        half = (limit - 3) // 2
        out = f"{out[:limit - 3 - half]}...{out[len(out) - half:]}"
    return out


def _escape(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


def width(text: str) -> int:
    """Terminal cells that a printable text takes."""
    if text.isascii():
        return len(text)
    return sum(_cell(c) for c in text)


@functools.lru_cache(maxsize=1024)
def _cell(char: str) -> int:
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def pad(text: str, cells: int) -> str:
    return text + " " * (cells - width(text))


def wrap(text: str, cells: int) -> list[str]:
    """Lines of at most `cells`, broken after punctuation if possible; at least one line."""
    return _break(text, cells)[0]


def _break(text: str, cells: int) -> tuple[list[str], int]:
    """Lines, and how many of them end within a word."""
    lines: list[str] = []
    cuts = 0
    while width(text) > cells:
        end, used, best = 0, 0, 0
        while end < len(text) and (used + _cell(text[end]) <= cells or end == 0):
            used += _cell(text[end])
            end += 1
            if _may_break(text, end):
                best = end
        # A break that leaves most of the line empty reads worse than a cut word.
        if best * 3 > end:
            end = best
        else:
            cuts += 1
        lines.append(text[:end].rstrip())
        text = text[end:].lstrip()
    return [*lines, text] if text or not lines else lines, cuts


def _may_break(text: str, at: int) -> bool:
    if at < len(text) and text[at] == " ":
        return True
    last, after = text[at - 1], text[at:at + 1]
    # "{0..11}", "1.30x" and "model.py:142" stay whole
    return last in _BREAK_AFTER and not (last in ".:" and (after in ".:" or after.isdigit()))


def paragraph(text: str, first: str = "", total: int = WIDTH) -> list[str]:
    """`first` and the text wrapped to `total`, later lines indented below the text."""
    lines = wrap(text, total - len(first))
    return [(" " * len(first) if i else first) + line for i, line in enumerate(lines)]


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], total: int = WIDTH) -> list[str]:
    """Lines of a table at most `total` cells wide: two blanks between columns, cells wrapped.

    A cell may have several lines. Columns start at their natural width; until the table fits, the
    one gives way that gets the fewest new lines and cut words from it. Every text must be
    printable.
    """
    table = [[cell.split("\n") for cell in row] for row in (header, *rows)]
    by_column = [[line for row in table for line in row[i]] for i in range(len(header))]
    least = [max(map(width, lines)) for lines in table[0]]
    sizes = _fit(by_column, least, total - 2 * (len(header) - 1))
    lines = _line(table[0], sizes)
    lines.append("  ".join("-" * s for s in sizes))
    for row in table[1:]:
        lines += _line(row, sizes)
    return lines


def _fit(by_column: list[list[str]], least: list[int], room: int) -> list[int]:
    sizes = [min(max(map(width, texts)), room) for texts in by_column]

    @functools.cache
    def cost(i: int, size: int) -> int:
        broken = [_break(text, size) for text in by_column[i]]
        return sum(len(lines) + 3 * cuts for lines, cuts in broken)

    while sum(sizes) > room:
        give = [i for i, s in enumerate(sizes) if s > least[i]]
        if not give:
            break
        worse = {i: cost(i, sizes[i] - 1) - cost(i, sizes[i]) for i in give}
        sizes[min(give, key=lambda i: (worse[i], -sizes[i]))] -= 1
    return sizes


def _line(row: list[list[str]], sizes: list[int]) -> list[str]:
    cells = [[line for text in texts for line in wrap(text, size)]
             for texts, size in zip(row, sizes, strict=True)]
    lines = []
    for i in range(max(map(len, cells))):
        parts = [pad(c[i] if i < len(c) else "", s) for c, s in zip(cells, sizes, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return lines
