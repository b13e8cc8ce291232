"""Measuring a GPU: clock, memory, a matrix product, and the Triton forward over tiles and grids.

Grids from two programs to four waves, short and long, tell the launch from the tiles; what is
captured in a CUDA graph leaves out the time that Python takes for a launch.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnopt import logs
from attnopt.bench.shapes import Shape
from attnopt.cost.devices import Gpu
from attnopt.cost.fit_gpu import Measured, calibrated
from attnopt.cost.gpu import Usage
from attnopt.cost.tiles import count_tiles
from attnopt.kernels import triton as generated
from attnopt.kernels.triton import tiles
from attnopt.kernels.triton.launch import device_name, tiles_of, with_lists
from attnopt.kernels.triton.loading import kernel
from attnopt.kernels.triton.problem import describe
from attnopt.kernels.triton.template import forward
from attnopt.timing import interleave

Say = Callable[[str], None]
Run = Callable[[], object]
HEAD_DIMS = (64, 128)
#: rows and keys of a tile that serves long sequences: the numbers are fitted to such
LARGE = (64, 32)
#: tiles for each head_dim, and lengths in key tiles
TILES, KEY_TILES = 9, (4, 64)
ROUNDS = 7
#: calls in one CUDA graph
CALLS = 10
COMPILERS = 8
PRODUCT, COPIED = 8192, 1 << 30


@dataclass(frozen=True)
class Found:
    """The device as measured, and what else was seen of it."""

    device: Gpu
    prior: Gpu
    notes: dict[str, float | str] = field(default_factory=dict)


def measure(base: Gpu, name: str, *, quick: bool = False, say: Say = print) -> Found:
    """The GPU `base`, under its own `name`, with its rates and the coefficients of the Triton
    kernel as measured."""
    say("products and memory")
    notes: dict[str, float | str] = {}
    base = facts(base)
    rate, clock = product(1024 if quick else PRODUCT)
    notes["bfloat16 product"] = f"{rate * 1e-3:.0f} TFLOP/s"
    base = dataclasses.replace(base, memory=round(copied(COPIED >> 6 if quick else COPIED)))
    if clock:
        base = dataclasses.replace(base, clock=clock)
    if not generated.available():
        notes["left out"] = "triton is not installed"
        say("the generated kernel is left out: triton is not installed")
        device = dataclasses.replace(base, name=name, match=(), calibrated=True, hint="")
        return Found(device, base, notes)
    jobs = plan(base, device_name(torch.device("cuda", torch.cuda.current_device())), quick)
    with torch.no_grad():
        ready, failed = compiled(jobs, say)
        usages = [usage_of(*job) for job in ready]
        say(f"{len(ready)} calls in turns")
        seconds = times(ready, 1 if quick else ROUNDS)
    if failed:
        notes["tiles that do not run"] = ", ".join(failed)
    rows = [Measured(shape.work, count_tiles(
        shape.spec.mask, shape.queries, shape.keys, tile.rows, tile.keys, tail=True),
        (tile.rows, tile.keys), statistics.median(taken), usage)
        for (shape, tile), usage, taken in zip(ready, usages, seconds, strict=True)
        if usage is None or not usage.spills]
    return Found(calibrated(base, name, "triton", rows), base, notes)


def plan(device: Gpu, arch: str, quick: bool = False) -> list[tuple[Shape, tiles.Tile]]:
    """Shapes and tiles; without a GPU too.

    One head whose query tiles are the programs: other numbers of heads would be other kernels.
    """
    found = []
    for head_dim in HEAD_DIMS[:1] if quick else HEAD_DIMS:
        every = tiles.candidates(arch, head_dim, head_dim)
        large = [t for t in every if t.rows >= LARGE[0] and t.keys >= LARGE[1]] or every
        for tile in spread(large, 2 if quick else TILES):
            for keys in KEY_TILES[:1] if quick else KEY_TILES:
                found += [(Shape("dense", 1, 1, 1, n * tile.rows, keys * tile.keys, head_dim,
                                 torch.bfloat16), tile)
                          for n in (1, device.sms, device.sms + 1, 4 * device.sms)]
            for length in (256,) if quick else (512, 2048):
                found.append((Shape("causal", 1, 16, 1, length, length, head_dim, torch.bfloat16),
                              tile))
    return found


def spread(given: Sequence[Any], most: int) -> list[Any]:
    """The first, and others that lie evenly."""
    if len(given) <= most:
        return list(given)
    return [given[round(i * (len(given) - 1) / (most - 1))] for i in range(most)]


# -- ceilings -------------------------------------------------------------------------------------
def facts(base: Gpu) -> Gpu:
    """`base`, if it is unknown with what the driver tells of it."""
    if not base.hint:
        return base
    properties = torch.cuda.get_device_properties(0)
    warp = getattr(properties, "warp_size", base.warp)
    own: dict[str, Any] = {
        "sms": properties.multi_processor_count, "warp": warp,
        "clock": getattr(properties, "clock_rate", 0) * 1e-6,
        "l2_size": getattr(properties, "L2_cache_size", 0),
        "smem": getattr(properties, "shared_memory_per_multiprocessor", 0),
        "smem_block": getattr(properties, "shared_memory_per_block_optin", 0),
        "registers": getattr(properties, "regs_per_multiprocessor", 0),
        "warps": properties.max_threads_per_multi_processor // warp}
    return dataclasses.replace(base, **{name: x for name, x in own.items() if x})


def product(edge: int) -> tuple[float, float]:
    """GFLOP/s of a square product in bfloat16, and GHz meanwhile (0 where it is not told)."""
    a, b = (torch.randn(edge, edge, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    seconds = _least(functools.partial(torch.mm, a, b, out=out))
    for _ in range(40):
        torch.mm(a, b, out=out)
    clock = _clock()
    torch.cuda.synchronize()
    return 2e-9 * edge**3 / seconds, clock


def copied(size: int) -> float:
    """GB/s of reading and writing DRAM."""
    source = torch.empty(size, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2e-9 * size / _least(functools.partial(target.copy_, source))


def _clock() -> float:
    try:
        which = f"--id=GPU-{torch.cuda.get_device_properties(0).uuid}"
        said = subprocess.run(
            ["nvidia-smi", which, "--query-gpu=clocks.sm", "--format=csv,noheader,nounits"],
            capture_output=True, text=True, timeout=10, check=True).stdout
        return float(said.split()[0]) * 1e-3
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, AttributeError):
        return 0.0


def _least(fn: Run) -> float:
    return min(interleave({"": fn}, 8, synchronize=torch.cuda.synchronize)[""])


# -- calls ----------------------------------------------------------------------------------------
Job = tuple[Shape, tiles.Tile]


def compiled(jobs: Iterable[Job], say: Say) -> tuple[list[Job], list[str]]:
    """The jobs of which the kernels run, each compiled and run once; what the others are."""
    jobs, failed = list(jobs), set()
    first = {(shape.kind, shape.head_dim, tile): (shape, tile) for shape, tile in reversed(jobs)}

    def attempt(job: Job) -> str:
        shape, tile = job
        try:
            with torch.no_grad():
                _call(shape, tile)()
            torch.cuda.synchronize()
        except Exception as error:  # a tile that this device or compiler does not take
            logs.get("bench").debug("%s %s left out", shape, tile, exc_info=True)
            return f"d{shape.head_dim} {'x'.join(map(str, tile.texts))} ({type(error).__name__})"
        return ""

    # Most of the time is in compilers, which let other threads run.
    with ThreadPoolExecutor(COMPILERS) as pool:
        for key, why in zip(first, pool.map(attempt, first.values()), strict=True):
            if why:
                failed.add((key, why))
    bad = {key for key, _ in failed}
    say(f"{len(first) - len(bad)} kernels compiled, or found in the cache")
    good = [(s, t) for s, t in jobs if (s.kind, s.head_dim, t) not in bad]
    return good, sorted(why for _, why in failed)


def _call(shape: Shape, tile: tiles.Tile) -> Run:
    query, key, value = shape.tensors("cuda")
    return functools.partial(generated.Attention(shape.spec, tile), query, key, value)


def times(jobs: Sequence[Job], rounds: int) -> list[list[float]]:
    """Seconds of each job, one figure per round."""
    steps = {str(i): replayed(_call(*job)) for i, job in enumerate(jobs)}
    found = interleave(steps, rounds, synchronize=torch.cuda.synchronize)
    return [[s / CALLS for s in found[name]] for name in steps]


def replayed(run: Run) -> Run:
    """A CUDA graph of CALLS calls, which is one call to start."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        if run() is None:
            raise ValueError("tensors must be for the generated kernel")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            run()
    return graph.replay


