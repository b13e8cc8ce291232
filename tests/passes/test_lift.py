"""Every lifting rule against torch, on drawn shapes: the lift on the whole grid is the value."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.passes.analyze.lift import Unliftable
from attnopt.passes.analyze.logic import Logic
from tests.passes.lifting import Program, capture, layout_of, module, value, values_of

Make = Callable[[random.Random], tuple[Callable[..., Tensor], tuple[Tensor, ...]]]


def table(rng: random.Random, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    if dtype == torch.bool:
        return torch.rand(shape, generator=g) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=g).to(dtype)
    return torch.randint(-9, 9, shape, generator=g).to(dtype)


def check(program: Program, node: Any, args: tuple[Tensor, ...], wanted: Tensor) -> Any:
    """Lift `node`, evaluate it with the inputs as operands, compare. Returns the lift."""
    shape = wanted.shape
    lengths = dict(zip(("b", "h", "q", "k")[4 - len(shape):], shape, strict=True))
    lengths = {"q": 1, "k": 1, **lengths}
    lifter = program.lifter(lengths)
    lifted = lifter.lift(node, lifter.indices(layout_of(node)))
    operands = values_of(program, args)
    got = value(lifted.expr, shape, operands)
    assert torch.equal(got.to(torch.float64), wanted.to(torch.float64)), str(lifted.expr)
    return lifted


def check_program(fn: Callable[..., Tensor], args: tuple[Tensor, ...]) -> Any:
    forwards: dict[int, Callable[..., Any]] = {
        0: lambda self: [fn()], 1: lambda self, a: [fn(a)], 2: lambda self, a, b: [fn(a, b)]}
    program = capture(module(forwards[len(args)]), args)
    return check(program, program.results[0], args, fn(*args))


def dims(rng: random.Random, rank: int, low: int = 2, high: int = 6) -> list[int]:
    return [rng.randint(low, high) for _ in range(rank)]


# -- ops that move elements -----------------------------------------------------------------------
def _moved(*shape_and_fn: Any) -> Make:
    """A rule on an input of rank 2 to 4 that is loaded, not computed."""
    rank, make = shape_and_fn

    def draw(rng: random.Random) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
        shape = dims(rng, rank)
        return make(rng, shape), (table(rng, *shape),)
    return draw


def _with(fn: Callable[..., Tensor], *more: Any) -> Callable[..., Tensor]:
    return lambda x: fn(x, *more)


def _slice(rng: random.Random, shape: list[int]) -> Callable[..., Tensor]:
    start, stop, step = rng.randint(-7, 5), rng.choice([None, 2, 4, -1, 99]), rng.randint(1, 3)
    if stop is not None and len(range(*slice(start, stop, step).indices(shape[1]))) == 0:
        stop = None
        start = min(start, shape[1] - 1)
    return lambda x: x[:, start:stop:step]


def _view(rng: random.Random, shape: list[int]) -> Callable[..., Tensor]:
    a, b, c = shape
    new = rng.choice([(a * b, c), (a, b * c), (a * b * c, 1), (c, a * b), (1, a, b, c),
                      (a, 1, b, c), (b, a, c), (c, b, a)])
    return lambda x: x.reshape(new)


def _pad(rng: random.Random, shape: list[int]) -> Callable[..., Tensor]:
    before, after, rows = rng.randint(0, 3), rng.randint(0, 3), rng.randint(0, 2)
    return lambda x: torch.nn.functional.pad(x, (before, after, rows, 0), value=-2.5)


def _stacked(rng: random.Random, shape: list[int]) -> Callable[..., Tensor]:
    dim = rng.randint(0, 2)
    return lambda x: torch.stack([x, x.flip(0), x * 1.0], dim=dim)


def _cat(rng: random.Random, shape: list[int]) -> Callable[..., Tensor]:
    dim = rng.randint(0, 1)
    return lambda x: torch.cat([x, x.narrow(dim, 1, 1), torch.ones_like(x)], dim=dim)


def _roll(rng: random.Random, shape: list[int]) -> Callable[..., Tensor]:
    shift = rng.randint(-4, 4)
    return lambda x: torch.roll(x, (shift, -shift), (0, 1))


def _scatter(rng: random.Random, shape: list[int]) -> Callable[..., Tensor]:
    i, j = rng.randint(0, shape[0] - 1), rng.randint(1, shape[1] - 1)

    def written(x: Tensor) -> Tensor:
        y = x.clone()
        y[i] = 3.0
        y[:, j:] = x[:, :1]
        y[i:, 0] += 1.0
        y[:, ::2] = 7.0
        return y
    return written


def _written_views(rng: random.Random, shape: list[int]) -> Callable[..., Tensor]:
    def written(x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y.view(-1)[: x.shape[1]] = x[0]
        y.t()[1].fill_(2.0)
        y.diagonal().copy_(torch.full((min(shape),), 9.0))
        return y
    return written


MOVES: dict[str, Make] = {
    "transpose": _moved(3, lambda r, s: lambda x: x.transpose(0, -1)),
    "permute": _moved(4, lambda r, s: _with(Tensor.permute, r.sample(range(4), 4))),
    "t": _moved(2, lambda r, s: lambda x: x.t()),
    "mT": _moved(3, lambda r, s: lambda x: x.mT),
    "swapaxes": _moved(3, lambda r, s: lambda x: x.swapaxes(0, 1)),
    "movedim": _moved(3, lambda r, s: lambda x: x.movedim((0, 2), (1, 0))),
    "unsqueeze": _moved(2, lambda r, s: _with(Tensor.unsqueeze, r.randint(-3, 2))),
    "squeeze": _moved(2, lambda r, s: lambda x: x[:, None, None].squeeze(1).squeeze()),
    "expand": _moved(2, lambda r, s: lambda x: x[None, :1].expand(3, 4, x.shape[1])),
    "expand_as": _moved(2, lambda r, s: lambda x: x[:1].expand_as(x)),
    "view": _moved(3, _view),
    "flatten": _moved(3, lambda r, s: lambda x: x.flatten(1)),
    "unflatten": _moved(2, lambda r, s: lambda x: torch.cat([x, x]).unflatten(0, (2, -1))),
    "slice": _moved(2, _slice),
    "select": _moved(3, lambda r, s: _with(Tensor.select, r.randint(0, 2), r.randint(-2, 1))),
    "narrow": _moved(2, lambda r, s: lambda x: x.narrow(1, 1, x.shape[1] - 1)),
    "diagonal": _moved(3, lambda r, s: _with(Tensor.diagonal, r.randint(-1, 1), 0, 1)),
    "unfold": _moved(2, lambda r, s: lambda x: x.unfold(1, 2, 1)),
    "split": _moved(2, lambda r, s: lambda x: x.split([1, x.shape[0] - 1])[1]),
    "chunk": _moved(2, lambda r, s: lambda x: torch.cat([x, x]).chunk(2)[1]),
    "unbind": _moved(3, lambda r, s: lambda x: x.unbind(1)[-1]),
    "repeat": _moved(2, lambda r, s: lambda x: x.repeat(2, 1, 3)),
    "tile": _moved(2, lambda r, s: lambda x: x.tile(2, 2)),
    "repeat_interleave": _moved(3, lambda r, s: lambda x: x.repeat_interleave(3, dim=1)),
    "flip": _moved(2, lambda r, s: lambda x: x.flip(0, 1)),
    "roll": _moved(2, _roll),
    "pad": _moved(2, _pad),
    "stack": _moved(2, _stacked),
    "cat": _moved(2, _cat),
    "scatter": _moved(2, _scatter),
    "written_views": _moved(2, _written_views),
    "broadcast_tensors": _moved(2, lambda r, s: lambda x: torch.broadcast_tensors(
        x[:, None], x[None])[1]),
    "index": _moved(2, lambda r, s: lambda x: x[torch.arange(s[0])[:, None],
                                                torch.arange(s[1]).flip(0)[None]]),
    "index_negative": _moved(2, lambda r, s: lambda x: x[-1 - torch.arange(s[0])]),
    "index_apart": _moved(3, lambda r, s: lambda x: x[torch.arange(2), :, torch.tensor([1, 0])]),
    "index_select": _moved(2, lambda r, s: lambda x: x.index_select(1, torch.arange(s[1]) // 2)),
    "gather": _moved(2, lambda r, s: lambda x: x.gather(
        1, (torch.arange(s[1]) - 1).clamp(min=0).expand(s))),
    "embedding": _moved(2, lambda r, s: lambda x: torch.nn.functional.embedding(
        (torch.arange(4)[:, None] + torch.arange(3)) % s[0], x)),
    "meshgrid": _moved(2, lambda r, s: lambda x: torch.stack(
        torch.meshgrid(x[0], x[:, 0], indexing="ij"))),
    "meshgrid_xy": _moved(2, lambda r, s: lambda x: torch.stack(
        torch.meshgrid(x[0], x[:, 0], indexing="xy"))),
}


@pytest.mark.parametrize("name", MOVES)
def test_ops_that_move_elements(name: str) -> None:
    rng = random.Random(name)
    for _ in range(3):
        fn, args = MOVES[name](rng)
        check_program(fn, args)


# -- ops that compute -----------------------------------------------------------------------------
def grid(*shape: int, dtype: torch.dtype = torch.int64) -> list[Tensor]:
    """Positions along each dimension, shaped to broadcast."""
    return [torch.arange(n, dtype=dtype).view(-1, *[1] * (len(shape) - 1 - i))
            for i, n in enumerate(shape)]


def i_j() -> list[Tensor]:
    return grid(5, 7)


COMPUTED: dict[str, Callable[[], Tensor]] = {
    "ones": lambda: torch.ones(3, 4, dtype=torch.bool),
    "full": lambda: torch.full((3, 4), -1e9, dtype=torch.bfloat16),
    "full_like": lambda: torch.full_like(torch.zeros(3, 4), float("-inf")),
    "new_full": lambda: torch.zeros(3).new_full((2, 5), 2.5),
    "arange_step": lambda: torch.arange(3, 20, 4)[:, None] * torch.arange(9, 2, -2)[None],
    "arange_float": lambda: torch.arange(5.0)[:, None] - torch.arange(7, dtype=torch.float16),
    "eye": lambda: torch.eye(4, 6) + torch.eye(4, 6, dtype=torch.bool),
    "tril": lambda: torch.ones(5, 7).tril(-1) + torch.ones(5, 7).triu(2) * 3,
    "triu_inf": lambda: torch.full((6, 6), float("-inf")).triu(1),
    "where": lambda: torch.where(i_j()[0] < i_j()[1], 0.0, torch.tensor(-1e9)),
    "where_scalars": lambda: torch.where(i_j()[0] < i_j()[1], 1, 0),
    "where_half": lambda: torch.where(
        i_j()[0] < i_j()[1], torch.zeros(1, dtype=torch.half), -70000),
    "masked_fill": lambda: torch.zeros(5, 7).masked_fill(i_j()[0] > i_j()[1], float("-inf")),
    "masked_fill_tensor": lambda: torch.zeros(5, 7, dtype=torch.bfloat16).masked_fill(
        i_j()[0] > i_j()[1], torch.tensor(0.1)),
    "index_put": lambda: _index_put(torch.zeros(5, 7), i_j()[0] > i_j()[1]),
    "compare": lambda: (i_j()[0] <= i_j()[1]) ^ (i_j()[0] * 2 > i_j()[1]) | i_j()[0].eq(i_j()[1]),
    "compare_scalar": lambda: (i_j()[0].float() < 2.5) & (3 >= i_j()[1]) & (i_j()[0] != 1),
    "compare_bool": lambda: (i_j()[0] < 2) == (i_j()[1] < 3),
    "compare_inf": lambda: (i_j()[0].float() + i_j()[1]) < float("inf"),
    "logical": lambda: torch.logical_or(i_j()[0], torch.logical_not(i_j()[1] - 3)),
    "logical_xor": lambda: torch.logical_xor(i_j()[0] > 2, i_j()[1] > 2),
    "bool_arithmetic": lambda: (i_j()[0] < 3) * (i_j()[1] < 2) + (i_j()[0] == 4),
    "bool_to_number": lambda: (i_j()[0] < 3).float() * 2 - (i_j()[1] < 2).long(),
    "rsub": lambda: (1.0 - torch.ones(5, 7).tril()) * torch.finfo(torch.float32).min,
    "rsub_half": lambda: (1.0 - torch.ones(5, 7, dtype=torch.half).tril()) * -3.4e38,
    "nan": lambda: (1.0 - torch.ones(5, 7).tril()) * float("-inf"),
    "add_alpha": lambda: torch.add(torch.ones(5, 7).tril(), torch.ones(5, 7), alpha=3),
    "abs": lambda: (i_j()[0] - i_j()[1]).abs() <= 2,
    "abs_far": lambda: (i_j()[0] - i_j()[1]).abs() >= 3,
    "neg": lambda: -(i_j()[0] * 3 - i_j()[1]),
    "sign": lambda: (i_j()[0] - i_j()[1]).sign(),
    "square": lambda: (i_j()[0] - 2) ** 2 + (i_j()[1] - 3).square(),
    "floordiv": lambda: (i_j()[0] - 3) // 2 + torch.div(i_j()[1] - 9, 4, rounding_mode="floor"),
    "remainder": lambda: (i_j()[0] - 3) % 2 * (i_j()[1] - 9).remainder(4),
    "trunc": lambda: torch.div(i_j()[0] + i_j()[1], 3, rounding_mode="trunc"),
    "clamp": lambda: (i_j()[0] * i_j()[1]).clamp(2, 9) + (i_j()[0] - 2).clamp(min=0),
    "clamp_float": lambda: torch.full((5, 7), -1e9).triu(1).clamp(min=-3.5),
    "minimum": lambda: torch.minimum(i_j()[0], i_j()[1]) - torch.maximum(i_j()[0] - 2, i_j()[1]),
    "exponential": lambda: torch.ones(5, 7).tril().exp() + torch.ones(5, 7).triu().log(),
    "isinf": lambda: torch.full((5, 7), float("-inf")).triu(1).isinf(),
    "nan_to_num": lambda: (torch.zeros(5, 7).tril() / 0.0).nan_to_num(4.0),
    "cumsum": lambda: torch.ones(5, 7, dtype=torch.long).cumsum(1) <= i_j()[0],
    "cumsum_bool": lambda: (i_j()[0] < 3).expand(5, 7).cumsum(1),
    "one_hot": lambda: torch.nn.functional.one_hot(torch.arange(5), 5),
    "casts": lambda: (i_j()[0] - 2).to(torch.int8).to(torch.bfloat16).to(torch.bool).long(),
    "bfloat16_whole": lambda: torch.arange(200, dtype=torch.bfloat16)[:, None].expand(200, 2),
    "power_of_case": lambda: torch.ones(5, 7).tril().mul(0.3).pow(3),
    "window": lambda: _windows(6, 2),
    "neighbourhood": lambda: _neighbourhood(4, 5, 3),
    "dilated": lambda: (i_j()[0] - i_j()[1]) % 3 == 0,
    "float_position": lambda: torch.arange(5).float()[:, None] * 8 + torch.arange(7).float(),
}


def _index_put(x: Tensor, mask: Tensor) -> Tensor:
    x[mask.expand_as(x)] = -5.0
    return x


def _windows(n: int, w: int) -> Tensor:
    at = torch.arange(n) // w
    return at[:, None] == at[None]


def _neighbourhood(height: int, width: int, window: int) -> Tensor:
    y, x = (g.flatten() for g in torch.meshgrid(torch.arange(height), torch.arange(width),
                                                indexing="ij"))
    half = window // 2
    cy, cx = y.clamp(half, height - 1 - half), x.clamp(half, width - 1 - half)
    return ((y[None] - cy[:, None]).abs() <= half) & ((x[None] - cx[:, None]).abs() <= half)


@pytest.mark.parametrize("name", COMPUTED)
def test_ops_that_compute(name: str) -> None:
    made = COMPUTED[name]
    program = capture(module(lambda self: [made()]))
    node, wanted = program.results[0], made()
    shape = wanted.shape
    lengths = dict(zip(("b", "h", "q", "k")[4 - len(shape):], shape, strict=True))
    lifter = program.lifter(lengths)
    lifted = lifter.lift(node, lifter.indices(layout_of(node)))
    got = value(lifted.expr, shape, program.tensors)
    same = (got.double() == wanted.double()) | wanted.isnan() & got.double().isnan()
    assert same.all(), str(lifted.expr)
    assert not lifted.loads, "index arithmetic loads nothing"


def test_whole_numbers_beyond_their_type_are_not_lifted() -> None:
    """bfloat16 holds whole numbers up to 256: 300 positions would round."""
    def rounded(self: Any) -> list[Tensor]:
        at = torch.arange(300, dtype=torch.bfloat16)
        return [at[:, None] < at[None]]
    program = capture(module(rounded))
    lifter = program.lifter({"q": 300, "k": 300})
    lifted = lifter.lift(program.results[0], lifter.indices(("q", "k")))
    assert {n.target for n in lifted.loads.values()} == {torch.ops.aten.arange.default}
    wanted = torch.arange(300, dtype=torch.bfloat16)
    got = value(lifted.expr, (300, 300), {s: wanted for s in lifted.loads})
    assert torch.equal(got, wanted[:, None] < wanted[None])


def test_cut_where_the_data_is_a_vector() -> None:
    """A running sum of an input cannot be lifted; it is loaded per row and per key."""
    def segments(self: Any, ids: Tensor) -> list[Tensor]:
        packed = (ids == 0).cumsum(-1)
        return [packed[:, None, :, None] == packed[:, None, None, :]]
    program = capture(module(segments), (torch.zeros(2, 6, dtype=torch.long),))
    lifter = program.lifter({"b": 2, "h": 3, "q": 6, "k": 6})
    lifted = lifter.lift(program.results[0], lifter.indices(("b", None, "q", "k")))
    assert str(lifted.expr) == "(eq (load_int cumsum b k) (load_int cumsum b q))"


def test_dense_results_are_not_cut() -> None:
    def scores(self: Any, x: Tensor) -> list[Tensor]:
        return [(x @ x.mT) > 0]
    program = capture(module(scores), (torch.zeros(2, 3, 6, 4),))
    lifter = program.lifter({"b": 2, "h": 3, "q": 6, "k": 6})
    with pytest.raises(Unliftable, match="matmul"):
        lifter.lift(program.results[0], lifter.indices(("b", "h", "q", "k")))


def _swin_shift(side: int, window: int, shift: int) -> Tensor:
    region = torch.zeros(1, side, side, 1)
    steps = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for count, (rows, columns) in enumerate(itertools.product(steps, steps)):
        region[:, rows, columns, :] = count
    n = side // window
    tiles = region.view(1, n, window, n, window, 1).permute(0, 1, 3, 2, 4, 5)
    tiles = tiles.reshape(-1, window * window)
    difference = tiles.unsqueeze(1) - tiles.unsqueeze(2)
    return difference.masked_fill(difference != 0, -100.0).masked_fill(difference == 0, 0.0)


def test_a_mask_that_takes_too_long_is_carried() -> None:
    """Swin's shift mask, nine regions written by slices: too many cases to compare all pairs."""
    program = capture(module(lambda self: [_swin_shift(8, 4, 2)]))
    lifter = program.lifter({"b": 4, "q": 16, "k": 16})
    with pytest.raises(Unliftable, match="too many cases"):
        lifter.lift(program.results[0], lifter.indices(("b", "q", "k")))


