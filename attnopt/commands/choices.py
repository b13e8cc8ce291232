"""The options of `attnopt.optimize` as options of the commands, `--strict`, and how
results are shown and files appear."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attnopt.commands.models import find
from attnopt.errors import OptionError, StrictError
from attnopt.passes.options import LOWERINGS, PREFERENCES

if TYPE_CHECKING:
    from attnopt.report import Report


def add_choices(parser: argparse.ArgumentParser, *, backend: bool = True) -> None:
    """Options that `choices_of` reads; backend: whether lowerings can be chosen."""
    group = parser.add_argument_group("optimization")
    group.add_argument("--rule", action="append", metavar="NAME",
                       help="use only this rule (see `attnopt rules`), or package.module:rule; "
                            "may be repeated")
    group.add_argument("--only", metavar="PATTERN", help="module paths, such as 'encoder.*'")
    group.add_argument("--approximate", metavar="OUTPUT", type=float,
                       help="how much an approximation may change the result of a site")
    group.add_argument("--prefer", choices=PREFERENCES, default="speed", help="default: speed")
    if backend:
        group.add_argument("--backend", choices=LOWERINGS, action="append",
                           help="use only this lowering; may be repeated")
    group.add_argument("--freeze", action="store_true",
                       help="compute once what depends on parameters and buffers alone")
    group.add_argument("--no-verify", dest="verify", action="store_false",
                       help="compare nothing with the original")
    group.add_argument("--strict", action="store_true",
                       help="status 3 if no attention is found or any is left as it was")


def choices_of(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword options for `attnopt.optimize`. `strict` is asked of the report instead."""
    from attnopt.passes.rules import REGISTRY

    rules = None if options.rule is None else [_rule(name) for name in options.rule]
    REGISTRY.pick(rules)
    bound = None if options.approximate is None else {"output": options.approximate}
    chosen = {"rules": rules, "only": options.only, "approximate": bound,
              "prefer": options.prefer, "freeze": options.freeze, "verify": options.verify}
    backend = getattr(options, "backend", None)
    return {**chosen, "backend": tuple(backend)} if backend else chosen


def _rule(name: str) -> Any:
    """A rule object by "package.module:name", else the name itself."""
    if ":" not in name:
        return name
    found = find(name)
    found = found() if isinstance(found, type) else found
    if not hasattr(found, "match"):
        raise OptionError(f"{name} must be a rule, got {type(found).__name__}")
    return found


def accept(options: argparse.Namespace, report: Report) -> None:
    """Raise StrictError where `--strict` was given and the report does not fulfil it."""
    if not options.strict:
        return
    from attnopt.program import raise_if_kept

    if not report.sites:
        raise StrictError("the model must have some attention, got none" +
                          "".join(f"; {note}" for note in report.notes))
    raise_if_kept(report.sites)


@contextlib.contextmanager
def results_alone() -> Iterator[None]:
    """What the user's code prints goes to stderr, so that stdout holds results alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def files(*names: str | None) -> Iterator[list[Path | None]]:
    """A name to write to for each file that is wanted; all of them appear, or none."""
    from attnopt.files import whole_file

    with contextlib.ExitStack() as stack:
        yield [None if name is None else stack.enter_context(whole_file(Path(name)))
               for name in names]


def show(report: Report, form: str) -> None:
    """Print a report: as a table (by rich on a terminal, where it is installed), or as data."""
    if form == "json":
        print(report.to_json())
        return
    if sys.stdout.isatty():
        with contextlib.suppress(ImportError):
            from rich.console import Console

            Console().print(report)
            return
    print(report)
