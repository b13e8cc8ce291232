"""An optimised module is the user's module under another name: state, copies, methods, hooks."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from torch import nn

import attnopt
from attnopt.errors import CaptureError, OptionError, StrictError
from tests.attnopt.small_models import Attention, hits, pair, same

pytestmark = pytest.mark.usefixtures("as_captured")
X = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8)


class Named(Attention):
    """A model with a method, a property and an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"width": 8}

    @property
    def device(self) -> torch.device:
        return self.out.weight.device

    def twice(self, x: torch.Tensor) -> torch.Tensor:
        return self(self(x))


def test_one_state_under_two_names():
    model = Named().eval()
    opt = attnopt.optimize(model, (X,))
    assert isinstance(opt, Named) and isinstance(opt, attnopt.OptimizedModule)
    assert list(opt.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(opt.parameters(), model.parameters(), strict=True))
    assert opt.config is model.config and opt.device == torch.device("cpu")
    opt.train()
    opt.note = 1
    model.other = 2
    assert model.training and model.note == 1 and opt.other == 2
    opt.qkv = nn.Linear(8, 24)
    assert model.qkv is opt.qkv
    assert str(type(opt)) == str(Named), "libraries look models up by the name of the class"
    same(opt.twice(X), copy.deepcopy(model).twice(X), 0.0)


def test_outer_hooks_run_around_the_variant():
    opt, original = pair(Attention().eval(), X)
    seen = []
    opt.register_forward_pre_hook(lambda m, a: (a[0] * 2,))
    opt.register_forward_hook(lambda m, a, out: seen.append(out) or out + 1)
    same(opt(X), original(X * 2) + 1, 0.0)
    assert len(seen) == 1 and hits(opt) == 1


def test_inner_hooks_run():
    opt, original = pair(Attention().eval(), X)
    seen = []
    handle = opt.out.register_forward_hook(lambda m, a, out: seen.append(1))
    for _ in range(3):
        same(opt(X), original(X))
    assert len(seen) == 3
    assert opt.report.calls["a submodule was replaced or hooked"] == 1
    assert any("hooks" in note for note in opt.report.notes)
    handle.remove()
    for _ in range(3):
        same(opt(X), original(X))
    assert len(seen) == 3


def test_inner_backward_hooks_run():
    opt, original = pair(Attention().eval(), X)
    seen = []
    opt.out.register_full_backward_hook(lambda m, i, o: seen.append(1))
    for _ in range(2):
        opt(X).sum().backward()
    assert len(seen) == 2


def test_copies_are_rebuilt():
    opt, original = pair(Named().eval(), X)
    expected = original(X)
    stream = io.BytesIO()
    torch.save(opt, stream)
    stream.seek(0)
    for other in (copy.deepcopy(opt), pickle.loads(pickle.dumps(opt)),
                  torch.load(stream, weights_only=False),
                  copy.deepcopy(nn.Sequential(opt))[0]):
        assert isinstance(other, Named) and isinstance(other, attnopt.OptimizedModule)
        assert other.out.weight is not opt.out.weight
        for _ in range(2):
            same(other(X), expected, 0.0)
        assert hits(other) == 1 and hits(opt) == 0
    with torch.no_grad():
        opt.out.weight.zero_()
    same(copy.copy(opt)(X), opt(X), 0.0)


