"""The report as one page: the fragment with search and filters, the graphs and the kernels.

Nothing is loaded, and a policy in the page forbids it. All is there without its script, which
filters the sites, opens and closes, and changes between light and dark.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import groupby
from typing import TYPE_CHECKING

from attnopt.ir.graph_record import GraphRecord, NodeRecord
from attnopt.report import html, table
from attnopt.report.html import cut
from attnopt.report.text import LONGEST

if TYPE_CHECKING:
    from attnopt.report.report import Report

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_FILTERS = ("status", "kind", "rule")
#: nodes that are drawn of a graph, and characters of all kernels together: the page stays small
MOST_NODES, MOST_SOURCE = 2500, 200_000


def page(report: Report) -> str:
    """A whole document."""
    title = cut(table.title(report))
    return (
        "<!doctype html>\n<html lang='en'>\n<head>\n<meta charset='utf-8'>\n"
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        "<meta name='viewport' content='width=device-width, initial-scale=1'>\n"
        f"<title>attnopt report: {title}</title>\n<style>{_file('page.css')}</style>\n"
        "</head>\n<body>\n<main>\n<header><h1>attnopt report</h1>"
        "<button type='button' id='theme' aria-pressed='false'>dark</button></header>\n"
        f"{_controls(report)}\n{html.fragment(report, None, linked=True)}\n"
        f"<div class='attnopt'>{_graphs(report.graphs)}{_kernels(report)}</div>\n"
        f"</main>\n<script>{_file('page.js')}</script>\n</body>\n</html>\n")


def _file(name: str) -> str:
    return resources.files("attnopt.report").joinpath(name).read_text("utf-8")


def _controls(report: Report) -> str:
    parts = ["<label>search <input type='search' id='text'></label>"]
    for name in _FILTERS:
        values = sorted({getattr(s, name) or "none" for s in report.sites})
        options = "".join(f"<option value='{cut(v, LONGEST)}'>{cut(v, LONGEST)}</option>"
                          for v in values)
        parts.append(f"<label>{name} <select data-filter='{name}'>"
                     f"<option value=''>all</option>{options}</select></label>")
    parts.append("<button type='button' id='expand'>expand all</button>"
                 "<button type='button' id='collapse'>collapse all</button>"
                 "<output id='count' aria-live='polite'></output>")
    return ("<form id='controls' role='search' aria-label='filter the sites'>"
            f"{''.join(parts)}</form>")


# -- graphs -------------------------------------------------------------------------------------
def _graphs(graphs: Sequence[GraphRecord]) -> str:
    return "".join(
        f"<section aria-label='graph {i + 1}'><h2>Graph{f' {i + 1}' if len(graphs) > 1 else ''}"
        "</h2><p>By module; what is part of a site is marked with its number.</p>"
        f"<div class='sides'>{_side('before', g.before)}{_side('after', g.after)}</div></section>"
        for i, g in enumerate(graphs) if g.before or g.after)


def _side(name: str, nodes: Sequence[NodeRecord]) -> str:
    shown = nodes[:MOST_NODES]
    rest = f"<p>{len(nodes) - len(shown)} more nodes</p>" if len(nodes) > len(shown) else ""
    return (f"<details open><summary>{name}: {len(nodes)} nodes</summary>"
            f"{''.join(_modules(shown, nodes))}{rest}</details>")


def _modules(shown: Sequence[NodeRecord], nodes: Sequence[NodeRecord]) -> Iterable[str]:
    for path, members in groupby(shown, lambda n: (n.path, n.op == "placeholder")):
        group = list(members)
        sites = sorted({n.site + 1 for n in group if n.site is not None})
        name = "inputs and parameters" if path[1] else path[0] or "(model)"
        mark = f" <b class='mark'>site {', '.join(map(str, sites))}</b>" if sites else ""
        yield (f"<details class='module{' hit' if sites else ''}'><summary>{cut(name, LONGEST)} "
               f"({len(group)}){mark}</summary><ol>{''.join(_node(n, nodes) for n in group)}</ol>"
               "</details>")


def _node(node: NodeRecord, nodes: Sequence[NodeRecord]) -> str:
    given = ", ".join(nodes[i].name for i in node.inputs[:8])
    kind = " ".join(filter(None, (node.dtype, node.shape)))
    hit = "" if node.site is None else f" class=hit data-site={int(node.site)}"
    op = node.op if node.op == "placeholder" else f"{node.op}({given})"
    return (f"<li{hit}><code>{cut(node.name, LONGEST)} = {cut(op, LONGEST)}</code> "
            f"<small>{cut(' '.join(filter(None, (kind, node.source))), LONGEST)}</small></li>")


def _kernels(report: Report) -> str:
    room, items = MOST_SOURCE, []
    for key, text in report.kernels.items():
        shown = text[:room]
        room -= len(shown)
        lines = "\n".join(map(cut, shown.splitlines()))
        more = f"\n... {len(text) - len(shown)} more characters" if len(shown) < len(text) else ""
        name = cut(key, LONGEST)
        items.append(f"<details id='kernel-{name}'><summary>kernel {name}</summary>"
                     f"<pre tabindex='0'>{lines}{more}</pre></details>")
    return f"<section><h2>Generated kernels</h2>{''.join(items)}</section>" if items else ""
