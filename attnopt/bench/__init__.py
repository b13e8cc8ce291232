"""Benchmarks of attnopt itself: `attnopt bench`.

A suite is a function of the `optimize` to be measured; it says its findings line by line and
returns them as plain numbers. Times are CPU seconds of one thread, on an accelerator or with more
threads seconds of the wall, taken in turns (`attnopt.timing`), so that only their ratios carry over
to another machine.
"""

from __future__ import annotations

import datetime
import inspect
import json
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from attnopt import environment
from attnopt.bench import (
    backend,
    bias,
    cpu,
    deformable,
    gpu,
    onnx,
    optimizing,
    overhead,
    sparse,
    spellings,
    summary,
    tiles,
)
from attnopt.errors import OptionError

Suite = Callable[..., dict[str, Any]]
SUITES: dict[str, Suite] = {
    "overhead": overhead.measure,
    "optimize": optimizing.measure,
    "spellings": spellings.measure,
    "cpu": cpu.measure,
    "sparse": sparse.measure,
    "bias": bias.measure,
    "deformable": deformable.measure,
    "backend": backend.measure,
    "onnx": onnx.measure,
    "gpu": gpu.measure,
    "tiles": tiles.measure,
    "gpu-tiles": tiles.measure_gpu,
}
#: suites whose results are rows that a chart can show
_ROWS = ("cpu", "sparse", "bias", "deformable", "onnx", "gpu")
#: results that belong to the repository; an installed package has no such place to write to
RESULTS = Path(__file__).parent / "results"


def run(
    optimize: Callable[..., Any],
    suites: Iterable[str],
    *,
    say: Callable[[str], None] = print,
    **options: Any,
) -> dict[str, Any]:
    """Run suites by name and return one record: machine, versions, date, results by suite.

    options: of the suites (repeats, compiled, quick, full, cases, budget); each gets those that it
    has and that are not None. A suite that finds nothing to run on leaves no results.

    Raises:
        OptionError: no such suite.
    """
    record: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "cpu": environment.processor(),
        "compiler": {k: v for k, v in environment.compiler().items()
                     if k not in ("command", "openmp")},  # paths of one machine
        "accelerators": environment.accelerators(),
        "versions": {k: v for k, v in environment.versions().items() if v},
        "suites": {},
    }
    for name in suites:
        if name not in SUITES:
            raise OptionError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
        say(f"== {name}")
        known = inspect.signature(SUITES[name]).parameters
        fitting = {k: v for k, v in options.items() if k in known and v is not None}
        found = SUITES[name](optimize, say=say, **fitting)
        if found:
            record["suites"][name] = found
    return record


def save(record: dict[str, Any], path: str | os.PathLike[str] | None = None) -> Path | None:
    """Write a record as JSON to `path`, or in a checkout to one file per suite in RESULTS.

    A chart of each suite that has rows goes beside it, where matplotlib is installed. Returns what
    was written (the folder, for several files), None where nothing was.
    """
    if path is not None:
        path = Path(path)
        _write(path, record)
        for suite in set(_ROWS) & set(record["suites"]):
            _chart(path.with_name(f"{path.stem}-{suite}.svg"), record, suite)
        return path
    if not (RESULTS.parent.parent.parent / "pyproject.toml").is_file():
        return None
    RESULTS.mkdir(exist_ok=True)
    for suite, found in record["suites"].items():
        device = re.sub(r"[^a-z0-9]+", "-", _device(record, suite).lower()).strip("-")
        _write(RESULTS / f"{suite}-{device}.json", {**record, "suites": {suite: found}})
        if suite in _ROWS:
            _chart(RESULTS / f"{suite}-{device}.svg", record, suite)
    return RESULTS


def _device(record: dict[str, Any], suite: str) -> str:
    if suite.startswith("gpu") and record["accelerators"]:
        return str(record["accelerators"][0])
    return str(record["cpu"]["model"])


def _chart(path: Path, record: dict[str, Any], suite: str) -> None:
    title = f"{_device(record, suite)}, torch {record['versions']['torch']}, {record['date']}"
    summary.chart(record["suites"][suite], path, title)


def _write(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
