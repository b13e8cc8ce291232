"""The rows of a suite: those that are wanted, measured one after the other and said at once."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from attnopt.bench import summary


class _Row(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_Row)


def chosen(cases: Iterable[_Named], patterns: Iterable[str] | None) -> list[_Named]:
    """The cases of which the name fits one of the patterns, in their order; all for None."""
    if patterns is None:
        return list(cases)
    wanted = list(patterns)
    return [case for case in cases if any(fnmatch.fnmatch(case.name, p) for p in wanted)]


def measured(cases: Iterable[_Named], run: Callable[[_Named], dict[str, Any] | None],
             say: Callable[[str], None]) -> dict[str, Any]:
    """Rows by name, each said in a line, and at last all in a table.

    run: the row of a case; None, when it has said why there is none.
    """
    rows: dict[str, Any] = {}
    for case in cases:
        row = run(case)
        if row is not None:
            rows[case.name] = row
            say(summary.line(case.name, row))
    for line in summary.table(rows):
        say(line)
    return rows
