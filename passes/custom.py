"""Answers of users' rules: what they raise, what they return, and functions traced into the graph.

A rule's `match` and `rewrite` are the user's code: whatever they raise is a Decline that names the
line (an error with `strict`). What they return becomes a Match, or a Spec that other rules then say
how to compute. A function, or the graph of a Rewrite, is traced to ATen operations and custom ops
on fake tensors of the site's own shapes, symbolic lengths included, and copied into the author's
graph; a length that it asks about would fix that length for good, and is declined.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from attnopt.errors import RuleError
from attnopt.ir.rewrite import Rewrite
from attnopt.ir.site import _HOMES
from attnopt.ir.spec import Schedule, Spec
from attnopt.passes.recognize.layout import Arranger
from attnopt.rules import Decline, Match, Region, Rule

#: the lowering of a user's own function
CUSTOM = "custom"
_PACKAGE = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))


def fault(error: BaseException) -> str:
    """"raised ValueError: the message (file.py:12)", by the innermost line that is the user's."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = (*_HOMES, os.path.join(_PACKAGE, "attnopt"), os.path.join(_PACKAGE, "kernels"))
    own = [f for f in frames if not f.filename.startswith("<")
           and not os.path.realpath(f.filename).startswith(ours)] or list(frames)
    where = f" ({os.path.basename(own[-1].filename)}:{own[-1].lineno})" if own else ""
    text = " ".join(str(error).split())[:200]
    return f"raised {type(error).__name__}{': ' if text else ''}{text}{where}"


def ask(rule: Rule, region: Region, strict: bool) -> Match | Spec:
    """The answer of a rule; raises Decline, with `strict` RuleError where the rule itself fails."""
    try:
        answer: Any = rule.match(region)
        if isinstance(answer, Match) and hasattr(rule, "rewrite"):
            answer = rule.rewrite(answer)
        return _read(answer, region, getattr(rule, "assumes", ""))
    except Decline:
        raise
    except Exception as error:
        if strict:
            raise RuleError(f"the rule {rule.name!r} {fault(error)}") from error
        raise Decline(fault(error)) from error


@dataclass(frozen=True)
class Function:
    """A user's function, and what it takes for granted about operands that it does not read."""

    compute: Callable[..., Any]
    assumes: str

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.compute(*args, **kwargs)


def _read(answer: Any, region: Region, assumes: str) -> Match | Spec:
    if answer is None:
        raise Decline("no match")
    if isinstance(answer, Decline):
        raise answer
    if isinstance(answer, Spec):
        _known(answer, region, assumes)
        return answer
    if isinstance(answer, Rewrite):
        _inputs(answer, region)
        return Match(region.spec, Schedule(CUSTOM), _speedup(answer),
                     compute=Function(_graph(answer), assumes))
    if isinstance(answer, Match):
        if answer.compute is None:
            _known(answer.spec, region, assumes)
            return answer
        return replace(answer, spec=region.spec, schedule=Schedule(CUSTOM),
                       compute=Function(answer.compute, assumes))
    if callable(answer) and not isinstance(answer, type):
        return Match(region.spec, Schedule(CUSTOM), compute=Function(answer, assumes))
    raise TypeError("a rule must answer with a Match, a Spec, a Rewrite, a function or a Decline, "
                    f"got {answer!r}")


def _known(spec: Spec, region: Region, assumes: str) -> None:
    """A Spec has the operands of the region; fewer only where the rule says what it assumes."""
    forms = [f for f in (region.spec, region.inlined) if f is not None]
    if spec in forms:
        return
    declared = {o.slot: o for o in region.spec.operands}
    for operand in spec.operands:
        if declared.get(operand.slot) != operand:
            raise ValueError(f"an operand must be one of the region's, {', '.join(declared)}, "
                             f"got {operand.slot}")
    _all_read([o for o in declared if o not in spec.slots], assumes)


