"""Benchmarks of attnopt itself: `attnopt bench`.

A suite is a function of the `optimize` to be measured; it says its findings line by line and
returns them as plain numbers. All times are CPU seconds of one thread, taken in turns
(`attnopt.timing`), so that only their ratios carry over to another machine.
"""

from __future__ import annotations

import datetime
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from attnopt import environment
from attnopt.bench import optimizing, overhead, spellings
from attnopt.errors import OptionError

Suite = Callable[..., dict[str, Any]]
SUITES: dict[str, Suite] = {
    "overhead": overhead.measure,
    "optimize": optimizing.measure,
    "spellings": spellings.measure,
}
#: results that belong to the repository; an installed package has no such place to write to
RESULTS = Path(__file__).parent / "results"


def run(
    optimize: Callable[..., Any],
    suites: Iterable[str],
    *,
    repeats: int | None = None,
    compiled: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run suites by name and return one record: machine, versions, date, results by suite.

    Raises:
        OptionError: no such suite.
    """
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": environment.processor(),
        "accelerators": environment.accelerators(),
        "versions": {k: v for k, v in environment.versions().items() if v},
        "suites": {},
    }
    for name in suites:
        if name not in SUITES:
            raise OptionError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
        say(f"== {name}")
        options: dict[str, Any] = {"repeats": repeats} if repeats else {}
        if name == "spellings":
            options["compiled"] = compiled
        record["suites"][name] = SUITES[name](optimize, say=say, **options)
    return record


def save(record: dict[str, Any], path: str | os.PathLike[str] | None = None) -> Path | None:
    """Write a record as JSON to `path`, or in a checkout to one file per suite in RESULTS.

    Returns what was written (the folder, for several files), None where nothing was.
    """
    if path is not None:
        _write(Path(path), record)
        return Path(path)
    if not (RESULTS.parent.parent.parent / "pyproject.toml").is_file():
        return None
    RESULTS.mkdir(exist_ok=True)
    device = re.sub(r"[^a-z0-9]+", "-", record["cpu"]["model"].lower()).strip("-")
    for suite, found in record["suites"].items():
        _write(RESULTS / f"{suite}-{device}.json", {**record, "suites": {suite: found}})
    return RESULTS


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
