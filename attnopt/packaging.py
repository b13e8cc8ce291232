"""Files of an optimised model that are checked before they appear: programs, and AOTInductor.

    found = attnopt.package(model, args, "model.pt2")      # compiled; needs torch, not attnopt
    model = torch._inductor.aoti_load_package("model.pt2")

AOTInductor compiles the portable form (`attnopt.export(..., portable=True)`): ATen operators alone,
windows and neighbourhoods as tiles of gathered keys. The package holds a library for this kind of
processor and the weights. It is for inference; other sizes are taken where they are dynamic.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnopt import agreement
from attnopt.errors import AttnOptError, OptionError
from attnopt.files import whole_file
from attnopt.kernels.portable import table as portable_table
from attnopt.program import exported, to_compare
from attnopt.report import Report

#: what can be written: a program with attnopt's operators, one of ATen alone, that one compiled
KINDS = ("program", "portable", "aoti")


@dataclass(frozen=True)
class Packaged:
    """What was written.

    path:   of the file
    size:   of it in bytes
    error:  largest absolute difference from the model on the example, with the approximations that
            were asked for; None without `verify`
    report: what became of each attention
    """

    path: Path
    size: int
    error: float | None
    report: Report

    def __str__(self) -> str:
        size = f"{self.size / 1e6:.1f} MB" if self.size >= 1e6 else f"{self.size / 1e3:.1f} kB"
        return f"{self.path}: {size}" + ("" if self.error is None else f", off by {self.error:.1e}")


def package(
    model: nn.Module | torch.export.ExportedProgram,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    inductor_configs: Mapping[str, Any] | None = None,
    verify: bool = True,
    **options: Any,
) -> Packaged:
    """Compile an optimised model by AOTInductor, run it, and write it as one file.

    The file is loaded by `torch._inductor.aoti_load_package(path)`, in a process that need not have
    attnopt. Compiling needs a C++ compiler and takes tens of seconds. Tested on a CPU.

    Args:
        model: a module, one that is optimised already, or an ExportedProgram.
        args, kwargs, dynamic_shapes: as for `torch.export.export`.
        path: of the file, ending in .pt2; it appears whole or not at all.
        inductor_configs: for Inductor, such as {"max_autotune": True}.
        verify: run the file on the example arguments and compare with the model; rewrites are
            verified one by one as well.
        options: those of `attnopt.optimize`.

    Raises:
        OptionError: an argument is of a wrong type or value.
        CaptureError: the model cannot be captured as one graph.
        VerificationError: the file does not compute what the model computes; nothing is written.
        AttnOptError: Inductor cannot compile it.
    """
    configs = _configs(inductor_configs)
    return write("aoti", model, args, path, kwargs=kwargs, dynamic_shapes=dynamic_shapes,
                 configs=configs, verify=verify, **options)


def write(
    kind: str,
    model: Any,
    args: tuple[Any, ...],
    path: str | os.PathLike[str],
    *,
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    configs: Mapping[str, Any] | None = None,
    verify: bool = True,
    accept: Callable[[Report], None] | None = None,
    **options: Any,
) -> Packaged:
    """Write one of `KINDS`, compared with the model before it appears.

    accept: sees the report before anything is made of it, and may raise.
    """
    target = Path(path)
    if target.suffix != ".pt2":
        raise OptionError(f"path must end in .pt2, got {target}")
    if kind != "program":
        options["backend"] = "aten"
    lowered = {} if kind == "program" else portable_table()
    with whole_file(target) as part:
        program, report = exported(model, args, kwargs, dynamic_shapes,
                                   {**options, "verify": verify}, lowered)
        if accept is not None:
            accept(report)
        if kind == "aoti":
            run = _compile(program, part, configs or {})
        else:
            torch.export.save(program, part)
            run = program.module()
        error = None
        if verify:
            wanted = to_compare(model, args, kwargs, dynamic_shapes, options, report)
            error = agreement.compare(run, wanted, args, kwargs or {})
        found = Packaged(target, part.stat().st_size, error, report)
    return found


def _compile(program: torch.export.ExportedProgram, part: Path,
             configs: Mapping[str, Any]) -> Callable[..., Any]:
    """Write the package and give what it runs."""
    try:
        with _quiet(), torch.no_grad():
            torch._inductor.aoti_compile_and_package(
                program, package_path=str(part), inductor_configs=dict(configs))
            made: Callable[..., Any] = torch._inductor.aoti_load_package(str(part))
            return made
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise AttnOptError(f"AOTInductor cannot compile the program: {first}") from error


def _configs(given: Any) -> dict[str, Any]:
    if given is not None and not isinstance(given, Mapping):
        raise OptionError(
            f"inductor_configs must be a mapping, got {type(given).__name__}")
    return dict(given or {})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Inductor warns of what a user of a package cannot change."""
    logger = logging.getLogger("torch._inductor")
    level = logger.level
    try:
        logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
