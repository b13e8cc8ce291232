"""Tiles of the Triton kernels: which are legal on a device, and which one to begin with.

Pure functions of shapes and of an architecture; nothing here needs a GPU or triton. What a compiled
kernel really takes is measured by `attnopt.kernels.triton.resources`; no tile given here as a
default spills there.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """rows: queries of a program; keys: of a step; warps: of 32 threads (64 on AMD); stages: of
    the loop's pipeline."""

    rows: int
    keys: int
    warps: int
    stages: int

    @property
    def texts(self) -> tuple[int, int, int, int]:
        return self.rows, self.keys, self.warps, self.stages


@dataclass(frozen=True)
class Architecture:
    """shared: bytes of shared memory that one program may use; tma: has tensor descriptors;
    wave: threads of a warp; registers: 32-bit ones of a multiprocessor."""

    name: str
    shared: int
    tma: bool
    wave: int = 32
    registers: int = 65536

    @property
    def capability(self) -> int:
        """NVIDIA's number, 90 for sm_90; 0 for others."""
        return int(self.name[3:]) if self.name.startswith("sm_") else 0

    @property
    def grouped(self) -> bool:
        """Whether four warps issue a product together: wgmma of sm_90 and tcgen05 of sm_100; sm_120
        has the mma.sync of sm_80."""
        return 90 <= self.capability < 120


ARCHITECTURES = {a.name: a for a in (
    Architecture("sm_80", 166912, False), Architecture("sm_86", 101376, False),
    Architecture("sm_89", 101376, False), Architecture("sm_90", 232448, True),
    Architecture("sm_100", 232448, True), Architecture("sm_120", 101376, True),
    Architecture("gfx942", 65536, False, 64, 131072),
    Architecture("gfx90a", 65536, False, 64, 131072))}


def architecture(name: str) -> Architecture:
    """By name; the nearest older one for a device that is not listed."""
    if name in ARCHITECTURES:
        return ARCHITECTURES[name]
    if name.startswith("sm_"):
        number = int("".join(c for c in name[3:] if c.isdigit()) or 0)
        known = [a for a in ARCHITECTURES.values() if a.capability]
        older = [a for a in known if a.capability <= number]
        return max(older or known[:1], key=lambda a: a.capability)
    return ARCHITECTURES["gfx90a"]


def widest(itemsize: int, gradient: bool = False) -> int:
    """Head dims up to here have tiles that do not spill; itemsize: bytes of an input's number."""
    return 256 if itemsize <= 2 else 64 if gradient else 128


def padded(width: int) -> int:
    """The power of two from 16 on that a width is padded to."""
    return max(16, 1 << (max(width, 1) - 1).bit_length())


def shared_bytes(tile: Tile, head_dim: int, value_dim: int, itemsize: int) -> int:
    """Shared memory of a forward program, roughly: keys and values of all stages, and queries."""
    wide, value = padded(head_dim), padded(value_dim)
    return itemsize * (tile.stages * tile.keys * (wide + value) + tile.rows * wide)


def accumulators(tile: Tile, value_dim: int, wave: int = 32) -> int:
    """Registers of a thread that hold the output and two tiles of scores (one is half as wide)."""
    return math.ceil(tile.rows * (padded(value_dim) + 1.5 * tile.keys) / (tile.warps * wave))


def legal(tile: Tile, arch: Architecture, head_dim: int, value_dim: int, itemsize: int) -> bool:
    """Whether a tile fits the device: shared memory, registers, shapes of matrix instructions."""
    if tile.rows < 16 * (tile.warps if arch.wave == 32 else 1) and tile.rows < 64:
        return False
    if arch.grouped and tile.rows < 16 * tile.warps:
        return False
    limit = 220 if arch.wave == 32 else 400
    return (shared_bytes(tile, head_dim, value_dim, itemsize) <= arch.shared
            and accumulators(tile, value_dim, arch.wave) <= limit)


@functools.lru_cache(maxsize=256)
def candidates(arch: str, head_dim: int, value_dim: int, itemsize: int = 2) -> tuple[Tile, ...]:
    """All legal tiles, the default first; at least one."""
    device = architecture(arch)
    found = [tile for rows in (16, 32, 64, 128) for keys in (16, 32, 64, 128)
             for warps in (1, 2, 4, 8) for stages in (1, 2, 3, 4)
             if legal(tile := Tile(rows, keys, warps, stages), device, head_dim, value_dim,
                      itemsize) and 8 <= rows * keys // (warps * device.wave) <= 128]
    first = default(arch, head_dim, value_dim, itemsize)
    return (first, *(t for t in found if t != first))


#: (rows, keys, warps, stages) by architecture and padded width, for two-byte numbers; measured
#: ahead of time: no spills, and at most 10 registers from the fewest of its neighbours
_DEFAULTS: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "sm_80": {32: (128, 64, 8, 3), 64: (128, 64, 8, 3), 128: (128, 64, 8, 3), 256: (64, 32, 8, 2)},
    "sm_89": {32: (128, 64, 8, 3), 64: (128, 64, 8, 2), 128: (64, 64, 4, 2), 256: (64, 32, 8, 1)},
    "sm_90": {32: (128, 64, 4, 3), 64: (128, 128, 8, 2), 128: (128, 64, 8, 3),
              256: (128, 64, 8, 2)},
    "sm_100": {32: (128, 64, 4, 3), 64: (128, 128, 8, 2), 128: (128, 64, 8, 2),
               256: (128, 32, 8, 2)},
    "gfx942": {32: (128, 64, 4, 1), 64: (128, 64, 4, 1), 128: (128, 32, 4, 1),
               256: (64, 32, 4, 1)},
}


