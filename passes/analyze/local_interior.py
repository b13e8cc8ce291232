"""What lies inside a local attention whose scores are moved, and what its weights may be.

Longformer (arXiv 2004.05150) writes its mask into views of the moved scores and sets the weights of
padded queries to 0. Such writes go through tensors that no element of the result is read from (the
place that a copy is written to, what `full_like` takes its shape from), so that `between` looks at
what depends on the operands alone, instead of at what was read.
"""

from __future__ import annotations

import torch
from torch import fx

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.passes.normalize import is_tensor, op_name
from attnopt.passes.recognize.program import Program


def gated(e: Expr) -> bool:
    """The weights themselves, or 0 for the rows that a condition without indices names."""
    if e.op == "where" and e.args[1].op == "const" and e.args[1].value == 0:
        return not e.args[0].indices and not e.args[0].has("weight") and gated(e.args[2])
    return e is E.weight


def between(program: Program, end: fx.Node, ends: set[fx.Node]) -> set[fx.Node]:
    """The floating tensors that `end` is made of and that depend, beside what was decided, on
    `ends` alone. What is older than they are and what is drawn at random is not looked into."""
    order = program.order
    first = min(order[n] for n in ends)
    known: dict[fx.Node, bool] = dict.fromkeys(ends, True)
    stack = [end]
    while stack:
        node = stack[-1]
        if node not in known and (node.op != "call_function" or order[node] < first
                                  or not _floating(node) or _random(node)):
            known[node] = False
        parts = [n for n in node.all_input_nodes if n not in known and is_tensor(n)]
        if node not in known and parts:
            stack += parts
            continue
        stack.pop()
        if node not in known:
            known[node] = all(known[n] or not _floating(n) for n in node.all_input_nodes
                              if is_tensor(n))
    return {n for n, is_known in known.items() if is_known} - ends


def _floating(node: fx.Node) -> bool:
    return is_tensor(node) and node.meta["val"].is_floating_point()


def _random(node: fx.Node) -> bool:
    if op_name(node) == "dropout" and node.args[2] is False:
        return False
    return bool(node.meta.get("attnopt_opaque")) or torch.Tag.nondeterministic_seeded in getattr(
        node.target, "tags", ())
