"""report.diff(other): sites that came, went and changed."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from attnopt.errors import OptionError
from attnopt.ir.site import SiteRecord
from attnopt.report import Report

ONE = SiteRecord(path="a.0", status="kept", reason="no rule", density=0.5)


def test_equal_reports_have_no_difference() -> None:
    noisy = dataclasses.replace(ONE, density=0.501, node="softmax_7")
    for other in (ONE, noisy):
        found = Report([ONE]).diff(Report([other]))
        assert not found and str(found) == "0 sites added, 0 removed, 0 changed"
    nan = dataclasses.replace(ONE, density=math.nan)
    assert not Report([nan]).diff(Report([dataclasses.replace(nan)]))


def test_added_removed_and_changed() -> None:
    now = dataclasses.replace(ONE, status="rewritten", rule="attention", reason="", error=math.nan)
    found = Report([ONE, SiteRecord(path="<b>")]).diff(Report([now, SiteRecord(path="c")]))
    assert [s.path for s in found.added] == ["c"] and [s.path for s in found.removed] == ["<b>"]
    assert set(found.changed[0].fields) == {"status", "rule", "reason", "error"}
    assert "status: kept -> rewritten" in str(found) and "no rule -> (none)" in str(found)
    page = found._repr_html_()
    assert "<b>" not in page and "<ins>+ c" in page
    body = json.loads(found.to_json())
    assert body["changed"][0]["fields"]["error"] == {"before": None, "after": "nan"}


def test_sites_of_one_path_are_paired_in_order() -> None:
    found = Report([ONE, ONE]).diff(Report([ONE, ONE, ONE]))
    assert len(found.added) == 1 and not found.removed and not found.changed


def test_other_must_be_a_report() -> None:
    with pytest.raises(OptionError, match="other must be a Report"):
        Report().diff("text")  # type: ignore[call-overload]
