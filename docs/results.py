"""The stored results of `attnopt bench` as tables."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

from attnopt.bench import RESULTS, SUITES
from attnopt.bench.side_by_side import OURS
from attnopt.timing import format_seconds
from docs.markdown import first, table

_RATIO = "{ratio:.2f}x {name} ({low:.2f} to {high:.2f}{missed})"


def measured() -> Iterator[str]:
    """A section with one table for each stored suite that has rows or ratios."""
    yield from ("## Measured", "",
                "Stored by `attnopt bench` on the machine that is named; ratios are the time of "
                "the other divided by the time of ours, with the 95 % interval of the median, and "
                "carry over to other machines better than times do. *Missed* marks what is below "
                "its goal.", "")
    for suite in SUITES:
        records = [json.loads(path.read_text("utf-8"))
                   for path in sorted(RESULTS.glob(f"{suite}-*.json"))]
        lines = [line for record in records if list(record["suites"]) == [suite]
                 for line in _device(suite, record)]
        if lines:
            about = first(inspect.getdoc(inspect.getmodule(SUITES[suite])))
            yield from (f"### {suite}", "", about, "", *lines)


def _device(suite: str, record: Mapping[str, Any]) -> Iterator[str]:
    """What a suite measured on one device; nothing where that has neither rows nor ratios."""
    rows = record["suites"][suite]
    full = {n: r for n, r in rows.items() if isinstance(r, Mapping) and "contestants" in r}
    short = {n: r for n, r in rows.items() if isinstance(r, Mapping) and "ratio" in r}
    if full:
        body = table(("case", "shape", "dtype", "ours", "by", "against"), (
            _cells(name, row) for name, row in full.items()))
    elif short:
        body = table(("case", "ratio"), ((name, _short(row)) for name, row in short.items()))
    else:
        return
    device = (record.get("accelerators") or [None])[0] if suite.startswith("gpu") else None
    threads = record["cpu"].get("threads")
    where = device or f"{record['cpu']['model']}, {threads} thread{'' if threads == 1 else 's'}"
    yield from (f"{where}; torch {record['versions']['torch']}; {record['date']}.", "", *body, "")


def _cells(name: str, row: Mapping[str, Any]) -> list[str]:
    ours = row["contestants"].get(OURS, {})
    against = [_RATIO.format(name=other, ratio=found["ratio"], low=found["interval"][0],
                             high=found["interval"][1],
                             missed=", *missed*" if found.get("missed") else "")
               for other, found in row["ratios"].items()]
    how = row["ours"].get("lowering") or row["ours"].get("status") or "-"
    return [name, row["shape"], row["dtype"],
            format_seconds(ours["seconds"]) if ours else "-", how, "; ".join(against) or "-"]


def _short(row: Mapping[str, Any]) -> str:
    low, high = row.get("interval", (None, None))
    return f"{row['ratio']:.2f}" + (f" ({low:.2f} to {high:.2f})" if low is not None else "")
