"""Report: text, HTML and JSON of hand-made sites, whatever their strings hold."""

from __future__ import annotations

import copy
import dataclasses
import gc
import html.parser
import io
import json
import math
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from attnopt.errors import AttnOptError, OptionError
from attnopt.ir.site import SiteRecord
from attnopt.report import Report, schema
from attnopt.report.rows import fold
from attnopt.report.text import width, wrap

HOSTILE = [
    "<script>alert('x')</script>&amp;\"'",
    "line\nbreak\r\n\ttab\x1b[31mred\x07\x00",
    "\u202eright-to-left\u2066 \ud800 lone surrogate",
    "漢字の層" * 20 + "e\u0301\u0301\u0301",
    "[bold]markup[/bold] %s {0} {}",
    "x" * 10_000,
    "a.b." * 3_000,
    " ",
]


def bert(layers: int = 12) -> list[SiteRecord]:
    return [
        SiteRecord(path=f"encoder.layer.{i}.attention.self", source="modeling_bert.py:142",
                   status="rewritten", rule="sdpa", mask="key(mask)", shapes="2x4x32x16",
                   lowering="aten:sdpa", error=1e-7 * (i + 1), node=f"softmax_{i}")
        for i in range(layers)]


def hostile_sites() -> list[SiteRecord]:
    text = [f.name for f in dataclasses.fields(SiteRecord) if f.type == "str"]
    sites = [SiteRecord(**{**dict.fromkeys(text, h), "status": status, "tried": [h, f"{h}: {h}"]},
                        error=math.nan, density=math.inf, predicted_speedup=-math.inf)
             for h in HOSTILE for status in ("rewritten", "canonical", "kept")]
    return [*sites, SiteRecord()]


def report(sites: list[SiteRecord], **more: Any) -> Report:
    return Report(sites, **{"model_name": "Model", "timings": {"capture": 1.25, "verify": 0.5},
                            **more})


def hostile() -> Report:
    graph = "\n".join(HOSTILE)
    return Report(hostile_sites(), HOSTILE[0], {HOSTILE[1]: math.inf}, graph, graph + "\nx",
                  HOSTILE, {h: 3 for h in HOSTILE})


@pytest.mark.parametrize("given", [
    report([]), report(bert(1)), report(bert(100)), hostile(), Report(),
    report([SiteRecord(path="m" * i, status="kept", reason=f"r{i}") for i in range(1, 101)]),
], ids=["none", "one", "hundred layers", "hostile", "empty", "hundred kinds"])
def test_text_is_narrow_and_printable(given: Report) -> None:
    lines = str(given).splitlines()
    assert all(width(line) <= 100 for line in lines)
    assert all(line.isprintable() for line in lines)
    str(given).encode("utf-8")
    repr(given).encode("utf-8")


def test_text_says_what_happened() -> None:
    sites = [*bert(), SiteRecord(
        path="head.attn", source="user.py:7", status="kept", reason="weights are used twice",
        tried=["head_mixing: the mixing matrix depends on the query", "sdpa: is no dot product"])]
    text = str(report(sites, notes=["a note"], calls={"hits": 4, "input 0 must be float32": 2}))
    assert "encoder.layer.{0..11}" in text
    assert "encoder.layer.3." not in text
    assert "13 sites: 12 rewritten, 0 canonical, 1 kept" in text
    assert "head.attn at user.py:7" in text
    assert "head_mixing" in text and "the mixing matrix depends on the query" in text
    assert "1.2e-06" in text, "a row of layers shows the largest error"
    assert "author's" not in text
    assert "capture 1.25 s, verify 500 ms; 1.75 s in all" in text
    assert "4 by a variant, 2 by the module's own forward" in text
    assert "2 x input 0 must be float32" in text
    assert "a note" in text


def test_the_authors_own_error_is_beside_ours() -> None:
    sites = [dataclasses.replace(s, error_original=2 * (s.error or 0.0)) for s in bert()]
    text, page = str(report(sites)), report(sites)._repr_html_()
    assert "1.2e-06" in text and "(2.4e-06)" in text and "(author's)" in text
    assert "1.2e-06 (2.4e-06)" in page and "2.40e-06" in page
    odd = [*sites[:2], dataclasses.replace(sites[2], error_original=math.nan)]
    assert "(nan)" in str(report(odd))