def _all_read(unread: Sequence[str], assumes: str) -> None:
    """What an input holds in the example says nothing of other calls."""
    if unread and not assumes:
        raise Decline(f"it does not read {', '.join(unread)}, whose values one example does not "
                      "prove; a rule that knows them says so in `assumes`")


def _inputs(rewrite: Rewrite, region: Region) -> None:
    known = ("query", "key", "value", *(o.slot for o in region.spec.operands))
    for name in rewrite.inputs:
        if name not in known:
            raise ValueError(f"an input must be one of {', '.join(known)}, got {name!r}")


def _speedup(rewrite: Rewrite) -> float | None:
    return None if rewrite.predicted is None else rewrite.predicted[0] / rewrite.predicted[1]


def _graph(rewrite: Rewrite) -> Callable[..., Any]:
    def compute(query: Any, key: Any, value: Any, **operands: Any) -> Any:
        given = {"query": query, "key": key, "value": value, **operands}
        out = rewrite.evaluate({name: given[name] for name in rewrite.inputs})
        return out[0] if isinstance(out, (tuple, list)) else out
    return compute


def restated(region: Region, spec: Spec, name: str) -> Region:
    """The region of a Spec that a rule has put in the place of its own."""
    tables = {s: t for s, t in region.tables.items() if s in spec.slots}
    return replace(region, spec=spec, inlined=None, saved=(), rank=0, tables=tables,
                   gained=(*region.gained, f"said anew by {name}"))


# -- tracing ---------------------------------------------------------------------------------------
def inline_function(arranger: Arranger, compute: Callable[..., Any], tensors: Sequence[fx.Node],
                    slots: Mapping[str, fx.Node], shape: Sequence[Any]) -> fx.Node:
    """Trace `compute` on the values of nodes, and copy its operations to where the arranger is."""
    def call(*given: Any) -> Any:
        return compute(*given[:3], **dict(zip(slots, given[3:], strict=True)))

    given, result = trace_into(arranger, call, [*tensors, *slots.values()])
    _all_read([slot for slot, n in zip(slots, given[3:], strict=True) if not n.users],
              compute.assumes if isinstance(compute, Function) else "")
    wanted = arranger._fake(shape, tensors[0].meta["val"].dtype)
    found = result.meta.get("val") if isinstance(result, fx.Node) else None
    if not isinstance(found, torch.Tensor) or str(found.shape) != str(wanted.shape):
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(result).__name__
        raise Decline(f"its function must give a tensor of shape {tuple(wanted.shape)}, got {got}")
    final: fx.Node = result
    return final


def trace_into(arranger: Arranger, call: Callable[..., Any], nodes: Sequence[fx.Node]
               ) -> tuple[list[fx.Node], Any]:
    """Trace `call` on the values of nodes and copy its operations to where the arranger is: its
    parameters in the traced graph, and its result, a node or a tuple of them."""
    like = arranger.like.meta["val"]
    env = like.fake_mode.shape_env
    asked = len(env.guards) if env is not None else 0
    try:
        with like.fake_mode, torch.no_grad():
            traced = make_fx(call, pre_dispatch=True)(*(n.meta["val"] for n in nodes))
    except Decline:
        raise
    except Exception as error:
        raise Decline(fault(error)) from error
    if env is not None and len(env.guards) > asked:
        raise Decline(f"its function asks about a length that may change: {env.guards[-1].expr}")
    given = [n for n in traced.graph.nodes if n.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(given, nodes, strict=True))
    result: Any = None
    for node in traced.graph.nodes:
        if node.op == "output":
            result = fx.node.map_arg(node.args[0], values.__getitem__)
        elif node.op == "call_function":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = arranger.call(node.target, *args)
            values[node].kwargs = kwargs
            values[node].meta["val"] = node.meta.get("val")
        elif node.op != "placeholder":
            raise Decline(f"its function makes a constant ({node.target}): build it from the "
                          "tensors that it is given, with new_tensor or new_full")
    return given, result
