"""One tensor in two roles: its gradient counts once."""

from __future__ import annotations

import pytest
import torch

import attnopt.kernels.deformable.levels  # noqa: F401
from attnopt.kernels.deformable import Sampling


def _gradient(of_levels: bool) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.rand(1, 4, 1, 4, dtype=torch.float64, requires_grad=True)  # value and weights
    locations = torch.rand(1, 4, 1, 4, 2, dtype=torch.float64)
    text = str(Sampling((4,)))

    def run(value: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if of_levels:
            return torch.ops.attnopt.deformable_attention_of_levels.default(
                value, locations, weights, None, torch.tensor([[2, 2]]), torch.tensor([0]), text)
        return torch.ops.attnopt.deformable_attention.default(
            value, locations, weights, None, [2, 2], text)

    one = torch.autograd.grad(run(x, x).sum(), x, create_graph=not of_levels)[0]
    a, b = (x.detach().clone().requires_grad_() for _ in range(2))
    return one, sum(torch.autograd.grad(run(a, b).sum(), (a, b)))


@pytest.mark.parametrize("of_levels", [False, True])
def test_one_tensor_as_value_and_weights_counts_once(of_levels: bool) -> None:
    got, wanted = _gradient(of_levels)
    torch.testing.assert_close(got, wanted)
