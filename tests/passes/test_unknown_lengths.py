"""Attention over as many tokens as the values of a mask say (nonzero, a boolean index)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import attnopt
from attnopt.ir.spec import Spec
from tests.attnopt.small_models import hits, same

pytestmark = pytest.mark.usefixtures("by_aten")


def soft(scores: Tensor, v: Tensor) -> Tensor:
    return scores.softmax(-1) @ v


def joint(s: Layer, x: Tensor, keep: Tensor) -> Tensor:
    """Image tokens and the valid ones of a prompt, padded again (Mochi)."""
    kept = torch.nonzero(keep[0].flatten()).flatten()
    q, k, v = s.heads(torch.cat([x[:, :6], x[:, 6:][:, kept]], 1))
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return F.pad(out, (0, 0, 0, x.shape[1] - out.shape[1]))


def chosen(s: Layer, x: Tensor, keep: Tensor) -> Tensor:
    q, k, v = s.heads(x[:, 6:][:, keep[0]])
    return soft(q @ k.transpose(-1, -2) / 2, v).mean(2)


def cross(s: Layer, x: Tensor, keep: Tensor) -> Tensor:
    """Few keys for all queries."""
    q, k, v = s.heads(x)
    k, v = (t[:, :, 6:][:, :, keep[0]] for t in (k, v))
    return soft(torch.einsum("bhqd,bhkd->bhqk", q, k), v)


def causal(s: Layer, x: Tensor, keep: Tensor) -> Tensor:
    q, k, v = s.heads(x[:, 6:][:, keep[0]])
    n = torch.arange(q.shape[2])
    return soft((q @ k.mT).masked_fill(n > n[:, None], -torch.inf), v).mean(2)


def alibi(s: Layer, x: Tensor, keep: Tensor) -> Tensor:
    q, k, v = s.heads(x[:, 6:][:, keep[0]])
    n = torch.arange(q.shape[2])
    slopes = torch.tensor([0.5, 0.25])[:, None, None]
    return soft(q @ k.mT - slopes * (n[:, None] - n).abs(), v).mean(2)


class Layer(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.function = function

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return self.function(self, x, keep)


@pytest.mark.parametrize("function", [joint, chosen, cross, causal, alibi])
@pytest.mark.parametrize("verify", [True, False])
def test_any_number_of_tokens(function: Callable[..., Tensor], verify: bool) -> None:
    torch.manual_seed(0)
    model, x = Layer(function).eval(), torch.randn(2, 15, 8)

    def keep(*ones: int) -> Tensor:
        places = torch.tensor(ones, dtype=torch.long)
        return torch.zeros(2, 9, dtype=torch.bool).index_fill(1, places, True)

    opt = attnopt.optimize(model, (x, keep(0, 2, 3, 7)), verify=verify)
    (site,) = opt.report.sites
    assert site.status == "rewritten", site.reason
    for mask in (keep(0, 2, 3, 7), keep(1, 8), keep(4), keep(*range(9)), keep()):
        same(opt(x, mask), model(x, mask), 1e-5)
    assert hits(opt) == 5


@pytest.mark.parametrize("function", [joint, chosen, cross, causal, alibi])
def test_gradients(function: Callable[..., Tensor]) -> None:
    torch.manual_seed(0)
    model, x = Layer(function), torch.randn(1, 15, 8)
    keep = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 1]], dtype=torch.bool)
    opt = attnopt.optimize(model, (x, keep), verify=False)
    for mask in (keep, ~keep):
        grads = [torch.autograd.grad(m(x, mask).square().sum(), [*m.parameters()])
                 for m in (opt, model)]
        same(*grads, 1e-4)
    assert hits(opt) == 2


def test_a_causal_mask_of_unknown_length_is_named() -> None:
    model, x = Layer(causal).eval(), torch.randn(1, 15, 8)
    opt = attnopt.optimize(model, (x, torch.ones(1, 9, dtype=torch.bool)), verify=False)
    (site,) = opt.report.sites
    assert "Causal" in repr(Spec.parse(site.spec).mask), site.spec
