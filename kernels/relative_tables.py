"""Tables of what a query or a key has to do with each relative position.

    relative_table(Tensor[] rows_and_table, SymInt[] lengths, str text) -> Tensor

is the product R[…, i, r] = sum over d of x[…, i, d] * e[…, r, d] of queries or keys x and
embeddings e of relative positions (Shaw et al., arXiv 1803.02155): what a kernel looks up at
r = f(q, k) in place of the gathered embeddings e[f(q, k)], which are d times as many as the scores.
`Layout` is what the text says. It is a composition of ATen, so that both factors keep their
gradients.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define("relative_table(Tensor[] rows_and_table, SymInt[] lengths, str text) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))

Dims = tuple[tuple[str, ...], ...]
#: names of the dimension that is summed over and of the relative positions
INNER, PLACE = "inner", "place"


@dataclass(frozen=True)
class Layout:
    """Dimensions of both factors, each a row-major product of named axes, () for length 1.

    rows:  of x, with `INNER`; table: of e, with `INNER` and `PLACE`
    axes:  names of the lengths; result: axes of the result before the positions, in order
    inner: terms of a sum
    first, count: the positions that are wanted, count < 0 for all
    descending: the last one first
    """

    rows: Dims
    table: Dims
    axes: tuple[str, ...]
    result: tuple[str, ...]
    inner: int
    first: int = 0
    count: int = -1
    descending: bool = False

    def __str__(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Layout:
        body = json.loads(text)
        for name in ("rows", "table"):
            body[name] = tuple(map(tuple, body[name]))
        for name in ("axes", "result"):
            body[name] = tuple(body[name])
        return Layout(**body)


def relative_table(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """The table (*result, positions) that `Layout` in `text` describes."""
    layout = Layout.parse(text)
    sizes = dict(zip(layout.axes, lengths, strict=True))
    rows, table = tensors
    place = layout.table.index((PLACE,))
    if layout.count >= 0:
        table = table.narrow(place, layout.first, layout.count)
    if layout.descending:
        table = table.flip(place)
    sizes |= {PLACE: table.shape[place], INNER: layout.inner}
    order = (*layout.result, INNER)
    left = _spread(rows, layout.rows, sizes, order)
    right = _spread(table, layout.table, sizes, (*layout.result[:-1], INNER, PLACE))
    shape = [sizes[a] for a in layout.result]
    return (left @ right).expand(*shape, -1).contiguous()


def _spread(tensor: Tensor, dims: Dims, sizes: dict[str, int], order: Sequence[str]) -> Tensor:
    """The tensor with one dimension for every axis of `order`, of length 1 where it has none."""
    names = [a for run in dims for a in run]
    tensor = tensor.reshape([sizes[a] for a in names])
    tensor = tensor.permute([names.index(a) for a in order if a in names])
    return tensor.reshape([sizes[a] if a in names else 1 for a in order])


_library.impl("relative_table", relative_table, "CompositeImplicitAutograd")
