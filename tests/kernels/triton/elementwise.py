"""An Expr as a kernel of its own: what the printer says, element by element."""

import linecache
from typing import Any

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.kernels.triton.functions import texts
from attnopt.kernels.triton.printer import TritonPrinter, masked

_HEAD = '''
import triton
import triton.language as tl
{functions}

@triton.jit
def program({arguments}score_ptr, out_ptr, Q: tl.constexpr, K: tl.constexpr):
    q = tl.arange(0, Q)[:, None]
    k = tl.arange(0, K)[None, :]
    q_inside = q
    score = tl.load(score_ptr + q * K + k)
{body}
    result = tl.broadcast_to(tl.cast({result}, {dtype}), (Q, K))
    tl.store(out_ptr + q * K + k, result)
'''


def source(expr: E.Expr, axes: dict[str, tuple[str, ...] | None], wide: bool
           ) -> tuple[str, TritonPrinter]:
    """The text of a module with a kernel `program`, and its printer."""
    printer = TritonPrinter(lambda slot: axes[slot] or (), wide=wide)
    printer.given(E.score, "score", "cell")
    result = printer(expr)
    lines = [line for level in ("head", "row", "column", "cell") for line in printer.lines[level]]
    kind = {E.FLOAT: "tl.float32", E.INT: "tl.int64", E.BOOL: "tl.int32"}[expr.dtype]
    return _HEAD.format(
        functions=texts(printer.functions), result=result, dtype=kind,
        arguments="".join(f"{name}, " for name in printer.arguments),
        body="\n".join(f"    {line}" for line in masked(lines, None))), printer


def run(expr: E.Expr, score: Tensor, operands: dict[str, Tensor],
        axes: dict[str, tuple[str, ...] | None], wide: bool = False) -> Tensor:
    """The values (Q, K) of an Expr by the kernel that the printer makes of it."""
    text, printer = source(expr, axes, wide)
    scope: dict[str, Any] = {"__name__": "elementwise"}
    name = f"<kernel {hash(text)}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    exec(compile(text, name, "exec"), scope)
    dtype = torch.float32 if expr.dtype == E.FLOAT else (
        torch.int64 if expr.dtype == E.INT else torch.int32)
    out = torch.empty(score.shape, dtype=dtype, device=score.device)
    names = {"q": 0, "k": 1}
    values = []
    for argument in printer.arguments.values():
        match argument.kind:
            case "size":
                values.append(score.shape[names[argument.axis]])
            case "pointer":
                values.append(_bytes(operands[argument.of]))
            case "length":
                values.append(operands[argument.of].shape[int(argument.axis)])
            case "stride":
                place = names.get(argument.axis)
                place = int(argument.axis) if place is None else place
                tensor = operands[argument.of]
                values.append(tensor.stride(place) if tensor.shape[place] > 1 else 0)
    scope["program"][(1,)](*values, score, out, *score.shape)
    return out != 0 if expr.dtype == E.BOOL else out


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.bool else tensor
