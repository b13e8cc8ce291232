"""Where generated sources and compiled objects live: the user's cache folder.

What lies here is loaded into the process, so a file counts only where nobody but the user can have
put it there (`attnopt.kernels.ownership`). A cache folder that is refused, or that cannot be
written to, is replaced by a private temporary one for the life of the process, with one warning.

Names are hashes of everything that went into a file, and a file appears under its name at once and
whole, so processes need no lock: who comes second finds the file or replaces it by an equal one.

    <directory>/<kind>/<key><suffix>        cpp/3f...9a.so
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from attnopt import logs
from attnopt.errors import CacheError
from attnopt.kernels.ownership import check_folder, check_own, check_way

ENV = "ATTNOPT_CACHE_DIR"
_KIND = re.compile(r"[a-z][a-z0-9_]*")
_KEY = re.compile(r"[0-9a-f]{64}")
_SUFFIX = re.compile(r"(\.[a-z0-9_]+)+")
_UNFINISHED = ".unfinished"
#: seconds after which a file that is still unfinished was given up
_GIVEN_UP = 3600.0

#: the temporary folder that stands in for refused ones, once there was need of it
_private: Path | None = None
_warned: set[str] = set()


@dataclass(frozen=True)
class Entry:
    """One file of the cache; `size` in bytes."""

    kind: str
    key: str
    suffix: str
    size: int
    path: Path


def key(*parts: str | bytes) -> str:
    """64 hexadecimal digits that stand for exactly these parts in this order."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%s%d:" % (b"s" if isinstance(part, str) else b"b", len(data)))
        digest.update(data)
    return digest.hexdigest()


def wanted() -> Path:
    """The folder that the user's settings ask for, whether or not it is safe.

    ATTNOPT_CACHE_DIR, else attnopt in XDG_CACHE_HOME, else ~/.cache/attnopt. Raises CacheError
    where there is no home.
    """
    given = os.path.expanduser(os.environ.get(ENV, ""))
    # The XDG specification says that relative paths are to be ignored.
    base = os.environ.get("XDG_CACHE_HOME", "")
    path = given or os.path.join(
        base if os.path.isabs(base) else os.path.expanduser("~/.cache"), "attnopt")
    if path.startswith("~"):
        raise CacheError(f"there is no home folder for {path}")
    return Path(path).absolute()


def directory() -> Path:
    """The cache folder, made with mode 0700 if it does not exist.

    A private temporary folder where the one that is wanted is refused or cannot be written to.
    Raises CacheError where not even that can be made.
    """
    try:
        return _made()
    except (CacheError, OSError) as error:
        return _stand_in(error)


def refusal() -> str:
    """Why the folder that is wanted is not used; "" where it is."""
    try:
        _made()
    except (CacheError, OSError) as error:
        return str(error)
    return ""


def store(kind: str, key: str, suffix: str, data: bytes) -> Path:
    """Put a file there whole, or replace it; its path.

    Raises CacheError for a name that cannot be and where the disk does not take it.
    """
    path = directory() / _name(kind, key, suffix)
    try:
        _make(path.parent)
        handle, unfinished = tempfile.mkstemp(_UNFINISHED, f"{key}.", path.parent)
        try:
            with os.fdopen(handle, "wb") as file:  # mkstemp gave it mode 0600
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            Path(unfinished).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error}") from error
    return path


def find(kind: str, key: str, suffix: str) -> Path | None:
    """The file of this name, None where there is none that only the user can have written."""
    name = _name(kind, key, suffix)
    for root in _roots():
        path = root / name
        try:
            info = path.lstat()
            if stat.S_ISREG(info.st_mode):
                check_folder(path.parent)
                check_own(path, info)
                return path
        except FileNotFoundError:
            continue
        except (CacheError, OSError) as error:
            logs.get("cache").warning("a file of the cache is not used: %s", error)
    return None


def vouches(path: Path) -> bool:
    """Whether `path` is a file of the cache that `find` would give."""
    key, dot, rest = path.name.partition(".")
    try:
        return find(path.parent.name, key, dot + rest) == path
    except CacheError:
        return False


def entries() -> list[Entry]:
    """All files of the cache, by kind and name."""
    return [entry for entry in _files() if not entry.suffix.endswith(_UNFINISHED)]


def clear() -> tuple[int, int]:
    """Remove the files of the cache and nothing else; how many there were and how many bytes.

    Kernels that are loaded go on working, and so do processes that are writing at this moment.
    """
    count = size = 0
    for entry in list(_files()):
        finished = not entry.suffix.endswith(_UNFINISHED)
        try:
            if finished or entry.path.stat().st_mtime < time.time() - _GIVEN_UP:
                entry.path.unlink()
                count, size = count + finished, size + finished * entry.size
        except FileNotFoundError:  # another process was faster
            continue
        except OSError as error:
            raise CacheError(f"{entry.path} cannot be removed: {error}") from error
    return count, size


def _name(kind: str, key: str, suffix: str) -> Path:
    for what, text, form in (
            ("kind", kind, _KIND), ("key", key, _KEY), ("suffix", suffix, _SUFFIX)):
        if not form.fullmatch(text):
            raise CacheError(f"{what} must match {form.pattern}, got {text!r}")
    return Path(kind, key + suffix)


def _roots() -> Iterator[Path]:
    """Folders to read from: one that is safe, even if it cannot be written to, and the stand-in."""
    try:
        root = wanted()
        check_folder(root)
        yield root
    except (CacheError, OSError) as error:
        logs.get("cache").debug("cache folder not used: %s", error)
    if _private is not None and _private.is_dir():
        yield _private


def _files() -> Iterator[Entry]:
    for root in _roots():
        for folder in sorted(root.iterdir()):
            if not _KIND.fullmatch(folder.name) or folder.is_symlink() or not folder.is_dir():
                continue
            for path in sorted(folder.iterdir()):
                key, dot, rest = path.name.partition(".")
                if not _KEY.fullmatch(key) or not _SUFFIX.fullmatch(dot + rest):
                    continue
                try:
                    info = path.lstat()
                except FileNotFoundError:
                    continue
                if stat.S_ISREG(info.st_mode):
                    yield Entry(folder.name, key, dot + rest, info.st_size, path)


def _made() -> Path:
    root = wanted()
    _make(root)
    if not os.access(root, os.W_OK | os.X_OK):
        raise CacheError(f"{root} must be writable")
    return root


def _make(path: Path) -> None:
    """Make a folder and those above it with mode 0700, in a safe place only."""
    missing: list[Path] = []
    above = path
    while not above.exists():
        missing.append(above)
        above = above.parent
    check_way(above)
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    check_folder(path)


def _stand_in(why: Exception) -> Path:
    global _private
    if _private is None or not _private.is_dir():
        try:
            _private = Path(tempfile.mkdtemp(prefix="attnopt-")).resolve()
        except OSError as error:
            raise CacheError(f"no folder for generated files: {why}; {error}") from error
        atexit.register(_remove, _private, os.getpid())
    if str(why) not in _warned:
        _warned.add(str(why))
        logs.get("cache").warning(
            "generated kernels are kept for this process only, the cache folder is refused: %s",
            why)
    return _private


def _remove(path: Path, pid: int) -> None:
    if os.getpid() == pid:  # a fork must not take it from its parent
        shutil.rmtree(path, ignore_errors=True)
