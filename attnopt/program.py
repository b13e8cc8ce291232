"""An optimised model as a torch.export.ExportedProgram: to save, to package, to translate.

    program = attnopt.export(model, args)                 # holds attnopt's operators
    program = attnopt.export(model, args, portable=True)  # ATen only: AOTInductor, other runtimes
    torch.export.save(program, "model.pt2")

The rewritten graph is exported once more, with the parameters and buffers of the model under their
own names. A saved program with attnopt's operators is loaded where attnopt was imported; a portable
one needs nothing but torch. Proofs that rest on values of buffers hold for the values that are
exported, which no program can change but by an assignment from outside.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from attnopt.agreement import original
from attnopt.errors import CaptureError, OptionError, StrictError
from attnopt.factor_numbers import write_factors
from attnopt.files import whole_file
from attnopt.ir.site import SiteRecord
from attnopt.kernels.portable import table as portable_table
from attnopt.module import OptimizedModule, users_module
from attnopt.passes import pipeline
from attnopt.passes.capture.autocast import autocast_off, autocast_state
from attnopt.passes.capture.export import capture, find_slot
from attnopt.passes.options import Options
from attnopt.report import Report


def export(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    portable: bool = False,
    **options: Any,
) -> torch.export.ExportedProgram:
    """The optimised model as an ExportedProgram, for inference.

    Args:
        model: a module, one that is optimised already, or an ExportedProgram.
        args, kwargs, dynamic_shapes: as for `torch.export.export`.
        portable: lower attnopt's operators to ATen, so that the program runs without attnopt, on
            any device, in AOTInductor and other runtimes.
        options: those of `attnopt.optimize`; of an optimised module its own, unless given.

    Raises:
        OptionError: an argument is of a wrong type or value.
        CaptureError: the model cannot be captured as one graph.
        StrictError: `strict` was given and something was left as it was.
    """
    if not isinstance(portable, bool):
        raise OptionError(f"portable must be True or False, got {portable!r}")
    lowered = portable_table() if portable else {}
    if portable:
        options = {**_options_of(model), **options, "backend": "aten"}
    return exported(model, args, kwargs, dynamic_shapes, options, lowered)[0]


def exported(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None,
             dynamic_shapes: Any, given: Mapping[str, Any],
             lowered: Mapping[Any, Callable[..., Any]]
             ) -> tuple[torch.export.ExportedProgram, Report]:
    """The program and the report of what was rewritten in it.

    lowered: what stands for attnopt's operators; empty where they stay. Else none may be left.
    """
    if not isinstance(args, tuple):
        raise OptionError(
            f"args must be a tuple of the model's positional arguments, got {type(args).__name__}")
    options = Options.of({**_options_of(model), **given})
    if isinstance(model, OptimizedModule):
        model = users_module(model)
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if not isinstance(model, nn.Module):
        raise OptionError("model must be a torch.nn.Module or a torch.export.ExportedProgram, "
                          f"got {type(model).__name__}")
    kwargs = dict(kwargs or {})
    with torch.no_grad():
        traced = capture(model, args, kwargs, dynamic_shapes)
        rewritten = pipeline.rewrite(traced.captured, options)
        again = functools.partial(_export_again, model, traced.captured, rewritten, args, kwargs,
                                  dynamic_shapes)
        if lowered:
            write_factors(rewritten.graph_module, constants(model, traced.captured))
        if not lowered:
            program = again()
        elif traced.captured.symbols:
            # A new trace would guard what it assumes of sizes, a decomposition does not.
            _lower(rewritten.graph_module, lowered, replace=False)
            program = again().run_decompositions(dict(lowered))
        else:
            _lower(rewritten.graph_module, lowered)
            program = again()
    if options.strict:
        raise_if_kept(rewritten.sites)
    report = Report(sites=list(rewritten.sites), model_name=traced.captured.model_name,
                    timings=rewritten.timings, before=rewritten.text_before,
                    after=rewritten.text_after, graphs=[rewritten.record],
                    kernels=rewritten.kernels, notes=list(traced.captured.notes))
    return program, report


def to_compare(model: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None,
               dynamic_shapes: Any, given: Mapping[str, Any], report: Report
               ) -> Callable[..., Any]:
    """What a file of such a report must compute: what the author's model does, or where the user
    asked for approximations and some were used, what a program with these does."""
    if not approximations(report):
        return original(model)
    found = exported(model, args, kwargs, dynamic_shapes, {**given, "backend": "aten"},
                     portable_table())[0].module()
    return found


def approximations(report: Report) -> tuple[str, ...]:
    """What was approximated, by site."""
    return tuple(f"{s.path or s.node}: {s.approximation}, off by {s.deviation:.1e}"
                 for s in report.sites if s.status == "rewritten" and s.deviation is not None)


def raise_if_kept(sites: Iterable[SiteRecord]) -> None:
    """Raise StrictError if any site was left as it was."""
    kept = [s for s in sites if s.status == "kept"]
    if kept:
        first = kept[0]
        raise StrictError(f"every site must be rewritten, got {len(kept)} kept; the first is "
                          f"{first.path or 'in the model'} ({first.source}): {first.reason}")


def _options_of(model: Any) -> dict[str, Any]:
    """The options of a module that is optimised already."""
    if not isinstance(model, OptimizedModule):
        return {}
    options = type(model)._attnopt_runtime.options
    return {f.name: getattr(options, f.name) for f in fields(options)}


def _lower(module: fx.GraphModule, lowered: Mapping[Any, Callable[..., Any]], *,
           replace: bool = True) -> None:
    """Put what stands for attnopt's operators in their places, or only see that all have one."""
    for node in module.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "attnopt":
            continue
        if node.target not in lowered:
            raise CaptureError(f"{node.target} has no form without attnopt; leave out the rule "
                               "that uses it")
        if replace:
            node.target = lowered[node.target]
    module.recompile()


