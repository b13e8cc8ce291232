"""The call-time contract: each kind of call is right, by a variant or by the user's own forward."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import attnopt
from tests.attnopt.small_models import Attention, hits, pair, same

pytestmark = pytest.mark.usefixtures("as_captured")
X = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8)
MASK = torch.ones(5, 5, dtype=torch.bool).tril()


def both(opt, original, *args, **kwargs):
    """One call of each, compared to the last bit."""
    a, b = opt(*args, **kwargs), original(*args, **kwargs)
    same(a, b, 0.0)
    return a


@pytest.mark.parametrize("name, args, kwargs, reason", [
    ("the captured call", (X,), {"gain": 2.0}, None),
    ("another value of the same size", (X.flip(0),), {"gain": 2.0}, None),
    ("by keyword", (), {"gain": 2.0, "x": X}, None),
    ("a default given", (X, None), {"gain": 2.0}, None),
    ("another batch", (X[:1],), {"gain": 2.0}, "another size of x"),
    ("another length", (X[:, :3],), {"gain": 2.0}, "another size of x"),
    ("an empty batch", (X[:0],), {"gain": 2.0}, "another size of x"),
    ("another Python value", (X,), {"gain": 3.0}, "another value of gain"),
    ("another Python type", (X,), {"gain": 2}, "another value of gain"),
    ("a value left out", (X,), {}, "other arguments"),
    ("one more argument", (X, MASK), {"gain": 2.0}, "other arguments"),
    ("not contiguous", (X.transpose(0, 1).contiguous().transpose(0, 1),), {"gain": 2.0},
     "another memory layout of x"),
    ("a parameter", (nn.Parameter(X.clone()),), {"gain": 2.0}, None),
    ("an input with gradient", (X.clone().requires_grad_(),), {"gain": 2.0}, None),
])
def test_arguments(name, args, kwargs, reason):
    opt, original = pair(Attention().eval(), X, gain=2.0)
    both(opt, original, *args, **kwargs)
    assert opt.report.calls == ({"hits": 1} if reason is None else {reason: 1}), name
    both(opt, original, *args, **kwargs)
    assert hits(opt) == (2 if reason is None else 1), "a kind of call that comes back is captured"


def test_model_errors_come_through_unchanged():
    opt, original = pair(Attention().eval(), X)
    for bad in ((), (X, None, 3), (X[..., :3],), ("x",)):
        with pytest.raises(Exception) as ours:
            opt(*bad)
        with pytest.raises(type(ours.value)) as theirs:
            original(*bad)
        assert str(ours.value) == str(theirs.value)


def test_other_dtypes_and_back():
    opt, original = pair(Attention().eval(), X)
    for module in (opt, original):
        module.double()
    both(opt, original, X.double())
    assert hits(opt) == 0
    for module in (opt, original):
        module.float()
    both(opt, original, X)
    assert hits(opt) == 1, "the variant fits again"


def test_meta_device():
    opt, original = pair(Attention().eval(), X)
    for module in (opt, original):
        module.to("meta")
        module.factor = module.factor.to("meta")
    out = opt(X.to("meta"))
    assert out.device.type == "meta" and out.shape == X.shape and hits(opt) == 0


def test_training_flags():
    opt, original = pair(Attention().eval(), X)
    for mode in (True, False, True):
        for module in (opt, original):
            module.train(mode)
        both(opt, original, X)
    assert opt.report.calls["another training flag"] == 1 and hits(opt) == 2
    for module in (opt, original):
        module.train()
        module.norm.eval()  # one flag of many
    both(opt, original, X)
    assert opt.report.calls["another training flag"] == 2
    same(opt.state_dict(), original.state_dict(), 0.0)


def test_autocast_outside_and_inside():
    opt, original = pair(Attention().eval(), X)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            out = both(opt, original, X)
    assert hits(opt) == 1 and opt.report.calls["another autocast state"] == 1
    both(opt, original, X)
    assert hits(opt) == 2 and out.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.float16):
        both(opt, original, X)
    assert hits(opt) == 2


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_gradient_modes_share_a_variant(mode):
    opt, original = pair(Attention().eval(), X)
    with mode():
        before = torch.is_grad_enabled()
        out = both(opt, original, X)
        assert torch.is_grad_enabled() is before
    assert hits(opt) == 1 and out.requires_grad is before


def test_dynamic_sizes_and_their_range():
    model = Attention().eval()
    original = copy.deepcopy(model)
    dynamic = torch.export.Dim.DYNAMIC
    opt = attnopt.optimize(model, (X,), dynamic_shapes={"x": {0: dynamic, 1: dynamic}})
    for batch, length in ((2, 5), (3, 7), (4, 2)):
        both(opt, original, torch.randn(batch, length, 8))
    assert hits(opt) == 3
    both(opt, original, torch.randn(1, 5, 8))
    assert opt.report.calls["sizes outside the captured range"] == 1


def test_conditions_that_the_author_branched_on():
    class Branch(nn.Module):
        def forward(self, x, y):
            if x.shape[0] > 4:
                return (x @ y.T).softmax(-1) @ y
            return x[:, : y.shape[1]] * 2

    opt = attnopt.optimize(
        Branch(), (torch.randn(6, 3), torch.randn(5, 3)),
        dynamic_shapes=({0: torch.export.Dim.AUTO}, {0: torch.export.Dim.AUTO}))
    for rows in (6, 9, 3):
        both(opt, Branch(), torch.randn(rows, 3), torch.randn(7, 3))
    assert hits(opt) == 2


@pytest.mark.parametrize("edit, fits", [
    (lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}), True),
    (lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}, assign=True), True),
    (lambda m: m.qkv.weight.data.mul_(2), True),
    (lambda m: setattr(m.qkv.weight, "data", m.qkv.weight.data * 2), True),
    (lambda m: m.qkv.weight.detach().numpy().__imul__(2), True),
    (lambda m: nn.utils.vector_to_parameters(
        nn.utils.parameters_to_vector(m.parameters()).detach() * 2, m.parameters()), True),
    (lambda m: m.shift.mul_(2), True),
    (lambda m: m.factor.mul_(2), True),
    (lambda m: setattr(m, "shift", m.shift * 2), True),
    (lambda m: setattr(m, "factor", m.factor * 2), False),
    (lambda m: setattr(m, "scale", 0.1), False),
    (lambda m: setattr(m.norm, "eps", 0.1), False),
    (lambda m: setattr(m.qkv, "bias", None), False),
    (lambda m: setattr(m, "out", nn.Linear(8, 8, bias=False)), False),
    (lambda m: setattr(m, "drop", nn.Identity()), False),
    (lambda m: m.requires_grad_(False), True),
], ids=["load", "assign", "data in place", "data", "numpy", "vector", "buffer", "constant",
        "new buffer", "new constant", "attribute", "inner attribute", "no bias", "new module",
        "module gone", "frozen"])
def test_edits_of_the_model(edit, fits):
    torch.manual_seed(1)
    opt, original = pair(Attention().eval(), X)
    both(opt, original, X)
    for module in (opt, original):
        torch.manual_seed(2)
        edit(module)
    out = both(opt, original, X)
    assert hits(opt) == (2 if fits else 1)
    assert out.requires_grad or not any(p.requires_grad for p in opt.parameters())


def test_tied_parameters_that_are_untied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).softmax(-1))

    opt, original = pair(Tied(), X)
    both(opt, original, X)
    torch.manual_seed(2)
    weight = torch.randn(8, 8)
    for module in (opt, original):
        module.b.weight = nn.Parameter(weight.clone())
    both(opt, original, X)
    assert opt.report.calls["tied tensors are no longer one"] == 1


def test_arguments_that_are_one_object():
    class Sum(nn.Module):
        def forward(self, a, b):
            return a.softmax(-1) + 2 * b

    opt = attnopt.optimize(Sum(), (X, X))
    both(opt, Sum(), X, X.clone())
    assert hits(opt) == 0
    both(opt, Sum(), X, X)
    other = X.clone()
    both(opt, Sum(), other, other)
    assert hits(opt) == 2
    opt = attnopt.optimize(Sum(), (X, X.clone()))
    both(opt, Sum(), X, X)
    assert hits(opt) == 0


def test_an_argument_that_is_a_parameter_of_the_model():
    model = nn.Bilinear(8, 8, 8)

    class Uses(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 8))

        def forward(self, x):
            return (x @ self.table.T).softmax(-1) @ self.table

    del model
    opt, original = pair(Uses(), X)
    opt = attnopt.optimize(copy.deepcopy(original), (X[0],))
    same(opt(opt.table), original(original.table), 0.0)
    both(opt, original, X[0])


def test_in_place_and_aliasing_are_the_authors():
    class Writes(nn.Module):
        def forward(self, x, y):
            y.add_(x.softmax(-1))
            return x, y[0], y.view(-1)

    opt = attnopt.optimize(Writes(), (X, X.clone()))
    y = torch.zeros_like(X)
    a, b, c = opt(X, y)
    assert a is X and b._base is y and c._base is y and hits(opt) == 1
    same(y, X.softmax(-1), 0.0)


def test_no_variant_inside_transforms_and_modes():
    opt, original = pair(Attention().eval(), X)
    expected = original(X)
    with torch.utils.flop_counter.FlopCounterMode(display=False):
        same(opt(X), expected, 0.0)
    same(torch.func.vmap(opt, randomness="same")(X[None]), expected[None])
    with torch.device("meta"):
        opt(X)
    assert hits(opt) == 0
    with torch.device("cpu"):
        opt(X)
    assert hits(opt) == 1


def test_global_hooks_see_the_inner_modules():
    opt, original = pair(Attention().eval(), X)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        both(opt, original, X)
    finally:
        handle.remove()
    assert seen.count(nn.Linear) == 4 and hits(opt) == 0


def test_at_most_eight_variants():
    opt, original = pair(Attention().eval(), X)
    for length in range(1, 12):
        for _ in range(3):
            both(opt, original, torch.randn(1, length, 8))
    assert len(opt.graph_modules) == 8
    assert "more than 8 kinds of calls" in opt.report.calls


def test_prepare_captures_without_running():
    opt, original = pair(Attention().eval(), X)
    opt.train()
    before = copy.deepcopy(opt.state_dict())
    assert opt.prepare(X) is opt
    same(opt.state_dict(), before, 0.0)
    original.train()
    both(opt, original, X)
    assert hits(opt) == 1


def test_threads():
    opt, original = pair(Attention().eval(), X)
    inputs = [torch.randn(2, length, 8) for length in (5, 6, 7)]
    expected = [original(x) for x in inputs]
    errors = []

    def work():
        try:
            for _ in range(4):
                for x, y in zip(inputs, expected, strict=True):
                    same(opt(x), y, 0.0)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_disabled_by_the_environment(monkeypatch):
    monkeypatch.setenv("ATTNOPT_DISABLE", "1")
    opt, original = pair(Attention().eval(), X)
    both(opt, original, X)
    assert not opt.graph_modules and not opt.report.calls
    assert isinstance(opt, attnopt.OptimizedModule)
