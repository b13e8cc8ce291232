"""Is the file what the model is? The checker, strict shape inference, and runs in onnxruntime.

The model and the file run on the example arguments and, where sizes are dynamic, on two other sizes
of each that the program admits. The bound is 1e-4 of the largest number of an output, or what half
precision rounds away.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from attnopt.agreement import allowed as allowed_difference
from attnopt.agreement import distance, outputs
from attnopt.errors import AttnOptError, VerificationError
from attnopt.onnx.report import OnnxReport

#: elements of inputs up to which the slow reference evaluator is asked as well
_SMALL = 1 << 16


def compare(report: OnnxReport, path: Path, model: Callable[..., Any],
            program: torch.export.ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any]
            ) -> OnnxReport:
    """The report with the differences between a file and a model.

    program: what was translated; it says which sizes are dynamic.

    Raises:
        AttnOptError: the file is not valid.
        VerificationError: a difference is beyond the bound, or onnxruntime cannot run the file.
    """
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(str(path), full_check=True)
        onnx.shape_inference.infer_shapes(
            onnx.load(path, load_external_data=False), strict_mode=True, data_prop=True)
        onnxruntime.set_default_logger_severity(3)
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:
        if type(error).__name__ == "NotImplemented":  # as for most operators in bfloat16
            raise VerificationError(
                "the exported file cannot be verified, because onnxruntime does not have all of "
                f"its operators on a CPU: {_line(error)}. Export the model in float32 or float16, "
                "or give verify=False") from error
        raise AttnOptError(f"the exported file is not valid: {_line(error)}") from error
    errors: dict[str, float] = {}
    bound = 0.0
    for words, given in _arguments(program, args, kwargs):
        with torch.no_grad():
            expected = outputs(model(*given[0], **given[1]))
        feed = _feed(session, given)
        found = [torch.from_numpy(x) for x in session.run(None, feed)]
        allowed = allowed_difference(expected)
        gap = distance(found, expected)
        errors[f"onnxruntime, {words}"], bound = gap, max(bound, allowed)
        if not gap <= allowed:
            raise VerificationError(
                "the exported file must compute what the model computes, got a difference of "
                f"{gap:.1e} on {words}, allowed are {allowed:.1e}")
    small = sum(x.numel() for x in pytree.tree_leaves((args, kwargs))
                if isinstance(x, Tensor)) <= _SMALL
    if small and report.size < 1 << 24:
        reference = _reference(path, session, (args, kwargs))
        if reference is not None:
            with torch.no_grad():
                expected = outputs(model(*args, **kwargs))
            errors["reference evaluator"] = distance(reference, expected)
    return dataclasses.replace(report, errors=errors, bound=bound)


def _reference(path: Path, session: Any, given: Any) -> list[Tensor] | None:
    """What onnx's own evaluator gives; None where it lacks an operator."""
    from onnx.reference import ReferenceEvaluator

    try:
        outputs: Any = ReferenceEvaluator(str(path)).run(None, _feed(session, given))
    except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError):
        return None
    return [torch.from_numpy(x.copy()) for x in outputs]


def _feed(session: Any, given: tuple[tuple[Any, ...], Mapping[str, Any]]) -> dict[str, Any]:
    leaves = [x for x in pytree.tree_leaves(given) if isinstance(x, Tensor)]
    names = [i.name for i in session.get_inputs()]
    if len(names) != len(leaves):
        raise AttnOptError(f"the exported file must take {len(leaves)} tensors, got {len(names)}")
    return {name: x.detach().contiguous().numpy() for name, x in zip(names, leaves, strict=True)}


def _arguments(program: torch.export.ExportedProgram, args: tuple[Any, ...],
               kwargs: dict[str, Any]) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """The example arguments, and others of admissible sizes."""
    yield "the example", (args, kwargs)
    specs = [s for s in program.graph_signature.user_inputs]
    nodes = {n.name: n for n in program.graph.nodes if n.op == "placeholder"}
    fakes = [nodes[s].meta.get("val") for s in specs if isinstance(s, str) and s in nodes]
    leaves, tree = pytree.tree_flatten((args, kwargs))
    if len(fakes) != len(leaves):
        return
    symbols = sorted({str(s) for f in fakes if isinstance(f, Tensor) for s in f.shape
                      if isinstance(s, torch.SymInt)})
    if not symbols or not all(re.fullmatch(r"\w+", s) for s in symbols):
        return
    ranges = {str(k): v for k, v in program.range_constraints.items()}
    sizes_of: list[Any] = [s for f in fakes if isinstance(f, Tensor) for s in f.shape]
    hints: dict[str, int] = {
        str(s): s.node.hint for s in sizes_of if isinstance(s, torch.SymInt)}
    for shift in (1, -1):
        sizes = {}
        for name in symbols:
            low, high = _range(ranges.get(name))
            wanted = hints[name] + shift * max(1, hints[name] // 3)
            sizes[name] = max(low, min(wanted, high))
        if sizes == hints:
            continue
        generator = torch.Generator().manual_seed(0)
        drawn = [_drawn(leaf, fake, sizes, generator) for leaf, fake in zip(
            leaves, fakes, strict=True)]
        words = ", ".join(f"{name} {size}" for name, size in sizes.items())
        yield words, pytree.tree_unflatten(drawn, tree)


def _range(found: Any) -> tuple[int, int]:
    if found is None:
        return 1, 1 << 20
    low, high = found.lower, found.upper
    return max(1, int(low)), int(high) if high.is_finite and int(high) < 1 << 20 else 1 << 20


def _drawn(leaf: Any, fake: Any, sizes: Mapping[str, int], generator: torch.Generator) -> Any:
    """The example cut or continued to other sizes: its own values, which the model can take."""
    if not isinstance(leaf, Tensor):
        return leaf
    for axis, size in enumerate(fake.shape):
        if isinstance(size, torch.SymInt) and leaf.shape[axis]:
            wanted = torch.arange(sizes[str(size)]) % leaf.shape[axis]
            leaf = leaf.index_select(axis, wanted)
    return leaf


def _line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
