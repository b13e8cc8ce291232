"""The report as HTML: a fragment for notebooks, which `page` takes in as well.

Self-contained (no script, no font, nothing loaded), escaped, light and dark: colours follow the
notebook's theme where it says which one it is (JupyterLab, VS Code), else the system's. All rules
are below `.attnopt`, so that the page around it keeps its looks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from attnopt.report import pictures, table
from attnopt.report.rows import Row, counts_line, fold
from attnopt.report.text import LONGEST, printable

if TYPE_CHECKING:
    from attnopt.report.report import Report

#: a notebook keeps every output in the file: a fragment shows so many lines of the diff
_DIFF_LINES = 400
#: after a single dot that a name follows
_DOT = re.compile(r"(?<=[^.][.])(?=[^.0-9])")
_NOT_MEASURED = "not measured: report.measure(sites=True) measures every site alone"
_STATUSES = ("rewritten", "canonical", "kept")


def fragment(report: Report, diff_lines: int | None = _DIFF_LINES, *, linked: bool = False
             ) -> str:
    """One <div> with its style; `diff_lines` None shows the whole diff, and `linked` goes from
    sites to the kernels of the page."""
    rows = fold(report.sites)
    parts = [
        f"<style>{style()}</style>",
        f"<p class='title'>attnopt report: <b>{cut(table.title(report))}</b></p>",
        f"<p>{cut(counts_line(report))}</p>",
        _table(rows, linked),
        _kept(rows),
        _canonical(rows),
        _section("Approximate, as asked for",
                 [f"<b>{_breakable(printable(path, LONGEST))}</b>: {cut(text, 2 * LONGEST)}"
                  for path, text in table.approximations(rows)]),
        _section("Memory, as preferred to speed",
                 [f"<b>{_breakable(printable(path, LONGEST))}</b>: {cut(text, 2 * LONGEST)}"
                  for path, text in table.memories(rows)]),
        _summary(report),
        _diff(report.diff(), diff_lines),
    ]
    return "<div class='attnopt'>" + "\n".join(p for p in parts if p) + "</div>"


def style() -> str:
    return resources.files("attnopt.report").joinpath("report.css").read_text("utf-8")


def cut(text: object, limit: int | None = None) -> str:
    return escape(printable(text, limit))


def _table(rows: Sequence[Row], linked: bool) -> str:
    if not rows:
        return ""
    names, cells = table.used_columns(rows)
    head = "".join(f"<th scope='col'>{escape(table.header(n, rows))}</th>" for n in names)
    body = "".join(
        f"<tbody class=site data-status='{cut(row.first.status, LONGEST)}' "
        f"data-kind='{cut(row.first.kind, LONGEST)}' "
        f"data-rule='{cut(row.first.rule or 'none', LONGEST)}'><tr>"
        + "".join(_cell(n, c) for n, c in zip(names, texts, strict=True)) + "</tr>"
        + _more(row, len(names), linked) + "</tbody>"
        for row, texts in zip(rows, cells, strict=True))
    return (f"<div class='scroll'><table><thead><tr>{head}</tr></thead>"
            f"{body}</table></div>")


def _cell(name: str, text: str) -> str:
    if name == "path":
        return f"<th scope='row'>{_breakable(text)}</th>"
    if name == "status":
        kind = text if text in _STATUSES else "other"
        return f"<td><span class='status {kind}'>{cut(text)}</span></td>"
    return f"<td{' class=number' if name == 'error' else ''}>{_breakable(text)}</td>"


def _breakable(text: str) -> str:
    """Escaped, with places where a browser may break a dotted path."""
    return "<wbr>".join(escape(part) for part in _DOT.split(text))


def _more(row: Row, span: int, linked: bool) -> str:
    """A line that opens to what the table has no room for."""
    site = row.first
    paths = dict.fromkeys(s.path or "(model)" for s in row.sites)
    facts = [
        ("sites", ", ".join(paths) if len(paths) > 1 else ""),
        ("source", ": ".join(filter(None, (site.source, site.code)))),
        ("node", site.node),
        ("kind", site.kind),
        ("bias", site.bias),
        ("density", _share(site.density)),
        ("tile density", _share(site.tile_density)),
        ("tile", site.tile),
        ("predicted", row.predicted),
        ("measured", row.measured or (_NOT_MEASURED if site.status == "rewritten" else "")),
        ("roofline", row.roofline and f"{row.roofline} of what the device allows"),
        ("reason", site.reason),
        ("error", _errors(row)),
        ("normal form", site.spec),
        ("rules tried", "; ".join(site.tried)),
    ]
    facts = [(name, text) for name, text in facts if text]
    if not facts and not site.picture:
        return ""
    listed = "".join(f"<dt>{n}</dt><dd>{cut(t, 20 * LONGEST)}</dd>" for n, t in facts)
    if site.kernel:
        key = f"<code>{cut(site.kernel, LONGEST)}</code>"
        key = f"<a href='#kernel-{cut(site.kernel, LONGEST)}'>{key}</a>" if linked else key
        listed += f"<dt>kernel</dt><dd>{key}</dd>"
    if site.picture:
        listed += f"<dt>mask</dt><dd>{pictures.figure(site)}</dd>"
    return (f"<tr class='more'><td colspan='{span}'><details><summary>details</summary>"
            f"<dl>{listed}</dl></details></td></tr>")


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3g}%"


def _errors(row: Row) -> str:
    site = row.first
    if row.error is None:
        return ""
    text = f"{row.error:.2e} against float64"
    if row.error_original is not None:
        text += f", the author's {row.error_original:.2e}"
    if site.error_bound is not None:
        text += f", bound {site.error_bound:.2e}"
    return text


def _kept(rows: Sequence[Row]) -> str:
    items = []
    for row in (r for r in rows if r.first.status == "kept"):
        rule, condition = row.nearest
        place = f" at {cut(row.first.source)}" if row.first.source else ""
        items.append(
            f"<b>{_breakable(printable(row.path, LONGEST))}</b>{place}: nearest rule "
            f"<i>{cut(rule or 'none', LONGEST)}</i>, first failure: "
            f"{cut(condition or 'no reason was recorded', 2 * LONGEST)}")
    return _section("Kept as they were", items)


def _canonical(rows: Sequence[Row]) -> str:
    return _section("Canonical, computed as the author does",
                    [f"{n} x {cut(reason)}" for reason, n in table.reasons(rows).items()])


def _section(title: str, items: Iterable[str]) -> str:
    body = "".join(f"<li>{item}</li>" for item in items)
    return f"<p class='head'>{title}</p><ul>{body}</ul>" if body else ""


def _summary(report: Report) -> str:
    lines = []
    if report.timings:
        lines.append(f"<p>Time: {cut(table.timings_line(report.timings))}</p>")
    if report.measurement is not None:
        lines.append(f"<p>Speed: {cut(report.measurement)}</p>")
    hits, misses = table.split_calls(report.calls)
    if hits or misses:
        listed = "".join(f"<li>{n} x {cut(reason, 2 * LONGEST)}</li>"
                         for reason, n in misses.items())
        lines.append(f"<p>Calls: {hits} by a variant, {sum(misses.values())} by the module's own "
                     f"forward</p>{f'<ul>{listed}</ul>' if listed else ''}")
    lines += [f"<p>Note: {cut(note, 4 * LONGEST)}</p>" for note in report.notes]
    return "".join(lines)


def _diff(diff: str, limit: int | None) -> str:
    lines = diff.splitlines()
    if not lines:
        return ""
    shown = lines if limit is None else lines[:limit]
    marks = {"+": "add", "-": "del", "@": "hunk"}
    body = "\n".join(
        f"<span class={marks[line[0]]}>{cut(line)}</span>" if line[:1] in marks else cut(line)
        for line in shown)
    if len(shown) < len(lines):
        body += f"\n... {len(lines) - len(shown)} more lines in report.diff()"
    changed = sum(line[:1] in "+-" for line in lines[2:])
    return (f"<details><summary>graph before and after ({changed} lines changed)</summary>"
            f"<pre>{body}</pre></details>")
