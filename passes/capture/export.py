"""Capture a model's call as one graph with torch.export.

What is exported is a view of the model (module_view), with gradients on (an export under `no_grad`
loses the author's own `no_grad` regions) and nn.MultiheadAttention's opaque fast path off. The raw
training-IR graph is kept: it has the author's in-place operations, buffer updates, dropout and
aliasing, so running it is the author's call. It is flattened (regions), freed of the tensor asserts
that make a graph fail after `.to()`, and returned with everything that has to hold at a later call
for the graph to be right.
"""

from __future__ import annotations

import builtins
import contextlib
import logging
import re
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from attnopt.errors import CaptureError
from attnopt.ir.captured import Captured, Origin, OriginKind
from attnopt.passes.capture import observe, opaque
from attnopt.passes.capture.autocast import autocast_state, bake_autocast
from attnopt.passes.capture.guards import ValueGuard, private_copy
from attnopt.passes.capture.module_state import ModuleState
from attnopt.passes.capture.module_view import view_of
from attnopt.passes.capture.observe import PLAIN, observe_forward
from attnopt.passes.capture.regions import REGION, inline_regions
from attnopt.passes.capture.scalars import settle_numbers
from attnopt.passes.capture.sizes import Sizes, sizes_of
from attnopt.passes.capture.watch import Watch

#: torch.export patches global state, so captures of all models take turns
CAPTURE_LOCK = threading.RLock()

_TENSORS = (torch.Tensor, nn.Parameter, nn.Buffer)


_OWN_FRAME = re.compile(
    rf'File "{re.escape(observe.__file__)}", line \d+, in \w+\n    .*(?:\n  |$)')


@dataclass
class Traced:
    """A captured graph and what must hold at a call for it to be right, tensors aside.

    state: the module tree's Python state
    sizes: the conditions on symbolic sizes
    guards: constants whose values the trace read
    without_grad: why it is right only where no gradient is recorded, else None
    with_grad: why it is right only where the gradient mode is on, else None
    reads_flags: the author's code read `requires_grad` of a tensor
    """

    captured: Captured
    state: ModuleState
    sizes: Sizes
    guards: tuple[ValueGuard, ...] = ()
    without_grad: str | None = None
    with_grad: str | None = None
    reads_flags: bool = False


def capture(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> Traced:
    """Capture the call `model(*args, **kwargs)` in the model's present state.

    Neither the model nor the inputs nor any random generator is changed.

    Raises:
        CaptureError: the call cannot be brought into one graph.
    """
    kwargs = dict(kwargs or {})
    with CAPTURE_LOCK:
        state = ModuleState(model)
        if (path := state.hooked) is not None:
            raise CaptureError(f"submodule {path} has forward or backward hooks")
        leaves = pytree.tree_leaves((args, kwargs))
        check_leaves(leaves)
        watch = Watch()
        program, problem = _export(model, args, kwargs, dynamic_shapes, watch, state)
        try:
            traced = _traced(model, program, leaves, watch, state)
        except CaptureError as error:
            raise problem or error from None
        if problem is not None:
            problem.seen = traced
            raise problem
        return traced


def check_leaves(leaves: list[Any]) -> None:
    """That the inputs are plain tensors and values.

    Raises:
        CaptureError: an input is an object with state of its own, or a tensor subclass.
    """
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            if type(leaf) not in _TENSORS or torch._C._functorch.is_functorch_wrapped_tensor(leaf):
                raise CaptureError(f"an input is a {type(leaf).__name__}, not a plain tensor",
                                   front_end=False)
            if leaf.layout is not torch.strided or leaf.is_quantized or leaf.is_nested:
                raise CaptureError("an input tensor is not dense", front_end=False)
        elif not isinstance(leaf, PLAIN):
            raise CaptureError(f"an input is a {type(leaf).__name__}, which may have a state")


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any,
            watch: Watch, state: ModuleState
            ) -> tuple[torch.export.ExportedProgram, CaptureError | None]:
    """The exported program, with what stands in the way of running it."""
    view = view_of(model)
    held = {id(t) for m in state.modules for d in (m._parameters, m._buffers, m.__dict__)
            for t in d.values() if isinstance(t, torch.Tensor)}
    args, kwargs = pytree.tree_map_only(
        torch.Tensor, lambda t: _alias(t) if id(t) in held else t, (args, kwargs))
    found: list[CaptureError] = []
    observe_forward(view, watch, found)
    try:
        with _surroundings(), watch.watching(), opaque.taking():
            program = torch.export.export(view, args, kwargs, dynamic_shapes=dynamic_shapes,
                                          strict=False)
    except CaptureError:
        raise
    except Exception as error:
        raise (found[0] if found else CaptureError(_one_line(error))) from error
    finally:
        changed = state.restore_objects()
    if changed is not None:
        found.append(CaptureError(f"forward changes {changed}, which an object of the model holds",
                                  transient=True))
    if watch.draws is not None:
        found.append(CaptureError(f"forward draws from {watch.draws}"))
    if watch.opaque is not None:
        found.append(CaptureError(f"forward returns a {watch.opaque}, which may have a state"))
    return program, found[0] if found else None


