"""Guards see every way in which a tensor's values can be changed."""

from __future__ import annotations

import pytest
import torch

from attnopt.errors import AttnOptError
from attnopt.ir.captured import Captured, Origin
from attnopt.passes.capture.guards import ValueGuard, same_content


def guard_of(tensor, kind="buffer"):
    captured = Captured(torch.fx.symbolic_trace(torch.nn.Identity()),
                        {"b": Origin(kind, "table")}, {"b": tensor})
    return ValueGuard.of(captured, "b")


def _fused_step(t):
    t.requires_grad_()
    t.grad = torch.ones_like(t)
    torch.optim.AdamW([t], 0.1, fused=True).step()


EDITS = {
    "in place": lambda t: t.mul_(2),
    "data": lambda t: t.data.mul_(2),
    "new data": lambda t: setattr(t, "data", t.data * 2),
    "numpy": lambda t: t.numpy().__imul__(2),
    "one element": lambda t: t.view(-1)[-1:].add_(1),
    "swapped": lambda t: t.copy_(t.flip(0)),
    "view": lambda t: t[0].fill_(9),
    "copy": lambda t: t.copy_(torch.full_like(t, 7.0)),
    "inference mode": lambda t: _inference(t),
    "fused optimiser": _fused_step,
    "dtype": lambda t: setattr(t, "data", t.data.double()),
    "shape": lambda t: t.resize_(2),
}


def _inference(tensor):
    with torch.inference_mode():
        tensor.mul_(2)


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_every_edit_is_seen(edit):
    table = torch.arange(12.0).reshape(3, 4)
    guard = guard_of(table)
    assert guard.holds(table) and guard.holds(table.clone())
    edit(table)
    assert not guard.holds(table)


def test_bits_are_compared():
    nan = torch.tensor([float("nan"), 0.0])
    guard = guard_of(nan)
    assert guard.holds(nan.clone()) and not guard.holds(torch.tensor([float("nan"), -0.0]))
    assert guard_of(torch.ones(0)).holds(torch.ones(0))
    assert guard_of(torch.tensor(3)).holds(torch.tensor(3))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.bfloat16,
                                   torch.float64, torch.complex64])
def test_other_dtypes_and_layouts(dtype):
    table = torch.arange(12).reshape(3, 4).to(dtype)
    guard = guard_of(table)
    strided = table.t().contiguous().t()
    assert not strided.is_contiguous() and guard.holds(strided)
    strided[1, 1] = 0
    assert not guard.holds(strided)


def test_inference_tensors_have_no_version_and_are_guarded():
    with torch.inference_mode():
        table = torch.ones(3)
    guard = guard_of(table)
    assert guard.holds(table)
    with torch.inference_mode():
        table[0] = 2
    assert not guard.holds(table)


def test_equal_values_are_kept_once():
    a, b = guard_of(torch.ones(64, 64)), guard_of(torch.ones(64, 64))
    assert a.snapshot is b.snapshot
    c = guard_of(torch.ones(64, 64).flip(0).mul(2))
    assert c.snapshot is not a.snapshot
    assert same_content(torch.ones(64, 64), a.snapshot)


@pytest.mark.parametrize("kind", ["parameter", "input"])
def test_parameters_and_inputs_have_no_guards(kind):
    with pytest.raises(AttnOptError, match="must be of a buffer or constant"):
        guard_of(torch.ones(3), kind)
