"""Runtime: the variants of one module, and which of them a call takes.

A call that no variant fits runs the user's own forward and is counted with the reason. A variant is
captured when the same kind of call comes a second time, at most eight per module; what cannot be
captured is remembered and said once on the logger "attnopt.capture". No call raises what the
user's own forward would not have raised.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_map

from attnopt import logs
from attnopt.calls import Call, CallReader
from attnopt.direct_calls import with_direct_calls
from attnopt.errors import CaptureError, RuleError
from attnopt.ir.captured import Captured
from attnopt.kernels import missing
from attnopt.passes import pipeline
from attnopt.passes.capture.autocast import autocast_state
from attnopt.passes.capture.dynamo import compile_forward
from attnopt.passes.capture.export import Traced, capture
from attnopt.passes.capture.guards import ValueGuard
from attnopt.passes.options import Options
from attnopt.progress import progress
from attnopt.surroundings import global_hooks, inside_a_backward, outside
from attnopt.variants import Variant

HITS = "hits"
NOTHING = "nothing in this call was rewritten"
MAX_VARIANTS = 8
_MAX_SEEN = 256
_log = logs.get("capture")


@contextlib.contextmanager
def _no_inference_mode() -> Iterator[None]:
    """Autograd may not save what was made under inference_mode, as a capture asks it to; under
    no_grad everything else is the same."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def _normal(tree: Any) -> Any:
    """The same arguments without inference tensors."""
    return tree_map(lambda x: x.clone() if torch.is_tensor(x) and x.is_inference() else x, tree)


