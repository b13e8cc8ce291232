"""`x.data` as `x.detach()` in graphs of Dynamo, which a second trace would lose track of.

    whole = x.new_zeros(1, 40, 16);  whole.data[:, 8:].copy_(positions)          (CogVideoX)

Both share the memory of x and have no gradient. Autograd does not notice a write through `x.data`
but one through `x.detach()`: what it saved of x before such a write is out of date then.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from attnopt.errors import CaptureError

_DATA = getattr(torch._C._autograd, "_get_data_attr", None)
_WRITES = frozenset((operator.setitem, operator.iadd, operator.isub, operator.imul,
                     operator.itruediv, operator.ifloordiv, operator.ipow))


class Retrace(fx.Interpreter):
    """Runs a graph of Dynamo's for a second trace.

    Raises:
        CaptureError: gradients may be recorded, and a write through x.data may come after x was
            saved for one.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        if torch.is_grad_enabled() and any(map(_written_late, module.graph.nodes)):
            raise CaptureError("x.data is written after x was used while gradients are recorded")

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is _DATA and target is not None:
            return args[0].detach()
        return super().call_function(target, args, kwargs)


def _written_late(node: fx.Node) -> bool:
    """Is what follows from x.data written behind another use of x?"""
    if node.target is not _DATA or _DATA is None:
        return False
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    reached, stack = {node}, [node]
    while stack:
        reached.update(new := [u for u in stack.pop().users if u not in reached])
        stack += new
    writes = [order[n] for n in reached if _is_write(n)]
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return bool(writes) and any(order[user] < max(writes) for user in source.users
                                if user is not node)


def _is_write(node: fx.Node) -> bool:
    if node.op not in ("call_method", "call_function"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.target in _WRITES or bool({"out", "inplace"} & node.kwargs.keys()) or (
        name.endswith("_") and not name.endswith("__"))
