"""Which lowering and tile a Spec gets at given shapes: the cost model asked about this machine.

    estimates(problem)     every legal candidate with its predicted time, the best first
    original(problem, ..)  the predicted time of what the author has
    schedule_of(problem)   lowering and tile of a call whose Schedule leaves the tile open

Where lengths change from call to call, they are rounded to few steps and tiles come from a short
list, so that neither choices nor compiled kernels pile up.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnopt.cost import cpu_tiles as tiles
from attnopt.cost import plain
from attnopt.cost import stencil as stencil_cost
from attnopt.cost import window as window_cost
from attnopt.cost.choose import Candidate, Choice, Estimate, choose
from attnopt.cost.devices import Cpu, Device, Gpu, find_cpu, find_gpu
from attnopt.cost.tiles import count_tiles
from attnopt.cost.typical import typical_operands
from attnopt.cost.work import ITEM_SIZE, Work, instructions, work_of
from attnopt.environment import processor
from attnopt.errors import AttnOptError
from attnopt.ir import expr as E
from attnopt.ir.halos import grid_of
from attnopt.ir.mask import Band, Causal, Mask, Neighborhood, Windows
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import cache
from attnopt.kernels.aten.choose import can_block
from attnopt.kernels.aten.sdpa import plan
from attnopt.kernels.cpp import attention as cpp_attention
from attnopt.kernels.cpp import stencil
from attnopt.kernels.cpp.grid_windows import window_grid, windows_of
from attnopt.kernels.cpp.isa import isa
from attnopt.kernels.cpp.template import WINDOW
from attnopt.kernels.cpp.template_window import MOST_KEYS, split_shared, window_reasons
from attnopt.kernels.triton import tiles as triton_tiles
from attnopt.kernels.triton.boxes import boxes_of
from attnopt.kernels.triton.intervals import interval
from attnopt.kernels.triton.scores import BY_CHANNEL

#: rows, and keys, of the tiles that calls of any length choose from; rows are rounded up to whole
#: register blocks of this machine
FEW_ROWS, FEW_KEYS = (24, 48, 96), 64
#: blocks of torch's flash attention on a CPU: (from so many queries, rows), and keys
TORCH_ROWS, TORCH_KEYS = ((768, 256), (192, 64), (0, 32)), 512
#: forward and backward together, measured against the models: of the forward kernel alone, and of
#: torch, whose backward takes longer than the three forwards that its model counts
TRAINING = {"cpp": 3.5, "aten": 1.4}
#: seconds of a call outside of what the models predict: its checks and its arguments
HANDLING = {"cpp": 5e-5, WINDOW: 4e-5, "aten:sdpa": 2e-5, "aten:blocks": 5e-5, "aten:dense": 4e-5}


@dataclass(frozen=True, eq=False)
class Tables:
    """Operands of a mask whose values are known or likely, by slot: constants, and what an example
    held. Costs depend on them, nothing else. They are equal where they are the same memory."""

    by_slot: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def key(self) -> tuple[object, ...]:
        return tuple((slot, t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
                     for slot, t in sorted(self.by_slot.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tables) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


NO_TABLES = Tables()


@dataclass(frozen=True)
class Problem:
    """A Spec at shapes query (*L, Q, D), key (*L, K, D), value (*L, K, Dv) on one device.

    grads: gradients will be asked for; threads: that a call may use, 0 for torch's number;
    device: "cpu" or "cuda"; tables: operands of the mask as they are likely to be;
    visible: share of the key tiles that are visited, where operands were looked at in a call
    """

    spec: Spec
    query: tuple[int, ...]
    key: tuple[int, ...]
    value: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    grads: bool = False
    threads: int = 0
    device: str = "cpu"
    tables: Tables = NO_TABLES
    visible: float = 1.0

    @property
    def work(self) -> Work:
        name = str(self.dtype).removeprefix("torch.")
        return work_of(self.spec, self.query, self.key, self.value,
                       name if name in ITEM_SIZE else "float32", self.grads)

    @property
    def leading(self) -> tuple[int, ...]:
        return tuple(torch.broadcast_shapes(self.query[:-2], self.key[:-2], self.value[:-2]))

    def rounded(self) -> Problem:
        """The same with lengths of few steps, four to each doubling."""
        def step(n: int) -> int:
            unit = max(1, 1 << max(0, n.bit_length() - 3))
            return -(-n // unit) * unit

        def shape(s: tuple[int, ...]) -> tuple[int, ...]:
            return (*map(step, s[:-1]), s[-1])

        if grid_of(self.spec.mask, self.query[-2], self.key[-2]) is not None:
            return self  # a grid has the lengths that it has
        return replace(self, query=shape(self.query), key=shape(self.key),
                       value=shape(self.value))


@functools.cache
def device(kind: str = "cpu") -> Device:
    """Facts of this CPU or GPU: those that `attnopt calibrate` stored, or those shipped."""
    try:
        folder = cache.directory()
    except AttnOptError:
        folder = None
    if kind == "cpu":
        return find_cpu(processor()["model"], isa().name, os.cpu_count() or 1, folder)
    return find_gpu(torch.cuda.get_device_name(), architecture(), folder)


def architecture() -> str:
    """The current GPU's: "sm_90", "gfx942" …"""
    properties = torch.cuda.get_device_properties()
    if torch.version.hip:
        return str(properties.gcnArchName).partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


