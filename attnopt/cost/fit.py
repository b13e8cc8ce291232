"""Fitting the coefficients of a CPU to measured times; `attnopt.cost.fit_gpu` does it for GPUs.

Times are sums of counted features times coefficients (`attnopt.cost.cpu`, `attnopt.cost.plain`), so
this is linear least squares on relative errors. Coefficients stay positive, and those that the
measurements say little about stay near what they were: a penalty draws each to its prior. A row
that is far off weighs less (Huber's weights), as a busy machine spoils some measurements.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from attnopt.cost import cpu, plain
from attnopt.cost.devices import Cpu

#: how much an error of a factor 2 in a coefficient weighs against one of 100 % in a measurement
PENALTY = 1e-4
#: relative error from which a row weighs less, and rounds of weighing again
FAR_OFF, ROUNDS = 0.1, 8
#: a coefficient never falls below this share of its prior
LEAST = 0.02


@dataclass(frozen=True)
class Row:
    """One measurement: counted features of the call, and its seconds."""

    features: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Fit:
    """coefficients in nanoseconds; mean and worst: relative error of the rows."""

    coefficients: dict[str, float]
    mean: float
    worst: float


def fit(rows: Sequence[Row], prior: Mapping[str, float], penalty: float = PENALTY) -> Fit:
    """Coefficients that minimise the squared relative errors of `rows`.

    prior: a positive start for every coefficient. Raises ValueError without rows, or where a row
    has a feature that `prior` does not name.
    """
    names = sorted({name for row in rows for name, n in row.features.items() if n})
    if not rows or any(row.seconds <= 0 for row in rows):
        raise ValueError(f"rows must be measurements of positive time, got {len(rows)} rows")
    if set(names) - set(prior):
        raise ValueError(f"prior must name every feature, got none for {set(names) - set(prior)}")
    start = torch.tensor([prior[name] for name in names], dtype=torch.float64)
    times = torch.tensor([row.seconds * 1e9 for row in rows], dtype=torch.float64)
    counted = torch.tensor([[row.features.get(name, 0.0) for name in names] for row in rows],
                           dtype=torch.float64)
    # Unknowns are factors on the prior; a row's share of its own time makes errors relative.
    shares = counted * start / times[:, None]
    weight = (penalty * len(rows)) ** 0.5 * torch.eye(len(names), dtype=torch.float64)
    trust = torch.ones(len(rows), dtype=torch.float64)
    for _ in range(ROUNDS):
        factors = _bounded(torch.cat([trust[:, None] * shares, weight]),
                           torch.cat([trust, weight.diagonal()]))
        errors = (shares @ factors - 1).abs()
        trust = (FAR_OFF / errors.clamp(min=FAR_OFF)).sqrt()
    found = {name: float(x) for name, x in zip(names, start * factors, strict=True)}
    return Fit({**prior, **found}, float(errors.mean()), float(errors.max()))


def calibrated(device: Cpu, name: str, rows: Sequence[Row]) -> Cpu:
    """`device` as measured: rows of the generated kernel and of torch's own, in any mix."""
    prior = {**cpu.COEFFICIENTS, **plain.COEFFICIENTS, **device.coefficients}
    made = fit(rows, prior)
    measured = {name for row in rows for name in row.features}
    source = f"calibrated: {len(rows)} measurements, off by {made.mean:.1%} on average"
    return dataclasses.replace(
        device, name=name, match=(), calibrated=True, hint="", source=source,
        coefficients={n: float(f"{x:.4g}") for n, x in made.coefficients.items()
                      if n in measured or n in device.coefficients})


def _bounded(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least squares with every unknown at least LEAST: those that fall below are held there."""
    held = torch.zeros(matrix.shape[1], dtype=torch.bool)
    found = torch.full((matrix.shape[1],), LEAST, dtype=matrix.dtype)
    while not held.all():
        rest = target - matrix[:, held].sum(1) * LEAST
        free = torch.linalg.lstsq(matrix[:, ~held], rest[:, None]).solution[:, 0]
        found[~held] = free
        below = ~held & (found < LEAST)
        if not below.any():
            break
        held |= below
        found[held] = LEAST
    return found
