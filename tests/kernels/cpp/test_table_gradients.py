"""Gradients of tables that generated C++ gathers, against the float64 reference."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import ALL, Band, Causal, KeyKeep, Mask
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels import reference
from attnopt.kernels.bind import bind
from attnopt.kernels.cpp import training_reasons
from attnopt.kernels.cpp.call import kernel, signature_of
from attnopt.kernels.cpp.call_backward import FEWEST, FREE, MOST, Backward, _blocks, backward
from attnopt.kernels.cpp.isa import AVX2, GENERIC, Isa, isas
from attnopt.kernels.cpp.template import Tile
from attnopt.kernels.cpp.toolchain import toolchain
from attnopt.kernels.cpp.training import backward_tile
from tests.kernels.cases import PAD, B, D, H, doubled, s
from tests.kernels.cpp.test_backward import CPP, check_gradients, gradients

pytestmark = pytest.mark.skipif(bool(toolchain().why_not()), reason="no C++ compiler")
q, k, h, b = map(E.index, "qkhb")
rows, keys = E.size("q"), E.size("k")
T, U = (Operand(n, None, role="table") for n in "tu")
PLACES = Operand("places", None, E.INT, "table")
REGION = Operand("region", None, E.INT, "table")
GATE = Operand("gate", ("b", "h", "q"), role="scale")
COLUMN = Operand("column", ("b", "k"), role="bias")
PAIR = Operand("pair", ("h", "q", "k"), role="bias")
x = s * 0.3


def t(*places: E.Expr | int) -> E.Expr:
    return E.load("t", *map(E.wrap, places))


def u(*places: E.Expr | int) -> E.Expr:
    return E.load("u", *map(E.wrap, places))


far = k - q + rows - 1
same_region = E.load("region", b, q, dtype=E.INT).eq(E.load("region", b, k, dtype=E.INT))
#: name -> (logits, operands)
LOGITS: dict[str, tuple[E.Expr, tuple[Operand, ...]]] = {
    "distance": (x + t(h, far), (T,)),
    "distance backwards": (x + t(h, q - k + keys - 1), (T,)),
    "distance without heads": (x + t(far), (T,)),
    "of every batch and head": (x + t(b, h, far), (T,)),
    "of a batch that repeats": (x + t(b % 2, h, far), (T,)),
    "heads in twos": (x + t(h // 2, far), (T,)),
    "buckets": (x + t(h, E.load("places", far, dtype=E.INT)), (T, PLACES)),
    "two axes": (x + t(h, q // 4 - k // 4 + 40, q % 4 - k % 4 + 3), (T,)),
    "three axes": (x + t(h, q // 8 - k // 8 + 20, q // 4 % 2 - k // 4 % 2 + 1, q % 4 - k % 4 + 3),
                   (T,)),
    "chains": (x + t(h, q % 4 * (keys + 4 * (rows // 4)) + (rows // 4 - q // 4) * 4 + k), (T,)),
    "extra token": (x + E.where(k < 1, t(h, q), t(h, far + 3)), (T,)),
    "query table": (x + t(b, h, q, k // 3), (T,)),
    "query table by blocks": (x + t(b, h, q, k // 32) + u(b, h, q, k % 32), (T, U)),
    "key table": (x + t(b, h, k, q % 5), (T,)),
    "of keys": (x + t(b, k // 2), (T,)),
    "of rows": (E.call("tanh", x) * t(h, q // 3), (T,)),
    "of heads": (E.call("tanh", x) * t(h), (T,)),
    "one number": (E.call("tanh", x) * t(0), (T,)),
    "outside": (x + t(h, k - q - 2), (T,)),
    "under a softcap": (E.call("tanh", x + t(h, far)) * 3.0, (T,)),
    "before the scale": ((s + t(h, far)) * 0.3, (T,)),
    "twice": (x + t(h, far) * t(h, far) + t(h, q) * 0.1, (T,)),
    "gated": (x + t(h, far) * E.load("gate"), (T, GATE)),
    "two of them": (x + t(h, far) + u(b, h, q, k // 3) + E.load("column"), (T, U, COLUMN)),
    "a choice": (x + E.where(same_region, t(h, far), u(h, far)), (T, U, REGION)),
    "beside a pair bias": (x + t(h, far) + E.load("pair"), (T, PAIR)),
}
#: every way in which a part of a gradient is added, in one kernel
LOGITS["all ways"] = (
    x + t(h, far) + t(h, q % 4 - k % 4 + 3) + u(b, h, q, k // 32)
    + E.call("tanh", x) * (t(h, q) + t(h, k // 2) * E.load("gate") + t(h, 0)), (T, U, GATE))
QUICK = ("distance", "all ways")


def shapes(name: str, batch: int, n: int, m: int) -> dict[str, tuple[int, ...]]:
    """Of the operands, at these lengths."""
    return {"t": {
        "distance without heads": (n + m,), "of every batch and head": (batch, H, n + m),
        "of a batch that repeats": (2, H, n + m), "buckets": (H, 9), "two axes": (H, 90, 7),
        "three axes": (H, 45, 3, 7), "chains": (H, 8 * (n + m)), "extra token": (H, n + m + 3),
        "query table": (batch, H, n, m // 3 + 1), "query table by blocks": (batch, H, n, m),
        "key table": (batch, H, m, 5), "of keys": (batch, m), "of heads": (H,),
        "one number": (1,), "outside": (H, 9)}.get(name, (H, n + m)),
        "u": (H, n + m) if name == "a choice" else (batch, H, n, max(32, m // 3 + 1)),
        "gate": (batch, H, n, 1), "column": (batch, 1, 1, m), "pair": (H, n, m)}


def case(name: str, batch: int = B, n: int = 5, m: int = 7, mask: Mask = ALL,
         more: Sequence[Operand] = ()) -> tuple[Spec, list[Tensor], list[Tensor]]:
    """Spec, inputs and operands."""
    logits, operands = LOGITS[name]
    spec = Spec(logits=logits, mask=mask, operands=(*operands, *more))
    drawn = shapes(name, batch, n, m)
    made = {"places": lambda: torch.randint(9, (n + m,), dtype=torch.int32),
            "region": lambda: torch.randint(2, (batch, max(n, m)), dtype=torch.int32),
            "pad": lambda: (torch.rand(batch, 1, 1, m) < 0.7).index_fill(
                -1, torch.tensor(0), True)}
    tensors = [made[o.slot]() if o.slot in made else torch.randn(drawn[o.slot])
               for o in spec.operands]
    return spec, [torch.randn(batch, H, w, D) for w in (n, m, m)], tensors


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOGITS])
def test_tables(name: str) -> None:
    for lengths in ((5, 7), (70, 130), (1, 9)):
        spec, given, operands = case(name, B, *lengths)
        check_gradients(spec, given, operands)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["distance", "two axes", "key table", "of keys", "gated"])
@pytest.mark.parametrize("mask, more", [
    (Causal(), ()), (Band(-20, 3), ()), (Causal() & KeyKeep("pad"), (PAD,))])
def test_under_a_mask(name: str, mask: Mask, more: tuple[Operand, ...]) -> None:
    for n, m in ((5, 7), (150, 170)):
        check_gradients(*case(name, B, n, m, mask, more))


def test_rows_without_a_key() -> None:
    spec, given, operands = case("distance", n=9, m=4, mask=Band(-1, 0))
    spec = spec.with_(empty_row="zero")
    check_gradients(spec, given, operands)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    for name in ("all ways", "query table by blocks"):
        spec, given, operands = case(name, B, 20, 40)
        check_gradients(spec, [t.to(dtype) for t in given], [t.to(dtype) for t in operands])
        check_gradients(spec, [t.to(dtype) for t in given], operands)


# -- layouts and tasks ----------------------------------------------------------------------------
def expanded(t: Tensor) -> Tensor:
    return t[..., :1].expand(t.shape)


@pytest.mark.parametrize("how", [
    lambda t: t.mT.contiguous().mT, lambda t: torch.stack((t, t), -1)[..., 1], expanded],
    ids=["transposed", "every second", "expanded"])
def test_strides(how: Callable[[Tensor], Tensor]) -> None:
    spec, given, operands = case("distance", B, 20, 40)
    check_gradients(spec, given, [how(operands[0])])


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["distance", "of every batch and head", "of a batch that repeats",
                                  "one number", "distance without heads", "two of them"])
def test_what_tasks_share(name: str, threads: int) -> None:
    """Keys of all heads, of one head, of one batch; batches of one and of many."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for batch in (1, 3, 40):
            spec, given, operands = case(name, batch, 9, 20)
            check_gradients(spec, given, operands)
            check_gradients(spec, [given[0], given[1][:, :1], given[2][:, :1]], operands)
            check_gradients(spec, [given[0], given[1][:1], given[2][:1]], operands)
    finally:
        torch.set_num_threads(before)