@functools.lru_cache(maxsize=1024)
def estimates(problem: Problem, lowerings: tuple[str, ...], few: bool = False) -> Choice:
    """Predicted times of the lowerings ("cpp", "aten:sdpa" …) with every tile that they may have.

    few: only tiles that serve calls of any length
    """
    spec, found = problem.spec, []
    for lowering in lowerings:
        found += candidates(problem, lowering, few)
    given = found, problem.work, spec.mask, device(problem.device), _threads(problem)
    tables = dict(problem.tables.by_slot)
    choice = choose(*given, tables, problem.leading, problem.visible)
    table = [replace(e, seconds=_whole(e, problem)) for e in choice.table]
    best = _best(choice, table)
    typical = typical_operands(spec, problem.query[-2], problem.key[-2], problem.leading, tables)
    if typical and best is not None and best.candidate.tile and problem.visible == 1.0:
        alike = [c for c in found if c.lowering == best.candidate.lowering]
        best = _best(choose(alike, *given[1:], {**tables, **typical}, problem.leading),
                     [e for e in table if e.candidate in alike])
    table.sort(key=lambda e: (e is not best, e.seconds))
    return Choice(best, tuple(table))


def candidates(problem: Problem, lowering: str, few: bool) -> list[Candidate]:
    """Every way in which a lowering may compute the problem. "cpp" stands for all kernels of
    generated C++; one with a time model of its own comes with its seconds (`Candidate.seconds`)."""
    if lowering in ("cpp", "triton"):
        lengths = problem.query[-2], problem.key[-2]
        found = [Candidate(lowering, tile, boxes=boxes_of(problem.spec.mask, *lengths, *tile[:2])
                           if lowering == "triton" else None)
                 for tile in legal_tiles(problem, few)]
        if few or lowering == "triton":
            return found
        return [*found, *_stencils(problem), *_windows(problem)]
    return [Candidate(lowering, density=_density(problem.spec.mask, problem, lowering))]


def _stencils(problem: Problem) -> list[Candidate]:
    """The stencil, where the mask is a window on a grid; its own model knows its time."""
    lengths, mask = (problem.query[-2], problem.key[-2]), problem.spec.mask
    cpu = device(problem.device)
    if problem.grads or len(window_grid(mask, lengths[0])) < 2 and not any(
            isinstance(m, Neighborhood | Windows | Band) for m in mask.walk()):
        return []  # a triangle, say: its windows are no small ones, and dear to look at
    if stencil.reasons(problem.spec, (problem.dtype,), "cpu", lengths):
        return []
    windows = windows_of(mask, lengths[0])
    assert isinstance(cpu, Cpu) and not isinstance(windows, str)
    tile = stencil.default_tile(windows, isa())
    seconds = stencil_cost.seconds(cpu, problem.work, stencil.grid_of(windows, tile),
                                   _threads(problem))
    return [Candidate(stencil.LOWERING, (tile.rows, tile.taps, tile.channels), seconds=seconds)]


def _windows(problem: Problem) -> list[Candidate]:
    """The kernel for few keys; its own model knows its time."""
    spec, cpu, (queries, keys) = problem.spec, device(problem.device), (
        problem.query[-2], problem.key[-2])
    if not all(isinstance(n, int) and 0 < n <= MOST_KEYS for n in (queries, keys)) or (
            cpp_attention.spec_reasons(spec) or window_reasons(spec)):
        return []
    assert isinstance(cpu, Cpu)
    rank = len(problem.leading)
    scaled, shared = split_shared(spec) if rank > 1 else (spec.logits, ())
    read = spec.with_(logits=scaled, more=[
        Operand(f"shared_{n}", ("h", "q", "k")) for n in range(len(shared))])
    each = instructions(scaled, read) + problem.work.mask_ops
    once = sum(instructions(term, spec) for term in shared)
    heads = problem.leading[-1] if rank > 1 else 1
    return [Candidate(WINDOW, tile, seconds=window_cost.seconds(
        cpu, problem.work, tile, each, once, heads, _threads(problem)))
        for tile in window_cost.tiles(cpu, queries, keys)]


def _whole(estimate: Estimate, problem: Problem) -> float:
    """Seconds with the handling, and with the backward that the model of the kernel leaves out."""
    lowering = estimate.candidate.lowering
    times = TRAINING.get(lowering.partition(":")[0], 1.0) if problem.grads else 1.0
    return times * estimate.seconds + HANDLING.get(lowering, 0.0)


def _best(choice: Choice, table: list[Estimate]) -> Estimate | None:
    """The chosen tile of the lowering that is best with its handling."""
    legal = [e for e in table if not e.reason]
    if not legal or choice.best is None:
        return None
    fastest = min(legal, key=lambda e: e.seconds)
    if fastest.candidate.lowering != choice.best.candidate.lowering:
        return fastest
    return next(e for e in legal if e.candidate == choice.best.candidate)


