"""Mask: every node against a brute force over (head, row, key); algebra, text and proofs."""

import copy
import itertools
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnopt.ir import expr as E
from attnopt.ir.mask import (
    ALL,
    NODES,
    NONE,
    And,
    Band,
    BlockMap,
    Causal,
    Globals,
    KeyKeep,
    KeyLifetime,
    Mask,
    Neighborhood,
    Not,
    Or,
    Placed,
    Prefix,
    Regions,
    Reindex,
    Segments,
    Select,
    Where,
    Windows,
    parse_mask,
)

q, k, h = E.index("q"), E.index("k"), E.index("h")
SIZE_Q, SIZE_K = E.size("q"), E.size("k")
OPERANDS = {
    "pad": torch.tensor([1, 0, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1]).bool(),
    "death": torch.tensor([3, 9, 4, 5, 12, 7, 8, 12, 9, 12, 12, 12]),
    "rows": torch.arange(12)[:, None] // 5, "keys": torch.arange(12) // 4,
    "blocks": (torch.arange(2 * 4 * 3).view(2, 4, 3) * 7 % 5 > 1),
    "ids": torch.tensor([0, 0, 1, 1, 1, 2, 0, 0, 2, 2, 1, 3]),
    "route": torch.tensor([1, 0]),
}
#: node, what it keeps at (head, row, key) among 12 rows and keys, its phrase
CASES: list[tuple[Mask, Callable[[int, int, int], bool], str]] = [
    (ALL, lambda h, i, j: True, "none"),
    (NONE, lambda h, i, j: False, "nothing kept"),
    (Causal(), lambda h, i, j: j <= i, "causal"),
    (Causal(-2), lambda h, i, j: j <= i - 2, "causal (offset -2)"),
    (Causal(SIZE_K - SIZE_Q), lambda h, i, j: j <= i, "causal (ends aligned)"),
    (Band(-3, 0), lambda h, i, j: i - 3 <= j <= i, "causal window 4"),
    (Band(-2, 2), lambda h, i, j: abs(i - j) <= 2, "window 5"),
    (Band(-1, 3), lambda h, i, j: -1 <= j - i <= 3, "band -1..3"),
    (Neighborhood(5), lambda h, i, j: j in _near(i, 12, 5, 1, 1, False), "window 5"),
    (Neighborhood((3, 4), (1, 2), (1, 1), (False, True), (None, 4)),
     lambda h, i, j: (j // 4 in _near(i // 4, 3, 3, 1, 1, False)
                      and j % 4 in _near(i % 4, 4, 4, 2, 1, True)), "window 3x4 stride 1x2 causal"),
    (Neighborhood(3, 2, 3, False, 12),
     lambda h, i, j: j in _near(i, 12, 3, 2, 3, False), "window 3 stride 2 dilation 3"),
    (Windows(4), lambda h, i, j: i // 4 == j // 4, "partition 4"),
    (Windows((2, 3), (2, 6)), lambda h, i, j: i // 6 // 2 == j // 6 // 2
     and i % 6 // 3 == j % 6 // 3, "partition 2x3"),
    (Segments("rows", "keys"), lambda h, i, j: i // 5 == j // 4, "segments"),
    (Prefix(3), lambda h, i, j: j < 3, "prefix 3"),
    (Globals(2), lambda h, i, j: i < 2 or j < 2, "globals 2"),
    (KeyKeep("pad"), lambda h, i, j: bool(OPERANDS["pad"][j]), "padding"),
    (KeyLifetime("death"), lambda h, i, j: j <= i < OPERANDS["death"][j], "key lifetime"),
    (BlockMap("blocks", 3, 4, ("h",)),
     lambda h, i, j: bool(OPERANDS["blocks"][h, i // 3, j // 4]), "blocks 3x4"),
    (Where((q + k) % 3 < 2), lambda h, i, j: (i + j) % 3 < 2, "computed"),
    (Select("h", (Causal(), Prefix(5))), lambda h, i, j: j <= i if h == 0 else j < 5,
     "by h: causal, prefix 5"),
    (Select(E.load("route", h, dtype=E.INT), (Causal(), ALL)),
     lambda h, i, j: h == 0 or j <= i, "by (load_int route h): causal, none"),
    (Placed(Causal(), (4, SIZE_Q), (4, SIZE_K)), lambda h, i, j: i >= 4 and 4 <= j <= i,
     "causal in [4:#q, 4:#k]"),
    (Placed(Neighborhood(3), (2, 9), (2, 9)),
     lambda h, i, j: 2 <= i < 9 and 2 <= j < 9 and j - 2 in _near(i - 2, 7, 3, 1, 1, False),
     "window 3 in [2:9, 2:9]"),
    (Reindex((q - 2) % SIZE_Q, Windows(4) & Causal()),
     lambda h, i, j: (i - 2) % 12 // 4 == (j - 2) % 12 // 4 and (j - 2) % 12 <= (i - 2) % 12,
     "causal & partition 4, reordered"),
    (Regions(E.load("ids", q, dtype=E.INT), -100.0),
     lambda h, i, j: bool(OPERANDS["ids"][i] == OPERANDS["ids"][j]), "regions"),
    (Causal() & KeyKeep("pad"), lambda h, i, j: j <= i and bool(OPERANDS["pad"][j]),
     "causal & padding"),
    ((Band(-2, 0) | Prefix(1)) & KeyKeep("pad"),
     lambda h, i, j: (i - 2 <= j <= i or j < 1) and bool(OPERANDS["pad"][j]),
     "padding & (causal window 3 | prefix 1)"),
    (~(Causal() | Prefix(4)), lambda h, i, j: j > i and j >= 4, "not (causal | prefix 4)"),
]
IDS = [phrase for _, _, phrase in CASES]


def _near(i: int, n: int, w: int, s: int, d: int, causal: bool) -> set[int]:
    """Generalised neighbourhood along one axis, by searching: w keys of the dilation group."""
    members = list(range(i % d, n, d))
    p = members.index(i)
    group = [m for m in range(len(members)) if m // s == p // s]
    if causal:
        leader = min(p // s * s + s - 1, len(members) - 1)
        return {members[r] for r in range(len(members)) if leader - w < r <= p}
    leader = min(group[0] + s // 2, len(members) - 1)
    starts = [a for a in range(len(members) - w + 1)]
    start = min(starts, key=lambda a: abs(a + w // 2 - leader))
    return set(members[start : start + w])


@pytest.mark.parametrize(("mask", "keeps", "phrase"), CASES, ids=IDS)
def test_a_node_keeps_what_its_definition_says(
        mask: Mask, keeps: Callable[[int, int, int], bool], phrase: str) -> None:
    expected = torch.tensor([[[keeps(a, i, j) for j in range(12)] for i in range(12)]
                             for a in range(2)])
    assert torch.equal(mask.to_dense(12, 12, (2,), OPERANDS), expected)
    assert mask.describe() == phrase
    assert mask.slots <= set(OPERANDS)
    if not mask.row_always_kept(True):
        return
    assert expected.any(-1).all()


@pytest.mark.parametrize("mask", [m for m, _, _ in CASES], ids=IDS)
def test_text_is_read_back(mask: Mask) -> None:
    assert parse_mask(str(mask)) == mask and str(parse_mask(str(mask))) == str(mask)
    assert hash(parse_mask(str(mask))) == hash(mask)
    assert pickle.loads(pickle.dumps(mask)) == mask and copy.deepcopy(mask) == mask


def test_every_node_is_tested() -> None:
    assert {m.name for mask, _, _ in CASES for m in mask.walk()} == set(NODES)


@pytest.mark.parametrize("text", ["", "(", "(causal", "(causal 0) x", "(causal 0 1)", "(foo 1)",
                                  "(band [0] 1", "(windows [4] [x])", "[causal]", "((all))",
                                  "(where q)"])
def test_text_that_is_no_mask_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_mask(text)


@pytest.mark.parametrize("make", [
    lambda: Neighborhood((3, 3), length=(None, None)), lambda: Neighborhood(3, 4),
    lambda: Neighborhood(3, 1, 5, False, 12), lambda: Neighborhood((3, 3), (1,), length=(4, 4)),
    lambda: Windows((2, 2)), lambda: BlockMap("b", 0, 4), lambda: Where(q), lambda: Select("h", ()),
    lambda: Select(E.score, (ALL,)), lambda: Select("x", (ALL,))])
def test_masks_that_cannot_be_are_refused(make: Callable[[], Mask]) -> None:
    with pytest.raises(ValueError, match="must"):
        make()


def test_the_truth_of_a_mask_is_not_known() -> None:
    with pytest.raises(TypeError, match="truth of mask"):
        bool(Causal())
    with pytest.raises(TypeError):
        _ = Causal() and ALL


# -- algebra ----------------------------------------------------------------------------------
LEAVES = [ALL, NONE, Causal(), Causal(2), Band(-2, 1), Prefix(2), KeyKeep("pad"), Windows(4),
          Where(q % 2 < k % 3)]
STEPS: list[Callable[[Mask, Mask], Mask]] = [
    lambda a, b: a & b, lambda a, b: a | b, lambda a, b: ~a & b, lambda a, b: ~(a | b),
    lambda a, b: (a & b) | (~a & ~b)]


@st.composite
def masks(draw: st.DrawFn) -> Mask:
    mask = draw(st.sampled_from(LEAVES))
    for step in draw(st.lists(st.sampled_from(STEPS), max_size=4)):
        mask = step(mask, draw(st.sampled_from(LEAVES)))
    return mask


def dense(mask: Mask) -> torch.Tensor:
    return mask.to_dense(12, 12, (), OPERANDS)


@settings(max_examples=150)
@given(masks(), masks(), masks())
def test_laws(a: Mask, b: Mask, c: Mask) -> None:
    assert a & b == b & a and a | b == b | a
    assert (a & b) & c == a & (b & c) and (a | b) | c == a | (b | c)
    assert a & a == a and a | a == a and ~~a == a
    assert a & ALL == a and a | ALL == ALL and a & NONE == NONE and a | NONE == a
    assert a & ~a == NONE and a | ~a == ALL
    assert torch.equal(dense(a & b), dense(a) & dense(b))
    assert torch.equal(dense(a | b), dense(a) | dense(b))
    assert torch.equal(dense(~a), ~dense(a))
    assert parse_mask(str(a & ~b | c)) == a & ~b | c
    for mask in (a & b, a | b):
        assert not any(isinstance(m, type(mask)) for m in mask.children())


def test_combinations_are_flat_and_ordered() -> None:
    made = KeyKeep("pad") & Causal() & KeyKeep("pad") & ALL & Prefix(9)
    assert made == And((Causal(), KeyKeep("pad"), Prefix(9)))
    assert str(made) == "(and [(causal 0) (key_keep pad) (prefix 9)])"
    assert Causal() | Prefix(1) == Or((Causal(), Prefix(1))) and ~ALL == NONE == Not(ALL)
    assert Where(E.TRUE) & Causal() == Causal() and Where(E.FALSE) & Causal() == NONE
    assert made.axes == {"q", "k"} and KeyKeep("pad").axes == {"k"}
    assert Select("h", (ALL, Causal())).axes == {"h", "q", "k"}


# -- proofs -----------------------------------------------------------------------------------
@pytest.mark.parametrize(("mask", "always", "within"), [
    (ALL, True, True), (NONE, False, False), (Causal(), True, True), (Causal(3), True, True),
    (Causal(-1), False, False), (Causal(SIZE_K - SIZE_Q), False, True),
    (Band(-3, 0), False, True), (Band(-3, -1), False, False), (Prefix(1), True, True),
    (Prefix(0), False, False), (Globals(1), True, True), (Neighborhood(3), False, True),
    (Windows(4), False, True), (KeyKeep("pad"), False, False), (KeyLifetime("d"), False, False),
    (Causal() & Prefix(2), True, True), (Causal() & Windows(2), False, True),
    (Causal() & KeyKeep("pad"), False, False), (Causal() | KeyKeep("pad"), True, True),
    (Select("h", (Causal(), Prefix(1))), True, True), (Where(k <= q * 2), True, True),
    (Where(k // 4 <= q // 4), True, True), (Where(k > q), False, False),
    (Reindex((q - 2) % SIZE_Q, Windows(4)), False, False), (Reindex(q // 2, Causal()), False, True),
    (Regions(q // 4 % 3), False, True), (~Causal(), False, False),
    (Placed(Causal(), (0, 4), (0, 4)), False, False),
])
def test_rows_that_always_keep_a_key(mask: Mask, always: bool, within: bool) -> None:
    assert mask.row_always_kept() is always
    assert mask.row_always_kept(query_within_keys=True) is within
    operands = {"pad": torch.zeros(9, dtype=torch.bool), "d": torch.zeros(9, dtype=torch.long)}
    for rows, keys in itertools.product((1, 3, 6, 9), repeat=2):
        if always or within and rows <= keys:
            cut = {name: x[:keys] for name, x in operands.items()}
            if isinstance(mask, Neighborhood) and rows < 3:
                continue  # smaller than the window: no such neighbourhood
            assert mask.to_dense(rows, keys, (2,), cut).any(-1).all(), (rows, keys)


@settings(max_examples=100)
@given(st.integers(2, 5), st.integers(0, 3), st.integers(1, 3), st.booleans(), st.integers(0, 6))
def test_neighbourhoods_of_any_window_stride_and_dilation(
        window: int, stride: int, dilation: int, causal: bool, more: int) -> None:
    stride, n = min(stride + 1, window), window * dilation + more
    made = Neighborhood(window, stride, dilation, causal, n)
    expected = [[j in _near(i, n, window, stride, dilation, causal) for j in range(n)]
                for i in range(n)]
    assert made.to_dense(n, n).tolist() == expected
    assert Neighborhood(window, stride, dilation, causal).to_dense(n, n).tolist() == expected
    assert made.row_always_kept(True)
    if not causal:
        assert all(sum(row) == window for row in expected)


def test_masks_serve_every_length() -> None:
    window = Neighborhood((3, 3), length=(None, 5))
    for rows in (3, 4, 7):
        fixed = Neighborhood((3, 3), length=(rows, 5))
        n = rows * 5
        assert torch.equal(window.to_dense(n, n), fixed.to_dense(n, n))
    assert Causal(SIZE_K - SIZE_Q).to_dense(2, 5).tolist() == [[True] * 4 + [False], [True] * 5]
    assert math.isinf(Regions(q).fill)
