"""export_onnx: an optimised model as an ONNX file that any runtime takes.

Structured masks are exported as tiles or as index arithmetic, never as a dense tensor; biases as
tables or factors; deformable sampling as gathers. Each attention is a function of the domain
`attnopt` with a body of standard operators (`attnopt.onnx.forms`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnopt import __version__
from attnopt.errors import AttnOptError, OptionError
from attnopt.onnx.bodies import Bodies
from attnopt.onnx.forms import DOMAIN, Form, cause
from attnopt.onnx.needed import RUNNING, WRITING, require
from attnopt.onnx.report import OnnxReport
from attnopt.report import Report

#: opset versions that torch writes and runtimes of today take
OPSETS = tuple(range(18, 26))
LOWERINGS = ("auto", "attention", "tiled", "dense")


def export_onnx(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    opset: int = 23,
    lowering: str = "auto",
    dynamic_shapes: Any = None,
    keep_functions: bool = True,
    verify: bool = True,
    **options: Any,
) -> OnnxReport:
    """Write an optimised model as ONNX, and compare it with the model in onnxruntime.

    Args:
        model: a module, one that is optimised already, or an ExportedProgram.
        args, kwargs, dynamic_shapes: as for `torch.export.export`.
        path: of the file; it appears whole or not at all, from 1.5 GiB of weights on with them in
            `<path>.data` beside it.
        opset: version of the standard operators, 18 to 25. From 23 on there is an `Attention`.
        lowering: "auto", the form that costs least; "attention", one fused attention wherever it
            can say the same; "tiled", tiles wherever the mask allows; "dense", matrix products.
        keep_functions: keep each attention as a function of the domain `attnopt`.
        verify: check the file, and run it in onnxruntime on the example arguments and, where sizes
            are dynamic, on others; with approximations among the rules, it is compared with a
            program that has them.
        options: those of `attnopt.optimize`.

    Raises:
        OptionError: an argument is of a wrong type or value.
        MissingPackageError: onnx, onnxscript or, to verify, onnxruntime is not installed.
        CaptureError: the model cannot be captured as one graph.
        VerificationError: the file does not compute what the model computes, or onnxruntime has
            no operators for it (bfloat16); nothing is written.
        AttnOptError: the file is not valid.
    """
    _check(opset, lowering, keep_functions, verify)
    from attnopt.onnx.check import compare
    from attnopt.onnx.saving import save, whole_model
    from attnopt.program import exported, to_compare

    target = Path(path)
    with whole_model(target) as part:
        bodies = Bodies(lowering, keep_functions)
        with _quiet():
            program, report = exported(model, args, kwargs, dynamic_shapes,
                                       {**options, "backend": "aten"}, bodies.table())
            made, forms = _translate(program, args, dict(kwargs or {}), opset, bodies, report)
        save(made.model, part)
        found = OnnxReport.of(part, forms, report, opset)
        if verify:
            wanted = to_compare(model, args, kwargs, dynamic_shapes, options, report)
            found = compare(found, part, wanted, program, args, dict(kwargs or {}))
    return found.at(target)


def _check(opset: Any, lowering: Any, keep_functions: Any, verify: Any) -> None:
    if opset not in OPSETS or isinstance(opset, bool):
        raise OptionError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset!r}")
    if lowering not in LOWERINGS:
        raise OptionError(f"lowering must be one of {', '.join(LOWERINGS)}, got {lowering!r}")
    for name, value in (("keep_functions", keep_functions), ("verify", verify)):
        if not isinstance(value, bool):
            raise OptionError(f"{name} must be True or False, got {value!r}")
    require(*WRITING, *((RUNNING,) if verify else ()))


def _translate(program: torch.export.ExportedProgram, args: tuple[Any, ...],
               kwargs: dict[str, Any], opset: int, bodies: Bodies, report: Report
               ) -> tuple[Any, list[Form]]:
    """The torch.onnx program, and the forms of its attentions."""
    try:
        with torch.no_grad():
            made = torch.onnx.export(program, args, kwargs=kwargs, dynamo=True, verbose=False,
                                     opset_version=opset)
    except torch.onnx.errors.OnnxExporterError as error:
        raise AttnOptError(untranslated(error)) from error
    if made is None:
        raise AttnOptError("torch.onnx.export gave nothing")
    return made, attach(made.model, bodies, opset, report)


def untranslated(error: Exception) -> str:
    """Why torch.onnx cannot write a program: its innermost cause, on one line."""
    return f"torch.onnx cannot write it: {cause(error)}"


def calls(graph: Any) -> dict[str, list[Any]]:
    """The nodes of a graph that call functions of ours, by name."""
    found: dict[str, list[Any]] = {}
    for node in graph:
        if node.domain == DOMAIN:
            found.setdefault(node.op_type, []).append(node)
    return found


def attach(model: Any, bodies: Bodies, opset: int, report: Report) -> list[Form]:
    """Give a model the functions that it calls; their forms."""
    called = calls(model.graph)
    for function in bodies.functions(model.opset_imports.get("", opset), called, report):
        model.functions[function.identifier()] = function
    forms = []
    for form in bodies.forms:
        own = called.get(form.name, [])
        if not own:
            continue
        for node in own:
            node.metadata_props["attnopt.version"] = __version__
            node.metadata_props["attnopt.form"] = form.form
            node.metadata_props["attnopt.spec"] = form.spec
        forms.append(dataclasses.replace(form, calls=len(own)))
    if forms:
        model.opset_imports[DOMAIN] = 1
    return forms


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.onnx and onnxscript tell more than a user wants to know."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
