"""`python -m tests.fuzz --programs 3000 --seed 0`: a summary, and a minimal program per failure."""

from __future__ import annotations

import argparse
import sys
from collections import Counter

import torch

from tests.fuzz.generator import render
from tests.fuzz.runner import Tally, choices_of, fuzz, reproduction, shrink

CHUNK = 50


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--programs", type=int, default=300, help="how many to run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="index of the first")
    parser.add_argument("--only", type=int, help="run the program of this index and print it")
    parser.add_argument("--failures", type=int, default=10, help="how many to shrink and print")
    parser.add_argument("--kept", type=int, default=15, help="how many reasons to print")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)

    indices = range(given.first, given.first + given.programs)
    if given.only is not None:
        indices = range(given.only, given.only + 1)
        print(render(choices_of(given.seed, given.only)).text)
    tally = Tally()
    for start in range(0, len(indices), CHUNK):
        fuzz(indices[start : start + CHUNK], given.seed, tally)
        if sys.stderr.isatty():
            print(f"{len(tally.outcomes)} run, {len(tally.failures)} failed, "
                  f"{tally.taken:.0%} taken", end="\r", file=sys.stderr, flush=True)

    print(tally.table())
    reasons = Counter(r for o in tally.attention if not o.taken for r in o.reasons)
    for reason, count in reasons.most_common(given.kept):
        print(f"  {count:4} not taken: {reason[:150]}")
    print(f"{len(tally.invalid)} programs that raise by themselves were left out")
    for reason, count in Counter(r.partition(": ")[2] for r in tally.invalid).most_common(5):
        print(f"  {count:4} raise: {reason[:150]}")
    for failed in tally.failures:
        print(f"failed: {failed.index} {failed.failure}")
    for failed in tally.failures[: given.failures]:
        print(f"\n{'-' * 80}\n{reproduction(shrink(failed))}")
    return 1 if tally.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
