"""Opaque autograd.Functions: compiled extensions, captured as the operation that they compute.

A tracer cannot look into a compiled extension: its forward fails on fake tensors, and with it the
capture. While a model is traced, `taking` puts a plain function of the same arguments in its place,
made of torch's and attnopt's operations, which the graph then holds. The gradient is theirs.

Functions are known by what they mean, not by where they live, since projects keep copies of them:
by the class's name together with the names of its arguments. Known are multi-scale deformable
attention (Deformable-DETR's MSDeformAttnFunction, mmcv's MultiScaleDeformableAttnFunction and
BEVFormer's with a precision in their names) and 3-D deformable attention of DFA3D, in one stage or
in two (`two_stage`). One that runs on plain numbers is compared first; where the results differ the
model is not captured.
`register_function` tells of others.

Level sizes are tensors in these interfaces. Where they depend on no input, they are read from the
graph, and buffers among them are guarded by value (`settle`); otherwise the op reads them when it
runs.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import fake_tensor
from torch.autograd import Function
from torch.fx.experimental import proxy_tensor
from torch.utils import _pytree as pytree

import attnopt.kernels.deformable.two_stage  # noqa: F401 - registers its ops
from attnopt.errors import CaptureError
from attnopt.ir.captured import Captured
from attnopt.kernels.deformable import Sampling
from attnopt.kernels.deformable.levels import in_order
from attnopt.passes.capture.guards import ValueGuard
from attnopt.passes.capture.two_stage import drop_scores, join_stages
from attnopt.passes.capture.watch import ANSWERS
from attnopt.passes.normalize import op_name, writes

log = logging.getLogger("attnopt.passes")
Call = Callable[..., Any]
_OF_LEVELS = torch.ops.attnopt.deformable_attention_of_levels.default
_SCORE = torch.ops.attnopt.depth_score.default
_SCORED = torch.ops.attnopt.scored_attention.default

#: elements of a literal tensor whose numbers a trace may ask for
_LITERAL = 64

_registered: dict[type[Function], Call] = {}
_agree: dict[tuple[type[Function], str], bool] = {}


def register_function(function: type[Function]) -> Callable[[Call], Call]:
    """Have captures put a plain function in the place of `function.apply`.

        @register_function(FusedNorm)
        def fused_norm(x, weight):      # what FusedNorm.apply(x, weight) computes
            return torch.nn.functional.rms_norm(x, x.shape[-1:], weight)

    The plain function has the arguments and results of `apply`; its gradient is used.
    """
    if not (isinstance(function, type) and issubclass(function, Function)):
        raise TypeError(f"function must be a subclass of torch.autograd.Function, got {function!r}")

    def register(call: Call) -> Call:
        _registered[function] = call
        return call

    return register


# -- what is known ---------------------------------------------------------------------------------
@dataclass(frozen=True)
class Meaning:
    """A Function by its name and the names of its arguments, and what it computes.

    example: small arguments on a device, to compare it on
    """

    name: re.Pattern[str]
    arguments: tuple[str, ...]
    call: Call
    example: Callable[[torch.device], tuple[Any, ...]]


def _checked(value: Tensor, shapes: Tensor, locations: Tensor, rank: int) -> str:
    """The Sampling of value (B, S, H, C) and locations (B, Q, H, L, P, rank)."""
    if value.dim() != 4 or locations.dim() != 6 or locations.shape[-1] != rank \
            or shapes.dim() != 2 or shapes.shape[1] != rank:
        raise ValueError(f"value, locations and shapes must be of 4, 6 and 2 dimensions, the last "
                         f"two of {rank} coordinates, got {tuple(value.shape)}, "
                         f"{tuple(locations.shape)} and {tuple(shapes.shape)}")
    return str(Sampling((locations.shape[4],) * locations.shape[3]))


def _sampled(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor,
             depth: Tensor | None = None) -> Tensor:
    """(B, Q, H * C) of value (B, S, H, C), locations (B, Q, H, L, P, 2 or 3) in 0 to 1, weights
    (B, Q, H, L, P) and depth (B, S, H, D)."""
    sampling = _checked(value, shapes, locations, 2 + (depth is not None))
    out: Tensor = _OF_LEVELS(value, locations.flatten(3, 4),
                             weights.reshape(*locations.shape[:-1]).flatten(3, 4), depth,
                             shapes[:, :2], starts, sampling)
    return out.flatten(2).to(value.dtype)


def _multi_scale(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor,
                 im2col_step: Any) -> Tensor:
    return _sampled(value, shapes, starts, locations, weights)


def _lifting(value: Tensor, depth: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor,
             weights: Tensor, im2col_step: Any) -> tuple[Tensor, Tensor]:
    out = _sampled(value, shapes, starts, locations, weights, depth)
    return out, _depth_scores(depth, shapes, starts, locations, im2col_step)


def _depth_scores(depth: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor,
                  im2col_step: Any) -> Tensor:
    """(B, Q, H, L, P, 4)."""
    sampling = _checked(depth, shapes, locations, 3)
    found: Tensor = _SCORE(depth, locations.flatten(3, 4), shapes, starts, sampling)
    return found.reshape(*locations.shape[:-1], 4)


def _by_score(value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor,
              score: Tensor, im2col_step: Any) -> Tensor:
    sampling = _checked(value, shapes, locations, 2)
    out: Tensor = _SCORED(value, locations.flatten(3, 4), weights.flatten(3, 4),
                          score.flatten(3, 4), shapes, starts, sampling)
    return out.flatten(2).to(value.dtype)


def _example(device: torch.device, depths: int = 0) -> tuple[Any, ...]:
    """Numbers of both signs, places inside, outside and on the border."""
    generator = torch.Generator().manual_seed(0)
    grids = torch.tensor([(3, 4), (2, 2)], device=device)
    if depths:
        grids = torch.cat((grids, torch.full_like(grids[:, :1], depths)), 1)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device) * 2

    places = torch.rand(1, 9, 2, 2, 2, 2 + bool(depths), generator=generator) * 3 - 1
    places[:, :4] = places[:, :4].clamp(0, 1)
    value = [draw(1, 16, 2, 8)] + ([draw(1, 16, 2, depths)] if depths else [])
    return (*value, grids, torch.tensor([0, 12], device=device), places.to(device),
            draw(1, 9, 2, 2, 2), 1)


def _of_scores(device: torch.device) -> tuple[Any, ...]:
    _, depth, grids, starts, locations, _, step = _example(device, 5)
    return depth, grids, starts, locations, step


def _with_scores(device: torch.device) -> tuple[Any, ...]:
    *tensors, weights, step = _example(device)
    scores = torch.stack((weights, 1 - weights, weights / 2, weights + 1), -1)
    return *tensors, weights, scores, step


_LEVELS = ("value_spatial_shapes", "value_level_start_index", "sampling_locations")
_WEIGHTED = (*_LEVELS, "attention_weights")
_PRECISION = "(_fp32|_fp16)?"
KNOWN = (
    Meaning(re.compile(r"MS(Deform|DeformableAttn|DeformAttn)Function|"
                       rf"MultiScaleDeformableAttn(Function|Func){_PRECISION}"),
            ("value", *_WEIGHTED, "im2col_step"), _multi_scale, _example),
    Meaning(re.compile(rf"MultiScale3DDeformableAttnFunction{_PRECISION}"),
            ("value", "value_dpt_dist", *_WEIGHTED, "im2col_step"), _lifting,
            lambda device: _example(device, 5)),
    Meaning(re.compile(rf"MultiScaleDepthScoreSampleFunction{_PRECISION}"),
            ("value", *_LEVELS, "im2col_step"), _depth_scores, _of_scores),
    Meaning(re.compile(rf"WeightedMultiScaleDeformableAttnFunction{_PRECISION}"),
            ("value", *_WEIGHTED, "depth_score", "im2col_step"), _by_score, _with_scores),
)


def _meaning(function: type[Function]) -> Meaning | None:
    for known in KNOWN:
        if known.name.fullmatch(function.__name__):
            names = list(inspect.signature(function.forward).parameters)
            if tuple(names if _has_setup(function) else names[1:]) == known.arguments:
                return known
    return None


def _has_setup(function: type[Function]) -> bool:
    """Does forward take no context?"""
    return function.setup_context is not Function.setup_context


def _cast_of(function: type[Function]) -> torch.dtype | None:
    """The dtype that torch.amp.custom_fwd casts the arguments to where autocast is on."""
    forward: Any = function.forward
    if not hasattr(forward, "__wrapped__"):
        return None
    found = inspect.getclosurevars(forward).nonlocals.get("cast_inputs")
    return found if isinstance(found, torch.dtype) else None


# -- while a model is traced -----------------------------------------------------------------------
class _Answer:
    """What stands in the place of a Function's forward while a model is traced."""

    def __init__(self, function: type[Function], meaning: Meaning | None) -> None:
        self.function, self.meaning = function, meaning
        self.own, self.cast = function.forward, _cast_of(function)
        self.setup = _has_setup(function)
        self.thread = threading.get_ident()

    def forward(self, *args: Any) -> Any:
        if threading.get_ident() != self.thread:  # the author's model, run beside the trace
            return self.own(*args)
        args = args if self.setup else args[1:]
        if self.meaning is None:
            return _registered[self.function](*args)
        device = next((a.device for a in args if isinstance(a, Tensor)), torch.device("cpu"))
        if not self._agrees(self.meaning, device):
            raise CaptureError(f"{self.function.__name__} does not compute what its name says")
        if self.cast is not None and torch.is_autocast_enabled(device.type):
            args = tuple(a.to(self.cast) if isinstance(a, Tensor) and a.is_floating_point()
                         and a.dtype != torch.float64 else a for a in args)
        return self.meaning.call(*args)

    setattr(forward, ANSWERS, True)

    def _agrees(self, meaning: Meaning, device: torch.device) -> bool:
        """Whether a small example gives the same numbers, or cannot be run here."""
        key = self.function, str(device)
        if key not in _agree:
            with ThreadPoolExecutor(1) as pool:  # in a thread where nothing is traced
                _agree[key] = pool.submit(_compare, self.function, meaning, device).result()
        return _agree[key]


