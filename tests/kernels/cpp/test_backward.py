"""Gradients of the generated C++ kernels against the float64 reference, by the acceptance rule."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal, KeyKeep, Where
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import reference
from attnopt.kernels.bind import bind
from attnopt.kernels.cpp import Attention, spec_reasons, training_reasons
from attnopt.kernels.cpp.call import kernel, log_sum_exp, signature_of
from attnopt.kernels.cpp.call_backward import backward
from attnopt.kernels.cpp.isa import AVX2, GENERIC, Isa, isas
from attnopt.kernels.cpp.template import Tile
from attnopt.kernels.cpp.toolchain import toolchain
from tests.kernels.cases import (
    BIAS,
    CASES,
    INF,
    PAD,
    B,
    D,
    H,
    K,
    Q,
    close,
    doubled,
    inputs,
    operands_of,
    s,
    tanh,
)
from tests.kernels.test_aten import strided
from tests.kernels.test_aten_rows import empty_rows

pytestmark = pytest.mark.skipif(bool(toolchain().why_not()), reason="no C++ compiler")
CPP = str(Schedule("cpp", (12, 32, 6, 2)))
q, k = E.index("q"), E.index("k")
TAKEN = {"plain", "causal", "aligned", "band", "bias", "biases", "bias of a table",
         "bias and causal", "padding", "padding and bias", "scale per head", "scale per key",
         "negative scale", "alibi", "softcap", "softcap, padding and causal", "cases", "upcast"}


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    torch.manual_seed(0)


def slow(*values: object) -> list[object]:
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=pytest.mark.slow)
            for v in values]


def moderate(*leading: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Inputs whose logits are so small that their own rounding does not hide anything."""
    query, key, value = inputs(*leading)
    return [(query * 0.5).to(dtype), key.to(dtype), value.to(dtype)]


def gradients(out: Tensor, of: Sequence[Tensor], ahead: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out, of, ahead.to(out.dtype))


def check_gradients(spec: Spec, given: Sequence[Tensor], operands: Sequence[Tensor] = (),
                    ahead: Tensor | None = None, taken: bool = True) -> None:
    """Every gradient by the acceptance rule; `taken`: by the generated kernel."""
    given = [t.detach().requires_grad_() for t in given]
    operands = [t.detach().requires_grad_(t.is_floating_point()) for t in operands]
    used = [t for t in (*given, *operands) if t.requires_grad]
    if spec.score == "key":
        used = [t for t in used if t is not given[0] and t is not given[1]]
    out = bind(str(spec), CPP)(*given, *operands)
    assert (type(out.grad_fn).__name__ == "_AttendBackward") == taken
    ahead = torch.randn(out.shape, dtype=torch.float64) if ahead is None else ahead
    found = gradients(out, used, ahead)
    composed = gradients(reference(spec)(*given, operands), used, ahead)
    exact_out, exact, scales = exactly(spec, given, operands, used, ahead.to(out.dtype).double())
    close(out, exact_out, reference(spec)(*given, operands).to(out.dtype))
    for t, one, right, other, scale in zip(used, found, exact, composed, scales, strict=True):
        assert one.shape == t.shape and one.dtype == t.dtype
        near(one, right, other, scale)