#: in place of those, where tiles come from lists: finer tiles leave out more, and the coordinates
#: of a grid take registers
_LISTED: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "sm_80": {128: (128, 32, 8, 3), 256: (64, 32, 8, 1)},
    "sm_89": {128: (128, 32, 8, 2)},
    "sm_90": {64: (128, 64, 8, 3), 256: (64, 32, 4, 2)},
    "sm_100": {32: (128, 64, 8, 3), 64: (128, 64, 8, 2)},
}


#: of scores that are sums over channels: a tile of them is in registers while the channels pass
_BY_CHANNEL = {64: (64, 32, 4, 1), 128: (64, 32, 4, 1), 256: (32, 32, 4, 1)}


def default(arch: str, head_dim: int, value_dim: int, itemsize: int = 2,
            listed: bool = False, by_channel: bool = False) -> Tile:
    """The tile to take where nothing is known about the shapes.

    listed: the mask has lists of tiles, see `attnopt.kernels.triton.lists`
    by_channel: scores are no products, see `attnopt.kernels.triton.scores`
    """
    device = architecture(arch)
    family = {"sm_86": "sm_89", "sm_120": "sm_89", "gfx90a": "gfx942"}.get(device.name, device.name)
    width = max(32, padded(head_dim), padded(value_dim))
    known = _DEFAULTS[family] | (_LISTED.get(family, {}) if listed else {})
    tile = Tile(*known[min(width, 256)])
    if by_channel and itemsize <= 2:
        tile = Tile(*_BY_CHANNEL[min(max(width, 64), 256)])
    elif itemsize > 2:
        # Three products in tf32 for each one: their parts fill the registers.
        newer = family in ("sm_90", "sm_100")
        tile = (Tile(64, 32, 4, 2) if newer else Tile(32, 32, 4, 2)) if width <= 64 else (
            Tile(32, 32, 8, 1) if newer else Tile(32, 16, 4, 1))
    while tile.stages > 1 and shared_bytes(tile, head_dim, value_dim, itemsize) > device.shared:
        tile = Tile(tile.rows, tile.keys, tile.warps, tile.stages - 1)
    while tile.keys > 16 and shared_bytes(tile, head_dim, value_dim, itemsize) > device.shared:
        tile = Tile(tile.rows, tile.keys // 2, tile.warps, tile.stages)
    return tile


#: likewise for the backward kernels, by family, kernel and padded width
_GRADIENTS: dict[str, dict[str, dict[int, tuple[int, int, int, int]]]] = {
    "sm_80": {
        "query": {32: (64, 64, 4, 1), 64: (32, 64, 4, 1), 128: (64, 64, 8, 1),
                  256: (32, 32, 8, 1)},
        "key": {32: (64, 64, 4, 1), 64: (32, 64, 4, 1), 128: (64, 64, 8, 1),
                256: (32, 32, 8, 1)}},
    "sm_90": {
        "query": {32: (64, 64, 4, 2), 64: (128, 64, 8, 2), 128: (128, 64, 8, 2),
                  256: (32, 64, 8, 1)},
        "key": {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 8, 2),
                256: (64, 32, 8, 1)}},
    "sm_100": {
        "query": {32: (128, 64, 8, 2), 64: (128, 64, 8, 2), 128: (128, 64, 8, 2),
                  256: (32, 64, 8, 1)},
        "key": {32: (64, 64, 4, 2), 64: (64, 64, 4, 2), 128: (64, 64, 4, 2),
                256: (64, 32, 8, 1)}},
    "gfx942": {
        "query": {32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (64, 32, 4, 1),
                  256: (32, 32, 4, 1)},
        "key": {32: (64, 64, 4, 1), 64: (64, 64, 4, 1), 128: (32, 64, 4, 1),
                256: (32, 32, 4, 1)}},
}


#: where scores are sums over channels; warps of 64 threads are four at most
_GRADIENTS_BY_CHANNEL: dict[str, dict[int, tuple[int, int, int, int]]] = {
    "query": {64: (32, 32, 4, 1), 128: (32, 16, 4, 1), 256: (32, 32, 8, 1)},
    "key": {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)}}

def options(tile: Tile, arch: str, by_channel: bool = False) -> dict[str, int]:
    """What the compiler is told besides the constants of a kernel."""
    found = {"num_warps": tile.warps, "num_stages": tile.stages}
    if by_channel and architecture(arch).wave == 32:
        # Left alone, ptxas would rather spill a few bytes than give up a program.
        found["maxnreg"] = 255
    return found


#: of the products of rows, which need no tile of keys
ROW_TILE = Tile(32, 16, 4, 1)


def gradient_tile(arch: str, head_dim: int, value_dim: int, itemsize: int, which: str,
                  by_channel: bool = False) -> Tile:
    """The tile of a backward kernel: "query" (dq), "key" (dk and dv) or "operand" (of a bias).

    by_channel: as for `default`
    """
    if which not in ("query", "key", "operand"):
        raise ValueError(f"which must be query, key or operand, got {which!r}")
    width = max(32, padded(head_dim), padded(value_dim))
    if itemsize > 2:
        if by_channel and architecture(arch).wave == 32:
            return Tile(32, 32, 8, 1) if which == "key" and width > 32 else Tile(16, 32, 4, 1)
        return Tile(32, 32, 4, 1)
    if which == "operand":
        return Tile(16, 32, 4, 1) if width > 128 else Tile(32, 64, 4, 1)
    name = architecture(arch).name
    if by_channel:
        rows, keys, warps, _ = _GRADIENTS_BY_CHANNEL[which][min(max(width, 64), 256)]
        return Tile(rows, keys, warps if architecture(arch).wave == 32 else min(warps, 4), 1)
    family = "gfx942" if name.startswith("gfx") else name if name in _GRADIENTS else "sm_80"
    return Tile(*_GRADIENTS[family][which][min(width, 256)])
