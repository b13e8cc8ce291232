"""Whole models of transformers under torch.compile: this backend beside Inductor alone.

Random weights, fixed shapes, inference in fp32. A row says by how much Inductor alone takes longer
(ratio over 1: this backend is faster), whether the outputs equal eager ones, and how many graphs
Dynamo made for each. The bound: never slower than 1.05 times Inductor.
"""

from __future__ import annotations

import copy
import functools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnopt.bench.rows import chosen
from attnopt.bench.side_by_side import OURS, ratio
from attnopt.timing import format_seconds, interleave

_INDUCTOR = "inductor"
#: a whole model may take so many times what Inductor's own takes
_BOUND = 1.05


@dataclass(frozen=True)
class Model:
    """One row: a model by the names of transformers, its sizes, and what it is given.

    takes: "text" (tokens), "both" (tokens for encoder and decoder) or "image"
    size:  number of tokens, or of pixels along an edge
    """

    name: str
    kind: str
    settings: dict[str, Any]
    size: int = 512
    takes: str = "text"
    batch: int = 1

    def build(self, shrink: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, f"{self.kind}Config")(
            **{**self.settings, "attn_implementation": "eager"})
        model = getattr(transformers, f"{self.kind}Model")(config).eval()
        size = max(32, self.size // 8) if shrink and self.takes != "image" else self.size
        if self.takes == "image":
            return model, {"pixel_values": torch.randn(self.batch, 3, size, size)}
        tokens = torch.randint(5, 900, (self.batch, size))
        given = {"input_ids": tokens}
        if self.takes == "both":
            given["decoder_input_ids"] = tokens[:, :size // 2]
        return model, given


_TEXT = {"vocab_size": 1000, "hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6,
         "intermediate_size": 1024}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "use_cache": False}

MODELS = (
    Model("bert", "Bert", {**_TEXT, "max_position_embeddings": 512}),
    Model("mpnet", "MPNet", {**_TEXT, "max_position_embeddings": 514}),
    Model("deberta-v2", "DebertaV2", {
        **_TEXT, "max_position_embeddings": 512, "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"], "position_buckets": 64, "share_att_key": True,
        "norm_rel_ebd": "layer_norm"}),
    Model("gpt2", "GPT2", {"vocab_size": 1000, "n_embd": 384, "n_layer": 4, "n_head": 6,
                           "use_cache": False}),
    Model("llama", "Llama", _LLAMA),
    Model("mistral, window 128", "Mistral", {**_LLAMA, "sliding_window": 128}, size=1024),
    Model("bloom", "Bloom", {"vocab_size": 1000, "hidden_size": 384, "n_layer": 4, "n_head": 6,
                             "use_cache": False}),
    Model("t5", "T5", {"vocab_size": 1000, "d_model": 384, "d_kv": 64, "d_ff": 1024,
                       "num_layers": 4, "num_heads": 6, "use_cache": False}, takes="both"),
    Model("swin", "Swin", {"image_size": 224, "embed_dim": 96, "depths": [2, 2, 2],
                           "num_heads": [3, 6, 12]}, size=224, takes="image"),
    Model("vit", "ViT", {"hidden_size": 384, "num_hidden_layers": 4, "num_attention_heads": 6,
                         "intermediate_size": 1024, "image_size": 224}, size=224, takes="image"),
)


def measure(
    optimize: Callable[..., Any],
    *,
    repeats: int = 15,
    quick: bool = False,
    cases: Iterable[str] | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Rows by the model's name. quick: short sequences and few rounds.

    cases: patterns of names. `optimize` is not used: the backend has passes of its own.
    """
    rows: dict[str, Any] = {}
    for model in chosen(MODELS, cases):
        row = rows[model.name] = run_model(model, 3 if quick else repeats, quick)
        low, high = row["ratios"][_INDUCTOR]["interval"]
        times = row["contestants"]
        say(f"{model.name}: {row['rewritten']} of {row['sites']} sites; attnopt "
            f"{format_seconds(times[OURS]['seconds'])}, inductor "
            f"{format_seconds(times[_INDUCTOR]['seconds'])}, ratio "
            f"{row['ratios'][_INDUCTOR]['ratio']:.2f} ({low:.2f} to {high:.2f}); error "
            f"{times[OURS]['error']:.1e} (inductor {times[_INDUCTOR]['error']:.1e}); graphs "
            f"{times[OURS]['graphs']} and {times[_INDUCTOR]['graphs']}")
    return rows


def run_model(model: Model, repeats: int, shrink: bool) -> dict[str, Any]:
    """One row, plain numbers and strings."""
    from attnopt.backend import attnopt_backend

    torch._dynamo.reset()  # its limit of compilations counts those of other rows
    module, given = model.build(shrink)
    reports: list[Any] = []
    with torch.no_grad():
        exact = _tensors(copy.deepcopy(module).double()(**{
            name: x.double() if x.is_floating_point() else x for name, x in given.items()}))
        steps: dict[str, Callable[[], Any]] = {}
        for name, backend in ((_INDUCTOR, "inductor"), (OURS, attnopt_backend)):
            options: Any = {"report": reports.append} if name == OURS else None
            # two copies: Dynamo keeps the code that it compiled on the function of a module
            run = torch.compile(copy.deepcopy(module).forward, backend=backend, dynamic=False,
                                options=options)
            steps[name] = functools.partial(run, **given)
        graphs, errors = {}, {}
        asked: dict[str, Callable[[], Any]] = {"eager": functools.partial(module, **given), **steps}
        for name, step in asked.items():
            before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            errors[name] = max((float((a.double() - b).abs().max())
                                for a, b in zip(_tensors(step()), exact, strict=True)), default=0.0)
            graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"] - before
        times = interleave(steps, repeats)
    sites = [site for report in reports for site in report.sites]
    found = ratio(times[_INDUCTOR], times[OURS], (1 / _BOUND, 1.0))
    return {
        "shape": f"B{model.batch} {model.takes} {model.size}", "dtype": "fp32", "training": False,
        "device": "cpu", "threads": 1, "rounds": repeats, "clock": "cpu", "sites": len(sites),
        "rewritten": (taken := sum(s.status == "rewritten" for s in sites)),
        "ours": {"status": f"{taken} of {len(sites)} sites"},
        "contestants": {name: {"seconds": statistics.median(times[name]) if name in times else None,
                               "error": errors[name], "graphs": graphs[name]}
                        for name in errors},
        "ratios": {_INDUCTOR: found},
    }


def _tensors(outputs: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(dict(outputs) if hasattr(outputs, "keys") else outputs)
    return [x for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]
