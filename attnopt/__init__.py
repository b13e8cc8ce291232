"""attnopt finds the attention in a PyTorch model, however it is spelled, and makes it faster.

The public names are loaded when they are first used, so that importing one part of the package
(an expression, the report of another run) does not pay for the rest.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnopt.api import explain, optimize
    from attnopt.check import check_rule
    from attnopt.errors import AttnOptError
    from attnopt.module import OptimizedModule
    from attnopt.onnx import export_onnx
    from attnopt.packaging import package
    from attnopt.passes.capture.opaque import register_function
    from attnopt.program import export, save
    from attnopt.report import Report
    from attnopt.rewrites import one_of, register_rewrite
    from attnopt.rules import register_rule

__version__ = "0.1.0"
__all__ = ["AttnOptError", "OptimizedModule", "Report", "__version__", "check_rule",
           "explain", "export", "export_onnx", "one_of", "optimize", "package",
           "register_function", "register_rewrite", "register_rule", "save"]

# In a checkout passes/ and kernels/ lie beside this folder; once installed they lie inside it.
if not (Path(__file__).parent / "passes").is_dir():
    __path__.append(str(Path(__file__).parent.parent))

_HOMES = {
    "AttnOptError": "attnopt.errors",
    "OptimizedModule": "attnopt.module",
    "Report": "attnopt.report",
    "check_rule": "attnopt.check",
    "explain": "attnopt.api",
    "export": "attnopt.program",
    "export_onnx": "attnopt.onnx.export",
    "optimize": "attnopt.api",
    "package": "attnopt.packaging",
    "one_of": "attnopt.rewrites",
    "register_function": "attnopt.passes.capture.opaque",
    "register_rewrite": "attnopt.rewrites",
    "register_rule": "attnopt.rules",
    "save": "attnopt.program",
}


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it (PEP 562) and keep it here."""
    if name == "onnx":  # a package, whose parts need packages that may be missing
        return import_module("attnopt.onnx")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


import_module("attnopt.logs").setup()
