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
