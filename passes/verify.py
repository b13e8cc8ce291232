"""Verification: every rewrite against the original, judged by float64.

One pass over the author's graph, with the substitutes already in it. When the end of a region has
run, its inputs are alive, the original and the rewritten result are there; the region is run once
more in float64, and the rewrite is accepted if

    err_new <= max(2 * err_original, 8 * eps(dtype) * max|out|)

elementwise against the float64 result, with NaN exactly where the original has NaN. The same holds
for the gradients of the inputs. Sites with one program and one set of shapes get one full check;
the others are compared with the original directly. Along dimensions that the capture left symbolic
other lengths are drawn for the region alone.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from attnopt.errors import RuleError
from attnopt.ir.captured import Captured
from attnopt.passes import approximate, oracle
from attnopt.passes.acceptance import distance, judge, size
from attnopt.passes.canonical import Canonical
from attnopt.passes.custom import fault
from attnopt.passes.kinks import at_kinks
from attnopt.passes.normalize import View, is_tensor, op_name
from attnopt.passes.recognize.layout import LAYOUT_OPS
from attnopt.passes.substitute import Substitution
from attnopt.passes.verify_lengths import Against, draw

log = logging.getLogger("attnopt.verify")
MOST_BYTES = 512 << 20  # of one float64 score tensor; larger regions are checked on a slice
#: times that the inputs of a gradient are rounded anew, to see what that does to it
_SHAKES = 4


@dataclass
class Candidate:
    """A substituted region: its sites, the emitted nodes, and what verification found.

    trial: the author's nodes stay; the emitted ones only show that the normal form is right.
    custom: there is a user's function among them, which may raise.
    """

    parts: Sequence[Canonical]
    done: Substitution
    trial: bool = False
    custom: bool = False
    deviation: float | None = None
    error: float | None = None
    error_original: float | None = None
    bound: float | None = None
    reason: str = ""
    boundary: list[fx.Node] = field(default_factory=list)

    @property
    def accepted(self) -> bool:
        return not self.reason


def boundary(view: View, parts: Sequence[Canonical]) -> list[fx.Node]:
    """The tensors of the functional view that the region is a function of."""
    ends = {t.node for c in parts for t in c.tensors}
    inside = {n for c in parts for n in c.site.interior} | {parts[0].site.end}
    for node in list(ends):  # of a tensor and a view of it, the tensor
        path = _views(node, ends)
        inside.update(path)
        ends -= set(path)
    for c in parts:
        site = c.site
        inside |= c.computed
        for start in site.starts:
            path = []
            at: Any = start
            while isinstance(at, fx.Node) and at not in ends and at.args:
                path.append(at)
                at = at.args[0]
            if at in ends:
                inside.update(path)
    found: dict[fx.Node, None] = {}
    stack = [parts[0].site.end]
    seen = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node in ends or (node not in inside and is_tensor(node)):
            found[node] = None
        else:
            stack.extend(node.all_input_nodes)
    return list(found | dict.fromkeys(n for c in parts for n in getattr(c, "others", ())))


def _views(node: fx.Node, ends: Collection[fx.Node]) -> list[fx.Node]:
    """`node` and the views that lead from it to another one of `ends`; [] where none do."""
    path = []
    at: Any = node
    while isinstance(at, fx.Node) and at.op == "call_function" and op_name(at) in LAYOUT_OPS:
        path.append(at)
        at = at.args[0]
        if at in ends:
            return path
    return []


def verify(captured: Captured, view: View, candidates: Sequence[Candidate],
           tolerance: float | None = None) -> None:
    """Run the author's graph once, judge every candidate at its end, and set its verdict.

    tolerance: what an approximation may change of a result, root mean square
    """
    for c in candidates:
        c.boundary = boundary(view, c.parts)
    judged: dict[Any, Candidate] = {}
    def visit(c: Candidate, env: Mapping[fx.Node, Any]) -> None:
        try:
            _judge(captured, view, c, env, judged, tolerance)
        except RuleError:  # only with strict=True
            raise
        except Exception as error:  # what cannot be checked stays as it is
            c.reason = f"{type(error).__name__} while it was checked: {str(error)[:80]}"
            log.warning("%s is not checked", c.done.end.name, exc_info=True)

    walk(captured, view, candidates, visit)


def walk(captured: Captured, view: View, candidates: Sequence[Candidate],
         visit: Callable[[Candidate, Mapping[fx.Node, Any]], None]) -> None:
    """Run the author's graph once, with the substitutes in it, and visit every candidate whose
    `boundary` is known at its end; the values of its boundary and of its result are there then."""
    at_end = {c.done.end: c for c in candidates}
    custom = {node: c for c in candidates if c.custom for node in c.done.emitted}
    graph = captured.graph
    last = _last_uses(graph, view, candidates)
    values = iter(captured.arguments(clone=True))
    env: dict[fx.Node, Any] = {}
    grad = torch.is_grad_enabled()
    with torch.random.fork_rng(devices=_cuda_devices(captured)), torch.no_grad():
        try:
            for node in graph.nodes:
                if node.op == "placeholder":
                    env[node] = next(values)
                elif node.op == "output":
                    break
                else:
                    args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
                    if node.op == "get_attr":
                        env[node] = getattr(captured.graph_module, node.target)  # type: ignore
                    elif node in custom:
                        env[node] = _try(custom[node], node, args, kwargs)
                    else:
                        env[node] = node.target(*args, **kwargs)  # type: ignore[operator]
                    if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
                        torch._C._set_grad_enabled(False)
                if node in at_end and at_end[node].accepted:
                    visit(at_end[node], env)
                for dead in last.get(node, ()):
                    if not isinstance(env.get(dead), int):
                        env.pop(dead, None)
        finally:
            torch._C._set_grad_enabled(grad)


def _try(c: Candidate, node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The value of a node of a user's function, None once one of them has raised."""
    if not c.accepted:
        return None
    try:
        return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as error:
        c.reason = f"{op_name(node)} {fault(error)}"
        return None


