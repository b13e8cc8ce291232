"""Learned biases train in generated kernels: tables, terms per axis, gates, and what makes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt.ir.spec import Spec
from attnopt.kernels.cpp.call_backward import Backward
from tests.passes.test_bias_tables import H, Program, dense, drawn
from tests.spellings import bias_spellings as spell

pytestmark = pytest.mark.usefixtures("by_aten", "compiled")
#: spelling, grid, tokens, batch
FORMS: list[tuple[spell.Spelling, tuple[int, ...], int, int]] = [
    *((f, (6, 6), 36, 1) for f in (*spell.BY_DISTANCE, *spell.ON_A_GRID)),
    (spell.swin, (4, 3, 3), 36, 2), (spell.swin_shifted, (6, 6), 36, 4),
    (spell.beit, (6, 6), 37, 1),
    *((f, (4, 32), 128, 1) for f in spell.BY_AXIS), (spell.sam, (9, 10), 90, 1)]


def kernels_in(out: Tensor) -> bool:
    """Was the output made by a generated kernel that has a backward kernel?"""
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [parent for parent, _ in node.next_functions]
    return any(type(node).__name__ == "_AttendBackward" for node in seen)


def step(run: Any, module: torch.nn.Module, inputs: Sequence[Tensor], ahead: Tensor
         ) -> tuple[Tensor, dict[str, Tensor]]:
    """Output, and the gradients of inputs and parameters."""
    module.zero_grad()
    given = [t.detach().clone().requires_grad_() for t in inputs]
    out = run(*given)
    out.backward(ahead.to(out.dtype))
    found = {f"input {i}": t.grad for i, t in enumerate(given)}
    found |= {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return out, {name: g for name, g in found.items() if g is not None}


def agree(opt: Any, module: Program, inputs: Sequence[Tensor]) -> None:
    """Gradients are as near to those of float64 as the module's own."""
    ahead = torch.randn(inputs[0].shape)
    out, found = step(opt, module, inputs, ahead)
    assert kernels_in(out)
    _, own = step(module, module, inputs, ahead)
    _, exact = step(module.double(), module, [t.double() for t in inputs], ahead)
    module.float()
    assert found.keys() == own.keys() == exact.keys()
    for name, right in exact.items():
        error, other = ((g - right).abs().max() for g in (found[name], own[name]))
        most = 64 * torch.finfo(torch.float32).eps * right.abs().max()
        assert error <= max(4 * other, most), f"{name}: {error} for {other}, {most}"


def trained(function: spell.Spelling, grid: tuple[int, ...], inputs: list[Tensor],
            **options: Any) -> tuple[Program, Any]:
    """Optimised with verification, which compares gradients too."""
    module = Program(function, grid).train()
    opt = attnopt.optimize(module, tuple(inputs), **options)
    (site,) = opt.report.sites
    assert (site.status, site.lowering[:3]) == ("rewritten", "cpp"), (site.reason, site.tried)
    assert not dense(Spec.parse(site.spec))
    return module, opt


@pytest.mark.parametrize("function, grid, tokens, batch", [
    form if form[0] is spell.t5 else pytest.param(*form, marks=pytest.mark.slow)
    for form in FORMS], ids=lambda x: getattr(x, "__name__", str(x)))
def test_a_form_trains(function: spell.Spelling, grid: tuple[int, ...], tokens: int,
                       batch: int) -> None:
    inputs = drawn(tokens, batch)
    module, opt = trained(function, grid, inputs)
    agree(opt, module, inputs)
    assert sum(v for k, v in opt.report.calls.items() if k != "hits") == 0, opt.report.calls


def test_in_eval_mode_gradients_come_from_the_kernel_too() -> None:
    module, inputs = Program(spell.t5, (6, 6)).eval(), drawn(36, 1)
    agree(attnopt.optimize(module, tuple(inputs), verify=False), module, inputs)


@pytest.mark.slow
def test_nothing_of_queries_times_keys_is_held() -> None:
    n = 256
    inputs = drawn(n, 1)
    module, opt = trained(spell.t5, (6, 6), inputs, verify=False)
    ahead = torch.randn(inputs[0].shape)
    step(opt, module, inputs, ahead)
    with torch.profiler.profile(profile_memory=True) as profile:
        out, _ = step(opt, module, inputs, ahead)
    assert kernels_in(out)
    assert max(e.self_cpu_memory_usage for e in profile.events()) < 4 * H * n * n // 4


@pytest.mark.slow
def test_other_lengths() -> None:
    moving = ({2: torch.export.Dim.AUTO},) * 3
    module, opt = trained(spell.t5, (6, 6), drawn(36), dynamic_shapes=(moving,))
    agree(opt, module, drawn(36))
    agree(opt, module, drawn(53))
    assert sum(v for k, v in opt.report.calls.items() if k != "hits") == 0, opt.report.calls


@pytest.mark.slow
def test_a_table_that_is_frozen_costs_no_gradient() -> None:
    module, inputs = Program(spell.t5, (6, 6)), drawn(36, 1)
    module.requires_grad_(False)
    opt = attnopt.optimize(module.train(), tuple(inputs))
    out, found = step(opt, module, inputs, torch.ones(inputs[0].shape))
    assert kernels_in(out) and set(found) == {"input 0", "input 1", "input 2"}


def test_verification_sees_a_wrong_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Backward.__call__

    def wrong(self: Backward, *args: Any, **options: Any) -> list[Tensor | None]:
        *found, table = right(self, *args, **options)
        return [*found, None if table is None else table * 1.01]
    monkeypatch.setattr(Backward, "__call__", wrong)
    opt = attnopt.optimize(Program(spell.t5, (6, 6)).train(), tuple(drawn(36, 1)))
    (site,) = opt.report.sites
    assert site.status == "kept" and "gradient of" in site.reason, site.reason
