"""The command `attnopt`: results on stdout, everything else on stderr.

Exit status: 0 fine, 1 an error, 2 wrong usage, 3 with --strict something was left as it was or
nothing was found, 4 what was made does not compute what the model computes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from attnopt import __version__, logs
from attnopt.commands import (
    DIFFERENT,
    FAILED,
    FINE,
    NOTHING,
    STATUSES,
    bench,
    machine,
    onnx,
    optimizing,
    rules,
)
from attnopt.errors import StrictError, VerificationError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; `argv` None reads the command line. Returns the exit status."""
    options = parser().parse_args(argv)
    logs.setup()
    if options.run is None:
        parser().print_help()
        return FINE
    try:
        return int(options.run(options))
    except BrokenPipeError:
        return FINE
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        logs.get("cli").debug("failed", exc_info=True)
        words = " ".join(str(error).split())
        print(f"attnopt: {type(error).__name__}: {words[:600]}", file=sys.stderr)
        if isinstance(error, StrictError):
            return NOTHING
        return DIFFERENT if isinstance(error, VerificationError) else FAILED


def parser() -> argparse.ArgumentParser:
    """What the command line may hold."""
    found = argparse.ArgumentParser(
        prog="attnopt", description="Find, explain and replace the attention in PyTorch models.",
        epilog="exit status:\n" + "\n".join(f"  {n}  {text}" for n, text in STATUSES.items())
               + "\n\nATTNOPT_LOG=debug shows where an error came from.",
        formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--version", action="version", version=f"attnopt {__version__}")
    found.set_defaults(run=None)
    commands = found.add_subparsers(title="commands", metavar="COMMAND")
    for group in (optimizing, onnx, bench, machine, rules):
        group.add(commands)
    return found
