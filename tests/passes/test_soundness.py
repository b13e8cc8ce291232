"""Programs that look like attention that could be rewritten, and where a careless rewrite is wrong.

Each once gave wrong numbers, a lost gradient or a crash. All run without verification: recognition
itself must be right.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt

B, H, N, D = 2, 4, 10, 8
LEAST = torch.finfo(torch.float32).min


class Program(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(D, D)
        self.last = nn.Parameter(torch.full((N, N), -2e9).index_fill(1, torch.tensor([N - 1]), 0))
        self.register_buffer("causal", torch.ones(N, N, dtype=torch.bool).tril())

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def soft(scores: Tensor) -> Tensor:
    return scores.softmax(-1)


def two_finite_masks(s, q, k, v, mask):
    scores = torch.where(s.causal, q @ k.mT / 8, LEAST)
    return soft(scores + (1 - mask[:, None, None, :]) * LEAST) @ v


def finite_then_infinite(s, q, k, v, mask):
    scores = (q @ k.mT).masked_fill(~s.causal, -1e9)
    return soft(scores.masked_fill(mask[:, None, None] == 0, float("-inf"))) @ v


def filled_rows(s, q, k, v, mask):
    return soft((q @ k.mT).masked_fill(mask[:, None, None] == 0, -1e9)) @ v


def filled_rows_log_sum_exp(s, q, k, v, mask):
    scores = (q @ k.mT).masked_fill(mask[:, None, None] == 0, LEAST)
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def filled_rows_additive_scores(s, q, k, v, mask):
    scores = torch.tanh(q.unsqueeze(-2) + k.unsqueeze(-3)) @ s.linear.weight[0]
    return soft(scores.masked_fill(mask[:, None, None] == 0, -1e9)) @ v


def one_key_repeated(s, q, k, v):
    return soft(q @ k[:, :, :1].expand(B, H, N, D).mT) @ v


def one_query_repeated(s, q, k, v):
    return soft(q[:, :, :1].expand(B, H, N, D) @ k.mT) @ v


def one_channel_repeated(s, q, k, v):
    return soft(q[..., :1].expand(B, H, N, D) @ k.mT) @ v[..., :1].expand(B, H, N, D)


def added_to(s, q, k, v):
    return torch.baddbmm(v[0], soft(q[0] @ k[0].mT), v[0])


def scaled_product(s, q, k, v):
    return torch.baddbmm(v[0], soft(q[0] @ k[0].mT), v[0], beta=0, alpha=0.5)


def copied_without_gradient(s, q, k, v):
    with torch.no_grad():
        k = k.contiguous() * 0.3
    return soft(q @ k.mT) @ v


def base_written_later(s, q, k, v):
    x = s.linear(q)
    out = soft((x * 0.35) @ x.relu().mT) @ x.tanh()
    x.add_(out)
    return x


def logarithm_used(s, q, k, v):
    return F.log_softmax(50 * q @ k.mT, -1) @ v


def triangle_of_a_selected_row(s, q, k, v):
    return soft((q @ k.mT).tril())[:, :, 2].unsqueeze(2) @ v


def triangle_of_merged_rows(s, q, k, v):
    return soft((q @ k.mT).view(B, H * N, N).tril()).view(B, H, N, N) @ v


def detached_sum(s, q, k, v):
    weights = torch.exp(q @ k.mT)
    return (weights / weights.sum(-1, keepdim=True).detach()) @ v


def complex_view_behind(s, q, k, v):
    out = v.mT @ soft(q @ k.mT).mT
    return torch.view_as_complex(out.view(B, H, D, N // 2, 2)).abs()


def other_axes_written(s, q, k, v):
    scores = q @ k.mT
    torch.einsum("bhqk->bhkq", scores).mT.masked_fill_(~s.causal, LEAST)
    return soft(scores) @ v


def a_chunk_written(s, q, k, v):
    scores = q @ k.mT
    torch.unsafe_chunk(scores, 2)[1].mul_(3)
    return soft(scores) @ v


def broadcast_with_another_and_written(s, q, k, v):
    scores, bias = q @ k.mT, q @ q.mT
    both = torch.broadcast_tensors(scores, bias)
    bias.masked_fill_(~s.causal, -3.0)
    return soft(scores + both[1]) @ v


# What a model computes may hide keys as well.
def chosen(s, k, low=-float("inf")):
    """0 at the keys that the model chooses, low at the others."""
    sums = s.linear(k).sum(-1)
    return torch.zeros_like(sums).masked_fill(sums < sums.topk(2, -1).values[..., -1:],
                                              low)[:, :, None]


def chosen_and_causal(s, q, k, v):
    return soft((q @ k.mT + chosen(s, k)).masked_fill(~s.causal, -1e9)) @ v


def causal_and_chosen(s, q, k, v):
    return soft(torch.where(s.causal, q @ k.mT, -1e9) + chosen(s, k)) @ v


def chosen_and_added(s, q, k, v):
    return soft(q @ k.mT + (~s.causal).float() * -1e9 + chosen(s, k)) @ v


def chosen_by_logarithm(s, q, k, v):
    return soft(q @ k.mT + (~s.causal).float() * -1e9 + (chosen(s, k) + 1).relu().log()) @ v


def a_mask_that_is_a_parameter(s, q, k, v):
    return soft(q @ k.mT + (~s.causal).float() * -1e9 + s.last) @ v


def padded_and_chosen(s, q, k, v, mask):
    return soft(q @ k.mT + (1 - mask[:, None, None]) * -1e9 + chosen(s, k, -2e9)) @ v


def padded_beside_a_parameter(s, q, k, v, mask):
    return soft(q @ k.mT + (1 - mask[:, None, None]) * -1e9 + s.last) @ v


MASKED = (two_finite_masks, finite_then_infinite, filled_rows, filled_rows_log_sum_exp,
          filled_rows_additive_scores)
PLAIN = (one_key_repeated, one_query_repeated, one_channel_repeated, added_to, scaled_product,
         copied_without_gradient, base_written_later, logarithm_used, triangle_of_a_selected_row,
         triangle_of_merged_rows, detached_sum, complex_view_behind, other_axes_written,
         a_chunk_written, broadcast_with_another_and_written)
CHOSEN = (chosen_and_causal, causal_and_chosen, chosen_and_added, chosen_by_logarithm,
          a_mask_that_is_a_parameter)
CHOSEN_PADDED = (padded_and_chosen, padded_beside_a_parameter)


def outcome(module: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """The result and the gradients of the first three inputs; None counts as zero."""
    leaves = [x.clone().requires_grad_(i < 3) for i, x in enumerate(inputs)]
    result = module(*leaves)
    gradients = torch.autograd.grad(result.square().sum(), leaves[:3], allow_unused=True)
    return [result.detach(), *(torch.zeros_like(x) if g is None else g
                               for x, g in zip(leaves, gradients, strict=False))]


def compare(program: Program, optimized: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    expected, found = outcome(program, inputs), outcome(optimized, inputs)
    peak = max(float(x.nan_to_num(0).abs().max()) for x in expected)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-5 * max(peak, 1), rtol=0, equal_nan=True)


@pytest.mark.parametrize("function", MASKED, ids=lambda f: f.__name__)
def test_masks_that_meet_later(function: Callable[..., Tensor]) -> None:
    """Captured without padding, called with padding and with a row that has no key."""
    program = Program(function)
    qkv = tuple(torch.randn(B, H, N, D) for _ in range(3))
    whole, left, none = torch.ones(B, N), torch.ones(B, N), torch.ones(B, N)
    left[0, :4] = 0
    none[0] = 0
    optimized = attnopt.optimize(program, (*qkv, whole), verify=False)
    for mask in (whole, left, none):
        compare(program, optimized, (*qkv, mask))


@pytest.mark.parametrize("function", PLAIN, ids=lambda f: f.__name__)
def test_program(function: Callable[..., Tensor]) -> None:
    program = Program(function)
    qkv = tuple(torch.randn(B, H, N, D) for _ in range(3))
    compare(program, attnopt.optimize(program, qkv, verify=False), qkv)


def keys_chosen(at: int) -> Tensor:
    """Keys of which the model chooses two from here on."""
    return torch.zeros(B, H, N, D).index_add(2, torch.tensor([at, at + 1]), torch.ones(B, H, 2, D))


@pytest.mark.usefixtures("by_aten")
@pytest.mark.parametrize("function", CHOSEN, ids=lambda f: f.__name__)
def test_keys_that_the_model_hides(function: Callable[..., Tensor]) -> None:
    """Captured where every row sees a chosen key, called where most see none."""
    program = Program(function)
    program.linear.weight.data.copy_(torch.eye(D))
    q, v = torch.zeros(B, H, N, D), torch.randn(B, H, N, D)
    optimized = attnopt.optimize(program, (q, keys_chosen(0), v), verify=False)
    for at in (0, 5):
        compare(program, optimized, (q, keys_chosen(at), v))


@pytest.mark.usefixtures("by_aten")
@pytest.mark.parametrize("function", CHOSEN_PADDED, ids=lambda f: f.__name__)
def test_padding_beside_keys_that_the_model_hides(function: Callable[..., Tensor]) -> None:
    program = Program(function)
    program.linear.weight.data.copy_(torch.eye(D))
    q, k, v = torch.zeros(B, H, N, D), keys_chosen(0), torch.randn(B, H, N, D)
    optimized = attnopt.optimize(program, (q, k, v, torch.ones(B, N)), verify=False)
    for seen in (N, 4, 0):
        mask = (torch.arange(N) < seen).float().expand(B, N)
        for at in (0, 5):
            compare(program, optimized, (q, keys_chosen(at), v, mask))
