"""Boxes of queries in the cost model, and tiles for masks whose operands only the run tells."""

import math

import pytest
import torch

from attnopt.cost.choose import Candidate, choose, is_gathered, refused
from attnopt.cost.cpu import features
from attnopt.cost.cpu_tiles import best_boxes, boxed_tiles, fits
from attnopt.cost.devices import find_cpu
from attnopt.cost.tiles import count_halos
from attnopt.cost.typical import typical_operands
from attnopt.cost.work import instructions, work_of
from attnopt.ir import expr as E
from attnopt.ir.halos import grid_of, halos
from attnopt.ir.mask import BlockMap, Causal, Mask, Neighborhood, Reindex, Segments, Windows
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.choosing import Problem, Tables, estimates, legal_tiles

CPU = find_cpu("Intel(R) Xeon(R) Processor @ 2.50GHz", "avx512")
MAP = Neighborhood((7, 7), length=(28, 28))
IDS = (Operand("own", ("b", "q"), E.INT), Operand("other", ("b", "k"), E.INT))
SHAPE = (1, 2, 784, 32)


def problem(spec: Spec, shape: tuple[int, ...] = SHAPE, **given: object) -> Problem:
    return Problem(spec, shape, shape, shape, threads=1, **given)


def test_counts_are_those_of_the_lists() -> None:
    found = halos(MAP, 784, 784, (4, 7))
    counts = count_halos(MAP, 784, 784, (4, 7), 32)
    assert found is not None and counts is not None
    seen = found.starts.diff()
    assert torch.equal(counts.visited, -(-seen // 32))
    assert torch.equal(counts.full, found.full // 32)
    assert count_halos(Causal(), 784, 784, (4, 7), 32) is None


def test_boxes_follow_the_window() -> None:
    for mask, sides in ((MAP, 2), (Windows((7, 4), (28, 28)), 2),
                        (Neighborhood((3, 3, 3), length=(4, 14, 14)), 3)):
        grid = grid_of(mask, 784, 784)
        assert grid is not None
        boxes = best_boxes(mask, grid, 32)
        assert boxes and all(len(box) == sides for box in boxes)
    partition = grid_of(Windows((7, 4), (28, 28)), 784, 784)
    assert partition is not None
    # A box that is a window, or whole ones, sees nothing but itself.
    assert all(28 % b == 0 and (b % w == 0 or w % b == 0) for box in best_boxes(
        Windows((7, 4), (28, 28)), partition, 32)[:1] for b, w in zip(box, (7, 4), strict=True))


def test_tiles_of_boxes_are_legal() -> None:
    found = boxed_tiles(CPU, [(4, 7), (3, 3, 5)])
    assert found
    for rows, keys, mr, nv, *box in found:
        assert rows % mr == 0 and math.prod(box) <= rows and fits(32, mr, nv)
        assert not refused(Candidate("cpp", (rows, keys, mr, nv, *box)), CPU)
    assert "box must have at most 12" in refused(Candidate("cpp", (12, 64, 6, 4, 4, 4)), CPU)


def test_a_box_without_halos_is_refused() -> None:
    work = work_of(Spec(mask=Causal()), SHAPE, SHAPE, SHAPE)
    tile = Candidate("cpp", (28, 64, 4, 4, 4, 7))
    assert is_gathered(tile) and not is_gathered(Candidate("cpp", (28, 64, 4, 4)))
    (found,) = choose([tile], work, Causal(), CPU).table
    assert "no halos" in found.reason


def test_gathering_is_counted() -> None:
    work = work_of(Spec(mask=MAP), SHAPE, SHAPE, SHAPE)
    counts = count_halos(MAP, 784, 784, (4, 7), 64)
    assert counts is not None
    found = features(CPU, work, counts, (28, 64, 14, 2, 4, 7))
    assert found["gather"] == 2 * int(counts.visited.sum()) * 64 * 64
    assert found["pack"] == 0


def test_what_depends_on_keys_alone_is_computed_once_a_tile() -> None:
    q, k = E.index("q"), E.index("k")
    spec = Spec()
    assert instructions(k // 7 <= k % 9, spec) < instructions(q // 7 <= q - k, spec) + 2
    assert instructions((q - k) % 5 <= 2, spec) > 14


def test_a_model_of_its_own_is_taken_at_its_word() -> None:
    work = work_of(Spec(mask=MAP), SHAPE, SHAPE, SHAPE)
    given = [Candidate("cpp:other", (1, 2), seconds=1e-9), Candidate("cpp", (28, 64, 4, 4))]
    best = choose(given, work, MAP, CPU).best
    assert best is not None and best.candidate.lowering == "cpp:other" and best.seconds == 1e-9


def test_typical_operands() -> None:
    spec = Spec(mask=Segments("own", "other") & Causal(), operands=IDS)
    found = typical_operands(spec, 16, 24, (2, 3))
    assert found["own"].shape == (16, 1) and found["other"].shape == (1, 24)
    assert found["other"].unique().numel() == 8
    assert typical_operands(spec, 16, 24, (2, 3), ["own"]).keys() == {"other"}
    blocks = Spec(mask=BlockMap("keep", 4, 8, ("h",)),
                  operands=(Operand("keep", None, E.BOOL, "mask"),))
    assert typical_operands(blocks, 16, 20, (2, 3))["keep"].shape == (3, 4, 3)
    assert not typical_operands(Spec(mask=MAP), 784, 784, (1, 2))


@pytest.mark.parametrize("mask", [Segments("own", "other"), Segments("own", "other") & Causal()])
def test_documents_get_tiles_that_they_leave_out(mask: Mask) -> None:
    shape = (1, 8, 4096, 64)
    found = estimates(problem(Spec(mask=mask, operands=IDS), shape), ("cpp",))
    assert found.best is not None and found.best.candidate.tile[0] <= 96
    # The time is that of a mask which hides nothing whole: no promise is made.
    dense = estimates(problem(Spec(), shape), ("cpp",)).best
    assert dense is not None and (mask != Segments("own", "other")
                                  or found.best.seconds >= dense.seconds)


def test_tables_that_are_known_are_counted() -> None:
    spec = Spec(mask=BlockMap("keep", 64, 64), operands=(Operand("keep", None, E.BOOL, "mask"),))
    shape = (1, 8, 2048, 64)
    keep = torch.eye(32, dtype=torch.bool)
    unknown, known = (estimates(problem(spec, shape, tables=tables), ("cpp",)).best
                      for tables in (Tables(), Tables({"keep": keep})))
    assert unknown is not None and known is not None and known.seconds < unknown.seconds / 5
    assert any(tile[0] == 64 for tile in legal_tiles(problem(spec, shape), False))
    assert Tables({"keep": keep}) == Tables({"keep": keep}) != Tables({"keep": keep.clone()})


def test_orders_without_axes_are_asked_for_few_boxes() -> None:
    rolled = Reindex((E.index("q") + 5) % E.size("q"), Windows((7, 7), (28, 28)))
    assert any(len(t) > 4 for t in legal_tiles(problem(Spec(mask=rolled)), False))
