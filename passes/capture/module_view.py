"""A view of a model for tracing: new module objects that share the user's tensors.

Tracing puts fake tensors where the parameters are, and the author's forward may assign attributes.
Both must happen where no other thread, and no later call, can see them. So each module is copied
without its tensors: same class, a new `__dict__`, new `_parameters`, `_buffers` and containers,
the tensors and every other object shared. What the author assigns lands in the view, where it can
be found by comparison and is then forgotten.
"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict, defaultdict
from typing import Any

import torch
from torch import nn

from attnopt.errors import CaptureError


def view_of(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares all tensors.

    Raises:
        CaptureError: the tree holds a module that cannot be copied so (TorchScript).
    """
    return _module(model, {})


def _module(module: nn.Module, copies: dict[int, Any]) -> nn.Module:
    if id(module) in copies:
        known: nn.Module = copies[id(module)]
        return known
    if isinstance(module, torch.jit.ScriptModule):
        raise CaptureError("the model holds a TorchScript module, which has no Python code to read",
                           front_end=False)
    copy: nn.Module = object.__new__(type(module))
    copies[id(module)] = copy
    attributes = {name: _value(value, copies) for name, value in module.__dict__.items()}
    object.__setattr__(copy, "__dict__", attributes)
    return copy


def _value(value: Any, copies: dict[int, Any]) -> Any:
    if isinstance(value, nn.Module):
        return _module(value, copies)
    if id(value) in copies:
        return copies[id(value)]
    copied = _container(value, copies)
    if copied is not value:
        copies[id(value)] = copied
    return copied


def _container(value: Any, copies: dict[int, Any]) -> Any:
    """A copy of a container or bound method in which modules are replaced by their copies."""
    kind = type(value)
    if kind in (dict, OrderedDict, defaultdict):
        copy: Any = kind(value.default_factory) if kind is defaultdict else kind()
        copies[id(value)] = copy
        copy.update((key, _value(entry, copies)) for key, entry in value.items())
        return copy
    if kind is list:
        listed: list[Any] = []
        copies[id(value)] = listed
        listed.extend(_value(entry, copies) for entry in value)
        return listed
    if kind in (tuple, set):
        entries = [_value(entry, copies) for entry in value]
        return kind(entries) if kind is set or _moved(value, entries) else value
    if kind is types.MethodType and isinstance(value.__self__, nn.Module):
        return types.MethodType(value.__func__, _value(value.__self__, copies))
    if kind is functools.partial:
        args = [_value(entry, copies) for entry in value.args]
        keywords = {key: _value(entry, copies) for key, entry in value.keywords.items()}
        function = _value(value.func, copies)
        if function is value.func and not _moved(value.args, args) and not _moved(
                value.keywords.values(), keywords.values()):
            return value
        return functools.update_wrapper(functools.partial(function, *args, **keywords), value)
    return value


def _moved(before: Any, after: Any) -> bool:
    return any(a is not b for a, b in zip(before, after, strict=True))
