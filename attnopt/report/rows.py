"""Rows of the report: sites that differ only by a layer's number are one row.

Twelve equal layers are twelve sites and one fact. Sites fold when all that the report says of
them is equal and their paths differ in numbers only: "encoder.layer.{0..11}.attention", and
"blocks.{1..5..2}.attn" where every second layer is of another kind. Text, terminal and HTML show
the same rows and cells.
"""

from __future__ import annotations

import dataclasses
import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from attnopt.ir.site import KINDS, STATUSES, SiteRecord
from attnopt.report.text import printable
from attnopt.timing import format_seconds

if TYPE_CHECKING:
    from attnopt.report.report import Report

#: differ from layer to layer without meaning anything, or are summed up in the row
_VARYING = frozenset({
    "path", "node", "error", "error_original", "error_bound", "deviation", "measured_original",
    "measured_seconds", "measured_speedup", "measured_low", "measured_high", "roofline",
    "roofline_bound"})
_FIELDS = tuple(f.name for f in dataclasses.fields(SiteRecord) if f.name not in _VARYING)
#: an fx node's number, in a reason
_NODE_NUMBER = re.compile(r"(?<=[A-Za-z])_\d+\b")
COLUMNS = ("path", "source", "status", "rule", "mask", "bias", "shapes", "lowering", "error")

_Number = tuple[int, ...]
_Tokens = tuple[str | _Number, ...]


@dataclass(frozen=True)
class Row:
    """One line of the report and the sites that it stands for."""

    path: str
    sites: tuple[SiteRecord, ...]

    @property
    def first(self) -> SiteRecord:
        return self.sites[0]

    @property
    def error(self) -> float | None:
        """The largest error; NaN if any is."""
        return _largest([s.error for s in self.sites])

    @property
    def error_original(self) -> float | None:
        """The author's own, likewise."""
        return _largest([s.error_original for s in self.sites])

    @property
    def nearest(self) -> tuple[str, str]:
        """The rule that came nearest and the first of its conditions that failed."""
        return nearest(self.first)

    @property
    def predicted(self) -> str:
        """"1.20 ms, 3.10 times as fast as the author's": what the cost model says, or ""."""
        site = self.first
        return ", ".join(filter(None, (
            "" if site.predicted_seconds is None else format_seconds(site.predicted_seconds),
            "" if site.predicted_speedup is None else
            f"{site.predicted_speedup:.2f} times as fast as the author's")))

    @property
    def measured(self) -> str:
        """Seconds of a site alone, the author's and their ratio, the median over the sites that
        were measured; or ""."""
        middle = {name: _median([getattr(s, f"measured_{name}") for s in self.sites])
                  for name in ("seconds", "original", "speedup", "low", "high")}
        if middle["seconds"] is None:
            return ""
        text = format_seconds(middle["seconds"])
        if middle["original"] is not None and middle["speedup"] is not None:
            text += f", the author's {format_seconds(middle['original'])}: {middle['speedup']:.2f}x"
        if middle["low"] is not None and middle["high"] is not None:
            text += f" ({middle['low']:.2f}x to {middle['high']:.2f}x)"
        return text

    @property
    def roofline(self) -> str:
        """"45% (compute)": of the rate that the device allows, or ""."""
        share = _median([s.roofline for s in self.sites])
        bound = self.first.roofline_bound
        return "" if share is None else f"{100 * share:.3g}%{f' ({bound})' if bound else ''}"

    def cells(self) -> dict[str, str]:
        """Text of each of COLUMNS, "" where there is nothing to say."""
        site = self.first
        rule = site.rule
        if site.kind != "attention":
            rule = f"{rule} ({site.kind})" if rule else f"({site.kind})"
        known = site.density is not None and (site.mask or site.density < 1)
        density = f"{100 * site.density:.3g}%" if known and site.density is not None else ""
        speedup = "" if site.predicted_speedup is None else f"{site.predicted_speedup:.2f}x"
        return {
            "path": self.path,
            "source": site.source,
            "status": site.status,
            "rule": rule,
            "mask": " ".join(filter(None, (site.mask, density))),
            "bias": site.bias,
            "shapes": _shapes(site.shapes),
            "lowering": " ".join(filter(None, (site.lowering, site.tile, speedup))),
            "error": " ".join(filter(None, (
                _number(self.error), _number(self.error_original, "({})")))),
        }


def _largest(errors: Sequence[float | None]) -> float | None:
    known = [e for e in errors if e is not None]
    return math.nan if any(map(math.isnan, known)) else max(known, default=None)


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _number(error: float | None, form: str = "{}") -> str:
    return "" if error is None else form.format(f"{error:.1e}")


def _shapes(text: str) -> str:
    """Query, key and value without those at the end that repeat the one before."""
    parts = text.split(" ")
    while len(parts) > 1 and parts[-1] == parts[-2]:
        parts.pop()
    return " ".join(parts)


