"""Sparsity that is decided at run time: block maps and lifetimes of keys, exact for any choice.

All run without verification: the rewrite itself must be right for numbers with and without ties,
with padding, at other lengths, and for its gradients. Most evaluate the Spec by ATen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.ir import expr as E
from attnopt.ir.mask import BlockMap, Causal, KeyLifetime, Where
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import lifetimes, living_keys
from attnopt.kernels.bind import bind
from attnopt.kernels.lifetimes import Choice, key_lifetimes
from tests.spellings.dynamic_spellings import CHOICES, SPREADS, TOP_KEYS, Blocks, TopKeys

AUTO = torch.export.Dim.AUTO
LOW = torch.finfo(torch.float32).min
pytestmark = pytest.mark.usefixtures("by_aten")


def heads(b: int, h: int, n: int, d: int = 8, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(b, h, n, d, dtype=dtype) for _ in range(3)]


def optimized(model: nn.Module, inputs: Sequence[Tensor], dims: dict[int, list[int]] | None = None
              ) -> tuple[nn.Module, Spec]:
    shapes = None if dims is None else tuple(
        {d: AUTO for d in dims.get(i, [])} for i in range(len(inputs)))
    opt = attnopt.optimize(model.eval(), tuple(inputs), verify=False, dynamic_shapes=shapes)
    (site,) = opt.report.sites
    assert site.status == "rewritten", site.reason
    return opt, Spec.parse(site.spec)


def same(opt: nn.Module, model: nn.Module, inputs: Sequence[Tensor]) -> None:
    """Equal results; what is chosen in float32 is chosen alike in float64."""
    exact = model(*(t.double() if t.is_floating_point() else t for t in inputs))
    own, other = model(*inputs), opt(*inputs)
    assert torch.equal(own.isnan(), other.isnan())
    limit = 4 * (own - exact).abs().nan_to_num().max() + 1e-6
    assert ((other - exact).abs().nan_to_num() <= limit).all()


# -- block maps -----------------------------------------------------------------------------------
@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("choice", CHOICES)
def test_the_choice_of_blocks_is_the_operand(choice: str, spread: str) -> None:
    model = Blocks(8, 3, choice, spread, fused=spread in ("gather", "index"))
    inputs = heads(2, 2, 64)
    opt, spec = optimized(model, inputs)
    assert {o.axes for o in spec.operands} == {None}
    assert Causal() in spec.mask.walk()
    maps = [m for m in spec.mask.walk() if isinstance(m, BlockMap)]
    assert [(m.block_q, m.block_k) for m in maps] == [(1, 8)] or choice == "one_hot"
    same(opt, model, inputs)
    for other in (heads(2, 2, 64), [torch.zeros_like(t) for t in inputs]):
        same(opt, model, other)  # another choice; all ties


def test_blocks_without_a_causal_mask_and_with_all_of_them_kept() -> None:
    for count in (2, 100):
        model = Blocks(8, count, causal=False)
        inputs = heads(2, 2, 64)
        opt, spec = optimized(model, inputs)
        assert any(isinstance(m, BlockMap) for m in spec.mask.walk())
        same(opt, model, inputs)


def test_blocks_of_queries_too() -> None:
    class Coarse(nn.Module):
        """One choice for a block of queries, as in HiP, and a window beside it."""

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            n = query.shape[2]
            pooled = [t.unflatten(2, (-1, 8)).mean(3) for t in (query, key)]
            gate = pooled[0] @ pooled[1].mT
            best = gate.topk(3, -1).indices
            kept = torch.zeros_like(gate).scatter_(-1, best, 1.0).bool()
            keep = kept.repeat_interleave(8, -1).repeat_interleave(8, -2)
            far = torch.arange(n)[:, None] - torch.arange(n)
            keep = (keep | (far < 4)) & (far >= 0)
            scores = (query @ key.mT).masked_fill(~keep, LOW)
            return scores.softmax(-1) @ value

    model, inputs = Coarse(), heads(2, 2, 64)
    opt, spec = optimized(model, inputs)
    assert {o.axes for o in spec.operands} == {None}
    same(opt, model, inputs)
    same(opt, model, heads(2, 2, 64))


def test_blocks_at_another_length_and_batch() -> None:
    model, inputs = Blocks(8, 3, spread="index"), heads(2, 2, 64)
    dims = {i: [0, 2] for i in range(3)}
    opt, _ = optimized(model, inputs, dims)
    for b, n in ((2, 64), (1, 96), (3, 40)):
        same(opt, model, heads(b, 2, n))


def test_gradients_with_a_block_map() -> None:
    model = Blocks(8, 3).double()
    inputs = [t.double().requires_grad_() for t in heads(1, 2, 64)]
    opt, _ = optimized(model, inputs)
    found = [torch.autograd.grad(m(*inputs).square().sum(), inputs) for m in (model, opt)]
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


@pytest.mark.slow
def test_block_maps_skip_tiles_in_the_kernel(compiled: None) -> None:
    model, inputs = Blocks(64, 2, fused=True), heads(1, 2, 512, 16)
    opt, _ = optimized(model, inputs)
    same(opt, model, inputs)
    same(opt, model, [torch.ones_like(t) for t in inputs])


# -- lifetimes of keys ----------------------------------------------------------------------------
def numbers(b: int, h: int, n: int, kind: str = "plain") -> Tensor:
    drawn = torch.nn.functional.softplus(torch.randn(b, h, n)).exp()
    return {"plain": drawn, "few ties": (drawn * 30).round(), "ties": drawn.round(),
            "constant": torch.ones_like(drawn)}[kind]


KINDS = ("plain", "few ties", "ties", "constant")


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "composed"])
@pytest.mark.parametrize("choice", TOP_KEYS)
def test_the_best_keys_of_rows_are_lifetimes(choice: str, fused: bool) -> None:
    model = TopKeys(6, choice, fused)
    inputs = [*heads(2, 2, 40), numbers(2, 2, 40)]
    inputs[0] = torch.randn(2, 4, 40, 8)  # grouped queries
    opt, spec = optimized(model, inputs)
    assert any(isinstance(m, KeyLifetime) for m in spec.mask.walk())
    assert not any({"q", "k"} <= set(o.axes or ()) for o in spec.operands if o.dtype == E.FLOAT)
    for kind in KINDS:
        same(opt, model, [*inputs[:3], numbers(2, 2, 40, kind)])


@pytest.mark.parametrize("choice", TOP_KEYS)
def test_padding_beside_lifetimes(choice: str) -> None:
    model = TopKeys(6, choice)
    padding = torch.rand(2, 40) > 0.4
    padding[0, :9] = False  # rows that see nothing
    inputs = [*heads(2, 2, 40), numbers(2, 2, 40), padding]
    opt, spec = optimized(model, inputs)
    assert any(isinstance(m, KeyLifetime) for m in spec.mask.walk())
    for kind in KINDS:
        for ok in (padding, padding.roll(1, 0), torch.ones_like(padding),
                   torch.zeros_like(padding)):
            same(opt, model, [*inputs[:3], numbers(2, 2, 40, kind), ok])


def test_gradients_of_rows_that_see_nothing() -> None:
    model = TopKeys(6)
    padding = torch.rand(2, 40) > 0.4
    padding[0, :9] = False
    inputs = [*heads(2, 2, 40), numbers(2, 2, 40)]
    opt, _ = optimized(model, [*inputs, padding])
    for kind in KINDS:
        leaves = [t.clone().requires_grad_() for t in (*inputs[:3], numbers(2, 2, 40, kind))]
        found = [torch.autograd.grad(m(*leaves, padding).square().sum(), leaves)
                 for m in (model, opt)]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("queries", [40, 9, 1])
def test_rows_at_the_end_of_the_keys(queries: int) -> None:
    model = TopKeys(6)
    inputs = [*heads(1, 2, 40), numbers(1, 2, 40)]
    inputs[0] = inputs[0][:, :, :queries]
    if queries == 1:
        same(attnopt.optimize(model.eval(), tuple(inputs), verify=False), model, inputs)
        return
    opt, _ = optimized(model, inputs)
    for kind in KINDS:
        same(opt, model, [*inputs[:3], numbers(1, 2, 40, kind)])


def test_every_row_sees_all_keys() -> None:
    model = TopKeys(6, causal=False)
    inputs = [*heads(1, 2, 40), numbers(1, 2, 40)]
    opt, _ = optimized(model, inputs)
    for kind in KINDS:
        same(opt, model, [*inputs[:3], numbers(1, 2, 40, kind)])


def test_lifetimes_at_another_length_and_batch() -> None:
    model = TopKeys(6)
    inputs = [*heads(2, 2, 40), numbers(2, 2, 40)]
    opt, _ = optimized(model, inputs, {0: [0, 2], 1: [0, 2], 2: [0, 2], 3: [0, 2]})
    for b, n in ((2, 40), (1, 57), (3, 9), (2, 4)):
        for kind in KINDS:
            same(opt, model, [*heads(b, 2, n), numbers(b, 2, n, kind)])


def test_numbers_that_have_no_order() -> None:
    model = TopKeys(6)
    inputs = [*heads(1, 2, 40), numbers(1, 2, 40)]
    opt, _ = optimized(model, inputs)
    for odd in (math.nan, math.inf, -math.inf, LOW):
        strange = numbers(1, 2, 40)
        strange[0, 0, 17] = odd
        call = (*inputs[:3], strange)
        own, other = model(*call), opt(*call)
        assert torch.equal(own.isnan(), other.isnan())
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_a_choice_among_hidden_keys_is_carried() -> None:
    class Unfilled(nn.Module):
        """Top-k of filled numbers, but the mask is only the choice: fills are chosen, too."""

        def forward(self, query: Tensor, key: Tensor, value: Tensor, given: Tensor) -> Tensor:
            n = key.shape[2]
            seen = torch.ones(n, n, dtype=torch.bool).tril()
            filled = given[:, :, None].expand(-1, -1, n, -1).masked_fill(~seen, LOW)
            chosen = torch.zeros(filled.shape, dtype=torch.bool).scatter(
                -1, filled.topk(6).indices, True)
            return (query @ key.mT).masked_fill(~chosen, -math.inf).softmax(-1) @ value

    model = Unfilled()
    inputs = [*heads(1, 2, 40), numbers(1, 2, 40)]
    opt = attnopt.optimize(model.eval(), tuple(inputs), verify=False)
    assert "key_lifetime" not in (opt.report.sites[0].spec or "")
    same(opt, model, inputs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "few ties", "constant"])
def test_blocks_of_rows_gather_their_living_keys(kind: str, compiled: None,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(living_keys, "ROWS", 32)
    monkeypatch.setattr(living_keys, "LARGEST", 1 << 16)
    model = TopKeys(20)
    padding = torch.ones(2, 300, dtype=torch.bool)
    padding[1, :50] = False
    inputs = [*heads(2, 2, 300, 16), numbers(2, 2, 300, kind), padding]
    inputs[0] = torch.randn(2, 4, 300, 16)
    opt, spec = optimized(model, inputs)
    assert living_keys.slots_of(spec) is not None
    same(opt, model, inputs)
    padding[0, 250:] = False
    same(opt, model, inputs)


# -- the op ---------------------------------------------------------------------------------------
def chosen_of(values: Tensor, choice: Choice, valid: Tensor, rows: int, offset: int) -> Tensor:
    """(*L, Q, K): the author's selection of keys that a row sees."""
    keys = values.shape[-1]
    seen = valid.expand(*values.shape[:-2], rows, keys)
    if choice.causal:
        seen = seen & (torch.arange(keys) <= torch.arange(rows)[:, None] + offset)
    filled = torch.where(seen, values, choice.fill).to(values.dtype)
    best = filled.topk(choice.count, -1, True, choice.sorted)
    chosen = filled >= best.values[..., -1:] if choice.rule == "kth" else torch.zeros(
        filled.shape, dtype=torch.bool).scatter(-1, best.indices, True)
    return chosen & seen


