"""Training through an optimised module gives what training the original gives."""

from __future__ import annotations

import copy
import os

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnopt
from tests.attnopt.small_models import Attention, hits, pair, same

X = torch.linspace(-2, 2, 4 * 5 * 8).reshape(4, 5, 8)


def gradients(module, loss):
    module.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("fused", [False, True], ids=["default", "fused"])
@pytest.mark.usefixtures("as_captured")
def test_three_steps_of_adamw(fused):
    opt, original = pair(Attention(dropout=0.5).train(), X)
    for module in (opt, original):
        optimiser = torch.optim.AdamW(module.parameters(), 1e-2, fused=fused)
        for step in range(3):
            torch.manual_seed(step)  # dropout draws the same stream
            optimiser.zero_grad()
            module(X).square().mean().backward()
            optimiser.step()
    assert hits(opt) == 3
    same(opt.state_dict(), original.state_dict(), 0.0)
    assert opt.norm.num_batches_tracked == 3 and opt.calls == 3


def test_three_steps_with_the_real_passes():
    opt, original = pair(Attention().train(), X)
    for module in (opt, original):
        optimiser = torch.optim.SGD(module.parameters(), 1e-2)
        for _ in range(3):
            optimiser.zero_grad()
            module(X).square().mean().backward()
            optimiser.step()
    same(opt.state_dict(), original.state_dict(), 1e-4)


def test_no_grad_regions_cut_the_gradient():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            with torch.no_grad():
                w = self.a(x).softmax(-1)
                with torch.enable_grad():
                    u = self.a(w)
            return self.a(x) * w + u

    opt, original = pair(Cut(), X)
    same(gradients(opt, opt(X).sum()), gradients(original, original(X).sum()))
    with torch.no_grad():
        same(opt(X), original(X))
        assert not torch.is_grad_enabled()


@pytest.mark.usefixtures("as_captured")
def test_double_backward():
    opt, original = pair(Attention().eval(), X)
    found = []
    for module in (opt, original):
        x = X.clone().requires_grad_()
        (first,) = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        found.append((first, second))
    assert hits(opt) == 1
    same(*found, 1e-4)


@pytest.mark.usefixtures("as_captured")
def test_torch_func():
    model = Attention().eval()
    model.norm = nn.Identity()
    opt, original = pair(model, X)
    parameters = {k: v.detach() * 0.5 for k, v in opt.named_parameters()}
    buffers = dict(opt.named_buffers())

    def loss(module):
        return lambda p, x: torch.func.functional_call(
            module, (p, {k: b.clone() for k, b in buffers.items()}), (x,)).square().sum()

    same(loss(opt)(parameters, X), loss(original)(parameters, X))
    assert hits(opt) == 1, "functional_call takes the variant"
    same(torch.func.grad(loss(opt))(parameters, X), torch.func.grad(loss(original))(parameters, X))
    per_sample = [torch.func.vmap(torch.func.grad(loss(m)), (None, 0), randomness="same")(
        parameters, X[:, None]) for m in (opt, original)]
    same(*per_sample)
    assert len(opt.graph_modules) == 1, "nothing is captured inside"


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.usefixtures("as_captured")
def test_checkpoint_around_the_module(reentrant):
    opt, original = pair(Attention(dropout=0.5).eval(), X)
    for module in (opt, original):
        module.train()
    for step in range(4):
        found = []
        for module in (opt, original):
            torch.manual_seed(step)
            x = X.clone().requires_grad_()
            # two in flight: the second forward comes before the first is run again
            y = checkpoint(module, x, use_reentrant=reentrant)
            z = checkpoint(module, x * 2, use_reentrant=reentrant)
            found.append((gradients(module, (y * z).sum()), x.grad))
        same(*found, 0.0)
    opt.prepare(X)
    x = X.clone().requires_grad_()
    checkpoint(opt, x, use_reentrant=False).sum().backward()
    assert hits(opt) >= 2


