"""Inputs for an ONNX model that came without any, and which sizes of its values may change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from attnopt.errors import AttnOptError, OptionError

#: two sizes of the dynamic axes: the first one's by order of appearance, and those of another run
_SIZES = ((2, 24), (3, 37))
#: sizes of nodes' results may follow from numbers here
_BY_VALUE = {"NonZero", "Compress", "Unique", "NonMaxSuppression", "Loop", "If", "Scan", "Resize",
             "Upsample", "SequenceAt", "ConcatFromSequence"}


def draws(model: ir.Model, given: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None
          ) -> list[dict[str, Any]]:
    """Feeds for a model: those that the user gives, or drawn ones of two sizes.

    The first axis of an input is taken for a batch, other dynamic axes for lengths; axes of one
    name have one size.
    """
    inputs = [v for v in model.graph.inputs if v.name not in model.graph.initializers]
    if given is not None:
        feeds = [given] if isinstance(given, Mapping) else list(given)
        return [_given(inputs, feed) for feed in feeds]
    found = []
    for round_, (batch, length) in enumerate(_SIZES):
        random = np.random.default_rng(round_)
        sizes: dict[str, int] = {}
        feed = {str(v.name): _drawn(v, sizes, batch, length, random) for v in inputs}
        found.append(feed)
        if not sizes:
            break
    return found


def _given(inputs: Sequence[ir.Value], feed: Any) -> dict[str, Any]:
    names = {str(v.name) for v in inputs}
    if not isinstance(feed, Mapping) or set(feed) != names:
        got = sorted(feed) if isinstance(feed, Mapping) else type(feed).__name__
        raise OptionError(f"inputs must be arrays by the names {sorted(names)}, got {got}")
    return {name: np.asarray(array) for name, array in feed.items()}


def _drawn(value: ir.Value, sizes: dict[str, int], batch: int, length: int,
           random: np.random.Generator) -> Any:
    if value.shape is None or value.dtype is None:
        raise AttnOptError(f"the input {value.name} has no shape: give inputs=")
    shape = []
    for axis, size in enumerate(value.shape):
        if isinstance(size, int):
            shape.append(size)
        else:
            name = str(size.value) if size.value is not None else f"{value.name}.{axis}"
            shape.append(sizes.setdefault(name, batch if axis == 0 else length + len(sizes)))
    dtype = value.dtype.numpy()
    if np.issubdtype(dtype, np.floating):
        return random.standard_normal(shape).astype(dtype)
    if dtype == np.bool_:
        return np.ones(shape, dtype)
    return random.integers(0, 2, shape).astype(dtype)


def edge(model: ir.Model, given: Any) -> list[dict[str, Any]]:
    """A feed whose dynamic axes are all 1, where feeds are drawn and some axes are dynamic."""
    if given is not None or not _free(model):
        return []
    random, sizes = np.random.default_rng(0), dict.fromkeys(_names(model), 1)
    return [{str(v.name): _drawn(v, sizes, 1, 1, random) for v in model.graph.inputs
             if v.name not in model.graph.initializers}]


def _names(model: ir.Model) -> list[str]:
    return [str(size.value) if size.value is not None else f"{v.name}.{axis}"
            for v in model.graph.inputs for axis, size in enumerate(v.shape or ())
            if not isinstance(size, int)]


def _free(model: ir.Model) -> bool:
    """Whether any size can change."""
    return bool(_names(model)) or any(
        node.domain or node.op_type in _BY_VALUE for node in model.graph.all_nodes())


def dynamic_axes(model: ir.Model, values: Sequence[ir.Value],
                 examples: Sequence[tuple[Tensor, ...]]) -> tuple[dict[int, Any], ...]:
    """The axes of values that can change: all that inference does not know to be fixed."""
    free, found = _free(model), []
    for place, value in enumerate(values):
        shapes = [example[place].shape for example in examples]
        known = [s if isinstance(s, int) else None for s in value.shape or ()]
        known = known if len(known) == len(shapes[0]) else [None] * len(shapes[0])
        found.append({axis: torch.export.Dim.AUTO for axis in range(len(shapes[0]))
                      if len({shape[axis] for shape in shapes}) > 1
                      or (free and known[axis] is None)})
    return tuple(found)
