"""Facts about devices: read from `devices/*.json`, or from a file that a calibration wrote.

    find("cpu", name), find("gpu", name)    the facts of a device by the name that it gives itself
    load(path), save(device, path)          a calibrated device
    calibration_path(folder, kind, name)    where a calibration of a device belongs

A device that nothing is known of gets the default of its kind, with `calibrated` False and a hint.
`coefficients` are what a calibration fits; everything else is from the datasheet.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

#: raised when the meaning of a field changes; files of another version are not read
VERSION = 1
HINT = "not calibrated: predictions for {name} are those of {base}; `attnopt calibrate` measures it"


@dataclass(frozen=True)
class Cpu:
    """A CPU core and its caches.

    width:     float32 lanes of a vector; registers: vector registers
    fma, load: vector multiply-adds and vector loads per clock; latency: of a multiply-add, clocks
    depth:     products that one multiply-add sums, by dtype (2 for dot products of bf16 pairs)
    l1, l2, l3: bytes (l3: of the whole package)
    gemm:      float32 (and other) GFLOP/s of one core in a large matrix product, by dtype
    memory, cache: GB/s that one core reads from DRAM, and from the last cache
    coefficients: nanoseconds by feature (`attnopt.cost.cpu`, `attnopt.cost.plain`)
    """

    name: str
    match: tuple[str, ...] = ()
    isa: str = "generic"
    width: int = 4
    registers: int = 16
    cores: int = 1
    clock: float = 2.5
    fma: float = 2.0
    load: float = 2.0
    latency: float = 4.0
    depth: Mapping[str, int] = field(default_factory=dict)
    l1: int = 32768
    l2: int = 1 << 20
    l3: int = 32 << 20
    gemm: Mapping[str, float] = field(default_factory=dict)
    memory: float = 12.0
    cache: float = 30.0
    coefficients: Mapping[str, float] = field(default_factory=dict)
    calibrated: bool = False
    hint: str = ""
    source: str = ""
    kind = "cpu"


@dataclass(frozen=True)
class Gpu:
    """A GPU by its multiprocessors.

    sms:       multiprocessors; clock: GHz under load; warp: threads of a warp
    matrix:    dense matrix FLOP per clock and multiprocessor, by dtype
    exp, fp32: exponentials, and float32 instructions, per clock and multiprocessor
    memory, l2: GB/s; l2_size: bytes
    smem, smem_block, smem_reserved: bytes of shared memory per multiprocessor, at most per block,
               and taken by the system for each block
    registers: per multiprocessor; register_unit: those of a warp are rounded up to it;
    thread_registers: at most per thread; warps, blocks: at most per multiprocessor
    coefficients: by implementation ("triton", "gluon", "cudnn" …), see `attnopt.cost.gpu.Kernel`
    """

    name: str
    match: tuple[str, ...] = ()
    arch: str = ""
    sms: int = 108
    clock: float = 1.4
    warp: int = 32
    matrix: Mapping[str, float] = field(default_factory=dict)
    exp: float = 16.0
    fp32: float = 128.0
    memory: float = 1500.0
    l2: float = 3000.0
    l2_size: int = 40 << 20
    smem: int = 102400
    smem_block: int = 101376
    smem_reserved: int = 1024
    registers: int = 65536
    register_unit: int = 256
    thread_registers: int = 255
    warps: int = 48
    blocks: int = 24
    coefficients: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    calibrated: bool = False
    hint: str = ""
    source: str = ""
    kind = "gpu"


Device = Cpu | Gpu
_KINDS: dict[str, type[Cpu] | type[Gpu]] = {"cpu": Cpu, "gpu": Gpu}
D = TypeVar("D", Cpu, Gpu)


def from_json(text: str) -> Device:
    """A device from the text of a file; ValueError where it is none or of another version."""
    try:
        body = json.loads(text)
    except ValueError as error:
        raise ValueError(f"device must be JSON, got {text[:60]!r}") from error
    if not isinstance(body, dict) or body.pop("version", None) != VERSION:
        raise ValueError(f"device must be a file of version {VERSION}, got {text[:60]!r}")
    kind = _KINDS.get(body.pop("kind", None))
    if kind is None:
        raise ValueError(f"kind must be one of {', '.join(_KINDS)}, got {text[:60]!r}")
    known = {f.name for f in dataclasses.fields(kind)}
    if set(body) - known or "name" not in body:
        raise ValueError(f"fields must be of {kind.__name__}, got {sorted(set(body) - known)}")
    body["match"] = tuple(body.get("match", ()))
    return kind(**body)


def to_json(device: Device) -> str:
    """The text of a device's file, without the fields that have their default."""
    body: dict[str, Any] = {"version": VERSION, "kind": device.kind}
    for f in dataclasses.fields(device):
        content = getattr(device, f.name)
        default = f.default_factory() if callable(f.default_factory) else f.default
        if content != default:
            body[f.name] = dict(content) if isinstance(content, Mapping) else content
    return json.dumps(body, indent=2) + "\n"


def load(path: Path) -> Device:
    """A device from a file."""
    return from_json(Path(path).read_text("utf-8"))


def save(device: Device, path: Path) -> None:
    """Write a device's file: whole or not at all, readable by its owner only."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(to_json(device))
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def calibration_path(folder: Path, kind: str, name: str) -> Path:
    """Where the calibration of a device belongs, in a folder of the user's cache."""
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"
    return Path(folder) / f"{kind}-{slug}.json"


@functools.lru_cache(maxsize=1)
def shipped() -> tuple[Device, ...]:
    """The devices that come with the package; the defaults of a kind are named "default …"."""
    folder = importlib.resources.files("attnopt.cost").joinpath("devices")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".json")), key=lambda f: f.name)
    return tuple(from_json(f.read_text("utf-8")) for f in files)


def find_cpu(name: str, isa: str = "", cores: int = 0, folder: Path | None = None) -> Cpu:
    """Facts of the CPU that calls itself `name` (as in /proc/cpuinfo).

    isa: vector instructions that kernels use, which choose among the defaults; cores: how many
    there are; folder: where calibrations are kept.
    """
    found = _find(Cpu, name, isa, folder)
    return dataclasses.replace(found, cores=cores) if cores else found


def find_gpu(name: str, arch: str = "", folder: Path | None = None) -> Gpu:
    """Facts of the GPU that calls itself `name` (as torch.cuda.get_device_name); arch: "sm_90" …"""
    return _find(Gpu, name, arch, folder)


def _find(kind: type[D], name: str, target: str, folder: Path | None) -> D:
    if folder is not None:
        try:
            own = load(calibration_path(folder, kind.kind, name))
        except (OSError, ValueError):
            own = None
        if isinstance(own, kind) and _serves(own, target):
            return own
    known = [d for d in shipped() if isinstance(d, kind)]
    for device in known:
        if _serves(device, target) and any(
                re.search(pattern, name, re.IGNORECASE) for pattern in device.match):
            return device
    near = [d for d in known if target and _target(d) == target]
    near.sort(key=lambda d: not d.name.startswith("default"))
    base = near[0] if near else next(d for d in known if d.name == f"default {kind.kind.upper()}")
    hint = HINT.format(name=name or f"this {kind.kind}", base=base.name)
    return dataclasses.replace(base, name=name or base.name, match=(), calibrated=False, hint=hint)


def _target(device: Device) -> str:
    return device.isa if isinstance(device, Cpu) else device.arch


def _serves(device: Device, target: str) -> bool:
    """Whether facts of `device` hold for kernels of `target`: on a CPU for its instructions only.
    """
    return isinstance(device, Gpu) or not target or device.isa == target
