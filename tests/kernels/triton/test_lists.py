"""Lists of tiles and boxes of grids: pure functions, for which nothing is compiled."""

import math

import pytest
import torch
from torch import Tensor

from attnopt.cost.tiles import count_tiles
from attnopt.ir import expr as E
from attnopt.ir.mask import (
    BlockMap,
    Causal,
    KeyKeep,
    KeyLifetime,
    Mask,
    Neighborhood,
    Placed,
    Segments,
    Select,
    Where,
    Windows,
)
from attnopt.ir.spec import Operand, Spec
from attnopt.ir.tiling import GridTile, Tiling, _computed, members, tile_count
from attnopt.kernels.triton import boxes
from attnopt.kernels.triton.boxes import boxes_of, part_on_grid
from attnopt.kernels.triton.launch import merged
from attnopt.kernels.triton.lists import Lists, recipe, tiles_of, waits
from attnopt.kernels.triton.problem import Problem, describe
from attnopt.kernels.triton.tiles import Tile

TILE = Tile(16, 8, 4, 1)
OPERANDS = {"pad": Operand("pad", ("b", "k"), E.BOOL), "rows": Operand("rows", ("b", "q"), E.INT),
            "keys": Operand("keys", ("b", "k"), E.INT), "blocks": Operand("blocks", None, E.BOOL),
            "keep": Operand("keep", ("b", "q", "k"), E.BOOL)}
RUN_TIME = {
    "padding": KeyKeep("pad"), "padding and causal": KeyKeep("pad") & Causal(),
    "documents": Segments("rows", "keys") & Causal(), "lifetimes": KeyLifetime("keys"),
    "blocks": BlockMap("blocks", 8, 8, ("h",)), "any": Where(E.load("keep", dtype=E.BOOL)),
    "padded grid": KeyKeep("pad") & Neighborhood((3, 3), length=(6, 9))}


