"""Make the casts of autocast explicit, so that a graph means the same with autocast off.

In the raw graph an operation under autocast has no casts: they happen when it runs. Every pass
would have to know torch's cast lists. Instead each operation is tried on fake tensors, once as it
runs under autocast and once for each way of casting its arguments first (not at all, all to the
lower precision, all to float32, all to the widest). The way that gives the same inner operations
on the same dtypes is written into the graph as `aten.to` nodes. What none of them explains keeps
an autocast region of its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attnopt.passes.capture.regions import REGION, enter_autocast, leave_autocast

_TO = torch.ops.aten.to.dtype
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_LEAVE_NODE = (leave_autocast, torch.amp.autocast_mode._exit_autocast)
_ENTER_NODE = (enter_autocast, torch.amp.autocast_mode._enter_autocast)
#: what is right for an operation: no cast, a dtype for all its floating arguments, or a region
_UNKNOWN = "region"

Settings = dict[str, torch.dtype]


def autocast_state() -> tuple[tuple[str, torch.dtype], ...]:
    """The device types for which autocast is on, with their dtype."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple((device, torch.get_autocast_dtype(device))
                 for device in _device_types() if torch.is_autocast_enabled(device))


def _device_types() -> tuple[str, ...]:
    return ("cpu", "cuda", "xpu", "mps", "hpu", torch._C._get_privateuse1_backend_name())


@contextlib.contextmanager
def autocast_off(state: tuple[tuple[str, torch.dtype], ...]) -> Iterator[None]:
    """Autocast off for the device types of `state`."""
    for device, _ in state:
        torch.set_autocast_enabled(device, False)
    try:
        yield
    finally:
        for device, _ in state:
            torch.set_autocast_enabled(device, True)


def bake_autocast(module: fx.GraphModule, ambient: Settings) -> None:
    """Write the casts of autocast into the graph, in place.

    Args:
        module: a flat graph; its regions are `enter_autocast` and `leave_autocast` nodes.
        ambient: dtype by device type for which autocast is on around the whole graph.
    """
    nodes = list(module.graph.nodes)
    if not ambient and not any(n.target in _ENTER_NODE for n in nodes):
        return
    baker = _Baker(module.graph)
    stack: list[Settings] = [dict(ambient)]
    regions: list[fx.Node] = []
    for node in nodes:
        if node.target in _ENTER_NODE:
            stack.append(_entered(stack[-1], node))
            regions.append(node)
        elif node.target in _LEAVE_NODE:
            stack.pop()
            regions.append(node)
        elif node.op == "call_function" and stack[-1]:
            baker.bake(node, stack[-1])
    for node in reversed(regions):
        module.graph.erase_node(node)
    module.recompile()


def _entered(outer: Settings, node: fx.Node) -> Settings:
    names = ("device", "dtype", "enabled", "cache")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    device, inner = given["device"], dict(outer)
    inner.pop(device, None)
    if given.get("enabled", True):
        inner[device] = given.get("dtype") or torch.get_autocast_dtype(device)
    return inner


