"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from attnopt.errors import OptionError


@contextlib.contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A name beside `target` to write to; it becomes the target when all went well.

    Raises:
        OptionError: the path cannot be written.
    """
    if target.is_dir():
        raise OptionError(f"path must be that of a file, got the folder {target}")
    if not target.parent.is_dir():
        raise OptionError(f"path must lie in a folder that exists, got {target}")
    if not os.access(target.parent, os.W_OK):
        raise OptionError(f"path must be writable, got {target}: Permission denied")
    part = target.with_name(f".{target.name[:80]}.{secrets.token_hex(6)}.part{target.suffix}")
    try:
        yield part
        os.replace(part, target)
    except OSError as error:
        raise OptionError(f"path must be writable, got {target}: {error.strerror}") from error
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path`; a file that was there stays as it was unless all went well.

    Raises:
        OptionError: the path cannot be written.
    """
    with whole_file(Path(path)) as part:
        part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="\n")