def exactly(spec: Spec, given: Sequence[Tensor], operands: Sequence[Tensor],
            used: Sequence[Tensor], ahead: Tensor
            ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """The output and its gradients in float64, and how large they are.

    An operand's gradient is a sum in which much may cancel: it is as large as the root of the sum
    of the squares of its terms.
    """
    twins = {id(t): t.detach().double() for t in used}
    full = (*ahead.shape[:-1], given[1].shape[-2])
    for described, t in zip(spec.operands, operands, strict=True):
        if id(t) in twins and described.axes is not None and described.role in ("bias", "scale"):
            twins[id(t)] = twins[id(t)].expand(full).clone()
    for twin in twins.values():
        twin.requires_grad_()
    out = reference(spec)(*(twins.get(id(t), t.double()) for t in given),
                          [twins.get(id(t), t) for t in operands])
    terms = gradients(out, [twins[id(t)] for t in used], ahead)
    return (out, [g.sum_to_size(t.shape) for g, t in zip(terms, used, strict=True)],
            [g.square().sum_to_size(t.shape).sqrt() for g, t in zip(terms, used, strict=True)])


def near(found: Tensor, exact: Tensor, composed: Tensor, scale: Tensor) -> None:
    """The acceptance rule with one bit to spare: what a row's gradients have in common comes from
    the rounded output, as in every backward that does not hold the weights."""
    assert (found.isnan() == exact.isnan()).all(), "NaN must be where the reference has it"

    def largest(t: Tensor) -> float:
        return t.detach().nan_to_num(0.0, 0.0, 0.0).abs().max().item()

    bound = 2 * max(2 * largest(composed.double() - exact), 8 * torch.finfo(found.dtype).eps
                    * max(largest(exact), largest(scale)))
    error = largest(found.double() - exact)
    assert error <= bound, f"error must be at most {bound}, got {error}"


# -- specs and dtypes -----------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_every_case(case: str) -> None:
    spec = CASES[case]
    # A second dot product is columns of the first one.
    check_gradients(spec, moderate(), operands_of(spec), taken=case in TAKEN | {"low rank"})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, *slow(torch.float16)])
@pytest.mark.parametrize("case", ["plain", "causal", "softcap, padding and causal", "bias",
                                  "scale per head", *slow("biases", "alibi", "upcast", "band")])
def test_half_precision(case: str, dtype: torch.dtype) -> None:
    spec = CASES[case]
    operands = [t.to(dtype) if t.is_floating_point() else t for t in operands_of(spec)]
    check_gradients(spec, moderate(dtype=dtype), operands)


def test_double_precision_is_composed() -> None:
    check_gradients(CASES["softcap"], inputs(dtype=torch.float64), taken=False)
    bias = torch.randn(H, Q, K, dtype=torch.float64)
    out = bind(str(CASES["bias"]), CPP)(*inputs(), bias.requires_grad_())
    assert type(out.grad_fn).__name__ != "_AttendBackward"


