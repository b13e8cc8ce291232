"""Capture: one graph of the author's program, with origins, and nothing of the user's changed."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from attnopt.errors import CaptureError
from attnopt.passes.capture.export import capture
from attnopt.passes.capture.regions import REGION

X = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.bn = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("table", torch.ones(8))
        self.register_buffer("gone", torch.ones(8), persistent=False)
        self.plain = torch.arange(8.0)
        self.listed = [torch.ones(8)]

    def forward(self, x, n=2):
        y = self.drop(self.bn(self.a(x) * self.table + self.gone + self.plain + self.listed[0]))
        x.add_(1)
        self.table.mul_(2)
        return y.to(torch.float64).float() * n + torch.tensor([0.5])


def run(traced):
    return traced.captured.graph_module(*traced.captured.arguments())


def test_origins_and_values():
    model = Model()
    captured = capture(model, (X.clone(), 3)).captured
    found = {o.path: (o.kind, o.held) for o in captured.origins.values()}
    assert found["a.weight"] == ("parameter", True) and found["table"] == ("buffer", True)
    assert found["gone"] == ("buffer", True) and found["plain"] == ("constant", True)
    assert found["x"] == ("input", False) and found["n"] == ("input", False)
    literals = [name for name, o in captured.origins.items() if o.kind == "constant" and not o.held]
    assert [captured.values[n].tolist() for n in literals] == [[1.0] * 8, [0.5]]
    assert captured.value("p_a_weight") is model.a.weight
    assert [n.name for n in captured.placeholders] == list(captured.origins)
    assert "aten._assert_tensor_metadata" not in captured.graph_module.code
    assert all(REGION in n.meta for n in captured.graph.nodes)
    assert "Model" in str(captured) and captured.front_end == "export"


def test_nothing_is_changed_by_a_capture():
    model, x = Model(), X.clone()
    before = copy.deepcopy(model.state_dict())
    attributes = dict(model.__dict__)
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    with torch.no_grad():
        capture(model, (x,))
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
    assert torch.equal(x, X) and model.__dict__ == attributes and not model.table.requires_grad
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert torch.backends.mha.get_fastpath_enabled()
    assert type(next(model.parameters())) is nn.Parameter


def test_the_graph_is_the_authors_call():
    model = Model()
    original, x, y = copy.deepcopy(model), X.clone(), X.clone()
    traced = capture(model, (x,))
    torch.manual_seed(0)
    (ours,) = run(traced)
    torch.manual_seed(0)
    theirs = original(y)
    assert torch.equal(ours, theirs) and torch.equal(x, y)
    assert torch.equal(model.table, original.table)
    assert torch.equal(model.bn.running_mean, original.bn.running_mean)
    assert model.bn.num_batches_tracked == 1


def test_arguments_can_be_copied():
    model, x = Model(), X.clone()
    captured = capture(model, (x,)).captured
    captured.graph_module(*captured.arguments(clone=True))
    assert torch.equal(x, X) and torch.equal(model.table, torch.ones(8))
    assert model.bn.num_batches_tracked == 0


def test_regions_are_flat_and_tagged():
    class Regions(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                y = x * 2
                with torch.autocast("cpu", torch.bfloat16):
                    z = y @ y.mT
                y = y + z.float().sum()
            return x + y

    traced = capture(Regions(), (X,))
    graph = traced.captured.graph
    region = [(str(n.target), n.meta[REGION]) for n in graph.nodes if "aten" in str(n.target)]
    first, *_, inner, last = region
    assert first[0] == "aten.mul.Tensor" and last == ("aten.add.Tensor", ())
    assert first[1] == inner[1] != ()
    assert not list(traced.captured.graph_module.children())
    x = X.clone().requires_grad_()
    ours = traced.captured.graph_module(x)[0]
    theirs = Regions()(x)
    assert torch.equal(ours, theirs)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (ours, theirs)]
    assert torch.equal(*grads)
    with torch.no_grad():
        traced.captured.graph_module(x)
        assert not torch.is_grad_enabled()


def test_dynamic_sizes():
    class Sizes(nn.Module):
        def forward(self, x, y):
            return x + y[: x.shape[0]] if x.shape[0] < 9 else x

    auto = torch.export.Dim.AUTO
    traced = capture(Sizes(), (torch.ones(4, 3), torch.ones(6, 3)), {}, ({0: auto}, {0: auto}))
    assert [str(r) for r in traced.captured.symbols.values()] == ["2..8", "2.."]
    for rows, others, fits in ((4, 6, True), (8, 20, True), (9, 20, False), (1, 6, False),
                               (6, 4, False)):
        assert traced.sizes.fits([torch.ones(rows, 3), torch.ones(others, 3)]) is fits


def _span(x):
    span = torch.tensor(min(x.shape[1], 16))
    steps = torch.arange(x.shape[1])
    return (steps[:, None] - steps + span).clamp(0, 2 * span - 1) + x.sum()


def _written(x):
    length = torch.tensor(x.shape[1])
    length.view(1).add_(1)
    return torch.zeros(length.item()) + x.sum()


def _list(x):
    return torch.zeros((torch.tensor(x.shape).mul(2) - 2)[1].item()) + x.sum()


def _bounded(x):
    return torch.zeros(torch.full((), x.shape[1]).clamp(min=2, max=8).item()) + x.sum()


def _narrow(x):  # wraps around
    length = torch.tensor(x.shape[1], dtype=torch.int32).item()
    torch._check(length >= 0)
    return torch.zeros(length) + x.sum()


def _data(x):
    count = (x[0] > 0).sum().item()
    torch._check(count >= 0)
    return torch.zeros(count) + x.sum()


def _either(x):  # up to 16 its length is that of x, beyond it is not
    return x[:, : torch.tensor(min(x.shape[1], 16)) + 1]


@pytest.mark.parametrize("function", [_span, _written, _list, _bounded, _narrow, _data, _either])
def test_numbers_read_from_tensors_of_sizes(function):
    """They are arithmetic on sizes in the graph; others stay what they are, and no length is
    excluded."""
    class Reads(nn.Module):
        def forward(self, x):
            return function(x)

    traced = capture(Reads(), (torch.randn(2, 12),), {}, ({1: torch.export.Dim.AUTO},))
    module = traced.captured.graph_module
    left = [n for n in module.graph.nodes if n.target is torch.ops.aten.item.default]
    assert bool(left) is (function in (_narrow, _data, _either))
    literals = list(traced.captured.values.values())[:-1]
    for n in (12, 5, 40, 3):
        x = torch.randn(2, n)
        assert traced.sizes.fits([x])
        torch.testing.assert_close(module(*literals, x)[0], function(x))


class AssignsNumber(nn.Module):
    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, x):
        self.n += 1
        return x


class AssignsBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("b", torch.zeros(8))

    def forward(self, x):
        self.inner.b = self.inner.b + 1
        return x + self.inner.b


class AssignsNew(nn.Module):
    def forward(self, x):
        self.last = x
        return x


class AppendsToList(nn.Module):
    def __init__(self):
        super().__init__()
        self.log = []

    def forward(self, x):
        self.log.append(x)
        return x


class ChangesObject(nn.Module):
    class Config:
        used = 0

    def __init__(self):
        super().__init__()
        self.config = self.Config()

    def forward(self, x):
        self.config.used = 1
        return x


class AddsModule(nn.Module):
    def forward(self, x):
        if not hasattr(self, "a"):
            self.a = nn.Identity()
        return self.a(x)


class DrawsFromPython(nn.Module):
    def forward(self, x):
        return x * random.random()


class DrawsFromNumpy(nn.Module):
    def forward(self, x):
        return x * float(np.random.rand())


class ChangesDictionary(nn.Module):
    def forward(self, x):
        x["y"] = x["x"] * 2
        return x


class ReachesParameter(nn.Module):
    class Holder:
        def __init__(self, weight):
            self.weight = weight

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(8))
        self.holder = self.Holder(self.w)

    def forward(self, x):
        return x * self.holder.weight


class BranchesOnValue(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize("model, argument, words, transient", [
    (AssignsNumber(), X, "assigns self.n", True),
    (AssignsBuffer(), X, "assigns the buffer inner.b", False),
    (AssignsNew(), X, "assigns self.last", True),
    (AppendsToList(), X, "assigns self.", True),
    (ChangesObject(), X, "used", True),
    (AddsModule(), X, "changes the model's modules", True),
    (DrawsFromPython(), X, "Python's random", False),
    (DrawsFromNumpy(), X, "numpy.random", False),
    (ChangesDictionary(), {"x": X}, "changes a container", False),
    (ReachesParameter(), X, "reaches the tensor w", False),
    (BranchesOnValue(), X, "data-dependent", False),
    (nn.Identity(), object(), "an input is a object", False),
    (nn.Identity(), X.to_sparse(), "not dense", False),
], ids=lambda v: type(v).__name__ if isinstance(v, nn.Module) else "")
def test_what_cannot_be_captured_is_refused_and_undone(model, argument, words, transient):
    state = {k: v for k, v in model.__dict__.items() if not k.startswith("_")}
    states = (torch.get_rng_state(), random.getstate())
    with pytest.raises(CaptureError, match=words) as error:
        capture(model, (argument,))
    assert error.value.transient is transient
    assert {k: v for k, v in model.__dict__.items() if not k.startswith("_")} == state
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    if hasattr(model, "log"):
        assert model.log == []
    if hasattr(model, "config"):
        assert model.config.used == 0
    if isinstance(model, AssignsBuffer):
        assert type(model.inner.b) is torch.Tensor and not model.inner.b.any()


def test_numbers_read_from_constants_are_guarded():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.tensor(2.0)

        def forward(self, x):
            return x * float(self.factor)

    model = Reads()
    (guard,) = capture(model, (X,)).guards
    assert guard.path == "factor" and guard.holds(model.factor)
    model.factor.data.fill_(3.0)
    assert not guard.holds(model.factor)


def test_lstm_and_weight_norm_under_their_own_state():
    capture(nn.LSTM(8, 8, batch_first=True), (X,))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    traced = capture(normed, (X,))
    torch.testing.assert_close(run(traced)[0], normed(X))


@pytest.mark.parametrize("trained", [False, True])
def test_multi_head_attention_keeps_its_operations(trained):
    module = nn.MultiheadAttention(8, 2, batch_first=True).train(trained)
    traced = capture(module, (X, X, X))
    targets = {str(n.target) for n in traced.captured.graph.nodes}
    assert "aten.softmax.int" in targets
    torch.testing.assert_close(run(traced)[0], module(X, X, X)[0])
