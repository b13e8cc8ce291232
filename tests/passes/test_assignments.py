"""Assigned blocks of the scores: class tokens that a bias leaves alone, and near misses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt

pytestmark = pytest.mark.usefixtures("by_aten")
Edit = Callable[[Tensor, Tensor], Tensor]
H, D = 3, 8


class Assigned(nn.Module):
    """softmax(edit(q k^T, bias)) v"""

    def __init__(self, edit: Edit) -> None:
        super().__init__()
        self.edit = edit

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return self.edit(q @ k.transpose(-2, -1) * D**-0.5, bias).softmax(-1) @ v


def replaced(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:, 1:] = x[:, :, 1:, 1:] + bias
    return x


def added(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:, 1:] += bias
    return x


def added_by_method(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:, 1:].add_(bias)
    return x


def of_keys_alone(x: Tensor, bias: Tensor) -> Tensor:
    x[..., 2:] += bias[..., :1, : x.shape[-1] - 2]
    return x


def of_rows_alone(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 2:] += bias[:, :, : x.shape[2] - 2, :1] * torch.arange(x.shape[-1])
    return x


def on_the_grid(x: Tensor, bias: Tensor) -> Tensor:
    rows, keys = x.shape[2] - 1, x.shape[3] - 1
    block = x[:, :, 1:, 1:].view(-1, H, 2, rows // 2, 2, keys // 2)
    table = bias.view(-1, H, 2, rows // 2, 2, keys // 2)[..., :1, :]
    x[:, :, 1:, 1:] = (block + table).view(-1, H, rows, keys)
    return x


def scaled(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:, 1:] *= 1 + bias
    return x


def not_a_sum(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:, 1:] = bias
    return x


def number(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:, 1:] += 0.75
    return x


def masked(x: Tensor, bias: Tensor) -> Tensor:
    block = x[:, :, 1:, 1:]
    x[:, :, 1:, 1:] = block.masked_fill(bias > 1.0, float("-inf"))
    return x


def twice(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:, 1:] += bias
    x[:, :, 2:, 1:] += bias[:, :, 1:]
    return x


FOUND = (replaced, added, added_by_method, of_keys_alone, of_rows_alone, on_the_grid, scaled,
         not_a_sum, number, masked, twice)


def to_the_middle(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:-1, 1:] += bias[:, :, 1:]
    return x


def every_other(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1::2, 1:] += bias[:, :, ::2]
    return x


def of_heads(x: Tensor, bias: Tensor) -> Tensor:
    x[:, 1:, 1:, 1:] += bias[:, 1:]
    return x


def moved(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:, 1:] = x[:, :, :-1, 1:] + bias
    return x


def other_block(x: Tensor, bias: Tensor) -> Tensor:
    x[:, :, 1:, 1:] = x[:, :, 1:, :-1] + bias
    return x


LEFT_ALONE = (to_the_middle, every_other, of_heads, moved, other_block)


def drawn(queries: int = 9, keys: int = 7, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, H, queries, D), (batch, H, keys, D), (batch, H, keys, 5),
             (batch, H, queries - 1, keys - 1)]
    return [torch.randn(s, generator=generator) for s in sizes]


def optimized(edit: Edit, inputs: list[Tensor], **options: Any) -> tuple[nn.Module, Any, Any]:
    module = Assigned(edit)
    opt = attnopt.optimize(module, tuple(inputs), **options)
    (site,) = opt.report.sites
    return module, opt, site


def gradients(run: Any, inputs: list[Tensor]) -> list[Tensor | None]:
    given = [t.clone().requires_grad_() for t in inputs]
    run(*given).square().sum().backward()
    return [t.grad for t in given]


@pytest.mark.parametrize("edit", FOUND)
def test_a_block_is_read(edit: Edit) -> None:
    inputs = drawn()
    module, opt, site = optimized(edit, inputs)
    assert site.status == "rewritten", (site.reason, site.tried)
    torch.testing.assert_close(opt(*inputs), module(*inputs), atol=2e-6, rtol=1e-5)
    for ours, theirs in zip(gradients(opt, inputs), gradients(module, inputs), strict=True):
        if ours is None or theirs is None:
            assert all(g is None or not g.any() for g in (ours, theirs))
            continue
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("edit", LEFT_ALONE)
def test_what_is_no_block_of_queries_and_keys_is_left_alone(edit: Edit) -> None:
    inputs = drawn()
    module, opt, site = optimized(edit, inputs)
    assert site.status != "rewritten", site.spec
    torch.testing.assert_close(opt(*inputs), module(*inputs))


@pytest.mark.parametrize("edit", [replaced, masked])
def test_other_lengths(edit: Edit) -> None:
    auto = torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto}, {0: auto, 2: auto}, {0: auto, 2: auto},
              {0: auto, 2: auto, 3: auto})
    module, opt, site = optimized(edit, drawn(), dynamic_shapes=shapes)
    assert site.status == "rewritten", (site.reason, site.tried)
    for sizes in ((9, 7, 2), (12, 5, 3), (3, 3, 2)):
        inputs = drawn(*sizes)
        torch.testing.assert_close(opt(*inputs), module(*inputs), atol=2e-6, rtol=1e-5)
    assert not sum(n for why, n in opt.report.calls.items() if why != "hits"), opt.report.calls


@pytest.mark.parametrize("sizes", [(2, 2, 1), (9, 9, 1), (2, 7, 0)])
def test_odd_lengths(sizes: tuple[int, int, int]) -> None:
    inputs = drawn(*sizes)
    module, opt, _ = optimized(replaced, inputs)
    torch.testing.assert_close(opt(*inputs), module(*inputs), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types(dtype: torch.dtype) -> None:
    inputs = [t.to(dtype) for t in drawn()]
    module, opt, site = optimized(added, inputs)
    assert site.status == "rewritten", (site.reason, site.tried)
    exact = module(*(t.double() for t in inputs))
    ours, theirs = ((f(*inputs) - exact).abs().max() for f in (opt, module))
    assert ours <= max(2 * theirs, 8 * torch.finfo(dtype).eps)
