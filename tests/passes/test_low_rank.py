"""Biases of low rank: products that the author's graph holds, constants of proven rank, distances,
factors of the scores, and what a user may ask to be cut off; and what must stay as it is.

Most Specs are evaluated by ATen, so that few kernels have to be compiled.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt import kernels
from attnopt.approximations import LowRank
from attnopt.cost.bias import Reading, break_even, low_rank_pays
from attnopt.cost.devices import find_cpu, find_gpu
from attnopt.errors import OptionError
from attnopt.ir import expr as E
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import aten
from attnopt.kernels.bind import bind
from attnopt.passes.analyze import low_rank_values
from attnopt.passes.analyze.low_rank_values import exact, largest

B, H, N, D, R = 2, 3, 40, 8, 6
by_aten = pytest.mark.usefixtures("by_aten")
Attention = Callable[..., Tensor]


class Model(nn.Module):
    def __init__(self, function: Attention, bias: Tensor | None = None) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("bias", bias)
        self.learned = nn.Parameter(torch.randn(H, N, R))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def drawn(length: int = N, dtype: torch.dtype = torch.float32, rank: int = R) -> list[Tensor]:
    g = torch.Generator().manual_seed(length)
    return [torch.randn(B, H, length, d, generator=g).to(dtype) for d in (D, D, D, rank, rank)]


def soft(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1) @ value


def spec_of(opt: Any) -> Spec:
    (site,) = opt.report.sites
    assert site.status == "rewritten", (site.reason, site.tried)
    return Spec.parse(site.spec)


def roles(spec: Spec) -> list[tuple[str, ...] | None]:
    return [o.axes for o in spec.operands if o.role == "factor"]


def dense(spec: Spec) -> list[str]:
    return [o.slot for o in spec.operands if {"q", "k"} <= set(o.axes or ())]


# -- products that the graph holds ---------------------------------------------------------------
def plain(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return soft(q @ k.mT * 0.3 + a @ b.mT, v)


def by_einsum(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return soft(q @ k.mT * 0.3 - torch.einsum("bhqr,bhkr->bhqk", a, b) * 0.5, v)


def keys_first(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return soft(q @ k.mT * 0.3 + (b @ a.mT).mT, v)


def shared_by_heads(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return soft(q @ k.mT * 0.3 + torch.bmm(a[:, 0], b[:, 1].mT)[:, None], v)


def causal(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return soft(q @ k.mT * 0.3 + (a @ b.mT).masked_fill(hidden, -math.inf), v)


def learned(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return soft(q @ k.mT * 0.3 + m.learned[:, : q.shape[2]] @ b.mT, v)


def factor(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return soft(q @ k.mT * 0.3 * (a @ b.mT), v)


def given_to_sdpa(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=a @ b.mT)


PRODUCTS = [plain, by_einsum, keys_first, shared_by_heads, causal, learned, factor, given_to_sdpa]


@by_aten
@pytest.mark.parametrize("function", PRODUCTS)
def test_a_product_over_a_small_axis_stays_a_product(function: Attention) -> None:
    model, inputs = Model(function).eval(), drawn()
    opt = attnopt.optimize(model, tuple(inputs), verify=False)
    spec = spec_of(opt)
    assert spec.logits.has("inner") and not dense(spec), spec
    assert all(("q" in axes) == (i == 0) for i, axes in enumerate(roles(spec)))  # type: ignore
    with torch.no_grad():
        torch.testing.assert_close(opt(*inputs), model(*inputs), atol=3e-6, rtol=1e-5)
    assert "low rank 6" in opt.report.sites[0].bias


@by_aten
def test_lengths_may_change_and_the_rank_may_not() -> None:
    moving = tuple({2: torch.export.Dim.AUTO} for _ in range(5))
    model = Model(plain).eval()
    opt = attnopt.optimize(model, tuple(drawn()), dynamic_shapes=(moving,), verify=False)
    assert spec_of(opt).logits.has("inner")
    for n in (N, 57):
        with torch.no_grad():
            torch.testing.assert_close(opt(*drawn(n)), model(*drawn(n)), atol=3e-6, rtol=1e-5)
    assert sum(v for k, v in opt.report.calls.items() if k != "hits") == 0, opt.report.calls


@by_aten
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_factors_of_16_bits_are_multiplied_exactly(dtype: torch.dtype) -> None:
    model, inputs = Model(plain).eval(), drawn(dtype=dtype)
    opt = attnopt.optimize(model, tuple(inputs), verify=False)
    assert spec_of(opt).logits.has("inner")
    with torch.no_grad():
        truth = model(*(x.double() for x in inputs))
        off, own = ((f(*inputs).double() - truth).abs().max() for f in (opt, model))
    assert off <= own


@by_aten
def test_gradients_reach_the_factors() -> None:
    model, inputs = Model(learned).train(), drawn()
    opt = attnopt.optimize(model, tuple(inputs), verify=False)
    for x in inputs:
        x.requires_grad_()
    wanted = torch.autograd.grad(model(*inputs).square().sum(), [*inputs[:3], inputs[4],
                                                                 model.learned])
    found = torch.autograd.grad(opt(*inputs).square().sum(), [*inputs[:3], inputs[4],
                                                              model.learned])
    for x, y in zip(found, wanted, strict=True):
        torch.testing.assert_close(x, y, atol=2e-5, rtol=1e-4)


def squashed(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return soft(torch.tanh(q @ k.mT * 0.3 + a @ b.mT), v)


def wide(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    rows = (a @ b.mT).exp()  # a product, but not added
    return soft(q @ k.mT * 0.3 + rows, v)


def other_tokens(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return soft(q @ k.mT * 0.3 + (a @ b.mT).flip(-1), v)


@by_aten
@pytest.mark.parametrize("function", [squashed, wide, other_tokens])
def test_other_products_are_read(function: Attention) -> None:
    model, inputs = Model(function).eval(), drawn()
    opt = attnopt.optimize(model, tuple(inputs), verify=False)
    assert not spec_of(opt).logits.has("inner")
    with torch.no_grad():
        torch.testing.assert_close(opt(*inputs), model(*inputs), atol=3e-6, rtol=1e-5)


@pytest.mark.slow
def test_compiled_products_are_verified(compiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnopt.passes.rules.cost.TAKE_ALL", True)
    model, inputs = Model(plain).eval(), drawn()
    opt = attnopt.optimize(model, tuple(inputs), backend="cpp")
    assert spec_of(opt).logits.has("inner") and opt.report.sites[0].lowering.startswith("cpp")
    with torch.no_grad():
        torch.testing.assert_close(opt(*inputs), model(*inputs), atol=3e-6, rtol=1e-5)


# -- distances -----------------------------------------------------------------------------------
def squares(x: Tensor, y: Tensor) -> Tensor:
    return (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1)


@by_aten
@pytest.mark.parametrize("distance", [squares, torch.cdist])
def test_distances_are_computed_difference_by_difference(distance: Attention) -> None:
    def function(m: Model, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        x, y = 1000 + a[:, 0], 1000 + b[:, 0]  # far from the origin: expanded, the squares cancel
        return soft(q @ k.mT * 0.3 - 0.1 * distance(x, y)[:, None], v)
    model, inputs = Model(function).eval(), drawn(rank=3)
    opt = attnopt.optimize(model, tuple(inputs), verify=False)
    spec = spec_of(opt)
    assert spec.score == "dot" and not dense(spec) and not spec.logits.has("inner"), spec
    with torch.no_grad():
        truth = model(*(x.double() for x in inputs))
        assert (opt(*inputs).double() - truth).abs().max() < 2e-4  # 1000 + a is rounded by 3e-5


# -- kernels -------------------------------------------------------------------------------------
FACTORS = (Operand("f", ("h", "q"), role="factor"), Operand("g", ("b", "h", "k"), role="factor"))
INNER = E.inner("f", "g")


@pytest.mark.parametrize("lowering", [
    "aten:sdpa", pytest.param("cpp", marks=pytest.mark.slow)])
@pytest.mark.parametrize("lengths", [(1, 1), (5, 33), (37, 20)])
@pytest.mark.parametrize("logits", [
    E.score * 0.3 + INNER, E.score * 0.3 - INNER * 2.0 / 3.0, E.score * 0.3 * INNER,
    (E.score + E.load("slopes") * INNER) * 0.25 + E.load("slopes")])
def test_extra_columns_are_what_the_spec_means(lowering: str, lengths: tuple[int, int],
                                               logits: E.Expr) -> None:
    if lowering == "cpp" and kernels.missing():
        pytest.skip(kernels.missing())
    more = (Operand("slopes", ("h",)),) if logits.slots > {"f", "g"} else ()
    spec = Spec(logits=logits, operands=(*FACTORS, *more))
    assert kernels.low_rank.widening(spec) is not None
    rows, keys = lengths
    q, k, v = (torch.randn(B, H, n, D) for n in (rows, keys, keys))
    operands = [torch.randn(H, rows, R), torch.randn(B, H, R, keys).mT, torch.rand(H, 1, 1)]
    operands = operands[: 2 + len(more)]
    out = bind(str(spec), str(Schedule(lowering)))(q, k, v, *operands)
    wanted = kernels.reference(spec)(*(x.double() for x in (q, k, v)), operands)
    torch.testing.assert_close(out.double(), wanted, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("logits", [
    E.call("tanh", E.score + INNER), E.score * INNER + INNER, E.score + E.call("exp", INNER),
    E.score * INNER * E.load("slopes")])
def test_what_is_no_plain_term_is_not_widened(logits: E.Expr) -> None:
    spec = Spec(logits=logits, operands=(*FACTORS, Operand("slopes", ("h",)))).with_()
    assert kernels.low_rank.widening(spec) is None


# -- constants -----------------------------------------------------------------------------------
def table(name: str, n: int = 196) -> Tensor:
    g = torch.Generator().manual_seed(0)
    i = torch.arange(n)
    gap, x = i[None] - i[:, None], torch.randn(n, 3, generator=g)
    y, width = torch.randn(n, 14, generator=g), torch.randn(n, 14, generator=g)
    one, two = torch.randn(27, generator=g), torch.randn(27, generator=g)
    down, right = (i // 14)[:, None] - i // 14 + 13, (i % 14)[:, None] - i % 14 + 13
    found = {
        "alibi": 0.895 * gap, "symmetric alibi": -0.5 * gap.abs(), "squared gap": 0.01 * gap**2,
        "cos": torch.cos(0.3 * gap.double()), "distance": squares(x, x),
        "euclid": torch.cdist(x, x), "sam": (y[:, :, None] + width[:, None]).flatten(1),
        "regions": torch.where((i // 49)[:, None] == i // 49, 0.0, -100.0),
        "separable": one[down] + two[right], "swin": torch.randn(27, 27, generator=g)[down, right],
        "buckets": torch.randn(32, generator=g)[(gap.abs() + 1.0).log2().mul(2).long()],
        "nearly": y @ width.mT + 1e-3 * torch.randn(n, n, generator=g),
    }[name]
    return found.float()


@pytest.mark.parametrize(("name", "whole", "shifted"), [
    ("alibi", 2, 1), ("squared gap", 3, 2), ("cos", 2, 2), ("distance", 5, 4), ("sam", 27, 26),
    ("regions", 4, 3), ("separable", 27, 26)])
def test_known_ranks(name: str, whole: int, shifted: int) -> None:
    bias = table(name)[None]
    for shift, rank in ((False, whole), (True, shifted)):
        found = exact(bias, 40, shift)
        assert found is not None and found.rank == rank
        f, g = kernels.factors.factors(bias, found)
        wanted = kernels.factors.shifted(bias, found.shift)
        assert (f.double() @ g.double().mT - wanted).abs().max() < 2.5e-4


@pytest.mark.parametrize(
    "name", ["symmetric alibi", "euclid", "swin", "buckets", "nearly"])
def test_full_ranks_are_refused(name: str) -> None:
    assert exact(table(name)[None], 60, True) is None


def test_heads_have_ranks_of_their_own() -> None:
    bias = torch.stack([table("alibi"), table("distance"), torch.zeros(196, 196)])
    found = exact(bias, 8, True)
    assert found is not None and [len(rows) for rows, _ in found.pivots] == [1, 4, 0]
    assert exact(torch.zeros(1, 0, 4), 8, True) is None
    assert exact(torch.full((1, 4, 4), -math.inf), 8, True) is None


def added(m: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return soft(q @ k.mT * 0.3 + m.bias, v)


def multiplied(m: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return soft(q @ k.mT * 0.3 * m.bias, v)


def random_product(rank: int, n: int = N) -> Tensor:
    g = torch.Generator().manual_seed(rank)
    return torch.randn(H, n, rank, generator=g) @ torch.randn(H, rank, n, generator=g)


@by_aten
@pytest.mark.parametrize("function", [added, multiplied])
def test_a_constant_of_low_rank_is_read_no_more(function: Attention,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank_values, "largest", lambda *_: 8)
    model, inputs = Model(function, random_product(4)).eval(), drawn()[:3]
    opt = attnopt.optimize(model, tuple(inputs), verify=False)
    spec = spec_of(opt)
    assert spec.logits.has("inner") and not dense(spec)
    assert "exact low rank 4" in opt.report.sites[0].bias
    with torch.no_grad():
        torch.testing.assert_close(opt(*inputs), model(*inputs), atol=5e-6, rtol=2e-5)
        model.bias.add_(torch.randn(H, N, N))  # of full rank now: the guard sees it
        torch.testing.assert_close(opt(*inputs), model(*inputs), atol=5e-6, rtol=2e-5)


@by_aten
def test_a_constant_in_float64_keeps_its_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank_values, "largest", lambda *_: 8)
    model, inputs = Model(added, random_product(4)).eval().double(), drawn()[:3]
    opt = attnopt.optimize(model, tuple(x.double() for x in inputs), verify=False)
    with torch.no_grad():
        wide = [x.double() for x in inputs]
        torch.testing.assert_close(opt(*wide), model(*wide), atol=1e-13, rtol=1e-13)


@by_aten
def test_a_constant_is_read_where_that_is_as_cheap() -> None:
    model = Model(added, random_product(12)).eval()
    opt = attnopt.optimize(model, tuple(drawn()[:3]), verify=False)
    assert dense(spec_of(opt))


def test_the_device_decides() -> None:
    gpu, cpu = find_gpu("NVIDIA H200"), find_cpu("", "avx512")
    read = Reading(item=4, total=4 * 3 * 196 * 196)  # a few heads of a window: in the cache
    assert low_rank_pays(gpu, read, 27) and not low_rank_pays(cpu, read, 27)
    assert largest(cpu, read) < 8 < 64 < largest(gpu, read)
    far = Reading(item=4, total=4 * 12 * 1024 * 1024)
    assert 8 < largest(cpu, far) < largest(gpu, far)
    assert largest(gpu, read, "factor") <= 3
    assert 190 < break_even(gpu, 2) < 230 and break_even(gpu, 4) == 2 * break_even(gpu, 2)
    shared = Reading(item=4, total=read.total, sharers=64)
    assert largest(gpu, shared) < largest(gpu, read)


# -- positions in 16 bits --------------------------------------------------------------------------
LONG, LAST = 16_384, 16
SLOPES = torch.tensor([0.895, 0.0131])


def gaps(keys: int) -> Tensor:
    return torch.arange(keys)[None] - torch.arange(keys - LAST, keys)[:, None]


def in_float32(m: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    return SLOPES[:, None, None] * gaps(k.shape[2])


def cast(m: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    return in_float32(m, q, k).to(q.dtype)


def in_16_bits(m: nn.Module, q: Tensor, k: Tensor) -> Tensor:
    return SLOPES.to(q.dtype)[:, None, None] * gaps(k.shape[2]).to(q.dtype)


def held(m: Model, q: Tensor, k: Tensor) -> Tensor:
    return m.bias


@by_aten
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [in_float32, cast, in_16_bits, held])
def test_alibi_at_16384_keys_is_what_the_model_holds(
        dtype: torch.dtype, bias: Attention, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits within 1e-3 of the model's own, rounded or not, where the scores are 0."""
    def function(m: Model, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        own = bias(m, q, k)
        if own.dtype == torch.float32:
            return (scores.float() + own).softmax(-1).to(v.dtype) @ v
        return soft(scores + own, v)
    own = (SLOPES[:, None, None] * gaps(LONG)).to(dtype)
    model = Model(function, own).eval()
    inputs = [torch.zeros(1, 2, n, D, dtype=dtype) for n in (LAST, LONG, LONG)]
    opt = attnopt.optimize(model, tuple(inputs), verify=False)
    spec = spec_of(opt)
    assert bias is not in_float32 or not dense(spec)
    given: list[Tensor] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *operands: Tensor) -> Tensor:
        given[:] = operands
        return torch.zeros_like(q)
    monkeypatch.setattr(kernels.ops, "bind", lambda *_: spy)
    opt(*inputs)
    # The logits themselves, next to the last keys and in float32 as a kernel computes them.
    value = torch.cat([torch.zeros(LONG - 64, 64), torch.eye(64)]).expand(1, 2, -1, -1)
    found = aten.bind(str(Spec(
        logits=spec.logits, operands=spec.operands, normalizer="identity")))(
            *(x.float() for x in inputs[:2]), value, *given)
    wanted = bias(model, *inputs[:2]).double()[..., -64:]
    assert (found - wanted).abs().max() < 1e-3


