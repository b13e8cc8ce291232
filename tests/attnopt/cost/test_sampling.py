"""The times of deformable attention on a CPU: their order, and measured ratios."""

from __future__ import annotations

import dataclasses

import pytest

from attnopt.cost.devices import Cpu
from attnopt.cost.sampling import Samples, seconds

CPU = Cpu("a CPU")
ENCODER = Samples(1, 4484, 8, 32, 1200, 16, 4)


@pytest.mark.parametrize("lowering", ["plain", "cpp", "aten"])
def test_more_takes_longer(lowering: str) -> None:
    for name in ("batch", "heads", "queries", "points"):
        more = dataclasses.replace(ENCODER, **{name: 2 * getattr(ENCODER, name)})
        assert seconds(CPU, more, lowering) > seconds(CPU, ENCODER, lowering)


@pytest.mark.parametrize("samples, lowering, measured", [
    (ENCODER, "cpp", 14.6), (ENCODER, "aten", 5.2),
    (Samples(1, 4484, 8, 32, 300, 16, 4), "cpp", 10.9),
    (Samples(1, 1450, 8, 32, 64, 4, 1), "cpp", 2.7),
    (Samples(1, 1450, 8, 32, 1, 4, 1), "cpp", 0.57),
    (Samples(1, 1450, 8, 32, 1, 4, 1), "aten", 0.2)])
def test_measured_ratios(samples: Samples, lowering: str, measured: float) -> None:
    speedup = seconds(CPU, samples, "plain") / seconds(CPU, samples, lowering)
    assert 0.7 < speedup / measured < 1.4


def test_coefficients_of_a_device_come_first() -> None:
    own = Cpu("a CPU", coefficients={"sampling.cpp.call": 1e9})
    assert seconds(own, ENCODER, "cpp") > 1


def test_a_lowering_that_is_none() -> None:
    with pytest.raises(ValueError, match="lowering must be one of"):
        seconds(CPU, ENCODER, "triton")
