"""Optimises one model of the zoo and holds the result against eager, float64 and the counter.

The acceptance rule is that of the project: a tensor of the optimised model may be as far from the
float64 model as max(2 * the original's own distance, 8 * eps * max|out|). Models that cannot run in
float64, or draw random numbers in evaluation mode, are compared with the original directly.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import attnopt
from attnopt.ir.site import SiteRecord
from tests.models import counter, zoo

#: of max|out|, where there is no float64 model to tell what rounding costs
DIRECT_TOLERANCE = 3e-5
#: inputs that each optimised model is called with
DRAWS = 3


@dataclass
class Row:
    """What became of one model. Plain strings and numbers, so that it can be printed and saved."""

    name: str
    family: str
    #: live softmax and SDPA nodes, and dead ones, of the independent counter
    nodes: int = 0
    dead: int = 0
    exported: bool = True
    #: sites of the report that are not samplings left alone, and how many of them are what
    found: int = 0
    rewritten: int = 0
    canonical: int = 0
    kept: int = 0
    sampling: int = 0
    #: "path: reason" of each kept site, and of each canonical one
    reasons: list[str] = field(default_factory=list)
    canonical_reasons: list[str] = field(default_factory=list)
    #: module paths whose nodes the report does not account for, with the number missing
    missing: dict[str, int] = field(default_factory=dict)
    #: largest error of any output, and the largest share of its bound that one used up
    error: float = 0.0
    share: float = 0.0
    #: calls that attnopt served, and why it did not serve the others
    hits: int = 0
    misses: list[str] = field(default_factory=list)
    #: what torch.export took alone, and the whole of optimize()
    capture_seconds: float = 0.0
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    failure: str = ""

    @property
    def right(self) -> bool:
        return not self.failure and self.share <= 1.0


def _run(model: Any, kwargs: dict[str, Any]) -> list[Any]:
    torch.manual_seed(0)
    with torch.no_grad():
        return pytree.tree_leaves(model(**kwargs))


def _in_double(
    model: nn.Module, kwargs: dict[str, Any], old: list[Any]
) -> list[Any] | None:
    """Outputs of the model in float64, or None where it cannot run so."""
    wide = pytree.tree_map(
        lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x,
        kwargs,
    )
    try:
        outputs = _run(copy.deepcopy(model).double(), wide)
    except (RuntimeError, TypeError, ValueError):
        return None
    # float64's own finfo.min overflows where a model adds it to something kept in float32
    usable = all(
        theirs.isfinite().all() or not ours.isfinite().all()
        for theirs, ours in zip(outputs, old, strict=True) if isinstance(ours, torch.Tensor)
    )
    return outputs if usable else None


def _is_random(model: nn.Module, kwargs: dict[str, Any]) -> bool:
    state = torch.get_rng_state()
    with torch.no_grad():
        model(**kwargs)
    return not torch.equal(state, torch.get_rng_state())


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """Largest difference; infinite where one is NaN or infinite and the other is not the same."""
    one, other = one.double(), other.double()
    same = (one == other) | (one.isnan() & other.isnan())
    difference = torch.where(same, 0.0, (one - other).abs().nan_to_num(nan=torch.inf))
    return difference.max().item() if difference.numel() else 0.0


def _same_kind(mine: Any, theirs: Any) -> bool:
    if isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        return mine.shape == theirs.shape and mine.dtype == theirs.dtype
    return type(mine) is type(theirs) and mine == theirs


def _bound_and_error(
    mine: torch.Tensor, theirs: torch.Tensor, reference: torch.Tensor | None
) -> tuple[float, float]:
    size = theirs.double().abs().nan_to_num(posinf=0.0).max().item()
    if not theirs.is_floating_point():
        return 0.0, _distance(mine, theirs)
    if reference is None:
        return DIRECT_TOLERANCE * size, _distance(mine, theirs)
    own = _distance(theirs, reference)
    return max(2 * own, 8 * torch.finfo(theirs.dtype).eps * size), _distance(mine, reference)


def compare(draws: list[tuple[list[Any], list[Any], list[Any] | None]]) -> tuple[float, float]:
    """Largest error of the new outputs, and the largest share of its bound that one used up.

    Each draw is (new, old, float64) outputs for other inputs. Bounds and errors are maxima over
    the draws: what one draw of a small output happens to lose to rounding varies by more than 2.
    """
    places: list[tuple[float, float]] = [(0.0, 0.0)] * len(draws[0][1])
    for new, old, reference in draws:
        if len(new) != len(old) or not all(map(_same_kind, new, old)):
            return float("inf"), float("inf")
        for place, theirs in enumerate(old):
            if isinstance(theirs, torch.Tensor) and theirs.numel():
                wide = reference[place] if reference is not None else None
                one = _bound_and_error(new[place], theirs, wide)
                places[place] = tuple(map(max, places[place], one))  # type: ignore[assignment]
    shares = [off / bound if bound else float("inf") for bound, off in places if off]
    return max((off for _, off in places), default=0.0), max(shares, default=0.0)


def _counts(site: SiteRecord) -> bool:
    """A sampling that was rewritten took the softmax of its weights with it."""
    return site.kind != "sampling" or site.status != "kept"


def account(count: counter.Count, report: attnopt.Report) -> dict[str, int]:
    """Module paths with fewer sites in the report than live nodes in the graph. The softmax of a
    sampling's weights may be that of a module around the one that samples."""
    if not count.exported:
        return {}
    sites = Counter(site.path for site in report.sites if site.kind != "sampling")
    sampled = [f"{site.path}." for site in report.sites
               if site.kind == "sampling" and _counts(site)]
    missing = {}
    for path, n in count.live.items():
        n -= sites[path] + sum(inner.startswith(f"{path}.") for inner in sampled)
        if n > 0:
            missing[path] = n
    return missing


def examine(entry: zoo.Entry, verify: bool = False) -> Row:
    """Builds, optimises, runs and compares one model. Exceptions of attnopt are left to escape."""
    row = Row(entry.name, entry.family)
    model, kwargs = zoo.build(entry), zoo.inputs(entry)
    count = counter.count(model, kwargs)
    row.nodes, row.dead, row.exported = count.total, sum(count.dead.values()), count.exported
    row.capture_seconds = count.seconds
    random = _is_random(model, kwargs)
    start = time.perf_counter()
    optimized = attnopt.optimize(model, (), kwargs, verify=verify)
    row.seconds = time.perf_counter() - start
    draws = []
    for seed in range(DRAWS):
        kwargs = zoo.inputs(entry, seed)
        old, new = _run(model, kwargs), _run(optimized, kwargs)
        draws.append((new, old, None if random else _in_double(model, kwargs, old)))
    report = optimized.report  # after the call, which is when Dynamo takes what export cannot
    row.error, row.share = compare(draws)
    row.hits = report.calls.get("hits", 0)
    row.misses = [reason for reason in report.calls if reason != "hits"]
    row.notes = list(report.notes)
    row.missing = account(count, report)
    for site in report.sites:
        row.sampling += site.kind == "sampling"
        if not _counts(site):
            continue
        row.found += 1
        setattr(row, site.status, getattr(row, site.status) + 1)
        if site.status == "kept":
            row.reasons.append(f"{site.path}: [{site.kind}] {site.reason}")
        elif site.status == "canonical":
            row.canonical_reasons.append(f"{site.path}: {site.reason}")
    return row
