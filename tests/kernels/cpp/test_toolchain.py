"""Compiler, cache and loader of generated C++; how long compiling takes is not asserted."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from attnopt.errors import AttnOptError, KernelError
from attnopt.kernels import cache
from attnopt.kernels.cpp import toolchain as tools
from attnopt.kernels.cpp.isa import AVX2, AVX512, GENERIC, NEON, detect, isa, isas
from attnopt.kernels.cpp.openmp import runtimes, torch_runtime

ROOT = Path(__file__).resolve().parents[3]
works = pytest.mark.skipif(bool(tools.toolchain().why_not()), reason=tools.toolchain().why_not())
ANSWER = 'extern "C" int answer() {{ return {}; }}\n'
THREADS = """#include <omp.h>
extern "C" int threads(int wanted) {
  int seen = 0;
  #pragma omp parallel num_threads(wanted)
  {
    #pragma omp atomic
    seen += 1;
  }
  return seen;
}
"""
LANES = """
typedef float Vector __attribute__((vector_size(4 * LANES)));
extern "C" void fused(const float* a, float* out) {
  Vector x, y;
  __builtin_memcpy(&x, a, sizeof x);
  y = x * x + x;
  __builtin_memcpy(out, &y, sizeof y);
}
extern "C" int special(const float* a) { return (a[0] != a[0]) + 2 * (a[1] - a[1] == 0); }
"""
SECOND = """
import sys
from attnopt.kernels.cpp import toolchain as tools
path, = tools.compile_all([sys.argv[1]])
print(tools.load(path).answer(), tools.compiler_calls())
"""


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty cache and a process that knows of no compiler yet."""
    monkeypatch.setenv(cache.ENV, str(tmp_path / "cache"))
    monkeypatch.setattr(tools, "_failed", {})
    tools._toolchain.cache_clear()
    yield
    tools._toolchain.cache_clear()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@works
def test_compiled_once_then_from_the_cache() -> None:
    sources = [ANSWER.format(n) for n in (41, 42, 41)]
    first = tools.compile_all(sources)
    calls = tools.compiler_calls()
    assert first[0] == first[2] != first[1]
    assert [tools.load(path).answer() for path in first] == [41, 42, 41]
    assert tools.compile_all(sources) == first and tools.compiler_calls() == calls
    assert first[0].with_suffix(".cpp").read_text() == sources[0]
    assert all(cache.vouches(path) for path in first)
    assert tools.load(first[0]) is tools.load(first[2])


@works
def test_a_second_process_calls_no_compiler() -> None:
    def run() -> str:
        done = subprocess.run([sys.executable, "-c", SECOND, ANSWER.format(7)], cwd=ROOT,
                              text=True, capture_output=True, check=True)
        return done.stdout.strip()

    assert run() == "7 3", "version, trial, source"
    assert run() == "7 0"


@works
def test_the_key_has_everything_in_it() -> None:
    tool, source = tools.toolchain(), ANSWER.format(1)
    keys = {tool.key(source, level) for level in (GENERIC, AVX2, AVX512, NEON)}
    keys |= {tool.key(source + " ", GENERIC)}
    keys |= {tools.replace(tool, **change).key(source, GENERIC) for change in (
        {"version": "another"}, {"command": ("other",)}, {"runtime": "/lib/libgomp-1234.so"})}
    assert len(keys) == 8


@works
def test_threads_compile_one_source_once() -> None:
    tools.toolchain()
    calls, found = tools.compiler_calls(), []

    def work() -> None:
        found.extend(tools.compile_all([ANSWER.format(9)]))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 8 and len(set(found)) == 1
    assert tools.compiler_calls() == calls + 1


