"""Measure this machine for the cost model: `attnopt calibrate`.

What is found is a device profile (`attnopt.cost.devices`) in the user's cache folder, where it
comes before those that are shipped. It is data, so that a file of another version or a broken one
is passed over.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from attnopt import environment
from attnopt.bench import calibrate_cpu, calibrate_gpu
from attnopt.cost.devices import (
    Device,
    calibration_path,
    find_cpu,
    find_gpu,
    load,
    save,
    to_json,
)
from attnopt.errors import CacheError, OptionError
from attnopt.kernels import cache
from attnopt.kernels.cpp.toolchain import isa

KINDS = ("cpu", "gpu")
Say = Callable[[str], None]


def run(kinds: Iterable[str] = (), *, quick: bool = False, say: Say = print
        ) -> list[dict[str, Any]]:
    """Measure the CPU, the GPU or both, store their profiles and return them as plain data.

    kinds: "cpu" and "gpu"; empty for what there is. quick: see that everything runs, store nothing
    that is worth anything.

    Raises:
        OptionError: another kind, or "gpu" without a CUDA device.
        CacheError: the cache folder is refused; a profile in a temporary one would be lost.
    """
    wanted = list(kinds) or _present()
    if set(wanted) - set(KINDS):
        raise OptionError(f"kinds must be of {', '.join(KINDS)}, got {wanted}")
    if "gpu" in wanted and not torch.cuda.is_available():
        raise OptionError("gpu must be a CUDA device, this torch finds none")
    folder = _folder()
    found = []
    for kind in sorted(set(wanted), reverse=True):  # a GPU first: it is done sooner
        begun = time.monotonic(), time.process_time()
        say(f"{kind}: {name_of(kind)}")
        measured = (calibrate_cpu.measure(known("cpu"), name_of("cpu"), quick=quick, say=say)
                    if kind == "cpu" else
                    calibrate_gpu.measure(known("gpu"), name_of("gpu"), quick=quick, say=say))
        path = calibration_path(folder, kind, name_of(kind))
        save(measured.device, path)
        found.append({**describe(measured.device, path), "notes": measured.notes,
                      "prior": dict(measured.prior.coefficients),
                      "seconds": round(time.monotonic() - begun[0], 1),
                      "cpu_seconds": round(time.process_time() - begun[1], 1)})
    return found


def name_of(kind: str) -> str:
    """The name that this machine's CPU or first GPU gives itself."""
    if kind == "gpu":
        return str(torch.cuda.get_device_name(0))
    return str(environment.processor()["model"])


def known(kind: str, folder: Path | None = None) -> Any:
    """What is shipped of this machine's CPU (a `Cpu`) or GPU (a `Gpu`), or in `folder`."""
    if kind == "gpu":
        major, minor = torch.cuda.get_device_capability(0)
        arch = "" if torch.version.hip else f"sm_{major}{minor}"
        return find_gpu(name_of(kind), arch, folder)
    return find_cpu(name_of(kind), isa().name, os.cpu_count() or 1, folder)


def stored() -> list[dict[str, Any]]:
    """The profiles in the cache folder, as `run` returns them; files that are none with an error.
    """
    found = []
    for path in _files():
        try:
            found.append(describe(load(path), path))
        except (OSError, ValueError) as error:
            found.append({"path": str(path), "error": str(error)})
    return found


def reset() -> list[str]:
    """Remove all profiles from the cache folder; their paths."""
    removed = []
    for path in _files():
        path.unlink(missing_ok=True)
        removed.append(str(path))
    return removed


def describe(device: Device, path: Path) -> dict[str, Any]:
    """A profile as plain data."""
    return {"path": str(path), "device": json.loads(to_json(device))}


def table(entry: dict[str, Any]) -> list[str]:
    """A profile as lines of text."""
    if "error" in entry:
        return [f"{entry['path']}: not used, {entry['error']}"]
    device = entry["device"]
    lines = [device["name"], f"  {device.get('source', '')}", f"  stored: {entry['path']}"]
    if "gemm" in device:
        rates = ", ".join(f"{dtype} {rate:g}" for dtype, rate in device["gemm"].items())
        lines.append(f"  products: {rates} GFLOP/s of one core")
    for key, what in (("memory", "memory"), ("cache", "last cache")):
        if key in device:
            lines.append(f"  {what}: {device[key]:g} GB/s")
    for note, value in entry.get("notes", {}).items():
        lines.append(f"  {note}: {f'{value:.2f}x' if isinstance(value, float) else value}")
    if "seconds" in entry:
        lines.append(f"  measured in {entry['seconds']:.0f} s, {entry['cpu_seconds']:.0f} s of "
                     "CPU time")
    prior = entry.get("prior", {})
    for name, found in device.get("coefficients", {}).items():
        lines.append(f"    {name:16} {_value(found):32} {_value(prior.get(name, ''))}".rstrip())
    return lines


def _value(found: Any) -> str:
    if isinstance(found, dict):
        return ", ".join(f"{k} {v:g}" for k, v in found.items())
    return f"{found:g}" if isinstance(found, int | float) else str(found)


def _present() -> list[str]:
    return ["cpu", "gpu"] if torch.cuda.is_available() else ["cpu"]


def _folder() -> Path:
    why = cache.refusal()
    if why:
        raise CacheError(f"no profile can be stored: {why}")
    return cache.directory()


def _files() -> list[Path]:
    folder = _folder()
    return sorted(p for kind in KINDS for p in folder.glob(f"{kind}-*.json") if p.is_file())


