"""What is compared of one flat input between the captured call and a later one.

A check returns None where the input agrees with the captured one, else the reason, in words that
name the argument but no sizes or values, so that reasons can be counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

#: the classes of plain tensors
TENSORS = frozenset((torch.Tensor, nn.Parameter, nn.Buffer))


def leaf_check(leaf: Any, fake: Any, name: str) -> Callable[[Any], str | None]:
    """The check of one input.

    Args:
        leaf: the captured input.
        fake: what the trace saw in its place, with the symbolic sizes.
        name: of the argument.
    """
    if isinstance(leaf, torch.Tensor):
        return _tensor_check(leaf, fake, name)
    return _plain_check(leaf, fake, name)


def _plain_check(leaf: Any, fake: Any, name: str) -> Callable[[Any], str | None]:
    kind, text = type(leaf), f"another value of {name}"
    if isinstance(fake, torch.SymInt):
        return lambda value: None if type(value) is kind else text
    if kind is float:  # NaN equals itself here, and 0.0 is not -0.0
        bits = leaf.hex()
        return lambda value: None if type(value) is float and value.hex() == bits else text
    return lambda value: None if type(value) is kind and (
        value is leaf or value == leaf) else text


def _tensor_check(leaf: torch.Tensor, fake: Any, name: str) -> Callable[[Any], str | None]:
    dtype, device, dim = leaf.dtype, leaf.device, leaf.dim()
    contiguous = leaf.is_contiguous()
    sizes = fake.shape if isinstance(fake, torch.Tensor) else leaf.shape
    static = [(d, int(s)) for d, s in enumerate(sizes) if not isinstance(s, torch.SymInt)]
    shape = leaf.shape if len(static) == dim else None
    strides = leaf.stride() if shape is not None and not contiguous else None
    order = None if contiguous or strides is not None else _order(leaf)
    strided = torch.strided

    def check(value: Any) -> str | None:
        if type(value) not in TENSORS:
            return f"another type of {name}"
        if value.dtype is not dtype:
            return f"another dtype of {name}"
        if value.layout is not strided or value.is_nested:
            return f"another layout of {name}"
        if value.device != device:
            return f"another device of {name}"
        if shape is not None:
            if value.shape != shape:
                return f"another size of {name}"
        elif value.dim() != dim or any(value.shape[d] != s for d, s in static):
            return f"another size of {name}"
        if value.is_contiguous() is not contiguous:
            return f"another memory layout of {name}"
        if strides is not None and value.stride() != strides:
            return f"another memory layout of {name}"
        if order is not None and _order(value) != order:
            return f"another memory layout of {name}"
        return None

    return check


def _order(tensor: torch.Tensor) -> tuple[int, ...]:
    """The dimensions from the widest stride to the narrowest; expanded ones are marked."""
    strides = tensor.stride()
    ranked = sorted(range(len(strides)), key=lambda d: (-strides[d], d))
    return (*ranked, *[-1 - d for d, s in enumerate(strides) if s == 0])


def aliases(leaves: Sequence[Any]) -> tuple[int, ...]:
    """For each tensor the position of the first leaf that is the same object."""
    first: dict[int, int] = {}
    return tuple([first.setdefault(id(leaf), i) for i, leaf in enumerate(leaves)
                  if isinstance(leaf, torch.Tensor)])