def test_no_sites_is_said() -> None:
    assert "no sites" in str(report([]))
    assert report([]).counts == {}
    assert "0 sites" in repr(report([]))


def test_counts_by_kind() -> None:
    sites = [*bert(2), SiteRecord(kind="sampling"), SiteRecord(kind="reassociable")]
    assert report(sites).counts == {
        "attention": {"rewritten": 2, "canonical": 0, "kept": 0},
        "sampling": {"rewritten": 0, "canonical": 0, "kept": 1},
        "reassociable": {"rewritten": 0, "canonical": 0, "kept": 1}}
    assert "sampling: 1 kept" in str(report(sites))


def paths(sites: list[SiteRecord]) -> list[str]:
    return [row.path for row in fold(sites)]


@pytest.mark.parametrize(("given", "folded"), [
    (["a.0.b", "a.1.b", "a.2.b"], ["a.{0..2}.b"]),
    (["a.0", "b.0"], ["a.0", "b.0"]),
    (["a.0.self", "a.0.cross", "a.1.self", "a.1.cross"], ["a.{0..1}.self", "a.{0..1}.cross"]),
    (["l.0.b.0", "l.0.b.1", "l.1.b.0", "l.1.b.1"], ["l.{0..1}.b.{0..1}"]),
    (["l.0.b.0", "l.0.b.1", "l.1.b.0"], ["l.0.b.{0..1}", "l.1.b.0"]),
    (["h_0", "h_2", "h_4"], ["h_{0..4..2}"]),
    (["h0", "h1", "h5"], ["h{0,1,5}"]),
    (["a.00", "a.01"], ["a.00", "a.01"]),
    (["", ""], ["(model) (x2)"]),
    (["a.0", "a.0", "a.1", "a.1"], ["a.{0..1} (x2)"]),
    (["a.0", "a.0", "a.1"], ["a.0 (x2)", "a.1"]),
    ([], []),
])
def test_layers_fold(given: list[str], folded: list[str]) -> None:
    assert paths([SiteRecord(path=p) for p in given]) == folded
    assert sum(len(row.sites) for row in fold([SiteRecord(path=p) for p in given])) == len(given)


def test_layers_that_differ_do_not_fold() -> None:
    sites = bert(4)
    sites[1].mask = sites[3].mask = "band"
    assert paths(sites) == [
        "encoder.layer.{0,2}.attention.self", "encoder.layer.{1,3}.attention.self"]
    for name, other in [("status", "kept"), ("rule", "r"), ("bias", "b"), ("density", 0.5),
                        ("lowering", "l"), ("reason", "r"), ("source", "s"), ("spec", "s"),
                        ("shapes", "s"), ("tile", "t"), ("predicted_speedup", 2.0),
                        ("kind", "sampling"), ("tried", ["t"])]:
        sites = bert(3)
        setattr(sites[2], name, other)
        assert len(fold(sites)) == 2, name


def test_node_numbers_do_not_keep_layers_apart() -> None:
    nodes = ["mean", "mean_1", "mean_2"]
    sites = [SiteRecord(path=f"l.{i}", reason=f"used by {n}") for i, n in enumerate(nodes)]
    assert paths(sites) == ["l.{0..2}"]
    assert "used by mean" in str(report(sites))
    apart = [SiteRecord(path=n, status="canonical", reason=f"used by {n}") for n in nodes]
    assert "3 x used by mean" in str(report(apart))


def test_shapes_are_not_repeated() -> None:
    for given, shown in [("2x8 2x8 2x8", "2x8"), ("2x4 2x8 2x8", "2x4 2x8"), ("2x8", "2x8"),
                         ("2x8 2x4 2x8", "2x8 2x4 2x8"), ("", "")]:
        assert fold([SiteRecord(shapes=given)])[0].cells()["shapes"] == shown


