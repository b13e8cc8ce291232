"""Tables with a rim, for look-ups at places that may lie outside of them.

    padded_table(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor

lays the two axes of a table along which it is sampled as one, row-major, with `before` and `after`
entries beyond each end: zeros, or the entries at the end itself ("border"). What
`torch.nn.functional.grid_sample` reads outside of its input is then an entry like any other. It is
a composition of ATen, so that the table keeps its gradient.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define("padded_table(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))
#: what lies beyond the ends
RIMS = ("zeros", "border")


@dataclass(frozen=True)
class Rim:
    """axes: the two sampled axes of the table, rows first; before, after: entries added to each."""

    axes: tuple[int, int]
    before: tuple[int, int]
    after: tuple[int, int]
    kind: str = "zeros"

    def __post_init__(self) -> None:
        if self.kind not in RIMS:
            raise ValueError(f"kind must be one of {', '.join(RIMS)}, got {self.kind!r}")

    def __str__(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Rim:
        body = json.loads(text)
        return Rim(**{name: tuple(x) if isinstance(x, list) else x  # type: ignore[arg-type]
                      for name, x in body.items()})


def padded_table(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """The table (*others, entries) that `Rim` in `text` describes."""
    rim = Rim.parse(text)
    (table,) = tensors
    table = table.movedim(rim.axes, (-2, -1))
    ends = [n for axis in (1, 0) for n in (rim.before[axis], rim.after[axis])]
    if rim.kind == "zeros":
        return F.pad(table, ends).flatten(-2)
    flat = table.reshape(-1, 1, *table.shape[-2:])
    return F.pad(flat, ends, mode="replicate").reshape(*table.shape[:-2], -1)


_library.impl("padded_table", padded_table, "CompositeImplicitAutograd")
