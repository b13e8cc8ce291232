"""A line on stderr while a capture takes long, where stderr is a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_AFTER = 3.0
_EVERY = 1.0


@contextmanager
def progress(what: str) -> Iterator[None]:
    """Say after three seconds, and then every second, that `what` is being captured."""
    stream = sys.stderr
    if stream is None or not stream.isatty():
        yield
        return
    done, start = threading.Event(), time.monotonic()
    shown = False

    def speak() -> None:
        nonlocal shown
        wait = _AFTER
        while not done.wait(wait):
            shown, wait = True, _EVERY
            stream.write(f"\rattnopt: reading {what} … {time.monotonic() - start:.0f} s")
            stream.flush()

    thread = threading.Thread(target=speak, daemon=True, name="attnopt-progress")
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if shown:
            stream.write("\r\x1b[K")
            stream.flush()
