"""A tensor that belongs to a part of the scores, with zeros beside it.

    placed(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor       (*L, Q, K)

The one tensor lies at a start along queries, keys or both, whose whole lengths are `lengths`; 1
where it is broadcast. It is what a model adds to image tokens alone, when class tokens have scores
too (`attnopt.passes.recognize.assignments`). A composition of ATen: it differentiates and exports.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define("placed(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))


def text(starts: Mapping[int, int]) -> str:
    """starts: dimension from the right -> where the tensor begins along it."""
    return json.dumps(list(starts.items()), separators=(",", ":"))


def starts_of(text: str) -> dict[int, int]:
    """What `text` was made of."""
    return {dim: start for dim, start in json.loads(text)}


def placed(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """The tensor with zeros before and behind it along the dimensions that `text` names."""
    (tensor,) = tensors
    padding = [0, 0, 0, 0]
    for (dim, start), length in zip(starts_of(text).items(), lengths, strict=True):
        at = 2 * (-dim - 1)
        padding[at : at + 2] = start, length - start - tensor.shape[dim]
    return F.pad(tensor, padding)


_library.impl("placed", placed, "CompositeImplicitAutograd")
