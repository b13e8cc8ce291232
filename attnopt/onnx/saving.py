"""ONNX files, with data beside them where one cannot hold all, that appear whole or not at all.

A protobuf holds less than 2 GB. Of a larger model the tensors go to `model.onnx.data` beside
`model.onnx`, and the file says that name. Both are written under their own names in a folder of
their own, so that they can be checked there, and are moved together; if the second move fails, the
first is undone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir

from attnopt.errors import AttnOptError
from attnopt.files import whole_file

#: bytes of tensors from which they are written beside the file
LARGE = 3 << 29
#: bytes up to which a tensor stays in the file, where shape inference finds it
_INSIDE = 1 << 10
#: bytes that a protobuf may have
_MOST = (1 << 31) - (1 << 20)


def data_of(path: Path) -> Path:
    """Where the data of a large model is."""
    return path.with_name(f"{path.name}.data")


@contextlib.contextmanager
def whole_model(target: Path) -> Iterator[Path]:
    """A file of the same name in another folder to write to, with or without data beside it.

    Raises:
        OptionError: the path cannot be written.
    """
    folder: Path | None = None
    moved, earlier = False, None
    beside = data_of(target)
    try:
        with whole_file(target) as part:
            made = part.with_name(f"{part.name}.d")
            made.mkdir()
            folder = made
            yield folder / target.name
            os.replace(folder / target.name, part)
            written = data_of(folder / target.name)
            if written.exists():
                if os.path.lexists(beside):
                    kept = folder / "earlier.data"
                    os.replace(beside, kept)
                    earlier = kept
                moved = True
                os.replace(written, beside)
    except BaseException:
        if earlier is not None:
            os.replace(earlier, beside)
        elif moved:
            beside.unlink(missing_ok=True)
        raise
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def save(model: ir.Model, path: Path) -> None:
    """Write a model; tensors that it reads from other files are taken over.

    Raises:
        AttnOptError: what is not an initializer is too large for a file.
    """
    held = {v: v.const_value for graph in model.graphs() for v in graph.initializers.values()}
    large = sum(t.nbytes for t in held.values() if t is not None) > LARGE
    try:
        if large:
            model = ir.external_data.unload_from_model(
                model, path.parent, data_of(path).name, size_threshold_bytes=_INSIDE)
        else:
            model = ir.external_data.load_to_model(model)
        proto = ir.to_proto(model)
        if proto.ByteSize() > _MOST:
            raise AttnOptError("what is held outside of initializers must be below 2 GB, got "
                               f"{proto.ByteSize() / 1e9:.1f} GB")
        path.write_bytes(proto.SerializeToString())
    finally:
        for value, tensor in held.items():
            value.const_value = tensor
