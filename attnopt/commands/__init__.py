"""The commands of `attnopt`, one group a file. Each has `add(commands)`, which says what it takes
and sets `run`, a function of the parsed options that returns the exit status."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

#: what a command returns; 2, wrong usage, is argparse's own
FINE, FAILED, USAGE, NOTHING, DIFFERENT = range(5)
STATUSES = {
    FINE: "fine",
    FAILED: "an error: one line on stderr says which; nothing was written",
    USAGE: "wrong usage: an unknown command, option or value",
    NOTHING: "with --strict: no attention was found, or some was left as it was",
    DIFFERENT: "what was made does not compute what the model computes; nothing was written",
}


def command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], summary: str,
            examples: str) -> argparse.ArgumentParser:
    """A parser for one command, with examples below its options."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=summary[0].upper() + summary[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {line}" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.set_defaults(run=run)
    return parser


def say(line: str) -> None:
    """A line of progress."""
    print(line, file=sys.stderr, flush=True)


def positive(text: str) -> int:
    """A whole number above 0, for argparse."""
    number = int(text) if text.isdecimal() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return number
