"""Logging of the package: loggers "attnopt.*", silent unless the user asks.

The package logger gets a NullHandler, as a library's should. ATTNOPT_LOG (a level's name or number)
sets its level, and writes to stderr where the program has set up no logging of its own.
"""

from __future__ import annotations

import logging
import os

ENV = "ATTNOPT_LOG"
logger = logging.getLogger("attnopt")


class _Stderr(logging.StreamHandler):
    """Speaks only while the root logger has no handler, so that no line is written twice."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not logging.getLogger().handlers and bool(super().filter(record))


def setup(level: str | None = None) -> int:
    """Set the package logger up and return its level; calling it again changes the level only.

    `level` is a name ("debug") or a number; None takes ATTNOPT_LOG, and "" leaves the level unset.
    A level that does not exist is said in a warning, never raised: a typing error in an
    environment variable must not stop a program.
    """
    if not any(isinstance(h, logging.NullHandler) for h in logger.handlers):
        logger.addHandler(logging.NullHandler())
    text = (os.environ.get(ENV, "") if level is None else level).strip()
    if not text:
        return logger.level
    number = int(text) if text.isdecimal() else logging.getLevelNamesMapping().get(text.upper())
    if not any(isinstance(h, _Stderr) for h in logger.handlers):
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
        logger.addHandler(handler)
    if number is None:
        logger.warning("%s must be a level such as debug or 10, got %r", ENV, text)
    else:
        logger.setLevel(number)
    return logger.level


def get(name: str) -> logging.Logger:
    """The logger "attnopt.<name>"."""
    return logger.getChild(name)
