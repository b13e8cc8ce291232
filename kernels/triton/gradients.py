"""The gradient of one call: the backward kernels, and what is summed after them.

A kernel gives the gradient of a tensor for every entry of the leading axes of the score, or of
those that the tensor varies along; broadcasting is undone by a sum. Sinks have one term for each
row, which needs no kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.spec import Spec
from attnopt.ir.tiling import Tiling, tile_count
from attnopt.kernels.triton.backward import backward, kinds, sides
from attnopt.kernels.triton.backward_body import shared_axes
from attnopt.kernels.triton.backward_tables import copies
from attnopt.kernels.triton.boxes import constants
from attnopt.kernels.triton.launch import (
    cut_of,
    describable,
    device_name,
    launch,
    precision,
    ranks,
    with_lists,
)
from attnopt.kernels.triton.lists import Lists, tiles_of
from attnopt.kernels.triton.problem import Problem
from attnopt.kernels.triton.scores import BY_CHANNEL
from attnopt.kernels.triton.tiles import ROW_TILE, Tile, gradient_tile, padded

#: names of query, key and value in this order
INPUTS = ("query", "key", "value")


class Gradients:
    """One backward pass.

    wanted: names among query, key and value; slots: operands, whose gradient is asked for
    """

    def __init__(self, spec: Spec, problem: Problem, out: Tensor, lse: Tensor, grad: Tensor,
                 wanted: Sequence[str], slots: Sequence[str], tile: Tile | None = None,
                 descriptors: bool | None = None) -> None:
        self.spec, self.wanted, self.slots = spec, set(wanted), tuple(slots)
        self.kinds = kinds(spec, frozenset(slots), problem.signature.axes) or {}
        self.tile, self.forced = tile, descriptors
        self.made: dict[str, Lists | None] = {}
        grad = grad.contiguous()
        axes = problem.signature.axes
        matrix = {a: i - len(axes) - 2 for i, a in enumerate(axes)}
        vector = {a: i - len(axes) - 1 for i, a in enumerate(axes)}
        dims = dict(problem.dims) | {
            "grad": matrix | {"q": -2, "d": -1}, "grad_query": matrix | {"q": -2, "d": -1},
            "grad_key": matrix | {"k": -2, "d": -1}, "grad_value": matrix | {"k": -2, "d": -1},
            "delta": vector | {"q": -1}}
        for slot, kind in self.kinds.items():
            if kind == "factor":
                dims |= {f"left_grad_{slot}": matrix | {"q": -2, "r": -1},
                         f"right_grad_{slot}": matrix | {"k": -2, "r": -1}}
            dims[f"grad_{slot}"] = (matrix | {"q": -2, "k": -1} if kind == "tile" else
                                    vector | {"q" if kind == "row" else "k": -1})
        delta = torch.empty_like(lse)
        self.problem = dataclasses.replace(
            problem, dims=dims,
            tensors=problem.tensors | {"out": out, "lse": lse, "grad": grad, "delta": delta})
        self.rows = (*problem.leading, problem.sizes["q"])

    def run(self) -> dict[str, Tensor]:
        """Gradients by name: query, key, value, and operands by slot."""
        spec, tensors = self.spec, self.problem.tensors
        found: dict[str, Tensor] = {}
        if spec.normalizer == "softmax" or spec.l1:
            self.start("row_dots", "rows", {}, math.ceil(self.rows[-1] / ROW_TILE.rows)
                       * self.problem.programs)
        self.by_queries(found)
        self.by_keys(found)
        self.by_tiles(found)
        self.by_tables(found)
        self.of_sinks(found)
        for name, gradient in found.items():
            own = tensors.get(name if name in INPUTS else f"op_{name}")
            assert own is not None
            found[name] = gradient.sum_to_size(own.shape).to(own.dtype)
        return found

    def by_queries(self, found: dict[str, Tensor]) -> None:
        rows = [s for s in self.slots if self.kinds.get(s) == "row"]
        lefts = [s for s in self.slots if self.kinds.get(s) == "factor" and sides(self.spec, s)[0]]
        weights = [s for s in self.slots if self.kinds.get(s) == "weight"]
        query = self.problem.tensors["query"]
        if self.spec.score == "key" and "query" in self.wanted:
            found["query"] = torch.zeros_like(query)
        if "query" in found and not (rows or lefts) or (
                "query" not in self.wanted and not (rows or lefts or weights)):
            return
        outputs = {"grad_query": self.empty((*self.rows, query.shape[-1]), query)}
        outputs |= {f"grad_{s}": query.new_empty(self.rows, dtype=torch.float32) for s in rows}
        outputs |= {f"left_grad_{s}": self.of_factor(s, self.rows) for s in lefts}
        cut = cut_of(self.lists("q"), self.of("query"))
        tiles = tile_count(cut[0], self.rows[-1])
        if weights:
            outputs["grad_weight"] = query.new_empty(
                (*self.problem.leading, tiles, query.shape[-1]), dtype=torch.float32)
        self.start("grad_query", "query", outputs, tiles * self.problem.programs)
        if "query" in self.wanted:
            found.setdefault("query", outputs["grad_query"])
        found.update({s: outputs[f"grad_{s}"].unsqueeze(-1) for s in rows})
        found.update({s: outputs["grad_weight"].sum(-2) for s in weights})
        for slot in lefts:
            self.add_factor(found, slot, outputs[f"left_grad_{slot}"])

    def by_keys(self, found: dict[str, Tensor]) -> None:
        columns = [s for s in self.slots if self.kinds.get(s) == "column"]
        rights = [s for s in self.slots if self.kinds.get(s) == "factor" and sides(self.spec, s)[1]]
        if not self.wanted & {"key", "value"} and not columns and not rights:
            return
        problem = self.problem
        shared = shared_axes(problem.signature, bool(columns or rights))
        own = tuple(1 if a in shared else n for a, n in zip(
            problem.signature.axes, problem.leading, strict=True))
        keys = problem.sizes["k"]
        outputs = {}
        for name in ("key", "value"):
            tensor = problem.tensors[name]
            outputs[f"grad_{name}"] = self.empty((*own, keys, tensor.shape[-1]), tensor)
        outputs |= {f"grad_{s}": problem.tensors["query"].new_empty(
            (*own, keys), dtype=torch.float32) for s in columns}
        outputs |= {f"right_grad_{s}": self.of_factor(s, (*own, keys)) for s in rights}
        cut = cut_of(self.lists("k"), self.of("key"))
        self.start("grad_key", "key", outputs, tile_count(cut[1], keys) * math.prod(own))
        found.update({n: outputs[f"grad_{n}"] for n in ("key", "value") if n in self.wanted})
        if self.spec.score == "key" and "key" in self.wanted:
            found["key"] = torch.zeros_like(problem.tensors["key"])
        found.update({s: outputs[f"grad_{s}"].unsqueeze(-2) for s in columns})
        for slot in rights:
            self.add_factor(found, slot, outputs[f"right_grad_{slot}"])

    def of_factor(self, slot: str, rows: tuple[int, ...]) -> Tensor:
        """Room for the gradient of a factor, which has these rows before it is summed."""
        factor = self.problem.tensors[f"op_{slot}"]
        return self.empty((*rows, factor.shape[-1]), factor)

    def add_factor(self, found: dict[str, Tensor], slot: str, gradient: Tensor) -> None:
        """A tensor may be a factor along q and one along k."""
        gradient = gradient.sum_to_size(self.problem.tensors[f"op_{slot}"].shape)
        found[slot] = found[slot] + gradient if slot in found else gradient

    def by_tiles(self, found: dict[str, Tensor]) -> None:
        problem, tile = self.problem, self.of("operand")
        for slot in self.slots:
            if self.kinds.get(slot) != "tile":
                continue
            axes = self.spec.operand(slot).axes or ()
            own = tuple(n if a in axes else 1 for a, n in zip(
                problem.signature.axes, problem.leading, strict=True))
            queries, keys = problem.sizes["q"], problem.sizes["k"]
            operand = problem.tensors[f"op_{slot}"]
            outputs = {f"grad_{slot}": self.empty((*own, queries, keys), operand)}
            self.start(f"grad_{slot}", "operand", outputs,
                       math.ceil(queries / tile.rows) * math.ceil(keys / tile.keys)
                       * math.prod(own))
            found[slot] = outputs[f"grad_{slot}"]

    def by_tables(self, found: dict[str, Tensor]) -> None:
        problem, tile = self.problem, self.of("operand")
        for slot in self.slots:
            if self.kinds.get(slot) != "table":
                continue
            table = problem.tensors[f"op_{slot}"]
            whole = table.new_zeros((copies(table.numel()), *table.shape), dtype=torch.float32)
            self.start(f"grad_{slot}", "operand",
                       {f"grad_{slot}": whole[0], f"copies_{slot}": whole},
                       math.ceil(problem.sizes["q"] / tile.rows)
                       * math.ceil(problem.sizes["k"] / tile.keys) * problem.programs)
            found[slot] = whole.sum(0)

    def of_sinks(self, found: dict[str, Tensor]) -> None:
        """A sink takes part in the sum only: its logit's gradient is -w(sink) * delta."""
        slots = [s for s in self.slots if self.kinds.get(s) == "sink"]
        if not slots or self.spec.sinks is None:
            return
        problem = self.problem
        shape = (*self.rows, 1)
        named = {o.slot: problem.tensors[f"op_{o.slot}"] for o in self.spec.operands}
        with torch.enable_grad():
            own = {s: named[s].detach().float().requires_grad_() for s in slots}
            logit = torch.as_tensor(evaluate(self.spec.sinks, Env(
                shape, named | own, sizes={"k": problem.sizes["k"]}, device=self.rows_device)))
            logit = logit.expand(shape)
        lse, delta = (problem.tensors[n].unsqueeze(-1) for n in ("lse", "delta"))
        change = -torch.exp(logit.detach() - lse) * delta
        change = torch.where(lse == -torch.inf, 0.0, change)
        for slot, gradient in zip(slots, torch.autograd.grad(
                logit, [own[s] for s in slots], change), strict=True):
            found[slot] = gradient

    @property
    def rows_device(self) -> torch.device:
        return self.problem.tensors["query"].device

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """A gradient in the dtype of its tensor; in float32 where it is summed after."""
        whole = math.prod(shape) == like.numel()
        return like.new_empty(shape, dtype=like.dtype if whole else torch.float32)

    def of(self, which: str) -> Tile:
        if which == "rows":
            return ROW_TILE
        query, value = (self.problem.tensors[n] for n in ("query", "value"))
        return self.tile or gradient_tile(device_name(query.device), query.shape[-1],
                                          value.shape[-1], query.element_size(), which,
                                          self.spec.score in BY_CHANNEL)

    def lists(self, by: str) -> Lists | None:
        """Of the key tiles of each query tile, or the other way round."""
        if by not in self.made:
            self.made[by] = tiles_of(
                self.spec, self.problem, self.of("query" if by == "q" else "key"), by)
        return self.made[by]

    def start(self, name: str, which: str, outputs: dict[str, Tensor], programs: int) -> None:
        """Launch one kernel of the module."""
        spec, problem, tile = self.spec, self.problem, self.of(which)
        source = backward(spec, with_lists(problem.signature, self.lists("q")),
                          with_lists(problem.signature, self.lists("k")),
                          tuple(s for s in self.slots if self.kinds.get(s) != "sink"))
        lists = self.lists("k") if which == "key" else (
            self.lists("q") if which == "query" else None)
        boxes = lists.boxes if lists else None
        cut = cut_of(lists, tile)
        blocks: dict[str, Tiling] = {
            "query": {"key": cut[1], "value": cut[1]},
            "key": {"query": cut[0], "grad": cut[0]}}.get(which, {})
        described = bool(blocks) and (
            describable(problem, tuple(blocks), boxes) if self.forced is None else self.forced)
        query, value = problem.tensors["query"], problem.tensors["value"]
        fixed: dict[str, Any] = {
            "TMA": described,
            "BM": tile.rows, "BN": tile.keys, "STAGES": tile.stages,
            "D": query.shape[-1], "DP": padded(query.shape[-1]), "V": value.shape[-1],
            "VP": padded(value.shape[-1]), "PRECISION": precision(query.dtype, query.device),
            "RAGGED": problem.sizes["k"] % tile.keys != 0, **ranks(spec, problem),
            **(constants(boxes) if boxes else {})}
        more = outputs if lists is None else outputs | lists.tensors
        launch(source, name, problem, more, fixed, tile, programs, blocks,
               self.spec.score in BY_CHANNEL)