def _cuda_devices(captured: Captured) -> list[int]:
    found = {v.device.index for v in captured.values.values()
             if isinstance(v, torch.Tensor) and v.device.type == "cuda"}
    return sorted(i or 0 for i in found)


def _last_uses(graph: fx.Graph, view: View,
               candidates: Sequence[Candidate]) -> dict[fx.Node, list[fx.Node]]:
    needed: dict[fx.Node, list[fx.Node]] = {}
    for c in candidates:
        needed.setdefault(c.done.end, []).extend(
            [*(view.author[n] for n in c.boundary), *c.done.inputs, c.done.result])
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for used in itertools.chain(node.all_input_nodes, needed.get(node, ()), (node,)):
            last[used] = node
    by_user: dict[fx.Node, list[fx.Node]] = {}
    for used, user in last.items():
        by_user.setdefault(user, []).append(used)
    return by_user


def _judge(captured: Captured, view: View, c: Candidate, env: Mapping[fx.Node, Any],
           judged: dict[Any, Candidate], tolerance: float | None) -> None:
    original, new = env[c.done.end], env[c.done.result]
    if new is None:
        c.reason = "its function raises"
        return
    if new.shape != original.shape or new.dtype != original.dtype:
        c.reason = (f"the rewrite must give {original.dtype} of shape {tuple(original.shape)}, "
                    f"got {new.dtype} of shape {tuple(new.shape)}")
        return
    same = signature(c)
    twin = judged.get(same)
    if twin is not None and twin.accepted and twin.bound is not None:
        slack = 3 * twin.bound / max(size(original), 1e-300) * size(original)
        error = distance(new, original)
        if error is not None and error <= slack:
            c.error, c.error_original, c.bound = error, twin.error_original, slack
            return
    unreadable = [n for n in c.boundary if not view.readable_at(n, c.done.end)]
    if unreadable:
        c.reason = f"{unreadable[0].name} is overwritten in place before the site ends"
        return
    known = {n: env[view.author[n]] for n in c.boundary}
    if any(p.exact is not None for p in c.parts):
        approximate.judge(captured, view, c, known, env, original, new, tolerance)
        return
    _compare(c, known, original, new, lambda: oracle.symbol_value({}))
    try:
        if c.accepted and not c.trial:
            compare_gradients(captured, c, view, known, env)
        if c.accepted:
            draw(captured, view, c, known)
    except Exception as error:
        if not c.custom:
            raise
        c.reason = f"its function or its gradient {fault(error)}"
    judged[same] = c


def signature(c: Candidate) -> Any:
    """Equal for candidates with one program and one set of shapes."""
    texts = tuple((str(p.spec), p.shapes()) for p in c.parts)
    calls = tuple((str(n.target), tuple(a for a in n.args if not isinstance(a, fx.Node)).__repr__())
                  for n in c.done.emitted)
    dtypes = tuple((n.meta["val"].dtype, str(n.meta["val"].shape)) for n in c.boundary)
    return texts, calls, dtypes


def _compare(c: Candidate, known: Mapping[fx.Node, Any], original: torch.Tensor,
             new: torch.Tensor, number: Any) -> None:
    end = c.parts[0].site.end
    exact = {n: oracle.double(v) for n, v in known.items()}
    reference = oracle.run(end, exact, precise=True)
    ok, err_new, err_original, bound = judge(new, original, reference)
    if not ok and err_new is not None:
        # The author's own result may be near by luck: the most is then what roundings of the
        # inputs do to it, as long as that is little beside the largest number.
        moved = (distance(oracle.run(end, {n: _shaken(v) for n, v in known.items()},
                                   precise=False), original)
                 for _ in range(_SHAKES))
        most = 32 * torch.finfo(new.dtype).eps * size(reference)
        bound = max(bound, min(most, 4 * max(m or 0.0 for m in moved)))
        ok = err_new <= bound
    if c.error is None or (err_new or 0.0) > c.error:
        c.error, c.error_original, c.bound = err_new, err_original, bound
    if not ok:
        c.reason = (f"the result is off by {err_new:.3g} from float64, the original by "
                    f"{err_original:.3g}, allowed are {bound:.3g}" if err_new is not None else
                    "the result has NaN or inf where the original has none, or the reverse")