def problem_of(mask: Mask, tokens: int, device: str = "cpu") -> tuple[Spec, Problem]:
    made = {"pad": torch.rand(2, 1, 1, tokens) < 0.5,
            "rows": torch.randint(0, 3, (2, 1, tokens, 1)).sort(-2).values,
            "keys": torch.randint(0, tokens, (2, 1, 1, tokens)),
            "blocks": torch.rand(3, -(-tokens // 8), -(-tokens // 8)) < 0.5,
            "keep": torch.rand(2, 1, tokens, tokens) < 0.02}
    made["pad"][:, ..., 8:24] = False
    if "documents" in RUN_TIME and mask == RUN_TIME["documents"]:
        made["keys"] = made["rows"].transpose(-1, -2)
    spec = Spec(mask=mask, operands=tuple(o for n, o in OPERANDS.items() if n in mask.slots))
    inputs = [torch.randn(2, 3, tokens, 8, device=device) for _ in range(3)]
    problem = describe(spec, *inputs, [made[o.slot].to(device) for o in spec.operands])
    assert isinstance(problem, Problem)
    return spec, problem


def rows_of(found: Lists, row: int) -> tuple[list[int], list[int]]:
    full, partial = int(found.tensors["full"][row]), int(found.tensors["partial"][row])
    listed = found.tensors["tiles"][row].tolist()
    return listed[:full], listed[full : full + partial]


def check(spec: Spec, problem: Problem, found: Lists, by: str) -> None:
    """FULL tiles are full, and what is kept is in some tile."""
    tokens = problem.sizes["q"]
    cut: tuple[Tiling, Tiling] = found.boxes or (TILE.rows, TILE.keys)
    named = {o.slot: problem.tensors[f"op_{o.slot}"] for o in spec.operands}
    dense = spec.mask.to_dense(tokens, tokens, (2, 3), named)
    places = [members(tiling, tokens) for tiling in cut]
    if by == "k":
        dense, places, cut = dense.transpose(-1, -2), places[::-1], cut[::-1]
    for b in range(2):
        for h in range(3):
            row = 0
            for axis in found.axes:
                row = row * {"b": 2, "h": 3}[axis] + {"b": b, "h": h}[axis]
            for i in range(tile_count(cut[0], tokens)):
                full, partial = rows_of(found, row * tile_count(cut[0], tokens) + i)
                assert sorted({*full, *partial}) == sorted(full + partial)
                assert full == sorted(full) and partial == sorted(partial)
                for j in range(tile_count(cut[1], tokens)):
                    kept: Tensor = dense[b, h][places[0][i]][:, places[1][j]]
                    if j in full:
                        assert kept.all() and len(set(places[1][j].tolist())) == len(places[1][j])
                    elif j not in partial:
                        assert not kept.any()


@pytest.mark.parametrize("by", ("q", "k"))
@pytest.mark.parametrize("name", RUN_TIME)
def test_lists_from_operands(name: str, by: str) -> None:
    spec, problem = problem_of(RUN_TIME[name], 54)
    found = tiles_of(spec, problem, TILE, by)
    assert found is not None
    check(spec, problem, found, by)
    assert int(found.tensors["partial"].sum() + found.tensors["full"].sum()) < (
        found.tensors["tiles"].numel())


@pytest.mark.parametrize("by", ("q", "k"))
@pytest.mark.parametrize("mask", (
    Neighborhood((7,)), Neighborhood((3, 3), length=(9, 11)), Windows((3, 4), length=(None, 11)),
    Neighborhood((3, 5), (2, 1), (1, 2), (False, True), (None, 11)),
    Neighborhood((2, 3, 3), length=(3, 5, 7)) | Causal(-60),
    Select("h", (Windows((5, 5), length=(9, 11)), Causal(), Neighborhood((5, 3), length=(9, 11))))))
def test_lists_of_sizes(mask: Mask, by: str) -> None:
    part = part_on_grid(mask)
    tokens = 105 if part is not None and len(part.window) == 3 else 99
    spec, problem = problem_of(mask, tokens)
    for shapes in (None, ((4, 4), (2, 4)), ((2, 2, 4), (1, 2, 4))):
        if shapes and (part is None or len(shapes[0]) != len(part.window)):
            continue
        length = {2: (9, 11), 3: (3, 5, 7)}[len(shapes[0])] if shapes else ()
        given = tuple(GridTile(length, s) for s in shapes) if shapes else None
        found = tiles_of(spec, problem, TILE, by, given)
        assert found is not None and (given is None or found.boxes == given)
        check(spec, problem, found, by)


def test_static_lists_are_made_once() -> None:
    spec, problem = problem_of(Neighborhood((7,)), 40)
    assert tiles_of(spec, problem, TILE, "q") is tiles_of(spec, problem, TILE, "q")
    spec, problem = problem_of(KeyKeep("pad"), 40)
    assert tiles_of(spec, problem, TILE, "q") is not tiles_of(spec, problem, TILE, "q")


def test_interval_rules_need_no_lists() -> None:
    for mask in (Causal(), Causal() & Windows((100,)) | Causal()):
        spec, problem = problem_of(mask, 40)
        assert (recipe(spec, problem, TILE, "q") is None) == (mask == Causal())


@pytest.mark.parametrize("name", [n for n, m in RUN_TIME.items() if not waits(m.predicate())])
def test_nothing_is_read_back_from_the_device(name: str) -> None:
    """A tensor without values has lists of the right shape."""
    spec, problem = problem_of(RUN_TIME[name], 54, "meta")
    found = tiles_of(spec, problem, TILE, "q")
    assert found is not None and found.tensors["tiles"].is_meta
    assert found.tensors["tiles"].shape[0] == found.tensors["full"].shape[0]


def test_only_tables_and_floats_are_waited_for() -> None:
    assert {n for n, m in RUN_TIME.items() if waits(m.predicate())} == {"blocks"}
    assert waits(E.load("bias") < E.const(0.0))


def test_boxes_of_published_cases() -> None:
    flux, video = (256, 256), (30, 48, 80)
    for mask, length, cost in (
            (Neighborhood((80, 80), length=flux), flux, 1.44),
            (Neighborhood((18, 24, 24), length=video), video, 2.13)):
        tokens = math.prod(length)
        found = boxes_of(mask, tokens, tokens, 128, 64)
        assert found is not None and [b.size for b in found] == [128, 64]
        counts = count_tiles(mask, tokens, tokens, *found, tail=True)
        work = 64 * 128 * int(counts.full.sum() + 1.5 * counts.partial.sum())
        # relative to the scores that are kept; the best shapes of a search by hand
        assert work / (tokens * math.prod(mask.window)) <= cost


def test_boxes_are_not_taken_where_runs_do() -> None:
    for mask, tokens in ((Neighborhood((7,)), 49), (Neighborhood((3, 3), length=(5, 5)), 25),
                         (Windows((5, 5), length=(5, 5)), 25),
                         (Neighborhood((3, 3), length=(None, 7)), 50),
                         (Placed(Neighborhood((3, 3), length=(8, 8)), (0, 64), (0, 64)), 80)):
        assert boxes_of(mask, tokens, tokens, 16, 16) is None
    assert part_on_grid(Causal() & Neighborhood((3, 3), length=(8, 8))) is not None


def test_names_of_constants_are_those_of_the_text() -> None:
    pair = GridTile((4, 5, 6), (2, 2, 4)), GridTile((4, 5, 6), (1, 4, 4))
    known = boxes.constants(pair)
    assert tuple(known) == boxes.names(3) and boxes.names(0) == ()
    assert (known["N2"], known["QB0"], known["KC1"], known["KC2"]) == (6, 2, 2, 2)


def test_leading_axes_become_one_where_they_can() -> None:
    spec = Spec()

    def of(key: Tensor) -> tuple[int, int] | None:
        problem = describe(spec, torch.randn(2, 3, 20, 8), key, torch.randn(2, 3, 20, 8), ())
        assert isinstance(problem, Problem)
        return merged(problem, "key")

    assert of(torch.randn(2, 3, 20, 8)) == (6, 160)
    assert of(torch.randn(2, 1, 20, 8)) == (2, 160)
    assert of(torch.randn(1, 1, 20, 8)) == (1, 160)
    assert of(torch.randn(2, 20, 3, 8).transpose(1, 2)) is None
    assert of(torch.randn(1, 20, 3, 8).transpose(1, 2)) == (3, 8)
    assert of(torch.randn(3, 2, 20, 8).transpose(0, 1)) is None


def test_members_on_a_device_are_those_of_the_cpu() -> None:
    for tiling, tokens in ((GridTile((5, 7, 9), (2, 4, 4)), 315), (GridTile((11,), (4,)), 11)):
        assert _computed(tiling, torch.device("cpu")).equal(members(tiling, tokens))
