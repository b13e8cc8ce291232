"""What is computed from parameters alone: once per forward, or once for all with freeze=True.

Frozen values never outlive a change of what they were computed from, and never hide a gradient.
"""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt

HEADS, D, N = 4, 8, 96
FROZEN = "gradients on, with values of parameters frozen"


class Bias(nn.Module):
    """An MLP over coordinates, as in SwinV2: a bias from parameters and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(1, 16), nn.ReLU(), nn.Linear(16, HEADS, bias=False))
        self.register_buffer("coordinates", torch.linspace(-1, 1, 2 * N - 1)[:, None])

    def forward(self) -> Tensor:
        at = torch.arange(N)
        table = self.mlp(self.coordinates)
        bias = table[at[None] - at[:, None] + N - 1].permute(2, 0, 1)
        return 16 * torch.sigmoid(bias)


def attend(x: Tensor, bias: Tensor) -> Tensor:
    q = k = v = x.unflatten(-1, (HEADS, D)).transpose(1, 2)
    weights = (q @ k.mT / math.sqrt(D) + bias).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Model(nn.Module):
    """Two layers that share one bias module, each of which calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = Bias()

    def forward(self, x: Tensor) -> Tensor:
        return attend(attend(x, self.bias()), self.bias())


def drawn() -> Tensor:
    return torch.randn(2, N, HEADS * D)


def optimized(model: nn.Module, x: Tensor, freeze: bool = True, **options: Any) -> Any:
    return attnopt.optimize(model, (x,), **{
        "backend": "aten", "verify": False, "freeze": freeze, **options})


def operations(opt: Any, name: str) -> int:
    return sum(str(n.target).startswith(f"aten.{name}.") for n in opt.graph_modules[0].graph.nodes)


