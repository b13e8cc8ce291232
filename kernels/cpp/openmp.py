"""Which OpenMP runtime torch uses, so that generated libraries use the same one and no second.

Wheels of torch bring their own copy, some under a name of its own (libgomp-a34b3233.so.1), to which
a plain -fopenmp would not link; another package in the process may have brought yet another.
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch

_RUNTIME = re.compile(r"lib(?:gomp|iomp5|omp)\b[^/]*\.so[^/]*$")


def runtimes() -> list[str]:
    """Paths of all OpenMP libraries in this process; empty where that cannot be read."""
    return sorted({path for _, _, path in _maps() if _RUNTIME.search(path)})


def torch_runtime() -> str:
    """The path of the one that torch calls, "" if it was built without or if it cannot be told."""
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        address = ctypes.cast(library.omp_get_max_threads, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        found = runtimes()
        return found[0] if len(found) == 1 else ""
    return next((path for start, end, path in _maps() if start <= address < end), "")


def _maps() -> list[tuple[int, int, str]]:
    """(start, end, path) of every file that is mapped, by /proc/self/maps."""
    try:
        lines = Path("/proc/self/maps").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        span, slash, path = line.partition("/")
        if slash:
            start, _, end = span.split()[0].partition("-")
            found.append((int(start, 16), int(end, 16), slash + path))
    return found
