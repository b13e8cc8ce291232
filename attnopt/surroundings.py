"""What goes on around a call: transforms, modes, hooks and backward passes, in which no variant may
run or be captured."""

from __future__ import annotations

import torch
from torch.nn.modules import module as torch_module
from torch.utils._device import DeviceContext


def outside() -> str | None:
    """Why no variant may run here, whatever the call: somebody is tracing or transforming it."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "inside a torch.func transform"
    if torch._C._len_torch_dispatch_stack():
        return "inside a dispatch mode"
    if torch._C._len_torch_function_stack() and not _only_devices():
        return "inside a torch function mode"
    if torch._C._get_tracing_state() is not None:
        return "inside torch.jit.trace"
    if global_hooks():
        return "hooks on all modules are registered"
    return None


def _only_devices() -> bool:
    """Whether the only function mode is the default device, and that is the CPU's."""
    modes = torch.overrides._get_current_function_mode_stack()
    return all(type(m) is DeviceContext and m.device.type == "cpu" for m in modes)


def global_hooks() -> bool:
    return bool(torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
                or torch_module._global_backward_hooks
                or torch_module._global_backward_pre_hooks)


def inside_a_backward() -> bool:
    """Whether a backward is running, or saved tensors are being replaced, as by activation
    checkpoints: what ran forward must then run again in the same way."""
    if torch._C._current_graph_task_id() != -1:
        return True
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