def test_nothing_to_do() -> None:
    for batch, n in ((0, 5), (2, 0)):
        spec, given, operands = case("distance", batch, n, 7)
        given = [t.requires_grad_() for t in (*given, *operands)]
        out = bind(str(spec), CPP)(*given)
        for one, g in zip(given, torch.autograd.grad(out.sum(), given), strict=True):
            assert g.shape == one.shape and not g.any()


def test_copies_of_sums_stay_small() -> None:
    small, large = torch.empty(10), torch.empty(FREE)
    assert _blocks(1, [small], 0) == 1 and _blocks(1000, [small], 0) == MOST
    assert _blocks(1000, [large], 0) == 1 and _blocks(1000, [large], 100 * FREE) == FEWEST
    assert _blocks(4, [small], 0) == 4 and _blocks(4, [], 0) == 4


def test_the_same_with_any_number_of_threads() -> None:
    spec, given, operands = case("distance", 12, 20, 40)
    signature = signature_of(spec, *given, operands)
    statistics = torch.empty(12, H, 20, 2)
    out = kernel(signature, Tile(12, 32, 6, 2))(*given, operands, statistics=statistics)
    back = backward(signature, ("t",), backward_tile(spec, 40))
    one, two = (back(given, operands, out, statistics, torch.ones_like(out), threads=n)[3]
                for n in (1, 2))
    assert one is not None and two is not None and torch.equal(one, two)


