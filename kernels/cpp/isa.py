"""The vector instructions of this CPU that generated C++ may use.

torch's own finding comes first (so that ATEN_CPU_CAPABILITY holds for our kernels too), checked
against /proc/cpuinfo. Flags name the instructions one by one: -march=native would mean another
thing on every machine that shares a cache. A CPU that is not known gets "generic": 4 fp32 lanes in
GCC/Clang vector extensions, which any target can compile.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq",
           "-mprefer-vector-width=512")
_BF16 = "-mavx512bf16"
_X86, _ARM = ("x86_64", "amd64"), ("aarch64", "arm64")


@dataclass(frozen=True)
class Isa:
    """One set of vector instructions.

    width:     fp32 lanes of a vector
    registers: vector registers
    bf16:      dot products of bf16 pairs into fp32 (AVX512_BF16)
    flags:     what tells the compiler
    """

    name: str
    width: int
    registers: int
    bf16: bool = False
    flags: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The name, with "+bf16" where there are bf16 dot products."""
        return self.name + ("+bf16" if self.bf16 else "")

    def __str__(self) -> str:
        return self.label


GENERIC = Isa("generic", 4, 16)
AVX2 = Isa("avx2", 8, 16, flags=_AVX2)
AVX512 = Isa("avx512", 16, 32, flags=_AVX512)
NEON = Isa("neon", 4, 32, flags=("-march=armv8-a",))


@cache
def isas() -> tuple[Isa, ...]:
    """What this machine can run, the best first; never empty."""
    return detect(platform.machine(), torch.backends.cpu.get_cpu_capability(), _cpu_flags())


def isa() -> Isa:
    """The best that this machine can run."""
    return isas()[0]


def detect(machine: str, capability: str, cpu_flags: frozenset[str]) -> tuple[Isa, ...]:
    """What a machine can run, the best first.

    machine: as platform.machine(); capability: as torch.backends.cpu.get_cpu_capability();
    cpu_flags: of /proc/cpuinfo, empty where it cannot be read, which leaves only "generic" on x86.
    """
    if machine.lower() in _ARM:
        return NEON, GENERIC
    if machine.lower() not in _X86:
        return (GENERIC,)
    found = [GENERIC]
    if capability in ("AVX2", "AVX512") and _has(cpu_flags, AVX2):
        found.insert(0, AVX2)
        if capability == "AVX512" and _has(cpu_flags, AVX512):
            found.insert(0, AVX512)
            if "avx512_bf16" in cpu_flags:
                found.insert(0, replace(AVX512, bf16=True, flags=(*_AVX512, _BF16)))
    return tuple(found)


def _has(cpu_flags: frozenset[str], isa: Isa) -> bool:
    names = (flag.removeprefix("-m") for flag in isa.flags if "=" not in flag)
    return cpu_flags.issuperset(names)


def _cpu_flags() -> frozenset[str]:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()
