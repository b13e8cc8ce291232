"""Density and pictures of masks in the report of a model."""

from __future__ import annotations

import html.parser
import math

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.ir.site import SiteRecord
from attnopt.report import Report


class Model(nn.Module):
    """A window by index arithmetic, a window by a buffer, a causal mask with padding, no mask."""

    table: Tensor

    def __init__(self, length: int = 40) -> None:
        super().__init__()
        place = torch.arange(length)
        self.register_buffer("table", (place[:, None] // 8 - place // 8).abs() <= 1)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        place = torch.arange(x.shape[-2])
        near = (place <= place[:, None]) & (place > place[:, None] - 8)
        future = place > place[:, None]
        for hide in (~near, ~self.table, future | ~present[:, None, None, :], None):
            scores = x @ x.transpose(-1, -2) / math.sqrt(x.shape[-1])
            if hide is not None:
                scores = scores.masked_fill(hide, -math.inf)
            x = scores.softmax(-1) @ x
        return x


@pytest.fixture(scope="module")
def report() -> Report:
    present = torch.ones(1, 40, dtype=torch.bool)
    with torch.no_grad():
        return attnopt.optimize(Model().eval(), (torch.randn(1, 2, 40, 16), present), verify=False,
                                backend="aten").report


def test_densities(report: Report) -> None:
    window, table, padded, bare = report.sites
    near = torch.ones(40, 40).tril().triu(-7)
    assert window.density == pytest.approx(float(near.mean()))
    assert table.density == pytest.approx(float(Model().table.double().mean()))
    assert padded.density in (None, pytest.approx(41 / 80))  # what is padded is not known
    assert bare.density == 1.0 and bare.picture == ""
    assert window.tile_density is not None and window.tile_density >= window.density


def test_pictures(report: Report) -> None:
    text = report.pictures()
    assert "density 18.2%" in text and "▒▒" in text and "waste" in text
    assert Report.from_json(report.to_json()).pictures() == text
    assert "<svg" in report._repr_html_() and "18.2%" in str(report)
    parsed = html.parser.HTMLParser()
    parsed.feed(report._repr_html_())


def test_reports_without_pictures() -> None:
    assert "no mask" in Report([SiteRecord()]).pictures()
    odd = Report([SiteRecord(mask="<m>", picture="numbers <b>\n= <i>\n#+.\nnot marks\x1b[0m")])
    assert "██▒▒··" in odd.pictures() and "\x1b" not in odd.pictures()
    assert "<i>" not in odd._repr_html_().replace("<i>none</i>", "")
    assert "no mask" not in Report([SiteRecord(picture="broken")]).pictures()