@pytest.mark.usefixtures("as_captured")
def test_checkpoint_inside_the_module_keeps_its_memory():
    class Inner(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = Attention()

        def forward(self, x):
            return checkpoint(self.attention, x, use_reentrant=False)

    opt, original = pair(Inner().eval(), X)
    same(gradients(opt, opt(X).sum()), gradients(original, original(X).sum()), 0.0)
    assert opt.report.calls == {"gradients on, with activation checkpointing": 1}
    with torch.no_grad():
        same(opt(X), original(X), 0.0)
    assert hits(opt) == 1


@pytest.mark.usefixtures("as_captured")
def test_custom_backward_is_kept():
    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.round()

        @staticmethod
        def backward(ctx, g):
            return 2 * g

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x).softmax(-1)
            return Twice.apply(y) * x

    opt, original = pair(Model(), X)
    for _ in range(3):
        same(gradients(opt, opt(X).sum()), gradients(original, original(X).sum()), 0.0)
    assert hits(opt) == 0
    with torch.no_grad():
        same(opt(X), original(X), 0.0)
    assert hits(opt) == 1


@pytest.mark.usefixtures("as_captured")
def test_hooks_on_tensors_are_kept():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x).softmax(-1)
            y.register_hook(lambda g: g * 3)
            return y * x

    opt, original = pair(Model(), X)
    for _ in range(3):
        same(gradients(opt, opt(X).sum()), gradients(original, original(X).sum()), 0.0)
    assert hits(opt) == 0


@pytest.mark.usefixtures("as_captured")
def test_branches_on_the_gradient_mode():
    class Model(nn.Module):
        def forward(self, x):
            return x.softmax(-1) if torch.is_grad_enabled() else x

    opt = attnopt.optimize(Model(), (X,))
    for _ in range(3):
        same(opt(X), X.softmax(-1), 0.0)
        with torch.no_grad():
            same(opt(X), X, 0.0)
    assert hits(opt) == 5, "a variant for each mode"


@pytest.mark.usefixtures("as_captured")
def test_branches_on_requires_grad():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x).softmax(-1)
            return y * 2 if y.requires_grad and x.requires_grad else y

    opt, original = pair(Model(), X)
    for x in (X, X.clone().requires_grad_()):
        for _ in range(2):
            same(opt(x), original(x), 0.0)
            with torch.no_grad():
                same(opt(x), original(x), 0.0)
    opt.requires_grad_(False)
    original.requires_grad_(False)
    same(opt(X), original(X), 0.0)
    assert hits(opt) == 3


@pytest.mark.usefixtures("as_captured")
def test_distributed_data_parallel(tmp_path):
    opt, original = pair(Attention().train(), X)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(opt)
        optimisers = [torch.optim.SGD(m.parameters(), 1e-2) for m in (wrapped, original)]
        for _ in range(2):
            for module, optimiser in zip((wrapped, original), optimisers, strict=True):
                optimiser.zero_grad()
                module(X).square().sum().backward()
                optimiser.step()
        same(opt.state_dict(), original.state_dict(), 0.0)
        assert hits(opt) == 2
    finally:
        torch.distributed.destroy_process_group()
        os.environ.pop("MASTER_ADDR", None)


@pytest.mark.usefixtures("as_captured")
def test_autocast_training_gives_the_same_gradients():
    opt, original = pair(Attention().train(), X)
    with torch.autocast("cpu", torch.bfloat16):
        opt.prepare(X)
    found = []
    for module in (opt, original):
        with torch.autocast("cpu", torch.bfloat16):
            loss = module(X).float().square().sum()
        found.append(gradients(module, loss))
    assert hits(opt) == 1
    same(*found, 0.0)


@pytest.mark.usefixtures("as_captured")
def test_inference_tensors():
    with torch.inference_mode():
        model = Attention().eval()
        x = X.clone()
    original = copy.deepcopy(model)
    opt = attnopt.optimize(model, (x,))
    with torch.inference_mode():
        same(opt(x), original(x), 0.0)


def test_a_result_may_be_written_in_place_before_its_gradient(monkeypatch):
    """A product of matrices does not save its result for the backward pass, fused attention does.
    """
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.query = nn.Linear(8, 8)

        def forward(self, x):
            return (self.query(x) @ x.mT).softmax(-1) @ x

    original = Bare().eval()
    opt = attnopt.optimize(copy.deepcopy(original), (X,), backend="aten", verify=False)
    assert [s.lowering for s in opt.report.sites] == ["aten:sdpa"]
    found = [gradients(module, module(X).add_(X).square().sum()) for module in (opt, original)]
    same(*found, 1e-4)
