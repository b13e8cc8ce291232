"""SiteRecord: what became of one site in plain strings and numbers, and where a node comes from."""

from __future__ import annotations

import linecache
import os
import re
from dataclasses import dataclass, field
from importlib.util import find_spec

import torch
from torch import fx

KINDS = ("attention", "sampling", "reassociable", "pattern")
STATUSES = ("rewritten", "canonical", "kept")


@dataclass
class SiteRecord:
    """What the report says of one site (DESIGN section 4): plain strings and numbers only."""

    path: str = ""
    source: str = ""
    kind: str = "attention"
    status: str = "kept"
    rule: str = ""
    mask: str = ""
    bias: str = ""
    density: float | None = None
    tile: str = ""
    lowering: str = ""
    predicted_speedup: float | None = None
    error: float | None = None
    reason: str = ""
    #: the normaliser's node, the text of its Spec, and shapes such as "2x4x32x16"
    node: str = ""
    spec: str = ""
    shapes: str = ""
    #: max error of the original and the bound that `error` was held to
    error_original: float | None = None
    error_bound: float | None = None
    #: the approximation that the user asked for, and what it changes on the example: root mean
    #: square of the difference over that of the exact result
    approximation: str = ""
    deviation: float | None = None
    #: with prefer="memory": what is held of queries x keys, and what that costs
    memory: str = ""
    #: share of the scores in tiles that are visited, and a picture of these tiles at the lengths of
    #: the example (`attnopt.ir.mask_picture.parse`)
    tile_density: float | None = None
    picture: str = ""
    #: the text of the source line
    code: str = ""
    #: the generated kernel, a key of the report's `kernels`
    kernel: str = ""
    #: seconds of one call by the cost model; as measured, the author's and the rewritten site's
    #: alone (`Report.measure(sites=True)`), with the median of their ratios and its 95 % interval
    predicted_seconds: float | None = None
    measured_original: float | None = None
    measured_seconds: float | None = None
    measured_speedup: float | None = None
    measured_low: float | None = None
    measured_high: float | None = None
    #: share of the rate that the device's roofline allows, and which of its two bounds that is
    roofline: float | None = None
    roofline_bound: str = ""
    #: the rules that were tried, nearest first, as "rule: first condition that failed"
    tried: list[str] = field(default_factory=list)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made the node, from its `nn_module_stack`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    path = re.sub(r"^(L\['\w+'\]|L__self__)", "", path).lstrip(".")
    return re.sub(r"@\d+$", "", path)


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def _homes() -> tuple[str, ...]:
    """Folders of torch and of the passes, whose frames are not the user's."""
    found = find_spec("attnopt.passes")
    package = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
    folders = [os.path.dirname(torch.__file__), *(
        os.path.join(package, name) for name in ("module.py", "runtime.py", "variants.py"))]
    if found is not None and found.origin:
        folders.append(os.path.dirname(found.origin))
    return tuple(os.path.realpath(f) for f in folders)


_HOMES = _homes()


def source_line(node: fx.Node) -> str:
    """"file.py:123" of the user's own code that made the node: the innermost frame that is not
    torch's, or "" where the capture recorded none."""
    file, line = _frame(node)
    return f"{os.path.basename(file)}:{line}" if file else ""


def source_code(node: fx.Node) -> str:
    """The text of that line, or "" where its file is not at hand."""
    file, line = _frame(node)
    return linecache.getline(file, line).strip() if file else ""


def _frame(node: fx.Node) -> tuple[str, int]:
    frames: list[tuple[str, str]] = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not os.path.realpath(f[0]).startswith(_HOMES)] or frames
    return (own[-1][0], int(own[-1][1])) if own else ("", 0)
