"""The torch.compile backend: the passes on every graph that Dynamo finds, Inductor for the rest.

    torch.compile(model, backend="attnopt")
    torch.compile(model, backend="attnopt", options={"then": "eager", "report": print})
    model.compile(backend="attnopt", mode="max-autotune")

A graph in which nothing can be made faster goes to Inductor as Dynamo found it. Rewritten graphs
hold attnopt's operators, which Inductor calls and fuses nothing into. Structure that was proven
from the values of buffers holds while they do: after a change of one, the graph is compiled again
without it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import fx

from attnopt import logs
from attnopt.errors import OptionError, StrictError
from attnopt.ir.captured import Captured
from attnopt.opaque_calls import with_opaque_calls
from attnopt.passes import pipeline
from attnopt.passes.capture.autocast import autocast_off, autocast_state
from attnopt.passes.capture.dynamo import rewrite_graph
from attnopt.passes.options import Options
from attnopt.report import Report

_log = logs.get("backend")

#: options of this backend besides those of `attnopt.optimize`
_OWN = ("then", "report")


def attnopt_backend(module: fx.GraphModule, inputs: Sequence[Any], *, mode: str | None = None,
                    options: Mapping[str, Any] | None = None) -> Callable[..., Any]:
    """Compile one graph of Dynamo's.

    Args:
        module, inputs: as torch.compile hands them to a backend.
        mode: of Inductor ("reduce-overhead", "max-autotune", ...).
        options: those of `attnopt.optimize` by name; "then", the backend that compiles the
            rewritten graph, "inductor" unless said ("eager", "aot_eager", ... as torch.compile
            knows them, or a function); "report", a function that is given a `Report` of each
            graph; and, for Inductor, settings of its own.

    Raises:
        OptionError: an option is unknown or of a wrong value.
        StrictError: `strict` was given and an attention was left as it was.
    """
    chosen, finish, tell = _read_options(mode, dict(options or {}))

    def rewriter(captured: Captured) -> tuple[fx.GraphModule, Sequence[Any]] | None:
        rewritten = pipeline.rewrite(captured, chosen)
        captured.values = {}
        report = Report(sites=list(rewritten.sites), model_name=captured.model_name,
                        timings=rewritten.timings, before=rewritten.text_before,
                        after=rewritten.text_after, graphs=[rewritten.record],
                        kernels=rewritten.kernels, notes=list(captured.notes))
        _log.info("%s", report)
        if tell is not None:
            tell(report)
        kept = [s for s in rewritten.sites if s.status == "kept"]
        if chosen.strict and kept:
            raise StrictError(f"every site must be rewritten, got {len(kept)} kept; the first is "
                              f"{kept[0].source or kept[0].node}: {kept[0].reason}")
        useful = rewritten.frozen or any(s.status == "rewritten" for s in rewritten.sites)
        return (rewritten.graph_module, rewritten.guards) if useful else None

    def failed(error: Exception) -> None:
        if isinstance(error, (OptionError, StrictError)):
            raise error
        _log.warning("a graph is compiled as it is: %s", error)

    def compiled(graph: fx.GraphModule) -> Callable[..., Any]:
        # Casts are nodes of a rewritten graph: the ambient autocast must not add its own.
        with_opaque_calls(graph)
        state = autocast_state()
        with autocast_off(state) if state else contextlib.nullcontext():
            return finish(graph, list(inputs))

    made = rewrite_graph(module, inputs, rewriter, failed=failed, compiled=compiled,
                         instead=lambda: torch.compile(module, backend=finish))
    return finish(module, list(inputs)) if made is None else made


def _read_options(mode: str | None, given: dict[str, Any]
                  ) -> tuple[Options, Callable[..., Any], Callable[[Report], Any] | None]:
    """The options of the passes, what compiles a rewritten graph, and who is told."""
    then, tell = given.pop("then", "inductor"), given.pop("report", None)
    if tell is not None and not callable(tell):
        raise OptionError(f"report must be a function of a Report, got {tell!r}")
    names = [f.name for f in fields(Options)]
    chosen = Options.of({name: given.pop(name) for name in list(given) if name in names})
    if torch.is_grad_enabled() and chosen.freeze:
        _log.info("freeze: nothing is frozen in graphs that record gradients")
        chosen = replace(chosen, freeze=False)
    known = (*names, *_OWN)
    if then != "inductor":
        if given:
            raise OptionError(
                f"an option must be one of {', '.join(known)}, got {next(iter(given))!r}")
        if mode not in (None, "default"):
            raise OptionError(f"mode must be left out where then is not 'inductor', got {mode!r}")
        return chosen, _named_backend(then), tell
    return chosen, _inductor(mode, given, known), tell


def _named_backend(then: Any) -> Callable[..., Any]:
    import torch._dynamo as dynamo

    if callable(then):
        return then
    if not isinstance(then, str) or then == "attnopt":
        raise OptionError(f"then must be another backend of torch.compile, got {then!r}")
    try:
        return dynamo.lookup_backend(then)
    except Exception as error:
        raise OptionError(f"then must be one of inductor, {', '.join(dynamo.list_backends())}, "
                          f"got {then!r}") from error


def _inductor(mode: str | None, given: Mapping[str, Any], known: Sequence[str]
              ) -> Callable[..., Any]:
    import torch._inductor as inductor
    from torch._inductor.compile_fx import compile_fx

    settings = dict(inductor.list_mode_options(mode)) if mode not in (None, "default") else {}
    options = inductor.list_options()
    for name, value in given.items():
        name = name.replace("-", "_")
        if name not in options:
            raise OptionError(f"an option must be one of {', '.join(known)} or a setting of "
                              f"Inductor, got {name!r}")
        settings[name] = value
    return lambda graph, inputs: compile_fx(graph, inputs, config_patches=settings or None)
