"""What an optimised module does to a call: how exact, how fast, how much memory at its peak."""

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn

import attnopt
from attnopt.bench import memory


def optimize(model: nn.Module, inputs: tuple[Tensor, ...], **options: Any) -> Any:
    """The optimised model; prints its report, and what was found out about each attention."""
    start = time.perf_counter()
    optimized = attnopt.optimize(model, inputs, **options)
    print(optimized.report)
    print(f"\noptimised and verified in {time.perf_counter() - start:.1f} s\n")
    for row in optimized.report.sites:
        found = "; ".join(f"{name}: {text}" for name, text in
                          (("bias", row.bias), ("mask", row.mask)) if text)
        print(f"  {row.path or 'attention'}, {row.shapes}: {found}")
    print()
    return optimized


@torch.no_grad()
def show(model: nn.Module, optimized: nn.Module, inputs: tuple[Tensor, ...], repeats: int) -> None:
    """Prints the errors of both against the model in float64, their times and peaks of memory."""
    exact = copy.deepcopy(model).double()(
        *(x.double() if x.is_floating_point() else x for x in inputs))
    errors, peaks = [], []
    for module in (model, optimized):
        errors.append((module(*inputs) - exact).abs().max().item())
        peaks.append(memory.peak(lambda module=module: module(*inputs), torch.device("cpu")))
    print(f"  {optimized.report.measure(inputs, repeats=repeats)}")
    print(f"  away from float64 by at most: original {errors[0]:.1e}, optimised {errors[1]:.1e}, "
          f"of outputs up to {exact.abs().max():.1f}")
    if None not in peaks:
        print("  memory at the peak of a call: original {:.0f} MB, optimised {:.0f} MB\n".format(
            *(peak / 1e6 for peak in peaks)))
