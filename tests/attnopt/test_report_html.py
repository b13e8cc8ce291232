"""The page of a report: what it holds, what it hides, and how it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.errors import OptionError
from attnopt.ir.graph_record import GraphRecord, NodeRecord, compared
from attnopt.ir.site import SiteRecord
from attnopt.report import Report

HOSTILE = "</script><script>alert('\"1')</script><img src=x onerror=alert(2)>"


def sample(name: str = "secretname") -> Report:
    nodes = (NodeRecord(f"{name}_x", "placeholder", "1x2x8x4", "float32"),
             NodeRecord(f"{name}_s", "softmax", "1x2x8x8", "float32", f"{name}.attn",
                        f"{name}.py:12", (0,), 0),
             NodeRecord("odd", name, path=name))
    site = SiteRecord(
        path=f"{name}.attn", source=f"{name}.py:12", status="kept", node=f"{name}_s",
        rule=f"({name})", mask=f"Band(0, {name})", bias=f"Table({name})", spec=name, code=name,
        reason=f"{name} reason", kernel="abc", shapes="1x2x8x4", tried=[f"{name}: {name}"],
        approximation=name, memory=name, density=0.25, picture=f"{name} 1\n= {name}\n#.\n+#")
    return Report([site], name, before=name, after=f"{name}2", notes=[name], calls={name: 2},
                  graphs=[GraphRecord(nodes, nodes)], kernels={"abc": f"float {name};"})


def written(report: Report, path: Path, **options: Any) -> str:
    report.to_html(path, **options)
    return path.read_text("utf-8")


def test_page_shows_graphs_kernels_and_facts(tmp_path: Path) -> None:
    text = written(sample(), tmp_path / "r.html")
    for part in ("float secretname;", "softmax(secretname_x)", "data-site=0", "site 1",
                 "secretname.py:12", "secretname reason", "<svg", "aria-live", "scope='col'"):
        assert part in text
    assert text.count("<script>") == 1


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    plain = written(sample(), tmp_path / "a.html")
    text = written(sample(HOSTILE), tmp_path / "b.html")
    assert text.count("<script") == plain.count("<script") == 1
    assert "<img" not in text and "alert('\"1')" not in text


def test_redacted_page_names_nothing(tmp_path: Path) -> None:
    given = sample()
    text = written(given, tmp_path / "r.html", redact=True)
    assert "secretname" not in text
    assert "1x2x8x4" in text and "softmax" in text and "25%" in text and "custom" in text
    assert given.model_name == "secretname" and given.sites[0].source  # a copy was redacted


def test_pages_are_whole_or_not_there(tmp_path: Path) -> None:
    target = tmp_path / "r.html"
    target.write_text("old")
    for path in (tmp_path, tmp_path / "missing" / "r.html", target / "r.html"):
        with pytest.raises(OptionError, match="path must"):
            sample().to_html(path)
        with pytest.raises(OptionError, match="path must"):
            sample().to_json(path)
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"] and target.read_text() == "old"


def test_graphs_and_kernels_come_back_from_json() -> None:
    given = sample()
    back = Report.from_json(given.to_json())
    assert back.graphs == given.graphs and back.kernels == given.kernels
    assert back.to_json() == given.to_json()
    old = given.to_json().replace('"schema_version": 2', '"schema_version": 1')
    assert Report.from_json(old).sites == given.sites


def test_nodes_belong_to_the_nearest_site() -> None:
    def chain(*names: str) -> tuple[NodeRecord, ...]:
        return tuple(NodeRecord(n, "add", inputs=(i - 1,) if i else ())
                     for i, n in enumerate(names))

    found = compared(chain("x", "a", "s", "b", "y", "t", "c"), chain("x", "new", "y", "other"),
                     {"s": 0, "t": 1}, {"new": 0, "other": 1})
    assert [n.site for n in found.before] == [None, 0, 0, 0, None, 1, 1]
    assert [n.site for n in found.after] == [None, 0, None, 1]
    assert [n.site for n in found.moved(3).after] == [None, 3, None, 4]


class _Window(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scores = x @ x.transpose(-1, -2)
        near = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril().triu(-8)
        return scores.masked_fill(~near, -torch.inf).softmax(-1) @ x


def test_report_of_a_model_marks_its_region() -> None:
    found = attnopt.optimize(_Window().eval(), (torch.randn(1, 2, 256, 16),)).report
    assert [s.status for s in found.sites] == ["rewritten"]
    assert found.sites[0].code.startswith("return scores.masked_fill")
    graph, = found.graphs
    assert {n.op for n in graph.before if n.site == 0} >= {"softmax", "matmul"}
    assert [n.op for n in graph.after if n.site == 0] == ["attention", "getitem"]
    if found.sites[0].lowering in ("cpp", "cpp:stencil"):
        assert len(found.kernels[found.sites[0].kernel]) > 1000
