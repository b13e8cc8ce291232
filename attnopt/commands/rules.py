"""`attnopt rules`: what can take an attention."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any

from attnopt.commands import FINE, command
from attnopt.errors import OptionError

_USE = {True: "always", False: "by request", None: "by name"}


def add(commands: Any) -> None:
    rules = command(commands, "rules", _rules, "the rules, in the order in which they are tried",
                    "attnopt rules\nattnopt rules --explain fused-softmax")
    rules.add_argument("--explain", metavar="NAME", help="what one of them takes, and why")
    rules.add_argument("--json", action="store_true", help="as JSON")


def _rules(options: argparse.Namespace) -> int:
    found = _all()
    if options.explain:
        found = [rule for rule in found if rule["name"] == options.explain]
        if not found:
            known = ", ".join(r["name"] for r in _all())
            raise OptionError(f"a rule must be one of {known}, got {options.explain!r}")
    if options.json:
        print(json.dumps(found, indent=1))
    elif options.explain:
        rule = found[0]
        print(f"{rule['name']} ({rule['kind']}, {_USE[rule['exact']]}): "
              f"{rule['recognizes']}\n\n{rule['about']}")
    else:
        print("\n".join(_table(found)))
    return FINE


def _registered() -> Iterator[dict[str, Any]]:
    from attnopt.passes.rules import REGISTRY
    from attnopt.rules import Approximation

    for rule in REGISTRY:
        yield _entry(rule, type(rule), not isinstance(rule, Approximation))


def _approximations() -> Iterator[dict[str, Any]]:
    from attnopt import approximations
    from attnopt.rules import Approximation

    for name in approximations.__all__:
        kind = getattr(approximations, name)
        if isinstance(kind, type) and issubclass(kind, Approximation):
            yield {**_entry(kind, kind, False), "class": f"{kind.__module__}:{kind.__name__}"}


def _entry(rule: Any, kind: type, exact: bool) -> dict[str, Any]:
    module = inspect.getmodule(kind)
    about = inspect.getdoc(module) if module is not None else None
    return {"name": rule.name, "kind": getattr(rule, "kind", "attention"), "exact": exact,
            "priority": getattr(rule, "priority", 0) if exact else None,
            "recognizes": getattr(rule, "recognizes", ""),
            "about": about or inspect.getdoc(kind) or ""}


def _installed(known: set[str]) -> Iterator[dict[str, Any]]:
    """What installed packages offer: named, not loaded; `--rule NAME` loads one."""
    for entry in sorted(entry_points(group="attnopt.rules"), key=lambda entry: entry.name):
        if entry.name not in known:
            yield {"name": entry.name, "kind": "", "exact": None, "priority": None,
                   "recognizes": f"offered by {entry.value}", "about": ""}


def _all() -> list[dict[str, Any]]:
    found = [*_registered(), *_approximations()]
    return [*found, *_installed({rule["name"] for rule in found})]


def _table(found: list[dict[str, Any]]) -> list[str]:
    rows = [["rule", "of", "use", "priority", "recognizes"]]
    for rule in found:
        priority = "" if rule["priority"] is None else str(rule["priority"])
        rows.append([rule["name"], rule["kind"], _USE[rule["exact"]], priority,
                     rule["recognizes"]])
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:{width}}" for cell, width in zip(row, wide, strict=True)).rstrip()
            for row in rows]
