"""The belt of the lift: where a node depends on no input, compare its lift with its own values.

A lift is right by the rules it is made of; this check is on one set of lengths (those of the
capture) and finds a rule that is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.passes.analyze.by_value import Values, number
from attnopt.passes.analyze.lift import Index, Lifted

#: Grids larger than this are not compared.
LARGEST = 2**22
#: of a few float32 operations, relative to the largest value
_ROUNDING = 1e-5


def agrees(lifted: Lifted, node: fx.Node, idx: Index, values: Values,
           lengths: Mapping[str, int | torch.SymInt], exact: bool = True) -> bool | None:
    """Whether the lift equals the node's values; None where it has none that can be had.

    Without `exact` float32 values may differ by their rounding.
    """
    if values.sources(node) is None:
        return None
    symbols = captured_sizes(lengths, [node.meta["val"]])
    axes = frozenset().union(*(i.indices for i in idx))
    leading = [a for a in axes - {"q", "k"} if a not in ("h", "b")]
    count = 2 + max((int(a[1:]) for a in leading), default=0) if axes - {"q", "k"} else 0
    names = ["h", "b", *(f"b{i}" for i in range(1, count))][:count]
    try:
        sizes = {a: number(n, symbols) for a, n in lengths.items()}
    except LookupError:
        return None
    shape = tuple(sizes[a] if a in axes else 1 for a in (*reversed(names), "q", "k"))
    if torch.Size(shape).numel() > LARGEST:
        return None
    try:
        operands: dict[str, Any] = {"value": values.evaluate(node, symbols or None),
                                    **values.patterns.blocks.operands}
        for slot, n in lifted.loads.items():
            if not isinstance(n.meta["val"], torch.Tensor):
                return None
            operands[slot] = values.evaluate(n, symbols or None)
    except LookupError:
        return None
    operands = {s: t.cpu() for s, t in operands.items()}
    kind = lifted.expr.dtype
    env = Env(shape, operands, sizes=sizes, dtype=torch.float64)
    wanted, got = (torch.as_tensor(evaluate(e, env), dtype=torch.float64).expand(shape)
                   for e in (E.load("value", *idx, dtype=kind), lifted.expr))
    same = (wanted == got) | wanted.isnan() & got.isnan()
    if not exact:
        largest = got.masked_fill(~got.isfinite(), 0.0).abs().max()
        same |= (wanted - got).abs() <= _ROUNDING * largest
    return bool(same.all())


def captured_sizes(lengths: Mapping[str, Any], tensors: list[torch.Tensor]
                   ) -> dict[sympy.Symbol, int]:
    """The numbers that the symbols stood for when the graph was captured. Those of sizes that
    follow from values (nonzero, …) are not known."""
    found: dict[sympy.Symbol, int] = {}
    for n in (*lengths.values(), *(s for t in tensors for s in t.shape)):
        if isinstance(n, torch.SymInt) and n.node.shape_env is not None:
            env = n.node.shape_env  # the attribute's name until torch 2.12, and since
            known = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
            found |= {symbol: int(value) for symbol, value in known.items()}
    return found

