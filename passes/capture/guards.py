"""ValueGuard: a rewrite that relies on the values of a buffer or constant holds while they last.

Neither identity nor `_version` nor the storage pointer can prove that a tensor still holds the
values it had: a write through `.data`, through a NumPy alias or by a fused optimiser leaves all
three alone, and an inference tensor has no version at all. So the content itself is compared, byte
by byte, at each call. That reads every element once, which the attention that used it as its mask
did for each head.

Parameters are never guarded by value, since no fact may be derived from their values.
"""

from __future__ import annotations

import ctypes
import sys
import weakref
from dataclasses import dataclass

import torch

from attnopt.errors import AttnOptError
from attnopt.ir.captured import Captured

_memcmp = None
if sys.platform != "win32":
    _memcmp = ctypes.CDLL(None).memcmp
    _memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    _memcmp.restype = ctypes.c_int

#: copies of guarded values, shared between guards of equal content (each layer's own causal mask)
_copies: weakref.WeakValueDictionary[tuple[object, ...], torch.Tensor] = (
    weakref.WeakValueDictionary())


@dataclass(frozen=True, eq=False)
class ValueGuard:
    """What a placeholder of a captured graph held, byte for byte.

    placeholder: name in the graph, "" where the tensor itself is not in it
    path: dotted path in the model, for messages
    snapshot: a private copy of the values
    """

    placeholder: str
    path: str
    snapshot: torch.Tensor

    @classmethod
    def of(cls, captured: Captured, placeholder: str) -> ValueGuard:
        """Guard of a buffer or constant of `captured`, by the name of its placeholder.

        Raises:
            AttnOptError: the placeholder is a parameter, a user's input, or no plain tensor.
        """
        origin, value = captured.origins[placeholder], captured.values[placeholder]
        if origin.kind not in ("buffer", "constant"):
            raise AttnOptError(
                f"a value guard must be of a buffer or constant, got {origin.kind} {origin.path}")
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            raise AttnOptError(f"a value guard must be of a dense tensor, got {type(value)}")
        return cls(placeholder, origin.path, private_copy(value))

    def holds(self, value: torch.Tensor) -> bool:
        """Whether `value`, what the slot holds now, is what it was, to the last bit."""
        snapshot = self.snapshot
        if value.dtype is not snapshot.dtype or value.shape != snapshot.shape:
            return False
        if value.device != snapshot.device:
            return False
        return same_content(value, snapshot)


def same_content(value: torch.Tensor, snapshot: torch.Tensor) -> bool:
    """Bitwise equality of a tensor and a contiguous one of its shape, dtype and device."""
    if value.numel() == 0:
        return True
    if _memcmp is not None and value.device.type == "cpu" and value.is_contiguous():
        size = snapshot.numel() * snapshot.element_size()
        return _memcmp(value.data_ptr(), snapshot.data_ptr(), size) == 0
    with torch.no_grad():
        return torch.equal(_as_integers(value.detach().contiguous()), _as_integers(snapshot))


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_integers(value: torch.Tensor) -> torch.Tensor:
    """The same bytes as integers, so that NaN equals itself."""
    if value.dtype.is_complex:
        value = torch.view_as_real(value)
    return value.view(_INTEGERS[value.element_size()]) if value.dim() else value.reshape(1).view(
        _INTEGERS[value.element_size()])


def private_copy(value: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of the values, shared between equal ones."""
    with torch.inference_mode(False), torch.no_grad():
        copy = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        copy.copy_(value)
    numbers = copy.double() if copy.dtype.is_floating_point else copy
    key = (copy.dtype, tuple(copy.shape), copy.device, 0 if copy.dtype.is_complex
           else float(numbers.sum(dtype=torch.float64)) if copy.numel() else 0.0)
    known = _copies.get(key)
    if known is not None and same_content(copy, known):
        return known
    _copies[key] = copy
    return copy
