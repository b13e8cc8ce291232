"""`generate()` with a cache: the same tokens and scores from the optimised model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import attnopt  # noqa: E402  (after the skip)
from tests.models import zoo  # noqa: E402

_CONFIGS: dict[str, tuple[str, str]] = {
    "llama": ("LlamaForCausalLM", "llama"),
    "gpt2": ("GPT2LMHeadModel", "gpt2"),
    "t5": ("T5ForConditionalGeneration", "t5"),
}


def _model(name: str) -> torch.nn.Module:
    model, entry = _CONFIGS[name]
    base = zoo.registry()[entry]
    overrides = {**base.overrides, "use_cache": True}
    return zoo.build(zoo.Entry(name, base.config, overrides, model, base.inputs))


def _generate(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(
        **inputs, max_new_tokens=8, min_new_tokens=8, pad_token_id=0, output_scores=True,
        return_dict_in_generate=True, **options)


def _example(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What generate() is called with, and what the model is captured with."""
    prompt = zoo.ids(length=6)(torch.Generator().manual_seed(0))
    if name != "t5":  # a decoder's prompt is padded on the left
        prompt["attention_mask"] = prompt["attention_mask"].flip(-1)
        return prompt, {**prompt, "use_cache": False}
    call = zoo.seq2seq(use_cache=False)(torch.Generator().manual_seed(0))
    return prompt, call


@pytest.mark.parametrize(
    "options",
    [pytest.param({"do_sample": False}, id="greedy"),
     pytest.param({"do_sample": True}, id="sampled", marks=pytest.mark.slow),
     pytest.param({"num_beams": 2, "do_sample": False}, id="beams", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", list(_CONFIGS))
def test_generate_gives_the_same_tokens(name: str, options: dict[str, Any]) -> None:
    model = _model(name)
    prompt, call = _example(name)
    expected = _generate(model, prompt, **options)
    optimized = attnopt.optimize(model, (), call, verify=False)
    found = _generate(optimized, prompt, **options)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in zip(found.scores, expected.scores, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(_CONFIGS))
def test_a_call_without_cache_is_taken_by_the_variant(name: str) -> None:
    model = _model(name)
    call = _example(name)[1]
    with torch.no_grad():
        expected = model(**call).logits
        optimized = attnopt.optimize(model, (), call, verify=False)
        found = optimized(**call).logits
    assert optimized.report.calls["hits"] == 1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert optimized.report.sites
    assert any(site.status == "rewritten" for site in optimized.report.sites)
