"""What a random program is made of: one choice per question, drawn with weights, made legal.

`OPTIONS` is the whole space; the first option of every question is its simplest answer, to which
the shrinker goes back. A `Choices` renders to source text in `generator`.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, fields, replace

OPTIONS: dict[str, dict[str, int]] = {
    "call": {"composed": 84, "sdpa": 13, "mha": 3},
    "rank": {"4": 56, "3": 14, "2": 7, "heads": 7, "5": 10, "6": 6},
    "source": {"inputs": 66, "projected": 20, "cross": 9, "one tensor": 5},
    "order": {"heads first": 66, "sequence first": 22, "key transposed": 12},
    "groups": {"none": 76, "repeat_kv": 7, "repeat_interleave": 6, "expand": 5, "one": 6},
    "score": {"dot": 70, "cosine": 8, "distance": 6, "difference": 4, "cdist": 3, "additive": 5,
              "key only": 4},
    "product": {"matmul": 40, "einsum": 20, "ellipsis": 8, "reversed": 8, "bmm": 10,
                "baddbmm": 8, "sum": 6},
    "scale": {"none": 8, "mul": 24, "div": 20, "query": 12, "key": 6, "both": 6, "learned": 7,
              "per head": 6, "after": 6, "buffer": 5},
    "cap": {"none": 88, "tanh": 12},
    "bias": {"none": 56, "table": 7, "buffer": 6, "attribute": 5, "alibi": 7, "gather": 6,
             "input": 5, "row": 4, "distance": 2, "activation": 2},
    "bias_too": {"none": 88, "table": 3, "buffer": 3, "input": 3, "alibi": 3},
    "mask": {"none": 34, "causal": 14, "window": 8, "keys": 10, "dense": 6, "lengths": 5,
             "causal keys": 6, "segments": 4, "buffer": 5, "attribute": 3, "all keep": 3,
             "empty rows": 4, "sliced causal": 4, "top keys": 2},
    "idiom": {"where": 16, "where least": 8, "fill": 18, "fill least": 10, "fill far": 8,
              "add": 10, "add far": 8, "complement": 8, "in place": 8, "negated": 6},
    "cast": {"none": 66, "softmax": 16, "float": 12, "all": 6},
    "normaliser": {"softmax": 62, "method": 8, "hand": 7, "exp": 3, "log-sum-exp": 4, "log": 3,
                   "after": 6, "sigmoid": 4, "relu": 2, "sinks": 4, "plus one": 1},
    "dropout": {"none": 82, "function": 8, "module": 8, "scores": 2},
    "edit": {"none": 86, "heads": 4, "mix": 3, "gate": 3, "again": 2, "identity": 2},
    "value": {"matmul": 62, "einsum": 16, "right": 8, "bmm": 10, "sum": 4},
    "result": {"plain": 60, "merged": 24, "weights": 10, "mean": 6},
    "twist": {"none": 93, "queries": 2, "chain": 2, "mutated": 2, "dead": 1},
    "shape": {"odd": 46, "tiny": 12, "length is heads": 12, "batch 0": 6, "batch 1": 12,
              "width is length": 12},
    "across": {"self": 60, "cross": 40},
    "width": {"same": 78, "other": 22},
    "dtype": {"float32": 50, "bfloat16": 20, "float16": 14, "float64": 16},
    "memory": {"contiguous": 60, "strided": 16, "transposed": 14, "expanded": 10},
    "training": {"no": 45, "yes": 55},
    "dynamic": {"no": 78, "yes": 22},
    "repeat": {"no": 75, "yes": 25},
    "route": {"copy_": 30, "data": 25, "numpy": 20, "new data": 12, "slice": 8, "assign": 10},
}

LEADING = {"2": "", "3": "b", "heads": "h", "4": "b h", "5": "b w h", "6": "b w g h"}


@dataclass(frozen=True)
class Choices:
    """One answer for every question of `OPTIONS`; the defaults are the simplest answers."""

    call: str = "composed"
    rank: str = "4"
    source: str = "inputs"
    order: str = "heads first"
    groups: str = "none"
    score: str = "dot"
    product: str = "matmul"
    scale: str = "none"
    cap: str = "none"
    bias: str = "none"
    bias_too: str = "none"
    mask: str = "none"
    idiom: str = "where"
    cast: str = "none"
    normaliser: str = "softmax"
    dropout: str = "none"
    edit: str = "none"
    value: str = "matmul"
    result: str = "plain"
    twist: str = "none"
    shape: str = "odd"
    across: str = "self"
    width: str = "same"
    dtype: str = "float32"
    memory: str = "contiguous"
    training: str = "no"
    dynamic: str = "no"
    repeat: str = "no"
    route: str = "copy_"

    @property
    def leading(self) -> list[str]:
        return LEADING[self.rank].split()

    @property
    def family(self) -> str:
        """The line of the statistics that this program counts in."""
        if self.twist != "none":
            return "near miss"
        if self.call != "composed":
            return f"F.{self.call}" if self.call == "sdpa" else "nn.MultiheadAttention"
        if self.normaliser in ("sigmoid", "relu", "sinks", "plus one"):
            return f"{self.normaliser} normaliser"
        return f"{self.score} scores"

    def sizes(self, second: bool = False) -> dict[str, int]:
        """Axis sizes, or those of a second call (lengths up to 24 fit every sliced constant)."""
        sizes = {"b": 2, "h": 4, "w": 2, "g": 2, "d": 8, "q": 7, "k": 7, "1": 1}
        if self.shape == "tiny":
            sizes |= {"q": 2, "k": 2, "d": 4, "h": 2, "w": 1}
        elif self.shape == "length is heads":
            sizes |= {"q": 4, "k": 4}
        elif self.shape == "width is length":
            sizes |= {"q": 8, "k": 8}
        elif self.shape.startswith("batch"):
            sizes["b"] = int(self.shape.removeprefix("batch "))
        if second:
            sizes |= {"b": 3, "q": 11, "k": 11}
        if self.across == "cross":
            sizes["k"] += 3
        if self.rank == "3" and self.source in ("projected", "cross"):  # a single head
            sizes |= {"h": 1, "d": 4 * sizes["d"]}
        wide = sizes["d"] + (2 if self.width == "other" else 0)
        return sizes | {"s": sizes["k"], "c": sizes["h"] * sizes["d"], "e": wide,
                        "g": sizes["h"] // 2 if self.groups != "none" else 2}


def draw(rng: random.Random) -> Choices:
    """A random legal program."""
    picked = {
        name: rng.choices(list(weights), list(weights.values()))[0]
        for name, weights in OPTIONS.items()
    }
    return legal(Choices(**picked))


def legal(c: Choices) -> Choices:
    """The nearest program that can be written: what cannot be combined becomes its default."""
    while (better := _legal(c)) != c:
        c = better
    return c


def _legal(c: Choices) -> Choices:
    change: dict[str, str] = {}

    def drop(*names: str) -> None:
        change.update({name: SIMPLEST[name] for name in names})

    if c.call == "mha":
        drop(*(f.name for f in fields(c) if f.name not in (
            "call", "shape", "dtype", "memory", "training", "dynamic", "repeat", "route",
            "result")))
        change["source"] = "one tensor"
        if c.result == "merged":
            drop("result")
        return replace(c, **change)
    if c.source != "inputs":
        if c.rank not in ("3", "4"):
            drop("source")
        elif c.source == "one tensor":
            change["rank"] = "3"
        drop("order", "width")
    c, change = replace(c, **change), {}
    if c.source in ("projected", "one tensor"):
        drop("across")
    if c.source != "inputs" or c.rank != "4":
        drop("groups")
    if "h" not in c.leading:
        if c.order == "sequence first":
            drop("order")
        drop("edit") if c.edit in ("heads", "mix") else None
        drop("normaliser") if c.normaliser == "sinks" else None
        drop("scale") if c.scale == "per head" else None
        for name in ("bias", "bias_too"):
            drop(name) if getattr(c, name) in ("alibi", "gather") else None
    if c.rank == "2" or (c.rank == "6" and c.product == "sum"):
        drop("product") if c.product in ("bmm", "baddbmm", "sum") else None
        drop("value") if c.value in ("bmm", "sum") else None
    if "b" not in c.leading and c.mask in ("keys", "lengths", "causal keys", "segments"):
        drop("mask")
    if "b" not in c.leading and "row" in (c.bias, c.bias_too):
        drop("bias")
    if c.across == "cross":
        drop("mask") if c.mask == "segments" else None
        drop("edit") if c.edit == "identity" else None
    if c.groups != "none":
        drop("score") if c.score == "key only" else None
    if c.groups == "one" or c.score == "key only":
        drop("product") if c.product in ("bmm", "baddbmm") else None
        drop("value") if c.value == "bmm" else None
    if c.score != "dot":
        drop("product", "order") if c.order == "key transposed" else drop("product")
    if c.product not in ("matmul", "einsum") and c.order == "key transposed":
        drop("order")
    if c.score == "key only":
        drop("edit") if c.edit == "identity" else None
        change["twist"] = "none"
    if c.cast == "softmax" and c.normaliser not in ("softmax", "method"):
        drop("cast")
    if c.dtype == "float64" and c.cast != "none":
        drop("cast")
    if c.result == "merged" and c.rank != "4":
        drop("result")
    if c.result == "mean" and "h" not in c.leading:
        drop("result")
    if c.normaliser == "after":
        drop("edit", "twist") if c.edit == "again" else drop("twist")
        drop("result") if c.result in ("weights", "mean") else None
    if c.training == "yes" and c.twist == "mutated":
        drop("twist")
    if c.twist == "chain":
        drop("mask")
    if c.mask == "none" or (c.score == "key only" and c.idiom == "in place"):
        drop("idiom")
    if c.rank == "2" and c.memory == "expanded":
        drop("memory")
    if c.call == "sdpa":
        drop("mask", "idiom") if c.mask == "top keys" else None
        drop("score", "product", "cap", "normaliser", "edit", "value", "twist", "cast")
        drop("result") if c.result in ("weights", "mean") else None
        drop("scale") if c.scale in ("learned", "per head", "after", "buffer") else None
        drop("groups") if c.groups == "one" else None
        drop("order") if c.order == "key transposed" else None
    return replace(c, **change)


SIMPLEST = {name: next(iter(options)) for name, options in OPTIONS.items()}
