"""A forward call that is known: shapes, strides and types as before, so all but pointers is done.

What `attnopt.kernels.triton.problem` finds out about a call, and what the launch makes of it,
depends on the tensors' layout alone. `Ready` keeps it; `key` is what it depends on. Lists of tiles
that operands decide are made anew for their values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.spec import Spec
from attnopt.ir.tiling import tile_count
from attnopt.kernels.triton.launch import (
    constants,
    cut_of,
    described,
    device_name,
    start,
    with_lists,
)
from attnopt.kernels.triton.lists import recipe, recorded, waits
from attnopt.kernels.triton.loading import kernel
from attnopt.kernels.triton.problem import Problem, as_bytes
from attnopt.kernels.triton.scores import BY_CHANNEL
from attnopt.kernels.triton.template import forward
from attnopt.kernels.triton.tiles import Tile, options


def key(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """Two calls of one Spec with equal keys differ in the numbers in their tensors only."""
    return (torch.get_float32_matmul_precision(), tensors[0].device,
            *((t.shape, t.stride(), t.dtype, t.data_ptr() % 16 == 0) for t in tensors))


class Ready:
    """`ready(query, key, value, *operands)` -> out (*L, Q, Dv), for tensors of one `key`."""

    def __init__(self, spec: Spec, problem: Problem, tile: Tile) -> None:
        self.device = problem.tensors["query"].device
        self.recipe = recipe(spec, problem, tile, "q")
        lists = None if self.recipe is None else self.recipe.make(problem.tensors)
        source = forward(spec, with_lists(problem.signature, lists))
        cut = cut_of(lists, tile)
        fixed = constants(spec, problem, tile, lists)
        self.function = kernel(source, "forward")
        self.fixed = {c: fixed[c] for c in source.constants["forward"]}
        self.options = options(tile, device_name(self.device), spec.score in BY_CHANNEL)
        self.programs = tile_count(cut[0], problem.sizes["q"]) * problem.programs
        self.shape = (*problem.leading, problem.sizes["q"], problem.sizes["d"])
        out = torch.empty(self.shape, dtype=problem.tensors["query"].dtype, device="meta")
        more = {"out": out} | ({} if lists is None else lists.tensors)
        self.names = names = ["query", "key", "value", *(f"op_{o.slot}" for o in spec.operands)]
        #: values of the arguments, and which of them are tensors of the call, or its lists: by
        #: place
        self.arguments: list[Any] = []
        self.places: list[tuple[int, int]] = []
        self.lists: list[tuple[int, str]] = []
        self.blocks: list[tuple[int, int, tuple[Any, ...]]] = []
        for i, argument in enumerate(source.arguments["forward"]):
            if argument.kind == "list" and self.recipe is not None and self.recipe.slots:
                self.lists.append((i, argument.of))
                self.arguments.append(None)
                continue
            if argument.kind != "pointer":
                self.arguments.append(problem.value_of(argument, more))
                continue
            self.arguments.append(None)
            if argument.of == "out":
                self.out = i
                continue
            name = argument.of if argument.of in names else f"op_{argument.of}"
            if fixed["TMA"] and argument.name in ("key", "value"):
                whole = described(problem, name, cut[1])
                # Its parts, as the whole would hold on to the tensor of this call.
                self.blocks.append((i, names.index(name), (
                    whole.shape, whole.strides, whole.block_shape)))
            else:
                self.places.append((i, names.index(name)))

    def possible(self) -> bool:
        """Whether its lists can be made now: a CUDA graph records no look at values."""
        return self.recipe is None or not (self.recipe.slots and recorded(self.device) and waits(
            self.recipe.mask.predicate()))

    def __call__(self, *tensors: Tensor) -> Tensor:
        arguments = list(self.arguments)
        for i, place in self.places:
            arguments[i] = as_bytes(tensors[place])
        if self.blocks:
            from triton.tools.tensor_descriptor import TensorDescriptor

            for i, place, parts in self.blocks:
                arguments[i] = TensorDescriptor(tensors[place], *parts)
        if self.lists and self.recipe is not None:
            made = self.recipe.make(dict(zip(self.names, tensors, strict=True)))
            assert made is not None
            for i, name in self.lists:
                arguments[i] = made.tensors[name]
        out = arguments[self.out] = tensors[0].new_empty(self.shape)
        start(self.function, self.programs, arguments, self.fixed | self.options, out.device)
        return out
