"""Operands of a site: every idiom of a mask is proved, near misses are not, inputs are never read.

Each idiom is a function of (self, query, key) with query (2, 4, Q, 16) and key (2, 4, K, 16); it is
captured with fixed lengths and with symbolic ones.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnopt.ir import expr as E
from attnopt.ir.mask import ALL, And, Band, Causal, KeyKeep, Or, Prefix, Segments, Where, Windows
from attnopt.passes.analyze import by_value
from attnopt.passes.analyze.by_value import Values
from attnopt.passes.analyze.provenance import Finding
from tests.passes.lifting import Program, capture, find, judge, layout_of, module

AUTO = torch.export.Dim.AUTO
LEAST = torch.finfo(torch.float32).min
CAUSAL, ALIGNED = Causal(), Causal(E.size("k") - E.size("q"))


def lengths(query: Tensor, key: Tensor) -> tuple[int, int]:
    return query.shape[2], key.shape[2]


def steps(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    q, k = lengths(query, key)
    return torch.arange(q)[:, None], torch.arange(k)[None, :]


def lower(query: Tensor, key: Tensor) -> Tensor:
    q, k = steps(query, key)
    return k <= q


def buffers(self: Any) -> None:
    triangle = torch.ones(32, 32, dtype=torch.bool).tril()
    self.register_buffer("bias", triangle.view(1, 1, 32, 32))
    self.register_buffer("floats", torch.ones(32, 32).tril(), persistent=False)
    self.register_buffer("positions", torch.arange(32)[None])
    self.register_buffer("band", triangle & ~triangle.roll(3, 0).tril(-3))
    self.register_buffer("blocks", torch.block_diag(*[torch.ones(4, 4)] * 8))
    self.additive = torch.full((32, 32), -math.inf).triu(1)


# -- causal in every idiom ------------------------------------------------------------------------
Idiom = Callable[[Any, Tensor, Tensor], Tensor]
IDIOMS: dict[str, Idiom] = {
    "arange": lambda s, q, k: lower(q, k),
    "arange_ge": lambda s, q, k: steps(q, k)[0].ge(steps(q, k)[1]),
    "difference": lambda s, q, k: (steps(q, k)[0] - steps(q, k)[1]) >= 0,
    "below": lambda s, q, k: ~(steps(q, k)[0] < steps(q, k)[1]),
    "tril_bool": lambda s, q, k: torch.ones(lengths(q, k), dtype=torch.bool).tril(),
    "tril_equal_zero": lambda s, q, k: torch.zeros(lengths(q, k)).masked_fill(
        torch.tril(torch.ones(lengths(q, k))) == 0, -math.inf),
    "triu_infinite": lambda s, q, k: torch.triu(torch.full(lengths(q, k), -math.inf), diagonal=1),
    "triu_of_fill": lambda s, q, k: torch.full(lengths(q, k), LEAST).triu_(1)[None, None],
    "where": lambda s, q, k: torch.where(lower(q, k), 0.0, -math.inf),
    "where_tensor": lambda s, q, k: torch.where(lower(q, k), 0.0, torch.tensor(LEAST)),
    "complement": lambda s, q, k: (1.0 - torch.tril(torch.ones(lengths(q, k)))) * LEAST,
    "complement_rows": lambda s, q, k: (1.0 - lower(q, k)[None].float()) * -1e9,
    "masked_fill_in_place": lambda s, q, k: torch.zeros(lengths(q, k)).masked_fill_(
        steps(q, k)[0] < steps(q, k)[1], -1e9),
    "logarithm": lambda s, q, k: lower(q, k).float().log(),
    "cumulated": lambda s, q, k: torch.ones(lengths(q, k), dtype=torch.long).cumsum(1)
    <= torch.ones(lengths(q, k), dtype=torch.long).cumsum(0),
    "expanded": lambda s, q, k: lower(q, k)[None, None].expand(q.shape[0], q.shape[1], -1, -1),
    "written": lambda s, q, k: _written(q, k),
    "huggingface": lambda s, q, k: _by_index(q, k),
    "sum_of_two": lambda s, q, k: torch.full(lengths(q, k), -1e9).triu(1)
    + torch.zeros(1, 1, 1, k.shape[2]),
    "minimum": lambda s, q, k: torch.minimum(
        torch.full(lengths(q, k), -1e9).triu(1), torch.zeros(())),
    "buffer_start": lambda s, q, k: s.bias[:, :, : q.shape[2], : k.shape[2]],
    "buffer_float": lambda s, q, k: (1 - s.floats[: q.shape[2], : k.shape[2]]) * -1e9,
    "attribute": lambda s, q, k: s.additive[: q.shape[2], : k.shape[2]],
    "positions": lambda s, q, k: s.positions[:, : q.shape[2], None]
    >= s.positions[:, None, : k.shape[2]],
}


def _written(query: Tensor, key: Tensor) -> Tensor:
    mask = torch.zeros(lengths(query, key))
    mask[:, :] = -1e4
    mask[lower(query, key)] = 0.0
    return mask


def _by_index(query: Tensor, key: Tensor) -> Tensor:
    """As transformers 5 builds its masks: positions with all four axes, joined with a true one."""
    q, k = (torch.arange(n) + 0 for n in lengths(query, key))
    rows, columns = q[None, None, :, None], k[None, None, None, :]
    keep = rows.new_ones([], dtype=torch.bool) & (columns <= rows)
    return keep.expand(query.shape[0], -1, query.shape[2], key.shape[2])


def of_all(idioms: dict[str, Idiom], name: str, setup: Callable[[Any], None], dynamic: bool,
           sizes: tuple[int, int] = (8, 12)) -> Finding:
    """The finding for one of many idioms, captured together in one program."""
    program = together(tuple(idioms.values()), setup, dynamic, sizes)
    return judge(program, program.results[list(idioms).index(name)])


@functools.cache
def together(idioms: tuple[Idiom, ...], setup: Callable[[Any], None], dynamic: bool,
             sizes: tuple[int, int]) -> Program:
    def forward(self: Any, query: Tensor, key: Tensor) -> list[Tensor]:
        return [idiom(self, query, key) for idiom in idioms]
    inputs = tuple(torch.zeros(2, 4, n, 16) for n in sizes)
    moving = ({0: AUTO, 2: AUTO}, {0: AUTO, 2: AUTO}) if dynamic else None
    return capture(module(forward, setup), inputs, dynamic=moving)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", IDIOMS)
def test_causal_in_every_idiom(name: str, dynamic: bool) -> None:
    found = of_all(IDIOMS, name, buffers, dynamic)
    assert found.mask == CAUSAL, found.reason
    assert found.structural and found.rows_kept and found.expr is not None
    assert found.exact or name == "written", "-1e4 does not underflow next to every score"
    read = {"buffer_start": ("b_bias",), "buffer_float": ("b_floats",),
            "positions": ("b_positions",)}
    if name in read:
        assert found.guards == read[name]
    elif name == "attribute":
        assert len(found.guards) == 1
    assert found.provenance.parts <= {"index", "constant"}


def test_fills_are_reported() -> None:
    assert find(IDIOMS["triu_infinite"]).fill == -math.inf
    assert find(IDIOMS["complement"]).fill == LEAST
    assert find(IDIOMS["masked_fill_in_place"]).fill == -1e9
    assert find(IDIOMS["arange"]).fill is None


def test_aligned_ends_for_every_length() -> None:
    """GPT-2: bias[:, :, K - Q : K, :K]."""
    def sliced(self: Any, query: Tensor, key: Tensor) -> Tensor:
        q, k = lengths(query, key)
        return self.bias[:, :, k - q : k, :k]
    assert find(sliced, setup=buffers, dynamic=True).mask == ALIGNED
    static = find(sliced, setup=buffers)
    assert static.mask == Causal(4) and static.guards == ("b_bias",)


def test_cache_offset_for_every_length() -> None:
    """Positions of new queries begin after what is cached; K is the cache and the new keys."""
    def cached(self: Any, query: Tensor, past: Tensor) -> list[Tensor]:
        keys = torch.cat([past, query], dim=2)
        at = torch.arange(past.shape[2], past.shape[2] + query.shape[2])
        return [torch.arange(keys.shape[2])[None, :] <= at[:, None], keys]
    args = (torch.zeros(2, 4, 3, 16), torch.zeros(2, 4, 5, 16))
    program = capture(module(cached), args, dynamic=({0: AUTO, 2: AUTO}, {0: AUTO, 2: AUTO}))
    mask, keys = program.results
    shape = program.inputs["query"].meta["val"].shape
    sizes = {"b": shape[0], "h": 4, "q": shape[2], "k": keys.meta["val"].shape[2]}
    found = program.analysis().operand(mask, layout_of(mask), "keep", sizes)
    assert found.mask == ALIGNED and found.structural and found.rows_kept


def test_self_attention_shares_one_length() -> None:
    def square(self: Any, query: Tensor, key: Tensor) -> Tensor:
        n = query.shape[2]
        return torch.arange(n)[None] <= torch.arange(n)[:, None] + (n - key.shape[2])
    def same(self: Any, query: Tensor) -> list[Tensor]:
        return [square(self, query, query)]
    program = capture(module(same), (torch.zeros(2, 4, 6, 16),), dynamic=({0: AUTO, 2: AUTO},))
    shape = program.inputs["query"].meta["val"].shape
    sizes = {"b": shape[0], "h": 4, "q": shape[2], "k": shape[2]}
    found = program.analysis().operand(program.results[0], ("q", "k"), "keep", sizes)
    assert found.mask == CAUSAL


# -- other structure ------------------------------------------------------------------------------
STRUCTURES: dict[str, tuple[Idiom, Any]] = {
    "ones": (lambda s, q, k: torch.ones(lengths(q, k), dtype=torch.bool), ALL),
    "zeros": (lambda s, q, k: torch.zeros(1, 1, *lengths(q, k)), ALL),
    "shifted": (lambda s, q, k: torch.full(lengths(q, k), -3.5), ALL),
    "reaches_all": (lambda s, q, k: steps(q, k)[1] <= steps(q, k)[0] + k.shape[2], ALL),
    "nothing_dropped": (lambda s, q, k: torch.zeros(lengths(q, k)).masked_fill(
        steps(q, k)[1] < 0, -math.inf), ALL),
    "band": (lambda s, q, k: torch.ones(lengths(q, k), dtype=torch.bool).tril().triu(-3),
             Band(-3, 0)),
    "window": (lambda s, q, k: (steps(q, k)[0] - steps(q, k)[1]).abs() <= 2, Band(-2, 2)),
    "mistral": (lambda s, q, k: lower(q, k) & (steps(q, k)[1] > steps(q, k)[0] - 5), Band(-4, 0)),
    "band_buffer": (lambda s, q, k: s.band[: q.shape[2], : k.shape[2]], Band(-2, 0)),
    "chunks": (lambda s, q, k: steps(q, k)[0] // 4 == steps(q, k)[1] // 4, Windows((4,))),
    "chunk_buffer": (lambda s, q, k: s.blocks[: q.shape[2], : k.shape[2]].bool(), Windows((4,))),
    "prefix": (lambda s, q, k: lower(q, k) | (steps(q, k)[1] < 3), CAUSAL | Prefix(E.const(3))),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_structure(name: str, dynamic: bool) -> None:
    mask = STRUCTURES[name][1]
    found = of_all({n: f for n, (f, _) in STRUCTURES.items()}, name, buffers, dynamic, (12, 12))
    assert found.mask == mask, (str(found.mask), found.reason)
    assert found.structural and found.exact
    if isinstance(mask, Band) and not dynamic:
        assert found.rows_kept


def test_drop_masks_are_read_upside_down() -> None:
    found = find(lambda s, q, k: steps(q, k)[1] > steps(q, k)[0], role="drop")
    assert found.mask == CAUSAL


def test_a_row_without_keys_is_noticed() -> None:
    found = find(lambda s, q, k: torch.where(steps(q, k)[1] < steps(q, k)[0], 0.0, -1e9))
    assert found.mask == Causal(-1) and not found.rows_kept and not found.exact
    infinite = find(lambda s, q, k: torch.where(steps(q, k)[1] < steps(q, k)[0], 0.0, -math.inf))
    assert infinite.exact and not infinite.rows_kept


# -- what the user gives --------------------------------------------------------------------------
PADDING = torch.tensor([[True] * 12, [True] * 9 + [False] * 3])


def padded(forward: Callable[[Tensor, Tensor, Tensor], Tensor], pad: Tensor = PADDING,
           dynamic: bool = False, **more: Any) -> Finding:
    return find(lambda s, q, k, first: forward(q, k, first), extra=(pad,), dynamic=dynamic,
                extra_dims=({0: AUTO, 1: AUTO},), **more)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_causal_and_padding(dynamic: bool) -> None:
    forms: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda q, k, p: lower(q, k) & p[:, None, None, :],
        lambda q, k, p: torch.where(lower(q, k) & p[:, None, None, :], 0.0, LEAST),
        lambda q, k, p: torch.full(lengths(q, k), -math.inf).triu(1)
        + torch.zeros(p.shape).masked_fill(~p, -math.inf)[:, None, None, :],
        lambda q, k, p: lower(q, k)[None, None] & p.long()[:, None, None].to(torch.bool).expand(
            -1, -1, q.shape[2], -1),
    ]
    for forward in forms:
        found = padded(forward, dynamic=dynamic)
        assert isinstance(found.mask, And), found.reason
        causal, keys = found.mask.masks
        assert causal == CAUSAL and isinstance(keys, KeyKeep)
        load = found.loads[keys.slot]
        assert load.layout is not None and set(load.layout) <= {"b", "k", None}
        assert load.node.meta["val"].dtype == torch.bool
        assert found.provenance.parts >= {"index", "input"} and not found.guards
        assert not found.structural and not found.rows_kept


def test_padding_to_drop() -> None:
    found = padded(lambda q, k, p: p[:, None, None, :], role="drop")
    assert found.mask is not None and str(found.mask).startswith("(not (key_keep")


def test_an_additive_vector_stays_a_bias() -> None:
    """(1 - m) * min with an m that holds any number is no mask; causal beside it is."""
    vector = torch.ones(2, 12)
    alone = padded(lambda q, k, p: (1.0 - p[:, None, None, :]) * LEAST, vector)
    assert alone.mask is None and alone.provenance.parts == {"input"}
    both = padded(lambda q, k, p: torch.full(lengths(q, k), LEAST).triu(1)
                  + (1.0 - p[:, None, None, :]) * LEAST, vector)
    assert both.mask == CAUSAL and [t.layout for t in both.rest] == [("b", None, None, "k")]
    assert both.provenance.text == "index + input"


def test_a_bias_under_a_mask_is_kept() -> None:
    def alibi(self: Any, query: Tensor, key: Tensor) -> Tensor:
        slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
        return (slopes * steps(query, key)[1]).masked_fill(~lower(query, key), -math.inf)[None]
    found = find(alibi)
    assert found.mask == CAUSAL and found.fill == -math.inf
    assert [t.layout for t in found.rest] == [("h", None, "k")]


def test_a_bias_beside_a_mask_is_kept() -> None:
    found = find(lambda s, q, k: torch.full(lengths(q, k), -math.inf).triu(1)
                 + torch.ones(lengths(q, k)).tril(-2))
    assert found.mask == CAUSAL and [t.layout for t in found.rest] == [("q", "k")]


def test_segments() -> None:
    ids = torch.tensor([[0] * 5 + [1] * 7] * 2)
    found = find(lambda s, q, k, first: (first[:, None, :, None] == first[:, None, None, :])
                 & lower(q, k), sizes=(12, 12), extra=(ids,))
    assert isinstance(found.mask, And)
    causal, segments = found.mask.masks
    assert causal == CAUSAL and isinstance(segments, Segments)
    assert found.loads[segments.query_ids].layout == ("b", "q")
    assert found.loads[segments.key_ids].layout == ("b", "k")


def test_packed_positions_are_cut_at_the_running_sum() -> None:
    starts = torch.tensor([[True] + [False] * 4 + [True] + [False] * 6] * 2)

    def packed(s: Any, q: Tensor, k: Tensor, first: Tensor) -> Tensor:
        at = first.cumsum(-1)
        return (at[:, None, :, None] == at[:, None, None, :]) & lower(q, k)
    found = find(packed, sizes=(12, 12), extra=(starts,))
    assert isinstance(found.mask, And) and isinstance(found.mask.masks[1], Segments)


def test_a_dense_mask_from_the_user_is_never_specialised() -> None:
    """Its values happen to be causal, or all true."""
    for given in (torch.ones(8, 12, dtype=torch.bool).tril(), torch.ones(8, 12, dtype=torch.bool)):
        found = padded(lambda q, k, p: p, given)
        assert found.mask is None and found.provenance.parts == {"input"}
        assert not found.guards and found.rest[0].role == "keep"
    both = padded(lambda q, k, p: lower(q, k) & ~p, torch.zeros(8, 12, dtype=torch.bool))
    assert both.mask == CAUSAL and [t.role for t in both.rest] == ["drop"]


def test_parameters_are_not_read() -> None:
    def setup(self: Any) -> None:
        self.mask = nn.Parameter(torch.full((8, 12), -math.inf).triu(1))

    found = find(lambda s, q, k: s.mask, setup=setup)
    assert found.mask is None and found.provenance.parts == {"parameter"}
    summed = find(lambda s, q, k: s.mask + torch.full(lengths(q, k), -1e9).triu(1), setup=setup)
    assert summed.mask == CAUSAL and summed.provenance.text == "parameter + index"
    asked: list[str] = []
    Values({"p": "parameter", "x": "input"}, lambda name: asked.append(name)).read("p")
    assert not asked


# -- near misses ----------------------------------------------------------------------------------
def flipped(self: Any) -> None:
    buffers(self)
    self.bias[0, 0, 5, 9] = True
    self.additive[3, 1] = -math.inf
    self.positions[0, 4] = 5


MISSES: dict[str, Idiom] = {
    "one_element": lambda s, q, k: s.bias[:, :, : q.shape[2], : k.shape[2]],
    "one_element_additive": lambda s, q, k: s.additive[: q.shape[2], : k.shape[2]],
    "one_position": IDIOMS["positions"],
    "nan_where_kept": lambda s, q, k: (1.0 - torch.tril(torch.ones(lengths(q, k)))) * -math.inf,
    "positive": lambda s, q, k: torch.full(lengths(q, k), math.inf).triu(1),
    "leaves_weight": lambda s, q, k: torch.full(lengths(q, k), -100.0).triu(1),
    "two_levels": lambda s, q, k: torch.where(
        lower(q, k), torch.ones(lengths(q, k)).tril(-2), -math.inf),
    "random": lambda s, q, k: torch.rand(lengths(q, k)) < 0.5,
    "activation": lambda s, q, k: (q @ k.mT) > 0,
}


@pytest.mark.parametrize("name", MISSES)
def test_near_misses_are_carried(name: str) -> None:
    found = of_all(MISSES, name, flipped, dynamic=False)
    assert not isinstance(found.mask, Causal) and found.mask != ALL
    if name != "one_position":
        assert found.mask is None and found.reason and len(found.rest) == 1


@pytest.mark.parametrize("offset", [-2, -1, 1, 2])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_off_by_some(offset: int, dynamic: bool) -> None:
    tril = find(lambda s, q, k: torch.ones(lengths(q, k), dtype=torch.bool).tril(offset),
                dynamic=dynamic)
    triu = find(lambda s, q, k: torch.full(lengths(q, k), -math.inf).triu(offset + 1),
                dynamic=dynamic)
    assert tril.mask == triu.mask == Causal(offset)


def test_anti_causal_is_not_causal() -> None:
    found = find(lambda s, q, k: torch.ones(lengths(q, k), dtype=torch.bool).triu(), sizes=(8, 8))
    assert isinstance(found.mask, Where | Band | Or) and found.mask != CAUSAL
    kept = found.mask.to_dense(8, 8)
    assert torch.equal(kept, torch.ones(8, 8, dtype=torch.bool).triu())


def test_activation_beside_structure() -> None:
    found = find(lambda s, q, k: ((q @ k.mT) > 0) & lower(q, k))
    assert found.mask == CAUSAL and len(found.rest) == 1 and found.rest[0].role == "keep"
    assert found.provenance.parts == {"activation", "index"}


# -- values ---------------------------------------------------------------------------------------
def test_values_where_no_rule_applies() -> None:
    """A sub-graph of constants with an op that has no lifting rule."""
    def made(self: Any, query: Tensor, key: Tensor) -> Tensor:
        return torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)) > 0
    found = find(made, sizes=(8, 8))
    assert found.mask == Windows((4,)) and found.structural


def test_nothing_large_is_evaluated_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_value, "LARGEST", 100)

    def made(self: Any, query: Tensor, key: Tensor) -> Tensor:
        return torch.block_diag(torch.ones(4, 4), torch.ones(4, 4)) > 0
    assert find(made, sizes=(8, 8)).mask is None


def test_a_large_buffer_is_compared_in_row_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_value, "_BLOCK", 70)
    assert find(IDIOMS["buffer_start"], setup=buffers).mask == CAUSAL
    assert find(MISSES["one_element"], setup=flipped).mask is None


def test_a_value_that_is_not_at_hand_is_loaded() -> None:
    program = capture(module(lambda self, query, key: [self.bias[:, :, :8, :12]], buffers),
                      (torch.zeros(2, 4, 8, 16), torch.zeros(2, 4, 12, 16)))
    program.tensors.clear()
    found = judge(program, program.results[0])
    assert found.mask is None and not found.guards
    assert found.provenance.parts == {"constant"}


def test_wrong_use_is_named() -> None:
    program = capture(module(lambda self, query, key: [lower(query, key)]),
                      (torch.zeros(2, 4, 8, 16), torch.zeros(2, 4, 12, 16)))
    analysis, node = program.analysis(), program.results[0]
    with pytest.raises(ValueError, match="role must be"):
        analysis.operand(node, ("q", "k"), "mask", {"q": 8, "k": 12})
    with pytest.raises(ValueError, match="layout must have 2 entries"):
        analysis.operand(node, (None, "q", "k"), "keep", {"q": 8, "k": 12})
