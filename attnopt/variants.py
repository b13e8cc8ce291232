"""Variant: a rewritten graph, when it may run, and how it is called.

A variant is right for the call that it was captured from and for every call that agrees with it in
all that the trace could see. All of that is compared at each call, cheapest first; the first
difference is the reason for which the call runs the user's own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from attnopt.calls import Call
from attnopt.direct_calls import with_direct_calls
from attnopt.errors import AttnOptError
from attnopt.leaf_checks import TENSORS, aliases, leaf_check
from attnopt.passes.capture.autocast import autocast_off, autocast_state
from attnopt.passes.capture.export import Traced, find_slot
from attnopt.passes.capture.guards import ValueGuard
from attnopt.passes.capture.regions import enter_grad_mode

try:  # torch's own check of many tensors at once; private, so do without where it is not
    from torch._C._dynamo import guards as _native
except ImportError:
    _native = None  # type: ignore[assignment]
_TensorGuards: Any = getattr(_native, "TensorGuards", None)

_MAX_REBUILDS = 8


class Variant:
    """One rewritten graph of a module.

    Args:
        traced: the capture and its conditions.
        module: the rewritten graph, with the captured graph's placeholders.
        guards: the values of buffers and constants that the rewrite relies on.
        call: the call that was captured.
        model: the user's module, where the lifted tensors are looked up.
        useful: whether anything in it is better than the author's own forward.
    """

    def __init__(self, traced: Traced, module: fx.GraphModule, guards: Sequence[ValueGuard],
                 call: Call, model: nn.Module, *, useful: bool = True) -> None:
        captured = traced.captured
        self.module = module
        self.state = traced.state
        self.useful = useful
        self.structure = call.structure
        self.autocast = autocast_state()
        self._default_dtype = torch.get_default_dtype()
        self._fits = traced.sizes.fits
        self._without_grad, self._with_grad = traced.without_grad, traced.with_grad
        names = call.names()
        inputs = [n.meta.get("val") for n in captured.placeholders
                  if captured.origins[n.name].kind == "input"]
        self._leaves = [leaf_check(leaf, fake, name)
                        for leaf, fake, name in zip(call.leaves, inputs, names, strict=True)]
        self._aliases = aliases(call.leaves)
        self._slots: list[tuple[dict[str, Any], str]] = []
        self._find_slots(traced, model)
        values = [d[k] for d, k in self._slots]
        self._tensors = _TensorCheck(values)
        self._ties = _ties(values)
        self._flags = _flags(values, call.leaves) if traced.reads_flags else None
        self._guards = [(self._guarded_slot(g, model), g) for g in (*traced.guards, *guards)]
        self._restore_grad = any(n.target is enter_grad_mode for n in module.graph.nodes)
        self._runnable = with_direct_calls(module)
        self._forward: Callable[..., Any] = self._runnable.forward
        self._out_spec = captured.out_spec
        self._out_kind = _simple(captured.out_spec)

    def _find_slots(self, traced: Traced, model: nn.Module) -> None:
        captured = traced.captured
        placeholders = [n.name for n in self.module.graph.nodes if n.op == "placeholder"]
        if placeholders != list(captured.origins):
            raise AttnOptError("a rewritten graph must keep the captured graph's placeholders, "
                               f"got {placeholders}")
        for name, origin in captured.origins.items():
            if origin.kind == "input":
                continue
            home = find_slot(model, origin.path) if origin.held else None
            self._slots.append(home or ({"literal": captured.values[name]}, "literal"))
        self._slot_names = [n for n, o in captured.origins.items() if o.kind != "input"]

    def _guarded_slot(self, guard: ValueGuard, model: nn.Module) -> tuple[dict[str, Any], str]:
        if guard.placeholder in self._slot_names:
            return self._slots[self._slot_names.index(guard.placeholder)]
        home = find_slot(model, guard.path)
        if home is None:
            raise AttnOptError(f"a guard must name a tensor of the model, got {guard.path}")
        return home

    # -- matching -----------------------------------------------------------------------------

    def match(self, call: Call) -> list[Any] | str:
        """The values of the lifted tensors where the variant is right for this call, else why it
        is not."""
        if call.structure != self.structure:
            return "other arguments"
        for leaf, check in zip(call.leaves, self._leaves, strict=True):
            if (why := check(leaf)) is not None:
                return why
        if self._fits is not None and not self._fits(call.leaves):
            return "sizes outside the captured range"
        if len(self._leaves) > 1 and aliases(call.leaves) != self._aliases:
            return "arguments that are one object, or no longer are"
        if autocast_state() != self.autocast:
            return "another autocast state"
        if torch.is_grad_enabled():
            if self._without_grad is not None:
                return f"gradients on, with {self._without_grad}"
        elif self._with_grad is not None:
            return f"gradients off, with {self._with_grad}"
        if not self.state.same_tree():
            return "a submodule was replaced or hooked"
        if not self.state.same_values():
            return self._changed()
        if torch.get_default_dtype() is not self._default_dtype:
            return "another default dtype"
        try:
            values = [d[k] for d, k in self._slots]
        except KeyError as missing:
            return f"tensor {missing} is gone"
        if not self._tensors.same(values):
            return "another dtype, device or shape of a parameter or buffer"
        if self._flags is not None and _flags(values, call.leaves) != self._flags:
            return "another requires_grad"
        for first, second in self._ties:
            if values[first] is not values[second]:
                return "tied tensors are no longer one"
        for (tensors, name), guard in self._guards:
            if not guard.holds(tensors[name]):
                return f"the values of {guard.path} changed"
        return values

    def _changed(self) -> str:
        name = (self.state.changed() or "an attribute").rpartition(".")[2]
        return "another training flag" if name == "training" else f"another value of self.{name}"

    @property
    def stale(self) -> bool:
        """Whether it can hardly ever match again: the module tree is another one, or the values
        that it relies on changed."""
        if not self.state.same_tree():
            return True
        try:
            return not all(g.holds(tensors[name]) for (tensors, name), g in self._guards)
        except KeyError:
            return True

    # -- running ------------------------------------------------------------------------------

    def run(self, values: list[Any], leaves: list[Any]) -> Any:
        """Run the graph on the lifted tensors' values and the flat inputs."""
        if self.autocast:
            with autocast_off(self.autocast):
                return self._run(values, leaves)
        return self._run(values, leaves)

    def _run(self, values: list[Any], leaves: list[Any]) -> Any:
        if self._restore_grad:
            before = torch.is_grad_enabled()
            try:
                flat = self._forward(*values, *leaves)
            finally:
                torch._C._set_grad_enabled(before)
        else:
            flat = self._forward(*values, *leaves)
        if self._out_kind is None:
            return flat[0]
        if self._out_kind is tuple:
            return tuple(flat)
        assert self._out_spec is not None
        return pytree.tree_unflatten(flat, self._out_spec)


