"""torch.compile(model, backend="attnopt"): equal numbers, options, gradients, errors."""

from __future__ import annotations

import copy
from importlib.metadata import entry_points

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from attnopt.backend import attnopt_backend
from attnopt.errors import OptionError, StrictError
from attnopt.kernels.cpp.attention import Attention as Attention_
from attnopt.kernels.cpp.toolchain import toolchain
from attnopt.kernels.cpp.training import Training
from tests.attnopt.small_models import Attention, same

X = torch.linspace(-2, 2, 2 * 6 * 8).reshape(2, 6, 8)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    torch._dynamo.reset()
    torch.manual_seed(1)
    yield
    torch._dynamo.reset()


class Windowed(nn.Module):
    """Attention by hand under a mask that is a buffer."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.register_buffer("mask", torch.ones(32, 32).tril().triu(-2).bool())

    def forward(self, x):
        return self.attention(x, self.mask[:x.shape[1], :x.shape[1]])


def compiled(model, then="eager", **options):
    reports = []
    return torch.compile(model, backend=attnopt_backend,
                         options={"then": then, "report": reports.append, **options}), reports


def statuses(reports):
    return [site.status for report in reports for site in report.sites]


@pytest.mark.parametrize("then", [
    "eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_forward_gradients_and_state(then):
    model = Windowed().train()
    if then == "aot_eager":  # its backward of a transposed BatchNorm fails in torch itself
        model.attention.norm = nn.Identity()
    original = copy.deepcopy(model)
    fast, reports = compiled(model, then)
    for step in range(2):
        for module, run in ((model, fast), (original, original)):
            module.zero_grad()
            y = run(X + step)
            y.square().sum().backward()
        same([p.grad for p in model.parameters()], [p.grad for p in original.parameters()], 1e-3)
    same(model.state_dict(), original.state_dict())
    assert statuses(reports) == ["rewritten"]
    assert "causal window" in reports[0].sites[0].mask and reports[0].sites[0].path == "attention"


def test_dynamic_lengths_compile_once_more():
    model = Windowed().eval()
    fast, reports = compiled(model)
    with torch.no_grad():
        for n in (6, 5, 9, 16, 3):
            x = torch.randn(2, n, 8)
            same(fast(x), model(x))
    assert statuses(reports) == ["rewritten", "rewritten"]  # fixed, then any length


def test_a_changed_buffer_is_noticed():
    model = Windowed().eval()
    fast, reports = compiled(model)
    with torch.no_grad():
        same(fast(X), model(X))
        model.mask.copy_(torch.ones(32, 32).tril().bool())
        same(fast(X), model(X))
        same(fast(X + 1), model(X + 1))
    assert statuses(reports) == ["rewritten"]


def test_graph_breaks_are_dynamos_own():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x):
            y = self.first(x)
            if y.sum() > 1e9:
                return y
            return self.second(y)

    model = Broken().eval()
    counter = torch._dynamo.testing.CompileCounter()
    torch.compile(copy.deepcopy(model), backend=counter)(X)
    torch._dynamo.reset()
    fast, reports = compiled(model)
    with torch.no_grad():
        same(fast(X), model(X), 1e-4)
    assert len(reports) == counter.frame_count and statuses(reports).count("rewritten") == 2


def test_autocast():
    model = Windowed().eval()
    fast, reports = compiled(model, "aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = fast(X), model(X)
    assert found.dtype == expected.dtype
    same(found, expected, 2e-2)
    assert statuses(reports) == ["rewritten"]


def test_nothing_to_rewrite_goes_on_as_it_is():
    seen = []

    def after(module, inputs):
        seen.append(module)
        return module.forward

    model = nn.Linear(8, 8)
    fast, reports = compiled(model, after)
    same(fast(X), model(X))
    assert len(seen) == 1 and not reports[0].sites
    assert any(n.target is torch._C._nn.linear for n in seen[0].graph.nodes)


def test_options_reach_the_passes():
    model = Windowed().eval()
    fast, reports = compiled(model, only="somewhere.*")
    with torch.no_grad():
        same(fast(X), model(X))
    assert statuses(reports) == ["kept"] and "only=" in reports[0].sites[0].reason


def test_strict_raises():
    fast, _ = compiled(Windowed().eval(), only="somewhere.*", strict=True)
    with pytest.raises(Exception, match="every site must be rewritten, got 1 kept") as raised:
        fast(X)
    assert isinstance(raised.value, StrictError) or "StrictError" in str(raised.value)


@pytest.mark.parametrize(("options", "words"), [
    ({"rule": []}, "an option must be one of rules, only"),
    ({"then": "attnopt"}, "then must be another backend"),
    ({"then": "nonsense"}, "then must be one of inductor"),
    ({"report": 3}, "report must be a function"),
    ({"then": "eager", "max_autotune": True}, "an option must be one of"),
    ({"prefer": "size"}, "prefer must be"),
])
def test_bad_options(options, words):
    with pytest.raises(OptionError, match=words):
        attnopt_backend(None, [], options=options)
    with pytest.raises(OptionError, match="mode must be left out"):
        attnopt_backend(None, [], mode="max-autotune", options={"then": "eager"})


def test_an_entry_point_names_it():
    found = {e.name: e.value for e in entry_points(group="torch_dynamo_backends")}
    if "attnopt" not in found:
        pytest.skip("attnopt is not installed")
    assert found["attnopt"] == "attnopt.backend:attnopt_backend"
    model = Windowed().eval()
    with torch.no_grad():
        same(torch.compile(model, backend="attnopt", options={"then": "eager"})(X), model(X))


# -- generated kernels under a compiler --------------------------------------------------------
class Biased(nn.Module):
    """A learned table of relative positions: an operand that has a gradient."""

    def __init__(self, n=24, heads=2):
        super().__init__()
        self.heads, self.qkv = heads, nn.Linear(16, 48)
        self.table = nn.Parameter(torch.randn(heads, 2 * n - 1))
        self.register_buffer("index", torch.arange(n)[:, None] - torch.arange(n) + n - 1)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return ((q @ k.mT) / 8 ** 0.5 + self.table[:, self.index]).softmax(-1) @ v


@pytest.fixture()
def kernel_calls(monkeypatch):
    """Results of the generated kernels, forward or with saved statistics."""
    if toolchain().why_not():
        pytest.skip("no compiler")
    found = []

    def count(run):
        def counted(*args, **kwargs):
            out = run(*args, **kwargs)
            found.extend([1] * (out is not None))
            return out
        return counted

    for cls, name in ((Attention_, "__call__"), (Attention_, "in_maps"), (Training, "__call__")):
        monkeypatch.setattr(cls, name, count(getattr(cls, name)))
    return found


@pytest.mark.parametrize("then", [
    "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [False, True])
def test_generated_kernels_are_called(then, training, kernel_calls):
    model, x = Biased().train(training), torch.randn(2, 24, 16)
    original = copy.deepcopy(model)
    fast, reports = compiled(model, then)
    with torch.set_grad_enabled(training):
        for step in range(2):
            kernel_calls.clear()
            y, expected = fast(x + step), original(x + step)
            same(y, expected)
            assert kernel_calls
            if training:
                kernel_calls.clear()
                y.sin().sum().backward()
                expected.sin().sum().backward()
                assert kernel_calls
    assert reports[0].sites[0].lowering.startswith("cpp")
    for mine, theirs in zip(model.parameters(), original.parameters(), strict=True):
        same(mine.grad, theirs.grad, 1e-4)


def test_places_of_windows_are_of_no_trace(kernel_calls):
    """Two compilations of the same windows: nothing of the first is kept for the second."""
    for _ in range(2):
        torch._dynamo.reset()
        model = Rolled().eval()
        fast, reports = compiled(model, "aot_eager")
        with torch.no_grad():
            x = torch.randn(1, 8, 8, 16)
            same(fast(x), model(x))
    assert reports[0].sites[0].lowering == "cpp:window" and kernel_calls


class Rolled(nn.Module):
    """Attention within shifted windows of 4 x 4 of a map."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        y = torch.roll(x, (-2, -2), (1, 2)).view(-1, 2, 4, 2, 4, 16).transpose(2, 3)
        q, k, v = self.qkv(y.reshape(-1, 16, 16)).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = ((q @ k.mT) / 8 ** 0.5).softmax(-1) @ v
        out = out.transpose(1, 2).reshape(-1, 2, 2, 4, 4, 16).transpose(2, 3)
        return torch.roll(out.reshape(-1, 8, 8, 16), (2, 2), (1, 2))


def test_gradients_of_gradients(kernel_calls):
    model, x = Biased().train(), torch.randn(2, 24, 16, requires_grad=True)
    fast, _ = compiled(model)
    found = []
    for run in (fast, model):
        grads = torch.autograd.grad(run(x).square().sum(), [x, model.table], create_graph=True)
        penalty = sum(g.square().sum() for g in grads)
        found.append(torch.autograd.grad(penalty, [x, *model.parameters()]))
    same(*found, 1e-3)
    assert kernel_calls
