"""Verification at other lengths: a region alone, with random inputs, where lengths are symbolic.

Lengths are drawn within the ranges of the capture, small and odd ones by preference. A tensor of
which the rewrite knows nothing is random; one that structure was proven of is what the program
makes of these lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from attnopt.ir.captured import Captured
from attnopt.passes import oracle
from attnopt.passes.normalize import View

if TYPE_CHECKING:
    from attnopt.passes.verify import Candidate

#: (values of the region's inputs, of other nodes, in float64?) -> what it should give
Against = Callable[[Mapping[fx.Node, Any], Mapping[fx.Node, Any], bool], torch.Tensor]
_LENGTHS = (3, 7, 5, 4, 9, 2, 6, 8)


def draw(captured: Captured, view: View, c: Candidate, real: Mapping[fx.Node, Any],
          against: Against | None = None) -> None:
    """Judge a candidate once more at other lengths. against: what it should give, by default what
    the author's program gives."""
    from attnopt.passes.verify import judge, rerun

    tensors = [n.meta["val"] for n in c.boundary]
    symbols = sorted({str(s) for t in tensors for d in t.shape if isinstance(d, torch.SymInt)
                      for s in d.node.expr.free_symbols})
    if not symbols:
        return
    generator = torch.Generator().manual_seed(0)
    for shift in (0, 3):
        sizes = _admissible(captured, symbols, shift)
        if sizes is None:
            continue
        number = oracle.symbol_value(sizes)
        env = _Numbers(number)
        try:
            known = {n: _drawn(captured, c, n, real[n], number, generator) for n in c.boundary}
            original = oracle.run(c.parts[0].site.end, dict(known), precise=False, number=number)
            original = against(known, env, False) if against is not None else original
        except (RuntimeError, IndexError):
            continue  # the author's program does not take these lengths
        exact = {n: oracle.double(v) for n, v in known.items()}
        reference = against(known, env, True) if against is not None else oracle.run(
            c.parts[0].site.end, exact, precise=True, number=number)
        ok, err, err_original, bound = judge(rerun(c, view, known, env), original, reference)
        if not ok:
            c.reason = (f"at the lengths {sizes} the result is off by {err} from float64, "
                        f"the original by {err_original:.3g}, allowed are {bound:.3g}")
            return


class _Numbers(dict[Any, Any]):
    """Environment of a drawn run: only symbolic numbers are asked for."""

    def __init__(self, number: Any) -> None:
        super().__init__()
        self.number = number

    def __missing__(self, node: fx.Node) -> Any:
        return self.number(node.meta["val"])


def _admissible(captured: Captured, symbols: Iterable[str], shift: int) -> dict[str, int] | None:
    """Lengths within the captured ranges that meet its conditions, small and odd by preference."""
    names = list(symbols)
    for attempt in range(len(_LENGTHS)):
        sizes = {}
        for i, name in enumerate(names):
            wanted = _LENGTHS[(i + shift + attempt) % len(_LENGTHS)]
            allowed = captured.symbols.get(name)
            if allowed is not None:
                wanted = max(wanted, allowed.low)
                wanted = min(wanted, allowed.high) if allowed.high is not None else wanted
            sizes[name] = wanted
        try:
            if all(eval(text, {"__builtins__": {}}, dict(sizes))  # noqa: S307 - our own text
                   for text in captured.conditions):
                return sizes
        except NameError:
            return sizes
    return None


def _drawn(captured: Captured, c: Candidate, node: fx.Node, real: torch.Tensor, number: Any,
           generator: torch.Generator) -> torch.Tensor:
    """A value for an input of the region: random, unless the rewrite knows what it must be."""
    cone = _cone(node)
    inputs = [n for n in cone if n.op == "placeholder"]
    own = {n: captured.values[n.name] for n in inputs
           if captured.origins[n.name].kind != "input"}
    if not node.meta["val"].shape or all(isinstance(s, int) for s in node.meta["val"].shape):
        if len(own) == len(inputs):
            return real
    carried = {t.node for p in c.parts for t in p.tensors}
    if node in carried:
        return _random(node.meta["val"], number, generator)
    # Structure was proven of this one: it must be what the program makes of these lengths.
    if len(cone) > _MOST_CONE:
        raise RuntimeError("a mask with a long history")
    known = {n: own[n] if n in own else _random(n.meta["val"], number, generator)
             for n in inputs if isinstance(n.meta.get("val"), torch.Tensor)}
    return oracle.run(node, known, precise=False, number=number)


_MOST_CONE = 300


def _cone(node: fx.Node) -> list[fx.Node]:
    """Everything that a tensor is computed from; sizes are known and end it."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found and not isinstance(node.meta.get("val"), torch.SymInt):
            found[node] = None
            stack.extend(node.all_input_nodes)
    return list(found)


def _random(like: torch.Tensor, number: Any, generator: torch.Generator) -> torch.Tensor:
    shape = [number(s) if isinstance(s, torch.SymInt) else s for s in like.shape]
    if like.dtype == torch.bool:
        return torch.rand(shape, generator=generator).to(like.device) > 0.3
    if not like.is_floating_point():
        return torch.ones(shape, dtype=like.dtype, device=like.device)
    return torch.randn(shape, generator=generator).to(like.device, like.dtype)