def test_a_parameter_is_loaded_not_read() -> None:
    def masked(self: Any) -> list[Tensor]:
        return [self.table.tril()]

    def setup(self: Any) -> None:
        self.table = torch.nn.Parameter(torch.ones(5, 5))
    program = capture(module(masked, setup))
    lifter = program.lifter({"q": 5, "k": 5})
    lifted = lifter.lift(program.results[0], lifter.indices(("q", "k")))
    assert lifted.expr.slots == {"p_table"} and not lifted.guards


def test_symbolic_views_divide_only_what_is_split() -> None:
    auto = torch.export.Dim.AUTO

    def folded(self: Any, query: Tensor, key: Tensor, keep: Tensor) -> list[Tensor]:
        b, h, n = query.shape[:3]
        return [keep[:, None, None, :].expand(b, h, n, -1).reshape(b * h, n, -1)]
    args = (torch.zeros(2, 4, 6, 8), torch.zeros(2, 4, 6, 8), torch.zeros(2, 6))
    program = capture(module(folded), args,
                      dynamic=({0: auto, 2: auto}, {0: auto, 2: auto}, {0: auto, 1: auto}))
    b, h, q = program.inputs["query"].meta["val"].shape[:3]
    k = program.inputs["key"].meta["val"].shape[2]
    lifter = program.lifter({"b": b, "h": h, "q": q, "k": k})
    lifter.logic.alias(program.inputs["keep"].meta["val"].shape[0], "b")
    lifter.logic.alias(program.inputs["keep"].meta["val"].shape[1], "k")
    lifted = lifter.lift(program.results[0], lifter.indices((("b", "h"), "q", "k")))
    assert str(lifted.expr) == "(load keep b k)"


