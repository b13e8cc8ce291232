"""Tile: a window of the score (*L, Q, K), and what the leaves of an Expr mean in it.

The generated code of `attnopt.kernels.aten.codegen` asks a Tile for its leaves. A window has a
start and a length along every axis, so that one program computes the whole score or any block of
it. The meaning of each leaf is that of `attnopt.ir.evaluate.Env`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.evaluate import axis_names
from attnopt.ir.expr import Expr

_axis_names = functools.lru_cache(maxsize=64)(axis_names)


def broadcast(*shapes: Sequence[int]) -> tuple[int, ...]:
    """torch.broadcast_shapes, which takes as long as a small attention, for plain numbers."""
    first = shapes[0]
    if all(shape == first for shape in shapes[1:]):
        return tuple(first)
    result = [1] * max(map(len, shapes))
    for shape in shapes:
        for i in range(-len(shape), 0):
            length = shape[i]
            if not isinstance(length, int):
                return tuple(torch.broadcast_shapes(*shapes))
            if length != 1 and result[i] != length:
                if result[i] != 1:
                    raise ValueError(f"leading axes must broadcast, got {[*map(tuple, shapes)]}")
                result[i] = length
    return tuple(result)


class Tile:
    """A window of the score, or of the output when `last` is ("q", "d").

    shape:    lengths of the window, (*L, Q, K)
    operands: whole tensors by slot
    dtype:    of numbers that become floats
    full:     lengths of the whole score, where the window is a part of it
    starts:   where the window begins along each axis; needs `full`
    leaves:   tensors of score, weight, out, value and statistics, as far as they are known by now
    """

    __slots__ = ("shape", "operands", "dtype", "device", "full", "starts", "axes", "sizes",
                 "leaves", "_parts")

    def __init__(self, shape: tuple[int, ...], operands: Mapping[str, Tensor], dtype: torch.dtype,
                 device: torch.device, full: tuple[int, ...] | None = None,
                 starts: tuple[int, ...] | None = None, last: tuple[str, str] = ("q", "k"),
                 sizes: Mapping[str, int] | None = None) -> None:
        self.shape = shape
        self.operands = operands
        self.dtype = dtype
        self.device = device
        self.full = shape if full is None else full
        self.starts = starts
        self.axes = _axis_names(len(shape), last)
        self.sizes = sizes
        self.leaves: dict[Expr, Any] = {}
        #: (axis from the right, start, length) of the axes that the window takes a part of
        self._parts: list[tuple[int, int, int]] = []
        if starts is not None:
            rank = len(shape)
            self._parts = [(i - rank, starts[i], shape[i]) for i in range(rank)
                           if shape[i] != self.full[i]]

    def size(self, axis: str) -> int:
        """The whole length of an axis."""
        if self.sizes and axis in self.sizes:
            return self.sizes[axis]
        return self.full[self._place(axis)]

    def index(self, axis: str) -> Tensor:
        """Positions along `axis`, shaped to broadcast against the window."""
        place = self._place(axis)
        start = self.starts[place] if self.starts else 0
        steps = torch.arange(start, start + self.shape[place], device=self.device)
        return steps.view(-1, *[1] * (len(self.axes) - 1 - place))

    def broadcast(self, slot: str) -> Tensor:
        """An operand as it broadcasts against the window."""
        tensor = self.operand(slot)
        rank = -tensor.dim()
        for axis, start, length in self._parts:
            if axis >= rank and tensor.shape[axis] != 1:
                tensor = tensor.narrow(axis, start, length)
        return tensor

    def inner(self, query_slot: str, key_slot: str) -> Tensor:
        """Sum over r of query[…, q, r] * key[…, k, r]."""
        query, key = self.operand(query_slot), self.operand(key_slot)
        for axis, start, length in self._parts:
            if axis != -1 and -query.dim() <= axis and query.shape[axis] != 1:
                query = query.narrow(axis, start, length)
            own = -2 if axis == -1 else axis
            if axis != -2 and -key.dim() <= own and key.shape[own] != 1:
                key = key.narrow(own, start, length)
        return query @ key.transpose(-1, -2)

    def gather(self, slot: str, places: tuple[Any, ...], names: tuple[str | None, ...]) -> Tensor:
        """operand[places], by views where every place is a whole axis of that name.

        A place outside of the operand means the nearest element.
        """
        table = self.operand(slot)
        if table.dim() != len(places):
            raise ValueError(f"operand {slot!r} must have {len(places)} axes, got {table.dim()}")
        partial = {self.axes[axis] for axis, _, _ in self._parts}
        whole = [name is not None and name in self.axes and table.shape[i] == self.size(name)
                 for i, name in enumerate(names)]
        if all(whole) and len(set(names)) == len(names) and not partial.intersection(names):
            order = sorted(range(len(names)), key=lambda i: self._place(str(names[i])))
            return table.permute(order).reshape(
                [self.size(a) if a in names else 1 for a in self.axes])
        return table[tuple(
            place if whole[i] else place.clamp(0, table.shape[i] - 1) if torch.is_tensor(place)
            else min(max(place, 0), table.shape[i] - 1) for i, place in enumerate(places))]

    def operand(self, slot: str) -> Tensor:
        if slot not in self.operands:
            raise ValueError(f"operands must have {slot!r}, got {sorted(self.operands)}")
        return self.operands[slot]

    def _place(self, axis: str) -> int:
        if axis not in self.axes:
            raise ValueError(f"axis must be one of {', '.join(self.axes)}, got {axis!r}")
        return self.axes.index(axis)
