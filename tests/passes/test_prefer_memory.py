"""prefer="memory": nothing of queries x keys is held where there is another way.

Peaks are measured with the memory meter, as bytes above what was there before the call.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt
from attnopt.bench.memory import peak
from attnopt.passes.rules import REGISTRY, cost, memory
from attnopt.rules import Region

HEADS, D, N = 4, 16, 2048
CPU = torch.device("cpu")
#: bytes of one float32 tensor of all scores
SCORES = 4 * HEADS * N * N


class Model(nn.Module):
    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.table = nn.Embedding(33, HEADS)
        self.register_buffer("slopes", torch.tensor([0.5, 0.25, 0.125, 0.0625]))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.attend(self, q, k, v)


def distance(q: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2])
    return at[None] - at[:, None]


def buckets(model: Any, q: Tensor) -> Tensor:
    bias: Tensor = model.table(distance(q).clamp(-16, 16) + 16)
    return bias.permute(2, 0, 1)[None]


def composed(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return (q @ k.mT / math.sqrt(q.shape[-1]) + bias).softmax(-1) @ v


def bucketed(model: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return composed(q, k, v, buckets(model, q))


def bucketed_fused(model: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, buckets(model, q))


def alibi(model: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    bias = model.slopes[:, None, None] * distance(q)
    return composed(q, k, v, bias.masked_fill(distance(q) > 0, -torch.inf))


def windowed(model: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return composed(q, k, v, torch.zeros(()).where(distance(q).abs() < 40, -torch.inf))


def softcapped(model: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (30 * torch.tanh(q @ k.mT / 30)).softmax(-1) @ v


ALL = (bucketed, bucketed_fused, alibi, windowed, softcapped)


def inputs(length: int = N) -> tuple[Tensor, ...]:
    return tuple(torch.randn(1, HEADS, length, D) for _ in range(3))


def optimized(attend: Callable[..., Tensor], example: tuple[Tensor, ...], **options: Any) -> Any:
    model = Model(attend).eval()
    return model, attnopt.optimize(model, example, **{
        "verify": False, "prefer": "memory", "backend": "aten", **options})


@pytest.mark.parametrize("attend", [ALL[0], *(
    pytest.param(f, marks=pytest.mark.slow) for f in ALL[1:])], ids=lambda f: f.__name__)
def test_the_peak_is_far_below_one_tensor_of_scores(attend: Callable[..., Tensor]) -> None:
    example = inputs()
    model, opt = optimized(attend, example)
    (site,) = opt.report.sites
    assert site.status == "rewritten", site.tried
    with torch.no_grad():
        torch.testing.assert_close(opt(*example), model(*example), atol=3e-6, rtol=1e-5)
        used = peak(lambda: opt(*example), CPU)
    if used is None:
        pytest.skip("no memory meter here")
    assert used < SCORES / 3, (used, site.spec)
    assert "of queries x keys" in site.memory
    assert "Memory, as preferred to speed" in str(opt.report)


@pytest.mark.parametrize("attend", [bucketed, alibi], ids=lambda f: f.__name__)
def test_fused_attention_with_a_mask_of_its_own_is_what_speed_takes(
        attend: Callable[..., Tensor]) -> None:
    example = inputs(256)
    fast, small = (optimized(attend, example, prefer=p)[1] for p in ("speed", "memory"))
    (fast,), (small,) = fast.report.sites, small.report.sites
    assert (fast.lowering, small.lowering) == ("aten:sdpa", "aten:blocks")
    assert fast.memory == ""
    assert "row blocks hold none" in "".join(small.tried)
    assert small.memory.startswith("holds nothing of queries x keys instead of 3 MB")


@pytest.mark.slow
def test_generated_kernels_hold_nothing() -> None:
    example = inputs(256)
    model, opt = optimized(bucketed, example, backend="cpp")
    (site,) = opt.report.sites
    if site.status != "rewritten":
        pytest.skip(site.reason)
    assert site.lowering.startswith("cpp") and "holds nothing" in site.memory
    with torch.no_grad():
        torch.testing.assert_close(opt(*example), model(*example), atol=3e-6, rtol=1e-5)


def test_small_sites_are_taken_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "FEWEST_SCORES", 32_768)
    example = inputs(8)
    model, opt = optimized(bucketed, example)
    assert opt.report.sites[0].status == "rewritten"
    fast = optimized(bucketed, example, prefer="speed")[1].report.sites[0]
    assert fast.status == "canonical", (fast.rule, fast.lowering, fast.tried)
    with torch.no_grad():
        torch.testing.assert_close(opt(*example), model(*example))


def test_lengths_that_change() -> None:
    auto = torch.export.Dim.AUTO
    example = inputs(64)
    model, opt = optimized(alibi, example, dynamic_shapes=({2: auto}, {2: auto}, {2: auto}))
    assert opt.report.sites[0].lowering == "aten:blocks"
    for length in (64, 3, 130):
        again = inputs(length)
        with torch.no_grad():
            torch.testing.assert_close(opt(*again), model(*again), atol=3e-6, rtol=1e-5)
    assert opt.report.calls == {"hits": 3}


def test_what_the_user_holds_is_read() -> None:
    """A bias that is an input is held by the user: nothing holds less than to read it."""
    class Given(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
            return composed(q, k, v, bias)

    example = (*inputs(128), torch.randn(1, HEADS, 128, 128))
    opt = attnopt.optimize(Given().eval(), example, prefer="memory", backend="aten", verify=False)
    (site,) = opt.report.sites
    assert site.status == "rewritten"
    assert site.memory == "holds 256 KB of queries x keys instead of 768 KB"


def test_a_fused_call_of_the_author_without_a_mask_is_left_alone() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    opt = attnopt.optimize(Plain().eval(), inputs(128), prefer="memory", backend="aten",
                           verify=False)
    assert opt.report.sites[0].status == "canonical"


@pytest.mark.slow
def test_the_price_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is slower than a composition is taken, and the report says so."""
    seen: list[Region] = []
    rule = next(r for r in REGISTRY if r.name == "generated")
    monkeypatch.setattr(type(rule), "match", _seeing(type(rule).match, seen))
    monkeypatch.setattr(cost, "original", lambda region, problem: 1e-9)
    opt = optimized(bucketed, inputs(64), backend="cpp")[1]
    (site,) = opt.report.sites
    if not seen or "cpp" not in site.lowering:
        pytest.skip("no generated kernels here")
    assert "instead of 192 KB; predicted " in site.memory
    assert memory.of_author(seen[0]) == 3 * HEADS * 64 * 64
    assert optimized(bucketed, inputs(64), backend="cpp", prefer="speed"
                     )[1].report.sites[0].status == "canonical"


def _seeing(match: Callable[..., Any], seen: list[Region]) -> Callable[..., Any]:
    def run(self: Any, region: Region) -> Any:
        seen.append(region)
        return match(self, region)
    return run
