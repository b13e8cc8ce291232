"""The form of one attention in ONNX, and the function that holds it.

Each different attention of a model becomes one function of the domain `attnopt`, such as
`attnopt.NeighborhoodAttention`, which viewers show by that name and every runtime inlines. Its body
is standard ONNX: the export of the same ATen lowering that serves other portable programs
(`attnopt.kernels.portable`) for inputs of these shapes.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import Tensor, nn

from attnopt.errors import AttnOptError
from attnopt.ir.mask import Band, BlockMap, Causal, Mask, Neighborhood, Segments, Windows
from attnopt.ir.spec import Spec

DOMAIN = "attnopt"

#: the first of these kinds of mask that is in a Spec names it
_NAMES: tuple[tuple[type[Mask], str], ...] = (
    (Neighborhood, "NeighborhoodAttention"), (Windows, "WindowAttention"),
    (Band, "SlidingWindowAttention"), (BlockMap, "BlockSparseAttention"),
    (Segments, "PackedAttention"), (Causal, "CausalAttention"))


@dataclass(frozen=True)
class Form:
    """One function of the exported model.

    name:   without its domain
    form:   "attention" (one standard Attention where the opset has it), "tiled", "dense", "gather"
    spec:   the text of what it computes
    calls:  how often the model calls it
    """

    name: str
    form: str
    spec: str
    calls: int = 1


def name_of(spec: Spec) -> str:
    """A name after the structure of a Spec, as the field has it."""
    nodes = spec.mask.walk()
    for kind, name in _NAMES:
        if any(isinstance(node, kind) for node in nodes):
            return name
    return "BiasedAttention" if spec.operands else "Attention"


def distinct(name: str, taken: Sequence[str]) -> str:
    """The name with a number, if it is taken."""
    number = 1 + sum(re.sub(r"_\d+$", "", t) == name for t in taken)
    return name if number == 1 else f"{name}_{number}"


def cause(error: BaseException) -> str:
    """The innermost cause of an error, on one line."""
    while isinstance(error.__cause__, Exception):
        error = error.__cause__
    first = next(iter(str(error).strip().splitlines()), "")
    return first[:200] or type(error).__name__


class _Body(nn.Module):
    def __init__(self, compute: Callable[..., Tensor]) -> None:
        super().__init__()
        self._compute = [compute]

    def forward(self, tensors: list[Tensor]) -> Tensor:
        return self._compute[0](*tensors)


def body(name: str, compute: Callable[..., Tensor], like: Sequence[Tensor], opset: int,
         any_length: bool = False) -> ir.Function:
    """The function of that name that computes `compute` of tensors.

    like: fake tensors; their symbolic sizes are dynamic in the body.
    any_length: so are the lengths of the first three, which keeps a mask that follows from
        indices from being written out.
    """
    examples, sizes = [], []
    for number, fake in enumerate(like):
        shape = [s.node.hint if isinstance(s, torch.SymInt) else s for s in fake.shape]
        examples.append(torch.zeros(shape, dtype=fake.dtype))
        known = {i: torch.export.Dim.AUTO for i, s in enumerate(fake.shape)
                 if isinstance(s, torch.SymInt)}
        if any_length and number < 3:
            known.setdefault(fake.dim() - 2, torch.export.Dim.AUTO)
        sizes.append(known or None)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        program = torch.export.export(_Body(compute), (examples,), dynamic_shapes=(sizes,),
                                      strict=False)
        made = torch.onnx.export(program, (examples,), dynamo=True, verbose=False,
                                 opset_version=opset)
    if made is None:
        raise AttnOptError(f"torch.onnx.export gave nothing for {name}")
    return _function(name, made.model)


def _function(name: str, model: ir.Model) -> ir.Function:
    """The graph of a model as a function: initializers become constants."""
    graph = model.graph
    constants = []
    for key, value in list(graph.initializers.items()):
        assert value.const_value is not None
        node = ir.Node("", "Constant", [], attributes=[ir.AttrTensor("value", value.const_value)])
        node.outputs[0].name = f"{value.name}_value"
        value.replace_all_uses_with(node.outputs[0])
        del graph.initializers[key]
        constants.append(node)
    for node in graph:
        node.metadata_props.clear()
    first = next(iter(graph), None)
    if first is not None:
        graph.insert_before(first, constants)
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
