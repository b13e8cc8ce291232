"""Mask: which keys a query row keeps, as a small algebra that is never written out as N x N.

Every node is a frozen dataclass and means one predicate over the indices q and k, the leading axes
(h, b, b1 …), the sizes and operands: `mask.predicate()` is that bool `Expr`. Masks combine with
`&`, `|` and `~`. `str(mask)` is canonical and `parse_mask` reads it back. The nodes are in
`attnopt.ir.mask_nodes` and `attnopt.ir.mask_grid`, the algebra is in `attnopt.ir.mask_base`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from attnopt.ir import expr as E
from attnopt.ir.mask_base import ALL, NONE, All, And, Mask, Not, Or
from attnopt.ir.mask_grid import Neighborhood, Windows
from attnopt.ir.mask_nodes import (
    Band,
    BlockMap,
    Causal,
    Globals,
    KeyKeep,
    KeyLifetime,
    Placed,
    Prefix,
    Regions,
    Reindex,
    Segments,
    Select,
    Where,
)

__all__ = [
    "ALL",
    "All",
    "And",
    "Band",
    "BlockMap",
    "Causal",
    "Globals",
    "KeyKeep",
    "KeyLifetime",
    "Mask",
    "NONE",
    "Neighborhood",
    "Not",
    "Or",
    "Placed",
    "Prefix",
    "Regions",
    "Reindex",
    "Segments",
    "Select",
    "Where",
    "Windows",
    "parse_mask",
]

NODES: dict[str, type[Mask]] = {n.name: n for n in (
    All, And, Or, Not, Causal, Band, Neighborhood, Windows, Segments, Prefix, Globals, KeyKeep,
    KeyLifetime, BlockMap, Where, Select, Placed, Reindex, Regions)}
_TOKEN = re.compile(r"[()\[\]]|[^\s()\[\]]+")


def parse_mask(text: str) -> Mask:
    """Read the text form back: `parse_mask(str(m)) == m`."""
    tree, end = _read(_TOKEN.findall(text), 0)
    if end != len(_TOKEN.findall(text)):
        raise ValueError(f"text must be one mask, got {text!r}")
    return _mask(tree)


def _read(tokens: list[str], i: int) -> tuple[Any, int]:
    """Nested lists of atoms; "(" makes a list, "[" a tuple."""
    if i >= len(tokens):
        raise ValueError("text must be a complete mask, got an unexpected end")
    if tokens[i] not in "([":
        return tokens[i], i + 1
    close, items = (")", []) if tokens[i] == "(" else ("]", [])
    i += 1
    while i < len(tokens) and tokens[i] not in ")]":
        item, i = _read(tokens, i)
        items.append(item)
    if i >= len(tokens) or tokens[i] != close:
        raise ValueError(f"text must close every bracket, got {' '.join(tokens)!r}")
    return (items if close == ")" else tuple(items)), i + 1


def _expr_text(tree: Any) -> str:
    return tree if isinstance(tree, str) else f"({' '.join(map(_expr_text, tree))})"


def _mask(tree: Any) -> Mask:
    head, *fields = tree if isinstance(tree, list) and tree else [tree]
    node = NODES.get(head) if isinstance(head, str) else None
    if node is None:
        raise ValueError(f"mask must be one of {', '.join(NODES)}, got {head!r}")
    declared = dataclasses.fields(node)
    if len(fields) != len(declared):
        raise ValueError(f"{head} must have {len(declared)} fields, got {len(fields)}")
    if node is All:
        return ALL
    return node(*(_field(str(f.type), item) for f, item in zip(declared, fields, strict=True)))


_ATOMS: dict[str, Callable[[Any], Any]] = {
    "Expr": lambda tree: E.parse(_expr_text(tree)), "Mask": _mask, "str": str, "int": int,
    "float": float, "bool": lambda text: text == "true",
    "int | None": lambda text: None if text == "none" else int(text),
}


def _field(kind: str, tree: Any) -> Any:
    """A field of the annotated type `kind`."""
    if kind.startswith("tuple["):
        read = _ATOMS[kind[6:-1].split(",")[0]]
        return tuple(read(item) for item in tree)
    return _ATOMS[kind](tree)
