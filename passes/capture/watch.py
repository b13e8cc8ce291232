"""Watch a trace for what a captured graph cannot carry, though the tracer says nothing.

torch.export records the operations of a forward, without a word about: the backward of a custom
autograd.Function, hooks on tensors, activation checkpoints and other saved-tensor hooks,
`inference_mode` regions (all of them matter only where gradients are recorded); branches on the
gradient mode; numbers read out of constant tensors; draws from Python's or NumPy's generators. A
Watch notes each, so that the graph is used only where it is right.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import random
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

#: marks the forward that a Function has during a trace, if its result has the right gradient
ANSWERS = "attnopt_answers"
_TORCH = torch.__path__[0]
_READS = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__bool__,
          torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__}
_REQUIRES_GRAD = torch.Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_HOOKS = {torch.Tensor.register_hook, torch.Tensor.retain_grad,
          torch.Tensor.register_post_accumulate_grad_hook}


class Watch(TorchFunctionMode):
    """Enter it around a trace, then read what was seen.

    without_grad: why the graph is right only where no gradient is recorded, else None
    with_grad: why the graph is right only where the gradient mode is on, else None
    reads_flags: `requires_grad` of a tensor was read by the author's code
    reads_values: a number was read out of a tensor that is no fake
    draws: the generator outside torch that was drawn from, else None
    opaque: the class of a result that a graph cannot return, else None
    in_forward: set while the author's code runs; the tracer's own calls are not looked at
    """

    def __init__(self) -> None:
        super().__init__()
        self._grad = torch.is_grad_enabled()
        self.without_grad: str | None = None
        self.with_grad: str | None = None
        self.reads_flags = False
        self.reads_values = False
        self.draws: str | None = None
        self.opaque: str | None = None
        self.in_forward = False
        self._thread = threading.get_ident()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if not self.in_forward:
            pass
        elif func in _HOOKS:
            self.without_grad = self.without_grad or f"a tensor's {func.__name__}"
        elif func in _READS and not _is_fake(args[0]):
            self.reads_values = True
        elif func == _REQUIRES_GRAD and _read_by_the_author():
            self.reads_flags = True
            self.with_grad = self.with_grad or "a branch on requires_grad"
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def watching(self) -> Iterator[Watch]:
        """The mode, with the classes and functions patched that no mode sees. One at a time: the
        capture lock is held."""
        with contextlib.ExitStack() as stack:
            for cls, name, note in (
                (torch.autograd.Function, "apply", self._function),
                (torch.autograd.graph.saved_tensors_hooks, "__enter__", self._saved_tensors),
                (torch.inference_mode, "__enter__", self._inference_mode),
                (torch.enable_grad, "__enter__", self._enable_grad),
            ):
                stack.enter_context(_observed(cls, name, note))
            stack.enter_context(self._applied_by_reference())
            stack.enter_context(self._grad_mode_read())
            stack.enter_context(self._generators())
            stack.enter_context(self)
            yield self

    def _mine(self) -> bool:
        return self.in_forward and threading.get_ident() == self._thread

    def _function(self, cls: Any) -> None:
        # An operation of torch.library keeps its gradient in the graph, and so does what stands
        # for a compiled extension (passes.capture.opaque).
        whole = cls.__module__ == "torch._library.autograd" or hasattr(cls.forward, ANSWERS)
        if self._mine() and not whole:
            self.without_grad = self.without_grad or f"autograd.Function {cls.__name__}"

    def _saved_tensors(self, _: Any) -> None:
        if self._mine():
            self.without_grad = self.without_grad or "activation checkpointing"

    def _inference_mode(self, region: Any) -> None:
        if self._mine() and region.mode:  # torch itself enters inference_mode(False)
            self.without_grad = self.without_grad or "an inference_mode region"

    def _enable_grad(self, _: Any) -> None:
        if self._mine():
            self.with_grad = self.with_grad or "an enable_grad region"

    @contextlib.contextmanager
    def _applied_by_reference(self) -> Iterator[None]:
        """Note autograd.Functions whose `apply` was looked up before the trace. It asks torch for
        functorch's transforms first."""
        original = torch._C._are_functorch_transforms_active
        apply = inspect.unwrap(torch.autograd.Function.__dict__["apply"].__func__).__code__

        def transforms_active() -> bool:
            caller = sys._getframe(1)
            if caller.f_code is apply:
                self._function(caller.f_locals["cls"])
            return original()

        torch._C._are_functorch_transforms_active = transforms_active
        try:
            yield
        finally:
            torch._C._are_functorch_transforms_active = original

    @contextlib.contextmanager
    def _grad_mode_read(self) -> Iterator[None]:
        """Note calls of torch.is_grad_enabled that come from the author's code, and answer with the
        mode of the caller, although the trace has gradients on."""
        original = torch.is_grad_enabled

        def is_grad_enabled() -> bool:
            caller = sys._getframe(1).f_code.co_filename
            if not self._mine() or caller.startswith(_TORCH):
                return original()
            why = "a branch on is_grad_enabled()"
            if self._grad:
                self.with_grad = self.with_grad or why
            else:
                self.without_grad = self.without_grad or why
            return self._grad and original()

        torch.is_grad_enabled = is_grad_enabled
        try:
            yield
        finally:
            torch.is_grad_enabled = original

    @contextlib.contextmanager
    def _generators(self) -> Iterator[None]:
        """torch's, Python's and NumPy's generators end as they began; draws are noted."""
        python = random.getstate()
        numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
        before = None if numpy is None else numpy.get_state()
        devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
        try:
            with torch.random.fork_rng(devices):
                yield
        finally:
            if random.getstate() != python:
                self.draws = "Python's random"
                random.setstate(python)
            if before is not None and repr(numpy.get_state()) != repr(before):
                self.draws = "numpy.random"
                numpy.set_state(before)


@contextlib.contextmanager
def _observed(cls: Any, name: str, note: Any) -> Iterator[None]:
    """Call `note(instance or class)` before each call of a method."""
    raw = cls.__dict__.get(name)
    method = getattr(cls, name)

    if isinstance(raw, classmethod):
        function = raw.__func__

        @functools.wraps(function)
        def by_class(owner: Any, *args: Any, **kwargs: Any) -> Any:
            note(owner)
            return function(owner, *args, **kwargs)

        replacement: Any = classmethod(by_class)
    else:

        def by_instance(owner: Any, *args: Any, **kwargs: Any) -> Any:
            note(owner)
            return method(owner, *args, **kwargs)

        replacement = by_instance
    setattr(cls, name, replacement)
    try:
        yield
    finally:
        if raw is None:
            delattr(cls, name)
        else:
            setattr(cls, name, raw)


def _read_by_the_author() -> bool:
    """Whether the code that asked, behind the modes, is not torch's own."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_name == "__torch_function__":
        frame = frame.f_back
    return not frame.f_code.co_filename.startswith(_TORCH)


def _is_fake(value: Any) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(value, FakeTensor) or is_traceable_wrapper_subclass(value)