@pytest.mark.slow
def test_only_what_is_asked_for() -> None:
    spec, given, operands = case("two of them", B, 20, 40)
    operands[1].requires_grad_()
    out = bind(str(spec), CPP)(*given, *operands)
    assert type(out.grad_fn).__name__ == "_AttendBackward"
    (found,) = torch.autograd.grad(out.sum(), operands[1])
    wide = [t.detach().double() for t in operands]
    wide[1].requires_grad_()
    (exact,) = torch.autograd.grad(reference(spec)(*doubled(given), wide).sum(), wide[1])
    torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


def test_the_graph_of_the_gradient() -> None:
    spec, given, operands = case("distance", 1, 3, 4)
    run = bind(str(spec), CPP)
    wide = [t.double().requires_grad_() for t in (*given, *operands)]
    assert torch.autograd.gradcheck(run, wide) and torch.autograd.gradgradcheck(run, wide)
    tensors = [t.requires_grad_() for t in (*given, *operands)]
    (g,) = torch.autograd.grad(run(*tensors).square().sum(), tensors[3], create_graph=True)
    (twice,) = torch.autograd.grad(g.square().sum(), tensors[0])
    (h1,) = torch.autograd.grad(run(*wide).square().sum(), wide[3], create_graph=True)
    (exact,) = torch.autograd.grad(h1.square().sum(), wide[0])
    torch.testing.assert_close(twice.double(), exact, atol=1e-4, rtol=1e-4)


def test_directional_differences() -> None:
    """The gradient of a table is the slope that float64 sees along a random direction."""
    spec, given, operands = case("distance", B, 30, 40)
    table, ahead = operands[0].requires_grad_(), torch.randn(B, H, 30, D)
    (found,) = torch.autograd.grad(bind(str(spec), CPP)(*given, table), table, ahead)
    step = torch.randn(table.shape, dtype=torch.float64) * 1e-5
    up, down = (reference(spec)(*doubled(given), [table.detach().double() + sign * step])
                for sign in (1, -1))
    slope = ((up - down) * ahead.double()).sum() / 2
    torch.testing.assert_close((found.double() * step).sum(), slope, rtol=1e-4, atol=1e-9)


def test_numbers_that_are_none_reach_the_table() -> None:
    spec, given, operands = case("distance")
    given[2][0, 1, 2] = torch.nan
    wide = [t.double().requires_grad_() for t in operands]
    out = bind(str(spec), CPP)(*given, *(t.requires_grad_() for t in operands))
    (found,) = torch.autograd.grad(out.sum(), operands)
    (exact,) = torch.autograd.grad(reference(spec)(*doubled(given), wide).sum(), wide)
    assert (found.isnan() == exact.isnan()).all() and found.isnan().any()


def test_many_terms_of_one_entry_round_little() -> None:
    """Every entry of the table is a sum over batches and rows in float32."""
    spec, given, operands = case("distance", 50, 64, 48)
    table, ahead = operands[0].requires_grad_(), torch.randn(50, H, 64, D)
    (found,) = torch.autograd.grad(bind(str(spec), CPP)(*given, table), table, ahead)
    wide = table.detach().double().requires_grad_()
    (exact,) = torch.autograd.grad(reference(spec)(*doubled(given), [wide]), wide, ahead.double())
    assert (found - exact).abs().max() <= 16 * torch.finfo(torch.float32).eps * exact.abs().max()


# -- instruction sets, reasons --------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("target", [AVX2, GENERIC], ids=str)
@pytest.mark.parametrize("name", ["distance", "two axes", "query table by blocks", "of keys"])
def test_other_instruction_sets(target: Isa, name: str) -> None:
    if target.width > isas()[0].width or isas()[0].width == 4 and target.width > 4:
        pytest.skip(f"no {target} here")
    spec, given, operands = case(name, B, 40, 70)
    tile, signature = Tile(12, 32, 6, 2), signature_of(spec, *given, operands)
    statistics, learned = torch.empty(B, H, 40, 2), tuple(o.slot for o in spec.operands)
    out = kernel(signature, tile, target)(*given, operands, statistics=statistics)
    ahead = torch.randn(out.shape)
    found = Backward(signature, learned, tile, target)(given, operands, out, statistics, ahead)
    wide = [t.double().requires_grad_() for t in (*given, *operands)]
    exact = gradients(reference(spec)(*wide[:3], wide[3:]), wide, ahead)
    for one, other in zip(found, exact, strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_no_reason_is_left() -> None:
    for logits, operands in LOGITS.values():
        spec = Spec(logits=logits, operands=operands)
        assert not training_reasons(spec, tuple(o.slot for o in operands if o.dtype == E.FLOAT))
    assert "floating" in training_reasons(Spec(
        logits=LOGITS["buckets"][0], operands=(T, PLACES)), ("places",))[0]