x = E.load("bias")
POINTWISE = {
    "tanh of the bias": s * 0.3 + E.call("tanh", x * s),
    "bias twice": s * x + x * x * 0.1,
    "divided": s / (E.call("exp", x) + 1.0),
    "root": E.call("sqrt", E.call("abs", s) + 1.0) + E.call("rsqrt", x * x + 1.0),
    "minimum": E.call("minimum", s * 0.3, x),
    "maximum with a number": E.call("maximum", s * 0.3, 0.1) + E.call("relu", x),
    "where": E.where(x < 0.0, s * 0.3, s * x),
    "sigmoid": E.call("log", E.call("sigmoid", s)) - E.call("softplus", x),
    "waves": E.call("sin", s) + E.call("cos", x) + E.call("erf", s * x),
    "power": E.call("pow", E.call("abs", x) + 0.5, s * 0.1),
    "distance": s * 0.3 - E.call("abs", q - k) * E.call("log1p", E.call("exp2", x)),
    "rounded": s * 0.3 + E.call("round", x) + E.call("sign", x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", POINTWISE)
def test_pointwise_logits(name: str) -> None:
    spec = Spec(logits=POINTWISE[name], mask=Band(-3, 2), operands=(BIAS,))
    check_gradients(spec, moderate(), [torch.randn(H, Q, K)])


# -- lengths, layouts, leading axes ---------------------------------------------------------------
@pytest.mark.parametrize("case", ["plain", "aligned", *slow("padding", "softcap")])
@pytest.mark.parametrize("batch, rows, keys, dim, value_dim", [
    (1, 1, 1, 1, 1), (3, 1, 300, 5, 17), (2, 100, 67, 64, 64), (1, 12, 257, 80, 1),
    *slow((1, 3, 3, 3, 5), (1, 130, 129, 5, 8), (1, 16, 16, 16, 17), (1, 49, 65, 40, 24),
          (1, 7, 40, 128, 130))])
def test_lengths(case: str, batch: int, rows: int, keys: int, dim: int, value_dim: int) -> None:
    spec = CASES[case]
    given = [torch.randn(batch, H, n, w) for n, w in (
        (rows, dim), (keys, dim), (keys, value_dim))]
    given[0] *= dim**-0.5
    pad = [(torch.rand(batch, 1, 1, keys) < 0.7).index_fill(-1, torch.tensor(0), True)]
    if case == "aligned" and rows > keys:
        spec = Spec(logits=s * 0.3, mask=Causal())
    check_gradients(spec, given, pad if case == "padding" else [])


@pytest.mark.parametrize("shape", [(0, H), (2, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    given = [torch.randn(shape[0], H, n, D, requires_grad=True) for n in (shape[1], K, K)]
    out = bind(str(CASES["plain"]), CPP)(*given)
    for t, g in zip(given, torch.autograd.grad(out.sum(), given), strict=True):
        assert g.shape == t.shape and not g.any()


@pytest.mark.parametrize("case", ["plain", "bias", "softcap, padding and causal"])
@pytest.mark.parametrize("layout", ["heads last", "transposed", "every second", "one key head",
                                    "key batch of one", "broadcast", "query of one row"])
def test_strides(layout: str, case: str) -> None:
    spec = CASES[case]
    check_gradients(spec, strided(layout), operands_of(spec))


@pytest.mark.parametrize("ahead", ["ones", "expanded rows", "heads last", "transposed"])
def test_gradients_that_arrive_in_any_layout(ahead: str) -> None:
    grad = {"ones": torch.ones(()).expand(B, H, Q, D),
            "expanded rows": torch.randn(B, H, 1, D).expand(B, H, Q, D),
            "heads last": torch.randn(B, Q, H, D).transpose(1, 2),
            "transposed": torch.randn(B, H, D, Q).mT}[ahead]
    check_gradients(CASES["plain"], inputs(), ahead=grad)


def test_gradients_have_the_layout_of_what_they_are_of() -> None:
    given = [t.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for t in inputs()]
    for t, g in zip(given, torch.autograd.grad(
            bind(str(CASES["plain"]), CPP)(*given).sum(), given), strict=True):
        assert g.stride() == t.stride()


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("leads, shared", [
    ((), 0), ((3,), 0), ((2, 3), 1), ((2, 3), 2), ((2, 3, 4), 1), ((2, 3, 4), 2),
    *slow(((2, 3, 4), 0), ((2, 1, 3, 2), 1), ((1, 2, 2, 3), 0))])
def test_leading_axes(leads: tuple[int, ...], shared: int, threads: int) -> None:
    """shared: counted from the right, the axis along which keys and values have length 1."""
    own = tuple(1 if shared and i == len(leads) - shared else n for i, n in enumerate(leads))
    given = [torch.randn(*lead, n, D) for lead, n in ((leads, Q), (own, K), (own, K))]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_gradients(CASES["softcap"], given)
        for of_bias in {leads[-1:], leads, leads[:1] + (1,) * len(leads[1:])}:
            check_gradients(CASES["bias"], given, [torch.randn(*of_bias, Q, K)])
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("of_key, of_value", [((1, H), (B, H)), ((B, 1), (1, H)), ((H,), (B, 1))])
def test_keys_and_values_that_broadcast_differently(
        of_key: tuple[int, ...], of_value: tuple[int, ...]) -> None:
    check_gradients(CASES["causal"], [torch.randn(B, H, Q, D), torch.randn(*of_key, K, D),
                                      torch.randn(*of_value, K, D)])
    check_gradients(CASES["causal"], [torch.randn(1, H, Q, D), torch.randn(*of_key, K, D),
                                      torch.randn(B, 1, K, D)])


# -- gradients of operands ------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("rows, keys", [(Q, K), (70, 130)])
@pytest.mark.parametrize("axes, shape", [
    (("b", "h", "q", "k"), "bhqk"), (("h", "q", "k"), "hqk"), (("b", "q", "k"), "b1qk"),
    (("q", "k"), "qk"), (("h", "k"), "h1k"), (("b", "k"), "b11k"), (("k",), "k"), (("h",), "h11"),
    (("b", "h", "q"), "bhq1"), (("q",), "q1"), (("b",), "b111"), ((), ""), ((), "1"),
    (("h", "q", "k"), "11k"), (("h", "q", "k"), "1q1"), (("h", "q", "k"), "111"),
    (("h", "k"), "111")])
def test_shared_biases(axes: tuple[str, ...], shape: str, rows: int, keys: int) -> None:
    lengths = {"b": B, "h": H, "q": rows, "k": keys, "1": 1}
    bias = torch.randn([lengths[a] for a in shape])
    given = [torch.randn(B, H, n, D) for n in (rows, keys, keys)]
    operand = Operand("x", axes, role="bias")
    logits = E.call("tanh", s * 0.3) * E.load("x")
    if "k" in axes:  # or else the gradient of what is added is zero
        logits = logits + E.load("x")
    check_gradients(Spec(logits=logits, mask=Causal(), operands=(operand,)), given, [bias])


def test_several_operands_at_once() -> None:
    spec = CASES["biases"]
    row, bias = operands_of(spec)
    check_gradients(spec, inputs(), [row, bias])
    out = bind(str(spec), CPP)(*inputs(), row.requires_grad_(), bias)
    assert type(out.grad_fn).__name__ == "_AttendBackward"
    exact = reference(spec)(*doubled(inputs()), [row.detach().double(), bias.double()])
    assert out.shape == exact.shape


def test_a_bias_of_another_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        bias = torch.randn(H, Q, K).to(dtype).requires_grad_()
        given = inputs()
        grad, = torch.autograd.grad(bind(str(CASES["bias"]), CPP)(*given, bias).sum(), bias)
        wide = bias.detach().double().requires_grad_()
        exact, = torch.autograd.grad(
            reference(CASES["bias"])(*doubled(given), [wide]).sum(), wide)
        assert grad.dtype == dtype
        bound = 8 * torch.finfo(dtype).eps * exact.abs().max()
        assert (grad.double() - exact).abs().max() <= bound


# -- masks, tile lists, rows without a key --------------------------------------------------------
LISTED = {
    "causal": (Causal(), ()), "aligned": (Causal(E.size("k") - E.size("q")), ()),
    "band": (Band(-20, 3), ()), "far band": (Band(-90, -60), ()),
    "padding": (KeyKeep("pad"), (PAD,)), "padding and causal": (KeyKeep("pad") & Causal(), (PAD,)),
    "blocks": (Where((q // 40).eq(k // 40)), ())}


@pytest.mark.parametrize("empty_row", ["zero", "nan"])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("mask", LISTED)
def test_tile_lists(mask: str, shared: bool, empty_row: str) -> None:
    rows, keys = 150, 170
    predicate, operands = LISTED[mask]
    spec = Spec(logits=tanh, mask=predicate, empty_row=empty_row, operands=operands)
    pad = torch.rand(B, 1, 1, keys) < 0.7
    pad[0, ..., :80], pad[1, ..., 64:] = False, False
    given = [torch.randn(B, H, rows, D),
             *(torch.randn(B, 1 if shared else H, keys, D) for _ in range(2))]
    attention = Attention(spec, (12, 32, 6, 2))
    given_operands = [pad] if operands else []
    assert attention.lists(*given, given_operands, Tile(12, 32, 6, 2)) is not None
    check_gradients(spec, given, given_operands)


@pytest.mark.parametrize("case", list(empty_rows()))
def test_rows_without_a_key(case: str) -> None:
    spec, operands = empty_rows()[case]
    check_gradients(spec, inputs(), operands, taken=spec.empty_row != "uniform")
    given = [t.requires_grad_() for t in inputs()]
    out = bind(str(spec), CPP)(*given, *operands)
    if spec.empty_row != "nan":
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), given))


@pytest.mark.parametrize("case", ["plain", "causal", "padding", "bias", "softcap"])
@pytest.mark.parametrize("what, where, number", [
    ("query", 3, float("nan")), ("key", 0, float("nan")), ("value", 0, float("nan")),
    ("query", 3, INF), ("key", 0, INF)])
def test_numbers_that_are_none_are_not_lost(
        what: str, where: int, number: float, case: str) -> None:
    spec, given = CASES[case], inputs()
    given["query key value".split().index(what)][:, :, where] = number
    operands = operands_of(spec)
    twins = [t.detach().double().requires_grad_() for t in given]
    given = [t.requires_grad_() for t in given]
    found = torch.autograd.grad(bind(str(spec), CPP)(*given, *operands).sum(), given)
    exact = torch.autograd.grad(reference(spec)(*twins, doubled(operands)).sum(), twins)
    for one, other in zip(found, exact, strict=True):
        assert (one.isnan() == other.isnan()).all()


@pytest.mark.parametrize("number", [float("nan"), INF, -INF])
def test_a_key_that_is_hidden_cannot_spoil_the_row(number: float) -> None:
    spec = CASES["softcap, padding and causal"]
    pad = torch.ones(B, 1, 1, K, dtype=torch.bool)
    pad[..., 2] = False
    given = inputs()
    given[1][:, :, 2] = number
    given = [t.requires_grad_() for t in given]
    found = torch.autograd.grad(bind(str(spec), CPP)(*given, pad).sum(), given)
    assert found[2].isfinite().all() and found[1].isfinite().all()


# -- autograd -------------------------------------------------------------------------------------
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 2), (1, 3), (3,)])
def test_only_what_is_asked_for(which: tuple[int, ...]) -> None:
    tensors = [*inputs(), torch.randn(H, Q, K)]
    wide = doubled(tensors)
    for i in which:
        tensors[i].requires_grad_()
        wide[i].requires_grad_()
    out = bind(str(CASES["bias"]), CPP)(*tensors)
    assert type(out.grad_fn).__name__ == "_AttendBackward"
    out.sum().backward()
    reference(CASES["bias"])(*wide[:3], wide[3:]).sum().backward()
    for i, (one, other) in enumerate(zip(tensors, wide, strict=True)):
        assert (one.grad is None) == (i not in which)
        if one.grad is not None:
            torch.testing.assert_close(one.grad.double(), other.grad, rtol=1e-5, atol=1e-5)


def test_the_graph_of_the_gradient() -> None:
    spec = CASES["softcap, padding and causal"]
    operands = operands_of(spec)
    given = [t.requires_grad_() for t in inputs()]

    def twice(run: object, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        out = run(*tensors)  # type: ignore[operator]
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    found = twice(lambda *t: bind(str(spec), CPP)(*t, *operands), given)
    wide = [t.detach().double().requires_grad_() for t in given]
    exact = twice(lambda *t: reference(spec)(*t, operands), wide)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


def test_gradcheck_twice() -> None:
    given = [torch.randn(1, 2, n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 4, 4)]
    run = bind(str(CASES["softcap"]), CPP)
    assert torch.autograd.gradcheck(run, given)
    assert torch.autograd.gradgradcheck(run, given)


def test_a_graph_that_is_kept_gives_the_same_again() -> None:
    given = [t.requires_grad_() for t in inputs()]
    out = bind(str(CASES["plain"]), CPP)(*given).sum()
    first = torch.autograd.grad(out, given, retain_graph=True)
    for one, other in zip(first, torch.autograd.grad(out, given), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, given)


def test_inputs_that_were_overwritten_are_noticed() -> None:
    given = [t.requires_grad_() for t in inputs()]
    key = given[1] * 1.0
    out = bind(str(CASES["plain"]), CPP)(given[0], key, given[2])
    key.add_(1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


@pytest.mark.parametrize("write", [
    lambda out: out.add_(1), lambda out: (out[..., :3].mul_(2), out)[1],
    lambda out: out.transpose(1, 2).flatten(2).mul_(3)], ids=("whole", "part", "heads beside"))
def test_the_output_may_be_written_in_place(write) -> None:
    """As a product of matrices may: the residual of a block is often added so."""
    own = [t.requires_grad_() for t in moderate()]
    composed = [t.detach().clone().requires_grad_() for t in own]
    found, wanted = bind(str(Spec()), CPP)(*own), reference(Spec())(*composed).float()
    assert "Attend" in str(found.grad_fn)
    found, wanted = write(found), write(wanted)
    for _ in range(2):
        for x, y in zip(torch.autograd.grad(found.square().sum(), own, retain_graph=True),
                        torch.autograd.grad(wanted.square().sum(), composed, retain_graph=True),
                        strict=True):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_gradients_in_batches() -> None:
    given = [t.requires_grad_() for t in inputs()]
    out = bind(str(CASES["causal"]), CPP)(*given)
    ahead = torch.randn(3, *out.shape)
    every = torch.autograd.grad(out, given, ahead, is_grads_batched=True, retain_graph=True)
    for i in range(3):
        for one, other in zip(torch.autograd.grad(out, given, ahead[i], retain_graph=True), every,
                              strict=True):
            torch.testing.assert_close(one, other[i])


def test_functional_transforms_and_forward_mode_are_composed() -> None:
    run = bind(str(CASES["softcap"]), CPP)
    given = inputs()

    def loss(*tensors: Tensor) -> Tensor:
        return run(*tensors).square().sum()

    found = torch.func.grad(loss, (0, 1, 2))(*given)
    leaves = [t.requires_grad_() for t in given]
    for one, other in zip(found, torch.autograd.grad(loss(*leaves), leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_checkpointing_and_saved_tensor_hooks() -> None:
    run = bind(str(CASES["causal"]), CPP)
    given = [t.requires_grad_() for t in inputs()]
    plain = torch.autograd.grad(run(*given).sum(), given)
    again = torch.utils.checkpoint.checkpoint(run, *given, use_reentrant=False)
    with torch.autograd.graph.save_on_cpu():
        hooked = run(*given)
    for other in (again, hooked):
        for one, two in zip(plain, torch.autograd.grad(other.sum(), given), strict=True):
            assert torch.equal(one, two)


def test_the_output_under_autograd_is_that_of_inference() -> None:
    run = bind(str(CASES["softcap"]), CPP)
    given = inputs()
    plain = run(*given)
    recorded = run(*(t.requires_grad_() for t in given))
    assert torch.equal(plain, recorded) and recorded.stride() == plain.stride()


# -- statistics, instruction sets, reasons --------------------------------------------------------
@pytest.mark.parametrize("case", ["plain", "softcap", "padding and bias", "sink and causal",
                                  "exp", "sigmoid"])
def test_statistics_hold_the_log_sum_exp(case: str) -> None:
    spec, given = CASES[case], inputs()
    operands = operands_of(spec)
    run = kernel(signature_of(spec, *given, operands), Tile(12, 32, 6, 2))
    statistics = torch.empty(B, H, Q, 2)
    run(*given, operands, statistics=statistics)
    _, exact = reference(spec)(*doubled(given), doubled(operands), with_lse=True)
    torch.testing.assert_close(log_sum_exp(statistics).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("target", [AVX2, GENERIC], ids=str)
@pytest.mark.parametrize("tile", [Tile(6, 16, 6, 2), Tile(12, 32, 4, 3), Tile(24, 32, 12, 1)])
def test_other_instruction_sets_and_tiles(target: Isa, tile: Tile) -> None:
    if target.width > isas()[0].width or isas()[0].width == 4 and target.width > 4:
        pytest.skip(f"no {target} here")
    spec = CASES["bias and causal"]
    given, operands = inputs(), operands_of(spec)
    signature = signature_of(spec, *given, operands)
    statistics = torch.empty(B, H, Q, 2)
    out = kernel(signature, tile, target)(*given, operands, statistics=statistics)
    ahead = torch.randn(out.shape)
    found = backward(signature, ("bias",), tile, target)(
        given, operands, out, statistics, ahead)
    wide = [t.double().requires_grad_() for t in (*given, *operands)]
    exact = gradients(reference(spec)(*wide[:3], wide[3:]), wide, ahead)
    for one, other in zip(found, exact, strict=True):
        assert one is not None
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)


def test_reasons_name_what_has_no_backward_kernel() -> None:
    wanted = {case: tuple(o.slot for o in spec.operands if o.dtype == E.FLOAT)
              for case, spec in CASES.items()}
    assert TAKEN == {case for case, spec in CASES.items()
                     if not spec_reasons(spec) and not training_reasons(spec, wanted[case])}
    assert "sinks" in training_reasons(CASES["sink"])[0]
    assert "nan or zero" in training_reasons(CASES["padding and causal"])[0]
