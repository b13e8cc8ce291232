"""Interleaved timing: what is compared, and what it leaves behind."""

from __future__ import annotations

import gc

import pytest
import torch

from attnopt import timing
from attnopt.errors import OptionError
from attnopt.timing import Comparison, format_seconds, interleave, median_interval


def test_every_round_calls_every_function() -> None:
    order: list[str] = []
    fns = {name: lambda name=name: order.append(name) for name in "abc"}
    times = interleave(fns, 20, warmup=1, min_seconds=0)
    assert {name: len(t) for name, t in times.items()} == {"a": 20, "b": 20, "c": 20}
    rounds = [order[i:i + 3] for i in range(3, len(order), 3)]
    assert len(rounds) == 20 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len({tuple(r) for r in rounds}) > 1, "the order changes from round to round"


def test_fast_functions_are_called_several_times() -> None:
    calls = [0]

    def fast() -> None:
        calls[0] += 1

    interleave({"fast": fast}, 1, warmup=1, min_seconds=1e-4)
    assert calls[0] > 2


def test_threads_and_collector_are_put_back() -> None:
    threads, seen = torch.get_num_threads(), []
    interleave({"a": lambda: seen.append((torch.get_num_threads(), gc.isenabled()))}, 1)
    assert set(seen) == {(1, False)}
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0}, 1)
    assert torch.get_num_threads() == threads and gc.isenabled()


def test_an_accelerator_is_waited_for() -> None:
    waits: list[int] = []
    interleave({"a": lambda: None}, 3, synchronize=lambda: waits.append(1), min_seconds=0, warmup=0)
    assert len(waits) == 6
    assert timing.device_wait("cpu") is None


@pytest.mark.parametrize("options", [{"repeats": 0}, {"threads": 0}, {"clock": "sun"}])
def test_bad_options(options: dict) -> None:
    with pytest.raises(OptionError, match="must be"):
        interleave({"a": lambda: None}, **options)


def test_interval_of_the_median() -> None:
    # 95 % sign-test interval of n = 10 is from the 2nd to the 9th value, of n = 20 the 6th and 15th
    assert median_interval(tuple(map(float, range(1, 11)))) == (2, 9)
    assert median_interval(tuple(map(float, range(1, 21)))) == (6, 15)
    assert median_interval((3.0, 1.0, 2.0)) == (1, 3)
    assert median_interval((1.0,)) == (1, 1)


def test_comparison() -> None:
    found = Comparison((2.0,) * 10, (1.0,) * 10)
    assert found.speedup == 2 and found.interval == (2, 2) and found.medians == (2, 1)
    assert found.p_value == pytest.approx(2 / 1024)
    assert "2.00x (95% interval 2.00x to 2.00x; 10 interleaved pairs, CPU time" in str(found)
    same = Comparison((1.0, 2.0, 1.0), (2.0, 1.0, 1.0))
    assert same.p_value == 1 and "no difference shown" in str(same) and "range" in str(same)
    assert Comparison((1.0,), (0.0,)).speedup == float("inf")
    with pytest.raises(OptionError, match="one length"):
        Comparison((1.0,), ())


@pytest.mark.parametrize(("seconds", "text"), [
    (1.254, "1.25 s"), (75.2, "75.2 s"), (1234.0, "1234 s"), (0.0125, "12.5 ms"),
    (0.8304, "830 ms"), (8.3e-4, "830 us"), (0.0, "0 us"), (float("nan"), "nan us"),
    (float("inf"), "inf s"),
])
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
