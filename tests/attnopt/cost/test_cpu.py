"""The CPU models: features counted by hand, threads, tiles, the fit, work of a Spec."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.cost import cpu, plain
from attnopt.cost.cpu_tiles import cpu_tiles, fits, register_blocks
from attnopt.cost.devices import Cpu, find_cpu
from attnopt.cost.fit import Row, fit
from attnopt.cost.tiles import TileCounts, count_tiles
from attnopt.cost.work import Work, instructions, work_of
from attnopt.ir import expr as E
from attnopt.ir.mask import ALL, Band, Causal, KeyKeep, Mask
from attnopt.ir.spec import Operand, Spec

WIDE = Cpu("wide", isa="avx512", width=16, registers=32)
NARROW = Cpu("narrow", isa="avx2", width=8, registers=16)
WORK = Work(8, 8, 2048, 2048, 64, 64)
TILE = (48, 64, 6, 4)


def counted(work: Work, tile: tuple[int, ...], mask: Mask = ALL) -> TileCounts:
    return count_tiles(mask, work.queries, work.keys, tile[0], tile[1], tail=True)


def time(work: Work = WORK, tile: tuple[int, ...] = TILE, mask: Mask = ALL, threads: int = 1,
         device: Cpu = WIDE) -> float:
    return cpu.seconds(device, work, counted(work, tile, mask), tile, threads)


# -- features -------------------------------------------------------------------------------------
def test_features_of_one_tile() -> None:
    work = Work(1, 1, 48, 64, 64, 64)
    found = cpu.features(WIDE, work, counted(work, TILE), TILE)
    # 8 row blocks, one block of 4 vectors in each product, 64 steps: 24 sums at 2 a clock
    assert found["fma"] == 2 * 8 * 64 * 12 and found["load"] == 2 * 8 * 64 * 5
    assert found["block"] == 16 and found["store"] == 8 * 24 * 3
    assert found["score"] == 48 * 4 and found["row"] == 48 and found["visit"] == 1
    assert found["hidden"] == 0 and found["pack"] == 64 * 64 and found["call"] == 1


def test_ragged_ends_round_up() -> None:
    whole = Work(1, 1, 48, 128, 64, 64)
    ragged = dataclasses.replace(whole, keys=70)
    one, two = (cpu.features(WIDE, w, counted(w, TILE), TILE) for w in (whole, ragged))
    assert two["score"] == one["score"] and two["visit"] == one["visit"] == 2
    # Of the second product only the keys that exist are computed, and the last tile is masked.
    assert two["fma"] == one["fma"] - 8 * 58 * 12 and two["hidden"] == 48 * 4
    few = dataclasses.replace(whole, queries=49)
    three = cpu.features(WIDE, few, counted(few, TILE), TILE)
    assert three["row"] == 2 * 49 and three["fma"] == one["fma"] * 9 / 8


def test_small_register_blocks_wait_for_latency() -> None:
    one, six = ((1, 64, 1, 1), (6, 64, 6, 4))
    work = Work(1, 1, 1, 64, 64, 64)
    # A single sum takes 4 clocks a step, and 4 vectors make 4 blocks.
    assert cpu.features(WIDE, work, counted(work, one), one)["fma"] == 2 * 4 * 64 * 4
    assert cpu.features(WIDE, work, counted(work, six), six)["fma"] == 2 * 64 * 12


def test_narrow_value_channels_leave_a_remainder() -> None:
    work = Work(1, 1, 48, 64, 64, 24)
    found = cpu.features(WIDE, work, counted(work, TILE), TILE)
    assert found["fma"] == 8 * 64 * 12 + 8 * 64 * 6  # 2 vectors of 24 channels, one block of 6 x 2
    assert found["pack"] == 64 * (64 + 24)  # values are padded, so they are packed too


def test_what_makes_a_call_slower() -> None:
    assert time(mask=Causal()) < 0.7 * time() and time(mask=Band(-63, 0)) < 0.2 * time()
    assert time(dataclasses.replace(WORK, score_ops=20)) > 1.1 * time()
    assert time(dataclasses.replace(WORK, mask_ops=20), mask=Causal()) > time(mask=Causal())
    assert time(dataclasses.replace(WORK, sweeps=2)) > 1.8 * time()
    assert time(dataclasses.replace(WORK, leading=16, owners=16)) == pytest.approx(2 * time(), 0.01)
    shared = dataclasses.replace(WORK, owners=2)
    assert time(shared) < time()
    assert time(device=NARROW, tile=(48, 64, 6, 2)) > 1.5 * time()
    assert time(tile=(48, 64, 2, 4)) > time() < time(tile=(48, 64, 4, 1))


def test_threads_share_query_tiles() -> None:
    assert time(threads=2) == pytest.approx(time() / 2, rel=0.05)
    one = Work(1, 1, 48, 4096, 64, 64)  # a single query tile: a second thread only packs
    assert time(one, threads=2) > 0.75 * time(one)
    tiny = Work(1, 1, 16, 16, 16, 16)
    assert time(tiny, threads=8) > time(tiny)


def test_times_add_up_from_features() -> None:
    work = dataclasses.replace(WORK, queries=333, keys=777, mask_ops=2.0)
    for mask in (ALL, Causal()):
        counts = counted(work, TILE, mask)
        total = cpu.weigh(WIDE, cpu.features(WIDE, work, counts, TILE))
        assert cpu.seconds(WIDE, work, counts, TILE) == pytest.approx(total * 1e-9)


# -- tiles ----------------------------------------------------------------------------------------
@settings(max_examples=50)
@given(st.sampled_from([(16, 32), (8, 16), (4, 16), (4, 32)]), st.integers(1, 5000),
       st.integers(1, 5000))
def test_every_shape_has_legal_tiles(machine: tuple[int, int], queries: int, keys: int) -> None:
    device = Cpu("x", width=machine[0], registers=machine[1])
    found = cpu_tiles(device, queries, keys)
    assert len(found) >= 12 and len(set(found)) == len(found)
    for rows, block_k, mr, nv in found:
        assert rows % mr == 0 and fits(device.registers, mr, nv)
        assert block_k in (32, 64, 128) and block_k % (nv * device.width) == 0
        assert 16 <= rows <= 192 if queries >= 16 else rows < queries + mr


def test_register_blocks() -> None:
    assert register_blocks(32)[0] == (6, 4) and register_blocks(16)[0] == (6, 2)
    assert (48, 64, 6, 4) in cpu_tiles(WIDE, 2048, 2048)


# -- what torch offers ----------------------------------------------------------------------------
def test_measured_times_of_torch_on_zen() -> None:
    """Milliseconds at 8 heads, 2048 tokens: SDPA 125 and 79 (head_dim 64, 32), eager 388."""
    zen = find_cpu("AMD EPYC 9B14", "avx512")
    for work, lowering, expected in (
            (WORK, "sdpa", 125), (dataclasses.replace(WORK, head_dim=32, value_dim=32), "sdpa", 79),
            (WORK, "dense", 388), (dataclasses.replace(WORK, author_ops=3), "dense", 597)):
        found = plain.seconds(zen, work, lowering) * 1e3
        assert found == pytest.approx(expected, rel=0.12), (lowering, expected)
    # The generated kernel: 96 and 55 ms.
    assert time(device=zen) * 1e3 == pytest.approx(96, rel=0.1)
    narrow = dataclasses.replace(WORK, head_dim=32, value_dim=32)
    assert time(narrow, device=zen) * 1e3 == pytest.approx(55, rel=0.1)


def test_lowerings_of_torch() -> None:
    small = Work(8, 8, 64, 64, 64, 64)
    assert plain.seconds(WIDE, WORK, "sdpa") < plain.seconds(WIDE, WORK, "dense")
    assert plain.seconds(WIDE, small, "dense") < 2 * plain.seconds(WIDE, small, "sdpa")
    assert plain.seconds(WIDE, WORK, "sdpa", 0.5) < 0.6 * plain.seconds(WIDE, WORK, "sdpa")
    assert plain.seconds(WIDE, WORK, "dense", threads=2) < 0.6 * plain.seconds(WIDE, WORK, "dense")
    uneven = dataclasses.replace(WORK, value_dim=96)
    assert set(plain.features(WIDE, uneven, "sdpa")) == set(plain.features(WIDE, uneven, "dense"))
    assert plain.seconds(WIDE, dataclasses.replace(WORK, dtype="float16"), "dense") > (
        plain.seconds(WIDE, WORK, "dense"))
    with pytest.raises(ValueError, match="lowering must"):
        plain.seconds(WIDE, WORK, "flex")


# -- the fit --------------------------------------------------------------------------------------
def rows_of(device: Cpu, noise: float = 0.0) -> list[Row]:
    found = []
    for i, (n, d) in enumerate([(64, 32), (200, 64), (512, 64), (1024, 128), (2048, 64)]):
        for j, tile in enumerate(cpu_tiles(device, n, n)[::2]):
            work = Work(4, 4, n, n, d, d)
            features = cpu.features(device, work, counted(work, tile), tile)
            error = 1 + noise * (-1) ** (i + j)
            found.append(Row(features, cpu.weigh(device, features) * 1e-9 * error))
    return found


def test_the_fit_finds_what_made_the_times() -> None:
    true = {**cpu.COEFFICIENTS, "fma": 0.6, "score": 3.0, "row": 25.0, "call": 9000.0}
    device = dataclasses.replace(WIDE, coefficients=true)
    found = fit(rows_of(device), cpu.COEFFICIENTS, penalty=1e-9)
    assert found.worst < 1e-3
    assert found.coefficients["fma"] == pytest.approx(0.6, rel=0.02)
    noisy = fit(rows_of(device, 0.03), cpu.COEFFICIENTS)
    assert noisy.mean < 0.05 and noisy.coefficients["fma"] == pytest.approx(0.6, rel=0.15)


def test_what_was_not_measured_keeps_its_prior() -> None:
    rows = rows_of(WIDE)
    found = fit(rows, cpu.COEFFICIENTS).coefficients
    assert found["op"] == cpu.COEFFICIENTS["op"] and found["thread"] == cpu.COEFFICIENTS["thread"]
    # A feature that would be negative is held at a small share of its prior.
    less = [Row(r.features, max(r.seconds - 3e-9 * r.features["row"], 1e-9)) for r in rows]
    assert all(x > 0 for x in fit(less, {**cpu.COEFFICIENTS, "row": 1.0}).coefficients.values())


def test_rows_that_cannot_be_fitted() -> None:
    for rows in ([], [Row({"fma": 1.0}, 0.0)], [Row({"unheard of": 1.0}, 1.0)]):
        with pytest.raises(ValueError, match="must"):
            fit(rows, cpu.COEFFICIENTS)


# -- work -----------------------------------------------------------------------------------------
def test_work_of_a_spec() -> None:
    plain_work = work_of(Spec(logits=E.score * 0.125), (2, 8, 100, 64), (2, 2, 50, 64),
                         (2, 2, 50, 32))
    assert (plain_work.leading, plain_work.owners, plain_work.queries, plain_work.keys) == (
        16, 4, 100, 50)
    assert plain_work.flops == 2 * 16 * 100 * 50 * 96 and plain_work.mask_ops == 0
    assert plain_work.tensor_bytes == 4 * (16 * 100 * 96 + 4 * 50 * 96)
    bias = Operand("bias", ("h", "q", "k"), role="bias")
    spec = Spec(logits=E.score * 0.125 + E.load("bias"), mask=Causal(), operands=(bias,))
    work = work_of(spec, (8, 64, 64), (8, 64, 64), (8, 64, 64), "bfloat16")
    assert work.bias_bytes == 2 and work.score_ops > plain_work.score_ops and work.mask_ops > 0
    assert work.author_ops > plain_work.author_ops and work.score_bytes == 2
    cap = Spec(logits=E.call("tanh", E.score * 0.02) * 50.0)
    assert instructions(cap.logits, cap) > instructions(spec.logits, spec)
    of_rows = Spec(logits=E.score + E.call("exp", E.load("x")), operands=(Operand("x", ("q",)),))
    assert instructions(of_rows.logits, of_rows) == 1  # what varies with rows only is hoisted
    assert work_of(Spec(weights=E.weight * E.stat("count")), (9, 4), (9, 4), (9, 4)).sweeps == 2
    padded = Spec(mask=KeyKeep("pad"), operands=(Operand("pad", ("k",), E.BOOL, "mask"),))
    assert work_of(padded, (9, 4), (9, 4), (9, 4)).mask_ops > 0
    with pytest.raises(ValueError, match="dtype must"):
        Work(1, 1, 1, 1, 1, 1, "int8")
