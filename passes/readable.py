"""A graph as text for people: one short line per operation."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnopt.passes.normalize import op_name


def readable(graph: fx.Graph) -> str:
    """The graph as short lines, for people and for diffs."""
    lines = []
    for node in graph.nodes:
        if node.op == "call_function":
            args = ", ".join([*map(_short, node.args),
                              *(f"{k}={_short(v)}" for k, v in node.kwargs.items())])
            value = node.meta.get("val")
            shape = f"  # {tuple(value.shape)}" if isinstance(value, torch.Tensor) else ""
            lines.append(f"{node.name} = {op_name(node)}({args}){shape}")
        elif node.op == "output":
            lines.append(f"return {_short(node.args[0])}")
    return "\n".join(lines)


def _short(arg: Any) -> str:
    if isinstance(arg, (list, tuple)):
        return f"[{', '.join(map(_short, arg))}]"
    return str(arg)
