"""Compare a model before and after its traced forward, from inside the trace.

A graph holds the operations of a forward, not what it does to Python objects: assigned attributes
and buffers, entries put into a container that it was given, objects with a state of their own that
it returns. The tracer undoes or drops these without a word, so they are looked for here, while they
are still to be seen.
"""

from __future__ import annotations

import enum
import functools
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from attnopt.errors import CaptureError
from attnopt.passes.capture.module_state import ModuleState
from attnopt.passes.capture.watch import Watch

#: Python values that an argument may hold; any other object may have state of its own
PLAIN = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis), slice, torch.dtype,
         torch.device, torch.layout, torch.memory_format, enum.Enum)


def observe_forward(view: nn.Module, watch: Watch, found: list[CaptureError]) -> None:
    """Compare the view and the arguments' containers before and after the author's forward."""
    if isinstance(view, fx.GraphModule):
        return  # the tracer interprets its graph and never calls forward
    original = view.forward

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        before, tensors = ModuleState(view), _tensor_slots(view)
        flat, spec = pytree.tree_flatten((args, kwargs))
        watch.in_forward = True
        try:
            result = original(*args, **kwargs)
        finally:
            watch.in_forward = False
        if not before.same_tree():
            found.append(CaptureError("forward changes the model's modules", transient=True))
        elif not before.same_values():
            found.append(CaptureError(f"forward assigns self.{before.changed()}", transient=True))
        for (name, then), (_, now) in zip(tensors, _tensor_slots(view), strict=False):
            if then is not now:
                found.append(CaptureError(f"forward assigns the buffer {name}"))
        after, spec_after = pytree.tree_flatten((args, kwargs))
        if spec != spec_after or any(a is not b for a, b in zip(flat, after, strict=True)):
            found.append(CaptureError("forward changes a container that it was given"))
        return _only_tensors(result, watch)

    view.__dict__["forward"] = forward


def _only_tensors(result: Any, watch: Watch) -> Any:
    """The result as it is where a graph can return it, else the tensors in it."""
    leaves = pytree.tree_leaves(result)
    unknown = [leaf for leaf in leaves if not isinstance(leaf, (torch.Tensor, torch.SymInt,
                                                                torch.SymFloat, *PLAIN))]
    if not unknown:
        return result
    watch.opaque = type(unknown[0]).__name__
    found: dict[int, torch.Tensor] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, torch.Tensor):
            found[id(value)] = value
        elif depth < 4 and isinstance(value, (list, tuple, dict)):
            for entry in value.values() if isinstance(value, dict) else value:
                visit(entry, depth + 1)
        elif depth < 4 and isinstance(getattr(value, "__dict__", None), dict):
            visit(value.__dict__, depth + 1)

    for leaf in leaves:
        visit(leaf, 0)
    return tuple(found.values())


def _tensor_slots(view: nn.Module) -> list[tuple[str, Any]]:
    return [(f"{path}.{name}".lstrip("."), tensor) for path, module in view.named_modules()
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()]
