"""Three things that Triton 3.6's interpreter lacks, put right for the tests.

    bfloat16 in `tl.dot`       its operands are raw 16-bit integers there; they are widened here
    truth values of scalars    the result of a scalar comparison becomes float when it is broadcast
    numpy 2.4 and `range`      `int(array)` of one element with an axis raises; the element is taken
"""

from typing import Any

import numpy as np
import triton.language as tl
import triton.runtime.interpreter as interpreter

_patch = interpreter._patch_lang_tensor
_dot = interpreter.InterpreterBuilder.create_dot
_splat = interpreter.InterpreterBuilder.create_splat


def _patch_tensor(tensor: Any, scope: Any) -> None:
    _patch(tensor, scope)
    scope.set_attr(
        tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))


def _widened(handle: Any) -> Any:
    if getattr(handle.dtype, "scalar", handle.dtype) != tl.bfloat16:
        return handle
    bits = handle.data.astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _wide_dot(self: Any, a: Any, b: Any, c: Any, precision: Any, imprecise: Any) -> Any:
    return _dot(self, _widened(a), _widened(b), c, precision, imprecise)


def _true_splat(self: Any, kind: Any, handle: Any) -> Any:
    if handle.data.dtype != np.bool_:
        return _splat(self, kind, handle)
    return interpreter.TensorHandle(np.full(kind.shape, handle.data.reshape(-1)[0]), tl.int1)


interpreter._patch_lang_tensor = _patch_tensor
interpreter.InterpreterBuilder.create_dot = _wide_dot
interpreter.InterpreterBuilder.create_splat = _true_splat
