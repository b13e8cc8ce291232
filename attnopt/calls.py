"""Calls in one form: `f(x, mask=None)`, `f(x)` and `f(mask=None, x=x)` are the same call.

A call becomes its structure (which arguments are given, and how their values nest) and its flat
leaves in the signature's order. Arguments that equal their default are left out. How a call of one
shape is read is worked out once with `inspect.signature` and remembered.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

_TENSORS = frozenset((torch.Tensor, nn.Parameter, nn.Buffer))
_ATOMS = frozenset((type(None), bool, int, float, complex, str, bytes))
_ABSENT = object()
_P = inspect.Parameter

#: per argument its name, and the tree spec of its value where that is a container
Structure = tuple[Any, ...]


@dataclass(frozen=True)
class Call:
    """One call: equal structures take equal numbers of leaves.

    names: one name per leaf, for messages
    """

    structure: Structure
    leaves: list[Any]

    def names(self) -> list[str]:
        """The argument's name of each leaf."""
        found: list[str] = []
        for entry in self.structure:
            name, spec = entry if isinstance(entry, tuple) else (entry, None)
            found += [name] * (1 if spec is None else spec.num_leaves)
        return found


class CallReader:
    """Reads calls of one function.

    Args:
        function: the model's forward, without self.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        try:
            self._signature: inspect.Signature | None = inspect.signature(function)
        except (TypeError, ValueError):
            self._signature = None
        kinds = () if self._signature is None else tuple(self._signature.parameters.values())
        self._positional = any(p.kind is _P.VAR_POSITIONAL for p in kinds)
        # whether the signature takes *args or **kwargs, or is not known
        self._variadic = self._signature is None or any(
            p.kind in (_P.VAR_POSITIONAL, _P.VAR_KEYWORD) for p in kinds)
        self._plans: dict[Any, list[tuple[str, Any, Any]]] = {}

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call | None:
        """The call in its one form; None where it does not fit the signature."""
        key = (len(args), tuple(kwargs))
        plan = self._plans.get(key)
        if plan is None:
            plan = self._plan(len(args), tuple(kwargs))
            if plan is None:
                return None
            self._plans[key] = plan
        structure: list[Any] = []
        leaves: list[Any] = []
        for name, source, default in plan:
            value = args[source] if type(source) is int else kwargs[source]
            kind = type(value)
            if kind in _TENSORS:
                structure.append(name)
                leaves.append(value)
                continue
            if value is default:
                continue
            if kind in _ATOMS:
                if kind is type(default) and value == default:
                    continue
                structure.append(name)
                leaves.append(value)
                continue
            flat, spec = pytree.tree_flatten(value)
            structure.append(name if spec.is_leaf() else (name, spec))
            leaves += flat
        return Call(tuple(structure), leaves)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]
                  ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call in its one form as args and kwargs, whose leaves are those of `read`."""
        if self._signature is None:
            return args, dict(kwargs)
        bound = self._signature.bind(*args, **kwargs)
        plan = self._plan(len(args), tuple(kwargs)) or []
        defaults = {name: default for name, _, default in plan}
        for name, value in list(bound.arguments.items()):
            default = defaults.get(name, _ABSENT)
            same = value is default or (
                type(value) in _ATOMS and type(value) is type(default) and value == default)
            if same:
                del bound.arguments[name]
            elif self._signature.parameters[name].kind is _P.VAR_KEYWORD:
                bound.arguments[name] = dict(sorted(value.items()))
        return bound.args, bound.kwargs

    def named_shapes(self, shapes: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """A call's `dynamic_shapes` by argument name for the call in its one form, which leaves
        defaults out; what cannot be put so is left to torch.export, which says what is wrong."""
        if not isinstance(shapes, (tuple, list, dict)) or self._variadic:
            return shapes
        if not isinstance(shapes, dict):
            names = self._names(args, kwargs)
            if len(names) != len(shapes):
                return shapes
            shapes = dict(zip(names, shapes, strict=True))
        kept = self._names(*self.arguments(args, kwargs))
        extra = [name for name in shapes if name not in kept and shapes[name] is not None]
        return shapes if extra else {name: shapes.get(name) for name in kept}

    def _names(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[str]:
        """Names of the arguments in the order in which they are given."""
        assert self._signature is not None
        names = [p.name for p in self._signature.parameters.values()
                 if p.kind in (_P.POSITIONAL_ONLY, _P.POSITIONAL_OR_KEYWORD)]
        return names[:len(args)] + list(kwargs)

    def _plan(self, count: int, keys: tuple[str, ...]) -> list[tuple[str, Any, Any]] | None:
        """For each argument in the signature's order: name, where its value is, its default."""
        if self._signature is None:
            positions: list[tuple[str, Any, Any]] = [(f"arg{i}", i, _ABSENT) for i in range(count)]
            return positions + [(k, k, _ABSENT) for k in sorted(keys)]
        try:
            bound = self._signature.bind(*range(count), **{k: _Key(k) for k in keys})
        except TypeError:
            return None
        plan: list[tuple[str, Any, Any]] = []
        for parameter in self._signature.parameters.values():
            name = parameter.name
            if name not in bound.arguments:
                continue
            value = bound.arguments[name]
            if parameter.kind is _P.VAR_POSITIONAL:
                plan += [(f"{name}[{i}]", source, _ABSENT) for i, source in enumerate(value)]
            elif parameter.kind is _P.VAR_KEYWORD:
                plan += [(key, str(value[key]), _ABSENT) for key in sorted(value)]
            else:
                source = str(value) if isinstance(value, _Key) else value
                droppable = (parameter.default is not _P.empty and not self._positional
                             and parameter.kind is not _P.POSITIONAL_ONLY)
                plan.append((name, source, parameter.default if droppable else _ABSENT))
        return plan


class _Key(str):
    """The name of a keyword, to tell it from a position."""
