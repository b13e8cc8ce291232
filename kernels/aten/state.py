"""What kind of call this is: what may be overwritten, and whether values may be looked at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)


def call_state(query: Tensor, key: Tensor, value: Tensor, operands: tuple[Tensor, ...]) -> str:
    """ "functional"  functorch or forward-mode differentiation: compose, every derivative exists
    "traced"      a program is being recorded, or the tensors are of a subclass: no look at values
    "safe"        autograd may ask for a gradient
    "all"         plain inference
    """
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "functional"
    if torch._C._len_torch_dispatch_stack() or torch.compiler.is_compiling():
        return "traced"
    if (type(query) not in _PLAIN or type(key) not in _PLAIN or type(value) not in _PLAIN
            or query.device.type == "meta" or torch.jit.is_tracing()):
        return "traced"
    grad = torch.is_grad_enabled()
    for tensor in (query, key, value, *operands):
        if type(tensor) not in _PLAIN:
            return "traced"
        if grad and tensor.requires_grad:
            return "safe"
    return "all"
