"""An ONNX file that others wrote: read with care, and parts of it as torch modules.

External data must lie in the file's own folder: an absolute path, one that leads out of the folder,
or a link is refused before anything is read from it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnopt.errors import AttnOptError
from attnopt.onnx.ops import OPS, Unknown, is_sizes, sizes_of, tensor


def read(path: Path) -> ir.Model:
    """The model of a file, its external data included.

    Raises:
        AttnOptError: the file is missing, no valid ONNX, or its data lies elsewhere.
    """
    import onnx

    if not path.is_file():
        raise AttnOptError(f"model must be a file that exists, got {path}")
    try:
        proto = onnx.load(path, load_external_data=False)
        if not proto.graph.node and not proto.graph.output:
            raise AttnOptError("it has no graph")
    except Exception as error:
        raise AttnOptError(f"{path} is no valid ONNX: {_line(error)}") from error
    for entries in _external(proto):
        _check_external(entries, path.parent)
    try:
        onnx.checker.check_model(str(path))
        return ir.load(path)
    except Exception as error:
        raise AttnOptError(f"{path} is no valid ONNX: {_line(error)}") from error


def _external(message: Any) -> Iterator[dict[str, str]]:
    """Where the tensors in a message say that their data is."""
    for field, value in message.ListFields():
        if field.name == "external_data":
            yield {entry.key: entry.value for entry in value}
        elif field.message_type is not None:
            for part in (value if isinstance(value, Iterable) else (value,)):
                if hasattr(part, "ListFields"):
                    yield from _external(part)


def _check_external(entries: Mapping[str, str], folder: Path) -> None:
    place = entries.get("location", "")
    path = folder / place
    outside = os.path.isabs(place) or "\\" in place or ".." in Path(place).parts
    if outside or path.is_symlink() or not path.resolve().is_relative_to(folder.resolve()):
        raise AttnOptError(f"external data must lie in the folder of the file, got {place!r}")
    if not path.is_file():
        raise AttnOptError(f"external data must be a file that exists, got {place!r}")
    try:
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
    except ValueError as error:
        raise AttnOptError(f"places in external data must be numbers, got {error}") from error
    if end > path.stat().st_size:
        raise AttnOptError(f"external data must reach to byte {end}, got {place!r} of "
                           f"{path.stat().st_size} bytes")


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that a value always is; None where it is computed or can be given from outside."""
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is not None and node.op_type == "Constant" and node.domain == "":
        for name, found in node.attributes.items():
            if name == "value":
                tensor_: ir.TensorProtocol = found.as_tensor()
                return tensor_
            if name in ("value_int", "value_float", "value_ints", "value_floats"):
                return ir.tensor(found.value)
    return None


def known(node: ir.Node) -> bool:
    """Whether a node is of the standard domain and has a counterpart in torch."""
    return node.domain == "" and node.op_type in OPS


class Part(nn.Module):
    """Some nodes of a graph, in order, as a module.

    Args:
        nodes: all `known`; `inputs`: the values that come from elsewhere; `output`: what it gives.
    """

    def __init__(self, nodes: Sequence[ir.Node], inputs: Sequence[ir.Value],
                 output: ir.Value) -> None:
        super().__init__()
        self._nodes, self._inputs, self._output = list(nodes), list(inputs), output
        self._sizes: dict[ir.Value, Any] = {}
        self._numbers: dict[ir.Value, Tensor] = {}
        self._held: dict[ir.Value, str] = {}
        for value in dict.fromkeys(v for n in nodes for v in n.inputs):
            found = constant(value)
            if found is None or value is None:
                continue
            held = torch.from_numpy(found.numpy().copy())
            as_sizes = sizes_of(held)
            if as_sizes is not None:
                self._sizes[value] = as_sizes
            elif held.numel() == 1 and held.is_floating_point():
                self._numbers[value] = held
            else:
                self._held[value] = f"constant_{len(self._held)}"
                self.register_buffer(self._held[value], held)

    def forward(self, *tensors: Tensor) -> Tensor:
        values: dict[ir.Value | None, Any] = {None: None}
        values.update(self._sizes.items())
        # Made in the trace, where a number is seen for what it is.
        values.update({v: torch.full(t.shape, t.item(), dtype=t.dtype)
                       for v, t in self._numbers.items()})
        values.update({v: getattr(self, name) for v, name in self._held.items()})
        values.update(zip(self._inputs, tensors, strict=True))
        for node in self._nodes:
            if node.op_type not in OPS:
                raise Unknown(f"{node.op_type} has no counterpart")
            fused = _fused(node, values)
            if fused is not None:
                found = fused
            elif _guards(node):  # in one operation, as torch's authors write it
                found = torch.nan_to_num(values[node.inputs[2]], 0.0, math.inf, -math.inf)
            else:
                found = OPS[node.op_type](node, [values[v] for v in node.inputs])
            parts = found if isinstance(found, (tuple, list)) else (found,)
            values.update(zip(node.outputs, parts, strict=False))
        out = values[self._output]
        return tensor(out) if is_sizes(out) else out


def _guards(node: ir.Node) -> bool:
    """Whether a node is Where(IsNaN(w), 0, w): so do exporters write the softmax of SDPA, which
    gives 0 for a row without keys."""
    if node.op_type != "Where" or None in node.inputs:
        return False
    asked, zero, weights = node.inputs
    assert asked is not None
    test, held = asked.producer(), constant(zero)
    if test is None or held is None or held.size != 1 or held.numpy().item():
        return False
    return test.op_type == "IsNaN" and test.inputs[0] is weights


def _fused(last: ir.Node, values: Mapping[ir.Value | None, Any]) -> Tensor | None:
    """Where(IsNaN(w), 0, w) @ v of w = Softmax(q @ k [+ mask]), as exporters write SDPA: as SDPA,
    whose rows without keys are 0 too. (What is NaN in the inputs stays NaN, as in SDPA.)"""
    guard = last.inputs[0].producer() if last.op_type == "MatMul" and last.inputs[0] else None
    weights = guard.inputs[2] if guard is not None and _guards(guard) else None
    softmax = weights.producer() if weights is not None else None
    if guard is None or softmax is None or softmax.op_type != "Softmax" \
            or softmax.inputs[0] is None:
        return None
    axis = softmax.attributes.get("axis")
    scores, mask = softmax.inputs[0].producer(), None
    if scores is not None and scores.op_type == "Add":
        product, added = scores.inputs
        mask = values[added]
        scores = product.producer() if product is not None else None
    if scores is None or scores.op_type != "MatMul" or not set(scores.inputs) <= set(values):
        return None
    q, k, v = values[scores.inputs[0]], values[scores.inputs[1]], values[last.inputs[1]]
    if not q.dim() == k.dim() == v.dim() == 4 or not q.shape[:2] == k.shape[:2] == v.shape[:2]:
        return None
    if axis is not None and axis.as_int() not in (-1, 3):
        return None
    return F.scaled_dot_product_attention(q, k.transpose(-1, -2), v, attn_mask=mask, scale=1.0)


def _line(error: Exception) -> str:
    return (str(error).strip().split("\n")[0] or type(error).__name__)[:300]
