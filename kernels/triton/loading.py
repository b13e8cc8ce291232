"""Generated source -> a kernel object, through a file in the user's cache.

Triton reads a kernel's text from its file, so the module is written before it is imported. The
name is a hash of the text, the template's version and triton's.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType
from typing import Any

from attnopt.errors import KernelError
from attnopt.kernels import cache
from attnopt.kernels.triton.layout import VERSION, Source

KIND = "triton"


@functools.lru_cache(maxsize=1024)
def kernel(source: Source, name: str) -> Any:
    """The kernel `name` of a source, decorated but not compiled. Raises KernelError."""
    return getattr(_module(source.text), name)


def _module(text: str) -> ModuleType:
    import triton

    key = cache.key(VERSION, triton.__version__, text)
    name = f"_attnopt_triton_{key[:32]}"
    found = sys.modules.get(name)
    if found is not None:
        return found
    path = cache.find(KIND, key, ".py")
    if path is None or path.read_text() != text:
        path = cache.store(KIND, key, ".py", text.encode())
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise KernelError("a generated kernel cannot be imported", path)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    try:
        spec.loader.exec_module(loaded)
    except Exception as error:
        del sys.modules[name]
        raise KernelError(f"a generated kernel cannot be imported: {error}", path) from error
    return loaded