@dataclass
class _Baker:
    graph: fx.Graph

    def __post_init__(self) -> None:
        self._decisions: dict[Any, Any] = {}
        self._casts: dict[Any, fx.Node] = {}

    def bake(self, node: fx.Node, settings: Settings) -> None:
        """Cast the arguments of one node as autocast would."""
        inputs = [n for n in node.all_input_nodes if _is_float(n.meta.get("val"))]
        devices = {n.meta["val"].device.type for n in inputs}
        if len(devices) != 1 or (dtype := settings.get(devices.pop())) is None:
            return
        device = inputs[0].meta["val"].device.type
        key = (node.target, dtype, device, _signature(node))
        if key not in self._decisions:
            self._decisions[key] = _decide(node, device, dtype)
        decision = self._decisions[key]
        if decision is None:
            return
        if decision == _UNKNOWN:
            self._keep_region(node, device, dtype)
            return
        replaced = {n: self._cast(n, decision, node) for n in inputs
                    if n.meta["val"].dtype is not decision}
        node.args = fx.map_arg(node.args, lambda n: replaced.get(n, n))
        node.kwargs = fx.map_arg(node.kwargs, lambda n: replaced.get(n, n))

    def _cast(self, source: fx.Node, dtype: torch.dtype, user: fx.Node) -> fx.Node:
        key = (source, dtype, user.meta.get(REGION))
        if key in self._casts:
            return self._casts[key]
        with self.graph.inserting_before(user):
            cast = self.graph.call_function(_TO, (source, dtype))
        cast.meta = {k: user.meta[k] for k in ("stack_trace", "nn_module_stack", REGION)
                     if k in user.meta}
        with _fake_mode(source), torch.enable_grad():
            cast.meta["val"] = source.meta["val"].to(dtype)
        if source.op == "placeholder" and source.name.startswith("p_"):
            self._casts[key] = cast  # parameters: nothing in the graph writes to them
        return cast

    def _keep_region(self, node: fx.Node, device: str, dtype: torch.dtype) -> None:
        with self.graph.inserting_before(node):
            region = self.graph.call_function(enter_autocast, (device, dtype, True, False))
        with self.graph.inserting_after(node):
            leave = self.graph.call_function(leave_autocast, (region,))
        for new in (region, leave):
            new.meta = {"val": None, REGION: node.meta.get(REGION)}


def _signature(node: fx.Node) -> Any:
    values = pytree.tree_map(
        lambda a: a.meta.get("val") if isinstance(a, fx.Node) else a, (node.args, node.kwargs))
    return tuple((v.dtype, v.dim()) if isinstance(v, torch.Tensor) else str(v)
                 for v in pytree.tree_leaves(values))


def _decide(node: fx.Node, device: str, dtype: torch.dtype) -> Any:
    """None for no cast, a dtype to cast to, or `_UNKNOWN`."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None if not callable(node.target) or _is_plain_function(node) else _UNKNOWN
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    widest = max((v.dtype for v in pytree.tree_leaves((args, kwargs)) if _is_float(v)),
                 key=lambda d: torch.finfo(d).bits)
    try:
        with torch.autocast(device, dtype=dtype, cache_enabled=False):
            wanted = _record(node, args, kwargs)
    except Exception:  # cannot be run on fakes alone: leave it as it is
        return _UNKNOWN
    for candidate in dict.fromkeys((None, dtype, torch.float32, widest)):
        with contextlib.suppress(Exception), torch.autocast(device, enabled=False):
            given = (args, kwargs) if candidate is None else _cast_all(node, args, kwargs,
                                                                        candidate)
            if _record(node, *given) == wanted:
                return candidate
    return _UNKNOWN


def _is_plain_function(node: fx.Node) -> bool:
    return not isinstance(node.target, torch._ops.HigherOrderOperator)


def _cast_all(node: fx.Node, args: Any, kwargs: Any, dtype: torch.dtype) -> Any:
    with _fake_mode(node), torch.no_grad():
        return pytree.tree_map(lambda v: v.to(dtype) if _is_float(v) else v, (args, kwargs))


class _Record(TorchDispatchMode):
    """The operations below autocast, with the dtypes of their tensors, casts left out."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.ops.aten._to_copy.default and func.namespace != "prim":
            self.seen.append((func, [v.dtype for v in pytree.tree_leaves((args, kwargs))
                                     if isinstance(v, torch.Tensor)]))
        return func(*args, **(kwargs or {}))


def _record(node: fx.Node, args: Any, kwargs: Any) -> Any:
    with _fake_mode(node), torch.no_grad(), _Record() as record:
        result = node.target(*args, **kwargs)
    return record.seen, [v.dtype for v in pytree.tree_leaves(result)
                         if isinstance(v, torch.Tensor)]


def _fake_mode(node: fx.Node) -> FakeTensorMode | contextlib.nullcontext[None]:
    for candidate in (node, *node.all_input_nodes):
        for value in pytree.tree_leaves(candidate.meta.get("val")):
            if isinstance(value, FakeTensor):
                mode: FakeTensorMode = value.fake_mode
                return mode
    return contextlib.nullcontext()


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype in _FLOATS