def save(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> Path:
    """`torch.export.save` to a file that appears whole or not at all.

    Raises:
        OptionError: the path cannot be written.
    """
    target = Path(path)
    with whole_file(target) as part:
        torch.export.save(program, part)
    return target


def _export_again(model: nn.Module, captured: Any, rewritten: pipeline.Rewritten,
                  args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any
                  ) -> torch.export.ExportedProgram:
    shell = _Program(model, captured, rewritten.graph_module)
    # The author's signature names the arguments, for shapes by name and for the saved program.
    signature = inspect.signature(model.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return shell.run(args, kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    shell.forward = forward  # type: ignore[method-assign]
    try:
        return torch.export.export(shell, args, kwargs, dynamic_shapes=dynamic_shapes,
                                   strict=False)
    except Exception as error:
        raise CaptureError(f"the rewritten graph cannot be exported: {error}") from error


def constants(model: nn.Module, captured: Any) -> dict[str, torch.Tensor]:
    """The buffers and literals of a model by the placeholder that brings them, as they are now."""
    found = {}
    for name, origin in captured.origins.items():
        if origin.kind not in ("input", "parameter"):
            home = find_slot(model, origin.path) if origin.held else None
            found[name] = captured.values[name] if home is None else home[0][home[1]]
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}


class _Program(nn.Module):
    """Runs a rewritten graph on parameters and buffers that it holds under their own names."""

    def __init__(self, model: nn.Module, captured: Any, graph: fx.GraphModule) -> None:
        super().__init__()
        self.training = model.training
        self._paths: list[tuple[str, str]] = []
        self._in_spec, self._out_spec = captured.in_spec, captured.out_spec
        self._run: list[Callable[..., Any]] = [graph.forward]
        self._autocast = autocast_state()
        for name, origin in captured.origins.items():
            if origin.kind == "input":
                continue
            home = find_slot(model, origin.path) if origin.held else None
            value = captured.values[name] if home is None else home[0][home[1]]
            path = origin.path if origin.held else f"literal_{name}"
            self._paths.append(self._hold(path, value, origin.kind))

    def _hold(self, path: str, value: torch.Tensor, kind: str) -> tuple[str, str]:
        owner, _, name = path.rpartition(".")
        module: nn.Module = self
        for step in filter(None, owner.split(".")):
            if step not in module._modules:
                module.add_module(step, nn.Module())
            module = module._modules[step]  # type: ignore[assignment]
        if name not in module._parameters and name not in module._buffers:
            if kind == "parameter" and isinstance(value, nn.Parameter):
                module.register_parameter(name, value)
            else:
                module.register_buffer(name, value, persistent=kind != "constant")
        return owner, name

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves = pytree.tree_leaves((args, kwargs))
        values = [getattr(self.get_submodule(owner), name) for owner, name in self._paths]
        state = self._autocast
        with autocast_off(state) if state else contextlib.nullcontext():
            flat = self._run[0](*values, *leaves)
        return pytree.tree_unflatten(flat, self._out_spec)

