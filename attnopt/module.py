"""OptimizedModule: the user's module with another forward.

Each optimised module has a class of its own, derived from OptimizedModule and from the user's
class, and shares the user's module's `__dict__`. So parameters, buffers, submodules, hooks, flags
and attributes are one state under two names, methods such as `generate` are the user's own, and
`isinstance` says yes to the user's class. The class keeps the user's name too, since libraries look
models up by it and write it into files. What attnopt knows (the variants) hangs on the class,
not on the instance: it is in no state dict and is rebuilt, not copied, by deepcopy and pickle.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
import weakref
from typing import Any

import torch
from torch import fx, nn

from attnopt.errors import CaptureError
from attnopt.report import Report
from attnopt.runtime import Runtime
from attnopt.trials import site_times

_RUNTIME = "_attnopt_runtime"


class OptimizedModule(nn.Module):
    """A module that computes what the user's module computes, with its attention rewritten.

    Made by `attnopt.optimize`. Everything that the user's module has is here by reference. A call
    that no captured variant fits runs the user's own forward.
    """

    _attnopt_runtime: Runtime

    @property
    def report(self) -> Report:
        """What was found and what became of it, over all graphs captured so far."""
        return make_report(type(self)._attnopt_runtime, self)

    @property
    def graph_modules(self) -> list[fx.GraphModule]:
        """The rewritten graphs: one per variant, or one per graph that Dynamo found."""
        return [rewritten.graph_module for _, rewritten in type(self)._attnopt_runtime.results]

    def prepare(self, *args: Any, **kwargs: Any) -> OptimizedModule:
        """Capture the variant for this call in the module's present mode, without running it.

        Returns:
            The module itself.

        Raises:
            CaptureError: no variant can be captured; calls run the user's own forward, or go
                through Dynamo where it can do better.
        """
        reason = type(self)._attnopt_runtime.prepare(args, kwargs)
        if reason is not None:
            raise CaptureError(reason)
        return self

    def __copy__(self) -> OptimizedModule:
        runtime = type(self)._attnopt_runtime
        return _rebuild(copy.copy(users_module(self)), *runtime.configuration)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptimizedModule:
        runtime = type(self)._attnopt_runtime
        result = _rebuild(copy.deepcopy(users_module(self), memo), *runtime.configuration)
        memo[id(self)] = result
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        runtime = type(self)._attnopt_runtime
        return _rebuild, (users_module(self), *runtime.configuration)


def wrap(model: nn.Module, runtime: Runtime, *, inplace: bool = False) -> OptimizedModule:
    """The optimised module of a user's module.

    Args:
        model: the user's module.
        runtime: made for a module of the user's class that shares `model.__dict__`.
        inplace: give `model` itself the new class, instead of making a second object.
    """
    made = _class_of(type(runtime.model), runtime)
    if inplace:
        model.__class__ = made
        assert isinstance(model, OptimizedModule)
        return model
    result: OptimizedModule = object.__new__(made)
    object.__setattr__(result, "__dict__", model.__dict__)
    return result


def shell_of(model: nn.Module) -> nn.Module:
    """Another object of the user's class with the same `__dict__`."""
    shell: nn.Module = object.__new__(type(model))
    object.__setattr__(shell, "__dict__", model.__dict__)
    return shell


def _class_of(users: type[nn.Module], runtime: Runtime) -> type[OptimizedModule]:
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return own(self, *args, **kwargs)
        return runtime(self, args, kwargs)

    if runtime.instance_forward is None:
        own = users.forward
    else:
        instance_forward = runtime.instance_forward

        def own(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return instance_forward(*args, **kwargs)

    forward.__doc__ = users.forward.__doc__
    forward.__signature__ = _signature(users.forward)  # type: ignore[attr-defined]
    body: dict[str, Any] = {
        "__module__": users.__module__, "__qualname__": users.__qualname__,
        "__doc__": users.__doc__, _RUNTIME: runtime,
        "forward": forward if runtime.instance_forward is None else _InstanceForward(forward)}
    made = types.new_class(users.__name__, (OptimizedModule, users), {},
                           lambda namespace: namespace.update(body))
    return made


def _signature(forward: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(forward)
    except (TypeError, ValueError):
        return None


class _InstanceForward:
    """A data descriptor, so that the optimised forward comes before the one in `__dict__`."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self._function if instance is None else types.MethodType(self._function, instance)

    def __set__(self, instance: Any, value: Any) -> None:
        raise AttributeError("forward of an optimised module cannot be replaced")


def users_module(optimized: OptimizedModule) -> nn.Module:
    """The user's module of an optimised one, of the user's class."""
    runtime = type(optimized)._attnopt_runtime
    if optimized.__dict__ is runtime.home:
        return runtime.model
    shell: nn.Module = object.__new__(type(runtime.model))
    object.__setattr__(shell, "__dict__", optimized.__dict__)
    return shell


def _rebuild(model: nn.Module, *configuration: Any) -> OptimizedModule:
    return wrap(model, Runtime(model, *configuration))


def make_report(runtime: Runtime, module: nn.Module | None = None) -> Report:
    """The report of all graphs captured so far."""
    sites: list[Any] = []
    timings: dict[str, float] = {}
    before, after, graphs = [], [], []
    texts: dict[str, str] = {}
    for _, rewritten in runtime.reported:
        texts |= rewritten.kernels
        graphs.append(rewritten.record.moved(len(sites)))
        sites += [getattr(site, "record", site) for site in rewritten.sites]
        before.append(rewritten.text_before)
        after.append(rewritten.text_after)
        for step, seconds in rewritten.timings.items():
            timings[step] = timings.get(step, 0.0) + seconds
    notes = list(runtime.notes)
    for captured, _ in runtime.reported:
        notes += [note for note in captured.notes if note not in notes]
    report = Report(sites=sites, model_name=type(runtime.model).__name__, timings=timings,
                    before="\n".join(before), after="\n".join(after), notes=notes,
                    calls=runtime.calls, graphs=graphs, kernels=texts)
    if module is not None:
        report.bind(runtime.own_forward, module.forward, lambda: runtime.example,
                    functools.partial(site_times, weakref.ref(runtime)))
    return report