def _flags(values: Sequence[Any], leaves: Sequence[Any]) -> list[bool]:
    return [v.requires_grad for v in (*values, *leaves) if isinstance(v, torch.Tensor)]


def _simple(spec: pytree.TreeSpec | None) -> Any:
    """None for one leaf, `tuple` for a flat tuple, else `pytree`."""
    if spec is None or spec.is_leaf():
        return None
    flat = spec.num_leaves == spec.num_children and spec.num_nodes == spec.num_leaves + 1
    return tuple if spec.type is tuple and flat else pytree


def _ties(values: Sequence[Any]) -> list[tuple[int, int]]:
    first: dict[int, int] = {}
    pairs = [(first.setdefault(id(v), i), i) for i, v in enumerate(values)]
    return [(a, b) for a, b in pairs if a != b]


class _TensorCheck:
    """Class, dtype, device and shape of many tensors, compared in one native call.

    That call also compares things that are free to change (requires_grad, being a Parameter), so
    where it says no, the comparison is made again here, and the native check is made anew for the
    tensors as they are.
    """

    def __init__(self, values: Sequence[torch.Tensor]) -> None:
        self._expected = [(v.dtype, v.device, v.shape) for v in values]
        self._native: Any = None
        self._rebuilds = 0
        if all(type(v) in TENSORS for v in values):
            self._rebuild(values)

    def same(self, values: Sequence[torch.Tensor]) -> bool:
        native = self._native
        if native is not None and native.check(*values):
            return True
        for value, (dtype, device, shape) in zip(values, self._expected, strict=True):
            if type(value) not in TENSORS or value.dtype is not dtype:
                return False
            if value.device != device or value.shape != shape:
                return False
        if self._rebuilds < _MAX_REBUILDS:
            self._rebuild(values)
        return True

    def _rebuild(self, values: Sequence[torch.Tensor]) -> None:
        self._rebuilds += 1
        if _TensorGuards is None or not values:
            return
        sizes = [list(v.shape) for v in values]
        strides: list[list[None]] = [[None] * v.dim() for v in values]
        self._native = _TensorGuards(*values, dynamic_dims_sizes=sizes,
                                     dynamic_dims_strides=strides)
