"""Tile states: proofs against the dense mask, exactness where it is promised, lists, tilings."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.extremes import box_extremes
from attnopt.ir.intervals import (
    EMPTY,
    FULL,
    PARTIAL,
    GridTile,
    Tiling,
    tile_count,
    tile_lists,
    tile_size,
    tile_states,
)
from attnopt.ir.mask import (
    ALL,
    Band,
    BlockMap,
    Causal,
    Globals,
    KeyKeep,
    KeyLifetime,
    Mask,
    Neighborhood,
    Placed,
    Prefix,
    Regions,
    Reindex,
    Segments,
    Select,
    Where,
    Windows,
)
from attnopt.ir.tiling import members, tilings_of

q, k, h = E.index("q"), E.index("k"), E.index("h")
Q, K = 22, 26
OPERANDS = {
    "pad": torch.arange(K).remainder(7).ne(3) & (torch.arange(K) < 21),
    "batch_pad": torch.arange(K) < torch.tensor([5, 26]).view(2, 1, 1, 1),
    "death": torch.arange(K) * 5 % 11 + torch.arange(K),
    "rows": torch.arange(Q)[:, None] // 5, "keys": torch.arange(K) // 4,
    "blocks": (torch.arange(2 * 8 * 7).view(2, 8, 7) * 7 % 5 > 1),
    "ids": torch.tensor([0, 0, 1, 1, 1, 2, 0, 0, 2, 2, 1, 3] * 3),
    "ints": torch.tensor([3, -2, 7, 7, 0, 1, -9, 4]),
    "dense": torch.rand(Q, K, generator=torch.Generator().manual_seed(0)) < 0.8,
    "bias": torch.tensor([0.0, -math.inf, 1.0, math.nan, -3.5, 0.0, 0.0] * 4)[:K],
    "table": torch.linspace(-2, 2, 60),
}


def read_states(dense: Tensor, block_q: Tiling, block_k: Tiling) -> Tensor:
    """The states of a mask that is written out."""
    rows, keys = members(block_q, dense.shape[-2]), members(block_k, dense.shape[-1])
    tiles = dense[..., rows[:, None, :, None], keys[None, :, None, :]].flatten(-2)
    return torch.where(tiles.all(-1), FULL, torch.where(tiles.any(-1), PARTIAL, EMPTY))


def check(predicate: Expr, block_q: Tiling, block_k: Tiling, leading: tuple[int, ...] = (),
          rows: int = Q, keys: int = K) -> float:
    """Asserts that EMPTY and FULL are true; the share of tiles with the best possible answer."""
    kept = torch.as_tensor(evaluate(predicate, Env((*leading, rows, keys), OPERANDS)))
    expected = read_states(kept.bool().expand(*leading, rows, keys), block_q, block_k)
    found = tile_states(predicate, rows, keys, block_q, block_k, leading, OPERANDS)
    assert found.dtype == torch.int8 and found.dim() == len(leading) + 2
    found = found.expand_as(expected)
    assert ((found == expected) | (found == PARTIAL)).all(), (str(predicate), found, expected)
    return float((found == expected).double().mean())


EXACT: list[Mask] = [
    ALL, ~ALL, Causal(), Causal(-2), Causal(E.size("k") - E.size("q")), Band(-3, 0), Band(2, 9),
    Band(-300, -5), Prefix(3), Globals(2), KeyKeep("pad"), KeyKeep("batch_pad"),
    Windows(4), Windows(7), ~(Causal() | Prefix(4)), Segments("rows", "keys"),
    Where(E.load("dense", dtype=E.BOOL)), BlockMap("blocks", 3, 4, ("h",)),
    Select("h", (Causal(), Prefix(5))),
    Where(E.load("bias") > -4.0), Where((k % 3).eq(1) & KeyKeep("pad").predicate()),
    Where(E.load("ints", q // 4, dtype=E.INT) > 2),
    Where(abs_ := E.call("abs", q - k) <= 5), Where(~abs_),
]
SOUND: list[Mask] = [
    Placed(Causal(), (4, 15), (3, 19)), KeyLifetime("death"), Causal() & KeyKeep("pad"),
    (Band(-2, 0) | Prefix(1)) & KeyKeep("pad"),
    Where((q + k) % 3 < 2), Regions(E.load("ids", q, dtype=E.INT)),
    Reindex((q - 2) % E.size("q"), Windows(4) & Causal()),
    Select(E.load("ids", h, dtype=E.INT), (Causal(), ALL)),
    Where(E.load("table", q - k + 25) < 0.5), Where(E.load("table", q * 2 + k) <= k),
    Where(E.load("bias") + q < 3.0), Where(E.call("isnan", E.load("bias")) | (q < k)),
    Where(E.score > 0.0), Where(E.stat("count") > k),
    Where(E.call("maximum", E.load("bias"), -E.load("table", q)) < 0.0),
]
BLOCKS = [(1, 1), (4, 4), (3, 5), (8, 4), (2, 16), (16, 2), (32, 32)]


@pytest.mark.parametrize("mask", EXACT, ids=str)
def test_states_that_are_exact(mask: Mask) -> None:
    for block_q, block_k in BLOCKS:
        if not (isinstance(mask, BlockMap) and 12 % block_q and 12 % block_k):
            assert check(mask.predicate(), block_q, block_k, (2, 2)) == 1.0, (block_q, block_k)


@pytest.mark.parametrize("mask", SOUND, ids=str)
def test_states_that_are_proofs(mask: Mask) -> None:
    for block_q, block_k in BLOCKS:
        if not (mask.predicate().has("score") or mask.predicate().has("stat")):
            check(mask.predicate(), block_q, block_k, (2,))
        else:
            found = tile_states(mask.predicate(), Q, K, block_q, block_k)
            assert (found == PARTIAL).all()


@settings(max_examples=60)
@given(st.integers(2, 6), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.integers(0, 9),
       st.integers(1, 6), st.integers(1, 6))
def test_neighbourhoods_on_a_line(window: int, stride: int, dilation: int, causal: bool, more: int,
                                  block_q: int, block_k: int) -> None:
    n = window * dilation + more
    made = Neighborhood(window, min(stride, window), dilation, causal, n).predicate()
    share = check(made, block_q, block_k, (), n, n)
    assert share == 1.0 or dilation > 1 or causal


@settings(max_examples=40)
@given(st.data())
def test_boxes_of_a_grid_are_exact(data: st.DataObject) -> None:
    length = tuple(data.draw(st.lists(st.integers(3, 6), min_size=2, max_size=3)))
    window = tuple(data.draw(st.integers(2, n)) for n in length)
    stride = tuple(data.draw(st.integers(1, w)) for w in window)
    tiles = [GridTile(length, tuple(data.draw(st.integers(1, 4)) for _ in length))
             for _ in range(2)]
    n = math.prod(length)
    for mask in (Neighborhood(window, stride, length=length), Windows(window, length)):
        assert check(mask.predicate(), *tiles, (), n, n) == 1.0
        check(mask.predicate(), 4, tiles[1], (), n, n)
        check(mask.predicate() & (k <= q), tiles[0], 3, (), n, n)


# -- random predicates ----------------------------------------------------------------------------
_leaves = st.integers(-9, 9).map(E.const) | st.sampled_from([
    q, k, h, E.size("q"), E.size("k"), E.load("ids", q, dtype=E.INT), E.load("rows", dtype=E.INT),
    E.load("keys", dtype=E.INT), E.load("death", dtype=E.INT), E.load("pad", dtype=E.BOOL),
    E.load("dense", dtype=E.BOOL), E.load("bias"), E.load("ints", k % 8, dtype=E.INT),
    E.load("table", q + k), E.load("ints", q - k, dtype=E.INT),
    E.load("blocks", h, q // 3, k // 4, dtype=E.BOOL)])
_OPS = ("add", "sub", "mul", "neg", "abs", "minimum", "maximum", "floordiv", "mod", "where", "and",
        "or", "xor", "not", "lt", "le", "eq", "ne", "bool", "isnan", "int", "float")


def _grow(children: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
    def build(picked: tuple[str, Expr, Expr, Expr, int]) -> Expr:
        op, a, b, c, n = picked
        if op in ("floordiv", "mod"):  # by a positive number, or by one that is never 0
            b = E.const(n) if n > 2 or b.dtype != E.INT else E.call("abs", b) + n
            a = a if a.dtype == E.INT else E.const(n) + q
        if op == "int" and a.dtype == E.FLOAT:
            a = a < 1.0  # a nan has no int
        return E.call(op, *(a, b, c)[: E._ARITY.get(op, 2)])
    return st.tuples(st.sampled_from(_OPS), children, children, children,
                     st.integers(1, 6)).map(build)


@settings(max_examples=250)
@given(st.recursive(_leaves, _grow, max_leaves=14), st.sampled_from(BLOCKS))
def test_random_predicates(made: Expr, blocks: tuple[int, int]) -> None:
    check(made if made.dtype == E.BOOL else made.ne(0), *blocks, (2,))


def test_half_precision_of_a_converted_index_is_no_proof() -> None:
    # 2049 is 2048 in float16: neither side of the border may be claimed.
    made = k * 1.0 < 2048.5
    for block in (1, 4):
        found = tile_states(made, 1, 4096, 1, block)[0]
        kept = torch.arange(4096).half() < 2048.5
        expected = read_states(kept[None], 1, block)[0]
        assert ((found == expected) | (found == PARTIAL)).all()
        assert (found != PARTIAL).any()


def test_wrong_arguments_are_refused() -> None:
    for wrong in (lambda: tile_states(q + k, 4, 4, 2, 2), lambda: tile_states(q < k, 4, 4, 0, 2),
                  lambda: tile_states(q < k, 4, 4, GridTile((3, 2), (1, 1)), 2),
                  lambda: tile_states(E.load("x", dtype=E.BOOL), 4, 4, 2, 2),
                  lambda: tile_states(E.load("x", q, k, dtype=E.BOOL), 4, 4, 2, 2, (),
                                      {"x": torch.ones(4, dtype=torch.bool)})):
        with pytest.raises(ValueError, match="must"):
            wrong()


def test_missing_operands_hold_anything() -> None:
    made = (Causal() & KeyKeep("absent")).predicate()
    assert tile_states(made, 8, 8, 4, 4, missing=True).tolist() == [[PARTIAL, EMPTY], [PARTIAL] * 2]
    made = E.load("absent", q // 2, dtype=E.INT) % 4 < k
    assert tile_states(made, 8, 8, 4, 4, missing=True).tolist() == [[PARTIAL, FULL]] * 2


def test_leading_axes_that_do_not_vary_have_length_one() -> None:
    assert tile_states(Causal().predicate(), 8, 8, 4, 4, (3, 2)).shape == (1, 1, 2, 2)
    assert tile_states(Where(k <= q + h).predicate(), 8, 8, 4, 4, (3, 2)).shape == (1, 2, 2, 2)
    found = tile_states(KeyKeep("batch_pad").predicate(), Q, K, 8, 8, (2, 3), OPERANDS)
    assert found.shape == (2, 1, 3, 4) and found[0, 0, 0].tolist() == [PARTIAL, 0, 0, 0]
    assert tile_states(ALL.predicate(), 0, 8, 4, 4).shape == (0, 2)


def test_long_sequences_need_no_square() -> None:
    n = 1 << 20
    made = (Band(-4096, 0) & Where(k < 900_000)).predicate()
    states = tile_states(made, n, n, 1 << 14, 1 << 14)
    assert states.shape == (64, 64)
    assert tile_lists(states[0:0]).tiles.numel() == 0
    # The window reaches back one tile less a token; the last tokens of 900,000 are in tile 54.
    assert tile_lists(states).row(30) == ([], [29, 30]) and tile_lists(states).row(63) == ([], [])


# -- lists ----------------------------------------------------------------------------------------
@settings(max_examples=60)
@given(st.data())
def test_lists_hold_what_the_states_say(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4)))
    numbers = data.draw(st.lists(st.sampled_from([EMPTY, PARTIAL, FULL]), min_size=math.prod(shape),
                                 max_size=math.prod(shape)))
    states = torch.tensor(numbers, dtype=torch.int8).view(shape)
    made = tile_lists(states)
    assert made.starts.dtype == made.partial.dtype == made.tiles.dtype == torch.int32
    assert made.starts.shape == (*shape[:-2], shape[-2] + 1) and made.partial.shape == shape[:-1]
    for place in itertools.product(*map(range, shape[:-1])):
        row = states[place]
        assert made.row(*place) == ((row == FULL).nonzero().flatten().tolist(),
                                    (row == PARTIAL).nonzero().flatten().tolist())
        a, b = int(made.starts[place]), int(made.partial[place])
        assert (made.kinds[a:b] == FULL).all()
    assert int((made.kinds == PARTIAL).sum()) == int((states == PARTIAL).sum())


def test_lists_of_a_causal_mask() -> None:
    states = tile_states(Causal().predicate(), 8, 8, 2, 4)
    assert [tile_lists(states).row(i) for i in range(4)] == [
        ([], [0]), ([], [0]), ([0], [1]), ([0], [1])]
    assert tile_lists(states.transpose(-1, -2)).row(0) == ([2, 3], [0, 1])


# -- tilings and tables ---------------------------------------------------------------------------
def test_every_token_is_in_one_tile() -> None:
    grids = (GridTile((5, 6), (2, 4)), 30), (GridTile((3, 2, 4), (2, 2, 3)), 24)
    for tiling, n in ((4, 10), *grids):
        found = members(tiling, n)
        assert found.shape == (tile_count(tiling, n), tile_size(tiling))
        own = [set(row.tolist()) for row in found]
        assert sum(map(len, own)) == n and set().union(*own) == set(range(n))
    assert members(GridTile((4, 4), (2, 2)), 16)[1].tolist() == [2, 3, 6, 7]
    assert str(GridTile((4, 4), (2, 2))) == "2x2"


def test_boxes_of_a_size() -> None:
    made = tilings_of((6, 100), 32)
    assert {t.shape for t in made} == {(1, 32), (2, 16), (4, 8), (8, 4)}
    assert all(t.size == 64 for t in tilings_of((30, 48, 80), 64))
    with pytest.raises(ValueError, match="shape must"):
        GridTile((4, 4), (2,))
    with pytest.raises(ValueError, match="shape must"):
        GridTile((4,), (0,))


@settings(max_examples=60)
@given(st.data())
def test_extremes_of_boxes(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=3)))
    table = torch.arange(math.prod(shape)).mul(37).remainder(23).view(shape)
    first = [torch.tensor(data.draw(st.lists(st.integers(0, n - 1), min_size=4, max_size=4)))
             for n in shape]
    last = [f + torch.tensor(data.draw(st.lists(st.integers(0, 9), min_size=4, max_size=4)))
            for f in first]
    low, high = box_extremes(table, table, first, last)
    for i in range(4):
        box = table[tuple(slice(int(a[i]), int(b[i]) + 1)
                          for a, b in zip(first, last, strict=True))]
        assert (int(low[i]), int(high[i])) == (int(box.min()), int(box.max()))
