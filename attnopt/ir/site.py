"""SiteRecord: what became of one site in plain strings and numbers, and where a node comes from."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from typing import Any

from torch import fx

KINDS = ("attention", "sampling", "reassociable")
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
    #: the rules that were tried, nearest first, as "rule: first condition that failed"
    tried: list[str] = field(default_factory=list)


def module_path(node: fx.Node) -> str:
    """Dotted path of the module whose forward made the node, from its `nn_module_stack`."""
    stack = node.meta.get("nn_module_stack") or {}
    path = ""
    for entry in stack.values():
        path = entry[0] if isinstance(entry, tuple) else str(entry)
    path = path.removeprefix("L['self']").removeprefix("L__self__").lstrip(".")
    return re.sub(r"@\d+$", "", path)


_FRAME = re.compile(r'File "([^"]+)", line (\d+)')
_INTERNAL = re.compile(r"[/\\](torch|attnopt)[/\\](?!.*tests[/\\])")


def source_line(node: fx.Node) -> str:
    """"file.py:123" of the user's own code that made the node: the innermost frame that is not
    torch's, or "" where the capture recorded none."""
    frames: list[tuple[str, str]] = _FRAME.findall(node.meta.get("stack_trace") or "")
    own = [f for f in frames if not _INTERNAL.search(f[0])] or frames
    return f"{os.path.basename(own[-1][0])}:{own[-1][1]}" if own else ""


def describe_shape(tensor: Any) -> str:
    """"2x4x32x16" of a tensor, symbolic lengths by name."""
    return "x".join(str(s) for s in tensor.shape)
