"""The generated stencil against the float64 reference: windows of every kind on grids of one to
three axes, logits, sinks, operands, dtypes, layouts, instruction sets."""

import random

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal, KeyKeep, Mask, Neighborhood, Where, Windows
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import reference
from attnopt.kernels.bind import bind
from attnopt.kernels.cpp.grid_windows import (
    Windows3d,
    axis_of_table,
    neighborhood_axis,
    table_of,
    windows_of,
)
from attnopt.kernels.cpp.isa import isas
from attnopt.kernels.cpp.stencil import Stencil, length_reasons, prepare, reasons, spec_reasons
from attnopt.kernels.cpp.toolchain import compiler_calls, toolchain
from tests.kernels.cases import close, doubled

compiled = pytest.mark.skipif(bool(toolchain().why_not()), reason=toolchain().why_not())
s, q, k = E.score, E.index("q"), E.index("k")
SEVEN = Neighborhood((7, 7), length=(None, 20))


def tokens(batch: int, heads: int, n: int, dim: int = 8, value_dim: int = 8,
           dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, heads, n, d, dtype=torch.float64).to(dtype)
            for d in (dim, dim, value_dim)]


def check(spec: Spec, given: list[Tensor], operands: list[Tensor] | None = None,
          tile: tuple[int, ...] = (), isa: int = 0) -> Tensor:
    operands = operands or []
    before = [t.clone() for t in (*given, *operands)]
    found = Stencil(spec, tile, isas()[isa])(*given, operands)
    assert found is not None, "the stencil must take the call"
    for was, now in zip(before, (*given, *operands), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
    exact = reference(spec)(*doubled(given), doubled(operands))
    assert found.dtype == given[0].dtype and found.shape == exact.shape
    close(found, exact, reference(spec)(*given, operands).to(found.dtype))
    return found


def neighborhood(rng: random.Random, dims: int) -> tuple[Neighborhood, int]:
    """A random generalized neighbourhood of a random grid, and how many tokens that has."""
    length, window, stride, dilation, causal = [], [], [], [], []
    for axis in range(dims):
        n = rng.choice((1, 2, 5, 7, 16, 17, 33, 40) if axis == dims - 1 else (1, 2, 3, 5, 6, 9))
        d = rng.choice((1, 1, 2, 3)) if n > 3 else 1
        w = rng.randint(1, min(n // d, 9 if axis == dims - 1 else 4))
        w = n // d if rng.random() < 0.15 and n < 20 else w
        length.append(n)
        window.append(w)
        stride.append(rng.randint(1, w))
        dilation.append(d)
        causal.append(rng.random() < 0.3)
    total = 1
    for n in length:
        total *= n
    first: list[int | None] = [None if rng.random() < 0.5 else length[0], *length[1:]]
    return Neighborhood(window, stride, dilation, causal, first), total


# -- masks as windows -----------------------------------------------------------------------------
def assert_windows(mask: Mask, n: int) -> Windows3d:
    """The windows keep what the mask keeps."""
    found = windows_of(mask, n)
    assert isinstance(found, Windows3d), found
    kept = torch.ones(1, 1, dtype=torch.bool)
    for axis in found.axes:
        table = table_of(axis)
        kept = (kept[:, None, :, None] & table[None, :, None]).reshape(
            len(kept) * len(table), -1)
    rest = Where(found.rest).to_dense(n, n)
    assert torch.equal(kept & rest, mask.to_dense(n, n))
    return found


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_neighborhoods_are_windows(dims: int) -> None:
    rng = random.Random(dims)
    for _ in range(40):
        mask, n = neighborhood(rng, dims)
        if n <= 700:
            found = assert_windows(mask, n)
            assert found.rest is E.TRUE


def test_the_formula_is_the_table() -> None:
    for node in (Neighborhood((4,), (3,), (2,), length=(19,)), Neighborhood((1,)),
                 Neighborhood((5,), (5,), causal=True), Neighborhood((7,), length=(None,))):
        for n in (1, 3, 8, 19, 30):
            if node.length[0] not in (None, n):
                continue
            formula = neighborhood_axis(node, 0, n)
            table = axis_of_table(node.to_dense(n, n))
            assert not isinstance(table, str)
            assert torch.equal(table_of(formula), table_of(table))


def cropped(width: int, radius: tuple[int, int]) -> Mask:
    return (Where(E.call("abs", q // width - k // width) <= radius[0])
            & Where(E.call("abs", q % width - k % width) <= radius[1]))


def test_other_masks_are_windows() -> None:
    assert_windows(cropped(9, (1, 2)), 54)
    assert_windows(Windows((2, 3), (None, 9)), 54)
    assert_windows(Band(-3, 2), 50)
    assert_windows(Causal() & Band(-5, 5), 33)
    assert_windows(Where(((q - k) % 3).eq(0)) & Band(-9, 9), 40)
    assert_windows(Neighborhood((3, 5), length=(None, 9)) & cropped(9, (1, 1)), 54)
    left = assert_windows(SEVEN & Causal(), 400)
    assert left.rest is not E.TRUE
    three = Where(E.call("abs", q // 4 % 5 - k // 4 % 5) < 2) & Where(q // 20 <= k // 20) & Where(
        (q % 4).eq(k % 4))
    assert assert_windows(three, 60).grid == (3, 5, 4)


def test_what_is_no_window() -> None:
    assert "gaps" in str(windows_of(Where((q - k) % 5 < 2), 30))
    assert "keep a key" in str(windows_of(Band(1, 3), 30))
    assert "400 tokens" in str(windows_of(Neighborhood((3, 3), length=(4, 20)), 400))
    assert "1 to 3 axes" in str(windows_of(Neighborhood((1, 1, 1, 1), length=(None, 2, 2, 2)), 16))


# -- the kernel -----------------------------------------------------------------------------------
@compiled
@pytest.mark.parametrize("dims, cases", [(2, 8), *(
    pytest.param(d, 30, marks=pytest.mark.slow) for d in (1, 2, 3))])
def test_random_neighborhoods(dims: int, cases: int) -> None:
    rng = random.Random(dims + 10)
    torch.manual_seed(dims)
    for _ in range(cases):  # the source does not depend on the windows: one kernel serves them
        mask, n = neighborhood(rng, dims)
        check(Spec(logits=s * 0.3, mask=mask), tokens(1, 2, n))


@compiled
@pytest.mark.parametrize("mask, n", [
    (cropped(20, (2, 3)), 300), (Windows((4, 5), (None, 20)), 400), (Windows((40,)), 200),
    (Neighborhood((3, 40), (1, 40), length=(None, 90)), 450)])
def test_other_masks(mask: Mask, n: int) -> None:
    check(Spec(logits=s * 0.3, mask=mask), tokens(2, 1, n))


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 15, 16, 17, 31, 33, 48, 100])
def test_lengths(n: int) -> None:
    spec = Spec(logits=s * 0.3, mask=Neighborhood((5,)))
    check(spec, tokens(1, 2, n))


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("dims", [(3, 5), (1, 1), (16, 33), (31, 16), (64, 2), (40, 72)])
def test_head_dims(dims: tuple[int, int]) -> None:
    check(Spec(logits=s * 0.3, mask=SEVEN), tokens(1, 2, 200, *dims))


@compiled
@pytest.mark.parametrize("dtype", [
    torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
def test_half(dtype: torch.dtype) -> None:
    check(Spec(logits=s * 0.3, mask=SEVEN), tokens(2, 2, 240, 24, 17, dtype))


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("isa", range(1, len(isas())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets(isa: int, dtype: torch.dtype) -> None:
    for mask in (SEVEN, Neighborhood((3, 4), (1, 3), (2, 2), (True, False), (None, 20))):
        check(Spec(logits=s * 0.3, mask=mask), tokens(1, 2, 240, dtype=dtype), isa=isa)


@compiled
@pytest.mark.slow
@pytest.mark.parametrize("tile", [(1, 1, 1), (2, 7, 3), (6, 4, 2), (8, 3, 8)])
def test_tiles(tile: tuple[int, ...]) -> None:
    for mask in (SEVEN, cropped(20, (2, 3))):
        check(Spec(logits=s * 0.3, mask=mask), tokens(1, 2, 260, 20, 20), tile=tile)


@compiled
@pytest.mark.slow
def test_layouts_share_keys_and_are_not_copied() -> None:
    spec = Spec(logits=s * 0.3, mask=SEVEN)
    n = 200
    rows = [torch.randn(2, n, 4, 8).transpose(1, 2) for _ in range(3)]
    check(spec, rows)
    channels_first = [torch.randn(2, 4, 8, n).transpose(2, 3) for _ in range(3)]
    check(spec, channels_first)
    query = torch.randn(2, 2, 3, n, 8)
    key, value = torch.randn(2, 2, 1, n, 8), torch.randn(2, 1, 1, n, 8)
    check(spec, [query, key, value])
    check(spec, [torch.randn(n, 16)[:, ::2] for _ in range(3)])
    apart = [torch.randn(1, 2, 2 * n, 8)[:, :, ::2] for _ in range(3)]
    check(spec, apart)


def offset(width: int) -> E.Expr:
    """Row of a relative position table of 13 x 13."""
    return (k // width - q // width + 6) * 13 + (k % width - q % width + 6)


TABLE = Operand("table", None, role="table")
HEAD = Operand("head", ("h",), role="scale")
BIAS = Operand("bias", ("h", "q", "k"), role="bias")
SINK = Operand("sink", ("h",), role="sink")
GATE = Operand("gate", ("h", "q"), role="gate")
PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
SPECS = {
    "relative position table": Spec(logits=s * 0.3 + E.load("table", E.index("h"), offset(20)),
                                    mask=SEVEN, operands=(TABLE,)),
    "scale of a head, softcap": Spec(logits=E.call("tanh", s * E.load("head")) * 5.0, mask=SEVEN,
                                     operands=(HEAD,)),
    "bias": Spec(logits=s * 0.3 + E.load("bias"), mask=SEVEN, operands=(BIAS,)),
    "distance": Spec(score="distance", logits=s * -0.1 - E.call("abs", q % 20 - k % 20) * 0.1,
                     mask=SEVEN),
    "sink": Spec(logits=s * 0.3, sinks=E.load("sink"), mask=SEVEN, operands=(SINK,)),
    "padding": Spec(logits=s * 0.3, mask=SEVEN & KeyKeep("pad"), operands=(PAD,)),
    "padding, zero": Spec(logits=s * 0.3, mask=SEVEN & KeyKeep("pad"), empty_row="zero",
                          operands=(PAD,)),
    "padding and sink": Spec(logits=s * 0.3, mask=SEVEN & KeyKeep("pad"), empty_row="zero",
                             sinks=E.load("sink"), operands=(PAD, SINK)),
    "window of causal tokens": Spec(logits=s * 0.3, mask=SEVEN & Causal()),
    "sigmoid": Spec(logits=s * 0.3 - 1.0, normalizer="sigmoid", mask=cropped(20, (1, 2))),
    "relu, l1": Spec(logits=s * 0.3 + 2.0, normalizer="relu", l1=True, mask=SEVEN),
    "gate": Spec(logits=s * 0.3, output=E.out * E.load("gate") + E.index("d") * 0.1, mask=SEVEN,
                 operands=(GATE,)),
}
QUICK = ("relative position table",)


@compiled
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow)
                                  for n in SPECS])
def test_specs(name: str) -> None:
    n, spec = 200, SPECS[name]
    pad = torch.rand(2, 1, 1, n) < 0.4
    pad[0, ..., :120] = False
    given = {"table": torch.randn(3, 169), "head": torch.rand(3, 1, 1) + 0.5,
             "bias": torch.randn(3, n, n), "sink": torch.randn(3, 1, 1),
             "gate": torch.randn(3, n, 1), "pad": pad}
    check(spec, tokens(2, 3, n), [given[o.slot] for o in spec.operands])


@compiled
def test_infinities_and_nan_stay_where_they_are() -> None:
    spec = Spec(logits=s * 0.3, mask=SEVEN)
    given = tokens(1, 1, 400)
    given[1][0, 0, 5] = torch.nan
    given[2][0, 0, 390, 3] = torch.inf
    found = Stencil(spec)(*given, [])
    assert found is not None
    kept = SEVEN.to_dense(400, 400)
    assert torch.equal(found.isnan().all(-1)[0, 0], kept[:, 5])
    assert torch.equal(found[0, 0, :, 3].isinf(), kept[:, 390])


@compiled
def test_log_sum_exp() -> None:
    spec = Spec(logits=s * 0.3, mask=SEVEN)
    given = tokens(2, 2, 200)
    found = Stencil(spec).with_lse(*given, [])
    assert found is not None
    exact = reference(spec)(*doubled(given), with_lse=True)
    for own, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(own.double(), expected, rtol=1e-5, atol=1e-5)


@compiled
def test_threads_agree() -> None:
    run, given = Stencil(Spec(logits=s * 0.3, mask=SEVEN)), tokens(3, 2, 400)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(*given, [])
        torch.set_num_threads(4)
        together = run(*given, [])
    finally:
        torch.set_num_threads(before)
    assert alone is not None and together is not None and torch.equal(alone, together)


@compiled
def test_what_is_not_for_the_stencil_is_handed_back() -> None:
    run, given = Stencil(Spec(logits=s * 0.3, mask=SEVEN)), tokens(1, 1, 200)
    assert run(*(t.double() for t in given), []) is None
    assert run(*(t[:0] for t in given), []) is None
    assert run(given[0][..., :100, :], *given[1:], []) is None
    assert run(*(t[..., :190, :] for t in given), []) is None
    assert run(*given, []) is not None


@compiled
@pytest.mark.slow
def test_prepared_kernels_are_not_compiled_again() -> None:
    spec, given = Spec(logits=s * 0.7, mask=SEVEN), tokens(1, 1, 200, 4, 4)
    prepare([(spec, Schedule("cpp:stencil"), given)])
    calls = compiler_calls()
    assert Stencil(spec)(*given, []) is not None
    assert compiler_calls() == calls


@compiled
def test_bound_calls_fall_back_and_have_gradients() -> None:
    spec = Spec(logits=s * 0.3, mask=SEVEN)
    run = bind(str(spec), str(Schedule("cpp:stencil")))
    given = tokens(1, 2, 240)
    for inputs in (given, [t.double() for t in given], [t.requires_grad_() for t in given]):
        found, exact = run(*inputs), reference(spec)(*doubled(inputs))
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    grads = torch.autograd.grad(run(*given).sum(), given)
    exact = torch.autograd.grad(reference(spec)(*given).sum(), given)
    for own, expected in zip(grads, exact, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_reasons() -> None:
    assert not spec_reasons(Spec(logits=s * 0.3, mask=SEVEN))
    assert "window" in spec_reasons(Spec(logits=s * 0.3))[0]
    assert "epilogue" in spec_reasons(Spec(mask=SEVEN, weights=E.weight * 2.0))[0]
    assert "statistics" in spec_reasons(Spec(mask=SEVEN, output=E.out * E.stat("lse")))[0]
    assert "as many keys" in length_reasons(Spec(mask=SEVEN), 200, 100)[0]
    assert "tokens" in length_reasons(Spec(mask=SEVEN), 190, 190)[0]
    assert "4096 keys" in length_reasons(Spec(mask=cropped(100, (40, 40))), 10000, 10000)[0]
    assert any("gradient" in r for r in reasons(Spec(mask=SEVEN), requires_grad=True))
    assert any("float64" in r for r in reasons(Spec(mask=SEVEN), (torch.float64,)))
