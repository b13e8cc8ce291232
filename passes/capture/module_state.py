"""ModuleState: everything that a module tree holds besides its tensors, to see that it changed.

A captured graph is right for the Python state that the author's code read: the submodules, their
classes and hooks, training flags, numbers, lists and configuration objects. All of it is compared
at each call. Two tuples of the same objects compare equal in a few nanoseconds an entry, so that
the whole tree costs about a third of a microsecond a module.

Tensors are not compared here by value or identity, except those that lie in plain attributes:
parameters and buffers are looked up by name at each call and checked there.
"""

from __future__ import annotations

import enum
import types
from operator import itemgetter
from typing import Any

import torch
from torch import nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PURE_HOOKS = ("torch.nn.utils.", "transformers.utils.output_capturing")
_TENSORS = ("_parameters", "_buffers")
_NO_STATE = (nn.Module, torch.Tensor, enum.Enum, type, types.ModuleType, types.FunctionType,
             types.BuiltinFunctionType, types.MethodType, torch._ops.OpOverload)
_OPAQUE = ("torch", "numpy", "builtins", "threading", "logging", "_thread", "weakref")
_WEIGHT_LISTS = ("_flat_weights", "_flat_weight_refs")
#: longer containers (vocabularies) are compared by length only
_MAX_ENTRIES = 256
_MAX_OBJECTS = 4096
_DEPTH = 3


class ModuleState:
    """A snapshot of a module tree's Python state.

    Args:
        root: the model. Its own forward hooks are left out: they run around any forward.
    """

    def __init__(self, root: nn.Module) -> None:
        named = list(root.named_modules(remove_duplicate=True))
        self.modules = [m for _, m in named]
        self.names = {id(m.__dict__): name for name, m in named}
        self._classes = list(map(type, self.modules[1:]))
        methods = dict.fromkeys(type(m) for m in self.modules[1:])
        self._forwards = [(c, c.forward) for c in methods]
        hooks = [getattr(m, kind) for m in self.modules[1:] for kind in _HOOKS]
        self._no_hooks = [h for h in hooks if not h]
        kept_hooks = [h for h in hooks if h]
        tensors = [m.__dict__[kind] for m in self.modules for kind in _TENSORS]
        self._tensor_dicts = tensors
        self._tensor_counts = list(map(len, tensors))
        self._absent = [(d, k) for d in tensors for k, v in d.items() if v is None]
        tree: list[Any] = [m._modules for m in self.modules] + kept_hooks
        self._tree, self._tree_then = tree, [dict(d) for d in tree]
        self.objects = _plain_objects(self.modules)
        self._attributes = [m.__dict__ for m in self.modules]
        self._attribute_counts = list(map(len, self._attributes))
        names_of = [_watched(d) for d in self._attributes]
        self._watched = [(itemgetter(*n), d, itemgetter(*n)(d))
                         for d, n in zip(self._attributes, names_of, strict=True)]
        self._watched_names = names_of
        live: list[Any] = []
        live += [o.__dict__ for o in self.objects if _has_state(o)]
        containers = [o for o in self.objects if _is_container(o)]
        self._long = [(c, len(c)) for c in containers if len(c) > _MAX_ENTRIES]
        live += [c for c in containers if len(c) <= _MAX_ENTRIES]
        self._live = live
        self._then = [_copy(c) for c in self._live]

    @property
    def hooked(self) -> str | None:
        """Path of a submodule with hooks that may have effects of their own, None where there is
        none. Hooks of torch's normalisations of weights, and those by which transformers collects
        the outputs that a model returns, are part of the forward around them."""
        for module in self.modules[1:]:
            for hook in (h for kind in _HOOKS for h in getattr(module, kind).values()):
                if not (getattr(hook, "__module__", None) or "").startswith(_PURE_HOOKS):
                    return self.names[id(module.__dict__)]
        return None

    @property
    def training(self) -> tuple[bool, ...]:
        """The training flag of every module, now."""
        return tuple([m.training for m in self.modules])

    def same_tree(self) -> bool:
        """Whether the modules, their classes and their hooks are what they were."""
        if any(self._no_hooks) or list(map(type, self.modules[1:])) != self._classes:
            return False
        if self._tree != self._tree_then:
            return False
        for cls, forward in self._forwards:
            if cls.forward is not forward:
                return False
        return True

    def same_values(self) -> bool:
        """Whether attributes, training flags and configuration objects are what they were."""
        try:
            for get, attributes, then in self._watched:
                if get(attributes) != then:
                    return False
            if self._live != self._then:
                return False
        except Exception:  # an attribute is gone, or of a class that cannot be compared
            return False
        if list(map(len, self._attributes)) != self._attribute_counts:
            return False
        if list(map(len, self._tensor_dicts)) != self._tensor_counts:
            return False
        for tensors, name in self._absent:
            if tensors.get(name) is not None:
                return False
        return all(len(c) == n for c, n in self._long) if self._long else True

    def changed(self) -> str | None:
        """The first attribute that is not what it was, as "path.name", None where all are."""
        for i, (_, attributes, then) in enumerate(self._watched):
            names = self._watched_names[i]
            values = then if len(names) > 1 else (then,)
            path = self.names[id(attributes)]
            for name, value in zip(names, values, strict=True):
                if name not in attributes or _differ(attributes[name], value):
                    return f"{path}.{name}".lstrip(".")
            if len(attributes) != self._attribute_counts[i]:
                return f"{path}.{[*attributes][-1]}".lstrip(".")
        for live, then in zip(self._live, self._then, strict=True):
            if (attribute := _first_change(live, then)) is not None:
                return attribute
        for live, count in self._long:
            if len(live) != count:
                return "a long list"
        return None

    def restore_objects(self) -> str | None:
        """Undo what was changed in plain objects and containers (not in modules); name the first
        change."""
        found = None
        for live, then in zip(self._live, self._then, strict=True):
            if (attribute := _first_change(live, then)) is None:
                continue
            found = found or attribute
            live.clear()
            live.extend(then) if isinstance(live, list) else live.update(then)
        return found


