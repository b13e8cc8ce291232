"""Published models with a bias: what is found, that its form is named, that numbers are the same.

One row for each spelling of `reference/bias_and_deformable.md`, 1.7, by the tiny models of
`tests.models` or, where transformers has none, by modules written as timm writes them
(`tests.passes.bias_modules`). A tensor of the optimised model may be as far from the float64 model
as max(2 * the original's own distance, 8 * eps * max|out|), a gradient twice as many eps times
four more: it is a sum over all tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import attnopt
from tests.passes import bias_modules as made

pytestmark = pytest.mark.usefixtures("by_aten")
_EPS = torch.finfo(torch.float32).eps
Kwargs = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A model of the zoo by its name, or made by a function; `changes` to its configuration.

    length: of its tokens, pixels: of an image's edge; 0 for those of the zoo
    train:  gradients are taken in training mode, as evaluation mode keeps a tensor with its graph
    forms:  words that the bias of every attention, or of the one at a path, is described with
    """

    name: str
    forms: tuple[str, ...] | Mapping[str, tuple[str, ...]]
    make: Callable[[], tuple[nn.Module, Kwargs]] | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    length: int = 0
    pixels: int = 0
    train: bool = False
    quick: bool = False

    def build(self) -> tuple[nn.Module, Kwargs]:
        if self.make is not None:
            return self.make()
        pytest.importorskip("transformers")
        from tests.models import zoo

        entry = zoo.registry()[self.name.partition(" ")[0]]
        entry = replace(entry, overrides={**entry.overrides, **self.changes})
        kwargs = zoo.inputs(entry)
        if self.pixels:
            kwargs = zoo.pixels(self.pixels)(torch.Generator().manual_seed(0))
        if self.length:
            kwargs = zoo.ids(2, self.length)(torch.Generator().manual_seed(0))
        return zoo.build(entry), kwargs


_T5 = ("table by distance, 1-D",)
_QUERY, _KEY = (f"{name} table by relative position" for name in ("query", "key"))
_SWIN = {f"layers.{stage}.blocks.{block}": (
    "table by distance, 2-D", *("regions",) * block) for stage in (0, 1) for block in (0, 1)}
ROWS = [
    Row("t5_encoder", _T5, length=24),
    Row("t5", {"SelfAttention": _T5}),
    Row("mpnet", _T5, length=24, quick=True),
    Row("wavlm", _T5),
    Row("layoutlmv3", ("index+parameter + parameter by input, dense",)),
    Row("bloom", ("key vector",), quick=True),
    Row("mpt", ("key vector",)),
    Row("falcon_alibi", ("key vector",)),
    Row("swin", _SWIN),
    Row("swinv2", _SWIN),
    Row("beit", ("table by distance, 2-D with 1 extra token",)),
    Row("sam_vision", ("separable per axis",), pixels=128,
        changes={"image_size": 128, "window_size": 8}),
    Row("vitdet", ("separable per axis",), pixels=64,
        changes={"image_size": 64, "pretrain_image_size": 64, "window_size": 8}),
    Row("levit", {"stages.0": ("table by distance, 2-D",)}, pixels=128,
        changes={"image_size": 128}, train=True),
    Row("deberta", (f"{_QUERY}, shift & {_KEY}, shift",)),
    Row("deberta_v2", (f"{_QUERY}, buckets & {_KEY}, buckets",)),
    Row("wav2vec2_conformer", (f"{_QUERY}, shift",)),
    Row("wav2vec2_bert", (f"{_QUERY}, buckets",)),
    Row("xlnet", (f"{_QUERY}, shift",)),
    Row("swin by timm", ("table by distance, 2-D", "regions"), made.swin, quick=True),
    Row("beit by timm", ("table by distance, 2-D with 1 extra token",), made.beit),
    Row("levit by timm", ("table by distance, 2-D",), made.levit, train=True,
        quick=True),
    Row("levit with fewer queries", ("table by distance, 2-D",), made.levit_downsample,
        train=True),
    Row("mvit", ("separable per axis",), made.mvit),
    Row("mvit with a class token", ("separable per axis",), made.mvit_class_token),
    Row("ESMFold, from a row", ("key vector", "dense"), made.triangle_rows, quick=True),
    Row("ESMFold, to a row", ("key vector", "dense"), made.triangle_columns),
    Row("ALiBi in the graph", ("closed form",), made.alibi, quick=True),
]
NAMES = [row.name for row in ROWS]


