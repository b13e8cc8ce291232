"""How a model, its inputs and the sizes that may change are named on the command line.

    package.module:factory        factory() gives the model, (model, args) or (model, args, kwargs)
    model.pt2                     what torch.export.save or `attnopt optimize -o` wrote
    --inputs package.module:make  make() gives args, kwargs, or (args, kwargs)
    --input 1x8x64:float32        one positional tensor, drawn at random; once for each
    --dynamic x.1,mask.1=1..512   dimension 1 of both is one size that may change

The working folder is searched for modules, as by `python -m`. A factory is the user's own code and
is run. No pickled object of a `.pt2` is loaded: torch's own loader would fall back to pickle, so
files that hold such objects are refused. torch reads the sizes in such a file as expressions all
the same, so open only files whose origin is trusted.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import logging
import os
import re
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnopt.errors import AttnOptError, OptionError

_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
_OBJECTS = ("custom_obj", "opaque_obj")
_SIZE = re.compile(r"(?P<slots>[A-Za-z_]\w*\.\d+(,[A-Za-z_]\w*\.\d+)*)"
                   r"(=(?P<low>\d+)\.\.(?P<high>\d+))?")


@dataclass(frozen=True)
class Named:
    """What the command line names: a model, its example arguments, the sizes that may change."""

    model: nn.Module | torch.export.ExportedProgram
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that `named` reads."""
    parser.add_argument("model", metavar="MODEL",
                        help="package.module:factory, or a program saved as .pt2")
    group = parser.add_argument_group("inputs")
    group.add_argument("--inputs", metavar="package.module:make",
                       help="a function that gives args, kwargs or (args, kwargs)")
    group.add_argument("--input", action="append", metavar="SHAPE[:DTYPE]",
                       help="a positional tensor such as 1x128x256 or 2x64:int64, drawn at random "
                            "(whole numbers: 0 and 1); once for each")
    group.add_argument("--seed", type=int, default=0, metavar="N",
                       help="of the numbers drawn; default 0")
    group.add_argument("--dynamic", action="append", metavar="NAME.DIM[,…][=LOW..HIGH]", default=[],
                       help="a size that may change, by the names of the model's arguments; "
                            "those with a comma between them are one size")
    group.add_argument("--train", action="store_true",
                       help="keep a module in training mode; otherwise .eval() is called")


def named(options: argparse.Namespace) -> Named:
    """Load what was named.

    Raises:
        AttnOptError: a name does not import, a factory raises, a file cannot be read, or what they
            give is of a wrong type.
    """
    if options.inputs and options.input:
        raise OptionError("inputs must be given by --inputs or by --input, got both")
    made: tuple[Any, ...] | None = None
    kwargs: dict[str, Any] = {}
    torch.manual_seed(options.seed)
    if options.model.endswith(".pt2"):
        model: Any = load_program(Path(options.model))
        if model.example_inputs is not None:
            made, kwargs = model.example_inputs
    else:
        model, made, kwargs = _parts(call(options.model), options.model)
        if not options.train:
            model.eval()
    if options.inputs:
        made, kwargs = inputs_of(options.inputs)
    elif options.input:
        made, kwargs = tuple(_drawn(text) for text in options.input), {}
    if made is None:
        raise OptionError(f"inputs must be given for {options.model}: by its factory, by --inputs "
                          "or by --input, got none")
    return Named(model, made, kwargs, _dynamic(options.dynamic, model, made, kwargs))


def find(name: str) -> Any:
    """The object of the name "package.module:attribute"."""
    module, _, path = name.partition(":")
    if not re.fullmatch(r"\w+(\.\w+)*", module) or not re.fullmatch(r"\w+(\.\w+)*", path):
        raise OptionError(f"a name must be package.module:attribute or a .pt2 file, got {name!r}")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise AttnOptError(f"{module} cannot be imported: {_words(error)}") from error
    for step in path.split("."):
        if not hasattr(found, step):
            raise AttnOptError(f"{name} does not exist: {getattr(found, '__name__', found)} "
                               f"has no {step}")
        found = getattr(found, step)
    return found


def call(name: str) -> Any:
    """What the function of that name gives; a module that is named is itself."""
    found = find(name)
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise AttnOptError(f"{name} must be a function without arguments, got "
                           f"{type(found).__name__}")
    try:
        return found()
    except (Exception, SystemExit) as error:
        raise AttnOptError(f"{name}() raised {_words(error)}") from error


