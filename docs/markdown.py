"""Docstrings and signatures as Markdown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

_SECTION = re.compile(r"(Args|Returns|Raises|Yields):$")
_ENTRY = re.compile(r"(\*{0,2}[A-Za-z_][\w.]*(?:, *\*{0,2}[A-Za-z_][\w.]*)*): +(\S.*)$")


def signature(name: str, function: Any, *, method: bool = False) -> str:
    """A definition as code, one parameter a line where one line is too short."""
    try:
        found = inspect.signature(function)
    except (TypeError, ValueError):
        return f"{name}(...)"
    parts: list[str] = []
    kinds = inspect.Parameter
    starred = False
    for position, parameter in enumerate(found.parameters.values()):
        if method and position == 0 and parameter.name in ("self", "cls"):
            continue
        if parameter.kind is kinds.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred = starred or parameter.kind in (kinds.KEYWORD_ONLY, kinds.VAR_POSITIONAL)
        stars = "*" if parameter.kind is kinds.VAR_POSITIONAL else \
            "**" if parameter.kind is kinds.VAR_KEYWORD else ""
        text = stars + parameter.name
        typed = isinstance(parameter.annotation, str)
        text += f": {parameter.annotation}" if typed else ""
        if parameter.default is not kinds.empty:
            text += (" = " if typed else "=") + _default(parameter.default)
        parts.append(text)
    result = f" -> {found.return_annotation}" if isinstance(found.return_annotation, str) else ""
    line = f"{name}({', '.join(parts)}){result}"
    if len(line) <= 100:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def _default(value: Any) -> str:
    """A default, without addresses that change from run to run."""
    text = repr(value)
    return text if " at 0x" not in text and not text.startswith("<") else "..."


def docstring(text: str | None, skip: int = 0) -> list[str]:
    """Lines of Markdown: paragraphs, code as it is indented, arguments and fields as lists.

    skip: paragraphs to leave out at the beginning
    """
    lines: list[str] = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text or "").strip("\n"))[skip:]:
        rows = block.split("\n")
        if not block:
            continue
        if _SECTION.match(rows[0]):
            lines += [f"*{rows[0][:-1]}*", "", *_entries(inspect.cleandoc("\n" + "\n".join(
                rows[1:])).split("\n")), ""]
        elif all(row.startswith("    ") for row in rows if row):
            lines += ["```", *(row[4:] for row in rows), "```", ""]
        elif rows[0][:1].islower() and _ENTRY.match(rows[0]):
            lines += [*_entries(rows), ""]
        else:
            lines += [*rows, ""]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _entries(rows: Sequence[str]) -> list[str]:
    """A list of "name: text" lines, each with its continuation."""
    found: list[str] = []
    for row in rows:
        entry = _ENTRY.match(row)
        if entry is not None:
            found.append(f"- `{entry[1]}`: {entry[2]}")
        elif found:
            found[-1] += " " + row.strip()
        else:
            found.append(row)
    return found


def first(text: str | None) -> str:
    """The first paragraph as one line."""
    return " ".join(inspect.cleandoc(text or "").split("\n\n")[0].split())


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table."""
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head),
            *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)]
