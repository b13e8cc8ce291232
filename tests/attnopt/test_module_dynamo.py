"""What torch.export cannot capture goes through Dynamo, or stays the user's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import attnopt
from tests.attnopt.small_models import Attention, hits, pair, same

X = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Branches(nn.Module):
    """The sign of a sum decides."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        y = self.attention(x)
        if y.sum() > 0:
            return y * 2
        return self.attention(y)


def test_branches_on_values():
    opt, original = pair(Branches().eval(), X)
    for x in (X, -X, X, torch.randn(3, 4, 8), -X):
        same(opt(x), original(x), 1e-4)
    assert hits(opt) >= 4 and len(opt.graph_modules) >= 2
    assert any(site.status == "rewritten" for site in opt.report.sites)
    same(opt.state_dict(), original.state_dict(), 1e-4)


@pytest.mark.usefixtures("as_captured")
def test_training_through_dynamo():
    opt, original = pair(Branches().train(), X)
    for module in (opt, original):
        optimiser = torch.optim.AdamW(module.parameters(), 1e-2)
        for step in range(3):
            torch.manual_seed(step)
            optimiser.zero_grad()
            module(X).square().mean().backward()
            optimiser.step()
    same(opt.state_dict(), original.state_dict())
    assert hits(opt) == 3


class Stateful(nn.Module):
    """Assigns attributes and a buffer, and appends to a list that it is given."""

    def __init__(self):
        super().__init__()
        self.attention = Attention()
        self.register_buffer("mean", torch.zeros(8))
        self.steps = 0

    def forward(self, x, log):
        self.steps += 1
        self.last = y = self.attention(x)
        self.mean = self.mean * 0.9 + y.detach().mean((0, 1))
        log.append(y)
        return y + self.mean


@pytest.mark.usefixtures("as_captured")
def test_state_that_forward_keeps():
    opt, original = pair(Stateful().eval(), X, [])
    ours, theirs = [], []
    for _ in range(4):
        same(opt(X, ours), original(X, theirs))
    same(ours, theirs)
    same((opt.mean, opt.last, opt.steps), (original.mean, original.last, 4))
    assert opt.last is ours[-1]


@pytest.mark.usefixtures("as_captured")
def test_state_that_is_built_at_the_first_call():
    class Lazy(Attention):
        def __init__(self):
            super().__init__()
            self.table = None

        def forward(self, x):
            if self.table is None or self.table.shape[0] != x.shape[1]:
                self.table = torch.arange(float(x.shape[1]))[:, None]
            return super().forward(x + self.table)

    model = Lazy().eval()
    original = copy.deepcopy(model)
    opt = attnopt.optimize(model, (X,))
    assert opt.table is None and "forward assigns self.table" in str(opt.report.notes)
    for _ in range(4):
        same(opt(X), original(X), 0.0)
    same(opt.table, original.table)
    assert hits(opt) >= 2 and len(opt.graph_modules) == 1
    assert type(opt.table) is torch.Tensor


def test_values_of_a_guarded_buffer_through_dynamo():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("mask", torch.ones(5, 5, dtype=torch.bool).tril())

        def forward(self, x):
            if x.sum() > 1e9:
                return x
            scores = (x @ x.mT).masked_fill(~self.mask, float("-inf"))
            return scores.softmax(-1) @ x

    opt, original = pair(Masked(), X)
    for _ in range(2):
        same(opt(X), original(X))
    for module in (opt, original):
        module.mask.data[0] = True
    for _ in range(2):
        same(opt(X), original(X))


def test_a_failure_in_the_passes_leaves_the_model_as_it_is(monkeypatch):
    def broken(captured, options):
        raise RuntimeError("a fault")

    monkeypatch.setattr("attnopt.passes.pipeline.rewrite", broken)
    for model in (Attention().eval(), Branches().eval()):
        opt, original = pair(model, X)
        for _ in range(3):
            same(opt(X), original(X))
        assert "a fault" in str(opt.report.notes)