def _compare(function: type[Function], meaning: Meaning, device: torch.device) -> bool:
    """Whether results agree, and gradients where the function has any here."""
    args = meaning.example(device)
    found = []
    for call in (function.apply, meaning.call):
        given = [a.clone().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a
                 for a in args]
        try:
            results = pytree.tree_leaves(call(*given))
        except Exception as error:  # the extension is not there, or not for this device
            log.info("%s is known by its name and arguments; it does not run here: %s",
                     function.__name__, error)
            return True
        found.append((results, given))
    (one, inputs), (other, own) = found
    if len(one) != len(other) or not all(map(_close, one, other)):
        return False
    leaves = [i for i, a in enumerate(own) if isinstance(a, Tensor) and a.requires_grad]
    try:
        theirs = torch.autograd.grad(one[0].sum(), [inputs[i] for i in leaves], allow_unused=True)
    except Exception as error:
        log.info("the gradient of %s does not run here: %s", function.__name__, error)
        return True
    mine = torch.autograd.grad(other[0].sum(), [own[i] for i in leaves], allow_unused=True)
    return all(a is None or b is None or _close(a, b) for a, b in zip(theirs, mine, strict=True))


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.detach(), other.detach().to(one.dtype), rtol=1e-2, atol=1e-2)


def _subclasses(cls: type[Any]) -> Iterator[type[Any]]:
    for found in type.__subclasses__(cls):
        yield found
        yield from _subclasses(found)


