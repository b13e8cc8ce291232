"""The committed pages are what their generator writes, and it reads what it should."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import attnopt
from docs import api_page, generate, limits_page, markdown, reasons

DOCS = Path(generate.__file__).parent


@pytest.fixture(scope="module")
def pages() -> Iterator[dict[str, str]]:
    with pytest.MonkeyPatch.context() as patch:  # other tests take small sites as well
        patch.setattr("attnopt.passes.rules.cost.FEWEST_SCORES", 32_768)
        yield {name: page() for name, page in generate.PAGES.items()}


@pytest.mark.parametrize("name", list(generate.PAGES))
def test_committed_pages_are_up_to_date(name: str, pages: dict[str, str]) -> None:
    assert (DOCS / name).read_text("utf-8") == pages[name], \
        f"docs/{name} must be written anew: python -m docs.generate"


def test_generating_twice_gives_the_same(pages: dict[str, str]) -> None:
    assert api_page.page() == pages["api.md"] and limits_page.page() == pages["limits.md"]


def test_every_public_name_and_command_is_there(pages: dict[str, str]) -> None:
    text = pages["api.md"]
    for name in set(attnopt.__all__) - {"__version__", "AttnOptError"}:
        assert f"## attnopt.{name}\n" in text
    for name in ("inspect", "optimize", "export", "onnx", "bench", "calibrate", "rules", "cache",
                 "env"):
        assert f"### attnopt {name}\n" in text
    for name in ("ATTNOPT_CACHE_DIR", "VerificationError", "SinkWindow", ".to_html", "dynamic"):
        assert name in text


def test_pages_hold_nothing_of_one_machine(pages: dict[str, str]) -> None:
    for text in pages.values():
        assert not re.search(r"/home/|/root/|/tmp/|/work/| at 0x", text)
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert (DOCS / target).is_file(), target
        assert text.count("\n```") % 2 == 0


def test_reasons_of_every_step(pages: dict[str, str]) -> None:
    for title, _, patterns in reasons.GROUPS:
        found = [text for _, texts in reasons.collect(patterns) for text in texts]
        assert len(found) > 5, title
        assert len(found) == len(set(found)), title
    for text in ("the keys are a parameter: a router or classifier, not attention",
                 "device must be cpu, got …", "an input tensor is not dense"):
        assert f"- {text}\n" in pages["limits.md"]


def test_bench_tables_are_those_that_are_stored(pages: dict[str, str]) -> None:
    from attnopt.bench import RESULTS

    for path in RESULTS.glob("cpu-*.json"):
        assert "### cpu\n" in pages["limits.md"] and path.stat().st_size
    assert "of the median" in pages["limits.md"]


def test_docstrings_as_markdown() -> None:
    text = '''One line.

        Code follows:

            run(x)

        first:  a field
        second: another,
                continued

        Args:
            x, y: numbers
                of any size
            **more: the rest

        Returns:
            A number.
        '''
    assert markdown.docstring(text) == [
        "One line.", "", "Code follows:", "", "```", "run(x)", "```", "", "- `first`: a field",
        "- `second`: another, continued", "", "*Args*", "", "- `x, y`: numbers of any size",
        "- `**more`: the rest", "", "*Returns*", "", "A number."]
    assert markdown.docstring(text, skip=1)[0] == "Code follows:"
    assert markdown.docstring(None) == []

    def function(a: int, *, b: str = "x", **c: object) -> bool:
        return bool(a)

    assert markdown.signature("f", function) == "f(a: int, *, b: str = 'x', **c: object) -> bool"
    assert markdown.table(("a", "b"), [("x|y", "z")]) == ["| a | b |", "|---|---|", "| x\\|y | z |"]


def test_check_says_what_is_stale(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(generate, "HERE", tmp_path)
    monkeypatch.setattr(generate, "PAGES", {"a.md": lambda: "text\n"})
    assert generate.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/a.md must be written anew\n"
    assert generate.main([]) == 0 and (tmp_path / "a.md").read_text() == "text\n"
    assert generate.main(["--check"]) == 0
