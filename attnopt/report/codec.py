"""Report to JSON and back; `schema.json` describes the format.

SCHEMA_VERSION rises when a field changes its meaning or goes away. New fields do not raise it, and
a reader ignores those that it does not know. JSON has no NaN or infinity, so such numbers are the
strings "nan", "inf" and "-inf". Version 2 has the nodes of the graphs, each as a row of
NODE_FIELDS, and the generated kernels.
"""

from __future__ import annotations

import dataclasses
import json
import math
from importlib import resources
from typing import Any

from attnopt.errors import OptionError
from attnopt.ir.graph_record import GraphRecord, NodeRecord
from attnopt.ir.site import SiteRecord
from attnopt.timing import Comparison

SCHEMA_NAME = "attnopt.report"
SCHEMA_VERSION = 2
_SITE_FIELDS = frozenset(f.name for f in dataclasses.fields(SiteRecord))
_SITE_FLOATS = frozenset(
    f.name for f in dataclasses.fields(SiteRecord) if "float" in str(f.type))
NODE_FIELDS = tuple(f.name for f in dataclasses.fields(NodeRecord))
_COMPARISON_FIELDS = frozenset(f.name for f in dataclasses.fields(Comparison) if f.init)
_COMPARISON_TUPLES = frozenset({"baseline", "candidate", "names"})


def schema() -> dict[str, Any]:
    """The JSON Schema of `Report.to_json`."""
    text = resources.files("attnopt.report").joinpath("schema.json").read_text("utf-8")
    return json.loads(text)


def encode(body: dict[str, Any]) -> str:
    """JSON text of a report's fields; sites and measurement are dataclasses."""
    head = {"schema": SCHEMA_NAME, "schema_version": SCHEMA_VERSION}
    return json.dumps({**head, **_plain(body)}, indent=1, allow_nan=False)


def decode(text: str) -> dict[str, Any]:
    """Fields of a report from JSON text.

    Raises:
        OptionError: no JSON, another format, or a newer version.
    """
    try:
        body = json.loads(text)
    except ValueError as error:
        raise OptionError(f"text must be the JSON of a report, got {text[:80]!r}") from error
    if not isinstance(body, dict) or body.get("schema") != SCHEMA_NAME:
        raise OptionError(f"text must be the JSON of a report, got {text[:80]!r}")
    version = body.get("schema_version")
    if not isinstance(version, int) or not 1 <= version <= SCHEMA_VERSION:
        raise OptionError(f"schema_version must be from 1 to {SCHEMA_VERSION}, got {version!r}")
    body["sites"] = [_site(site) for site in body.get("sites", ())]
    body["graphs"] = [GraphRecord(*(tuple(map(_node, graph[side])) for side in ("before", "after")))
                      for graph in body.get("graphs", ())]
    body["timings"] = {k: _number(v) for k, v in body.get("timings", {}).items()}
    if body.get("measurement") is not None:
        body["measurement"] = _comparison(body["measurement"])
    return body


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, NodeRecord):
        return [_plain(getattr(value, name)) for name in NODE_FIELDS]
    if isinstance(value, Comparison):
        value = {name: getattr(value, name) for name in sorted(_COMPARISON_FIELDS)}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def _node(row: list[Any]) -> NodeRecord:
    known = dict(zip(NODE_FIELDS, row, strict=False))
    return NodeRecord(**{**known, "inputs": tuple(known.get("inputs", ()))})


def _number(value: Any) -> float:
    return float(value)


def _site(body: dict[str, Any]) -> SiteRecord:
    known = {k: v for k, v in body.items() if k in _SITE_FIELDS}
    for name in _SITE_FLOATS & known.keys():
        if known[name] is not None:
            known[name] = _number(known[name])
    return SiteRecord(**known)


def _comparison(body: dict[str, Any]) -> Comparison:
    known: dict[str, Any] = {k: tuple(v) if k in _COMPARISON_TUPLES else v
                             for k, v in body.items() if k in _COMPARISON_FIELDS}
    return Comparison(**known)