# -- cut off on request ----------------------------------------------------------------------------
@by_aten
def test_a_bias_is_cut_within_the_tolerance() -> None:
    bias = random_product(3) + 1e-3 * torch.randn(H, N, N) + 7
    model, inputs = Model(added, bias).eval(), drawn()[:3]
    opt = attnopt.optimize(model, tuple(inputs), rules=[LowRank(error=0.02)])
    (site,) = opt.report.sites
    assert spec_of(opt).logits.has("inner") and "of rank 3" in site.approximation
    assert site.bias == "constant, cut to rank 3"
    with torch.no_grad():
        off = (opt(*inputs) - model(*inputs)).abs().max()
    assert 0 < off <= (math.exp(2 * 0.02) - 1) * inputs[2].abs().max()
    assert 0 < site.deviation < 0.02


@by_aten
@pytest.mark.parametrize(("error", "why"), [(1e-5, "no rank up to 8"), (0.02, "output")])
def test_a_bias_that_cannot_be_cut_is_kept_whole(error: float, why: str) -> None:
    bias = random_product(3) + 1e-3 * torch.randn(H, N, N)
    model, inputs = Model(added, bias).eval(), drawn()[:3]
    limit = {"output": 1e-7} if why == "output" else None
    opt = attnopt.optimize(model, tuple(inputs), rules=[LowRank(error=error, rank=8)],
                           approximate=limit)
    (site,) = opt.report.sites
    assert why == "output" or "not used" in site.approximation and why in site.approximation
    with torch.no_grad():
        torch.testing.assert_close(opt(*inputs), model(*inputs), atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("error", [0, -1.0, math.inf, "much", True])
def test_the_tolerance_is_a_number(error: Any) -> None:
    with pytest.raises(OptionError, match="error must be a number above 0"):
        LowRank(error=error)
