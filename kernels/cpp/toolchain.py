"""From generated C++ source to a loaded library: the system's compiler, once per source.

    toolchain().why_not()             "" where kernels can be compiled and loaded, else the reason
    compile_all(sources) -> paths     in parallel; what the cache has costs no compiler call
    load(path) -> ctypes.CDLL         only what the cache vouches for

A compiler is tried once with a small OpenMP library, and what it is is kept in the cache, so that a
second process starts no compiler at all. Libraries are linked to the very OpenMP runtime that torch
has loaded, whatever it is called: two runtimes in one process would mean two pools of threads.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from attnopt import logs
from attnopt.errors import AttnOptError, KernelError
from attnopt.kernels import cache
from attnopt.kernels.cpp.isa import Isa, isa, isas
from attnopt.kernels.cpp.openmp import runtimes, torch_runtime

__all__ = ["Isa", "Toolchain", "compile_all", "compiler_calls", "isa", "isas", "load", "toolchain"]

KIND = "cpp"
#: tried in this order where CXX is not set
COMPILERS = ("c++", "g++", "clang++")
#: no -ffast-math, because NaN and inf must stay what they are; -std=c++17 alone forbids FMA
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast",
         "-fno-exceptions", "-fno-rtti", "-fno-semantic-interposition", "-fPIC", "-shared",
         "-fopenmp", "-w")
#: symbols of templates must not be merged between two libraries
GCC_FLAGS = ("-fno-gnu-unique",)
PROBE = """#include <omp.h>
#ifndef _OPENMP
#error "OpenMP must be on"
#endif
extern "C" int attnopt_probe() { return omp_get_max_threads(); }
"""
_TIMEOUT = 300.0
_SHOWN_LINES = 12

_lock = threading.Lock()
_calls = 0
_pending: dict[str, Future[Path]] = {}
_failed: dict[str, KernelError] = {}
_loaded: dict[Path, ctypes.CDLL] = {}


@dataclass(frozen=True)
class Toolchain:
    """A compiler that was tried out; `reason` says why there is none.

    command: how it is called; version: the first line that it says of itself; runtime: the OpenMP
    library to link to, "" for the compiler's own.
    """

    command: tuple[str, ...] = ()
    version: str = ""
    runtime: str = ""
    reason: str = ""

    def why_not(self) -> str:
        """Why no kernel can be compiled here; "" where one can."""
        return self.reason

    def flags(self, isa: Isa) -> tuple[str, ...]:
        """The options for a source, without names of files."""
        gcc = () if "clang" in self.version else GCC_FLAGS
        return (*FLAGS, *gcc, *isa.flags)

    def key(self, source: str, isa: Isa) -> str:
        """The name of the compiled source: everything that the result depends on."""
        return cache.key(source, *self.flags(isa), isa.label, self.version, *self.command,
                         Path(self.runtime).name, torch.__version__)

    def compile(self, source: str, isa: Isa) -> Path:
        """Compile and store one source, its text beside it; KernelError if that fails."""
        key = self.key(source, isa)
        path = cache.store(KIND, key, ".cpp", source.encode())
        # The runtime comes first and --as-needed, so that the compiler's own is not linked.
        command = [*self.command, *self.flags(isa), "-Wl,--as-needed", str(path),
                   *([self.runtime] if self.runtime else []), "-o"]
        try:
            with tempfile.TemporaryDirectory(prefix="attnopt-") as folder:
                out = Path(folder, "kernel.so")
                done = _call([*command, str(out)])
                if done.returncode == 0:
                    return cache.store(KIND, key, ".so", out.read_bytes())
            said = _first_lines(done.stderr or done.stdout)
        except (OSError, subprocess.SubprocessError) as error:
            said = str(error)
        raise KernelError(f"{shlex.join(self.command)} failed on {path}: {said}", path)


def compiler_calls() -> int:
    """How many times this process has started a compiler."""
    return _calls


def toolchain() -> Toolchain:
    """The compiler named by CXX, else the first of c++, g++ and clang++ that works."""
    return _toolchain(os.environ.get("CXX", ""), os.environ.get("PATH", ""), sys.platform)


def compile_all(sources: Sequence[str], isa: Isa | None = None) -> list[Path]:
    """The libraries of some sources, in their order; `isa` None is the best of this machine.

    Sources that are in the cache cost no compiler call, others are compiled in parallel. A source
    that several threads ask for is compiled once; several processes may each compile it, and the
    last one's result stays. Raises KernelError with the compiler's words and the kept source.
    """
    tool, target = toolchain(), isa or isas()[0]
    if tool.why_not():
        raise KernelError(tool.why_not())
    keys = [tool.key(source, target) for source in sources]
    found: dict[str, Path | Future[Path]] = {}
    mine: dict[str, tuple[str, Future[Path]]] = {}
    with _lock:
        for key, source in zip(keys, sources, strict=True):
            if key in found:
                continue
            if key in _failed:
                raise _failed[key]
            path = cache.find(KIND, key, ".so")
            if path is None and key not in _pending:
                mine[key] = source, _pending.setdefault(key, Future())
            found[key] = path or _pending[key]
    if mine:
        _compile_these(tool, target, mine)
    return [entry.result() if isinstance(entry, Future) else entry
            for entry in (found[key] for key in keys)]


def load(path: Path) -> ctypes.CDLL:
    """The library of a path that `compile_all` gave, loaded once per process.

    Raises KernelError for a file that the cache does not vouch for, or that is none of a library;
    the latter is removed, so that it is compiled anew.
    """
    with _lock:
        if path not in _loaded:
            if not cache.vouches(path):
                raise KernelError(f"{path} must be a file of the cache that only the user writes")
            try:
                _loaded[path] = ctypes.CDLL(str(path))
            except OSError as error:
                path.unlink(missing_ok=True)
                raise KernelError(f"{path} cannot be loaded: {error}") from error
        return _loaded[path]


def _compile_these(tool: Toolchain, target: Isa,
                   sources: dict[str, tuple[str, Future[Path]]]) -> None:
    def one(key: str) -> None:
        source, future = sources[key]
        try:
            future.set_result(tool.compile(source, target))
        except AttnOptError as error:
            with _lock:
                if isinstance(error, KernelError):
                    _failed[key] = error
            future.set_exception(error)

    try:
        with ThreadPoolExecutor(min(len(sources), _processors())) as pool:
            list(pool.map(one, sources))
    finally:  # also when interrupted: nobody may wait for ever
        with _lock:
            for key, (_, future) in sources.items():
                del _pending[key]
                if not future.done():
                    future.set_exception(KernelError("compilation was interrupted"))


@functools.cache
def _toolchain(given: str, search: str, system: str) -> Toolchain:
    if system != "linux":
        return Toolchain(reason=f"generated C++ needs Linux, this is {system}")
    reasons = []
    for tool in _candidates(given, search):
        if not tool.reason:
            tool = _tried(tool)
        if not tool.reason:
            return tool
        reasons.append(tool.reason)
    why = "; ".join(reasons) or f"no C++ compiler: none of {', '.join(COMPILERS)} is in PATH"
    logs.get("cpp").info("no generated C++: %s", why)
    return Toolchain(reason=why)


def _candidates(given: str, search: str) -> Iterator[Toolchain]:
    """Compilers as they are found, not tried out yet; each program once."""
    seen = set()
    for name in [given] if given.strip() else COMPILERS:
        words = shlex.split(name)
        program = shutil.which(words[0], path=search)
        if program is None:
            if given:
                yield Toolchain(reason=f"CXX must name a C++ compiler, got {given!r}")
        elif (real := os.path.realpath(program)) not in seen:
            seen.add(real)
            yield Toolchain((program, *words[1:]))


def _tried(tool: Toolchain) -> Toolchain:
    """The compiler with its version if its libraries can be loaded here, else with a reason."""
    name = shlex.join(tool.command)
    try:
        known = _identity(tool.command)
        noted = _noted(known)
        before = runtimes()
        tool = replace(tool, version=noted or _version(tool.command), runtime=torch_runtime())
        path = cache.find(KIND, tool.key(PROBE, isas()[0]), ".so") or tool.compile(
            PROBE, isas()[0])
        if load(path).attnopt_probe() < 1:
            raise KernelError("its OpenMP has no threads")
        if len(runtimes()) > max(1, len(before)):
            raise KernelError("its OpenMP would be a second one beside torch's")
        if not noted:
            cache.store(KIND, known, ".json", json.dumps(tool.version).encode())
    except (AttnOptError, OSError, AttributeError, subprocess.SubprocessError) as error:
        return replace(tool, reason=f"the C++ compiler {name} does not work: {error}")
    return tool


def _identity(command: tuple[str, ...]) -> str:
    """The key of a program as it is now: asking it for its version starts a process."""
    info = os.stat(command[0])
    return cache.key("compiler", *command, os.path.realpath(command[0]), str(info.st_mtime_ns),
                     str(info.st_size))


def _noted(known: str) -> str:
    """The version that an earlier process has kept; "" if there is none."""
    note = cache.find(KIND, known, ".json")
    try:
        return str(json.loads(note.read_text("utf-8"))) if note else ""
    except (OSError, ValueError):
        return ""


def _version(command: tuple[str, ...]) -> str:
    done = _call([*command, "--version"])
    if done.returncode != 0 or not done.stdout.strip():
        raise KernelError(f"it says no version: {_first_lines(done.stderr)}")
    return done.stdout.strip().splitlines()[0]


def _call(command: list[str]) -> subprocess.CompletedProcess[str]:
    global _calls
    with _lock:
        _calls += 1
    return subprocess.run(command, capture_output=True, text=True, errors="replace",
                          stdin=subprocess.DEVNULL, timeout=_TIMEOUT,
                          env={**os.environ, "LC_ALL": "C"}, check=False)


def _first_lines(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    # What comes before the first error only says from where a file was included.
    first = next((i for i, line in enumerate(lines) if "error" in line), 0)
    return "\n".join(lines[first:first + _SHOWN_LINES]) or "it says nothing"


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _after_fork() -> None:
    """A fork has neither the threads that compile nor who would release the lock."""
    global _lock
    _lock = threading.Lock()
    _pending.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