@works
def test_processes_at_once() -> None:
    workers = [subprocess.Popen([sys.executable, "-c", SECOND, ANSWER.format(5)], cwd=ROOT,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
               for _ in range(3)]
    for worker in workers:
        said, why = worker.communicate()
        assert said.startswith("5 "), why


@works
def test_an_error_names_the_source_and_says_what_the_compiler_says() -> None:
    good, bad = ANSWER.format(1), "int broken() { return nonsense; }\n"
    with pytest.raises(KernelError, match="nonsense.*was not declared|undeclared") as caught:
        tools.compile_all([good, bad])
    assert isinstance(caught.value, AttnOptError)
    assert caught.value.source is not None and caught.value.source.read_text() == bad
    assert str(caught.value.source) in str(caught.value)
    calls = tools.compiler_calls()
    with pytest.raises(KernelError):
        tools.compile_all([bad])
    tools.compile_all([good])
    assert tools.compiler_calls() == calls, "neither is compiled again"


@works
@pytest.mark.parametrize("level", isas(), ids=str)
def test_every_isa_compiles_and_runs(level: tools.Isa) -> None:
    path, = tools.compile_all([LANES.replace("LANES", str(level.width))], level)
    library = tools.load(path)
    values = torch.arange(level.width, dtype=torch.float32)
    out = torch.empty_like(values)
    library.fused(ctypes.c_void_p(values.data_ptr()), ctypes.c_void_p(out.data_ptr()))
    assert torch.equal(out, values * values + values)
    odd = torch.tensor([torch.nan, torch.inf])
    assert library.special(ctypes.c_void_p(odd.data_ptr())) == 1, "NaN and inf are what they are"


@works
def test_one_openmp_in_the_process() -> None:
    path, = tools.compile_all([THREADS])
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.randn(512, 512) @ torch.randn(512, 512)
        assert tools.load(path).threads(2) == 2
    finally:
        torch.set_num_threads(threads)
    # Another package may have brought its own; the library must have added none to torch's.
    code = ("import sys, torch; from pathlib import Path; "
            "from attnopt.kernels.cpp import openmp, toolchain; "
            "print(toolchain.load(Path(sys.argv[1])).threads(2), len(openmp.runtimes()))")
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    assert done.stdout == "2 1\n"
    assert torch_runtime() in runtimes()


@works
def test_load_refuses_what_the_cache_does_not_vouch_for(tmp_path: Path) -> None:
    path, = tools.compile_all([ANSWER.format(3)])
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    for place in (copy, path.with_suffix(".cpp.so"), Path("libc.so.6")):
        with pytest.raises(KernelError, match="must be a file of the cache"):
            tools.load(place)
    path.chmod(0o666)
    with pytest.raises(KernelError, match="must be a file of the cache"):
        tools.load(path)


@works
def test_a_file_that_is_no_library_is_compiled_anew() -> None:
    source = ANSWER.format(11)
    path, = tools.compile_all([source])
    path.write_bytes(b"")
    with pytest.raises(KernelError, match="cannot be loaded"):
        tools.load(path)
    assert tools.compile_all([source]) == [path]
    assert tools.load(path).answer() == 11


@works
def test_after_the_cache_was_cleared() -> None:
    path, = tools.compile_all([ANSWER.format(13)])
    assert tools.load(path).answer() == 13
    cache.clear()
    assert tools.load(path).answer() == 13, "what is loaded stays"
    assert tools.compile_all([ANSWER.format(13)]) == [path] and path.is_file()


@works
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_can_compile() -> None:
    with tools._lock:  # as if another thread were at it
        child = os.fork()
        if child == 0:
            try:
                path, = tools.compile_all([ANSWER.format(17)])
                os._exit(0 if tools.load(path).answer() == 17 else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("given", ["", "/nonexistent/c++", "nonexistent-c++ -m64"])
def test_no_compiler(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", given)
    monkeypatch.setenv("PATH", "")
    why = tools.toolchain().why_not()
    assert why == (f"CXX must name a C++ compiler, got {given!r}" if given
                   else "no C++ compiler: none of c++, g++, clang++ is in PATH")
    with pytest.raises(KernelError, match="C\\+\\+ compiler"):
        tools.compile_all([ANSWER.format(1)])


@pytest.mark.parametrize(("text", "why"), [
    ("exit 1", "says no version"),
    ("echo broken; test $1 = --version", "failed on"),
    ('if test "$1" = --version; then echo 1.0; else for out; do :; done; echo x > $out; fi',
     "cannot be loaded")])
def test_a_broken_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, why: str
) -> None:
    monkeypatch.setenv("CXX", script(tmp_path / "cxx", text))
    found = tools.toolchain().why_not()
    assert f"the C++ compiler {tmp_path}/cxx does not work" in found and why in found
    calls = tools.compiler_calls()
    assert tools.toolchain().why_not() == found and tools.compiler_calls() == calls


@works
def test_the_next_compiler_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = tools.toolchain().command[0]
    script(tmp_path / "c++", "exit 1")
    script(tmp_path / "g++", f'exec {good} "$@"')
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert tools.toolchain().command == (str(tmp_path / "g++"),)
    path, = tools.compile_all([ANSWER.format(19)])
    assert tools.load(path).answer() == 19


def test_another_system() -> None:
    assert "needs Linux" in tools._toolchain("", os.environ["PATH"], "darwin").why_not()


FULL = frozenset("avx2 fma f16c avx512f avx512bw avx512vl avx512dq avx512_bf16".split())


@pytest.mark.parametrize(("machine", "capability", "flags", "labels"), [
    ("x86_64", "AVX512", FULL, ["avx512+bf16", "avx512", "avx2", "generic"]),
    ("AMD64", "AVX512", FULL - {"avx512_bf16"}, ["avx512", "avx2", "generic"]),
    ("x86_64", "AVX512", FULL - {"avx512dq"}, ["avx2", "generic"]),
    ("x86_64", "AVX2", FULL, ["avx2", "generic"]),
    ("x86_64", "DEFAULT", FULL, ["generic"]),
    ("x86_64", "AVX512", frozenset(), ["generic"]),
    ("x86_64", "something new", FULL, ["generic"]),
    ("aarch64", "SVE256", frozenset(), ["neon", "generic"]),
    ("arm64", "DEFAULT", frozenset(), ["neon", "generic"]),
    ("ppc64le", "VSX", frozenset(), ["generic"]),
])
def test_detection(machine: str, capability: str, flags: frozenset[str],
                   labels: list[str]) -> None:
    assert [found.label for found in detect(machine, capability, flags)] == labels


def test_isa_facts() -> None:
    facts = {found.name: (found.width, found.registers) for found in (AVX512, AVX2, GENERIC, NEON)}
    assert facts == {"avx512": (16, 32), "avx2": (8, 16), "generic": (4, 16), "neon": (4, 32)}
    assert isa() == isas()[0] and isas()[-1] == GENERIC
    best = detect("x86_64", "AVX512", FULL)[0]
    assert best.bf16 and "-mavx512bf16" in best.flags
    assert not any("native" in flag for found in (best, AVX2, NEON) for flag in found.flags)
