"""Autocast is written into the graph as casts, and they are torch's own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnopt.passes.capture.export import capture

X = torch.linspace(-2, 2, 2 * 5 * 8).reshape(2, 5, 8)


class Mixed(nn.Module):
    """One operation of each kind that autocast treats in its own way."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.norm, self.conv = nn.LayerNorm(8), nn.Conv1d(8, 8, 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        y = self.out((q @ k.mT * 0.3).softmax(-1) @ v) + x
        z = F.scaled_dot_product_attention(q, k, v)
        e = torch.einsum("bij,bkj->bik", q, k).sum(-1, keepdim=True)
        with torch.autocast("cpu", enabled=False):
            u = self.out(x)
        w = torch.cat([y, z], -1).float().mean() + torch.linalg.vector_norm(z) + F.gelu(y)
        return w + e + u + self.conv(x.mT).mean() + F.mse_loss(y, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["around", "inside"])
def test_the_same_numbers_and_gradients_with_autocast_off(dtype, where):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = Mixed()

        def forward(self, x):
            with torch.autocast("cpu", dtype):
                return self.model(x)

    model = Mixed() if where == "around" else Inside()
    with torch.autocast("cpu", dtype, enabled=where == "around"):
        traced = capture(model, (X,))
        expected = model(X)
    code = traced.captured.graph_module.code
    assert "autocast" not in code and str(dtype) in code
    (out,) = traced.captured.graph_module(*traced.captured.arguments())
    assert out.dtype is expected.dtype and torch.equal(out, expected)
    grads = [torch.autograd.grad(o.float().sum(), model.parameters()) for o in (out, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_values_in_the_graph_have_the_dtypes_of_the_run():
    with torch.autocast("cpu", torch.bfloat16):
        captured = capture(Mixed(), (X,)).captured

    class Compare(torch.fx.Interpreter):
        def run_node(self, node):
            value = super().run_node(node)
            if isinstance(value, torch.Tensor):
                assert value.dtype is node.meta["val"].dtype, node
                assert value.shape == node.meta["val"].shape, node
            return value

    Compare(captured.graph_module).run(*captured.arguments())
