"""Masks of transformers models, as torch.export captures them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from attnopt.ir.mask import And, Band, Causal, KeyKeep, Mask
from attnopt.passes.analyze.provenance import Finding
from attnopt.passes.normalize import op_name
from tests.models import zoo
from tests.passes.lifting import Program, capture, layout_of

pytest.importorskip("transformers")
SDPA = "scaled_dot_product_attention"


def model_program(name: str, attention: str, dynamic: bool = False) -> Program:
    entry = zoo.registry()[name]
    model = zoo.build(entry).eval()
    model.set_attn_implementation(attention)
    given: dict[str, Any] = zoo.inputs(entry)
    auto = torch.export.Dim.DYNAMIC
    moving = {n: {0: auto, 1: auto} if torch.is_tensor(x) else None for n, x in given.items()}
    return capture(model, (), given, dynamic=moving if dynamic else None)


def sdpa_findings(program: Program) -> list[Finding]:
    analysis, found = program.analysis(), []
    for node in program.graph.nodes:
        if node.op != "call_function" or op_name(node) != SDPA or len(node.args) < 4:
            continue
        query, key, mask = (node.args[i].meta["val"] for i in (0, 1, 3))
        sizes = dict(zip(("b", "h", "q", "k"), (*query.shape[:-1], key.shape[-2]), strict=True))
        role = "keep" if mask.dtype == torch.bool else "additive"
        found.append(analysis.operand(node.args[3], layout_of(node.args[3]), role, sizes))
    return found


def parts_of(mask: Mask | None) -> list[Mask]:
    return list(mask.masks) if isinstance(mask, And) else [] if mask is None else [mask]


EXPECTED: dict[str, list[type[Mask]]] = {
    "bert_mask": [KeyKeep], "gpt2": [Causal, KeyKeep], "llama": [Causal, KeyKeep],
    "mistral": [Band, KeyKeep], "gemma3": [Band, KeyKeep], "whisper": [Causal, KeyKeep],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_structure_and_padding(name: str) -> None:
    found = sdpa_findings(model_program(name, "sdpa"))
    assert found
    kinds = [[type(m) for m in parts_of(f.mask)] for f in found]
    assert EXPECTED[name] in kinds, [str(f.mask) for f in found]
    for f in found:
        assert f.mask is not None and not f.rest and not f.guards
        assert f.provenance.parts == {"index", "input"}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_for_every_length(name: str) -> None:
    found = sdpa_findings(model_program(name, "sdpa", dynamic=True))
    assert found
    for f in found:
        causal, keys = parts_of(f.mask)
        assert causal == Causal() and isinstance(keys, KeyKeep)
        assert f.loads[keys.slot].layout == ("b", None, None, "k")


def added_to(node: Any, size: int) -> list[fx.Node]:
    """The operands that are added on the way up from a softmax, largest first given up."""
    found: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function" and op_name(node) in (
            "add", "to", "tanh", "mul", "div"):
        tensors = [a for a in node.all_input_nodes if isinstance(a.meta["val"], torch.Tensor)]
        if op_name(node) == "add" and len(tensors) == 2:
            found.append(tensors[1])
        node = tensors[0]
    return found


@pytest.mark.parametrize("name", ["gemma2", "t5"])
def test_additive_masks_of_eager_models(name: str) -> None:
    program = model_program(name, "eager")
    analysis, texts = program.analysis(), set()
    for node in program.graph.nodes:
        if node.op != "call_function" or op_name(node) != "softmax":
            continue
        shape = node.meta["val"].shape
        sizes = dict(zip(("b", "h", "q", "k"), shape, strict=True))
        for operand in added_to(node.args[0], len(shape)):
            found = analysis.operand(operand, layout_of(operand), "additive", sizes)
            texts.add(found.provenance.text)
            if found.mask is not None and found.fill is not None:
                assert found.fill == torch.finfo(torch.float32).min
                assert not found.guards
            if "parameter" in found.provenance.parts:
                assert found.mask is None or found.rest
    assert any("index" in t and "input" in t for t in texts)
    if name == "t5":
        assert any("parameter" in t for t in texts)
