"""Sites measured one by one: what is written into their records, and what is shown of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.cost.devices import Cpu
from attnopt.cost.roofline import roof
from attnopt.errors import AttnOptError
from attnopt.ir.site import SiteRecord
from attnopt.passes.rules import cost
from attnopt.report import Report


class Causal(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
        first = (q @ k.mT / 4).masked_fill(hidden, -math.inf).softmax(-1) @ v
        return (first @ k.mT / 4).softmax(-1) @ v


class Breaks(Causal):
    """Dynamo finds two graphs."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super().forward(q, k, v)
        torch._dynamo.graph_break()
        return super().forward(out, k, v) if float(out.sum()) > 1e9 else out


@pytest.fixture(autouse=True)
def _take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "TAKE_ALL", True)


def _inputs(tokens: int = 64) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return tuple(torch.randn(2, 2, tokens, 16) for _ in range(3))


def _measured(report: Report) -> list[SiteRecord]:
    return [s for s in report.sites if s.measured_seconds is not None]


def test_measured_sites_are_in_every_form_of_the_report(tmp_path: Path) -> None:
    opt = attnopt.optimize(Causal(), _inputs())
    assert not _measured(opt.report)
    opt.report.to_html(tmp_path / "before.html")
    assert "not measured: report.measure(sites=True)" in (tmp_path / "before.html").read_text()

    report = opt.report
    assert report.measure(repeats=3, sites=True).ratios
    sites = [s for s in report.sites if s.status == "rewritten"]
    assert len(sites) == 2 and _measured(report) == sites and not report.notes
    for site in sites:
        assert site.measured_original and site.measured_seconds and site.measured_speedup
        assert site.measured_low is not None and site.measured_high is not None
        assert site.measured_low <= site.measured_speedup <= site.measured_high
        assert site.roofline and site.roofline_bound in ("compute", "memory")
    report.to_html(tmp_path / "after.html")
    page = (tmp_path / "after.html").read_text()
    assert "not measured" not in page and "of what the device allows" in page
    assert "Measured, each site alone:" in str(report) and "of the roofline" in str(report)
    again = Report.from_json(report.to_json())
    assert again.sites == report.sites and str(again) == str(report)
    assert json.loads(report.to_json())["sites"][0]["measured_seconds"] == sites[0].measured_seconds
    assert len(_measured(opt.report)) == 2  # a later report of the module knows them too


@pytest.mark.slow
def test_other_arguments_dynamic_lengths_and_training() -> None:
    tokens = torch.export.Dim("tokens", min=2, max=256)
    opt = attnopt.optimize(Causal(), _inputs(), dynamic_shapes=dict.fromkeys("qkv", {2: tokens}))
    opt.report.measure(_inputs(33), repeats=1, sites=True)
    assert len(_measured(opt.report)) == 2
    model = Causal().train()
    learned = attnopt.optimize(model, tuple(x.requires_grad_() for x in _inputs()))
    learned.report.measure(repeats=1, sites=True)
    taken = [s for s in learned.report.sites if s.status == "rewritten"]
    assert _measured(learned.report) == taken


@pytest.mark.slow
def test_graph_by_graph() -> None:
    opt = attnopt.optimize(Breaks(), _inputs())
    with torch.no_grad():
        opt(*_inputs())
        report = opt.report
        report.measure(repeats=1, sites=True)
    assert len(_measured(report)) == sum(s.status == "rewritten" for s in report.sites) > 0


def test_places_of_patterns() -> None:
    def both(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(a) * b, torch.tanh(a) + b

    def other(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        t = a.tanh()
        return t * b, t + b

    class Twice(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            first, second = both(a, b)
            return first.sin() + second

    rule = attnopt.register_rewrite(both, other, {"a": "n d", "b": "n d"}, register=False)
    opt = attnopt.optimize(Twice(), (torch.randn(8, 16), torch.randn(8, 16)), rules=[rule])
    report = opt.report
    report.measure(repeats=1, sites=True)
    site, = report.sites
    assert site.status == "rewritten" and site.measured_seconds and site.measured_original
    assert site.roofline is None and not report.notes  # its operations are not counted


def test_what_is_kept_is_not_measured_and_nothing_is_made_up() -> None:
    opt = attnopt.optimize(Causal(), _inputs(), only="nowhere")
    report = opt.report
    report.measure(repeats=1, sites=True)
    assert report.sites and not _measured(report)
    with pytest.raises(AttnOptError, match="sites cannot be measured"):
        alone = Report()
        alone.bind(lambda: 0, lambda: 0, ((), {}))
        alone.measure(repeats=1, sites=True)


def test_inputs_and_parameters_are_as_before() -> None:
    class Writes(Causal):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.seen.add_(1)
            return super().forward(q, k, v)

    model, inputs = Writes(), _inputs()
    held = [x.clone() for x in inputs]
    opt = attnopt.optimize(model, inputs)
    calls = opt.report
    calls.measure(repeats=2, sites=True)
    counted = float(model.seen)
    opt.report._measure_sites(inputs, {}, 2, 1)
    assert float(model.seen) == counted
    assert all(torch.equal(a, b) for a, b in zip(held, inputs, strict=True))


def test_the_roof_is_the_higher_of_two_bounds() -> None:
    cpu = Cpu("made up", cores=2, gemm={"float32": 100.0}, memory=10.0, cache=40.0, l3=1 << 20)
    assert roof(cpu, 1e9, 1e3) == roof(cpu, 1e9, 0.0)
    compute, memory = roof(cpu, 1e9, 1e3), roof(cpu, 1e3, 1e9)
    assert compute is not None and memory is not None
    assert (compute.seconds, compute.bound) == (pytest.approx(0.01), "compute")
    assert (memory.seconds, memory.bound) == (pytest.approx(0.1), "memory")
    cached = roof(cpu, 0.0, 1 << 20)
    assert cached is not None and cached.seconds == pytest.approx((1 << 20) / 40e9)
    both = roof(cpu, 1e9, 0.0, threads=8)
    assert both is not None and both.seconds == pytest.approx(0.005)
    assert roof(cpu, 0.0, 0.0) is None and roof(Cpu("unknown"), 1e9, 0.0) is None


@pytest.mark.parametrize("lowering", ["cpp", "cpp:window", "triton"])
def test_texts_of_generated_kernels(lowering: str) -> None:
    from attnopt.ir.mask import ALL
    from attnopt.ir.mask import Causal as CausalMask
    from attnopt.ir.spec import Schedule, Spec
    from attnopt.kernels.sources import source_of

    mask = ALL if lowering == "cpp:window" else CausalMask()
    tile = {"cpp": (8, 64, 4, 1), "cpp:window": (16, 64, 4, 1), "triton": (64, 64, 4, 2)}[lowering]
    dtype = torch.float16 if lowering == "triton" else torch.float32
    tensors = [torch.empty(2, 2, 16, 32, dtype=dtype) for _ in range(3)]
    text = source_of(Spec(mask=mask), Schedule(lowering, tile), tensors)
    assert ("def forward(" in text) == (lowering == "triton") and len(text) > 1000
