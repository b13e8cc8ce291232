"""A zoo of tiny, randomly initialised `transformers` models with `attn_implementation="eager"`.

Every model is built in memory from a configuration (two layers, hidden size 32 to 64), so nothing
is downloaded. The models are data: one `Entry` per architecture in the tables of `text.py`,
`vision.py`, `audio.py` and `multimodal.py`. Parameters are drawn anew after construction, because
the authors' initialisation (standard deviation 0.02, biases and relative-position tables at zero)
makes nearly uniform attention, in which a lost bias or scale would not be seen.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

Inputs = dict[str, Any]

VOCAB = 99
TEXT: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 64, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "use_cache": False}
VISION: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
    "image_size": 32, "patch_size": 8, "num_channels": 3,
}


@dataclass(frozen=True)
class Entry:
    """One architecture: how to build it and what to call it with.

    `config` and `model` are class names in `transformers`. An override whose value is a pair
    `(class name, dict)` becomes a nested configuration object. `inputs` draws the keyword arguments
    of the call from a generator.
    """

    name: str
    config: str
    overrides: Mapping[str, Any]
    model: str
    inputs: Callable[[torch.Generator], Inputs]
    family: str = field(default="text")


def _lookup(name: str) -> Any:
    """Finds a public class of `transformers`, or one written as `models.x.modeling_x.Name`."""
    import importlib

    import transformers

    if "." not in name:
        return getattr(transformers, name)
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"transformers.{module}"), attribute)


def _nested(value: Any) -> Any:
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Mapping):
        return _lookup(value[0])(**{k: _nested(v) for k, v in value[1].items()})
    return value


def _redraw(model: nn.Module, seed: int) -> None:
    """Draws matrices with unit gain and moves vectors a little away from what they were."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point():
                continue
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim >= 2:
                fan_in = max(1, parameter.numel() // max(1, parameter.shape[0]))
                parameter.copy_(noise * fan_in**-0.5)
            else:
                parameter.add_(0.1 * noise)


def build(entry: Entry, seed: int = 0) -> nn.Module:
    """Builds an entry's model: eager attention, evaluation mode, float32, seeded parameters."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = _nested((entry.config, dict(entry.overrides)))
        config._attn_implementation = "eager"
        model = _lookup(entry.model)(config)
    _redraw(model, seed)
    return model.float().eval()


def inputs(entry: Entry, seed: int = 0) -> Inputs:
    """Draws the keyword arguments of one call."""
    return entry.inputs(torch.Generator().manual_seed(seed))


# Makers of inputs. Each returns a function of a generator, so that the table stays data.


def _padding(batch: int, length: int) -> torch.Tensor:
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[-1, length - length // 4 :] = 0
    return mask


def ids(
    batch: int = 2, length: int = 12, mask: bool = True, low: int = 5, high: int = VOCAB,
    **extra: Any
) -> Callable[[torch.Generator], Inputs]:
    """Token ids, with a padding mask whose last row is a quarter shorter."""

    def make(generator: torch.Generator) -> Inputs:
        out: Inputs = {"input_ids": torch.randint(low, high, (batch, length), generator=generator)}
        if mask:
            out["attention_mask"] = _padding(batch, length)
        out.update(_draw(extra, generator))
        return out

    return make


def seq2seq(mask: bool = True, **extra: Any) -> Callable[[torch.Generator], Inputs]:
    """Encoder and decoder token ids of different lengths, both padded."""

    def make(generator: torch.Generator) -> Inputs:
        out = ids(mask=mask)(generator)
        out["decoder_input_ids"] = torch.randint(5, VOCAB, (2, 7), generator=generator)
        if mask:
            out["decoder_attention_mask"] = _padding(2, 7)
        out.update(_draw(extra, generator))
        return out

    return make


@dataclass(frozen=True)
class Floats:
    """A normal tensor of this shape."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Uniform:
    """A tensor of this shape, uniform in [0, 1)."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Ints:
    """Integers of this shape in [low, high)."""

    shape: tuple[int, ...]
    low: int
    high: int


@dataclass(frozen=True)
class Padding:
    """A padding mask (batch, length) of ones and, at the end of the last row, zeros."""

    batch: int
    length: int


def _draw(values: Mapping[str, Any], generator: torch.Generator) -> Inputs:
    out: Inputs = {}
    for key, value in values.items():
        if isinstance(value, Floats):
            value = torch.randn(value.shape, generator=generator)
        elif isinstance(value, Uniform):
            value = torch.rand(value.shape, generator=generator)
        elif isinstance(value, Ints):
            value = torch.randint(value.low, value.high, value.shape, generator=generator)
        elif isinstance(value, Padding):
            value = _padding(value.batch, value.length)
        elif callable(value):
            value = value()
        out[key] = value
    return out


def draw(**values: Any) -> Callable[[torch.Generator], Inputs]:
    """Keyword arguments: `Floats`, `Uniform`, `Ints`, `Padding`, functions or plain values."""
    return lambda generator: _draw(values, generator)


def pixels(size: int = 32, channels: int = 3, **extra: Any) -> Callable[[torch.Generator], Inputs]:
    """A batch of two pictures."""
    return draw(pixel_values=Floats((2, channels, size, size)), **extra)


def registry() -> dict[str, Entry]:
    """Every entry by name, in table order."""
    from tests.models import audio, multimodal, text, vision

    entries = [*text.ENTRIES, *vision.ENTRIES, *audio.ENTRIES, *multimodal.ENTRIES]
    names = [entry.name for entry in entries]
    if len(set(names)) != len(names):
        twice = sorted(name for name in names if names.count(name) > 1)
        raise ValueError(f"entry names must be unique, got {twice}")
    return {entry.name: entry for entry in entries}
