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


MASKED = (two_finite_masks, finite_then_infinite, filled_rows, filled_rows_log_sum_exp,
          filled_rows_additive_scores)
PLAIN = (one_key_repeated, one_query_repeated, one_channel_repeated, added_to, scaled_product,
         copied_without_gradient, base_written_later, logarithm_used, triangle_of_a_selected_row,
         triangle_of_merged_rows, detached_sum, complex_view_behind)


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
