"""Patterns: a user's torch function read as a model is, and compared with sites by normal form.

The pattern is captured at lengths of its own, once for each combination of its alternatives and
each head_dim that sites have (scales are numbers that depend on it). Its Spec and a site's are the
same attention if they agree but for names of operands, order of commuting terms, and numbers that
differ by a rounding (`attnopt.passes.same_spec`). The replacement is then called with the site's
tensors in the layouts of the pattern's arguments (`attnopt.passes.rebind`).
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from attnopt.ir.spec import Schedule, Spec
from attnopt.passes.canonical import Canonical
from attnopt.passes.custom import fault
from attnopt.passes.normalize import op_name
from attnopt.passes.rebind import rebound
from attnopt.passes.recognize.axes import Axis, Layout, resolve, settle
from attnopt.passes.recognize.layout import back
from attnopt.passes.same_spec import inverted, same
from attnopt.passes.subgraphs.reading import Pattern, pattern_at, patterns_of
from attnopt.rewrites import choosing, combinations
from attnopt.rules import Decline, Match, Region, Rule

log = logging.getLogger("attnopt.passes")
_PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31)


class AsModule(nn.Module):
    """A function as a module, to be captured."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: Tensor) -> Any:
        return self.function(*tensors)


@dataclass
class Read:
    """A pattern as read at one head_dim: its Spec, and how each argument is laid out.

    arguments: of each argument the slot (or "query", "key", "value"), and for each of its
               dimensions the dimensions of the Spec's tensor that it is made of
    result:    the same of the result
    """

    tags: dict[str, str]
    spec: Spec
    leading: int
    arguments: dict[str, tuple[str, list[list[int]]]] = field(default_factory=dict)
    result: list[list[int]] = field(default_factory=list)


class PatternRule(Rule):
    """The rule of `attnopt.register_rewrite`."""

    def __init__(self, pattern: Callable[..., Any], replacement: Callable[..., Any],
                 inputs: Mapping[str, list[str]], masks: Sequence[str], name: str,
                 priority: int) -> None:
        self.pattern, self.replacement, self.inputs = pattern, replacement, dict(inputs)
        self.masks = frozenset(masks)
        self.name, self.priority = name, priority
        said = getattr(pattern, "__name__", "its pattern")
        self.recognizes = f"what {said} computes, however it is spelled"
        self._read: dict[Any, list[Read]] = {}
        #: why the pattern can be read neither as an attention nor otherwise
        self.unread = ""
        self._kind = ""
        self._graph: list[Pattern] = []
        self._graph_at: dict[Any, Pattern] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Without the graphs that were read: a copy reads them again."""
        return {**self.__dict__, "_read": {}, "_kind": "", "_graph": [], "_graph_at": {}}

    @property
    def kind(self) -> str:  # type: ignore[override]
        """"attention" where the pattern is one attention over its arguments, else "graph"; asked
        when a model is first optimised, as it takes a capture."""
        if not self._kind:
            words = list(dict.fromkeys(w for dims in self.inputs.values() for w in dims))
            self._kind = "attention"
            try:
                with choosing({}):
                    _read(self, {}, dict(zip(words, _PRIMES, strict=False)))
            except Exception:  # what is wrong with it is said where it is used
                log.debug("%s is no single attention", self.name, exc_info=True)
                try:
                    self._graph = patterns_of(self)
                    self._kind = "graph"
                except Exception as error:
                    self.unread = error.reason if isinstance(error, Decline) else fault(error)
                    log.info("the pattern of %s cannot be read", self.name, exc_info=True)
        return self._kind

    def graph_patterns(self) -> list[Pattern]:
        """The pattern with every combination of its alternatives, of the kind "graph"."""
        return self._graph if self.kind == "graph" else []

    def graph_pattern_at(self, tags: Mapping[str, str], lengths: Sequence[tuple[str, int]]
                         ) -> Pattern:
        """The pattern at lengths of a model, for numbers that depend on them."""
        key = (*sorted(tags.items()), *lengths)
        if key not in self._graph_at:
            self._graph_at[key] = pattern_at(self, tags, dict(lengths))
        return self._graph_at[key]

    def match(self, region: Region) -> Match:
        if "aten" not in region.lowerings:
            raise Decline("backend leaves out aten")
        reason = ""
        for read in self.read(region.shapes[0][-1], region.shapes[2][-1]):
            try:
                names, turned = same(read.spec, region.spec)
                compute = rebound(self, read, region, names, turned)
            except Decline as no:
                reason = reason or no.reason
                continue
            return Match(region.spec, Schedule("custom"), compute=compute)
        raise Decline(reason)

    def read(self, inner: int, columns: int) -> list[Read]:
        """The pattern with every combination of its alternatives."""
        key = inner, columns
        if key not in self._read:
            first = self.sizes(inner, columns)
            with choosing({}) as seen:
                self.pattern(*self.tensors(first))
            self._read[key] = [_read(self, tags, first) for tags in combinations(seen.found)]
        return self._read[key]

    def sizes(self, inner: int, columns: int) -> dict[str, int]:
        """A length for every named dimension, all different but for what they must be."""
        words = list(dict.fromkeys(w for dims in self.inputs.values() for w in dims))
        lengths = dict(zip(words, itertools.chain(_PRIMES, range(37, 999, 2)), strict=False))
        with choosing({}):
            roles = {slot: name for name, (slot, _) in _read(self, {}, lengths).arguments.items()}
        for slot, wanted in (("query", inner), ("value", columns)):
            arguments = self.inputs[roles[slot]]
            where = self._inner[slot]
            if where is not None:
                lengths[arguments[where]] = wanted
        return lengths

    #: which dimension of the query's and the value's argument is head_dim
    _inner: dict[str, int | None]

    def tensors(self, sizes: Mapping[str, int], seed: int = 0) -> list[Tensor]:
        """Random arguments of these lengths; masks are bool, and hide whole rows too."""
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn([1 if w == "1" else sizes[w] for w in dims], generator=generator)
                 for dims in self.inputs.values()]
        return [t > 0 if name in self.masks else t
                for name, t in zip(self.inputs, drawn, strict=True)]


def _read(rule: PatternRule, tags: Mapping[str, str], sizes: Mapping[str, int]) -> Read:
    """Capture the pattern and find out which of its arguments is what."""
    from attnopt.passes.capture.export import capture
    from attnopt.passes.clock import Clock
    from attnopt.passes.options import Options
    from attnopt.passes.pipeline import _read as read_graph

    with choosing(tags), torch.no_grad():
        captured = capture(AsModule(rule.pattern), tuple(rule.tensors(sizes))).captured
    *_, plans, sampled, _ = read_graph(captured, Options(rules=()), Clock())
    if len(plans) != 1 or sampled or plans[0].canonical is None:
        why = plans[0].record.reason if plans else "no attention in it"
        raise Decline(f"its pattern must be one attention, got {len(plans)}: {why}")
    site, canonical = plans[0].site, plans[0].canonical
    placeholders = [n for n in site.end.graph.nodes if n.op == "placeholder"
                    and captured.origins[n.name].kind == "input"]
    output = next(n for n in site.end.graph.nodes if n.op == "output").all_input_nodes
    read = Read(dict(tags), canonical.spec, len(canonical.result) - 2)
    tensors = {"query": canonical.query, "key": canonical.key, "value": canonical.value,
               **canonical.operands}
    for slot, tensor in tensors.items():
        if slot not in ("query", "key", "value") and slot not in canonical.spec.slots:
            continue
        node, layout, turned = _argument(tensor.node, tensor.layout)
        if tensor.recipe is not None or node not in placeholders[:len(rule.inputs)]:
            raise Decline(f"each tensor of its pattern must be an argument, got {slot} made by "
                          f"{tensor.node.name}")
        name = list(rule.inputs)[placeholders.index(node)]
        if name in read.arguments:
            raise Decline(f"each argument of its pattern must be one tensor, got {name} twice")
        read.arguments[name] = slot, _places(layout, tensor.target, name)
        if turned:  # the Spec is to load the argument itself
            read.spec = inverted(read.spec, slot)
    if missing := [n for n in rule.inputs if n not in read.arguments]:
        raise Decline(f"its pattern must use every argument, got no {missing[0]}")
    end, layout = _result(output[0], site.end, canonical)
    read.result = _places(layout, canonical.result, "the result")
    rule._inner = {slot: _place_of(read, slot) for slot in ("query", "value")}
    return read


def _place_of(read: Read, slot: str) -> int | None:
    """The dimension of an argument that is the Spec tensor's last one alone."""
    places = next(p for s, p in read.arguments.values() if s == slot)
    return next((i for i, dims in enumerate(places) if dims == [read.leading + 1]), None)


