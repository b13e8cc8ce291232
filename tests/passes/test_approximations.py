"""Approximations that a user asks for: their definitions, and that they are used and verified."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.approximations import HiP, MoBA, Radial, SinkWindow
from attnopt.errors import OptionError
from attnopt.ir.mask import Where
from attnopt.kernels import block_maps
from attnopt.passes import approximate
from attnopt.passes.rules import cost


class Model(nn.Module):
    """Causal or dense self-attention, as an author writes it."""

    def __init__(self, causal: bool = True, scale: float = 1.0) -> None:
        super().__init__()
        self.causal, self.scale = causal, nn.Parameter(torch.tensor(scale))

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = self.scale * query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if self.causal:
            keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            scores = scores.masked_fill(~keep, -math.inf)
        return scores.softmax(-1) @ value


def tensors(length: int = 70, dtype: torch.dtype = torch.float32, heads: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(1, heads, length, 16, generator=generator).to(dtype) for _ in range(3)]


def dense(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v.double()


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def spread(blocks: Tensor, block_q: int, block_k: int, length: int) -> Tensor:
    rows = blocks.repeat_interleave(block_q, -2)[..., :length, :]
    return rows.repeat_interleave(block_k, -1)[..., :length]


# -- definitions ----------------------------------------------------------------------------------
@pytest.mark.parametrize(("length", "frames", "tokens", "decay", "sink", "sparsity"), [
    (69120, 18, 3840, 0.2, True, 0.7129), (115200, 30, 3840, 0.95, False, 0.7254),
    (115200, 30, 3840, 1.0, False, 0.7068)])
def test_radial_is_as_sparse_as_published(length: int, frames: int, tokens: int, decay: float,
                                          sink: bool, sparsity: float) -> None:
    kept = block_maps.radial(length, frames, tokens, decay, sink, 128)
    assert 1 - float(kept.double().mean()) == pytest.approx(sparsity, abs=1e-4)


@pytest.mark.parametrize("tokens", [32, 20, 37])
@pytest.mark.parametrize("sink", [False, True])
def test_radial_blocks_against_the_definition(tokens: int, sink: bool) -> None:
    frames, block, decay, length = 5, 8, 0.6, 5 * tokens + 3
    side, count = -(-length // block), -(-tokens // block)
    wanted = torch.zeros(side, side, dtype=torch.bool)
    wanted[frames * tokens // block:], wanted[:, frames * tokens // block:] = True, True
    k, l = torch.arange(tokens)[:, None], torch.arange(tokens)  # noqa: E741
    for i in range(frames):
        for j in range(frames):
            width = block_maps.band(abs(i - j), tokens, decay, block)
            if sink and j == 0:
                width = tokens
            if width is None:
                continue
            part = torch.zeros((count + 1) * block, (count + 1) * block)
            row, column = i * tokens % block, j * tokens % block
            part[row : row + tokens, column : column + tokens] = ((k - l).abs() <= width).float()
            part = part[: count * block, : count * block]
            share = part.unflatten(0, (count, block)).unflatten(2, (count, block)).mean(1)
            kept = (share > 1 / 3).sum(-1) / ((share > 0).sum(-1) + 1e-9) > 0.6
            r, c = i * tokens // block, j * tokens // block
            kept = kept[: side - r, : side - c]
            wanted[r : r + len(kept), c : c + kept.shape[1]] |= kept
    assert torch.equal(block_maps.radial(length, frames, tokens, decay, sink, block), wanted)


def test_thin_frames_are_kept_at_some_distances() -> None:
    """t = 64: a reach of 64 / P2(d) is below 128 for all, so d must be a multiple of 2 P2(d)."""
    kept = [block_maps.band(d, 64, 1.0, 16) for d in range(9)]
    assert kept[:3] == [64, 64, None] and kept[4] is None
    assert block_maps.band(2, 256, 1.0, 16) == 128 and block_maps.band(3, 512, 0.01, 16) == 16


def test_paper_mask_against_the_formula() -> None:
    rule = Radial(7, 12, definition="paper")
    mask = Where(rule._paper(90)).to_dense(90, 90)
    for q in range(90):
        for k in range(90):
            i, j, a, b = q // 12, k // 12, q % 12, k % 12
            d = abs(i - j)
            octave = 2 ** int(math.log2(max(d, 1)))
            wanted = (octave <= 12 and abs(a - b) + 1 <= 12 / octave) or (
                d % math.ceil(octave / 12) == 0 and a == b) or j == 0
            if d == 0:
                wanted = True
            if q < 84 and k < 84:
                assert bool(mask[q, k]) == wanted, (q, k)
            else:
                assert bool(mask[q, k])


def test_moba_against_the_definition() -> None:
    q, k, _ = tensors(45)
    text = json.dumps({"pattern": "moba", "block": 8, "top": 3})
    kept = block_maps.block_map([q, k], [45, 45], text)
    assert kept.shape == (1, 2, 45, 6)
    for h in range(2):
        for row in range(45):
            own = row // 8
            gates = {n: float(q[0, h, row] @ k[0, h, 8 * n : 8 * n + 8].mean(0))
                     for n in range(own)}
            best = sorted(gates, key=lambda n: -gates[n])[:2]
            assert kept[0, h, row].nonzero().flatten().tolist() == sorted([*best, own])


def test_hip_against_a_plain_search() -> None:
    q, k, _ = tensors(100)
    text = json.dumps({"pattern": "hip", "block_q": 16, "block": 4, "keep": 12, "window": 8})
    kept = block_maps.block_map([q, k], [100, 100], text)
    assert kept.shape == (1, 2, 7, 25)
    for h in range(2):
        for b in range(7):
            before = min(16 * b + 16, 100) - 8
            if before <= 12:
                wanted = list(range(-(-before // 4)))
            else:
                wanted = _plain_search(q[0, h, 16 * b : 16 * b + 16][1::2], k[0, h, :before], 4, 3)
            assert kept[0, h, b].nonzero().flatten().tolist() == sorted(wanted)
    every = block_maps.block_map([q, k], [100, 100], text.replace("12", "200"))
    assert bool((spread(every, 16, 4, 100) | ~(causal(100).tril(-8))).all())


def _plain_search(query: Tensor, key: Tensor, block: int, groups: int) -> list[int]:
    count = -(-len(key) // block)
    edges = [int(count / groups * i) for i in range(groups)] + [count]
    held = [(a, b - a) for a, b in zip(edges, edges[1:], strict=False)]
    while max(size for _, size in held) > 1:
        halves = [half for start, size in held
                  for half in ((start, size // 2), (start + size // 2, size - size // 2))
                  if half[1]]
        halves.sort(key=lambda half: -float(
            (query @ key[half[0] * block : half[0] * block + block].T).max()))
        held = halves[:groups]
    return [start for start, _ in held]


# -- use ------------------------------------------------------------------------------------------
def _sink_window(n: int) -> Tensor:
    place = torch.arange(n)
    return causal(n) & ((place[:, None] - place < 9) | (place < 2))


RULES: dict[str, tuple[Any, bool, Any]] = {
    "sink-window": (SinkWindow(9, 2), True, lambda q, k, n: _sink_window(n)),
    "window": (SinkWindow(9, 0), True, lambda q, k, n: causal(n) & ~causal(n).tril(-9)),
    "radial": (Radial(4, 16, block=8, decay=0.5), False, lambda q, k, n: spread(
        block_maps.radial(n, 4, 16, 0.5, False, 8), 8, 8, n)),
    "radial paper": (Radial(4, 16, definition="paper"), False, lambda q, k, n: Where(
        Radial(4, 16, definition="paper")._paper(n)).to_dense(n, n)),
    "moba": (MoBA(8, 2), True, lambda q, k, n: causal(n) & spread(block_maps.block_map(
        [q, k], [n, n], '{"pattern": "moba", "block": 8, "top": 2}'), 1, 8, n)),
    "hip": (HiP(16, 8, 2, 4), True, lambda q, k, n: causal(n) & (~causal(n).tril(-4) | spread(
        block_maps.block_map([q, k], [n, n], '{"pattern": "hip", "block_q": 8, "block": 2, '
                             '"keep": 16, "window": 4}'), 8, 2, n)))}


@pytest.fixture(autouse=True)
def _any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "FEWEST_SCORES", 0)


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_what_it_says(name: str, dtype: torch.dtype) -> None:
    rule, is_causal, keep = RULES[name]
    given = tensors(70, dtype)
    model = Model(is_causal).to(dtype).eval()
    with torch.no_grad():
        optimized = attnopt.optimize(model, tuple(given), rules=[rule], backend="aten")
        found = optimized(*given)
    site = optimized.report.sites[0]
    assert site.status == "rewritten" and site.rule.startswith(rule.name), site
    assert site.approximation == rule.describe() and site.deviation is not None
    assert 0 < site.deviation < 2 and site.error is not None and site.error <= site.error_bound
    wanted = dense(*given, keep(given[0], given[1], 70))
    assert (found - wanted).abs().max() < (3e-2 if dtype == torch.bfloat16 else 2e-6)
    text = " ".join(str(optimized.report).split())
    assert "Approximate, as asked for:" in text and "changes the result by" in text
    assert "Approximate, as asked for" in optimized.report._repr_html_()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["radial", "moba", "hip"])
def test_a_generated_kernel(name: str) -> None:
    given = tensors(70)
    rule, is_causal, keep = RULES[name]
    with torch.no_grad():
        optimized = attnopt.optimize(Model(is_causal).eval(), tuple(given), rules=[rule],
                                     backend="cpp")
        found = optimized(*given)
    assert optimized.report.sites[0].lowering.startswith("cpp")
    assert (found - dense(*given, keep(given[0], given[1], 70))).abs().max() < 2e-6


def test_never_by_themselves() -> None:
    given = tensors(70)
    model = Model().eval()
    for rules in (None, ["fused-softmax"], [SinkWindow(9, path="other.*")], [Radial(8, 16)]):
        with torch.no_grad():
            optimized = attnopt.optimize(model, tuple(given), rules=rules, backend="aten")
            assert (optimized(*given) - model(*given)).abs().max() < 2e-6
        site = optimized.report.sites[0]
        assert site.rule == "fused-softmax" and site.deviation is None
    assert "8 x 16 tokens, got 70" in site.approximation
    assert "not used, radial" in str(optimized.report)


def test_declined() -> None:
    q, k, v = tensors(70)
    for model, args, rule in (
            (Model(False), (q, k, v), MoBA(8, 2)), (Model(False), (q, k, v), HiP()),
            (Model(False), (q, k[:, :, :40], v[:, :, :40]), Radial(4, 16)),
            (Model(), (q[:, :, :40], k, v), SinkWindow(9))):
        with torch.no_grad():
            optimized = attnopt.optimize(model.eval(), args, rules=[rule], backend="aten")
            assert (optimized(*args) - model(*args)).abs().max() < 2e-6
        assert optimized.report.sites[0].approximation.startswith("not used")
    for make in (lambda: SinkWindow(0), lambda: SinkWindow(3, -1), lambda: MoBA(8, 0),
                 lambda: Radial(2, 2, decay=0), lambda: HiP(keep=1.5),  # type: ignore[arg-type]
                 lambda: Radial(2, 2, definition="mine")):  # type: ignore[arg-type]
        with pytest.raises(OptionError, match="must be"):
            make()


@pytest.mark.parametrize(("bound", "status"), [(1e-6, "kept"), (1e6, "rewritten")])
def test_a_tolerance(bound: float, status: str) -> None:
    given = tuple(tensors(70))
    with torch.no_grad():
        optimized = attnopt.optimize(Model().eval(), given, rules=[SinkWindow(9)],
                                     approximate={"output": bound}, backend="aten")
    site = optimized.report.sites[0]
    assert site.status == status
    assert status == "rewritten" or "the approximation changes the result by" in site.reason


def test_a_wrong_result_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = tuple(tensors(70))
    with monkeypatch.context() as patch:
        own = approximate.judge
        patch.setattr(approximate, "judge", lambda *args: own(*args[:6], 1.001 * args[6], args[7]))
        with torch.no_grad():
            optimized = attnopt.optimize(Model().eval(), given, rules=[SinkWindow(9)],
                                         backend="aten")
    assert "off by" in optimized.report.sites[0].reason
    reduced = approximate.reduced

    def wrong(*args: Any) -> Any:
        site = reduced(*args)
        site.spec = site.spec.with_(logits=site.spec.logits * 2.0)
        return site

    monkeypatch.setattr(approximate, "reduced", wrong)
    with torch.no_grad():
        optimized = attnopt.optimize(Model().eval(), given, rules=[SinkWindow(9)], backend="aten")
    assert "nothing but the mask" in optimized.report.sites[0].reason
    assert (optimized(*given) - Model()(*given)).abs().max() < 2e-6


@pytest.mark.parametrize("rule", [SinkWindow(9, 2), MoBA(8, 2)])
def test_other_lengths(rule: Any) -> None:
    name = rule.name
    length = torch.export.Dim("length", min=2, max=512)
    with torch.no_grad():
        optimized = attnopt.optimize(Model().eval(), tuple(tensors(70)), rules=[rule],
                                     dynamic_shapes=({2: length},) * 3, backend="aten")
        assert optimized.report.sites[0].status == "rewritten", optimized.report
        for n in (33, 101):
            q, k, v = tensors(n)
            wanted = dense(q, k, v, RULES[name][2](q, k, n))
            assert (optimized(q, k, v) - wanted).abs().max() < 2e-6
    assert optimized.report.calls["hits"] == 2


def test_gradients() -> None:
    given = [t.requires_grad_() for t in tensors(70)]
    model = Model().train()
    optimized = attnopt.optimize(model, tuple(given), rules=[SinkWindow(9, 2)], backend="aten")
    assert optimized.report.sites[0].status == "rewritten"
    cotangent = torch.randn(1, 2, 70, 16)
    found = torch.autograd.grad(optimized(*given), given, cotangent)
    wanted = torch.autograd.grad(dense(*given, _sink_window(70)), given, cotangent.double())
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(found, wanted, strict=True))


def test_rows_left_without_a_key_are_refused() -> None:
    class Padded(nn.Module):
        def forward(self, query: Tensor, key: Tensor, value: Tensor, present: Tensor) -> Tensor:
            scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
            keep = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
            keep = keep & present[:, None, None, :]
            return scores.masked_fill(~keep, -math.inf).softmax(-1) @ value

    present = torch.ones(1, 70, dtype=torch.bool)
    present[:, 20:50] = False
    given = (*tensors(70), present)
    with torch.no_grad():
        optimized = attnopt.optimize(Padded().eval(), given, rules=[SinkWindow(9, 0)],
                                     backend="aten")
        site = optimized.report.sites[0]
        assert site.status == "kept" and "without a key" in site.reason
        kept = attnopt.optimize(Padded().eval(), given, rules=[SinkWindow(9, 2)], backend="aten")
    assert kept.report.sites[0].status == "rewritten"
