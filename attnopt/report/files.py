"""Text files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from attnopt.errors import OptionError


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path`; a file that was there stays as it was unless all went well.

    Raises:
        OptionError: the path cannot be written.
    """
    target = Path(path)
    part = None
    try:
        if target.is_dir():
            raise OptionError(f"path must be that of a file, got the folder {target}")
        number, part = tempfile.mkstemp(".part", f".{target.name[:80]}.", target.parent)
        with os.fdopen(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(part, 0o666 & ~mask)
        os.replace(part, target)
        part = None
    except OSError as error:
        raise OptionError(f"path must be writable, got {target}: {error.strerror}") from error
    finally:
        if part is not None:
            Path(part).unlink(missing_ok=True)