def load_program(path: Path) -> torch.export.ExportedProgram:
    """A program that torch.export.save wrote, without any pickled object.

    Raises:
        AttnOptError: there is no such file, or it is none of that kind.
    """
    if not path.is_file():
        raise AttnOptError(f"{path} does not exist" if not path.exists() else f"{path} is no file")
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError) as error:
        raise AttnOptError(f"{path} is no saved program: {_words(error)}") from error
    objects = [n for n in names if n.rpartition("/")[2].startswith(_OBJECTS)]
    if objects:
        raise AttnOptError(f"{path} holds pickled objects, which are not loaded: {objects[0]}")
    if any("/aotinductor/" in n for n in names):
        raise AttnOptError(f"{path} is compiled by AOTInductor; give the program that it was "
                           "made of")
    from attnopt import kernels  # registers the operators that the program may hold

    assert kernels
    try:
        with _no_pickle():
            return torch.export.load(path)
    except Exception as error:
        raise AttnOptError(f"{path} cannot be loaded: {_words(error)}") from error


@contextmanager
def _no_pickle() -> Iterator[None]:
    """Let torch.load take tensors alone, whatever it is asked for, and say no more than needed."""
    before, logger = os.environ.get(_FORCED), logging.getLogger("torch.export")
    level = logger.level
    os.environ[_FORCED] = "1"
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        if before is None:
            del os.environ[_FORCED]
        else:
            os.environ[_FORCED] = before


def _parts(given: Any, name: str) -> tuple[Any, tuple[Any, ...] | None, dict[str, Any]]:
    """(model, args or None, kwargs) of what a factory gave."""
    parts = given if isinstance(given, tuple) else (given,)
    fits = 1 <= len(parts) <= 3 and isinstance(parts[0], nn.Module)
    if fits and len(parts) > 1:
        fits = isinstance(parts[1], tuple) and all(isinstance(p, Mapping) for p in parts[2:])
    if not fits:
        got = ", ".join(type(p).__name__ for p in parts)
        raise AttnOptError(f"{name}() must give a module, (module, args) or (module, args, kwargs) "
                           f"with args a tuple, got {f'({got})' if len(parts) > 1 else got}")
    return parts[0], parts[1] if len(parts) > 1 else None, dict(parts[2]) if parts[2:] else {}


def inputs_of(name: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of what a function for inputs gives."""
    given = call(name)
    if isinstance(given, Mapping):
        return (), dict(given)
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], tuple) \
            and isinstance(given[1], Mapping):
        return given[0], dict(given[1])
    if isinstance(given, tuple):
        return given, {}
    raise AttnOptError(f"{name}() must give a tuple of arguments, a mapping or both, got "
                       f"{type(given).__name__}")


def _drawn(text: str) -> torch.Tensor:
    shape, _, word = text.partition(":")
    dtype = getattr(torch, word or "float32", None)
    if not re.fullmatch(r"\d+(x\d+)*", shape) or not isinstance(dtype, torch.dtype):
        raise OptionError(f"an input must be like 1x128x256 or 2x64:int64, got {text!r}")
    sizes = [int(n) for n in shape.split("x")]
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, dtype=torch.float32).to(dtype)
    return torch.randint(0, 2, sizes).to(dtype)


def _dynamic(texts: list[str], model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`dynamic_shapes` for torch.export; None where no size may change."""
    if not texts:
        return None
    forward = model.module().forward if isinstance(
        model, torch.export.ExportedProgram) else model.forward
    try:
        bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    except TypeError as error:
        raise OptionError(f"inputs must fit the model: {error}") from error
    shapes: dict[str, Any] = {name: None for name in bound}
    for count, text in enumerate(texts):
        read = _SIZE.fullmatch(text)
        if read is None:
            raise OptionError(f"a dynamic size must be like x.1 or x.1,mask.1=1..512, got {text!r}")
        low, high = read["low"], read["high"]
        if low is not None and int(low) > int(high):
            raise OptionError(f"a range must be LOW..HIGH, got {text!r}")
        size = torch.export.Dim(f"size{count}", min=int(low or 0) or None,
                                max=int(high) if high else None)
        for slot in read["slots"].split(","):
            name, _, axis = slot.partition(".")
            if name not in bound or not isinstance(bound[name], torch.Tensor):
                tensors = [n for n, v in bound.items() if isinstance(v, torch.Tensor)]
                raise OptionError(f"a dynamic size must be of one of {', '.join(tensors)}, "
                                  f"got {name!r}")
            if int(axis) >= bound[name].dim():
                raise OptionError(f"{name} must have a dimension {axis}, got "
                                  f"{bound[name].dim()} dimensions")
            shapes[name] = {**(shapes[name] or {}), int(axis): size}
    return shapes


def _words(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
