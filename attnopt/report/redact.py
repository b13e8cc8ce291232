"""A copy of a report that tells nothing of the model's source.

What stays is chosen field by field: structure, shapes, numbers and the names of public operators.
Names of modules, nodes, parameters and files, lines, reasons, notes and kernel texts go, since all
of these may quote the user's program.
"""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from attnopt.ir.graph_record import GraphRecord, NodeRecord
from attnopt.ir.site import SiteRecord
from attnopt.report.table import split_calls

if TYPE_CHECKING:
    from attnopt.report.report import Report

#: what a site keeps besides its numbers
_KEPT = frozenset({"kind", "status", "lowering", "tile", "shapes", "roofline_bound"})
_HIDDEN = "(redacted)"
_PUBLIC = frozenset({"placeholder", "output", "attention", "deformable_attention"})
#: leading words of a mask or a bias that name a form
_FORM = re.compile(r"[A-Za-z][A-Za-z-]*")


def redacted(report: Report) -> Report:
    """A copy without names, lines and texts; the report itself stays as it is."""
    result = copy.copy(report)
    result.model_name = "(redacted)"
    result.sites = [_site(s, i) for i, s in enumerate(report.sites)]
    result.graphs = [GraphRecord(_nodes(g.before), _nodes(g.after)) for g in report.graphs]
    result.calls = _calls(report.calls)
    result.before = result.after = ""
    result.kernels = {}
    result.notes = [f"{len(report.notes)} notes are left out"] if report.notes else []
    return result


def _site(site: SiteRecord, place: int) -> SiteRecord:
    kept = {f.name: getattr(site, f.name) for f in dataclasses.fields(site)
            if f.name in _KEPT or "float" in str(f.type)}
    return SiteRecord(
        path=f"site {place + 1}", rule=_form(site.rule), mask=_form(site.mask),
        bias=_form(site.bias), reason=_HIDDEN if site.reason else "",
        picture=_picture(site), **kept)


def _form(text: str) -> str:
    """The form's own name, without what is in brackets behind it."""
    found = _FORM.match(text)
    return found[0] if found else ""


def _picture(site: SiteRecord) -> str:
    """The marks of the tiles, without the labels and the names of operands."""
    return "\n".join("= " if line.startswith("=") else line for line in
                     ["", *site.picture.split("\n")[1:]]) if site.picture else ""


def _nodes(nodes: Sequence[NodeRecord]) -> tuple[NodeRecord, ...]:
    return tuple(dataclasses.replace(
        n, name=f"n{i}", path="", source="", op=n.op if _public(n.op) else "custom")
        for i, n in enumerate(nodes))


def _public(op: str) -> bool:
    return op in _PUBLIC or not op.startswith("_") and hasattr(torch.ops.aten, op)


def _calls(calls: Mapping[str, int]) -> dict[str, int]:
    hits, misses = split_calls(calls)
    return {"hits": hits, _HIDDEN: sum(misses.values())} if calls else {}
