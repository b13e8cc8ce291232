"""The packages that ONNX files take, which attnopt itself does without."""

from __future__ import annotations

from importlib import import_module

from attnopt.errors import MissingPackageError

#: what reads and writes files; onnx_ir comes with onnxscript
WRITING = ("onnx", "onnxscript", "onnx_ir")
#: what runs them, where they are verified
RUNNING = "onnxruntime"


def require(*packages: str) -> None:
    """Import packages.

    Raises:
        MissingPackageError: one is not installed; it says what to install.
    """
    for package in packages:
        try:
            import_module(package)
        except ImportError as error:
            absent = isinstance(error, ModuleNotFoundError) and error.name == package
            why = "" if absent else f" (importing it gives: {error})"
            raise MissingPackageError(
                f"attnopt.onnx needs the package {package}{why}: install it by "
                "pip install 'attnopt[onnx]', or pip install onnx onnxscript onnxruntime",
                name=package) from error