def _argument(node: fx.Node, layout: Layout) -> tuple[fx.Node, Layout, bool]:
    """Back over views and negations of a mask to where a tensor comes from; is it negated?"""
    turned = False
    while node.op != "placeholder":
        if op_name(node) in ("bitwise_not", "logical_not") \
                and node.args[0].meta["val"].dtype == torch.bool:  # type: ignore[union-attr]
            node, turned = node.args[0], not turned  # type: ignore[assignment]
            continue
        step = back(node, layout)
        if step is None:
            break
        node, layout = step
    return node, settle(layout), turned


def _result(output: fx.Node, end: fx.Node, canonical: Canonical) -> tuple[fx.Node, Layout]:
    """The layout of the pattern's result; views behind the site's end are followed."""
    if output is end:
        return output, settle(canonical.site.out_layout)
    layout: Layout = tuple((Axis(n),) if n != 1 else () for n in output.meta["val"].shape)
    node, own = output, layout
    while node is not end:
        step = back(node, own) if node.op == "call_function" else None
        if step is None:
            raise Decline("its pattern must give the result of the attention, got "
                          f"{output.name}")
        node, own = step
    for mine, theirs in zip(settle(own), settle(canonical.site.out_layout), strict=True):
        if len(theirs) == 1 and len(mine) >= 1:
            theirs[0].become(mine)
        elif len(mine) == 1:
            mine[0].become(theirs)
        elif [a.size for a in mine] != [a.size for a in theirs]:
            raise Decline("the layout of its pattern's result cannot be read")
        else:
            for a, b in zip(mine, theirs, strict=True):
                a.become((b,))
    return output, settle(layout)


def _places(layout: Layout, target: Any, what: str) -> list[list[int]]:
    """For each dimension of a layout the dimensions of the target that it holds."""
    goal = [resolve(dim) for dim in target]
    if any(len(dim) > 1 for dim in goal):
        raise Decline(f"a dimension of {what} is split in its pattern in a way that the Spec "
                      "does not show")
    where = {dim[0]: i for i, dim in enumerate(goal) if dim}
    found = []
    for dim in settle(layout):
        if any(a not in where for a in dim):
            raise Decline(f"{what} varies along an axis that the scores do not have")
        found.append([where[a] for a in dim])
    return found
