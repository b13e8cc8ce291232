"""optimize: the attention of an existing ONNX file, found, rewritten and put back.

    attnopt.onnx.optimize("model.onnx", "faster.onnx")

Each region (`attnopt.onnx.regions`) becomes a torch module with the tensors that the file itself
computes as its example, goes through the same recognition, proofs and rules as a torch model, and
comes back as the functions that `export_onnx` writes. What is not known stays as it is.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor

from attnopt.agreement import allowed, distance
from attnopt.errors import AttnOptError, OptionError, VerificationError
from attnopt.onnx.bodies import Bodies
from attnopt.onnx.drawing import draws, dynamic_axes, edge
from attnopt.onnx.export import LOWERINGS, OPSETS, _check, _quiet, attach, calls, untranslated
from attnopt.onnx.needed import RUNNING, require
from attnopt.onnx.read import Part, read
from attnopt.onnx.regions import Region, regions, shared
from attnopt.onnx.report import OnnxReport
from attnopt.onnx.saving import save, whole_model
from attnopt.report import Report


def optimize(
    model: str | os.PathLike[str] | Any,
    path: str | os.PathLike[str],
    *,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    lowering: str = "auto",
    keep_functions: bool = True,
    verify: bool = True,
    **options: Any,
) -> OnnxReport:
    """Write an ONNX model with its attention rewritten, compared with the original.

    Args:
        model: the path of a file, or an onnx.ModelProto; opset 18 to 25, or 13 to 17, which are
            brought to 18 first.
        path: of the new file; it appears whole or not at all, from 1.5 GiB of weights on with them
            in `<path>.data` beside it.
        inputs: arrays by name to run the model on, or several such; drawn where left out (numbers
            of a normal distribution, integers of 0 and 1, two sizes of each dynamic axis).
        lowering, keep_functions: as for `export_onnx`.
        verify: run both files in onnxruntime on the inputs.
        options: those of `attnopt.optimize`.

    Raises:
        OptionError: an argument is of a wrong type or value.
        MissingPackageError: onnx, onnxscript or onnxruntime is not installed.
        VerificationError: the new file does not compute what the model computes; nothing is
            written.
        AttnOptError: the model is no valid ONNX, or cannot be run on the inputs.
    """
    _check(OPSETS[-1], lowering, keep_functions, verify)
    require(RUNNING)  # runs the regions, even where nothing is verified
    _check_options(model, lowering, options)
    target = Path(path)
    with tempfile.TemporaryDirectory() as folder, whole_model(target) as part:
        source = _source(model, Path(folder))
        given = common.ShapeInferencePass()(read(source)).model
        opset = given.opset_imports.get("", 0)
        feeds = draws(given, inputs)
        found, kept = regions(given.graph)
        runs = [_run(source, feed, shared(found)) for feed in feeds]
        bodies = Bodies(lowering, keep_functions)
        with _quiet():
            for region in found:
                reason = _rewrite(given, region, runs, opset, bodies, options)
                if reason:
                    kept.append(f"{region.anchor}: {reason}")
            forms = attach(given, bodies, opset, Report())
        common.RemoveUnusedNodesPass()(given)
        save(given, part)
        report = OnnxReport.of(part, forms, Report(), opset, kept=kept)
        if verify:
            report = _compared(report, source, part, feeds, edge(given, inputs))
    return report.at(target)


def _check_options(model: Any, lowering: str, options: Mapping[str, Any]) -> None:
    from attnopt.passes.options import Options

    if not isinstance(model, (str, os.PathLike)) and not hasattr(model, "SerializeToString"):
        raise OptionError("model must be the path of an ONNX file or an onnx.ModelProto, got "
                          f"{type(model).__name__}")
    assert lowering in LOWERINGS
    Options.of(dict(options))


def _source(model: Any, folder: Path) -> Path:
    """The model as a file that onnxruntime can run and torch can write parts of."""
    import onnx

    if isinstance(model, (str, os.PathLike)):
        source = Path(model)
        read(source)
    else:
        source = folder / "given.onnx"
        try:
            onnx.save(model, source)
        except Exception as error:
            raise AttnOptError(f"model is no valid ONNX: {_line(error)}") from error
    proto = onnx.load(source, load_external_data=False)
    opset = max((o.version for o in proto.opset_import if o.domain in ("", "ai.onnx")), default=0)
    if opset > OPSETS[-1] or opset < 13:
        raise AttnOptError(f"the opset of the model must be 13 to {OPSETS[-1]}, got {opset}")
    if opset >= OPSETS[0]:
        return source
    try:
        converted = onnx.version_converter.convert_version(onnx.load(source), OPSETS[0])
    except Exception as error:
        raise AttnOptError(
            f"the model cannot be brought to opset {OPSETS[0]}: {_line(error)}") from error
    onnx.save(converted, folder / "converted.onnx")
    return folder / "converted.onnx"


# -- one region ----------------------------------------------------------------------------------
def _rewrite(model: ir.Model, region: Region, runs: list[dict[str, Tensor]], opset: int,
             bodies: Bodies, options: Mapping[str, Any]) -> str:
    """Put the optimised region in the graph; or else why not."""
    from attnopt.program import exported

    names = [str(v.name) for v in region.inputs]
    examples = [tuple(run[name] for name in names) for run in runs]
    part = Part(region.nodes, region.inputs, region.output).eval()
    sizes = dynamic_axes(model, region.inputs, examples)
    try:
        program, report = exported(part, examples[0], None, (sizes,),
                                   {**options, "backend": "aten"}, bodies.table())
    except AttnOptError as error:
        return _line(error)
    done = [s for s in report.sites if s.status == "rewritten"]
    if not done:
        return next((s.reason or s.status for s in report.sites), "no attention in it")
    fakes = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder"][-len(names):]
    for fake, axes in zip(fakes, sizes, strict=True):
        if any(not isinstance(fake.shape[axis], torch.SymInt) for axis in axes):
            return "the rewritten attention would hold for one size only"
    try:
        with torch.no_grad():
            made = torch.onnx.export(program, examples[0], dynamo=True, verbose=False,
                                     opset_version=opset)
    except torch.onnx.errors.OnnxExporterError as error:
        return untranslated(error)
    if made is None or made.model.opset_imports.get("") != opset:
        return f"torch does not write opset {opset}"
    try:
        bodies.functions(opset, calls(made.model.graph), report)
    except AttnOptError as error:
        return _line(error)
    _splice(model.graph, region, made.model.graph, len(model.graph))
    return ""


def _splice(graph: ir.Graph, region: Region, made: ir.Graph, number: int) -> None:
    """The nodes of `made` in the place of a region."""
    mark = f"attnopt_{number}_"
    nodes = list(made)
    for value in [*made.initializers.values()]:
        tensor = value.const_value
        assert tensor is not None and value.name is not None
        held = ir.Value(name=f"{mark}{value.name}", shape=value.shape, type=value.type,
                        const_value=tensor)
        graph.register_initializer(held)
        value.replace_all_uses_with(held)
    for inner, outer in zip(list(made.inputs), region.inputs, strict=True):
        inner.replace_all_uses_with(outer)
    result, last = made.outputs[0], region.output.producer()
    made.outputs.clear()
    made.remove(nodes)
    for node in nodes:
        node.name = f"{mark}{node.name}"
        for value in node.outputs:
            value.name = f"{mark}{value.name}" if value.name else value.name
    assert last is not None
    graph.insert_before(last, nodes)
    name = region.output.name
    region.output.replace_all_uses_with(result, replace_graph_outputs=True)
    result.shape, result.type = region.output.shape, region.output.type or result.type
    region.output.name, result.name = f"{mark}before", name
    graph.remove(last, safe=True)


# -- runs ----------------------------------------------------------------------------------------
def _session(path: Path, extra: Sequence[str] = ()) -> Any:
    import onnx
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 3
    try:
        if not extra:
            return onnxruntime.InferenceSession(str(path), settings,
                                                providers=["CPUExecutionProvider"])
        proto = onnx.load(path, load_external_data=False)
        settings.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent.resolve()))
        held = {o.name for o in proto.graph.output}
        proto.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name)
                                  for name in extra if name not in held)
        return onnxruntime.InferenceSession(proto.SerializeToString(), settings,
                                            providers=["CPUExecutionProvider"])
    except Exception as error:
        raise AttnOptError(f"onnxruntime does not take the model: {_line(error)}") from error


def _run(path: Path, feed: Mapping[str, Any], values: set[ir.Value]) -> dict[str, Tensor]:
    """What values of a model are in a run."""
    own = [str(v.name) for v in values if v.name in feed]
    names = sorted({str(v.name) for v in values} - set(own))
    session = _session(path, names)
    try:
        arrays = session.run(names, dict(feed)) if names else []
    except Exception as error:
        raise AttnOptError(f"the model cannot be run on drawn inputs, give some as inputs=: "
                           f"{_line(error)}") from error
    found = {name: torch.from_numpy(a) for name, a in zip(names, arrays, strict=True)}
    return {**found, **{name: torch.from_numpy(feed[name]) for name in own}}


def _compared(report: OnnxReport, source: Path, part: Path, feeds: Sequence[Mapping[str, Any]],
              more: Sequence[Mapping[str, Any]]) -> OnnxReport:
    """The report with the differences between both files.

    more: feeds that the model itself may refuse.
    """
    import onnx

    try:
        onnx.checker.check_model(str(part), full_check=True)
    except Exception as error:
        raise AttnOptError(f"the new file is not valid: {_line(error)}") from error
    before, after = _session(source), _session(part)
    errors, bound = {}, 0.0
    for feed in (*feeds, *more):
        try:
            expected = [torch.from_numpy(a) for a in before.run(None, dict(feed))]
        except Exception:
            if any(feed is f for f in feeds):
                raise
            continue
        made = [torch.from_numpy(a) for a in after.run(None, dict(feed))]
        gap, most = distance(made, expected), allowed(expected)
        words = ", ".join(f"{k} {'x'.join(map(str, v.shape))}" for k, v in feed.items())
        errors[f"onnxruntime, {words}"], bound = gap, max(bound, most)
        if not gap <= most:
            raise VerificationError(
                "the new file must compute what the model computes, got a difference of "
                f"{gap:.1e} on {words}, allowed are {most:.1e}")
    return dataclasses.replace(report, errors=errors, bound=bound)


def _line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
