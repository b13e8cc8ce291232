"""attnopt finds the attention in a PyTorch model, however it is spelled, and makes it faster.

The public names are loaded when they are first used, so that importing one part of the package
(an expression, the report of another run) does not pay for the rest.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnopt.api import explain, optimize
    from attnopt.errors import AttnOptError
    from attnopt.module import OptimizedModule
    from attnopt.onnx import export_onnx
    from attnopt.passes.capture.opaque import register_function
    from attnopt.program import export, save
    from attnopt.report import Report

__version__ = "0.1.0"
__all__ = ["AttnOptError", "OptimizedModule", "Report", "__version__", "explain", "export",
           "export_onnx", "optimize", "register_function", "save"]

# In a checkout passes/ and kernels/ lie beside this folder; once installed they lie inside it.
if not (Path(__file__).parent / "passes").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_HOMES = {
    "AttnOptError": "attnopt.errors",
    "OptimizedModule": "attnopt.module",
    "Report": "attnopt.report",
    "explain": "attnopt.api",
    "export": "attnopt.program",
    "export_onnx": "attnopt.onnx.export",
    "optimize": "attnopt.api",
    "register_function": "attnopt.passes.capture.opaque",
    "save": "attnopt.program",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562) and keep it here."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


import_module("attnopt.logs").setup()
