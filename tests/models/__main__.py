"""`python -m tests.models`: the sweep as a table, one row per model, and its totals."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import re
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

from tests.models import sweep, zoo

HEAD = ("model", "nodes", "found", "rewr", "canon", "kept", "smpl", "error", "share", "export",
        "all s")
FORMAT = "{:<26} {:>5} {:>5} {:>5} {:>5} {:>5} {:>4} {:>9} {:>6} {:>6} {:>6}"


def _cells(row: sweep.Row) -> tuple[str, ...]:
    return (
        row.name, str(row.nodes), str(row.found), str(row.rewritten), str(row.canonical),
        str(row.kept), str(row.sampling), f"{row.error:.1e}", f"{row.share:.2f}",
        f"{row.capture_seconds:.1f}", f"{row.seconds:.1f}",
    )


def _cause(reason: str) -> str:
    """A reason without its module path and node, so that the layers of a model are one."""
    text = re.sub(r" \(\w+, ([^)]+)\)$", r" (\1)", reason.partition(": ")[2])
    return re.sub(r" \(\w+\)$", "", text)


def _remarks(row: sweep.Row) -> list[str]:
    out = [f"FAILED: {row.failure}"] if row.failure else []
    if not row.failure and row.share > 1.0:
        out.append("WRONG: outside the acceptance rule")
    if row.missing:
        out.append(f"MISSING: {row.missing}")
    if row.rewritten and row.hits != sweep.DRAWS:
        out.append(f"the call ran the user's own forward: {row.misses}")
    out += row.notes
    if not row.exported:
        out.append("torch.export cannot capture it; calls of an eager run were counted")
    for status, reasons in (("canonical", row.canonical_reasons), ("kept", row.reasons)):
        out += [f"{status} {n}x {reason}" for reason, n in Counter(map(_cause, reasons)).items()]
    return out


def _totals(rows: list[sweep.Row]) -> str:
    def total(name: str) -> int:
        return sum(getattr(row, name) for row in rows)

    whole = [row for row in rows if row.nodes and row.kept == 0 and not row.missing and row.right]
    lines = [
        f"{len(rows)} models, {sum(not row.exported for row in rows)} of them not exportable",
        f"{total('nodes')} softmax and SDPA nodes ({total('dead')} dead ones apart), "
        f"{total('found')} sites found, {total('rewritten')} rewritten, "
        f"{total('canonical')} canonical, {total('kept')} kept; {total('sampling')} of sampling",
        f"{len(whole)} models with every site taken",
        f"{sum(sum(row.missing.values()) for row in rows)} nodes not accounted for",
        f"{sum(row.share > 1.0 for row in rows if not row.failure)} models outside the acceptance "
        f"rule, {sum(bool(row.failure) for row in rows)} failures",
        f"torch.export {total('capture_seconds'):.0f} s, optimize() {total('seconds'):.0f} s",
    ]
    for status, field in (("kept", "reasons"), ("canonical", "canonical_reasons")):
        reasons = Counter(_cause(reason) for row in rows for reason in getattr(row, field))
        lines += [f"{status}, by reason:"]
        lines += [f"  {n:>4}  {reason}" for reason, n in reasons.most_common()]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; the exit status is 1 if a model failed, was wrong or had nodes missing."""
    parser = argparse.ArgumentParser(prog="python -m tests.models", description=__doc__)
    parser.add_argument("--only", metavar="NAME", nargs="+", help="these models only")
    parser.add_argument("--verify", action="store_true", help="verify each rewrite in float64")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the rows here")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    entries = zoo.registry()
    names = options.only or list(entries)
    if unknown := [name for name in names if name not in entries]:
        parser.error(f"NAME must be one of {', '.join(entries)}, got {', '.join(unknown)}")
    print(FORMAT.format(*HEAD), flush=True)
    rows: list[sweep.Row] = []
    for name in names:
        try:
            row = sweep.examine(entries[name], options.verify)
        except Exception as error:
            failure = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
            row = sweep.Row(name, entries[name].family, failure=failure)
        rows.append(row)
        print(FORMAT.format(*_cells(row)), flush=True)
        for remark in _remarks(row):
            print(f"    {remark}", flush=True)
        if options.json:
            options.json.write_text(json.dumps([dataclasses.asdict(r) for r in rows], indent=1))
    print(_totals(rows))
    return int(any(not row.right or row.missing for row in rows))


if __name__ == "__main__":
    sys.exit(main())