def test_wrap_keeps_the_text() -> None:
    for text in ["encoder.layer.{0..11}.attention.self", "a b  c", "漢字" * 9, "x" * 50, ""]:
        for cells in (1, 2, 7, 20):
            lines = wrap(text, cells)
            assert "".join(lines).replace(" ", "") == text.replace(" ", "")
            assert all(width(line) <= max(cells, 2) for line in lines)
    assert wrap("encoder.layer.{0..11}.self", 16) == ["encoder.layer.", "{0..11}.self"]


@pytest.mark.parametrize("given", [report([]), report(bert(5)), hostile()],
                         ids=["none", "layers", "hostile"])
def test_json_round_trip(given: Report) -> None:
    text = given.to_json()
    assert "NaN" not in text and "Infinity" not in text
    back = Report.from_json(text)
    assert str(back) == str(given)
    assert back.to_json() == text
    assert back.counts == given.counts
    assert repr(back.sites) == repr(given.sites)
    assert back.diff() == given.diff()


def test_json_keeps_to_its_schema(tmp_path: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    bound = _bound(nn.Linear(2, 2))
    bound.measure(repeats=3)
    for given in (report(bert(3)), hostile(), bound):
        given.to_json(tmp_path / "report.json")
        body = json.loads((tmp_path / "report.json").read_text("utf-8"))
        jsonschema.validate(body, schema())


def test_schema_names_every_field() -> None:
    body = json.loads(report(bert(1)).to_json())
    assert set(body) == set(schema()["properties"]) == set(schema()["required"])
    fields = {f.name for f in dataclasses.fields(SiteRecord)}
    assert set(schema()["$defs"]["site"]["properties"]) == fields


@pytest.mark.parametrize("text", [
    "", "{}", "[]", "nonsense", '{"schema": "other", "schema_version": 1}',
    '{"schema": "attnopt.report", "schema_version": 99}',
    '{"schema": "attnopt.report", "schema_version": "1"}', '{"schema": "attnopt.report"}',
])
def test_other_json_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="must be"):
        Report.from_json(text)


def test_fields_of_a_later_minor_version_are_ignored() -> None:
    body = json.loads(report(bert(1)).to_json())
    body["new"] = body["sites"][0]["new"] = 1
    assert str(Report.from_json(json.dumps(body))) == str(report(bert(1)))


class _Balance(html.parser.HTMLParser):
    """Every tag is closed in order, and no element can run or load anything."""

    VOID = frozenset({"wbr", "meta", "br", "input"})

    def __init__(self, page: bool) -> None:
        super().__init__()
        self.open: list[str] = []
        self.page, self.scripts = page, 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("link", "img", "iframe")
        assert tag != "script" or self.page and not attrs
        self.scripts += tag == "script"
        assert not any(name.startswith("on") or name == "src" for name, _ in attrs)
        assert all(self.page and (value or "").startswith("#kernel-") for name, value in attrs
                   if name == "href")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("given", [report([]), report(bert(100)), hostile()],
                         ids=["none", "layers", "hostile"])
def test_html_is_closed_and_safe(given: Report, tmp_path: Any) -> None:
    given.to_html(tmp_path / "report.html")
    for text in (given._repr_html_(), (tmp_path / "report.html").read_text("utf-8")):
        parser = _Balance(page=text.startswith("<!doctype"))
        parser.feed(text)
        parser.close()
        assert parser.open == [] and parser.scripts == parser.page
        assert "prefers-color-scheme" in text
        assert "url(" not in text and "@import" not in text
        assert len(text) < 1_000_000


def test_html_fragment_cuts_a_long_diff(tmp_path: Any) -> None:
    given = report([], before="", after="\n".join(f"line{i}end" for i in range(1000)))
    assert "line999end" not in given._repr_html_()
    assert "more lines" in given._repr_html_()
    given.to_html(tmp_path / "report.html")
    assert "line999end" in (tmp_path / "report.html").read_text("utf-8")


