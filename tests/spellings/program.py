"""Small programs as modules: a forward written as a function, its inputs as axis letters.

A `Spelling` is a pair of functions that compute the same numbers in two ways. Inputs are declared
in one string, for example `"q: b h s d, k: b h s d, mask: keep b 1 1 s"`; the letters name sizes
(`SIZES`), a word before them says how the values are drawn:

    (nothing)  standard normal          keep   bool, True = attend, never an empty row
    add        float, 0 or -inf         far    float, 0 or -10000 (as older models write it)
    count      int64 lengths in [1, s]  ones   bool, all True

The letters b, s, q and k may change between calls; every other letter is fixed at construction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

SIZES: dict[str, int] = {
    "b": 2, "h": 4, "g": 2, "s": 10, "q": 7, "k": 11, "d": 16, "e": 12, "w": 3, "c": 64, "1": 1,
    "B": 8,  # batch and heads folded into one axis, b * h
}
OTHER: dict[str, int] = {"b": 3, "s": 13, "q": 9, "k": 6, "B": 12}
MOVING = "bskqB"

QKV = "q: b h s d, k: b h s d, v: b h s d"
CROSS = "q: b h q d, k: b h k d, v: b h k d"
Setup = Callable[[Any, Mapping[str, int]], None]


@dataclass(frozen=True)
class Spelling:
    """Two functions `f(self, *inputs)` that are the same program.

    `setup(module, sizes)` registers parameters, buffers and plain attributes. `moving` lists the
    axis letters that may change without a new module (a learned table fixes the length, say).
    """

    name: str
    first: Callable[..., Any]
    second: Callable[..., Any]
    inputs: str = QKV
    setup: Setup | None = None
    moving: str = MOVING
    sizes: Mapping[str, int] = field(default_factory=dict)
    required: bool = True  # must be taken; else it must only be right
    gradients: bool = True  # False where the program overwrites what its backward needs

    def forms(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        return self.first, self.second

    def at(self, **changes: int) -> dict[str, int]:
        """Sizes of this spelling, with changes; `B` follows `b` and `h`."""
        sizes = {**SIZES, **self.sizes, **changes}
        return {**sizes, "B": sizes["b"] * sizes["h"]}

    def elsewhere(self) -> dict[str, int]:
        """A second shape, along the letters that may move."""
        return self.at(**{k: v for k, v in OTHER.items() if k in self.moving})


def build(forward: Callable[..., Any], setup: Setup | None = None,
          sizes: Mapping[str, int] | None = None, seed: int = 7) -> nn.Module:
    """A module of a class of its own whose `forward` is the given function."""
    module = type(_class_name(forward), (nn.Module,), {"forward": forward})()
    if setup is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            setup(module, {**SIZES, **(sizes or {})})
    return module


def _class_name(forward: Callable[..., Any]) -> str:
    name = getattr(forward, "__name__", "program").strip("_<>")
    return "".join(part.capitalize() for part in name.split("_")) or "Program"


def declared(inputs: str) -> list[tuple[str, str, list[str]]]:
    """(name, how it is drawn, axis letters) of each declared input."""
    out = []
    for entry in inputs.split(","):
        name, _, rest = entry.partition(":")
        words = rest.split()
        how = words.pop(0) if words and len(words[0]) > 1 else "normal"
        out.append((name.strip(), how, words))
    return out


def draw(inputs: str, sizes: Mapping[str, int], dtype: torch.dtype = torch.float32,
         seed: int = 0) -> tuple[Tensor, ...]:
    """Example inputs of the declared shapes."""
    rng = torch.Generator().manual_seed(seed)
    return tuple(
        _draw_one(how, [sizes[a] for a in axes], dtype, rng, sizes)
        for _, how, axes in declared(inputs)
    )


def _draw_one(how: str, shape: list[int], dtype: torch.dtype, rng: torch.Generator,
              sizes: Mapping[str, int]) -> Tensor:
    if how == "normal":
        return torch.randn(shape, generator=rng).to(dtype)
    if how == "count":
        return torch.randint(1, sizes["s"] + 1, shape, generator=rng)
    if how == "ones":
        return torch.ones(shape, dtype=torch.bool)
    keep = torch.rand(shape, generator=rng) < 0.7
    keep[..., 0] = True
    if how == "keep":
        return keep
    if how not in ("add", "far"):
        raise ValueError(f"an input must be drawn as one of the documented words, got {how!r}")
    return torch.zeros(shape).masked_fill(~keep, -math.inf if how == "add" else -1e4).to(dtype)


def dynamic_shapes(inputs: str, moving: str) -> dict[str, dict[int, Any]]:
    """`dynamic_shapes` for torch.export: every axis whose letter may move."""
    auto = torch.export.Dim.AUTO
    return {
        name: {i: auto for i, letter in enumerate(axes) if letter in moving}
        for name, _, axes in declared(inputs)
    }