class Runtime:
    """What an optimised module knows besides the user's module.

    Args:
        model: the user's module, of the user's class; its `__dict__` is that of the optimised
            module.
        options: for the passes.
        dynamic_shapes: as given by the user.
        dynamic_structure: of the calls that they are for; None for the first one prepared.
    """

    def __init__(self, model: nn.Module, options: Options, dynamic_shapes: Any = None,
                 dynamic_structure: Any = None) -> None:
        self.model = model
        self.home = model.__dict__
        self.options = options
        self.dynamic_shapes = dynamic_shapes
        #: an instance's own forward, as libraries set it that wrap models in place
        self.instance_forward: Callable[..., Any] | None = self.home.get("forward")
        self.variants: tuple[Variant, ...] = ()
        self.results: list[tuple[Captured, pipeline.Rewritten]] = []
        #: of a call that can only be run graph by graph: what a report says before it has run
        self.preview: tuple[Captured, pipeline.Rewritten] | None = None
        self.calls: Counter[str] = Counter()
        self.notes: dict[str, None] = {}
        self.example: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.disabled = os.environ.get("ATTNOPT_DISABLE", "") not in ("", "0")
        self._reader = CallReader(self.own_forward)
        self.dynamic_structure = dynamic_structure
        self._seen: Counter[Any] = Counter()
        #: looks of calls that nothing was rewritten for -> number of variants at that time
        self._idle: dict[Any, int] = {}
        self._refused: dict[Any, str] = {}
        self._graph_by_graph: dict[Any, bool] = {}
        self._compiled: Callable[..., Any] | None = None
        self._lock = threading.RLock()
        if self.disabled:
            self.note("ATTNOPT_DISABLE is set: every call runs the model's own forward")

    @property
    def reported(self) -> list[tuple[Captured, pipeline.Rewritten]]:
        """What the report is about: one variant, and the graphs that Dynamo found."""
        whole = [r for r in self.results if r[0].front_end == "export"][:1]
        pieces = [r for r in self.results if r[0].front_end == "dynamo"]
        if not whole and not pieces and self.preview is not None:
            return [self.preview]
        return whole + pieces

    @property
    def own_forward(self) -> Callable[..., Any]:
        """The forward that the user wrote, bound to the module of the user's own class."""
        if self.instance_forward is not None:
            return self.instance_forward
        return types.MethodType(type(self.model).forward, self.model)

    @property
    def configuration(self) -> tuple[Any, ...]:
        """What a copy of the module is rebuilt from, besides the user's module."""
        return self.options, self.dynamic_shapes, self.dynamic_structure

    def note(self, text: str) -> None:
        """A sentence for the report, once."""
        if text not in self.notes:
            self.notes[text] = None
            _log.info("%s: %s", type(self.model).__name__, text)

    # -- a call -------------------------------------------------------------------------------

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.disabled:
            return self.own_forward(*args, **kwargs)
        if module.__dict__ is not self.home:  # made from the class of an optimised module
            return type(self.model).forward(module, *args, **kwargs)
        why = outside()
        if why is not None:
            self.calls[why] += 1
            return self.own_forward(*args, **kwargs)
        look = _at_a_glance(self.model, args, kwargs)
        if self._idle.get(look) == len(self.variants):
            self.calls[NOTHING] += 1
            return self.own_forward(*args, **kwargs)
        call = self._reader.read(args, kwargs)
        if call is None:  # the model's own TypeError
            return self.own_forward(*args, **kwargs)
        for variant in self.variants:
            values = variant.match(call)
            if not isinstance(values, str):
                if not variant.useful:
                    if len(self._idle) < _MAX_SEEN:
                        self._idle[look] = len(self.variants)
                    self.calls[NOTHING] += 1
                    return self.own_forward(*args, **kwargs)
                self.calls[HITS] += 1
                return variant.run(values, call.leaves)
            why = values
        return self._miss(self.own_forward, call, args, kwargs, why)

    def _miss(self, own: Callable[..., Any], call: Call, args: tuple[Any, ...],
              kwargs: dict[str, Any], why: str | None) -> Any:
        try:
            kind, key = self._keys(call)
        except TypeError:  # an argument that cannot be hashed
            self.calls["an argument that cannot be compared"] += 1
            return own(*args, **kwargs)
        if self._graph_by_graph.get(kind):
            return self._run_graphs(kind, own, args, kwargs)
        if (reason := self._refused.get(key)) is not None:
            self.calls[reason] += 1
            return own(*args, **kwargs)
        if len(self._seen) >= _MAX_SEEN:
            self._seen.clear()
        self._seen[key] += 1
        if self._seen[key] >= 2 and not self._moment() and self._lock.acquire(blocking=False):
            try:
                variant = self._try_capture(call, args, kwargs, kind, key)
            finally:
                self._lock.release()
            if variant is not None:
                values = variant.match(call)
                if isinstance(values, str):
                    self._refused[key] = why = values
                elif variant.useful:
                    self.calls[HITS] += 1
                    return variant.run(values, call.leaves)
                else:
                    why = NOTHING
            elif self._graph_by_graph.get(kind):
                return self._run_graphs(kind, own, args, kwargs)
        self.calls[why or "no variant of this call yet"] += 1
        return own(*args, **kwargs)

    def _keys(self, call: Call) -> tuple[Any, Any]:
        """The kind of a call (what Dynamo does not guard) and its key (what a variant guards)."""
        kind = (call.structure, tuple([
            (leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else type(leaf)
            for leaf in call.leaves]))
        sizes = tuple([(leaf.shape, leaf.stride(), leaf.requires_grad) if _dense(leaf)
                       else leaf if _hashable(leaf) else None for leaf in call.leaves])
        modules = list(self.model.modules())
        tensors = tuple([None if t is None else (t.dtype, t.device) for m in modules
                         for d in (m._parameters, m._buffers) for t in d.values()])
        modes = (torch.is_grad_enabled(), autocast_state(), tuple([m.training for m in modules]))
        key = (kind, sizes, modes, tensors)
        hash(key)
        return kind, key

    def _moment(self) -> bool:
        """Whether this is no moment to capture: inside a backward or a checkpointed region (what
        ran forward must run again there), or with the parameters swapped out."""
        return inside_a_backward() or any(
            type(p) is torch.Tensor for m in self.model.modules() for p in m._parameters.values())

    # -- capturing ----------------------------------------------------------------------------

    def prepare(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """Capture this call now, in the module's present mode; why it was not, or None.

        A call that Dynamo has to capture is captured when it first runs.
        """
        call = self._reader.read(args, kwargs)
        if call is None:
            return "the arguments do not fit the signature of forward"
        if self.disabled:
            return "ATTNOPT_DISABLE is set"
        with self._lock:
            if self.example is None:
                self.example = (args, dict(kwargs))
                self.dynamic_structure = self.dynamic_structure or call.structure
            if any(not isinstance(v.match(call), str) for v in self.variants):
                return None
            try:
                kind, key = self._keys(call)
            except TypeError:
                kind, key = object(), object()
            variant = self._try_capture(call, args, dict(kwargs), kind, key, at_once=True)
            if variant is not None:
                return None
            return self._refused.get(key) or next(reversed(self.notes), "it cannot be captured")

    def _try_capture(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any],
                     kind: Any, key: Any, *, at_once: bool = False) -> Variant | None:
        self.variants = tuple(v for v in self.variants if not v.stale)
        if len(self.variants) >= MAX_VARIANTS and not at_once:
            self._refused[key] = f"more than {MAX_VARIANTS} kinds of calls"
            return None
        try:
            with _no_inference_mode():
                variant = self._capture(call, *_normal((args, kwargs)), at_once=at_once)
            del self._seen[key]
            return variant
        except CaptureError as error:
            if at_once and isinstance(error.seen, Traced):
                self._preview(error.seen.captured)
            if error.transient and self._seen[key] < 2:
                self.note(f"not captured yet: {error.reason}")
                return None
            self.note(f"not captured whole: {error.reason}")
            self._refused[key] = error.reason
            if error.front_end and not global_hooks():
                self._graph_by_graph.setdefault(kind, True)
        except RuleError:  # only with strict=True
            raise
        except Exception as error:  # a fault of ours must not stop the user's call
            self._refused[key] = f"{type(error).__name__}: {str(error).splitlines()[:1]}"
            self.note(f"not optimised: {self._refused[key]}")
            _log.warning("capturing %s failed", type(self.model).__name__, exc_info=True)
        return None

    def _preview(self, captured: Captured) -> None:
        """What a report can say of a graph that cannot be run whole."""
        try:
            self.preview = (captured, pipeline.rewrite(captured, self.options))
        except Exception:
            _log.info("no preview of %s", type(self.model).__name__, exc_info=True)
        captured.values = {}

    def _options(self, at_once: bool = False) -> Options:
        """The options for a call as it is now: frozen values have no gradient. What is captured
        ahead may yet be for calls that want none."""
        wanted = torch.is_grad_enabled() and any(p.requires_grad for p in self.model.parameters())
        if at_once or not (self.options.freeze and wanted):
            return self.options
        self.note("freeze: nothing is frozen in calls that record gradients of parameters")
        return replace(self.options, freeze=False)

    def _capture(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], *,
                 at_once: bool = False) -> Variant:
        if global_hooks():
            raise CaptureError("hooks on all modules are registered", front_end=False)
        shapes = self.dynamic_shapes if call.structure == self.dynamic_structure else None
        shapes = self._reader.named_shapes(shapes, args, kwargs)
        given, named = self._reader.arguments(args, kwargs)
        with progress(type(self.model).__name__):
            start = time.perf_counter()
            traced = capture(self.model, given, named, shapes)
            seconds = time.perf_counter() - start
            rewritten = pipeline.rewrite(traced.captured, self._options(at_once))
        rewritten.timings = {"capture": seconds, **rewritten.timings}
        if rewritten.frozen_grad:
            traced.without_grad = traced.without_grad or "values of parameters frozen"
        elif rewritten.frozen:
            traced.reads_flags = True
        variant = Variant(traced, rewritten.graph_module, rewritten.guards, call, self.model,
                          useful=_useful(rewritten))
        traced.captured.values = {}  # a variant must not keep tensors alive that are replaced
        self.results.append((traced.captured, rewritten))
        why = missing()
        if why and any(t.endswith(why) for s in rewritten.sites for t in s.tried):
            self.note(f"no generated kernels, ATen computes instead: {why}")
        self.variants = (*self.variants, variant)
        return variant

    @property
    def wants_dynamo(self) -> bool:
        """Whether some kind of call is to go through Dynamo."""
        return any(self._graph_by_graph.values())

    def run_graphs(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model's own forward with every graph rewritten that Dynamo finds in it."""
        if self._compiled is None:
            self._compiled = compile_forward(self.own_forward, self._rewrite_graph,
                                             type(self.model).__name__, self.note)
        return self._compiled(*args, **kwargs)

    def _run_graphs(self, kind: Any, own: Callable[..., Any], args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> Any:
        """Run through Dynamo; not again where nothing was found to rewrite."""
        if self._compiled is None and self._moment():
            self.calls["no variant of this call yet"] += 1
            return own(*args, **kwargs)
        before = len(self.results)
        result = self.run_graphs(args, kwargs)
        useful = any(c.front_end == "dynamo" and _useful(r) for c, r in self.results)
        if not useful and len(self.results) == before:
            self._graph_by_graph[kind] = False
        self.calls[HITS if useful else NOTHING] += 1
        return result

    def _rewrite_graph(self, captured: Captured
                       ) -> tuple[fx.GraphModule, tuple[ValueGuard, ...]] | None:
        with progress(type(self.model).__name__):
            rewritten = pipeline.rewrite(captured, self._options())
        captured.values = {}
        self.results.append((captured, rewritten))
        if not _useful(rewritten):
            return None
        return with_direct_calls(rewritten.graph_module), tuple(rewritten.guards)


def _at_a_glance(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a call looks like without looking into it. Calls that look alike and fell to a variant
    with nothing rewritten go to the user's forward at once: that is right for any call."""
    return (model.training, torch.is_grad_enabled(), tuple(kwargs), tuple(
        [(x.shape, x.dtype) if isinstance(x, torch.Tensor) else type(x)
         for x in (*args, *kwargs.values())]))


def _useful(rewritten: pipeline.Rewritten) -> bool:
    """Whether anything in a graph is better than what the author has."""
    return bool(rewritten.frozen) or any(
        getattr(site, "record", site).status == "rewritten" for site in rewritten.sites)


def _dense(leaf: Any) -> bool:
    return (isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided
            and not leaf.is_nested)


def _hashable(value: Any) -> bool:
    return isinstance(value, (type(None), bool, int, float, str, bytes, torch.dtype, torch.device))
