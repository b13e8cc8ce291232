"""`attnopt bench`: the measuring suites."""

from __future__ import annotations

import argparse
from typing import Any

from attnopt.bench import SUITES
from attnopt.commands import command, positive, say


def add(commands: Any) -> None:
    bench = command(commands, "bench", _bench, "measure attnopt on this machine",
                    "attnopt bench --suite cpu --quick\n"
                    "attnopt bench --suite sparse --case 'packed*' --json packed.json")
    bench.add_argument("--suite", choices=list(SUITES), action="append",
                       help="one of the suites; may be given again; default: all of them")
    bench.add_argument("--json", metavar="FILE", help="also write the results to this file")
    bench.add_argument("--repeats", type=positive, metavar="N",
                       help="rounds per measurement; default: each suite's own")
    bench.add_argument("--compile", action=argparse.BooleanOptionalAction,
                       help="measure what torch.compile makes as well; default: each suite's own")
    bench.add_argument("--quick", action="store_true", default=None,
                       help="short sequences and few rounds "
                            "(suites cpu, sparse, bias, deformable, gpu, tiles)")
    bench.add_argument("--full", action="store_true", default=None,
                       help="rows that take a minute and much memory as well (suite sparse)")
    bench.add_argument("--case", action="append", metavar="PATTERN",
                       help="only rows of such a name (suites cpu, sparse, bias, "
                            "deformable, gpu); may be repeated")
    bench.add_argument("--budget", type=positive, metavar="SECONDS",
                       help="begin no row after that time (suites gpu, tiles)")


def _bench(options: argparse.Namespace) -> int:
    from attnopt import optimize
    from attnopt.bench import run, save

    results = run(optimize, options.suite or list(SUITES), repeats=options.repeats,
                  compiled=options.compile, quick=options.quick, full=options.full,
                  cases=options.case, budget=options.budget,
                  say=lambda line: print(line, flush=True))
    partial = options.quick or options.case
    path = save(results, options.json) if options.json or not partial else None
    if path is not None:
        say(f"written: {path}")
    return 0