# -- the canonical forms --------------------------------------------------------------------------
def test_canonical_integers_equal_what_they_came_from() -> None:
    rng = random.Random(5)
    atoms = [E.index("q"), E.index("k"), E.const(2), E.const(-3), E.const(5), E.size("k")]
    grown = Logic({"q": 6, "k": 9})

    def number(depth: int) -> E.Expr:
        if depth == 0:
            return rng.choice(atoms)
        op = rng.choice(["add", "sub", "mul", "neg", "floordiv", "mod", "minimum", "maximum",
                         "abs"])
        first = number(depth - 1)
        if op in ("neg", "abs"):
            return E.call(op, first)
        divides = op in ("floordiv", "mod")
        return E.call(op, first, rng.randint(1, 4) if divides else number(depth - 1))

    def truth(depth: int) -> E.Expr:
        if depth == 0:
            return E.call(rng.choice(["le", "lt", "eq", "ne"]), number(2), number(1))
        op = rng.choice(["and", "or", "not", "where"])
        return E.call(op, *(truth(depth - 1) for _ in range({"not": 1, "where": 3}.get(op, 2))))

    for _ in range(250):
        e = truth(rng.randint(0, 2))
        wanted, got = value(e, (6, 9)), value(grown.canonical(e), (6, 9))
        assert torch.equal(wanted.bool(), got.bool()), f"{e} became {grown.canonical(e)}"
    for _ in range(150):
        e = number(3)
        wanted, got = value(e, (6, 9)), value(grown.canonical(e), (6, 9))
        assert torch.equal(wanted.long(), got.long()), f"{e} became {grown.canonical(e)}"
        low, high = grown.bounds(grown.canonical(e))
        assert low <= wanted.min() and wanted.max() <= high, str(e)


def test_bounds_are_proved_not_sampled() -> None:
    logic = Logic({"q": 8, "k": 12})
    q, k = E.index("q"), E.index("k")
    assert logic.nonneg(logic.sub(logic.add(q, E.const(11)), k))
    assert not logic.nonneg(logic.sub(logic.add(q, E.const(10)), k))
    assert math.isinf(logic.bounds(E.load("x", dtype=E.INT))[1])
