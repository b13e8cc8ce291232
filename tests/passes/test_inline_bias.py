"""Biases and masks that are index arithmetic are computed in the kernel; everything else is loaded.

All run without verification: the expression itself must be right, at the length that was captured
and at another one. Most evaluate it by ATen, so that few kernels have to be compiled.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.ir.spec import Spec

B, H, N, D = 2, 4, 40, 8
LONGER = 72
AUTO = torch.export.Dim.AUTO
SLOPES = [0.5, 0.25, 0.125, 0.0625]
pytestmark = pytest.mark.usefixtures("by_aten")


class Program(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("slopes", torch.tensor([0.7, 0.31, 0.11, 0.013]))
        self.learned = nn.Parameter(torch.tensor([0.7, 0.31, 0.11, 0.013]))
        self.table = nn.Embedding(32, H)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def drawn(length: int = N, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(B, H, length, D, generator=generator).to(dtype) for _ in range(3)]


def optimized(function: Callable[..., Tensor], inputs: list[Tensor], *, dynamic: bool = False,
              **options: Any) -> tuple[nn.Module, Any]:
    module = Program(function).eval()
    if dynamic:
        moving = tuple({d: AUTO for d in range(x.dim()) if x.shape[d] == N} for x in inputs)
        options["dynamic_shapes"] = (moving,)
    return module, attnopt.optimize(module, tuple(inputs), **{"verify": False, **options})


def spec_of(opt: Any) -> Spec:
    (site,) = opt.report.sites
    assert site.status == "rewritten", (site.reason, site.tried)
    return Spec.parse(site.spec)


def dense(spec: Spec) -> list[str]:
    """Operands that vary along both queries and keys."""
    return [o.slot for o in spec.operands if o.axes is not None and {"q", "k"} <= set(o.axes)]


def made(opt: Any, *names: str) -> list[str]:
    """Operations of these names in the rewritten graph."""
    return [n.name for n in opt.graph_modules[0].graph.nodes
            if any(str(n.target).startswith(f"aten.{name}.") for name in names)]


def check(function: Callable[..., Tensor], *more: Callable[[int], Tensor], dynamic: bool = True,
          lengths: tuple[int, ...] = (N, LONGER)) -> tuple[Spec, Any]:
    """Optimise at one length, compare at all."""
    module, opt = optimized(function, drawn() + [x(N) for x in more], dynamic=dynamic)
    for n in lengths:
        inputs = drawn(n) + [x(n) for x in more]
        with torch.no_grad():
            torch.testing.assert_close(opt(*inputs), module(*inputs), atol=3e-6, rtol=1e-5)
    assert sum(v for k, v in opt.report.calls.items() if k != "hits") == 0, opt.report.calls
    return spec_of(opt), opt


def soft(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def distance(q: Tensor, k: Tensor) -> Tensor:
    return torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])[None, :]


def hidden(q: Tensor) -> Tensor:
    n = q.shape[-2]
    return torch.full((n, n), -math.inf).triu(1)


# -- ALiBi ----------------------------------------------------------------------------------------
def from_list(s, q, k, v):
    slopes = torch.tensor(SLOPES)
    return soft(q @ k.mT / 8 + slopes[:, None, None] * -distance(q, k).abs()) @ v


def from_buffer(s, q, k, v):
    return soft(q @ k.mT / 8 - s.slopes.view(1, -1, 1, 1) * distance(q, k).abs()) @ v


def from_parameter(s, q, k, v):
    return soft(q @ k.mT / 8 - s.learned.view(H, 1, 1) * distance(q, k).abs()) @ v


def from_powers(s, q, k, v):
    slopes = torch.pow(2.0, -8.0 / H * torch.arange(1, H + 1))
    return soft(q @ k.mT / 8 + slopes[None, :, None, None] * -distance(q, k).abs()) @ v


def signed(s, q, k, v):
    return soft(q @ k.mT / 8 + s.slopes[:, None, None] * distance(q, k).neg()) @ v


def in_floats(s, q, k, v):
    i = torch.arange(q.shape[-2], dtype=torch.float32)
    bias = -(i.unsqueeze(1) - i.unsqueeze(0)).abs()
    return soft(q @ k.mT / 8 + bias.expand(H, -1, -1) * s.slopes[:, None, None]) @ v


def scaled_before(s, q, k, v):
    bias = -distance(q, k).abs().float() * 0.1
    return soft(q @ k.mT / 8 + bias * s.slopes[:, None, None]) @ v


def scaled_after(s, q, k, v):
    bias = s.slopes[:, None, None] * -distance(q, k).abs() / 3
    return soft((q @ k.mT + bias) * 0.25) @ v


def repeated(s, q, k, v):
    bias = -distance(q, k).abs().unsqueeze(0).repeat(H, 1, 1)
    return soft(q @ k.mT / 8 + bias * s.slopes[:, None, None].expand_as(bias)) @ v


def by_einsum(s, q, k, v):
    bias = torch.einsum("h,qk->hqk", s.slopes, -distance(q, k).abs().float())
    return soft(q @ k.mT / 8 + bias) @ v


def sliced(s, q, k, v):
    n = q.shape[-2]
    i = torch.arange(96)
    bias = s.slopes[:, None, None] * -(i[None, :] - i[:, None]).abs()
    return soft(q @ k.mT / 8 + bias[:, :n, :n]) @ v


def clamped(s, q, k, v):
    bias = torch.clamp(s.slopes[:, None, None] * -distance(q, k).abs(), min=-2.5)
    return soft(q @ k.mT / 8 + bias) @ v


def in_place(s, q, k, v):
    bias = distance(q, k).abs().float()
    bias.neg_().mul_(0.3)
    return soft(q @ k.mT / 8 + bias) @ v


def squared(s, q, k, v):
    return soft(q @ k.mT / 8 - (distance(q, k) * s.slopes.view(H, 1, 1)) ** 2) @ v


def reciprocal(s, q, k, v):
    return soft(q @ k.mT / 8 + s.slopes[:, None, None] / (1 + distance(q, k).abs())) @ v


def added_to_weights(s, q, k, v):
    return (soft(q @ k.mT / 8) * torch.exp(-0.1 * distance(q, k).abs())) @ v


ALIBI = [from_list, from_buffer, from_parameter, from_powers, signed, in_floats, scaled_before,
         scaled_after, repeated, by_einsum, sliced, clamped, in_place, squared, reciprocal,
         added_to_weights]


@pytest.mark.parametrize("function", ALIBI, ids=lambda f: f.__name__)
def test_a_bias_of_indices_is_computed(function: Callable[..., Tensor]) -> None:
    spec, opt = check(function)
    assert not dense(spec), spec
    assert "computed in the kernel" in opt.report.sites[0].bias
    assert not made(opt, "abs", "neg", "sub")  # its construction is gone


@pytest.mark.parametrize("function", [from_buffer, clamped], ids=lambda f: f.__name__)
def test_the_kernel_computes_it(compiled: None, function: Callable[..., Tensor]) -> None:
    spec, _ = check(function)
    assert not dense(spec), spec


def test_at_a_fixed_length(compiled: None) -> None:
    spec, _ = check(from_buffer, dynamic=False, lengths=(N,))
    assert [o.axes for o in spec.operands] == [("h",)]


def test_the_float_operations_are_the_authors() -> None:
    spec, _ = check(scaled_after)
    assert str(spec.logits) == (
        "(mul (add score (div (mul (load in0) (float (neg (abs (sub k q))))) 3.0)) 0.25)")


def test_a_bias_over_keys_alone_is_a_vector() -> None:
    def only_keys(s, q, k, v):
        bias = s.slopes[:, None, None] * torch.arange(k.shape[-2])
        return soft(q @ k.mT / 8 + bias.expand(H, q.shape[-2], -1)) @ v

    spec, _ = check(only_keys)
    assert not dense(spec)


def test_per_key_numbers_are_loaded_not_computed() -> None:
    def positions(s, q, k, v):
        place = torch.linspace(0, 1, q.shape[-2])
        return soft(q @ k.mT / 8 - (place[:, None] - place[None, :]).abs() * 3) @ v

    spec, _ = check(positions, dynamic=False, lengths=(N,))  # export fixes linspace
    assert sorted(o.axes for o in spec.operands) == [("k",), ("q",)]


def test_positions_of_the_user_are_loaded() -> None:
    def with_positions(s, q, k, v, at):
        bias = -(at[:, None] - at[None, :]).abs() * s.slopes[:, None, None]
        return soft(q @ k.mT / 8 + bias) @ v

    spec, _ = check(with_positions, lambda n: torch.arange(n).flip(0) // 2)
    assert sorted(o.axes for o in spec.operands) == [("h",), ("k",), ("q",)]


def test_a_decay_multiplies_the_scores() -> None:
    def decayed(s, q, k, v):
        decay = torch.exp(-0.05 * distance(q, k).clamp(min=0))
        return torch.sigmoid((q @ k.mT / 8) * decay) @ v

    spec, _ = check(decayed)
    assert not dense(spec) and spec.logits.has("exp")


# -- with masks -----------------------------------------------------------------------------------
def test_a_causal_mask_added_to_the_bias_becomes_the_mask(compiled: None) -> None:
    def both(s, q, k, v):
        bias = s.slopes[:, None, None] * -distance(q, k).abs() + hidden(q)
        return soft(q @ k.mT / 8 + bias) @ v

    spec, _ = check(both)
    assert spec.mask.describe() == "causal" and not dense(spec)


def test_a_finite_fill_under_which_every_row_keeps_a_key_is_a_mask() -> None:
    def both(s, q, k, v):
        bias = s.slopes[:, None, None] * -distance(q, k).abs()
        return soft(q @ k.mT / 8 + bias.masked_fill(distance(q, k) < 0, -1e9)) @ v

    spec, _ = check(both)
    assert spec.mask.describe() == "causal" and not dense(spec)


def test_a_window_with_a_finite_fill_is_a_band() -> None:
    def window(s, q, k, v):
        far = distance(q, q)
        bias = -far.abs() * s.slopes[:, None, None]
        return soft(q @ k.mT / 8 + bias.masked_fill((far < 0) | (far > 8), -1e9)) @ v

    spec, _ = check(window)
    assert str(spec.mask) == "(band -8 0)" and not dense(spec)


def test_a_fused_call_with_a_bias_and_a_mask_in_one() -> None:
    def fused(s, q, k, v):
        bias = s.slopes[:, None, None] * -distance(q, k).abs() + hidden(q)
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])

    spec, _ = check(fused)
    assert spec.mask.describe() == "causal" and not dense(spec)


def test_a_forget_gate_is_two_vectors() -> None:
    def forgetting(s, q, k, v):
        gate = torch.nn.functional.logsigmoid(v.mean(-1)).cumsum(-1)
        bias = gate[..., :, None] - gate[..., None, :]
        return soft((q @ k.mT / 8 + bias).masked_fill(distance(q, k) < 0, -math.inf)) @ v

    spec, _ = check(forgetting)
    assert sorted(o.axes for o in spec.operands) == [("b", "h", "k")] or sorted(
        o.axes for o in spec.operands) == [("b", "h", "k"), ("b", "h", "q")]


def test_heads_in_groups() -> None:
    def grouped(s, q, k, v):
        rows = q.unflatten(1, (2, 2))
        bias = s.slopes.view(2, 2, 1, 1) * -distance(q, k).abs()
        scores = rows @ k[:, :2].unsqueeze(2).mT / 8 + bias
        return (soft(scores) @ v[:, :2].unsqueeze(2)).flatten(1, 2)

    spec, _ = check(grouped)
    assert [o.axes for o in spec.operands] == [("b", "h")]


def test_rows_without_a_key_give_what_they_gave() -> None:
    def empty_rows(s, q, k, v):
        bias = -distance(q, k).abs() * s.slopes[:, None, None]
        return soft(q @ k.mT / 8 + bias.masked_fill(distance(q, k) <= 2, -math.inf)) @ v

    module, opt = optimized(empty_rows, drawn())
    found, wanted = opt(*drawn()), module(*drawn())
    assert wanted.isnan().any()
    torch.testing.assert_close(found, wanted, equal_nan=True)


def test_rows_without_a_key_under_a_finite_fill_stay_a_number() -> None:
    def empty_rows(s, q, k, v):
        bias = -distance(q, k).abs() * s.slopes[:, None, None]
        return soft(q @ k.mT / 8 + bias.masked_fill(distance(q, k) <= 2, -1e9)) @ v

    spec, _ = check(empty_rows)
    assert spec.mask.describe() == "none"


def test_padding_combined_with_causal_is_a_predicate_with_a_vector(compiled: None) -> None:
    def padded(s, q, k, v, keep):
        seen = (distance(q, k) >= 0) & keep[:, None, None, :]
        return soft((q @ k.mT / 8).masked_fill(~seen, -math.inf)) @ v

    def keep(n: int) -> Tensor:
        kept = torch.arange(n) < torch.tensor([[n], [n - 7]])
        return kept

    spec, opt = check(padded, keep)
    assert not dense(spec) and {o.axes for o in spec.operands} == {("b", "k")}
    padding = torch.zeros(B, N, dtype=torch.bool)
    padding[:, :3] = True  # another padding, same program
    module = Program(padded).eval()
    torch.testing.assert_close(opt(*drawn(), padding), module(*drawn(), padding),
                               atol=3e-6, rtol=1e-5)


# -- what stays a load ----------------------------------------------------------------------------
def in_bfloat16(s, q, k, v):
    bias = s.slopes.bfloat16()[:, None, None] * -distance(q, k).abs()
    return soft(q @ k.mT / 8 + bias) @ v


def rounded_to_bfloat16(s, q, k, v):
    bias = (s.slopes[:, None, None] * -distance(q, k).abs()).bfloat16()
    return soft(q @ k.mT / 8 + bias) @ v


def in_float64(s, q, k, v):
    bias = s.slopes.double()[:, None, None] * -distance(q, k).abs()
    return soft(q @ k.mT / 8 + bias.float()) @ v


def beyond_float32(s, q, k, v):
    far = (distance(q, k) * 100_003_007).abs()
    return soft(q @ k.mT / 8 - far.float() * 1e-9) @ v


def of_the_data(s, q, k, v):
    return soft(q @ k.mT / 8 + torch.tanh(v @ v.mT)) @ v


def by_a_rounded_choice(s, q, k, v):
    far = distance(q, k).abs() * s.slopes[:, None, None]
    return soft(q @ k.mT / 8 + torch.where(far < 1.1, 0.0, far * -0.2)) @ v


def too_much(s, q, k, v):
    far = distance(q, k).abs() + 1.0
    return soft(q @ k.mT / 8 - torch.log(far) * torch.tanh(far * 0.1) * torch.sqrt(far)) @ v


def detached(s, q, k, v):
    bias = (s.learned[:, None, None] * -distance(q, k).abs()).detach()
    return soft(q @ k.mT / 8 + bias) @ v


def without_gradients(s, q, k, v):
    with torch.no_grad():
        bias = s.learned[:, None, None] * -distance(q, k).abs()
    return soft(q @ k.mT / 8 + bias) @ v


DENSE = [in_bfloat16, rounded_to_bfloat16, in_float64, beyond_float32, of_the_data,
         by_a_rounded_choice, too_much, detached, without_gradients]


@pytest.mark.parametrize("function", DENSE, ids=lambda f: f.__name__)
def test_what_is_not_float32_arithmetic_of_indices_is_loaded(function: Callable[..., Tensor]
                                                             ) -> None:
    spec, _ = check(function)
    assert dense(spec) == ["bias0"]


def test_a_random_bias_is_loaded() -> None:
    def random(s, q, k, v):
        return soft(q @ k.mT / 8 + torch.rand(q.shape[-2], k.shape[-2])) @ v

    assert dense(spec_of(optimized(random, drawn())[1])) == ["bias0"]


def test_a_written_operand_is_loaded() -> None:
    def overwritten(s, q, k, v):
        slopes = s.slopes * 1.5
        bias = slopes[:, None, None] * -distance(q, k).abs()
        slopes.zero_()
        return soft(q @ k.mT / 8 + bias) @ v

    spec, _ = check(overwritten)
    assert dense(spec) == ["bias0"]


# -- other lowerings, guards, gradients -----------------------------------------------------------
def test_aten_gets_the_authors_tensor() -> None:
    _, opt = optimized(from_buffer, drawn(), backend="aten")
    spec = spec_of(opt)
    assert dense(spec) == ["bias0"] and made(opt, "abs")


def test_half_precision_inputs_get_a_float32_bias() -> None:
    inputs = drawn(dtype=torch.bfloat16)

    def upcast(s, q, k, v):
        scores = q.float() @ k.float().mT / 8
        bias = s.slopes[:, None, None] * -distance(q, k).abs()
        return soft(scores + bias).to(v.dtype) @ v

    module, opt = optimized(upcast, inputs)
    assert not dense(spec_of(opt))
    torch.testing.assert_close(opt(*inputs), module(*inputs), atol=2e-2, rtol=2e-2)


def test_values_are_read_at_each_call() -> None:
    module, opt = optimized(from_buffer, drawn())
    assert not dense(spec_of(opt))
    with torch.no_grad():
        module.slopes.mul_(2)
        torch.testing.assert_close(opt(*drawn()), module(*drawn()), atol=3e-6, rtol=1e-5)
    assert sum(v for k, v in opt.report.calls.items() if k != "hits") == 0


def test_learned_slopes_keep_their_gradient(compiled: None) -> None:
    module, opt = optimized(from_parameter, drawn())
    grads = []
    for run in (module, opt):
        inputs = [x.requires_grad_() for x in drawn()]
        run(*inputs).square().sum().backward()
        grads.append([module.learned.grad.clone(), *(x.grad for x in inputs)])
        module.learned.grad = None
    for wanted, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_verification_accepts_it(compiled: None) -> None:
    module = Program(from_parameter).eval()
    moving = tuple({2: AUTO} for _ in range(3))
    opt = attnopt.optimize(module, tuple(drawn()), dynamic_shapes=(moving,))
    (site,) = opt.report.sites
    assert site.status == "rewritten" and not dense(Spec.parse(site.spec)), site.reason
    assert site.error <= site.error_bound


def test_two_layers_with_one_bias() -> None:
    def layers(s, q, k, v):
        bias = s.slopes[:, None, None] * -distance(q, k).abs()
        for _ in range(2):
            q = soft(q @ k.mT / 8 + bias) @ v
        return q

    module, opt = optimized(layers, drawn())
    assert [dense(Spec.parse(s.spec)) for s in opt.report.sites] == [[], []]
    torch.testing.assert_close(opt(*drawn()), module(*drawn()), atol=3e-6, rtol=1e-5)
