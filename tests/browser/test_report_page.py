"""The report's page in headless Chromium: opened, filtered, expanded, light, dark and narrow."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from attnopt.ir.graph_record import GraphRecord, NodeRecord
from attnopt.ir.site import SiteRecord
from attnopt.report import Report
from tests.browser.driver import Browser, browser

DRIVER = shutil.which("chromedriver")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(
    DRIVER is None or shutil.which("chromium") is None,
    reason="needs the packages chromium and chromium-driver")]
SHOWN = "return document.querySelectorAll('tbody.site:not([hidden])').length"
OPEN = "return document.querySelectorAll('details[open]').length"
BACKGROUND = "return getComputedStyle(document.querySelector('.attnopt')).backgroundColor"
LIGHT, DARK = "rgb(255, 255, 255)", "rgb(13, 17, 23)"


def _report() -> Report:
    sites = [
        SiteRecord(path="encoder.attn", status="rewritten", rule="attention", mask="Causal",
                   lowering="cpp", tile="32x64", density=0.5, predicted_speedup=3.0, error=1e-7,
                   source="model.py:12", code="return attend(q, k, v)", kernel="abc",
                   shapes="1x2x64x32", predicted_seconds=1e-4, measured_original=4e-4,
                   measured_seconds=2e-4, measured_speedup=2.0, measured_low=1.9,
                   measured_high=2.2, roofline=0.4, roofline_bound="compute",
                   picture="density 50%\n= \n#...\n##..\n###.\n+###"),
        SiteRecord(path="<img src=x onerror=alert(1)>", status="kept", reason="escapes <b>",
                   source="model.py:30", rule="attention"),
        SiteRecord(path="encoder.unmeasured", status="rewritten", rule="attention", lowering="cpp"),
        SiteRecord(path="decoder.sample", kind="sampling", status="canonical", reason="as good")]
    nodes = (NodeRecord("x", "placeholder", "1x64x64", "float32"),
             NodeRecord("s", "softmax", "1x2x64x64", "float32", "encoder.attn", "model.py:12",
                        (0,), 0))
    return Report(sites, "Toy", graphs=[GraphRecord(nodes, nodes)], before="a", after="b",
                  kernels={"abc": "void kernel() {}"}, timings={"capture": 1.0})


@pytest.fixture(scope="module")
def window(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert DRIVER is not None
    folder = tmp_path_factory.mktemp("browser")
    _report().to_html(folder / "report.html")
    with browser(DRIVER, folder / "profile") as found:
        yield found


@pytest.fixture
def page(window: Browser, tmp_path: Path) -> Iterator[Browser]:
    path = tmp_path / "report.html"
    _report().to_html(path)
    window.resize(1200, 900)
    window.scheme("light")
    window.open(path)
    yield window
    assert window.complaints() == []


def _picture(page: Browser, name: str) -> None:
    folder = os.environ.get("SCREENSHOTS")
    if folder:
        page.screenshot(Path(folder) / f"{name}.png")


def test_search_and_filters(page: Browser) -> None:
    assert page.run(SHOWN) == 4
    page.type("#text", "MODEL.py:12 causal")
    assert page.run(SHOWN) == 1
    assert page.run("return document.getElementById('count').textContent") == "1 of 4 rows shown"
    page.type("#text", "\ue003" * len("MODEL.py:12 causal"))  # backspace
    assert page.run(SHOWN) == 4
    page.click("select[data-filter=kind] option[value=sampling]")
    assert page.run(SHOWN) == 1
    page.click("select[data-filter=status] option[value=kept]")
    assert page.run(SHOWN) == 0


def test_expand_and_collapse(page: Browser) -> None:
    page.click("#expand")
    assert page.run(OPEN) == page.run("return document.querySelectorAll('details').length") > 3
    _picture(page, "expanded")
    page.click("#collapse")
    assert page.run(OPEN) == 0


def test_measured_and_not_measured(page: Browser) -> None:
    page.click("#expand")
    facts = "return [...document.querySelectorAll('dt')].filter(d => d.textContent === '{}')" \
            ".map(d => d.nextElementSibling.textContent)"
    measured, missing = page.run(facts.format("measured"))
    assert measured == "200 us, the author's 400 us: 2.00x (1.90x to 2.20x)"
    assert missing == "not measured: report.measure(sites=True) measures every site alone"
    assert page.run(facts.format("predicted"))[0].startswith("100 us")
    assert page.run(facts.format("roofline")) == ["40% (compute) of what the device allows"]


def test_a_site_leads_to_the_text_of_its_kernel(page: Browser) -> None:
    page.run("document.querySelector('tr.more details').open = true")
    page.click("a[href='#kernel-abc']")
    assert page.run("return document.getElementById('kernel-abc').open")


def test_light_and_dark(page: Browser) -> None:
    assert page.run(BACKGROUND) == LIGHT
    _picture(page, "light")
    page.scheme("dark")
    assert page.becomes(BACKGROUND, DARK) == DARK  # a busy browser takes its time
    _picture(page, "dark")
    page.click("#theme")
    assert page.run(BACKGROUND) == LIGHT


def test_keyboard_reaches_the_controls(page: Browser) -> None:
    reached = []
    for _ in range(5):
        page.command("Input.dispatchKeyEvent", type="keyDown", key="Tab", code="Tab",
                     windowsVirtualKeyCode=9)
        page.command("Input.dispatchKeyEvent", type="keyUp", key="Tab", code="Tab",
                     windowsVirtualKeyCode=9)
        reached.append(page.run("const e = document.activeElement;"
                                "return e.id || e.dataset.filter || e.tagName"))
    assert reached == ["theme", "text", "status", "kind", "rule"]
    assert page.run("return getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_narrow_pages_do_not_scroll_sideways(page: Browser) -> None:
    page.resize(360, 800)
    page.click("#expand")
    assert page.run("return document.documentElement.scrollWidth") <= 360
    _picture(page, "narrow")


def test_names_cannot_run(page: Browser) -> None:
    assert page.run("return document.querySelectorAll('img, script').length") == 1
