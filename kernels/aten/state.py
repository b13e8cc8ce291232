"""What kind of call this is: what may be overwritten, and whether values may be looked at."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_PLAIN = (Tensor, torch.nn.Parameter)
_functorch_level = torch._C._functorch.peek_interpreter_stack
_dispatch_modes = torch._C._len_torch_dispatch_stack
_jit_trace = torch._C._get_tracing_state


def call_state(tensors: tuple[Tensor, ...]) -> str:
    """How a call with these tensors may be computed:

    "functional"  functorch or forward-mode differentiation: compose, every derivative exists
    "traced"      a program is being recorded, or the tensors are of a subclass: no look at values
    "safe"        autograd may ask for a gradient
    "all"         plain inference
    """
    if _functorch_level() is not None or forward_ad._current_level >= 0:
        return "functional"
    if _dispatch_modes() or _jit_trace() is not None:
        return "traced"
    for tensor in tensors:
        if type(tensor) not in _PLAIN:
            return "traced"
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor.requires_grad:
                return "safe"
    return "traced" if tensors[0].is_meta else "all"