def tensors(model: nn.Module, kwargs: Kwargs, trained: bool) -> list[Tensor]:
    """Outputs, or the gradients of all parameters that have one."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(trained):
        out = [t for t in pytree.tree_leaves(model(**kwargs))
               if isinstance(t, Tensor) and t.is_floating_point()]
    if not trained:
        return out
    generator = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in out)
    model.zero_grad(set_to_none=True)
    loss.backward()
    return [p.grad for _, p in sorted(model.named_parameters()) if p.grad is not None]


def check(row: Row, trained: bool) -> attnopt.Report:
    """Optimises, calls twice with other numbers, compares with float64; the report."""
    model, kwargs = row.build()
    exact_model = copy.deepcopy(model).double()
    with torch.set_grad_enabled(trained):
        if row.train and trained:
            for m in (model, exact_model):
                m.train()
        optimized = attnopt.optimize(model, (), kwargs, verify=False)
        for _ in range(2 * row.train):  # the first call fills what the author keeps
            optimized(**kwargs)
    wide = pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and
                           x.is_floating_point() else x, kwargs)
    truth = tensors(exact_model, wide, trained)
    old, new = (tensors(m, kwargs, trained) for m in (model, optimized))
    calls = optimized.report.calls
    # BLOOM's activation has a gradient of its own, which no graph holds: its own forward is called.
    assert calls["hits"] or any("autograd.Function" in why for why in calls), calls
    assert len(old) == len(new) == len(truth)
    largest = max(t.abs().max().item() for t in truth if t.numel())
    for place, (ours, theirs, exact) in enumerate(zip(new, old, truth, strict=True)):
        off, own = ((t.double() - exact).abs().max().item() for t in (ours, theirs))
        size = exact.abs().max().item()
        bound = max(2 * own, 8 * _EPS * size)
        if trained:
            bound = max(bound, 64 * _EPS * size, 8 * _EPS * largest)
        assert off <= bound, f"{place}: off by {off:.3g}, the original by {own:.3g}"
    return optimized.report


def sites(report: attnopt.Report) -> list[Any]:
    found = [s for s in report.sites if s.kind == "attention" and "single key" not in s.reason]
    assert found and all(s.status == "rewritten" for s in found), [
        (s.path, s.reason, s.tried) for s in found if s.status != "rewritten"]
    return found


@pytest.mark.parametrize("row", [
    r if r.quick else pytest.param(r, marks=pytest.mark.slow) for r in ROWS], ids=NAMES)
def test_the_form_is_named(row: Row) -> None:
    found = sites(check(row, trained=False))
    if not isinstance(row.forms, Mapping):
        for site in found:
            assert all(word in site.bias for word in row.forms), (site.path, site.bias)
        return
    for path, words in row.forms.items():
        named = [s for s in found if path in s.path]
        assert named, [s.path for s in found]
        for site in named:
            assert all(word in site.bias for word in words), (site.path, site.bias)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=NAMES)
def test_gradients_are_the_same(row: Row) -> None:
    sites(check(row, trained=True))


def test_a_kept_bias_that_is_edited_is_noticed() -> None:
    model, kwargs = made.levit()
    with torch.no_grad():
        model(**kwargs)
        optimized = attnopt.optimize(model, (), kwargs, verify=False)
        for bias in model.kept.values():
            bias.copy_(bias.flip(-1))
        torch.testing.assert_close(optimized(**kwargs), model(**kwargs), atol=2e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tables"), [("t5_encoder", 1), ("swinv2", 4)])
def test_a_table_is_made_once_for_all_that_share_it(name: str, tables: int) -> None:
    """T5's layers share one table; of SwinV2's blocks each has a network of its own."""
    model, kwargs = next(row for row in ROWS if row.name == name).build()
    with torch.no_grad():
        optimized = attnopt.optimize(model, (), kwargs, verify=False)
    sites(optimized.report)
    calls = [str(n.target) for n in optimized.graph_modules[0].graph.nodes]
    assert sum("tabulate" in call for call in calls) == tables
    networks = sum(isinstance(m, nn.Linear) for m in model.modules())
    assert sum("linear" in call for call in calls) <= networks