def nearest(site: SiteRecord) -> tuple[str, str]:
    """(rule, first condition that failed) of a site that was kept; either may be ""."""
    for entry in site.tried:
        rule, colon, condition = entry.partition(": ")
        if colon:
            return rule, condition
    return site.rule, site.reason or (site.tried[0] if site.tried else "")


def fold(sites: Sequence[SiteRecord]) -> list[Row]:
    """Rows of the sites, each in the place of its first site."""
    groups: dict[tuple[object, ...], list[SiteRecord]] = {}
    for site in sites:
        groups.setdefault((site.path, *_facts(site)), []).append(site)
    # (facts, how many sites one path has) stay together; paths merge number by number, the last
    # number first, so that stages fold only if their blocks did.
    open_rows = [(_facts(g[0]), len(g), _tokens(g[0].path), g) for g in groups.values()]
    for position in range(max((len(t) for _, _, t, _ in open_rows), default=0) - 1, -1, -1):
        merged: dict[tuple[object, ...], tuple[tuple[object, ...], int, _Tokens,
                                               list[SiteRecord]]] = {}
        for facts, count, tokens, members in open_rows:
            number = tokens[position] if position < len(tokens) else ""
            if isinstance(number, str):
                merged[(facts, count, tokens)] = (facts, count, tokens, members)
                continue
            rest = (facts, count, tokens[:position], tokens[position + 1:])
            known = merged.get(rest)
            if known is not None:
                both = tuple(sorted({*known[2][position], *number}))
                tokens = (*tokens[:position], both, *tokens[position + 1:])
                members = [*known[3], *members]
            merged[rest] = (facts, count, tokens, members)
        open_rows = list(merged.values())
    return [
        Row(_path(tokens) + (f" (x{count})" if count > 1 else ""), tuple(members))
        for _, count, tokens, members in open_rows]


def _facts(site: SiteRecord) -> tuple[object, ...]:
    """All that must be equal, with fx node numbers and float noise taken out."""
    return tuple(_same(getattr(site, name)) for name in _FIELDS)


def _same(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return tuple(map(_same, value))
    return without_numbers(value) if isinstance(value, str) else value


def without_numbers(reason: str) -> str:
    """A reason with the numbers of fx nodes taken out: "mean_1" and "mean" are of equal layers."""
    return _NODE_NUMBER.sub("", reason)


def _tokens(path: str) -> _Tokens:
    """Text and numbers of a path; the odd places are numbers."""
    parts = re.split(r"(?<![0-9])(0|[1-9][0-9]{0,8})(?![0-9])", path)
    return tuple((int(p),) if i % 2 else p for i, p in enumerate(parts))


def _path(tokens: _Tokens) -> str:
    return "".join(t if isinstance(t, str) else _numbers(t) for t in tokens) or "(model)"


def _numbers(numbers: _Number) -> str:
    """"3", "{0..11}", "{0..22..2}" or "{0,1,5}"."""
    if len(numbers) == 1:
        return str(numbers[0])
    steps = {b - a for a, b in zip(numbers, numbers[1:], strict=False)}
    if len(steps) == 1 and len(numbers) > 2 or steps == {1}:
        step = min(steps)
        return f"{{{numbers[0]}..{numbers[-1]}{f'..{step}' if step > 1 else ''}}}"
    return "{" + ",".join(map(str, numbers)) + "}"


def counts(sites: Sequence[SiteRecord]) -> dict[str, dict[str, int]]:
    """Number of sites by kind and status: {"attention": {"rewritten": 3, …}, …}, no empty kinds."""
    table: dict[str, dict[str, int]] = {}
    for kind in dict.fromkeys((*KINDS, *(s.kind for s in sites))):
        by_status = Counter(s.status for s in sites if s.kind == kind)
        if by_status:
            order = dict.fromkeys((*STATUSES, *by_status))
            table[kind] = {status: by_status[status] for status in order}
    return table


def counts_line(report: Report) -> str:
    """"13 sites: 12 rewritten, 0 canonical, 1 kept", and by kind if there are several."""
    sites = report.sites
    if not sites and not report.calls and any(map(_is_pending, report.notes)):
        return "no sites yet: the model is read graph by graph, at its first call"
    if not sites:
        return "no sites: no attention, sampling or linear attention was found"
    table = counts(sites)
    totals: Counter[str] = Counter()
    for by_status in table.values():
        totals.update(by_status)
    text = f"{len(sites)} site{'s' if len(sites) != 1 else ''}: " + _listed(totals)
    if list(table) != ["attention"]:
        for kind, by_status in table.items():
            some = {status: n for status, n in by_status.items() if n}
            text += f"; {printable(kind, 60)}: {_listed(some)}"
    return text


def _is_pending(note: str) -> bool:
    return note.startswith("not captured whole")


def _listed(numbers: dict[str, int]) -> str:
    return ", ".join(f"{n} {printable(status, 60)}" for status, n in numbers.items())
