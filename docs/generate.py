"""Write `api.md` and `limits.md` from the docstrings, the declines and the measured results.

    python -m docs.generate            write them
    python -m docs.generate --check    say which of them is not what would be written; status 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from docs import api_page, limits_page

HERE = Path(__file__).parent
PAGES: dict[str, Callable[[], str]] = {"api.md": api_page.page, "limits.md": limits_page.page}


def stale() -> list[str]:
    """The pages that are not what would be written."""
    return [name for name, page in PAGES.items()
            if not (HERE / name).is_file() or (HERE / name).read_text("utf-8") != page()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.generate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    if parser.parse_args(argv).check:
        found = stale()
        print("\n".join(f"docs/{name} must be written anew" for name in found) or "up to date")
        return int(bool(found))
    for name, page in PAGES.items():
        (HERE / name).write_text(page(), "utf-8")
        print(f"written: {HERE / name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