@contextlib.contextmanager
def _surroundings() -> Iterator[None]:
    """Gradients on, the opaque fast path of nn.MultiheadAttention off, the tracer quiet."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    logger = logging.getLogger("torch.export")
    level = logger.level
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        logger.setLevel(logging.CRITICAL)
        with torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        logger.setLevel(level)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Another object with the same storage, so that the tracer does not take an input for the
    parameter or buffer that it is."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _traced(model: nn.Module, program: torch.export.ExportedProgram, leaves: list[Any],
            watch: Watch, state: ModuleState) -> Traced:
    module, signature = program.graph_module, program.graph_signature
    for output in signature.output_specs:
        if output.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"the graph has an output of kind {output.kind.name}")
    _clean(module)
    nodes = [n for n in module.graph.nodes if n.op == "placeholder"]
    inputs = [n for n, s in zip(nodes, signature.input_specs, strict=True)
              if s.kind is InputKind.USER_INPUT]
    if len(inputs) != len(leaves) or nodes[len(nodes) - len(inputs):] != inputs:
        raise CaptureError(f"the graph must take {len(leaves)} user inputs at its end, "
                           f"got {len(inputs)}")
    origins: dict[str, Origin] = {}
    values: dict[str, Any] = {}
    flat = iter(leaves)
    for node, spec in zip(nodes, signature.input_specs, strict=True):
        if spec.kind is InputKind.USER_INPUT:
            name = spec.arg.name if isinstance(spec.arg, TensorArgument) else node.name
            origins[node.name], values[node.name] = Origin("input", name, False), next(flat)
        else:
            origins[node.name], values[node.name] = _lifted(model, program, spec)
    _check_literals(origins, values, state)
    sizes = sizes_of([n.meta.get("val") for n in inputs])
    if sizes.fits is not None and not sizes.fits(leaves):
        raise CaptureError("the traced conditions on sizes do not hold for the example inputs")
    captured = Captured(
        graph_module=module, origins=origins, values=values, in_spec=program.call_spec.in_spec,
        out_spec=program.call_spec.out_spec, symbols=sizes.symbols, conditions=sizes.conditions,
        front_end="export", model_name=type(model).__name__,
        training=any(m.training for m in model.modules()))
    guards = opaque.settle(captured) + (_read_constants(state) if watch.reads_values else ())
    return Traced(captured, state, sizes, guards, watch.without_grad, watch.with_grad,
                  watch.reads_flags)


def _read_constants(state: ModuleState) -> tuple[ValueGuard, ...]:
    """Guards of all tensors in plain attributes: the trace read a number out of one of them."""
    return tuple(
        ValueGuard("", f"{state.names[id(m.__dict__)]}.{name}".lstrip("."), private_copy(tensor))
        for m in state.modules for name, tensor in m.__dict__.items()
        if type(tensor) in _TENSORS and tensor.layout is torch.strided)


def _lifted(model: nn.Module, program: torch.export.ExportedProgram, spec: Any
            ) -> tuple[Origin, torch.Tensor]:
    """Origin and live value of a tensor that the tracer lifted out of the model."""
    kinds: dict[Any, OriginKind] = {
        InputKind.PARAMETER: "parameter", InputKind.BUFFER: "buffer",
        InputKind.CONSTANT_TENSOR: "constant"}
    if spec.kind not in kinds:
        raise CaptureError(f"the graph has an input of kind {spec.kind.name}")
    home = find_slot(model, spec.target)
    if home is not None:
        _check_tensor(spec.target, home[0][home[1]])
        return Origin(kinds[spec.kind], spec.target), home[0][home[1]]
    value = program.constants.get(spec.target)
    _check_tensor(spec.target, value)
    return Origin("constant", spec.target, held=False), value


def _check_tensor(path: str, value: Any) -> None:
    if type(value) not in _TENSORS:
        raise CaptureError(f"{path} is a {type(value).__name__}, not a plain tensor",
                           front_end=False)


def find_slot(model: nn.Module, path: str) -> tuple[dict[str, Any], str] | None:
    """The dictionary and key in which a module holds the tensor of a dotted path."""
    owner, _, name = path.rpartition(".")
    try:
        module = model.get_submodule(owner)
    except AttributeError:
        return None
    for tensors in (module._parameters, module._buffers, module.__dict__):
        if isinstance(tensors.get(name), torch.Tensor):
            return tensors, name
    return None


def _check_literals(origins: dict[str, Origin], values: dict[str, Any],
                    state: ModuleState) -> None:
    """A literal must not be a parameter or buffer that the author reached by another way than
    through the module that holds it: the trace cannot follow it when it is replaced."""
    literals = [n for n, o in origins.items() if o.kind == "constant" and not o.held]
    if not literals:
        return
    held = {_storage(t): name for m in state.modules for d in (m._parameters, m._buffers)
            for name, t in d.items() if isinstance(t, torch.Tensor)}
    for name in literals:
        if isinstance(values[name], FakeTensor):
            raise CaptureError("forward makes a tensor that the tracer could not follow")
        if values[name].numel() and (known := held.get(_storage(values[name]))) is not None:
            raise CaptureError(f"forward reaches the tensor {known} through an object that is "
                               "not a module")


def _storage(tensor: torch.Tensor) -> Any:
    try:
        return tensor.untyped_storage()._cdata
    except Exception:  # a subclass without storage
        return id(tensor)


def _clean(module: fx.GraphModule) -> None:
    """Drop the asserts on dtype and device (they fail after `.to()`), inline the regions, and take
    the observer's frame out of the stack traces. An argument called `input` gets a name that a copy
    of the graph keeps."""
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
        elif hasattr(builtins, node.name):
            node.name = module.graph._graph_namespace.create_name(node.name, node)
    if not inline_regions(module):
        for node in module.graph.nodes:
            node.meta[REGION] = ()
    for node in module.graph.nodes:
        if (trace := node.meta.get("stack_trace")) is not None:
            node.meta["stack_trace"] = _OWN_FRAME.sub("", trace)
    bake_autocast(module, dict(autocast_state()))
    settle_numbers(module)
    module.recompile()


def _one_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0].strip()
    return f"{type(error).__name__}: {text}"[:300]
