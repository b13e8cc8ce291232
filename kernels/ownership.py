"""Whether only the user can have written what lies in a folder.

Every folder on the way from / must belong to the user or to root and be closed to writing by
others; one with the sticky bit, such as /tmp, may be open, since nobody can exchange what others
have put there. Links on the way are followed and must belong to the user or to root. The folder or
file itself must belong to the user.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from attnopt.errors import CacheError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_MAX_LINKS = 40


def check_folder(path: Path) -> None:
    """Raise CacheError with the reason unless `path` (absolute) is a folder only the user writes.

    OSError where the way to it cannot be read.
    """
    check_way(path)
    real = Path(os.path.realpath(path))
    check_own(real, real.lstat())


def check_own(path: Path, info: os.stat_result) -> None:
    """The folder or file itself, not the way to it; raises CacheError."""
    if info.st_uid != os.geteuid():
        raise CacheError(f"{path} must belong to the user, got uid {info.st_uid}")
    if info.st_mode & _OTHERS_WRITE:
        raise CacheError(f"{path} must not be writable by others, got {_mode(info)}")


def check_way(path: Path) -> None:
    """Every folder and link from / to `path`, itself included; raises CacheError."""
    if not hasattr(os, "geteuid"):
        raise CacheError("this system has no owners of files that can be checked")
    for step, info in _way(path):
        # / belongs to whoever owns the machine, by whatever number a container shows for it.
        if info.st_uid not in (os.geteuid(), 0) and step != Path("/"):
            raise CacheError(f"{step} must belong to the user or to root, got uid {info.st_uid}")
        if stat.S_ISLNK(info.st_mode):
            continue
        if not stat.S_ISDIR(info.st_mode):
            raise CacheError(f"{step} must be a folder")
        if not _closed(info):
            raise CacheError(f"{step} must not be writable by others, got {_mode(info)}")


def _way(path: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """What the system passes through to resolve `path`."""
    here, ahead, links = Path("/"), list(path.parts[1:]), 0
    yield here, here.lstat()
    while ahead:
        part = ahead.pop(0)
        if part == "..":
            here = here.parent
            continue
        step = here / part
        info = step.lstat()
        yield step, info
        if stat.S_ISLNK(info.st_mode):
            links += 1
            if links > _MAX_LINKS:
                raise CacheError(f"{path} must not be a circle of links")
            target = Path(os.readlink(step))
            here = Path("/") if target.is_absolute() else here
            ahead = [p for p in target.parts if p != "/"] + ahead
        else:
            here = step


def _closed(info: os.stat_result) -> bool:
    """Whether nobody else can exchange what lies in this folder."""
    if info.st_mode & stat.S_ISVTX or not info.st_mode & _OTHERS_WRITE:
        return True
    return not info.st_mode & stat.S_IWOTH and _private_group(info.st_gid)


def _private_group(gid: int) -> bool:
    """Whether a group is the user's alone, as on systems that give every user such a group."""
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(gid), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    return (group.gr_name == user.pw_name and user.pw_gid == gid
            and set(group.gr_mem) <= {user.pw_name})


def _mode(info: os.stat_result) -> str:
    return f"mode {stat.S_IMODE(info.st_mode):04o}"
