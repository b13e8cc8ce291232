"""What attnopt runs on: versions, processor, accelerator, settings. For bug reports and results."""

from __future__ import annotations

import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

#: environment variables of attnopt, with what they do when they are not set
SETTINGS = {
    "ATTNOPT_CACHE_DIR": "the user's cache folder",
    "ATTNOPT_DISABLE": "not disabled",
    "ATTNOPT_LOG": "no logging",
}
PACKAGES = ("triton", "numpy", "sympy", "networkx", "transformers", "onnx", "onnxscript",
            "onnxruntime", "rich", "matplotlib")


def versions() -> dict[str, str]:
    """Versions of attnopt, Python, torch and the packages it may use; "" if not installed."""
    from attnopt import __version__

    found = {"attnopt": __version__, "python": platform.python_version(),
             "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = ""
    return found


def processor() -> dict[str, Any]:
    """The CPU: model, vector instructions that torch uses, cores and threads."""
    return {
        "model": _cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def accelerators() -> list[str]:
    """Names of the CUDA devices; empty without a working one."""
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def compiler() -> dict[str, Any]:
    """What compiles generated C++: its version, the vector instructions, or why there is none."""
    from attnopt.kernels.cpp.toolchain import isa, toolchain

    tool = toolchain()
    return {
        "command": " ".join(tool.command),
        "version": tool.version,
        "isa": isa().label,
        "lanes": isa().width,
        "openmp": tool.runtime,
        "why_not": tool.why_not(),
    }


def cache() -> dict[str, Any]:
    """The cache of generated kernels: folder, why it is refused if it is, files and bytes."""
    from attnopt.kernels import cache

    refused = cache.refusal()
    kinds: dict[str, dict[str, int]] = {}
    for entry in cache.entries():
        kind = kinds.setdefault(entry.kind, {"files": 0, "bytes": 0})
        kind["files"] += 1
        kind["bytes"] += entry.size
    return {
        "folder": str(cache.directory()),
        "refused": refused,
        "files": sum(kind["files"] for kind in kinds.values()),
        "bytes": sum(kind["bytes"] for kind in kinds.values()),
        "kinds": kinds,
    }


def settings() -> dict[str, str]:
    """The environment variables that attnopt reads, as they are now."""
    return {name: os.environ.get(name, "") for name in SETTINGS}


def collect() -> dict[str, Any]:
    """Everything that `attnopt env` shows: plain strings, numbers and lists."""
    return {
        "versions": versions(),
        "platform": platform.platform(),
        "cpu": processor(),
        "cuda": torch.version.cuda or "",
        "accelerators": accelerators(),
        "compiler": compiler(),
        "cache": cache(),
        "settings": settings(),
    }


def _cpu_model() -> str:
    """The name of the CPU; with family and model where it is no more than a brand.

    A hypervisor may hide the product ("AMD EPYC"); the numbers tell the microarchitecture.
    """
    facts: dict[str, str] = {}
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            key, _, value = line.partition(":")
            facts.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    name = facts.get("model name") or platform.processor() or platform.machine()
    if any(c.isdigit() for c in name) or not facts.get("cpu family"):
        return name
    return f"{name}, family {facts['cpu family']}, model {facts.get('model', '')}"
