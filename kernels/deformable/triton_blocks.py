"""Blocks of the Triton kernels of deformable attention: rows of a program and its warps.

A row is a query of a head. A thread holds 16 bytes of a row, as much as one load reads, so that
the lanes of a warp are dealt out to `wave / (channels / numbers of a thread)` rows; with more than
that the coordinates of several rows would be computed by each thread, which costs registers and
saves nothing.

    forward     4 warps, of adjacent queries of one head: corners of one are often those of the
                next and lie in the cache of the multiprocessor. One warp where the device would
                not be full otherwise.
    backward    1 warp, 4 numbers of a thread as the float32 atomics have it, whatever the dtype of
                value: sums over channels stay within a warp and need no barrier (with 4 warps
                there are 6 for each point), and at 64 registers the 32 programs that a
                multiprocessor holds are all the warps that fit. With a depth that heads share a
                program takes heads of one query: their points lie near each other.

What the kernels take is recorded in triton_budget.json.
"""

from __future__ import annotations

from dataclasses import dataclass

from attnopt.kernels.triton.tiles import architecture

_VECTOR = 16
#: numbers of a thread in the backward kernel
_ATOMIC = 4
_MOST_WARPS = 4


@dataclass(frozen=True)
class Block:
    """queries and heads of a program, powers of two, and its warps."""

    queries: int
    heads: int
    warps: int


def width(channels: int) -> int:
    """The power of two that channels are padded to."""
    return max(_ATOMIC, 1 << (max(channels, 1) - 1).bit_length())


def block(arch: str, rows: int, heads: int, channels: int, itemsize: int, *,
          backward: bool = False, together: bool = False, processors: int = 1) -> Block:
    """The block of a call.

    arch: a name of `tiles.ARCHITECTURES`; rows: queries x heads x batch; itemsize: bytes of a
    number of value; together: heads of a query belong in one program; processors: of the device
    """
    wave = architecture(arch).wave
    lanes = max(1, width(channels) // (_ATOMIC if backward else _VECTOR // itemsize))
    if lanes >= wave:
        return Block(1, 1, min(_MOST_WARPS, lanes // wave))
    own = wave // lanes
    full = not backward and rows >= own * _MOST_WARPS * processors
    warps = _MOST_WARPS if full else 1
    several = min(own * warps, 1 << (heads - 1).bit_length()) if together else 1
    return Block(own * warps // several, several, warps)