@contextlib.contextmanager
def taking() -> Iterator[None]:
    """Known Functions are answered by their plain functions, and literal tensors of level sizes
    keep their numbers, which authors check and iterate over. Under the capture lock."""
    with contextlib.ExitStack() as stack:
        for home in (fake_tensor, proxy_tensor):
            stack.enter_context(_put(home, "CONSTANT_NUMEL_LIMIT", _LITERAL))
        for function in set(_subclasses(Function)):
            meaning = None if function in _registered else _meaning(function)
            if function in _registered or meaning is not None:
                answer = _Answer(function, meaning)
                stack.enter_context(_put(function, "forward", staticmethod(answer.forward)))
        yield


@contextlib.contextmanager
def _put(home: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of a class or module, for a while."""
    raw = home.__dict__.get(name)
    setattr(home, name, value)
    try:
        yield
    finally:
        if raw is None:
            delattr(home, name)
        else:
            setattr(home, name, raw)


# -- after it --------------------------------------------------------------------------------------
def settle(captured: Captured) -> tuple[ValueGuard, ...]:
    """Put numbers for level sizes that depend on no input; the guards of buffers among them."""
    graph, guarded = captured.graph, set[str]()
    nodes = [n for n in graph.nodes if n.target in (_OF_LEVELS, _SCORED)]
    written = _written(graph) if nodes else set()
    number = functools.partial(_number, captured, written=written, used=guarded)
    for node in nodes:
        if node.target is _SCORED:
            join_stages(node, written, number)
        if node.target is not _OF_LEVELS:
            continue
        value, locations, weights, depth, shapes, starts, sampling = node.args
        used: set[str] = set()
        grids, first = (_number(captured, x, written, used) for x in (shapes, starts))
        if grids is None or first is None or not in_order(grids.tolist(), first.tolist()):
            continue
        sizes = [int(n) for grid in grids.tolist() for n in grid]
        if value.meta["val"].shape[1] != int(grids.prod(1).sum()):
            continue
        node.target = torch.ops.attnopt.deformable_attention.default
        node.args = (value, locations, weights, depth, sizes, sampling)
        guarded |= used
    drop_scores(graph)
    if nodes:
        captured.graph_module.recompile()
    return tuple(ValueGuard.of(captured, name) for name in sorted(guarded))


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that a later one writes to, through views or not."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        changes = node.op == "call_function" and op_name(node) != "detach_"  # no element of it
        stack = [node.args[i] for i in writes(node)] if changes else []
        while stack:
            at = stack.pop()
            if isinstance(at, fx.Node) and at not in found:
                found.add(at)
                stack.extend(at.args[:1])
    return found


def _number(captured: Captured, node: Any, written: set[fx.Node], used: set[str]) -> Any:
    """What `node` holds whatever the inputs are, None where that is not known."""
    if not isinstance(node, fx.Node):
        return node
    if node in written:
        return None
    if node.op == "placeholder":
        origin = captured.origins[node.name]
        if origin.kind not in ("buffer", "constant"):
            return None
        if origin.held:
            used.add(node.name)
        return captured.values[node.name]
    target: Any = node.target
    if node.op != "call_function" or torch.Tag.nondeterministic_seeded in getattr(
            target, "tags", ()):
        return None
    unknown = False

    def known(x: fx.Node) -> Any:
        nonlocal unknown
        found = None if unknown else _number(captured, x, written, used)
        unknown = unknown or found is None
        return found

    args, kwargs = fx.map_arg((node.args, node.kwargs), known)
    if unknown:
        return None
    with torch.no_grad():
        return target(*args, **kwargs)
