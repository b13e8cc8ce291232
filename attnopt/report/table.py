"""The report as plain text, at most 100 columns wide, with no dependency.

A table of sites (equal layers folded), the counts, then for what was kept the nearest rule, the
first condition that failed and the user's source line, then times, calls and notes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from attnopt.report.rows import COLUMNS, Row, counts_line, fold, without_numbers
from attnopt.report.text import LONGEST, WIDTH, columns, paragraph, printable
from attnopt.timing import format_seconds

if TYPE_CHECKING:
    from attnopt.report.report import Report

#: `paragraph` at the width of this rendering
Say = Callable[..., list[str]]
_HEADERS = {"path": "site", "shapes": "shape"}
_HITS = "hits"


def render(report: Report, total: int = WIDTH) -> str:
    """The whole text of `str(report)`, at most `total` (60 or more) columns wide."""
    rows = fold(report.sites)
    say = functools.partial(paragraph, total=total)
    blocks = [
        say(f"attnopt report: {title(report)}"),
        site_table(rows, total),
        say(counts_line(report)),
        kept(rows, say),
        canonical(rows, say),
        approximate(rows, say),
        memory(rows, say),
        measured(rows, say),
        summary(report, say),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def title(report: Report) -> str:
    return printable(report.model_name or "model", LONGEST)


def header(column: str, rows: Sequence[Row]) -> str:
    if column == "error" and any(row.error_original is not None for row in rows):
        return "error (author's)"
    return _HEADERS.get(column, column)


def used_columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns in which some row says something, and their printable cells."""
    cells = [{name: printable(text, LONGEST) for name, text in row.cells().items()}
             for row in rows]
    names = [name for name in COLUMNS if any(c[name] for c in cells)]
    return names, [[c[name] for name in names] for c in cells]


def stacked(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """`used_columns` with the source line below the path, and the author's error below ours, which
    saves columns."""
    names, cells = used_columns(rows)
    if "error" in names:
        at = names.index("error")
        for row in cells:
            row[at] = row[at].replace(" ", "\n")
    if "source" in names:
        at = names.index("source")
        names.pop(at)
        for row in cells:
            source = row.pop(at)
            row[0] += f"\n  {source}" if source else ""
    return names, cells


def site_table(rows: Sequence[Row], total: int) -> list[str]:
    if not rows:
        return []
    names, cells = stacked(rows)
    return columns([header(n, rows).replace(" ", "\n") for n in names], cells, total)


def kept(rows: Sequence[Row], say: Say) -> list[str]:
    """Each kept row: where it is, the nearest rule and why it declined."""
    lines: list[str] = []
    for row in (r for r in rows if r.first.status == "kept"):
        rule, condition = row.nearest
        place = printable(row.first.source, LONGEST)
        lines += say(printable(row.path, LONGEST) + (f" at {place}" if place else ""), "  ")
        lines += say(printable(rule or "none", LONGEST), "    nearest rule:  ")
        lines += say(printable(condition or "no reason was recorded", 2 * LONGEST),
                           "    first failure: ")
    return ["Kept as they were:", *lines] if lines else []


def reasons(rows: Sequence[Row]) -> dict[str, int]:
    """Why canonical sites keep the author's nodes, and how many say so."""
    found: dict[str, tuple[str, int]] = {}
    for row in rows:
        if row.first.status == "canonical" and row.first.reason:
            same = without_numbers(row.first.reason)
            text, number = found.get(same, (row.first.reason, 0))
            found[same] = text, number + len(row.sites)
    return {printable(text, 2 * LONGEST): number for text, number in found.values()}


def canonical(rows: Sequence[Row], say: Say) -> list[str]:
    lines = [line for reason, n in reasons(rows).items() for line in say(reason, f"  {n} x ")]
    return ["Canonical, computed as the author does:", *lines] if lines else []


def approximations(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(path, approximation with what it changes) of the sites where the user asked for one."""
    found = []
    for row in (r for r in rows if r.first.approximation):
        if row.first.deviation is None and row.first.approximation.startswith("not used"):
            found.append((row.path, row.first.approximation))
            continue
        worst = max((s.deviation for s in row.sites if s.deviation is not None), default=None)
        changed = "not measured" if worst is None else (
            f"changes the result by {100 * worst:.3g}% (root mean square, on the example)")
        found.append((row.path, f"{row.first.approximation}: {changed}"))
    return found


def memories(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """(path, what is held and what that costs) of the sites rewritten with prefer="memory"."""
    return [(row.path, row.first.memory) for row in rows if row.first.memory]


def memory(rows: Sequence[Row], say: Say) -> list[str]:
    lines: list[str] = []
    for path, text in memories(rows):
        lines += say(printable(path, LONGEST), "  ")
        lines += say(printable(text, 2 * LONGEST), "    ")
    return ["Memory, as preferred to speed:", *lines] if lines else []


def measured(rows: Sequence[Row], say: Say) -> list[str]:
    """Predicted against measured times of the rows that were measured."""
    lines: list[str] = []
    for row in (r for r in rows if r.measured):
        lines += say(printable(row.path, LONGEST), "  ")
        told = [f"measured {row.measured}"]
        if row.predicted:
            told.insert(0, f"predicted {row.predicted}")
        if row.roofline:
            told.append(f"{row.roofline} of the roofline")
        lines += say("; ".join(told), "    ")
    return ["Measured, each site alone:", *lines] if lines else []


def approximate(rows: Sequence[Row], say: Say) -> list[str]:
    lines: list[str] = []
    for path, text in approximations(rows):
        lines += say(printable(path, LONGEST), "  ")
        lines += say(printable(text, 2 * LONGEST), "    ")
    return ["Approximate, as asked for:", *lines] if lines else []


def summary(report: Report, say: Say) -> list[str]:
    """Times of the steps, the last measurement, calls that missed, notes."""
    lines: list[str] = []
    if report.timings:
        lines += say(timings_line(report.timings), "Time:  ")
    if report.measurement is not None:
        lines += say(str(report.measurement), "Speed: ")
    lines += calls_lines(report.calls, say)
    for note in report.notes:
        lines += say(printable(note, 4 * LONGEST), "Note:  ")
    return lines


def timings_line(timings: Mapping[str, float]) -> str:
    """"capture 1.25 s, verify 830 ms; 2.08 s in all"; the total is added where none is given."""
    steps = {printable(k, 60): v for k, v in timings.items() if k != "total"}
    total = timings.get("total", sum(steps.values()))
    text = ", ".join(f"{step} {format_seconds(v)}" for step, v in steps.items())
    if len(steps) == 1 and "total" not in timings:
        return text
    return f"{text}; {format_seconds(total)} in all" if text else f"{format_seconds(total)} in all"


def split_calls(calls: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """(calls that a variant took, reason -> calls that ran the user's own forward)."""
    snapshot = dict(calls)
    hits = snapshot.pop(_HITS, 0)
    misses = {k: n for k, n in snapshot.items() if n}
    return hits, dict(sorted(misses.items(), key=lambda item: -item[1]))


def calls_lines(calls: Mapping[str, int], say: Say) -> list[str]:
    hits, misses = split_calls(calls)
    if not hits and not misses:
        return []
    text = f"{hits} by a variant, {sum(misses.values())} by the module's own forward"
    lines = say(text, "Calls: ")
    for reason, n in misses.items():
        lines += say(printable(reason, 2 * LONGEST), f"         {n} x ")
    return lines
