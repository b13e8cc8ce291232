"""Exported files in onnxruntime on this CPU: ours beside every export of the unmodified model.

    eager 18    the author's code as torch.onnx writes it at that opset; "plain": without the graph
                optimisations of onnxruntime
    sdpa 23     scaled_dot_product_attention with a ready-made mask, a constant of the file
    best        that of all these whose median is the lowest: what the goals are held against
    ours        export_onnx, at the opset whose median is the lower

CPU seconds of one thread, taken in turns; peak is what one run takes, size that of the file with
its data. The error is the largest difference from float64.
"""

from __future__ import annotations

import functools
import gc
import importlib.util
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.bench import memory
from attnopt.bench.attentions import Attention, SlidingWindow
from attnopt.bench.exact import truth
from attnopt.bench.rows import chosen, measured
from attnopt.bench.side_by_side import OURS, Case, ratio
from attnopt.bench.sparse_attentions import Grid
from attnopt.timing import interleave

_OPSETS = (18, 23)
_NEEDED = ("onnx", "onnxscript", "onnxruntime")
BEST = "best"


def every(quick: bool = False) -> list[Case]:
    """The rows. quick: the same structures on short sequences, without goals."""
    edge, small, window, length = (14, 3, 32, 512) if quick else (56, 7, 256, 4096)
    goals: list[dict[str, tuple[float, float]]] = [
        {}, {}] if quick else [{BEST: (6, 9)}, {BEST: (8, 11)}]
    return [
        Case("2-D window 7", functools.partial(Grid, (edge,) * 2, (small,) * 2), 4, edge**2, 32,
             goals=goals[0]),
        Case("sliding window 256", functools.partial(SlidingWindow, window), 8, length, 64,
             goals=goals[1])]


def measure(
    optimize: Callable[..., Any],
    *,
    repeats: int | None = None,
    quick: bool = False,
    cases: Iterable[str] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Rows by name; nothing where onnxruntime is missing. optimize is not used: files are ours."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        say(f"left out: needs {', '.join(missing)}")
        return {}
    run = functools.partial(run_files, repeats=repeats or (3 if quick else 7))
    return measured(chosen(every(quick), cases), run, say)


class _Fused(nn.Module):
    """SDPA with a mask that the file holds."""

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask)


def run_files(case: Case, repeats: int) -> dict[str, Any]:
    """One row: every file is written, run once for its error and memory, and timed in turns with
    the faster of ours."""
    attention = case.make().eval()
    inputs = case.inputs(torch.device("cpu"))
    attention.see(*inputs)
    exact = truth(attention, *inputs, None)
    times: dict[str, dict[str, list[float]]] = {}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        files, forms = _files(attention, inputs, Path(folder))
        own = {name: _step(path, inputs, True) for name, path in files.items()
               if name.startswith(OURS)}
        first = interleave(own, repeats, threads=1)
        ours = min(own, key=lambda name: statistics.median(first[name]))
        # One session of a peer at a time: each may hold several matrices of all scores.
        for name, path in files.items():
            step = _step(path, inputs, "plain" not in name)
            peak = memory.peak(step, torch.device("cpu"))  # of its first run: sessions keep memory
            found[name] = {"error": exact.error(step()), "file_bytes": _size(path),
                           "peak_bytes": peak}
            if name not in own:
                times[name] = interleave({name: step, ours: own[ours]}, repeats, threads=1)
            del step
            gc.collect()
    seconds = {name: statistics.median(pair[name]) for name, pair in times.items()}
    best = min(seconds, key=seconds.__getitem__)
    seconds |= {name: statistics.median(t) for name, t in first.items()}
    seconds[ours] = statistics.median(times[best][ours])
    contestants = {name: {"seconds": seconds[name], **found[name]} for name in files}
    return {
        "shape": case.shape, "dtype": case.precision, "training": False, "device": "cpu",
        "threads": 1, "rounds": repeats, "clock": "cpu",
        "ours": {"status": "rewritten", "lowering": forms[ours], "tile": "", "file": ours},
        "best_export": best,
        "contestants": {**contestants, OURS: contestants[ours]},
        "left_out": {},
        "ratios": {BEST: ratio(times[best][best], times[best][ours], case.goals.get(BEST)),
                   **{name: ratio(pair[name], pair[ours]) for name, pair in times.items()}},
    }


def _files(attention: Attention, inputs: tuple[Tensor, ...], folder: Path
           ) -> tuple[dict[str, Path], dict[str, str]]:
    """The files by name, and the forms of ours."""
    from attnopt.onnx.export import export_onnx

    files: dict[str, Path] = {}
    forms: dict[str, str] = {}
    mask = (attention.fused(*inputs[:2]) or {}).get("attn_mask")
    models: dict[str, nn.Module] = {"eager": attention}
    if isinstance(mask, Tensor):
        models |= {"sdpa": _Fused(mask),
                   "sdpa float": _Fused(torch.where(mask, 0.0, -torch.inf))}
    for opset in _OPSETS:
        for name, model in models.items():
            path = folder / f"{name.replace(' ', '_')}{opset}.onnx"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.onnx.export(model, inputs, path, dynamo=True, opset_version=opset,
                                  verbose=False)
            files[f"{name} {opset}"] = files[f"{name} {opset} plain"] = path
        path = folder / f"ours{opset}.onnx"
        report = export_onnx(attention, inputs, path, opset=opset, verify=False)
        files[f"{OURS} {opset}"] = path
        forms[f"{OURS} {opset}"] = ", ".join(form.form for form in report.forms)
    return files, forms


def _step(path: Path, inputs: tuple[Tensor, ...], optimised: bool) -> Callable[..., Any]:
    """One run of a file, on one thread."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    levels = onnxruntime.GraphOptimizationLevel
    settings.graph_optimization_level = (
        levels.ORT_ENABLE_ALL if optimised else levels.ORT_DISABLE_ALL)
    session = onnxruntime.InferenceSession(str(path), settings,
                                           providers=["CPUExecutionProvider"])
    feed = {given.name: t.numpy() for given, t in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: (torch.from_numpy(session.run(None, feed)[0]),)


def _size(path: Path) -> int:
    return sum(p.stat().st_size for p in path.parent.glob(f"{path.name}*"))