@pytest.mark.parametrize("by", ["compiler", "python"])
@pytest.mark.parametrize("rule", ["topk", "kth"])
def test_the_heap_against_top_k(rule: str, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if by == "python":
        monkeypatch.setattr(lifetimes, "_compiled", lambda: None)
    for kind in KINDS:
        for count, rows, offset in ((5, 30, 0), (1, 30, 0), (30, 30, 0), (7, 4, 26), (5, 33, -3)):
            for causal in (True, False):
                values = numbers(2, 3, 30, kind)[:, :, None]
                valid = torch.rand(2, 1, 1, 30) > 0.3
                keep = f"(and (le k (add q {offset})) (load_bool ok))" if causal \
                    else "(load_bool ok)"
                choice = Choice(count, ("ok",), keep, "(load_bool ok)", str(offset), causal, LOW,
                                rule, False)
                death, hidden, blind = (
                    key_lifetimes([values, valid], [rows], str(replace(choice, give=give)))
                    for give in ("death", "hidden", "blind"))
                places, at = torch.arange(30), torch.arange(rows)[:, None]
                mine = (at < death) & (places != hidden)
                mine = mine & (places <= at + offset) if causal else mine
                wanted = chosen_of(values, choice, valid, rows, offset)
                assert torch.equal(mine.expand_as(wanted), wanted)
                assert torch.equal((at < blind).expand(2, 3, -1, 1).squeeze(-1), ~wanted.any(-1))


def test_the_op_gives_the_shape_that_compilers_are_told() -> None:
    text = str(Choice(5, (), "(le k q)", "true", "0", True, LOW, "topk", False))
    values = numbers(2, 3, 30)[:, :, None]
    torch.library.opcheck(torch.ops.attnopt.key_lifetimes.default, ([values], [30], text),
                          test_utils=("test_schema", "test_faketensor"))
    assert key_lifetimes([values], [30], text).shape == (2, 3, 1, 30)


def test_gathering_needs_a_plain_spec() -> None:
    operand = Operand("death", ("h", "q", "k"), E.INT, "mask")
    spec = Spec(mask=KeyLifetime("death"), operands=(operand,))
    assert living_keys.slots_of(spec) == ("death", "")
    assert living_keys.slots_of(replace(spec, mask=Where(operand_keep()))) is None
    assert living_keys.slots_of(replace(spec, empty_row="uniform")) is None
    assert isinstance(bind(str(spec), str(Schedule("aten:dense"))), object)


def operand_keep() -> E.Expr:
    return E.load("death", dtype=E.INT).eq(0)
