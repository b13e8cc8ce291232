"""How a result is judged: against a float64 run of the author's own program.

`Float64` is a dispatch mode under which every floating op computes in float64: casts to a narrower
type are dropped, while random draws stay in the author's dtype so that dropout keeps its stream.
A new result is accepted when, tensor by tensor,

    err_new <= max(2 * err_original, 8 * eps(dtype) * max|out|)

with both errors taken against that run. Gradients are sums over tokens that may cancel, exactly so
in the author's order only: they share the largest peak among them, and have 64 for 8 in float32 and
float64. Where the original is NaN or infinite the new result must be the same, or be near the
float64 run where that is finite (an fp16 overflow, say).
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

Result = dict[str, Tensor]


class Float64(TorchDispatchMode):
    """Computes floating ops in float64; draws random numbers in `working`."""

    def __init__(self, working: torch.dtype) -> None:
        super().__init__()
        self.working = working

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _is_random(func):
            return self._draw(func, args, kwargs)
        leaves = tree_leaves((args, kwargs))
        if func.is_view or not any(isinstance(x, Tensor) for x in leaves):
            out = func(*args, **kwargs)  # factories keep the author's rounding of constants
            return out if func.is_view else tree_map(_double, out)
        if _from_integers(func, leaves):
            return tree_map(_double, func(*args, **kwargs))
        if func._schema.is_mutable:
            first, *rest = args
            return func(first, *tree_map(_double, rest), **tree_map(_double, kwargs))
        return func(*tree_map(_double, args), **tree_map(_double, kwargs))

    def _draw(self, func, args, kwargs):
        def narrow(x):
            return x.to(self.working) if isinstance(x, Tensor) and x.is_floating_point() else x

        if func._schema.is_mutable:
            drawn = narrow(args[0])
            func(drawn, *args[1:], **kwargs)
            return args[0].copy_(drawn)
        if kwargs.get("dtype") is torch.float64:
            kwargs = {**kwargs, "dtype": self.working}
        return tree_map(_double, func(*tree_map(narrow, args), **kwargs))


def _is_random(func) -> bool:
    """Fused attention is tagged as random for its dropout, which a CPU never runs inside it."""
    return (torch.Tag.nondeterministic_seeded in func.tags
            and "scaled_dot_product" not in str(func))


def _double(x: Any) -> Any:
    if isinstance(x, torch.dtype) and x.is_floating_point:
        return torch.float64
    if isinstance(x, Tensor) and x.is_floating_point() and x.dtype is not torch.float64:
        return x.double()
    return x


def _from_integers(func, leaves: Sequence[Any]) -> bool:
    """A cast of index arithmetic: its rounding is part of the program."""
    return func.overloadpacket is torch.ops.aten._to_copy and not any(
        isinstance(x, Tensor) and x.is_floating_point() for x in leaves
    )


def run(module: nn.Module, inputs: Sequence[Tensor], *, gradients: bool, seed: int = 3,
        clone: bool = True) -> Result:
    """Outputs, and with `gradients` the gradients of inputs and parameters, by name.

    `clone=False` hands over the inputs with the strides that they have.
    """
    torch.manual_seed(seed)
    given = [_leaf(x, gradients, clone) for x in inputs]
    with torch.set_grad_enabled(gradients):
        outputs = tree_flatten(module(*given))[0]
    found = {f"output {i}": x for i, x in enumerate(outputs) if isinstance(x, Tensor)}
    if gradients:
        found |= _gradients(module, given, list(found.values()))
    return {name: x.detach() for name, x in found.items()}


def _leaf(x: Tensor, gradients: bool, clone: bool) -> Tensor:
    x = x.detach().clone() if clone else x.detach()
    return x.requires_grad_(gradients and x.is_floating_point())


def _gradients(module: nn.Module, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Result:
    named = {f"gradient of input {i}": x for i, x in enumerate(inputs) if x.requires_grad}
    named |= {f"gradient of {n}": p for n, p in module.named_parameters() if p.requires_grad}
    differentiable = [x for x in outputs if x.requires_grad]
    if not differentiable:
        return {}
    rng = torch.Generator().manual_seed(11)
    # Eighths are exact in every dtype, so that each run starts its backward from the same numbers.
    seeds = [torch.randint(-16, 17, x.shape, generator=rng).to(x.dtype) / 8 for x in differentiable]
    grads = torch.autograd.grad(differentiable, list(named.values()), seeds, allow_unused=True)
    return {n: g for n, g in zip(named, grads, strict=True) if g is not None}


def oracle(module: nn.Module, inputs: Sequence[Tensor], *, gradients: bool, seed: int = 3,
           working: torch.dtype | None = None) -> Result:
    """The same program in float64."""
    if working is None:
        working = next((x.dtype for x in inputs if x.is_floating_point()), torch.float32)
    twin = copy.deepcopy(module).double()
    wide = [x.double() if x.is_floating_point() else x for x in inputs]
    with Float64(working):
        return run(twin, wide, gradients=gradients, seed=seed)


def double_rounding(module: nn.Module, inputs: Sequence[Tensor], exact: Result, *,
                    gradients: bool) -> dict[str, float] | None:
    """How far a float64 program may be off by its own rounding; None for any other dtype.

    No wider run exists to measure it against, so it is the error of a float32 run, scaled.
    """
    if not any(x.dtype is torch.float64 for x in inputs):
        return None
    narrow = [x.float() if x.is_floating_point() else x for x in inputs]
    found = run(copy.deepcopy(module).float(), narrow, gradients=gradients)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return {
        name: (found[name] - x).abs().nan_to_num(0.0, 0.0, 0.0).max().item() * ratio
        for name, x in exact.items() if x.is_floating_point() and x.numel() and name in found
    }


def differences(new: Result, original: Result, exact: Result,
                rounding: dict[str, float] | None = None) -> list[str]:
    """What is outside the acceptance rule, one line each; an empty list when all is right.

    `rounding` is a floor for the error of the original, for float64 programs.
    """
    if new.keys() != original.keys():
        return [f"results must be {sorted(original)}, got {sorted(new)}"]
    floor = rounding or {}
    largest = max((_peak(x) for n, x in exact.items() if n.startswith("gradient")), default=0.0)
    found = (
        _difference(n, new[n], original[n], exact[n], floor.get(n, 0.0),
                    largest if n.startswith("gradient") else _peak(exact[n]))
        for n in original
    )
    return [line for line in found if line]


def _peak(exact: Tensor) -> float:
    finite = exact[exact.isfinite()] if exact.is_floating_point() else exact[:0]
    return finite.abs().max().item() if finite.numel() else 0.0


def _difference(name: str, new: Tensor, original: Tensor, exact: Tensor, floor: float,
                peak: float) -> str | None:
    if new.shape != original.shape or new.dtype != original.dtype:
        return (f"{name} must be {original.dtype} {list(original.shape)}, "
                f"got {new.dtype} {list(new.shape)}")
    if not original.is_floating_point():
        return None if torch.equal(new, original) else f"{name} must be equal, is not"
    eps = torch.finfo(original.dtype).eps
    new, original = new.double(), original.double()
    exact = torch.where(exact.isfinite() | ~original.isfinite(), exact, original)
    same = (new == original) | (new.isnan() & original.isnan())
    plain = original.isfinite() & exact.isfinite()
    err_original = (original - exact)[plain].abs().max().item() if plain.any() else 0.0
    err_original = max(err_original, floor)
    factor = 64 if name.startswith("gradient") and eps < 1e-6 else 8
    allowed = max(2 * err_original, factor * eps * peak)
    overflowed = torch.where(original.isfinite(), allowed, max(allowed, eps**0.5 * peak))
    wrong = ~same & ~((new - exact).abs() <= overflowed)
    if not wrong.any():
        return None
    error = (new - exact)[plain].abs().max().item() if plain.any() else float("nan")
    return (f"{name}: {int(wrong.sum())} of {wrong.numel()} outside, error {error:.3g}, "
            f"allowed {allowed:.3g} (original {err_original:.3g}, max {peak:.3g}, "
            f"NaN {int(new.isnan().sum())} against {int(original.isnan().sum())})")


def agree(first: Result, second: Result, tolerance: float = 1e-9) -> bool:
    """Two float64 runs are the same program."""
    return first.keys() == second.keys() and all(
        torch.allclose(first[n].double(), second[n].double(), rtol=tolerance, atol=tolerance,
                       equal_nan=True)
        for n in first
    )


def sites(opt: Any, kind: str = "attention") -> list[Any]:
    return [site for site in opt.report.sites if site.kind == kind]


def taken(opt: Any, kind: str = "attention") -> list[Any]:
    return [site for site in sites(opt, kind) if site.status in ("rewritten", "canonical")]


def describe(opt: Any) -> str:
    """The sites of a report in a few words, for the message of a failed assertion."""
    found = [f"{s.kind} {s.status} {s.rule or ''} {s.reason or ''}".strip()
             for s in opt.report.sites]
    return "; ".join([*(found or ["no sites"]), *opt.report.notes])