@functools.lru_cache(maxsize=1024)
def original(problem: Problem, authored: str) -> float:
    """Predicted seconds of the author's own code, "sdpa" or a "composition"."""
    kind = "sdpa" if authored == "sdpa" else "dense"
    density = _density(problem.spec.mask, problem, "aten:sdpa") if authored == "sdpa" else 1.0
    machine = device(problem.device)
    if isinstance(machine, Cpu):
        times = TRAINING["aten"] if problem.grads else 1.0
        return times * plain.seconds(machine, problem.work, kind, density, _threads(problem))
    candidate = Candidate(f"aten:{kind}", density=density)
    best = choose([candidate], problem.work, problem.spec.mask, machine).best
    return best.seconds if best else math.inf


def aten_lowering(spec: Spec, dtype: torch.dtype, grads: bool) -> str:
    """What the Spec gets where nothing is generated."""
    if plan(spec) is not None:
        return "aten:sdpa"
    return "aten:dense" if grads or not can_block(spec, dtype) else "aten:blocks"


def legal_tiles(problem: Problem, few: bool) -> list[tuple[int, ...]]:
    """Tiles of the generated kernel; on a GPU that was not calibrated, its default alone."""
    cpu = device(problem.device)
    if isinstance(cpu, Gpu):
        shape = (architecture(), problem.query[-1], problem.value[-1], problem.work.item)
        by_channel = problem.spec.score in BY_CHANNEL
        found = [triton_tiles.default(*shape, not interval(problem.spec).exact, by_channel)
                 ] if few or by_channel or not cpu.calibrated else (
            triton_tiles.candidates(*shape))
        return [(t.rows, t.keys, t.warps, t.stages) for t in found]
    lengths = problem.query[-2], problem.key[-2]
    known = all(isinstance(n, int) for n in lengths)  # unknown ones are symbols, with no grid
    boxes = list(halo_tiles(problem.spec, *lengths, few)) if known and not problem.grads else []
    if not few and not boxes:
        return list(tiles.cpu_tiles(cpu, *lengths, _block_rows(problem.spec.mask)))
    block = tiles.register_blocks(cpu.registers)[0]
    rows = sorted({-(-r // block[0]) * block[0] for r in FEW_ROWS})
    return [*((r, FEW_KEYS, *block) for r in rows), *boxes]


def _block_rows(mask: Mask) -> set[int]:
    """Rows of the blocks that it is made of (q // rows), or what divides them into tiles."""
    blocks = {node.args[1].value for node in mask.predicate().walk() if node.op == "floordiv"
              and node.args[0] is E.index("q") and node.args[1].op == "const"}
    return {n // parts for n in blocks for parts in (1, 2, 4)
            if n % parts == 0 and 32 <= n // parts <= 128}


@functools.lru_cache(maxsize=1024)
def halo_tiles(spec: Spec, queries: int, keys: int, few: bool) -> list[tuple[int, ...]]:
    """Tiles (rows, keys, MR, NV, *box) of kernels that gather the keys of boxes of a grid; none
    where the mask has no grid, or the weights see keys that it hides."""
    grid = grid_of(spec.mask, queries, keys)
    if grid is None or spec.weights is not E.weight or spec.mask.axes - {"q", "k"}:
        return []
    cpu = device("cpu")
    assert isinstance(cpu, Cpu)
    boxes = tiles.best_boxes(spec.mask, grid, cpu.registers)
    if few:
        block = tiles.register_blocks(cpu.registers)[0]
        return [(-(-math.prod(box) // block[0]) * block[0], FEW_KEYS, *block, *box)
                for box in boxes[:1]]
    return tiles.boxed_tiles(cpu, boxes)


@functools.lru_cache(maxsize=4096)
def schedule_of(problem: Problem) -> Schedule:
    """What a call of any length is computed with; `problem` should be `rounded`."""
    spec = problem.spec
    choice = estimates(problem, ("cpp", aten_lowering(spec, problem.dtype, problem.grads)), True)
    assert choice.best is not None
    return Schedule(choice.best.candidate.lowering, tuple(choice.best.candidate.tile))


def _threads(problem: Problem) -> int:
    return problem.threads or torch.get_num_threads()


def _density(mask: Mask, problem: Problem, lowering: str) -> float:
    """The share of the scores that torch computes: what is_causal hides is skipped by its blocks,
    nothing else is."""
    queries, keys = problem.query[-2], problem.key[-2]
    if lowering != "aten:sdpa" or mask != Causal() or not queries or not keys:
        return 1.0
    rows = next(r for n, r in TORCH_ROWS if queries >= n)
    counts = count_tiles(mask, queries, keys, rows, TORCH_KEYS)
    visited = int((counts.full + counts.partial).sum())
    return min(1.0, visited * TORCH_KEYS / (counts.full.numel() * keys))
