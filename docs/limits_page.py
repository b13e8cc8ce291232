"""The limits: versions, tolerances, what is approximate, what is not taken and why, measured times.

What attnopt answers where it takes nothing is collected from the code: the text of every `Decline`
and `CaptureError`, and what the kernels' own `reasons` say. `…` stands for what a message fills in.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

from attnopt import agreement, approximations, packaging, program
from attnopt.commands import models
from attnopt.onnx import export as onnx_export
from attnopt.onnx import saving
from attnopt.passes import verify
from attnopt.passes.rules import REGISTRY, cost
from docs.markdown import docstring, first, table
from docs.reasons import GROUPS, collect
from docs.results import measured

ROOT = Path(__file__).parent.parent
_SHOWN = ("torch", "triton", "transformers", "onnx", "onnxscript", "onnxruntime")


def page() -> str:
    """The whole page."""
    return "\n".join(["# Limits", "", "Written by `python -m docs.generate` from the docstrings, "
                      "the code's own answers and `attnopt/bench/results`. How to call what is "
                      "named here: [API reference](api.md).", "", *_versions(), *_exactness(),
                      *_approximate(), *_taken(), *_declined(), *_files(), *measured()])


def _versions() -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pinned = dict(line.split("==") for line in
                  (ROOT / "constraints.txt").read_text("utf-8").splitlines() if "==" in line)
    yield from ("## Versions", "", f"Python {project['requires-python'].removeprefix('>=')} or "
                "later; torch 2.11 to 2.13, on Linux. macOS and Windows should import and run the "
                "ATen lowerings. No version of torch is asked for, so that the build that is "
                "installed stays. Developed and tested with these, the others are meant to work:",
                "")
    yield from (*table(("package", "version"), ((n, pinned[n]) for n in _SHOWN if n in pinned)), "",
                f"Only `{'`, `'.join(_names(project['dependencies']))}` are needed; ONNX export "
                f"needs `{'`, `'.join(_names(project['optional-dependencies']['onnx']))}`.", "")


def _names(requirements: list[str]) -> list[str]:
    return [re.split(r"[^\w-]", text)[0] for text in requirements]


def _exactness() -> Iterator[str]:
    yield from ("## How close results are", "",
                "Exact means: as close to float64 as the author's own code, up to the bound below. "
                "Bits may differ, as sums run in another order.", "", *docstring(verify.__doc__),
                "", "Files are compared once more as a whole, before they appear:", "",
                *docstring(agreement.__doc__), "",
                f"In numbers: {agreement.BOUND:g} of the largest number of the outputs, "
                f"{agreement.BOUND_HALF:g} in bfloat16 and float16.", "")


def _approximate() -> Iterator[str]:
    rows = []
    for name in approximations.__all__:
        kind = getattr(approximations, name)
        rows.append((f"`{name}`", kind.recognizes, first(inspect.getmodule(kind).__doc__)))
    yield from ("## What is approximate", "", "Nothing, unless an instance of one of these is "
                "among the `rules`:", "", *table(("class", "for", "what it does"), rows), "",
                *docstring(approximations.__doc__, skip=2), "")


def _taken() -> Iterator[str]:
    yield from ("## What is taken, and when it pays", "", *table(("rule", "takes", "note"), (
        (f"`{rule.name}`", rule.recognizes, first(inspect.getmodule(type(rule)).__doc__))
        for rule in REGISTRY)), "", *docstring(cost.__doc__, skip=1), "",
        f"So below {cost.FEWEST_SCORES:,} scores (heads and batch included) a site in float32 on a "
        "CPU stays as its author wrote it, and the report says so. Local attention that copies its "
        "keys, and generated kernels, are asked of the cost model one by one.", "")


def _declined() -> Iterator[str]:
    yield from ("## What is left as it was, and why", "",
                "A site that nothing takes keeps its author's code, and the report gives the "
                "reason. These are all the reasons there are, by the step that gives them.", "")
    for title, about, patterns in GROUPS:
        found = collect(patterns)
        count = sum(len(reasons) for _, reasons in found)
        yield from (f"### {title}", "", about, "", "<details>",
                    f"<summary>{count} reasons</summary>", "")
        for where, reasons in found:
            yield from (f"*{where}*", "", *(f"- {reason}" for reason in reasons), "")
        yield from ("</details>", "")


def _files() -> Iterator[str]:
    yield from ("## Saved programs, AOTInductor, ONNX", "",
                *docstring(program.__doc__, skip=1), "",
                *docstring(packaging.__doc__, skip=1), "",
                f"ONNX: opsets {onnx_export.OPSETS[0]} to {onnx_export.OPSETS[-1]}. "
                + first(onnx_export.__doc__.partition("\n\n")[2]), "",
                f"Where the initializers of a model exceed {saving.LARGE / 2 ** 30:g} GiB, the "
                "large ones go to `<path>.data` beside the file, and both must be moved together. "
                "What is no initializer must stay below 2 GB. A file is compared with the model on "
                "the example and, where sizes are dynamic, on two others; NaN must be in the same "
                "places. For other inputs with NaN or infinity nothing is checked, and runtimes "
                "may differ. With approximations among the rules, a file is compared with a "
                "program that has them.", "",
                "What the command line trusts:", "",
                first(models.__doc__.rpartition("\n\n")[2]), "")
