"""A large constant by blocks of rows: its values without the larger tensors that it is made of.

A mask of N x N truth values is small beside the indices and distances of 8 bytes that make it.
Along pointwise operations a block of rows of the result needs the same rows of every argument, and
what is broadcast along the rows as a whole. Nothing else is followed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from attnopt.passes.normalize import op_name

#: bytes of a tensor that is evaluated whole, and of a block of rows
SMALL, BLOCK = 1 << 22, 1 << 24
#: pointwise operations that torch does not tag as such
_UNTAGGED = frozenset(("to", "_to_copy", "clone", "contiguous", "alias", "detach", "__and__",
                       "__or__", "__xor__"))
Shape = tuple[int, ...]


def by_rows(node: fx.Node, shape_of: Callable[[fx.Node], Shape],
            whole: Callable[[fx.Node], Tensor]) -> Tensor:
    """The value of `node`; `whole` evaluates nodes that are small.

    Raises LookupError where an operation is none that goes row by row.
    """
    rows = shape_of(node)[-2]
    width = max(1, torch.Size(shape_of(node)).numel() // rows * 8)
    step = max(1, BLOCK // width)
    found = [_Part(start, min(start + step, rows), rows, shape_of, whole).of(node)
             for start in range(0, rows, step)]
    return torch.cat(found, -2)


class _Part:
    """Rows [start, stop) of all nodes that have them."""

    def __init__(self, start: int, stop: int, rows: int, shape_of: Callable[[fx.Node], Shape],
                 whole: Callable[[fx.Node], Tensor]) -> None:
        self.start, self.stop, self.rows = start, stop, rows
        self.shape_of, self.whole = shape_of, whole
        self.done: dict[fx.Node, Any] = {}

    def of(self, node: fx.Node) -> Any:
        if node not in self.done:
            self.done[node] = self._of(node)
        return self.done[node]

    def _of(self, node: fx.Node) -> Any:
        if not isinstance(node.meta.get("val"), Tensor):
            return self.whole(node)
        shape = self.shape_of(node)
        if torch.Size(shape).numel() * node.meta["val"].element_size() <= SMALL:
            value = self.whole(node)
            if len(shape) < 2 or shape[-2] == 1:
                return value
            if shape[-2] == self.rows:
                return value.narrow(-2, self.start, self.stop - self.start)
            raise LookupError(f"{node.name} has other rows")
        if len(shape) < 2 or shape[-2] != self.rows or not _pointwise(node):
            raise LookupError(f"{node.name} does not go row by row")
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self.of)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def _pointwise(node: fx.Node) -> bool:
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (
        torch.Tag.pointwise in target.tags or op_name(node) in _UNTAGGED)
