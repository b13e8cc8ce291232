"""Tables of an expression at points: what a kernel looks up instead of a tensor of all scores.

A bias that depends on query and key through a few whole numbers takes few values: T5's buckets of
k - q, Swin's and BEiT's places in a table of relative positions. The op

    tabulate(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor      (*lead, points)

evaluates the author's own expression of it, once per call, at one pair (q, k) for each of those
values; `Points` is what the text says. It is a composition of ATen, so that a table that is a
parameter keeps its gradient. The op

    literal(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor       int32

gives whole numbers that an analysis found in constants, on the device of the tensors.
"""

from __future__ import annotations

import base64
import functools
import json
import re
import sys
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.spec import leading_axes
from attnopt.kernels.table_places import remember, remembered, with_places

_library = torch.library.Library("attnopt", "FRAGMENT")
_library.define("tabulate(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))
_library.define("literal(Tensor[] tensors, SymInt[] lengths, str text) -> Tensor",
                tags=(torch.Tag.pt2_compliant_tag,))


@dataclass(frozen=True)
class Points:
    """An expression at points.

    expr:   Expr of leading axes and of k, which counts the points; #q and #k are the lengths of the
            scores
    count:  int Expr of lengths: the number of points
    slots:  names of the tensors in `expr`
    axes:   names of the lengths
    lead:   leading axes of the result, in tensor order
    exact:  the result has the dtype of the tensor; otherwise arithmetic is float32
    """

    expr: str
    count: str
    slots: tuple[str, ...]
    axes: tuple[str, ...]
    lead: tuple[str, ...]
    exact: bool

    def __str__(self) -> str:
        return json.dumps(asdict(self), separators=(",", ":"))

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> Points:
        body = json.loads(text)
        tuples = {name: tuple(body[name]) for name in ("slots", "axes", "lead")}
        return Points(**{**body, **tuples})


def tabulate(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """The table (*lead, points) that `Points` in `text` describe."""
    device, concrete = tensors[0].device, _concrete(tensors, lengths)
    key = text, tuple(lengths), device
    known = remembered(key, tensors) if concrete else None
    if known is not None:
        return known
    points = Points.parse(text)
    operands = dict(zip(points.slots, tensors, strict=True))
    sizes = dict(zip(points.axes, lengths, strict=True))
    if not points.exact:
        operands = {s: t.float() if t.is_floating_point() else t for s, t in operands.items()}
    count: Any = evaluate(_parse(points.count), Env((1, 1), sizes=sizes))
    expr = _parse(points.expr)
    if concrete:
        expr, places = _placed(*key[:2], count, device)
        expr, rows = with_places(key, expr, operands, places, count)
        operands |= {**places, **rows}
        table = remember(key, tensors, points.slots, expr, operands, points.lead, sizes, count
                         ) if points.exact else None
        if table is not None:
            return table
    elif _traced(lengths):
        with _disable_current_modes():
            expr, places = _placed(text, tuple(lengths), count, torch.device("cpu"))
            texts = {slot: literal_text(numbers) for slot, numbers in places.items()
                     if numbers.dtype != torch.bool}
        if len(texts) == len(places):
            operands |= {slot: torch.ops.attnopt.literal.default(list(tensors), [], numbers)
                         for slot, numbers in texts.items()}
        else:
            expr = _parse(points.expr)
    names = leading_axes(_rank(points.lead))
    full = [sizes[a] if a in points.lead else 1 for a in names]
    env = Env((*full, 1, count), operands, sizes=sizes, device=device)
    found = torch.as_tensor(evaluate(expr, env), device=device)
    shape = [sizes[a] for a in points.lead]
    return found.expand(*full, 1, count).reshape(*shape, count).contiguous()


_parse = functools.lru_cache(maxsize=1024)(E.parse)


def _concrete(tensors: Sequence[Tensor], lengths: Sequence[int]) -> bool:
    """Is this a call with numbers, and nothing that records or transforms it?"""
    return all(type(n) is int for n in lengths) \
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors) \
        and not torch._C._len_torch_dispatch_stack() \
        and torch._C._functorch.peek_interpreter_stack() is None


def _traced(lengths: Sequence[int]) -> bool:
    """Is this a trace by a compiler, for lengths that are numbers? It is given the places as a
    literal: some 50 nodes of whole-number arithmetic for each table would be compiled, and run at
    each call, for nothing."""
    return all(type(n) is int for n in lengths) \
        and torch._C._len_torch_dispatch_stack() > 0 \
        and torch._C._functorch.peek_interpreter_stack() is None


@functools.lru_cache(maxsize=256)
def _placed(text: str, lengths: tuple[int, ...], count: int, device: torch.device,
            ) -> tuple[E.Expr, dict[str, Tensor]]:
    """The expression with whole numbers that the points alone decide as loads, and these: what a
    look-up by position is at takes more time than the look-up, and is the same in each call."""
    points = Points.parse(text)
    loads: dict[E.Expr, E.Expr] = {}

    def place(node: E.Expr) -> E.Expr | None:
        if node.dtype == E.FLOAT or node.indices != {"k"} or node.op == "index" \
                or node.has("load"):
            return None
        return loads.setdefault(node, E.load(f"_place{len(loads)}", dtype=node.dtype))

    expr = _parse(points.expr).replace(place)
    env = Env((1, count), sizes=dict(zip(points.axes, lengths, strict=True)), device=device)
    with torch.inference_mode(False):
        return expr, {str(new.value): torch.as_tensor(evaluate(old, env), device=device)
                      for old, new in loads.items() if new.value in expr.slots}


def _rank(lead: Sequence[str]) -> int:
    """The number of leading axes that hold all of these."""
    places = {"h": 1, "b": 2}
    return max((places.get(a) or 2 + int(a[1:]) for a in lead), default=0)


@functools.lru_cache(maxsize=1024)
def same_text(text: str) -> str:
    """The text with its slots named by their positions: equal where the tables are, if the tensors
    are."""
    points = Points.parse(text)
    names = {slot: f"t{i}" for i, slot in enumerate(points.slots)}
    expr = re.sub(r"\((load\w*) (\w+)", lambda m: f"({m[1]} {names[m[2]]}", points.expr)
    return str(replace(points, expr=expr, slots=tuple(names.values())))


def literal_text(numbers: Tensor) -> str:
    """The text of whole numbers of 32 bits."""
    flat = numbers.to("cpu", torch.int32).contiguous()
    packed = zlib.compress(flat.numpy().astype("<i4").tobytes(), 9)
    return json.dumps([list(flat.shape), base64.b64encode(packed).decode()])


def numbers_of(text: str) -> Tensor:
    """The numbers that `literal_text` wrote, on the CPU; not to be written to."""
    return _numbers(text)


def literal(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """The numbers that `literal_text` wrote."""
    return _numbers(text).to(tensors[0].device, copy=True)


def _fake_literal(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    return tensors[0].new_empty(json.loads(text)[0], dtype=torch.int32)


@functools.lru_cache(maxsize=256)
def _numbers(text: str) -> Tensor:
    shape, packed = json.loads(text)
    numbers = array("i", zlib.decompress(base64.b64decode(packed)))
    if sys.byteorder == "big":
        numbers.byteswap()
    with _disable_current_modes(), torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int32, device="cpu").view(shape)


_library.impl("literal", literal, "CompositeExplicitAutograd")
torch.library.register_fake("attnopt::literal", _fake_literal, lib=_library)
_library.impl("tabulate", tabulate, "CompositeImplicitAutograd")


def tabulated(tensors: Sequence[Tensor], lengths: Sequence[int], text: str) -> Tensor:
    """What eager graphs call in place of `tabulate`."""
    if any(isinstance(x, fx.Proxy) for x in (*tensors, *lengths)):
        proxy: Any = next(x for x in (*tensors, *lengths) if isinstance(x, fx.Proxy))
        traced: Tensor = proxy.tracer.create_proxy(  # torch.fx rebuilds a pickled graph
            "call_function", tabulated, (tensors, lengths, text), {})
        return traced
    if torch.compiler.is_compiling():
        out: Tensor = torch.ops.attnopt.tabulate.default(tensors, lengths, text)
        return out
    return tabulate(tensors, lengths, text)
