"""What `attnopt.check_rule` compares: patterns with replacements, and the answers of rule classes.

A class is asked about regions that models have: scaled dot products with nothing else, causal, with
a bias, with a mask that hides keys or whole rows, with a window, and with a softcap. Its answer is
held against the oracle of the region's Spec (`attnopt.kernels.reference`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnopt import kernels
from attnopt.check import Inexact
from attnopt.errors import RuleError
from attnopt.ir import expr as E
from attnopt.ir.mask import ALL, Band, Causal, Where
from attnopt.ir.spec import Operand, Spec
from attnopt.passes.custom import ask
from attnopt.passes.patterns import PatternRule
from attnopt.rewrites import choosing, combinations, replacement_arguments
from attnopt.rules import Approximation, Decline, Factors, Match, Region, checked, registered


def subject_of(rule: Any) -> tuple[str, Any]:
    """The name of a rule and what is compared of it."""
    if isinstance(rule, str):
        rule = next((r for r in registered() if r.name == rule), rule)
    made = rule() if isinstance(rule, type) else rule
    if not getattr(made, "name", "") and hasattr(made, "match"):
        made.name = type(made).__name__
    checked(made)
    return made.name, _Pattern(made) if isinstance(made, PatternRule) else _Class(made)


class _Pattern:
    """A pattern and its replacement, for every combination of alternatives."""

    def __init__(self, rule: PatternRule) -> None:
        self.rule = rule
        self.words = list(dict.fromkeys(w for d in rule.inputs.values() for w in d if w != "1"))
        firsts = {d[0] for d in rule.inputs.values()}
        self.may_be_empty = [w for w in firsts if all(
            w not in d[1:] for d in rule.inputs.values()) and w != "1" and len(firsts - {"1"}) == 1]
        with choosing({}) as seen:
            rule.pattern(*rule.tensors(dict.fromkeys(self.words, 3)))
        self.variants = list(combinations(seen.found))

    def name_of(self, variant: dict[str, str]) -> str:
        return ", ".join(f"{tag}={name}" for tag, name in variant.items())

    def draw(self, variant: Any, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        made = self.rule.tensors(sizes, seed)
        return {name: t.double() if t.is_floating_point() else t
                for name, t in zip(self.rule.inputs, made, strict=True)}

    def expected(self, variant: dict[str, str], tensors: Mapping[str, Tensor]) -> Tensor:
        with choosing(variant):
            return _joined(self.rule.pattern(*tensors.values()))

    def got(self, variant: dict[str, str], tensors: Mapping[str, Tensor]) -> Tensor | None:
        replacement = self.rule.replacement
        found = replacement(**replacement_arguments(replacement, variant, tensors))
        with choosing(variant):
            wanted = self.rule.pattern(*tensors.values())
        for one, other in zip(_several(wanted), _several(found), strict=False):
            if isinstance(other, Tensor) and one.shape != other.shape:
                raise ValueError(f"a result must be of shape {tuple(one.shape)}, got "
                                 f"{tuple(other.shape)}")
        if len(_several(wanted)) != len(_several(found)):
            raise ValueError(f"the results must be {len(_several(wanted))} tensors, got "
                             f"{len(_several(found))}")
        return _joined(found)


def _several(found: Any) -> Sequence[Any]:
    return found if isinstance(found, (tuple, list)) else (found,)


def _joined(found: Any) -> Tensor:
    """Several results as one."""
    if not isinstance(found, (tuple, list)):
        single: Tensor = found
        return single
    return torch.cat([t.flatten() for t in found])


def _families() -> dict[str, Spec]:
    scaled = E.score * 0.3
    bias = Operand("bias", ("h", "q", "k"), E.FLOAT, "bias")
    keep = Operand("keep", ("b", "q", "k"), E.BOOL, "mask")
    return {
        "plain": Spec(logits=scaled),
        "causal": Spec(logits=scaled, mask=Causal()),
        "bias": Spec(logits=scaled + E.load("bias"), operands=(bias,)),
        "mask": Spec(logits=scaled, mask=Where(E.load("keep", dtype=E.BOOL)), operands=(keep,)),
        "mask, rows without keys uniform": Spec(
            logits=scaled, mask=Where(E.load("keep", dtype=E.BOOL)), operands=(keep,),
            empty_row="uniform"),
        "window": Spec(logits=scaled, mask=Band(E.const(-2), E.const(0))),
        "softcap": Spec(logits=E.call("tanh", scaled) * 5.0),
        "sigmoid": Spec(logits=scaled, normalizer="sigmoid"),
    }


class _Class:
    """A rule asked about regions of several families."""

    words = ["b", "h", "q", "k", "d", "e"]
    may_be_empty = ["b"]

    def __init__(self, rule: Any) -> None:
        self.rule = rule
        self.specs = _families()
        self.variants = list(self.specs)

    def name_of(self, variant: str) -> str:
        return variant

    def draw(self, variant: str, sizes: Mapping[str, int], seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*words: str) -> Tensor:
            return torch.randn([sizes[w] for w in words], generator=generator, dtype=torch.float64)

        found = {"query": normal(*"bhqd"), "key": normal(*"bhkd"), "value": normal(*"bhke")}
        for operand in self.specs[variant].operands:
            shape = [sizes[w] if w in operand.axes else 1 for w in "bhqk"]  # type: ignore
            drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
            found[operand.slot] = drawn > 0 if operand.dtype == E.BOOL else drawn
        return found

    def expected(self, variant: str, tensors: Mapping[str, Tensor]) -> Tensor:
        return _by_reference(self.specs[variant], tensors)

    def got(self, variant: str, tensors: Mapping[str, Tensor]) -> Tensor | Inexact | None:
        spec = self.specs[variant]
        query, key, value = (tensors[n] for n in ("query", "key", "value"))
        shapes = tuple(tuple(t.shape) for t in (query, key, value))
        lengths = (*query.shape[:-1], key.shape[-2], key.shape[-1], value.shape[-1])
        region = Region(spec, "composition", (), lengths, tuple(
            t.dtype for t in (query, key, value)), "cpu", False, False, shapes)
        try:
            if isinstance(self.rule, Approximation):
                biases = {o.slot: tensors[o.slot][0] for o in spec.operands
                          if o.dtype == E.FLOAT and "b" not in (o.axes or ())}
                return _approximated(self.rule, replace(region, biases=biases), tensors)
            answer = ask(self.rule, region, strict=False)
        except Decline as no:
            if no.reason.startswith("raised "):
                raise RuleError(no.reason) from no
            return None
        if isinstance(answer, Match) and answer.compute is not None:
            slots = {o.slot: tensors[o.slot] for o in spec.operands}
            found: Tensor = answer.compute(query, key, value, **slots)
            return found
        return _by_reference(answer.spec if isinstance(answer, Match) else answer, tensors)


def _approximated(rule: Approximation, region: Region, tensors: Mapping[str, Tensor]) -> Inexact:
    """What an approximation means in float64, on keys chosen from the numbers as they are."""
    mask, tables = rule.reduce(region)
    spec, given = region.spec, dict(tensors)
    off = declared = None
    more = []
    for slot, table in tables.items():
        if isinstance(table, Factors):
            cut = (table.query.double() @ table.key.double().mT)[None]
            gap = cut - tensors[slot].double()
            if gap.numel():
                gap = gap - (gap.amax(-1, keepdim=True) + gap.amin(-1, keepdim=True)) / 2
            off = max(off or 0.0, float(gap.abs().max()) if gap.numel() else 0.0)
            declared = max(declared or 0.0, table.error)
            given[slot] = cut
        else:
            more.append(Operand(slot, None, E.BOOL, "mask"))
            read = [given["query"], given["key"]] if table.reads else [given["query"]]
            lengths = [given["query"].shape[-2], given["key"].shape[-2]]
            given[slot] = torch.ops.attnopt.block_map.default(read, lengths, table.text)
    if more or mask is not ALL:
        spec = spec.with_(more, mask=spec.mask & mask)
    exact = {n: t.double() if t.is_floating_point() else t for n, t in given.items()}
    return Inexact(_by_reference(spec, exact), off, declared)


def _by_reference(spec: Spec, tensors: Mapping[str, Tensor]) -> Tensor:
    operands = {o.slot: tensors[o.slot] for o in spec.operands}
    found: Tensor = kernels.reference(spec)(
        tensors["query"], tensors["key"], tensors["value"], operands)
    return found