def _first_change(live: Any, then: Any) -> str | None:
    if isinstance(live, dict):
        for key in live.keys() | then.keys():
            if key not in live or key not in then or _differ(live[key], then[key]):
                return str(key)
        return None
    if len(live) != len(then):
        return "a list"
    if isinstance(live, list):
        differ = any(_differ(a, b) for a, b in zip(live, then, strict=True))
        return "a list" if differ else None
    return "a set" if live != then else None


def _differ(a: Any, b: Any) -> bool:
    if a is b:
        return False
    try:
        return type(a) is not type(b) or not bool(a == b)
    except Exception:  # tensors, arrays: another object counts as another value
        return True


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, dict, set))


def _copy(value: Any) -> Any:
    for kind in (dict, list):
        if isinstance(value, kind):
            return kind(value)
    return set(value)


def _plain_objects(modules: list[nn.Module]) -> list[Any]:
    """Mutable containers and plain objects that modules refer to, each once."""
    found: dict[int, Any] = {}

    def visit(value: Any, depth: int) -> None:
        if depth > _DEPTH or len(found) >= _MAX_OBJECTS or id(value) in found:
            return
        if _is_container(value) or isinstance(value, tuple):
            if not isinstance(value, tuple):
                found[id(value)] = value
            if len(value) <= _MAX_ENTRIES:
                for entry in list(value.values() if isinstance(value, dict) else value):
                    visit(entry, depth + 1)
        if _has_state(value):
            found[id(value)] = value
            for entry in list(value.__dict__.values()):
                visit(entry, depth + 1)

    skipped = {id(m.__dict__[k]) for m in modules for k in m.__dict__ if _standard(k)}
    for module in modules:
        for name, value in module.__dict__.items():
            if not _standard(name) and id(value) not in skipped and name not in _WEIGHT_LISTS:
                visit(value, 0)
    return list(found.values())


_STANDARD = frozenset(k for k in nn.Module().__dict__)


def _watched(attributes: dict[str, Any]) -> tuple[str, ...]:
    """The names of what a module's author keeps in it. Not the dictionaries of nn.Module, which
    are looked into elsewhere, nor the lists in which torch's recurrent layers keep their parameters
    once more and which they rebuild when they like."""
    return ("training", *[name for name in attributes
                          if name not in _STANDARD and name not in _WEIGHT_LISTS])


def _standard(name: str) -> bool:
    return name in _STANDARD


def _has_state(value: Any) -> bool:
    if isinstance(value, _NO_STATE) or type(value).__module__.partition(".")[0] in _OPAQUE:
        return False
    return isinstance(getattr(value, "__dict__", None), dict)
