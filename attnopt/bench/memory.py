"""How much memory a call takes at its peak, above what was there before.

On Linux the kernel keeps the largest resident size of a process and can be told to start anew, so
nothing is sampled; what malloc holds back from earlier calls is given back first. An accelerator's
allocator keeps the same figure.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_SYSTEM = Path("/proc/meminfo")


def peak(fn: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that `fn()` takes at its peak, its result included; None where that is not known."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = fn()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR.write_text("5")
        before = _status("VmRSS")
        result = fn()
        after = _status("VmHWM")
        del result
    except (OSError, AttributeError, StopIteration):
        return None
    return max(0, after - before)


def free(device: torch.device) -> int | None:
    """Bytes that are free on the device; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = _SYSTEM.read_text("ascii", "replace").splitlines()
        return 1024 * int(next(n for n in lines if n.startswith("MemAvailable:")).split()[1])
    except (OSError, StopIteration):
        return None


def _status(name: str) -> int:
    lines = _STATUS.read_text("ascii", "replace").splitlines()
    line = next(line for line in lines if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024
