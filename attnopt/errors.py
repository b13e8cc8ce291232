"""The errors that attnopt raises. Errors of the user's model are never wrapped: they come through
as the model raised them."""

from __future__ import annotations

from pathlib import Path


class AttnOptError(Exception):
    """Base of every error of this package."""


class OptionError(AttnOptError, ValueError):
    """An argument is of a wrong type or value: "X must be ..., got ..."."""


class MissingPackageError(OptionError, ModuleNotFoundError):
    """A package that only one use needs is not installed; the message says how to install it."""

    def __init__(self, reason: str, name: str) -> None:
        super().__init__(reason)
        self.name = name


class CaptureError(AttnOptError):
    """A model, or one call of it, cannot be brought into one graph.

    Args:
        reason: what stands in the way, one line, with the attribute or the source line.
        transient: true where it can succeed after the user's own forward has run once (state
            that a model builds at its first call).
        front_end: false where no other front end can do better either.

    `seen` may hold the capture all the same: a graph to look at, not to run.
    """

    def __init__(self, reason: str, *, transient: bool = False, front_end: bool = True) -> None:
        super().__init__(reason)
        self.seen: object = None
        self.reason = reason
        self.transient = transient
        self.front_end = front_end


class StrictError(AttnOptError):
    """`strict=True` was given and something was left as it was."""


class RuleError(AttnOptError):
    """A user's rule raised, or cannot be loaded; the message names it and the line."""


class VerificationError(AttnOptError):
    """What was made, as a whole, does not compute what the model computes; nothing was written."""


class CacheError(AttnOptError):
    """A place for generated files is unsafe or cannot be written to."""


class KernelError(AttnOptError):
    """A generated kernel cannot be compiled or loaded; `source` is its file, where there is one."""

    def __init__(self, reason: str, source: Path | None = None) -> None:
        super().__init__(reason)
        self.source = source