def test_copies_keep_the_dynamic_shapes():
    opt = attnopt.optimize(Attention().eval(), (X,),
                           dynamic_shapes={"x": {1: torch.export.Dim("n", min=2, max=64)}})
    for other in (copy.copy(opt), copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        for length in (5, 5, 6, 7):
            x = torch.randn(2, length, 8)
            same(other(x), opt(x), 0.0)
        assert hits(other) == 3 and len(other.graph_modules) == 1


def test_instances_made_from_the_class_are_plain():
    opt, _ = pair(Named().eval(), X)
    fresh = type(opt)().eval()
    same(fresh(X), Attention.forward(fresh, X), 0.0)
    assert hits(opt) == 0


def test_in_place():
    model = Named().eval()
    original = copy.deepcopy(model)
    opt = attnopt.optimize(model, (X,), inplace=True)
    assert opt is model and isinstance(model, Named)
    same(model(X), original(X), 0.0)
    assert hits(opt) == 1
    other = copy.deepcopy(model)
    same(other(X), original(X), 0.0)
    assert pickle.loads(pickle.dumps(model)).config == {"width": 8}


def test_a_forward_that_lies_in_the_instance():
    model = Attention().eval()
    model.forward = functools.partial(_doubled, model, model.forward)
    expected = model(X)
    opt = attnopt.optimize(model, (X,))
    same(opt(X), expected, 0.0)
    same(model(X), expected, 0.0)
    plain = Attention().eval()
    wrapped = attnopt.optimize(plain, (X,))
    expected = wrapped(X)
    wrapped.forward = functools.partial(_doubled, wrapped, wrapped.forward)
    same(wrapped(X), 2 * expected, 0.0)


def _doubled(module, forward, *args, **kwargs):
    return 2 * forward(*args, **kwargs)


def test_structured_outputs_and_inputs():
    class Model(nn.Module):
        def forward(self, batch, pair=(), *more, **named):
            x = batch["x"].softmax(-1)
            return {"y": x, "rest": [x + sum(pair), None, 3], "more": more, **named}

    opt = attnopt.optimize(Model(), ({"x": X}, (X, 1.0), X), {"z": X, "a": X})
    for args, kwargs in ((({"x": X}, (X, 1.0), X), {"a": X, "z": X}),
                         (({"x": X}, [X, 1.0], X), {"a": X, "z": X}),
                         (({"x": X}, (X, 2.0), X, X), {})):
        same(opt(*args, **kwargs), Model()(*args, **kwargs), 0.0)
    assert hits(opt) == 1


def test_torch_compile_of_an_optimised_module():
    opt, original = pair(Attention().eval(), X)
    same(torch.compile(opt, backend="eager")(X), original(X))


def test_graph_modules_and_exported_programs():
    original = Attention().eval()
    program = torch.export.export(original, (X,))
    traced = torch.fx.symbolic_trace(nn.Sequential(nn.Linear(8, 8), nn.Softmax(-1)))
    for model, reference in ((program, original), (program.module(), original),
                             (traced, copy.deepcopy(traced))):
        opt = attnopt.optimize(model, (X,))
        same(opt(X), reference(X))
        assert hits(opt) == 1
        same(copy.deepcopy(opt)(X), reference(X))


def test_report_and_graphs():
    opt, _ = pair(Attention().eval(), X)
    assert opt.report.model_name == "Attention" and len(opt.report.sites) == 1
    assert isinstance(opt.graph_modules[0], torch.fx.GraphModule)
    opt(X)
    assert opt.report.calls["hits"] == 1
    assert len(attnopt.explain(Attention().eval(), (X,)).sites) == 1


@pytest.mark.parametrize("change, words", [
    ({"model": 3}, "model must be a torch.nn.Module"),
    ({"args": X}, "args must be a tuple"),
    ({"kwargs": [1]}, "kwargs must be a mapping"),
    ({"rules": "all"}, "rules must be a list"),
    ({"rules": [3]}, "a rule must be"),
    ({"only": 3}, "only must be a pattern"),
    ({"approximate": 0.1}, "approximate must be"),
    ({"approximate": {"logits": -1}}, "approximate must map"),
    ({"prefer": "size"}, "prefer must be"),
    ({"verify": 1}, "verify must be"),
    ({"backend": "cuda"}, "backend must be"),
    ({"backend": []}, "backend must be"),
    ({"freeze": "yes"}, "freeze must be"),
    ({"strict": None}, "strict must be"),
    ({"inplace": 1}, "inplace must be"),
])
def test_wrong_options(change, words):
    given = {"model": nn.Softmax(-1), "args": (X,), **change}
    with pytest.raises(OptionError, match=words):
        attnopt.optimize(**given)


def test_optimising_twice_is_an_error():
    opt, _ = pair(Attention().eval(), X)
    with pytest.raises(OptionError, match="optimised already"):
        attnopt.optimize(opt, (X,))


def test_models_that_raise():
    class Raises(nn.Module):
        def forward(self, x):
            raise KeyError("mine")

    opt = attnopt.optimize(Raises(), (X,))
    for _ in range(3):
        with pytest.raises(KeyError, match="mine"):
            opt(X)
    with pytest.raises(StrictError, match="captured whole"):
        attnopt.optimize(Raises(), (X,), strict=True)
    with pytest.raises(CaptureError):
        opt.prepare(X)
