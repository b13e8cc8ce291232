"""The order of the queries of a local attention: that of their tokens.

Queries may be cut into blocks by the same data movement as the keys (tiles of a picture, chunks of
a sequence), so that their axes are not in the order of the grid. Where the token of query n is a
sum of digits of n, the axes are split at these digits and put in the order of the tokens: a
permutation of axes, no gather.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.passes.analyze.local_bases import Space, pulled
from attnopt.passes.analyze.movement import Mover
from attnopt.passes.canonical import Tensor as Placed
from attnopt.passes.recognize.axes import Axis
from attnopt.rules import Decline

Order = tuple[tuple[Axis, ...], Tensor | None, tuple[int, ...] | None]


def ordered(mover: Mover, space: Space, query: Placed, axes: tuple[Axis, ...]) -> Order:
    """The axes of the queries in the order of their tokens, the token of every query in the
    author's order (None where that is its number), and the grid of the tokens (None: unknown)."""
    number = math.prod(a.size for a in axes)
    try:
        base, _ = pulled(mover, space, query.node, query.layout, frozenset(axes))
    except (Decline, LookupError):
        return axes, None, None
    moves = space.varies(base.flat)
    if not bool(base.where.all()) or math.prod(base.grid) != number \
            or not moves <= frozenset(axes):
        return axes, None, None
    place = space.over(base.flat, axes)
    if torch.equal(place.reshape(-1), torch.arange(number)):
        return axes, None, base.grid
    split: list[tuple[int, int, Axis]] = []
    total = torch.zeros_like(place)
    for i, a in enumerate(axes):
        line = place[tuple(slice(None) if j == i else 0 for j in range(len(axes)))]
        shape = [-1 if j == i else 1 for j in range(len(axes))]
        total = total + line.view(shape)
        found = digits(line.tolist())
        if found is None:
            return axes, None, None
        split += [(stride, n, a) for n, stride in found]
    if int(place.reshape(-1)[0]) != 0 or not torch.equal(total, place):
        return axes, None, None
    span = 1
    for stride, n, _ in sorted(split, key=lambda s: s[:2]):
        if stride != span:
            return axes, None, None
        span *= n
    parts = {id(a): [(s, n) for s, n, own in split if own is a] for a in axes}
    named: list[tuple[int, Axis]] = []
    for a in axes:
        finer = [(s, Axis(n)) for s, n in parts[id(a)]]
        if len(finer) == 1:
            finer = [(finer[0][0], a)]
        else:
            a.become(tuple(x for _, x in finer))
        named += finer
    rows = tuple(a for _, a in sorted(named, key=lambda x: -x[0]))
    return rows, place.reshape(-1), base.grid


def digits(steps: Sequence[int]) -> list[tuple[int, int]] | None:
    """(length, stride) of the digits, most significant first, of which `steps` is the sum: the
    places that the indices 0, 1, ... of an axis go to. None where it is no such sum."""
    n = len(steps)
    if n == 1:
        return []
    stride = steps[1] - steps[0]
    run = next((i for i in range(n) if steps[i] - steps[0] != i * stride), n)
    if n % run or stride <= 0:
        return None
    if run == n:
        return [(n, stride)]
    rest = digits(steps[::run])
    expected = [a + i * stride for a in steps[::run] for i in range(run)]
    return None if rest is None or expected != list(steps) else [*rest, (run, stride)]