def usage_of(shape: Shape, tile: tiles.Tile) -> Usage | None:
    """What the compiler says of the kernel, None where this triton does not tell."""
    query, key, value = (torch.empty(size, dtype=shape.dtype, device="cuda")
                         for size in shape.sizes)
    return usage_for(shape, tile, (query, key, value))


def usage_for(shape: Shape, tile: tiles.Tile, tensors: tuple[Tensor, Tensor, Tensor]
              ) -> Usage | None:
    problem = describe(shape.spec, *tensors, ())
    if isinstance(problem, str):
        return None
    source = forward(shape.spec, with_lists(
        problem.signature, tiles_of(shape.spec, problem, tile, "q")))
    function = kernel(source, "forward")
    try:
        made = [k for caches in function.device_caches.values() for k in caches[0].values()]
        for found in made:
            if _fixed(found, "BM") == tile.rows and _fixed(found, "BN") == tile.keys and (
                    found.metadata.num_warps, found.metadata.num_stages) == (
                    tile.warps, tile.stages) and _fixed(found, "D") == shape.head_dim:
                return Usage(int(found.n_regs), int(found.metadata.shared), int(found.n_spills),
                             tile.warps)
    except (AttributeError, KeyError, TypeError, ValueError):
        logs.get("bench").debug("no usage of %s %s", shape, tile, exc_info=True)
    return None


def _fixed(compiled_kernel: Any, name: str) -> Any:
    """A constexpr parameter of a compiled kernel."""
    source = compiled_kernel.src
    return source.constants[(source.fn.arg_names.index(name),)]