def test_explain_runs_a_copy():
    model = Branches().eval()
    before = copy.deepcopy(model.state_dict())
    generator = torch.get_rng_state()
    report = attnopt.explain(model, (X,))
    assert len(report.sites) >= 1
    same(model.state_dict(), before, 0.0)
    assert torch.equal(torch.get_rng_state(), generator)
    assert not isinstance(model, attnopt.OptimizedModule)


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, attn_implementation="eager")
    return transformers.LlamaForCausalLM(config).eval()


def test_a_cache_is_advanced_and_the_report_is_there_before_the_first_call(llama):
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, 64, (1, 6))
    original = copy.deepcopy(llama)
    opt = attnopt.optimize(copy.deepcopy(llama), (), {"input_ids": ids})
    assert len(opt.report.sites) == 2 and not opt.report.calls
    with torch.no_grad():
        same(opt(input_ids=ids).logits, original(input_ids=ids).logits, 1e-4)
        caches = [transformers.DynamicCache(config=llama.config) for _ in range(2)]
        for step in range(4):
            out = [m(input_ids=ids[:, step:step + 1], past_key_values=cache).logits
                   for m, cache in zip((opt, original), caches, strict=True)]
            same(*out, 1e-4)
        assert [c.get_seq_length() for c in caches] == [4, 4]


@pytest.mark.slow
def test_generate(llama):
    ids = torch.randint(0, 64, (1, 6))
    opt = attnopt.optimize(copy.deepcopy(llama), (), {"input_ids": ids})
    for _ in range(2):
        ours, theirs = (m.generate(ids, max_new_tokens=8, do_sample=False) for m in (opt, llama))
        assert torch.equal(ours, theirs)
    assert hits(opt) >= 8


def test_outputs_that_transformers_collects_by_hooks():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=64, attn_implementation="eager")
    ids = torch.randint(0, 64, (1, 6))
    opt, original = pair(transformers.BertModel(config).eval(), input_ids=ids,
                         output_hidden_states=True)
    for _ in range(3):
        ours, theirs = (m(input_ids=ids, output_hidden_states=True) for m in (opt, original))
        assert type(ours) is type(theirs) and len(ours.hidden_states) == 3
        same(tuple(ours.hidden_states), tuple(theirs.hidden_states), 1e-4)
    assert hits(opt) >= 1


class Positions(nn.Module):
    """Positions are written through `.data`, which torch.export cannot follow (CogVideoX)."""

    def __init__(self, late: bool = False):
        super().__init__()
        self.attention, self.late = Attention(), late
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x):
        whole = x.new_zeros(1, 5, 8)
        if self.late:
            early = whole * self.scale  # saved for the gradient of the scale
        whole.data[:, 1:].copy_(torch.arange(8.0) / 8)
        return self.attention(x + whole * self.scale + (early if self.late else 0))


@pytest.mark.usefixtures("as_captured")
def test_what_is_written_through_data():
    opt, original = pair(Positions().eval(), X)
    assert "no sites yet" in str(opt.report) and "no sites yet" in opt.report._repr_html_()
    for x in (X, -X):
        same(opt(x), original(x), 1e-5)
    assert "no sites" not in str(opt.report)
    assert hits(opt) == 2 and opt.report.sites[0].status == "rewritten"
    grads = [torch.autograd.grad(m(X).square().sum(), [*m.parameters()]) for m in (opt, original)]
    same(*grads, 1e-4)


def test_a_write_through_data_behind_autograd():
    with torch.no_grad():
        opt, original = pair(Positions(late=True).eval(), X)
        same(opt(X), original(X), 1e-5)
        assert hits(opt) == 1
    grads = [torch.autograd.grad(m(X).square().sum(), [*m.parameters()]) for m in (opt, original)]
    same(*grads, 1e-4)
    assert any("x.data is written" in note for note in opt.report.notes), opt.report.notes