def test_rich_shows_the_same_text() -> None:
    console = pytest.importorskip("rich.console")
    for given in (report(bert(3)), hostile()):
        out = io.StringIO()
        console.Console(file=out, width=100, color_system=None).print(given)
        said = [line.rstrip() for line in out.getvalue().splitlines()]
        assert said == [line.rstrip() for line in str(given).splitlines()]


def test_diff() -> None:
    given = report([], before="a\nb\nc", after="a\nx\nc")
    assert given.diff().splitlines() == ["--- before", "+++ after", "@@ -1,3 +1,3 @@",
                                         " a", "-b", "+x", " c"]
    assert report([], before="a", after="a").diff() == ""


class _Toy(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        return self.inner(x) * scale


def _bound(module: nn.Module) -> Report:
    given = report(bert(1), calls={})
    given.bind(module.forward, lambda *a, **k: module.forward(*a, **k), ((torch.ones(1, 2),), {}))
    given.__dict__["_held"] = module
    return given


def test_measure_times_both_in_turns() -> None:
    module = _Toy(nn.Linear(2, 2))
    given = _bound(module)
    found = given.measure(repeats=7)
    assert len(found.baseline) == len(found.candidate) == 7
    assert found.clock == "cpu" and found.threads == 1 and found.device == "cpu"
    low, high = found.interval
    assert 0 < low <= found.speedup <= high
    assert str(found) in " ".join(str(given).split()) or "7 interleaved" in str(given)
    assert given.measurement is found
    assert Report.from_json(given.to_json()).measurement == found


def test_measure_takes_other_arguments_and_counts_fallbacks() -> None:
    seen: list[tuple[Any, ...]] = []
    calls = {"hits": 0, "other length": 0}

    def original(*args: Any, **kwargs: Any) -> None:
        seen.append((args, kwargs))

    def optimized(*args: Any, **kwargs: Any) -> None:
        calls["other length"] += 1

    given = report([], calls=calls)
    given.bind(original, optimized)
    found = given.measure((1,), {"a": 2}, repeats=2, threads=2)
    assert seen[0] == ((1,), {"a": 2})
    assert found.clock == "wall" and found.threads == 2
    assert found.fallbacks == calls["other length"] > 0
    assert "own forward" in str(found)
    assert given.measure(kwargs={"a": 3}, repeats=1).fallbacks
    assert seen[-1] == ((), {"a": 3})


def test_measure_needs_a_live_module() -> None:
    with pytest.raises(AttnOptError, match="live optimised module"):
        report([]).measure()
    given = report([])
    given.bind(len, len)
    with pytest.raises(AttnOptError, match="args must be given"):
        given.measure()
    with pytest.raises(OptionError, match="args must be a tuple, got list"):
        given.measure([1])  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="repeats must be at least 1, got 0"):
        given.measure(("a",), repeats=0)
    with pytest.raises(ZeroDivisionError):
        given.bind(len, lambda _: 1 / 0)
        given.measure(("a",))


def test_a_report_does_not_keep_the_module_alive() -> None:
    module = _Toy(nn.Linear(2, 2))
    given = report([])
    given.bind(module.forward, module.forward, ((torch.ones(1, 2),), {}))
    assert given.measure(repeats=1).ratios
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None
    with pytest.raises(AttnOptError, match="live optimised module"):
        given.measure()


@pytest.mark.parametrize("copied", [
    copy.deepcopy, copy.copy, lambda r: pickle.loads(pickle.dumps(r))],
    ids=["deepcopy", "copy", "pickle"])
def test_copies_are_snapshots(copied: Any) -> None:
    calls = {"hits": 1}
    given = report(bert(3), calls=calls, notes=["n"])
    given.bind(lambda: 1, lambda: 2, lambda: ((), {}))
    other = copied(given)
    assert str(other) == str(given) and other.to_json() == given.to_json()
    calls["hits"] += 1
    other.sites.append(SiteRecord())
    assert given.calls["hits"] == 2 and other.calls["hits"] == 1
    assert len(given.sites) == 3
    with pytest.raises(AttnOptError):
        other.measure()
    assert given.measure(repeats=1).ratios
