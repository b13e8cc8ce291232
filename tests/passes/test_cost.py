"""The cost rule: small sites of known lengths stay the author's."""

import pytest
import torch

import attnopt
from attnopt.passes.rules import cost


class Plain(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.softmax(q @ k.transpose(-1, -2) * 0.25, -1) @ v


def status(length: int, dtype: torch.dtype = torch.float32, **options) -> tuple[str, str]:
    qkv = tuple(torch.randn(1, 2, length, 16, dtype=dtype) for _ in range(3))
    (site,) = attnopt.optimize(Plain().eval(), qkv, **options).report.sites
    return site.status, site.reason


@pytest.fixture(autouse=True)
def _as_shipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "FEWEST_SCORES", 32_768)


def test_a_small_site_is_canonical_and_says_why() -> None:
    assert status(16) == ("canonical", "cost: 512 scores are too few for a fused call to pay, "
                          "32768 are needed")


def test_a_large_site_is_rewritten() -> None:
    assert status(128)[0] == "rewritten"


def test_half_precision_pays_at_every_size() -> None:
    assert status(16, torch.bfloat16)[0] == "rewritten"


def test_unknown_lengths_are_taken_to_be_large() -> None:
    moving = {name: {2: torch.export.Dim.AUTO} for name in "qkv"}
    assert status(16, dynamic_shapes=moving)[0] == "rewritten"