def same(opt: Any, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(opt(x), model(x), atol=3e-6, rtol=1e-5)


# -- once per forward ---------------------------------------------------------------------------
def test_layers_that_share_parameters_compute_with_them_once() -> None:
    model, x = Model().eval(), drawn()
    opt = optimized(model, x, freeze=False)
    assert [s.status for s in opt.report.sites] == ["rewritten"] * 2
    assert operations(opt, "linear") == 2, "the two layers of one MLP"
    assert operations(opt, "sigmoid") == 1
    same(opt, model, x)
    for p in model.parameters():
        p.data.mul_(2)
    same(opt, model, x)
    assert opt.report.calls == {"hits": 2}


def test_other_parameters_are_computed_with_each() -> None:
    class Two(Model):
        def __init__(self) -> None:
            super().__init__()
            self.other = Bias()

        def forward(self, x: Tensor) -> Tensor:
            return attend(attend(x, self.bias()), self.other())

    model, x = Two().eval(), drawn()
    opt = optimized(model, x, freeze=False)
    assert operations(opt, "linear") == 4
    same(opt, model, x)


@pytest.mark.parametrize("lowering", ["aten", pytest.param("auto", marks=pytest.mark.slow)])
def test_gradients_of_a_shared_table_are_exact(
        lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from attnopt.passes.rules import cost
    monkeypatch.setattr(cost, "TAKE_ALL", True)
    model, x = Model().double().train(), drawn().double()
    opt = optimized(model, x, backend=lowering, freeze=False)
    wanted, found = [], []
    for module, grads in ((model, wanted), (opt, found)):
        given = x.clone().requires_grad_()
        module(given).square().sum().backward()
        grads += [given.grad, *(p.grad for p in model.parameters())]
        model.zero_grad()
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)


def test_tables_of_a_rewrite_are_shared_in_spite_of_their_names() -> None:
    from attnopt.kernels import tabulate
    one, other = (str(tabulate.Points(
        f"(add (load {a} k) (load_int {b} (load_int {b} k)))", "4", (a, b), ("q", "k"), (), False))
        for a, b in (("linear_2", "index"), ("linear_5", "index")))
    assert one != other and tabulate.same_text(one) == tabulate.same_text(other)
    swapped = str(tabulate.Points(
        "(add (load index k) (load_int linear_5 (load_int linear_5 k)))", "4",
        ("linear_5", "index"), ("q", "k"), (), False))
    assert tabulate.same_text(swapped) != tabulate.same_text(one)


@pytest.mark.parametrize("change", ["write", "return", "draw"])
def test_what_is_written_returned_or_drawn_is_not_shared(change: str) -> None:
    class Odd(Model):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            first, second = self.bias(), self.bias()
            if change == "draw":
                first, second = (b + torch.randn(N, N) for b in (first, second))
            if change == "write":
                second += 1
                second[0] = 0
            out = attend(attend(x, first), second)
            return (out, first, second) if change == "return" else out

    model, x = Odd().eval(), drawn()
    for freeze in (False, True):
        opt = optimized(model, x, freeze=freeze)
        with torch.no_grad():
            for _ in range(2):
                torch.manual_seed(3)
                found = opt(x)
                torch.manual_seed(3)
                torch.testing.assert_close(found, model(x), atol=3e-6, rtol=1e-5)
                if change == "return":
                    assert found[1] is not found[2]
                    found[1].zero_()


@pytest.mark.parametrize("same_memory", [
    lambda b: torch.einsum("hij->hij", b), torch.atleast_3d,
    lambda b: torch.broadcast_tensors(b, b)[1],
    lambda b: torch.meshgrid(b.flatten(), b[0, 0, :1], indexing="ij")[0]],
    ids=("einsum", "atleast_3d", "broadcast_tensors", "meshgrid"))
def test_what_is_returned_by_an_operation_that_does_not_say_so(
        same_memory: Callable[[Tensor], Tensor]) -> None:
    class Odd(Model):
        def forward(self, x: Tensor) -> Any:  # type: ignore[override]
            first, second = self.bias(), self.bias()
            out = attend(attend(x, first), second)
            return out, same_memory(first), same_memory(second)

    model, x = Odd().eval(), drawn()
    for freeze in (False, True):
        opt = optimized(model, x, freeze=freeze)
        with torch.no_grad():
            wanted = model(x)
            for _ in range(2):
                found = opt(x)
                torch.testing.assert_close(found, wanted, atol=3e-6, rtol=1e-5)
                found[1].untyped_storage().fill_(0)
                torch.testing.assert_close(found[2], wanted[2], atol=3e-6, rtol=1e-5)


def test_lengths_of_the_input_are_one_expression() -> None:
    class Buckets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(17, HEADS)

        def bias(self, x: Tensor) -> Tensor:
            at = torch.arange(x.shape[1])
            return self.table((at[None] - at[:, None]).clamp(-8, 8) + 8).permute(2, 0, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = attend(x, self.bias(x))
            return attend(y, self.bias(y))

    model, x = Buckets().eval(), drawn()
    for freeze in (False, True):
        opt = optimized(model, x, dynamic_shapes=({1: torch.export.Dim.AUTO},), freeze=freeze)
        assert operations(opt, "embedding") == 1
        for length in (N, 40, 7):
            same(opt, model, torch.randn(2, length, HEADS * D))
        assert opt.report.calls == {"hits": 3}


# -- once for all -------------------------------------------------------------------------------
def test_frozen_values_are_not_computed_again() -> None:
    model, x = Model().eval(), drawn()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    opt = optimized(model, x)
    assert operations(opt, "linear") == operations(opt, "sigmoid") == 0
    same(opt, model, x)
    assert opt.report.calls == {"hits": 1}
    assert "frozen: 1 value computed once" in str(opt.report)
    assert list(opt.state_dict()) == list(before)
    torch.testing.assert_close(dict(opt.state_dict()), before)


def _step(model: Any, **options: Any) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.Adam(model.parameters(), lr=0.1, **options).step()
    model.zero_grad()


def _load(model: Any) -> None:
    model.load_state_dict({k: v + 0.5 for k, v in model.state_dict().items()})


def _assign(model: Any) -> None:
    model.load_state_dict({k: v + 0.5 for k, v in model.state_dict().items()}, assign=True)


def _in_place(model: Any) -> None:
    with torch.no_grad():
        model.bias.mlp[2].weight[0, 0] += 1


def _data(model: Any) -> None:
    model.bias.mlp[2].weight.data.mul_(2)


def _numpy(model: Any) -> None:
    model.bias.mlp[0].weight.detach().numpy()[...] *= 3


def _replaced(model: Any) -> None:
    model.bias.mlp[2].weight = nn.Parameter(model.bias.mlp[2].weight.detach() * 2)


def _swapped(model: Any) -> None:
    model.bias.mlp = nn.Sequential(*(copy.deepcopy(m) for m in model.bias.mlp)).eval()
    model.bias.mlp[2].weight.data.mul_(2)


def _buffer(model: Any) -> None:
    model.bias.coordinates *= 2


CHANGES: list[Callable[[Any], None]] = [
    _step, lambda m: _step(m, foreach=True), lambda m: _step(m, fused=True), _load, _assign,
    _in_place, _data, _numpy, _replaced, _swapped, _buffer]
NAMES = ["step", "foreach", "fused", "load", "assign", "in_place", "data", "numpy", "replaced",
         "swapped", "buffer"]
SLOW = ("foreach", "load", "in_place", "replaced", "buffer")


@pytest.mark.parametrize("change", [
    pytest.param(c, marks=pytest.mark.slow) if name in SLOW else c
    for c, name in zip(CHANGES, NAMES, strict=True)], ids=NAMES)
def test_every_change_is_noticed_and_frozen_anew(change: Callable[[Any], None]) -> None:
    model, x = Model().eval(), drawn()
    opt = optimized(model, x)
    same(opt, model, x)
    with torch.no_grad():
        old = model(x)
    change(model)
    with torch.no_grad():
        assert not torch.allclose(model(x), old, atol=1e-4)
    for _ in range(3):
        same(opt, model, x)
    assert opt.report.calls["hits"] >= 3, opt.report.calls
    assert sum(v for k, v in opt.report.calls.items() if k != "hits") == 1


def test_training_and_gradients_use_nothing_frozen() -> None:
    model, x = Model().eval(), drawn()
    opt = optimized(model, x)
    wanted, found = [], []
    model(x).square().sum().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    for mode in (False, True, False):
        model.train(mode)
        for _ in range(3):
            model.zero_grad()
            opt(x).square().sum().backward()
            found = [p.grad.clone() for p in model.parameters()]
            torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    assert opt.report.calls[FROZEN] == 1
    same(opt, model.eval(), x)


def test_captured_in_training_mode_nothing_is_frozen() -> None:
    model, x = Model().train(), drawn()
    opt = optimized(model, x)
    assert "nothing is frozen of a model in training mode" in str(opt.report)
    assert operations(opt, "linear") > 0


def test_parameters_without_gradients_are_frozen_for_calls_with_gradients() -> None:
    model, x = Model().eval().requires_grad_(False), drawn()
    opt = optimized(model, x)
    opt(x)
    assert opt.report.calls == {"hits": 1}
    model.requires_grad_(True)
    for _ in range(3):
        model.zero_grad()
        opt(x).sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.slow
def test_another_dtype_is_frozen_anew() -> None:
    model, x = Model().eval(), drawn()
    opt = optimized(model, x)
    model.double()
    for _ in range(3):
        same(opt, model, x.double())
    assert opt.report.calls["hits"] == 2
    model.bfloat16()
    for _ in range(3):
        with torch.no_grad():
            torch.testing.assert_close(
                opt(x.bfloat16()), model(x.bfloat16()), atol=0.05, rtol=0.05)


def test_copies_are_their_own() -> None:
    model, x = Model().eval(), drawn()
    opt = optimized(model, x)
    twin = copy.deepcopy(opt)
    twin.bias.mlp[2].weight.data.mul_(-1)
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(twin(x), type(model).forward(twin, x), atol=3e-6, rtol=1e-5)
            assert not torch.allclose(twin(x), opt(x), atol=1e-4)
    same(opt, model, x)
    stored = io.BytesIO()
    pickle.dump(opt, stored)
    stored.seek(0)
    same(pickle.load(stored), model, x)


def test_a_normalised_weight_is_frozen_and_a_plain_one_is_not() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.utils.parametrizations.weight_norm(nn.Linear(HEADS * D, HEADS * D))
            self.outer = nn.Linear(HEADS * D, HEADS * D)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.outer(attend(self.inner(x), torch.zeros(())))
            return y @ self.outer.weight.t().to(y.dtype)

    model, x = Normed().eval(), drawn()
    opt = optimized(model, x)
    module = opt.graph_modules[0]
    frozen = [n for n in module.graph.nodes if n.op == "get_attr"]
    assert len(frozen) == 1 and getattr(module, frozen[0].target).shape == (HEADS * D, HEADS * D)
    same(opt, model, x)
    model.inner.parametrizations.weight.original0.data.mul_(2)
    same(opt, model, x)


def test_memory_holds_no_large_frozen_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.passes.freeze.FEW_BYTES", 8 * HEADS * N)
    model, x = Model().eval(), drawn()
    opt = optimized(model, x, prefer="memory")
    module = opt.graph_modules[0]
    sizes = [getattr(module, n.target).numel() for n in module.graph.nodes if n.op == "get_attr"]
    assert sizes and max(sizes) < HEADS * N * N / 8
    same(opt, model, x)


def test_values_of_a_graph_that_dynamo_found() -> None:
    class Broken(Model):
        def forward(self, x: Tensor) -> Tensor:
            y = attend(x, self.bias())
            if y.sum() > 1e9:
                return y
            return attend(y, self.bias())

    model, x = Broken().eval(), drawn()
    opt = optimized(model, x)
    for _ in range(3):
        same(opt, model, x)
    model.bias.mlp[2].weight.data.mul_(2)
    same(opt, model, x)
    for _ in range(2):
        opt(x).sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        model.zero_grad()


@pytest.mark.slow
def test_a_batch_norm_in_the_way_keeps_its_statistics() -> None:
    class Counted(Model):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(HEADS * D)

        def forward(self, x: Tensor) -> Tensor:
            scale = torch.rsqrt(self.norm.running_var + 1)
            return attend(self.norm(x.flatten(0, 1)).view_as(x) * scale, self.bias())

    model, x = Counted(), drawn()
    twin = copy.deepcopy(model)
    opt = optimized(model, x)
    for _ in range(3):
        torch.testing.assert_close(opt(x), twin(x), atol=3e-6, rtol=1e-5)
    torch.testing.assert_close(model.norm.running_var, twin.norm.running_var)
    model.eval(), twin.eval()
    for _ in range(3):
        same(opt, twin, x)
    model.norm.running_var.mul_(3), twin.norm.running_var.mul_(3)
    same(opt, twin, x)
