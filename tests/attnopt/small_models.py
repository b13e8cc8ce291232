"""Small models for the tests of the optimised module, and how to compare with the original."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import attnopt
from attnopt.ir.site import SiteRecord
from attnopt.passes import pipeline


class Attention(nn.Module):
    """Attention by hand, with BatchNorm, dropout, a counter and a table as buffers."""

    def __init__(self, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(dropout)
        self.out = nn.Linear(width, width)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("shift", torch.linspace(0, 1, width), persistent=False)
        self.factor = torch.tensor(0.5)
        self.scale = width**-0.5

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None, *,
                gain: float = 1.0) -> torch.Tensor:
        q, k, v = self.qkv(x + self.shift).chunk(3, -1)
        scores = q @ k.transpose(-1, -2) * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        y = self.out(self.drop(scores.softmax(-1)) @ v) * gain * self.factor
        with torch.no_grad():
            self.calls.add_(1)
            mean = y.mean()
        return self.norm(y.transpose(1, 2)).transpose(1, 2) + mean


def same(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    """Equal structure, and equal numbers up to a rounding of the sums."""
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def pair(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[attnopt.OptimizedModule, nn.Module]:
    """An optimised copy of a model and an untouched one."""
    original = copy.deepcopy(model)
    return attnopt.optimize(model, args, kwargs), original


def hits(module: attnopt.OptimizedModule) -> int:
    """How many calls took a variant."""
    return module.report.calls.get("hits", 0)


@pytest.fixture
def as_captured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Passes that leave the graph as it is and count it as rewritten: tests of capture and of the
    module then do not depend on what is recognised, and numbers must be equal to the last bit."""

    def rewrite(captured: Any, options: Any) -> pipeline.Rewritten:
        site = SiteRecord(path="all", status="rewritten", rule="as captured")
        return pipeline.Rewritten(captured.graph_module, [site], ())

    monkeypatch.setattr(pipeline, "rewrite", rewrite)
    return rewrite
