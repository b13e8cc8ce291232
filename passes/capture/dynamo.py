"""Capture through Dynamo, graph by graph, what torch.export cannot bring into one graph.

Dynamo follows Python: it breaks the graph at data-dependent branches, runs inner hooks, assigns
attributes and advances key-value caches as the author's code does. Each graph that it finds is
traced once more, pre-dispatch and under Dynamo's own fake tensors, which gives the operations that
an export gives. Parameters and buffers are placeholders here, among the user's inputs. Dynamo
guards sizes, Python values and modes; the values of tensors are guarded by the runner.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.errors import CaptureError
from attnopt.ir.captured import Captured, Origin
from attnopt.passes.capture.autocast import autocast_off, autocast_state, bake_autocast
from attnopt.passes.capture.data import Retrace
from attnopt.passes.capture.export import CAPTURE_LOCK
from attnopt.passes.capture.guards import ValueGuard
from attnopt.passes.capture.regions import REGION
from attnopt.passes.capture.sizes import sizes_of

_SET_GRAD = torch._C._set_grad_enabled
_ENTER, _EXIT = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast

#: from a captured graph to the module that replaces it with the value guards that it needs, or
#: None where nothing in it is better than what was there
Rewriter = Callable[[Captured], "tuple[fx.GraphModule, Sequence[ValueGuard]] | None"]


def compile_forward(forward: Callable[..., Any], rewriter: Rewriter, model_name: str,
                    failed: Callable[[str], None]) -> Callable[..., Any]:
    """`forward` with every graph that Dynamo finds in it rewritten.

    Args:
        forward: bound forward of the user's module.
        rewriter: called once for each graph.
        model_name: for the captured graphs.
        failed: told why a graph was left as Dynamo found it.
    """
    def backend(module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return rewrite_graph(
            module, inputs, rewriter, self_name=_self_name(forward), model_name=model_name,
            failed=lambda error: failed(str(error).split("\n")[0] or type(error).__name__),
            compiled=lambda graph: graph.forward, instead=lambda: module.forward) or module.forward

    # An error inside Dynamo runs the frame that it was compiling as plain Python.
    import torch._dynamo

    compiled = torch.compile(forward, backend=backend)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(suppress_errors=True):
            return compiled(*args, **kwargs)

    return run


def rewrite_graph(
    module: fx.GraphModule, inputs: Sequence[Any], rewriter: Rewriter, *,
    compiled: Callable[[fx.GraphModule], Callable[..., Any]],
    instead: Callable[[], Callable[..., Any]], failed: Callable[[Exception], None],
    self_name: str = "self", model_name: str = "",
) -> Callable[..., Any] | None:
    """What runs in place of one graph of Dynamo's; None where it is to stay as it is.

    Args:
        compiled: what runs a rewritten graph.
        instead: makes what runs the original one, once a guarded value has changed.
        failed: told why a graph could not be captured or rewritten.
    """
    with CAPTURE_LOCK:
        try:
            captured = capture_graph(module, inputs, self_name, model_name)
            rewritten = rewriter(captured)
        except Exception as error:
            failed(error)
            return None
    if rewritten is None:
        return None
    graph, guards = rewritten
    return _runner(captured, graph, guards, compiled(graph), instead)


def capture_graph(module: fx.GraphModule, inputs: Sequence[Any], self_name: str = "self",
                  model_name: str = "") -> Captured:
    """One graph from Dynamo as a Captured.

    Args:
        module: the graph that a torch.compile backend is given.
        inputs: the real example inputs that it is given.
        self_name: what the traced function calls the user's module.

    Raises:
        CaptureError: the graph holds sub-graphs (checkpoints, custom autograd functions,
            conditions), whose backward a second trace would lose; or see `Retrace`.
    """
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise CaptureError(f"the graph holds a {node.target} with a graph of its own")
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    # example_value, not the real inputs: they carry Dynamo's symbolic sizes
    examples = [n.meta["example_value"] for n in placeholders]
    mode = next((e.fake_mode for e in examples if isinstance(e, FakeTensor)), None)
    grad = torch.is_grad_enabled()
    try:
        with mode or contextlib.nullcontext(), torch.fx.traceback.preserve_node_meta():
            graph = make_fx(Retrace(module).run, pre_dispatch=True, tracing_mode="real",
                            _allow_non_fake_inputs=True)(*examples)
    finally:
        _SET_GRAD(grad)
    _tag_regions(graph)
    bake_autocast(graph, dict(autocast_state()))
    names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
    if len(names) != len(placeholders):
        raise CaptureError(f"the second trace must take {len(placeholders)} inputs, "
                           f"got {len(names)}")
    origins = {name: _origin(node, value, self_name)
               for name, node, value in zip(names, placeholders, inputs, strict=True)}
    sizes = sizes_of(examples)
    values = [_plain(value) for value in inputs]
    return Captured(
        graph_module=graph, origins=origins, values=dict(zip(names, values, strict=True)),
        symbols=sizes.symbols, conditions=sizes.conditions, front_end="dynamo",
        model_name=model_name)


def _plain(value: Any) -> Any:
    """A symbolic number as the number that it was; to ask the symbol itself would fix it."""
    return value.node.hint if isinstance(value, (torch.SymInt, torch.SymFloat)) else value


def _tag_regions(graph: fx.GraphModule) -> None:
    """`meta["attnopt_region"]`: the stretch between two changes of the gradient mode; drop the
    asserts on dtype and device."""
    region = 0
    for node in list(graph.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.graph.erase_node(node)
            continue
        if node.target is _SET_GRAD:
            region += 1
        node.meta[REGION] = (region,) if region else ()
    graph.recompile()


_STEP = re.compile(
    r"\.__dict__\['_modules'\]\['(?P<a>[^']+)'\]|\._modules\['(?P<b>[^']+)'\]"
    r"|(?P<held>\.__dict__\['_(?:parameters|buffers)'\]|\._(?:parameters|buffers))"
    r"\['(?P<c>[^']+)'\]|\.(?P<d>\w+)|\[(?P<e>\d+)\]")


def _origin(node: fx.Node, value: Any, self_name: str) -> Origin:
    """Where Dynamo found the value of a placeholder."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    name = str(name() if callable(name) else name)
    root = re.match(r"L\['(\w+)'\]", name)
    if not isinstance(value, torch.Tensor) or root is None:
        return Origin("input", node.name, held=False)
    steps = list(_STEP.finditer(name, root.end()))
    path = ".".join(s["a"] or s["b"] or s["c"] or s["d"] or s["e"] for s in steps)
    if isinstance(value, nn.Parameter):
        return Origin("parameter", path or node.name)
    if steps and steps[-1]["held"]:
        return Origin("buffer", path)
    if root[1] == self_name and steps:
        return Origin("constant", path)
    return Origin("input", root[1] if not steps else f"{root[1]}.{path}", held=False)