# -- gradients ---------------------------------------------------------------------------------
def _reaches_gradient(captured: Captured, node: fx.Node) -> bool:
    """Does the node depend on a tensor whose gradient may be asked for?"""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        value = captured.values.get(node.name) if node.op == "placeholder" else None
        if isinstance(value, torch.Tensor) and value.is_floating_point() and (
                value.requires_grad or captured.origins[node.name].kind == "input"):
            return True
        stack.extend(node.all_input_nodes)
    return False


def _leaf(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_(True)
    return value


def compare_gradients(captured: Captured, c: Candidate, view: View,
                       known: Mapping[fx.Node, Any], env: Mapping[fx.Node, Any],
                       against: Against | None = None) -> None:
    inputs = [n for n in c.boundary if known[n].is_floating_point()
              and _reaches_gradient(captured, view.author[n])]
    end = c.parts[0].site.end
    if not inputs:
        return
    cotangents: list[torch.Tensor] = []

    def gradients(leaves: dict[fx.Node, Any], out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not cotangents:
            torch.manual_seed(0)
            cotangents.append(torch.randn(out.shape, dtype=torch.float64, device=out.device))
        return torch.autograd.grad(out, [leaves[n] for n in inputs], cotangents[0].to(out.dtype),
                                   allow_unused=True)

    def authored(precise: bool, shaken: bool = False) -> tuple[torch.Tensor | None, ...]:
        leaves = {n: _leaf(oracle.double(v) if precise else _shaken(v) if shaken else v)
                  for n, v in known.items()}
        out = oracle.run(end, dict(leaves), precise=precise) if against is None else against(
            leaves, env, precise)
        return gradients(leaves, out)

    with torch.enable_grad():
        grads = [authored(precise=False), authored(precise=True)]
        mine = {n: _leaf(v) for n, v in known.items()}
        grads.append(gradients(mine, rerun(c, view, mine, env)))
    kinks = at_kinks(c, view, known, env)
    for node, at in kinks.items():
        for found in grads:
            if node in inputs and (grad := found[inputs.index(node)]) is not None:
                grad.masked_fill_(at, 0.0)
    for i, (node, original, reference, new) in enumerate(zip(inputs, *grads, strict=True)):
        if original is None or reference is None:
            continue
        if new is None:
            if original.abs().max() == 0:
                continue
            c.reason = f"the gradient of {node.name} is lost"
            return
        ok, err, err_original, bound = judge(new, original, reference)
        if not ok and err is not None and err <= 64 * torch.finfo(new.dtype).eps * size(reference):
            continue  # sums of many products: a few ulps of the largest entry
        if not ok and err is not None:
            # Where large terms cancel, the original may be exact by luck: it is then held against
            # what roundings of its inputs do to it, and exp(s - lse), by which kernels make the
            # weights again, rounds more than exp(s - max) does.
            for _ in range(_SHAKES):
                with torch.enable_grad():
                    moved = authored(precise=False, shaken=True)[i]
                if moved is not None and node in kinks:
                    moved = moved.masked_fill(kinks[node], 0.0)
                if moved is not None:
                    bound = max(bound, 8 * (distance(moved, original) or 0.0))
                if err <= bound:
                    break
            ok = err <= bound
        if not ok:
            c.reason = (f"the gradient of {node.name} is off by {err} from float64, the original "
                        f"by {err_original:.3g}, allowed are {bound:.3g}")
            return


def _shaken(value: Any) -> Any:
    """The value with each number off by up to a rounding."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    part = torch.rand(value.shape, dtype=torch.float32, device=value.device)
    eps = torch.finfo(value.dtype).eps
    return value + value * (2 * eps * (part - 0.5)).to(value.dtype)


def rerun(c: Candidate, view: View, known: Mapping[fx.Node, Any],
          env: Mapping[fx.Node, Any]) -> torch.Tensor:
    """The emitted nodes on other values of the region's inputs."""
    values = given(c, view, known, env)
    for node in c.done.emitted:
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: values[n] if n in values else env[n])
        values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[c.done.result]


def given(c: Candidate, view: View, known: Mapping[fx.Node, Any],
          env: Mapping[fx.Node, Any]) -> dict[fx.Node, Any]:
    """The region's inputs by the author's nodes, with the views of them that the rewrite reads."""
    values = {view.author[n]: v for n, v in known.items()}
    for source in {t.node for p in c.parts for t in p.tensors} - known.keys():
        if _views(source, known):
            values[view.author[source]] = oracle.run(
                source, dict(known), precise=False, number=getattr(env, "number", None))
    return values
