"""What is different between the sites of two reports.

Sites are paired by kind and module path, and where one module has several, by their order. Numbers
count as different from one in a hundred on; errors and the names of graph nodes vary from run to
run and are not compared, except for whether there is an error at all.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from attnopt.ir.site import SiteRecord
from attnopt.report.text import LONGEST, paragraph, printable

_VARYING = frozenset({"path", "kind", "node", "error", "error_original", "error_bound",
                      "deviation", "kernel", "picture"})
_COMPARED = tuple(f.name for f in dataclasses.fields(SiteRecord) if f.name not in _VARYING)


@dataclass(frozen=True)
class Change:
    """One site in both reports, with (before, after) of each field that is different."""

    path: str
    kind: str
    fields: dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Difference:
    """Sites that only the later report has, that only the earlier one has, and that changed."""

    added: tuple[SiteRecord, ...] = ()
    removed: tuple[SiteRecord, ...] = ()
    changed: tuple[Change, ...] = ()

    @classmethod
    def of(cls, before: Sequence[SiteRecord], after: Sequence[SiteRecord]) -> Difference:
        """What became of the sites `before` in `after`."""
        old, new = _keyed(before), _keyed(after)
        changes = []
        for key in old:
            if key in new:
                fields = _fields(old[key], new[key])
                if fields:
                    changes.append(Change(old[key].path, old[key].kind, fields))
        return cls(tuple(s for key, s in new.items() if key not in old),
                   tuple(s for key, s in old.items() if key not in new), tuple(changes))

    def __bool__(self) -> bool:
        return bool(self.added or self.removed or self.changed)

    def lines(self) -> list[tuple[str, str]]:
        """(mark, text): "+" came, "-" went, "~" changed, " " says how."""
        found = [(mark, f"{_name(s.path, s.kind)}: {_text(s.status)} {_text(s.rule)}".rstrip())
                 for mark, sites in (("+", self.added), ("-", self.removed)) for s in sites]
        for change in self.changed:
            found.append(("~", _name(change.path, change.kind)))
            found += [(" ", f"  {name}: {_text(old)} -> {_text(new)}")
                      for name, (old, new) in change.fields.items()]
        return found

    def __str__(self) -> str:
        head = (f"{len(self.added)} sites added, {len(self.removed)} removed, "
                f"{len(self.changed)} changed")
        lines = [line for mark, text in self.lines() for line in paragraph(text, f"{mark} ")]
        return "\n".join([head, *lines])

    def _repr_html_(self) -> str:
        tags = {"+": "ins", "-": "del"}
        items = "\n".join(
            f"<{tags.get(mark, 'span')}>{escape(f'{mark} {text}')}</{tags.get(mark, 'span')}>"
            for mark, text in self.lines())
        head = escape(str(self).split("\n", 1)[0])
        return f"<div><p>{head}</p>{f'<pre>{items}</pre>' if items else ''}</div>"

    def to_json(self) -> str:
        """JSON text: added and removed as lists of {path, kind, status, rule}, changed with the
        values before and after by field."""
        def site(s: SiteRecord) -> dict[str, str]:
            return {"path": s.path, "kind": s.kind, "status": s.status, "rule": s.rule}

        return json.dumps({
            "schema": "attnopt.difference", "schema_version": 1,
            "added": [site(s) for s in self.added], "removed": [site(s) for s in self.removed],
            "changed": [{"path": c.path, "kind": c.kind, "fields": {
                name: {"before": _plain(old), "after": _plain(new)}
                for name, (old, new) in c.fields.items()}} for c in self.changed],
        }, indent=1, allow_nan=False)


def _keyed(sites: Sequence[SiteRecord]) -> dict[tuple[str, str, int], SiteRecord]:
    found: dict[tuple[str, str, int], SiteRecord] = {}
    seen: dict[tuple[str, str], int] = {}
    for site in sites:
        place = seen[site.kind, site.path] = seen.get((site.kind, site.path), -1) + 1
        found[site.kind, site.path, place] = site
    return found


def _fields(old: SiteRecord, new: SiteRecord) -> dict[str, tuple[Any, Any]]:
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in _COMPARED}
    found = {name: pair for name, pair in pairs.items() if not _same(*pair)}
    if (old.error is None) != (new.error is None):
        found["error"] = old.error, new.error
    return found


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=0.01) or math.isnan(old) and math.isnan(new)
    return bool(old == new)


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: object) -> str:
    return printable("(none)" if value in (None, "", []) else value, LONGEST)


def _name(path: str, kind: str) -> str:
    name = printable(path or "(model)", LONGEST)
    return name if kind == "attention" else f"{name} ({printable(kind, 60)})"
