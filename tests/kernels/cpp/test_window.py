"""The generated kernels for few keys against the float64 reference, forward and backward, and
attention within windows of a map."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import ALL, Causal, KeyKeep
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import cpp, reference
from attnopt.kernels.bind import bind
from attnopt.kernels.cpp import training
from attnopt.kernels.cpp.isa import isas
from attnopt.kernels.cpp.template import WINDOW
from attnopt.kernels.cpp.template_window import split_shared, window_reasons
from attnopt.kernels.cpp.toolchain import toolchain
from attnopt.kernels.cpp.training import few_keys_tile
from attnopt.kernels.tabulate import literal_text
from attnopt.kernels.window_maps import bind_windows, window_attention
from tests.kernels.cases import CASES, close, doubled, inputs, operands_of, s
from tests.kernels.cpp.test_backward import check_gradients

pytestmark = pytest.mark.skipif(bool(toolchain().why_not()), reason=toolchain().why_not())
q, k, h, b = map(E.index, "qkhb")
TABLE = Operand("table", None, role="table")
REGION = Operand("region", None, E.INT, "table")
BIAS = Operand("bias", ("h", "q", "k"), role="bias")
EACH = Operand("each", ("b", "q", "k"), role="mask")
PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
x = s * 0.2
far = k - q + E.size("q") - 1
same = E.load("region", b, q, dtype=E.INT).eq(E.load("region", b, k, dtype=E.INT))
SPECS = {
    "plain": Spec(logits=x),
    "table": Spec(logits=x + E.load("table", h, far), operands=(TABLE,)),
    "table and regions": Spec(
        logits=x + E.load("table", h, far) + E.where(same, 0.0, -100.0),
        operands=(TABLE, REGION)),
    "dense biases": Spec(logits=x + E.load("bias") + E.load("each"), operands=(BIAS, EACH)),
    "regions apart": Spec(logits=x + E.where(same, 0.0, -torch.inf), operands=(REGION,)),
    "softcap of a bias": Spec(logits=E.call("tanh", (s + E.load("bias")) * 0.1) * 5.0,
                              operands=(BIAS,)),
    "padding": Spec(logits=x, mask=KeyKeep("pad"), empty_row="zero", operands=(PAD,)),
    "padding, nan": Spec(logits=x, mask=KeyKeep("pad"), operands=(PAD,)),
    "causal": Spec(logits=x, mask=Causal(), operands=()),
}
QUICK = ("table and regions", "dense biases", "padding")


def slow(names: Sequence[str]) -> list[object]:
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


def case(spec: Spec, windows: int, heads: int, rows: int, keys: int, dim: int = 32,
         value_dim: int | None = None, dtype: torch.dtype = torch.float32,
         ) -> tuple[list[Tensor], list[Tensor]]:
    given = [torch.randn(windows, heads, n, d, dtype=torch.float64).to(dtype)
             for n, d in ((rows, dim), (keys, dim), (keys, value_dim or dim))]
    pad = torch.rand(windows, 1, 1, keys) < 0.6
    pad[0] = False
    made = {"table": torch.randn(heads, rows + keys),
            "region": torch.randint(0, 3, (windows, max(rows, keys)), dtype=torch.int32),
            "bias": torch.randn(heads, rows, keys), "pad": pad,
            "each": torch.where(torch.rand(windows, 1, rows, keys) < 0.2, -torch.inf, 0.0)}
    return given, [made[o.slot] for o in spec.operands]


def tile_of(rows: int, keys: int, isa: int = 0, block: int = 7) -> tuple[int, ...]:
    width = isas()[isa].width
    vectors = -(-keys // width)
    nv = max(n for n in (1, 2, 4) if vectors % n == 0 and n * width <= 64)
    block = min(block, (isas()[isa].registers - 1 - nv) // nv)
    return -(-rows // block) * block, vectors * width, block, nv


def check(spec: Spec, given: Sequence[Tensor], operands: Sequence[Tensor], isa: int = 0,
          tile: tuple[int, ...] = ()) -> Tensor:
    tile = tile or tile_of(given[0].shape[-2], given[1].shape[-2], isa)
    attention = cpp.Attention(spec, tile, isas()[isa], WINDOW)
    assert attention.given(given[0], given[1]) is not None
    found = attention(*given, operands)
    assert found is not None, "the kernel must take the call"
    exact = reference(spec)(*doubled(given), doubled(operands))
    close(found, exact, reference(spec)(*given, operands).to(found.dtype))
    return found


# -- forward --------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", slow(list(SPECS)))
def test_windows_of_49_tokens(name: str) -> None:
    spec = SPECS[name]
    for windows, heads in ((1, 1), (1, 3), (4, 2)):
        check(spec, *case(spec, windows, heads, 49, 49))


@pytest.mark.parametrize("side", [1, 3, *(pytest.param(n, marks=pytest.mark.slow)
                                          for n in (2, 4, 5, 6, 8, 9, 12))])
def test_sides_of_windows(side: int) -> None:
    spec = SPECS["table and regions"]
    check(spec, *case(spec, 4, 2, side**2, side**2))


def test_lengths_that_one_kernel_takes() -> None:
    spec = SPECS["table"]
    width = isas()[0].width
    tile = tile_of(50, 4 * width)
    for rows, keys in ((1, 4 * width), (49, 4 * width - 1), (50, 3 * width + 1)):
        check(spec, *case(spec, 2, 2, rows, keys, 8, 8), tile=tile)
    for rows, keys in ((9, 3 * width), (9, 4 * width + 1), (tile[0] + 1, 4 * width)):
        given, operands = case(spec, 2, 2, rows, keys, 8, 8)
        attention = cpp.Attention(spec, tile, lowering=WINDOW)
        assert attention.given(given[0], given[1]) is None
        close(bind(str(spec), str(Schedule(WINDOW, tile)))(*given, *operands),
              reference(spec)(*doubled(given), doubled(operands)),
              reference(spec)(*given, operands))


@pytest.mark.parametrize("dim, value_dim", [(17, 5), *(
    pytest.param(*d, marks=pytest.mark.slow) for d in ((1, 1), (8, 40), (33, 64), (64, 96),
                                                       (128, 128)))])
def test_head_dims(dim: int, value_dim: int) -> None:
    spec = SPECS["dense biases"]
    check(spec, *case(spec, 2, 2, 25, 25, dim, value_dim))


@pytest.mark.parametrize("isa", range(len(isas())))
@pytest.mark.parametrize("dtype", [torch.bfloat16, *(
    pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16))])
def test_instruction_sets(isa: int, dtype: torch.dtype) -> None:
    spec = SPECS["table and regions"]
    check(spec, *case(spec, 2, 2, 10, 10, 24, 20, dtype), isa=isa)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if not cpp.spec_reasons(CASES[n])
                                  and not window_reasons(CASES[n])])
def test_every_case(name: str) -> None:
    check(CASES[name], inputs(), operands_of(CASES[name]))


def test_rows_without_a_key() -> None:
    for name in ("padding", "padding, nan"):
        spec = SPECS[name]
        out = check(spec, *case(spec, 3, 2, 49, 49))
        assert (out[0] == 0).all() if spec.empty_row == "zero" else out[0].isnan().all()


def test_strides_and_what_is_not_finite() -> None:
    spec = SPECS["dense biases"]
    given, operands = case(spec, 4, 2, 49, 49)
    wide = [torch.randn(4, 49, 2, 64)[..., ::2].transpose(1, 2) for _ in range(3)]
    check(spec, wide, operands)
    one = [given[0], given[1][:1].expand(4, -1, -1, -1), given[2][:, :1]]
    check(spec, one, [operands[0][..., :].transpose(-1, -2), operands[1]])
    given[2][0, 0, 3] = torch.inf
    given[1][1, 1, 5, 0] = torch.nan
    check(spec, given, operands)


def test_threads_agree_and_log_sum_exp() -> None:
    spec = SPECS["table and regions"]
    given, operands = case(spec, 5, 3, 49, 49)
    run = cpp.Attention(spec, tile_of(49, 49), lowering=WINDOW)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(*given, operands)
        torch.set_num_threads(2)
        together = run.with_lse(*given, operands)
    finally:
        torch.set_num_threads(before)
    assert alone is not None and together is not None and torch.equal(alone, together[0])
    query, key, _ = doubled(given)
    rows = torch.arange(49)
    region = operands[1][:, None]
    scores = query @ key.transpose(-1, -2) * 0.2 + operands[0].double()[
        :, rows[None] - rows[:, None] + 48] + torch.where(
            region[..., :49, None] == region[..., None, :49], 0.0, -100.0)
    lse = scores.logsumexp(-1)
    assert torch.allclose(together[1].double(), lse, atol=1e-5)


def test_shared_parts() -> None:
    scaled, shared = split_shared(SPECS["table and regions"])
    assert len(shared) == 1 and shared[0].op == "load" and "region" in scaled.slots
    assert len(split_shared(SPECS["dense biases"])[1]) == 1
    assert not split_shared(SPECS["softcap of a bias"])[1][0].has("score")
    assert not split_shared(SPECS["plain"])[1]
    assert "softmax" in window_reasons(CASES["sigmoid"])[0]
    assert "sinks" in window_reasons(CASES["sink"])[0]


# -- backward -------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", [n if n == "table and regions" else pytest.param(
    n, marks=pytest.mark.slow) for n in SPECS if n != "padding, nan"])
def test_gradients_of_windows(name: str) -> None:
    spec = SPECS[name]
    given, operands = case(spec, 3, 2, 49, 49)
    assert few_keys_tile(*(t.shape for t in given)) is not None
    check_gradients(spec, given, operands)
    if name == "table and regions":
        wide = [torch.randn(3, 49, 2, 64)[..., ::2].transpose(1, 2) for _ in range(3)]
        check_gradients(spec, wide, operands)


@pytest.mark.slow
@pytest.mark.parametrize("side", range(2, 11))  # of one key the logits' gradient is 0: see below
def test_gradients_of_sides(side: int) -> None:
    spec = Spec(logits=SPECS["table and regions"].logits, mask=Causal(),
                operands=SPECS["table and regions"].operands)
    check_gradients(spec, *case(spec, 2, 2, side**2, side**2, 24, 20))


@pytest.mark.slow
def test_gradients_of_one_key_vanish_up_to_rounding() -> None:
    """The weight is 1 whatever the logits: dP and delta are one sum, taken in two orders."""
    spec = SPECS["table"]
    (query, key, value), operands = case(spec, 2, 2, 1, 1, 24, 20)
    given = [t.clone().requires_grad_() for t in (query, key, value)]
    out = bind(str(spec), "")(*given, *operands)
    ahead = torch.randn_like(out)
    to_query, to_key, to_value = torch.autograd.grad(out, given, ahead)
    terms = (ahead.double().abs() * value.double().abs()).sum(-1, keepdim=True)
    bound = 8 * torch.finfo(torch.float32).eps * terms
    assert (to_query.abs() <= bound * key.abs()).all()
    assert (to_key.abs() <= bound * query.abs()).all()
    torch.testing.assert_close(to_value, ahead)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_half_precision(dtype: torch.dtype) -> None:
    spec = SPECS["dense biases"]
    given, operands = case(spec, 2, 2, 49, 49, dtype=dtype)
    operands[1] = torch.zeros_like(operands[1])
    check_gradients(spec, [t * 0.5 for t in given], [t.to(dtype) for t in operands])


@pytest.mark.slow
def test_gradients_of_keys_that_are_shared_are_tiled() -> None:
    spec = SPECS["table"]
    given, operands = case(spec, 2, 2, 49, 49)
    given[1] = given[1][:, :1]
    assert few_keys_tile(*(t.shape for t in given)) is None
    check_gradients(spec, given, operands)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table and regions", "dense biases"])
def test_gradients_in_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "MOST_FEW", 0)
    check_gradients(SPECS[name], *case(SPECS[name], 3, 2, 49, 49))


def test_gradients_do_not_depend_on_threads() -> None:
    spec = SPECS["table and regions"]
    given, operands = case(spec, 9, 2, 49, 49)
    for t in (*given, operands[0]):
        t.requires_grad_()
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            out = bind(str(spec), str(Schedule(WINDOW, tile_of(49, 49))))(*given, *operands)
            found.append(torch.autograd.grad(out.square().sum(), (*given, operands[0])))
    finally:
        torch.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)


# -- maps -----------------------------------------------------------------------------------------
def places(height: int, width: int, window: int, shift: int = 0) -> Tensor:
    map_ = torch.arange(height * width).view(height, width).roll((-shift, -shift), (0, 1))
    rows, columns = height // window, width // window
    return map_.view(rows, window, columns, window).transpose(1, 2).reshape(
        rows * columns, window**2).int()


@pytest.mark.parametrize("maps", [1, 2])
def test_maps(maps: int) -> None:
    spec, table = SPECS["table"], places(14, 21, 7, 3)
    given = [torch.randn(maps, 294, 3, 2, 32)[:, :, i].transpose(1, 2) for i in range(3)]
    operands = [torch.randn(2, 98)]
    texts = str(spec), str(Schedule(WINDOW, tile_of(49, 49))), literal_text(table)
    flat = table.flatten().long()
    inside = [t.index_select(2, flat).unflatten(2, (-1, 49)).transpose(1, 2).flatten(0, 1)
              for t in given]
    exact = reference(spec)(*doubled(inside), operands).unflatten(0, (maps, -1)).transpose(
        1, 2).flatten(2, 3)[:, :, flat.argsort()]
    with torch.no_grad():
        found = bind_windows(*texts)(*given, *operands)
        assert torch.allclose(found.double(), exact, atol=1e-5)
        assert torch.equal(window_attention(*given, operands, *texts), found)
        double = bind_windows(*texts)(*doubled(given), *operands)  # composed
        assert torch.allclose(double, exact, atol=1e-12)
    learned = [t.clone().requires_grad_() for t in (*given, operands[0])]
    out = bind_windows(*texts)(*learned)
    assert torch.allclose(out.double(), exact, atol=1e-5)
    twins = [t.detach().double().requires_grad_() for t in learned]
    right = bind_windows(str(spec), '["aten:dense"]', texts[2])(*twins)
    for one, two in zip(torch.autograd.grad(out.sum(), learned),
                        torch.autograd.grad(right.sum(), twins), strict=True):
        assert torch.allclose(one.double(), two, atol=1e-4)


def test_places_must_hold_each_token_once() -> None:
    table = places(14, 14, 7)
    table[0, 0] = 1
    with pytest.raises(ValueError, match="each token once, got 195 of 196"):
        bind_windows(str(SPECS["plain"]), "", literal_text(table))


def test_maps_of_another_size_are_refused() -> None:
    spec, table = SPECS["plain"], places(14, 14, 7)
    run = bind_windows(str(spec), str(Schedule(WINDOW, tile_of(49, 49))), literal_text(table))
    with pytest.raises((ValueError, RuntimeError, IndexError)):
        run(*(torch.randn(1, 2, 195, 32) for _ in range(3)))
    assert ALL is spec.mask
