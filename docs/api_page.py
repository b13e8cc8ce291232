"""The API reference: every public name with its signature and docstring, the command line, the
environment variables."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import attnopt
from attnopt import approximations, backend, cli, environment, errors
from attnopt.commands import STATUSES
from docs.markdown import docstring, first, signature, table

#: the order in which a reader needs them; further names follow
_ORDER = ("optimize", "explain", "OptimizedModule", "Report", "export", "save", "package",
          "export_onnx")
_NOT_HERE = ("__version__", "AttnOptError")
_RULES = ("Rule", "Region", "Match", "Decline", "Approximation", "BlockTable", "Factors")
_RULE_FUNCTIONS = ("registered", "unregister")
_PLAIN_METHODS = ("forward", "bind")


def page() -> str:
    """The whole page."""
    names = [n for n in attnopt.__all__ if n not in _NOT_HERE]
    names.sort(key=lambda n: (_ORDER.index(n) if n in _ORDER else len(_ORDER), n))
    lines = ["# API reference", "",
             "Written from the docstrings by `python -m docs.generate`; change those, not this "
             "page. What is not taken, and how close results are: [limits](limits.md).", "",
             "Importing `attnopt` is cheap: each name is loaded when it is first used.", ""]
    for name in names:
        lines += _section(f"attnopt.{name}", getattr(attnopt, name))
    lines += ["## torch.compile(model, backend=\"attnopt\")", "", *docstring(backend.__doc__), "",
              *docstring(backend.attnopt_backend.__doc__), ""]
    lines += _rules()
    lines += ["## Errors", "", *table(("error", "when"), (
        (f"`attnopt.errors.{name}`", first(kind.__doc__)) for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, errors.AttnOptError))), ""]
    lines += _command_line()
    lines += ["## Environment variables", "", *table(("variable", "if it is not set"), (
        (f"`{name}`", text) for name, text in environment.SETTINGS.items())), ""]
    return "\n".join(lines)


def _section(name: str, thing: Any) -> list[str]:
    if not inspect.isclass(thing):
        return [f"## {name}", "", "```python", signature(name, thing), "```", "",
                *docstring(thing.__doc__), ""]
    lines = [f"## {name}", "", *docstring(thing.__doc__), ""]
    for member, kind in vars(thing).items():
        if member.startswith("_") or member in _PLAIN_METHODS:
            continue
        if isinstance(kind, property):
            lines += [f"### .{member}", "", *docstring(kind.__doc__), ""]
        elif isinstance(kind, (staticmethod, classmethod)) or inspect.isfunction(kind):
            function = kind if inspect.isfunction(kind) else kind.__func__
            lines += [f"### .{member}", "", "```python",
                      signature(member, function, method=not isinstance(kind, staticmethod)),
                      "```", "", *docstring(function.__doc__), ""]
    return lines


def _rules() -> Iterator[str]:
    """The vocabulary of rules, and the approximations."""
    rules = importlib.import_module("attnopt.rules")
    yield from ("## attnopt.rules", "", *docstring(rules.__doc__), "")
    for name in _RULES:
        kind = getattr(rules, name, None)
        if kind is None:
            continue
        yield from (f"### {name}", "", *docstring(kind.__doc__), "")
        for member, function in vars(kind).items():
            if inspect.isfunction(function) and not member.startswith("_") and function.__doc__:
                yield from ("```python", signature(member, function, method=True), "```", "",
                            *docstring(function.__doc__), "")
    for name in _RULE_FUNCTIONS:
        function = getattr(rules, name, None)
        if function is not None:
            yield from (f"### {name}", "", "```python", signature(name, function), "```", "",
                        *docstring(function.__doc__), "")
    yield from ("## attnopt.approximations", "", *docstring(approximations.__doc__), "")
    for name in approximations.__all__:
        kind = getattr(approximations, name)
        yield from (f"### {name}", "", "```python", signature(name, kind.__init__, method=True)
                    .removesuffix(" -> None"), "```", "", *docstring(kind.__doc__), "",
                    *docstring(inspect.getmodule(kind).__doc__), "")


def _command_line() -> Iterator[str]:
    """Commands with their options and examples."""
    parser = cli.parser()
    yield from ("## Command line", "", "`attnopt COMMAND`, or `python -m attnopt COMMAND`. "
                "Results go to stdout, progress and logs to stderr.", "",
                *table(("exit status", "means"), (
                    (str(n), text) for n, text in STATUSES.items())), "")
    from attnopt.commands import models

    yield from (*docstring(models.__doc__), "")
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for name, command in commands.choices.items():
        about, examples = command.description or "", command.epilog or ""
        yield from (f"### attnopt {name}", "", about, "")
        shown = [a for a in command._actions if a.help != argparse.SUPPRESS and a.dest != "help"]
        yield from (*table(("argument", ""), ((_flags(a), a.help or "") for a in shown)), "")
        code = [line.strip() for line in examples.splitlines()[1:]]
        yield from ("```", *code, "```", "")


def _flags(action: argparse.Action) -> str:
    value = action.metavar if isinstance(action.metavar, str) else ""
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    elif not value and action.nargs != 0 and action.option_strings:
        value = action.dest.upper()
    names = ", ".join(action.option_strings)
    return f"`{' '.join(filter(None, (names, value)))}`"
