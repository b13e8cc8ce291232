"""Measuring a CPU: its ceilings, the generated kernel over shapes and tiles, torch's own attention.

One thread and CPU time, in turns, so that other programs hardly count; only what waking a second
thread costs takes wall time, and is left as it was where the machine is too busy for it.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from attnopt import kernels
from attnopt.bench.shapes import Shape
from attnopt.cost import cpu, plain
from attnopt.cost.cpu_tiles import Tile, cpu_tiles
from attnopt.cost.devices import Cpu
from attnopt.cost.fit import Row, calibrated, fit
from attnopt.cost.tiles import count_tiles
from attnopt.ir.spec import Schedule
from attnopt.kernels import aten, cpp
from attnopt.kernels.cpp.toolchain import isa, toolchain
from attnopt.timing import interleave

Say = Callable[[str], None]
ROUNDS, QUICK_ROUNDS = 5, 1
_dense = functools.partial(Shape, "dense")
#: shapes, every how many of the legal tiles, and from which one on; few tiles of the same
#: head_dim are alike, so that few kernels need to be compiled
SHAPES: tuple[tuple[Shape, int, int], ...] = (
    (_dense(1, 1, 1, 20, 24, 64), 1, 0),
    (_dense(1, 16, 1, 64, 64, 64), 1, 0),
    (_dense(1, 8, 1, 200, 200, 64), 1, 0),
    (_dense(1, 4, 1, 512, 512, 64), 1, 0),
    (_dense(1, 1, 1, 2048, 2048, 64), 1, 0),
    (_dense(1, 1, 1, 96, 8192, 64), 2, 0),
    (_dense(2, 8, 4, 100, 300, 64), 2, 1),
    (_dense(1, 1, 1, 20, 24, 32), 3, 0),
    (_dense(1, 8, 1, 256, 256, 32), 3, 0),
    (_dense(1, 2, 1, 1024, 1024, 32), 3, 0),
    (_dense(1, 4, 1, 40, 72, 128), 3, 1),
    (_dense(1, 8, 1, 200, 200, 128), 3, 1),
    (_dense(1, 2, 1, 768, 1024, 128), 3, 1),
    (Shape("causal", 1, 16, 1, 64, 64, 64), 3, 2),
    (Shape("causal", 1, 4, 1, 512, 512, 64), 3, 2),
    (Shape("causal", 1, 1, 1, 2048, 2048, 64), 3, 2),
    (Shape("softcap", 1, 8, 1, 64, 96, 64), 5, 1),
    (Shape("softcap", 1, 2, 1, 512, 512, 64), 5, 1),
    (_dense(1, 8, 1, 1, 128, 64), 3, 0),
    (_dense(1, 8, 1, 1, 2048, 64), 3, 0),
)
#: what torch itself is measured on: by lowering
PLAIN: Mapping[str, tuple[Shape, ...]] = {
    "sdpa": (_dense(1, 1, 1, 16, 16, 64), _dense(1, 16, 1, 64, 64, 64),
             _dense(1, 4, 1, 512, 512, 64), _dense(1, 1, 1, 2048, 2048, 64),
             _dense(1, 4, 1, 512, 512, 32), _dense(1, 4, 1, 512, 512, 128),
             Shape("causal", 1, 16, 1, 64, 64, 64), Shape("causal", 1, 2, 1, 1024, 1024, 64)),
    "dense": (_dense(1, 1, 1, 16, 16, 64), _dense(1, 16, 1, 64, 64, 64),
              _dense(1, 4, 1, 512, 512, 64), _dense(1, 8, 1, 1024, 1024, 64),
              _dense(1, 4, 1, 512, 512, 128), Shape("causal", 1, 4, 1, 512, 512, 64),
              Shape("softcap", 1, 4, 1, 512, 512, 64)),
    "blocks": (_dense(1, 4, 1, 512, 512, 64), _dense(1, 1, 1, 2048, 2048, 64),
               _dense(1, 4, 1, 512, 512, 128), Shape("softcap", 1, 4, 1, 512, 512, 64)),
}
#: edges of the square products that give the ceilings
PRODUCTS = {torch.float32: 768, torch.bfloat16: 512, torch.float16: 256}
#: bytes that are summed up to see how fast DRAM, and the last cache, are read
DRAM, CACHED = 256 << 20, 4 << 20
#: from this ratio of one thread's time to two threads' on, there was a processor for the second
FREE = 1.4
#: vector multiply-adds and loads per clock that a CPU of which nothing is known may have
UNITS = tuple((float(f), float(n)) for f in (1, 2, 4) for n in (1, 2, 3))


@dataclass(frozen=True)
class Call:
    """What is timed: the features that it has on a device, and the function."""

    features: Callable[[Cpu], Mapping[str, float]]
    run: Callable[[], object]


@dataclass(frozen=True)
class Found:
    """The device as measured, and what else was seen of it."""

    device: Cpu
    prior: Cpu
    notes: dict[str, float | str] = field(default_factory=dict)


def measure(base: Cpu, name: str, *, quick: bool = False, say: Say = print) -> Found:
    """The CPU `base`, under its own `name`, with its ceilings and coefficients as measured.

    quick: short lengths and few tiles, to see that everything runs. Where no kernel can be
    compiled, only what torch itself offers is measured, and `say` tells why.
    """
    notes: dict[str, float | str] = {}
    say("products and memory")
    memory, cached = bandwidth(quick)
    base = dataclasses.replace(
        facts(base), gemm={**base.gemm, **products(quick)}, memory=memory, cache=cached)
    why = toolchain().why_not()
    with torch.no_grad():
        calls = list(plain_calls(quick))
        if why:
            say(f"the generated kernel is left out: {why}")
            notes["left out"] = why
        else:
            calls += compiled_calls(base, quick, say)
        say(f"{len(calls)} calls in turns")
        times = interleave({str(i): c.run for i, c in enumerate(calls)},
                           QUICK_ROUNDS if quick else ROUNDS, warmup=1)
        seconds = [statistics.median(times[str(i)]) for i in range(len(calls))]
        device = _fitted(base, name, calls, seconds)
        if not why and base.cores > 1:
            say("two threads")
            device, scaling = threads(device, quick)
            notes["two threads"] = scaling
            if scaling < FREE:
                say(f"the machine is busy: two threads are {scaling:.2f} times as fast as one")
    return Found(device, base, notes)


def _fitted(base: Cpu, name: str, calls: list[Call], seconds: list[float]) -> Cpu:
    """Fitted for the units of `base`, or for those that fit best where they are not known."""
    units = UNITS if base.hint else ((base.fma, base.load),)
    tried = []
    for fma, load in units:
        device = dataclasses.replace(base, fma=fma, load=load)
        rows = [Row(c.features(device), s) for c, s in zip(calls, seconds, strict=True)]
        error = 0.0
        if len(units) > 1:
            error = fit(rows, {**cpu.COEFFICIENTS, **plain.COEFFICIENTS, **base.coefficients}).mean
        tried.append((error, device, rows))
    _, device, rows = min(tried, key=lambda t: t[0])
    return calibrated(device, name, rows)


# -- ceilings -------------------------------------------------------------------------------------
def products(quick: bool = False) -> dict[str, float]:
    """GFLOP/s of one core in square matrix products, by dtype."""
    found = {}
    for dtype, edge in PRODUCTS.items():
        edge = 64 if quick else edge
        a, b = (torch.randn(edge, edge).to(dtype) for _ in range(2))
        seconds = _least(functools.partial(torch.mm, a, b))
        found[str(dtype).removeprefix("torch.")] = float(f"{2e-9 * edge**3 / seconds:.3g}")
    return found


def bandwidth(quick: bool = False) -> tuple[float, float]:
    """GB/s that one core reads from DRAM, and from the last cache."""
    found = []
    for size in (DRAM, CACHED):
        tensor = torch.ones((1 << 20 if quick else size) // 4)
        found.append(float(f"{4e-9 * tensor.numel() / _least(tensor.sum):.3g}"))
    return found[0], found[1]


def _least(fn: Callable[[], object], rounds: int = 6) -> float:
    """Least seconds of CPU time of one thread."""
    times = interleave({"": fn}, rounds)
    return max(min(times[""]), 1e-9)


def facts(base: Cpu, root: Path = Path("/sys/devices/system/cpu/cpu0/cache")) -> Cpu:
    """`base`, if it is unknown with the sizes of caches and the units that the system tells."""
    if not base.hint:
        return base
    found: dict[str, int] = {}
    for index in sorted(root.glob("index*")):
        try:
            level, kind, size = ((index / name).read_text("utf-8").strip()
                                 for name in ("level", "type", "size"))
            if kind != "Instruction" and size.endswith("K") and level in "123":
                found[f"l{level}"] = int(size[:-1]) << 10
        except (OSError, ValueError):
            continue
    own = isa()
    depth = {"bfloat16": 2} if own.bf16 else {}
    return dataclasses.replace(
        base, width=own.width, registers=own.registers, depth=depth,
        l1=found.get("l1", base.l1), l2=found.get("l2", base.l2), l3=found.get("l3", base.l3))


# -- calls ----------------------------------------------------------------------------------------
def plan(device: Cpu, quick: bool = False) -> list[tuple[Shape, list[Tile]]]:
    """The shapes of the calibration with the tiles that are measured on each."""
    found = []
    for shape, every, first in SHAPES:
        tiles = cpu_tiles(device, shape.queries, shape.keys)
        if not quick:
            found.append((shape, tiles[first::every]))
        elif shape.queries * shape.keys <= 1 << 13 and shape.head_dim == 64:
            found.append((shape, tiles[:1]))
    return found


def compiled_calls(device: Cpu, quick: bool, say: Say) -> list[Call]:
    """Calls of the generated kernel, which is compiled for all of them."""
    jobs = [(shape, tile, shape.tensors()) for shape, tiles in plan(device, quick)
            for tile in tiles]
    begun = time.monotonic()
    kernels.prepare([(shape.spec, Schedule("cpp", tile), tensors)
                     for shape, tile, tensors in jobs])
    say(f"kernels compiled, or found in the cache, in {time.monotonic() - begun:.0f} s")
    return [Call(functools.partial(_features, shape, tile), kernel_call(shape, tile, tensors))
            for shape, tile, tensors in jobs]


def kernel_call(shape: Shape, tile: Tile, tensors: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """The generated kernel with a tile as a function of nothing; raises where it does not run."""
    attention = cpp.Attention(shape.spec, tile)
    query, key, value = tensors
    run = functools.partial(attention, query, key, value, ())
    if run() is None:
        raise ValueError(f"shape must be one for the generated kernel, got {shape}")
    return run  # type: ignore[return-value]


def _features(shape: Shape, tile: Tile, device: Cpu) -> Mapping[str, float]:
    counts = count_tiles(shape.spec.mask, shape.queries, shape.keys, tile[0], tile[1],
                         tail=True)
    return cpu.features(device, shape.work, counts, tile)


def plain_calls(quick: bool = False) -> Iterator[Call]:
    """Calls of what torch itself offers."""
    for lowering, shapes in PLAIN.items():
        for shape in shapes:
            if quick and shape.queries > 64:
                continue
            density = 0.5 + 0.5 / shape.queries if (
                lowering == "sdpa" and shape.kind == "causal") else 1.0
            yield Call(functools.partial(_plain_features, shape, lowering, density),
                       plain_call(shape, lowering))


def _plain_features(shape: Shape, lowering: str, density: float, device: Cpu
                    ) -> Mapping[str, float]:
    return plain.features(device, shape.work, lowering, density)


def plain_call(shape: Shape, lowering: str) -> Callable[[], Tensor]:
    """"sdpa", "blocks", or "dense" as an author writes it, as a function of nothing."""
    query, key, value = shape.tensors()
    if lowering == "blocks":
        bound = aten.bind(str(shape.spec), str(Schedule("aten:blocks")))
        return functools.partial(bound, query, key, value)
    if lowering == "dense":
        return functools.partial(shape.compose, query, key, value, shape.hidden())
    query, key, value = (t.flatten(1, 2) for t in (query, key, value))
    return functools.partial(F.scaled_dot_product_attention, query, key, value,
                             is_causal=shape.kind == "causal")


# -- threads --------------------------------------------------------------------------------------
def threads(device: Cpu, quick: bool = False) -> tuple[Cpu, float]:
    """The device with the time that waking a thread takes, and how much faster two threads are.

    Least times, because another program can only lengthen them.
    """
    large, small = _dense(1, 4, 1, 512, 512, 64), _dense(1, 2, 1, 64, 64, 64)
    if quick:
        large = _dense(1, 4, 1, 96, 64, 64)
    steps: dict[str, Callable[[], object]] = {}
    for shape in (large, small):
        tile = cpu_tiles(device, shape.queries, shape.keys)[0]
        run = kernel_call(shape, tile, shape.tensors())
        for count in (1, 2):
            steps[f"{shape} {count}"] = functools.partial(_with_threads, count, run)
    times = {name: min(t) for name, t in
             interleave(steps, 3 if quick else 40, clock="wall").items()}
    scaling = times[f"{large} 1"] / times[f"{large} 2"]
    if scaling < FREE:
        return device, scaling
    tile = cpu_tiles(device, small.queries, small.keys)[0]
    counts = count_tiles(small.spec.mask, small.queries, small.keys, tile[0], tile[1],
                         tail=True)
    still = dataclasses.replace(device, coefficients={**device.coefficients, "thread": 0.0})
    one, two = (cpu.seconds(still, small.work, counts, tile, n) for n in (1, 2))
    woken = times[f"{small} 2"] - two * times[f"{small} 1"] / one
    cost = float(f"{min(max(1e9 * woken / 2, 100.0), 1e5):.3g}")
    return dataclasses.replace(device, coefficients={**device.coefficients, "thread": cost}), (
        scaling)


def _with_threads(count: int, run: Callable[[], object]) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        run()
    finally:
        torch.set_num_threads(before)