def _self_name(forward: Callable[..., Any]) -> str:
    function = inspect.unwrap(forward.__func__ if isinstance(forward, types.MethodType)
                              else forward)
    code = getattr(function, "__code__", None)
    return code.co_varnames[0] if code is not None and code.co_argcount else "self"


def _runner(captured: Captured, module: fx.GraphModule, guards: Sequence[ValueGuard],
            compiled: Callable[..., Any], instead: Callable[[], Callable[..., Any]]
            ) -> Callable[..., Any]:
    """The rewritten graph while the guarded values hold, then the original for good."""
    names = list(captured.origins)
    checks = [(names.index(g.placeholder), g) for g in guards]
    grad_regions = any(n.target is _SET_GRAD for n in module.graph.nodes)
    autocast = autocast_state()
    original: Callable[..., Any] | None = None

    def run(*inputs: Any) -> Any:
        nonlocal original
        if original is None and not all(g.holds(inputs[i]) for i, g in checks):
            original = instead()
        if original is not None:
            return original(*inputs)
        grad = torch.is_grad_enabled()
        try:
            if autocast:
                with autocast_off(autocast):
                    return compiled(*inputs)
            return compiled(*inputs)
        except BaseException:
            if grad_regions:
                _SET_GRAD(grad)
            raise

    return run
