"""The ATen lowerings against the float64 reference: values, gradients, masks, layouts, choices.

A lowering may be off by twice what the plain composition in the same dtype is off, or by 8 ulp of
the largest output: the rule by which rewrites are accepted.
"""

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.evaluate import Env, evaluate
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Band, Causal, KeyKeep, Prefix, Segments, Where
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import reference
from attnopt.kernels.aten import bind, choose
from attnopt.kernels.aten.choose import block_reasons, block_tile
from attnopt.kernels.aten.codegen import MODES, compiled, source
from attnopt.kernels.aten.heads import collapse
from attnopt.kernels.aten.linear import linear
from attnopt.kernels.aten.sdpa import plan, reasons
from attnopt.kernels.aten.skipping import key_range
from attnopt.kernels.aten.tile import Tile, broadcast

B, H, Q, K, D = 2, 3, 5, 7, 8
INF = float("inf")
s, q, k = E.score, E.index("q"), E.index("k")
PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
BIAS = Operand("bias", ("h", "q", "k"), role="bias")
ROW = Operand("row", ("b", "k"), role="mask")
HEAD = Operand("head", ("h",), role="scale")
SINK = Operand("sink", ("h",), role="sink")
TABLE = Operand("table", None, role="table")
GATE = Operand("gate", ("b", "h", "q"), role="gate")
MIX = Operand("mix", None, role="mix")
WEIGHT = Operand("score_weight", None, role="other")
LEFT, RIGHT = (Operand(n, ("h", a), role="factor") for n, a in (("left", "q"), ("right", "k")))
SLOTS = {
    "pad": lambda: (torch.rand(B, 1, 1, K) < 0.7).index_fill(-1, torch.tensor(0), True),
    "bias": lambda: torch.randn(H, Q, K), "row": lambda: torch.randn(B, 1, 1, K),
    "head": lambda: torch.rand(H, 1, 1) + 0.5, "sink": lambda: torch.randn(H, 1, 1),
    "table": lambda: torch.randn(H, Q + K), "gate": lambda: torch.randn(B, H, Q, 1),
    "mix": lambda: torch.randn(H, H), "score_weight": lambda: torch.randn(D),
    "left": lambda: torch.randn(H, Q, 2), "right": lambda: torch.randn(H, K, 2),
}
tanh = E.call("tanh", s * (0.3 / 5)) * 5.0
CASES = {
    "plain": Spec(logits=s * 0.3),
    "causal": Spec(logits=s * 0.3, mask=Causal()),
    "aligned": Spec(logits=s * 0.3, mask=Causal(E.size("k") - E.size("q"))),
    "band": Spec(logits=s * 0.3, mask=Band(-2, 1)),
    "bias": Spec(logits=s * 0.3 + E.load("bias"), operands=(BIAS,)),
    "biases": Spec(logits=(s + E.load("row")) / 3.0 - E.load("bias"), operands=(ROW, BIAS)),
    "bias of a table": Spec(logits=s * 0.3 + E.load("table", E.index("h"), q - k + (K - 1)),
                            operands=(TABLE,)),
    "bias and causal": Spec(logits=s * 0.3 + E.load("bias"), mask=Causal(), operands=(BIAS,)),
    "padding": Spec(logits=s * 0.3, mask=KeyKeep("pad"), operands=(PAD,)),
    "padding and causal": Spec(logits=s, mask=KeyKeep("pad") & Causal(), empty_row="uniform",
                               operands=(PAD,)),
    "padding and bias": Spec(logits=s * 0.3 + E.load("bias"), mask=KeyKeep("pad") & Causal(),
                             empty_row="zero", operands=(PAD, BIAS)),
    "scale per head": Spec(logits=s * E.load("head"), operands=(HEAD,)),
    "scale per key": Spec(logits=0.3 * s * E.load("row"), operands=(ROW,)),
    "negative scale": Spec(logits=1.0 - s * 0.3),
    "alibi": Spec(logits=s * 0.3 + E.load("head") * E.call("neg", E.call("abs", q - k)),
                  operands=(HEAD,)),
    "low rank": Spec(logits=s * 0.3 + E.inner("left", "right"), operands=(LEFT, RIGHT)),
    "gate": Spec(logits=s * 0.3, output=E.out * E.load("gate"), operands=(GATE,)),
    "sink": Spec(logits=s * 0.3, sinks=E.load("sink"), operands=(SINK,)),
    "sink and causal": Spec(logits=s * 0.3, mask=Causal(), sinks=E.load("sink"),
                            operands=(SINK,)),
    "softcap": Spec(logits=tanh),
    "softcap, padding and causal": Spec(logits=tanh, mask=KeyKeep("pad") & Causal(),
                                        operands=(PAD,)),
    "softcap and sink": Spec(logits=tanh + E.load("bias"), sinks=E.load("sink"), mask=Causal(),
                             operands=(BIAS, SINK)),
    "cases": Spec(logits=E.where(q < k, s * 0.3, E.call("maximum", s * s, 0.5) - s)),
    "upcast": Spec(logits=tanh, compute="float32"),
    "distance": Spec(score="distance", logits=s * -0.2),
    "additive": Spec(score="additive", operands=(WEIGHT,)),
    "key": Spec(score="key", logits=E.load("row"), operands=(ROW,)),
    "key and causal": Spec(score="key", logits=E.load("row"), mask=Causal(), operands=(ROW,)),
    "sigmoid": Spec(logits=s * 0.3 - 1.0, normalizer="sigmoid", mask=KeyKeep("pad"),
                    operands=(PAD,)),
    "relu": Spec(logits=s * 0.3 + 2.0, normalizer="relu", l1=True, mask=Causal()),
    "softplus": Spec(logits=s, normalizer="softplus", mask=Band(-3, 0)),
    "exp": Spec(logits=s * 0.3, normalizer="exp", l1=True),
    "linear": Spec(logits=s * 0.3, normalizer="identity", mask=Causal()),
    "edited": Spec(logits=s * 0.3, weights=E.weight * E.weight + 0.1, renormalize=True),
    "statistics": Spec(logits=s * 0.3, mask=KeyKeep("pad"), operands=(PAD,),
                       weights=E.weight * E.stat("count") + E.stat("max") * 0.1,
                       output=E.out * E.stat("lse") / E.stat("total")),
    "groups": Spec(logits=s * 0.3, groups=E.where(k < 3, 0, 1),
                   weights=E.where(k < 3, E.weight / E.stat("mass:0"), E.weight)),
    "talking heads": Spec(logits=s * 0.3, mix_logits="mix", mix_weights="mix", mask=Causal(),
                          operands=(MIX,)),
}
SCHEDULES = {"chosen": "", "dense": str(Schedule("aten:dense")),
             "blocks": str(Schedule("aten:blocks", (2, 4)))}


def operands_of(spec: Spec) -> list[Tensor]:
    return [SLOTS[o.slot]() for o in spec.operands]


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    leading = leading or (B, H)
    return [torch.randn(*leading, n, D).to(dtype) for n in (Q, K, K)]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check(spec: Spec, given: Sequence[Tensor], operands: Sequence[Tensor] = (),
          schedule: str = "", exact: Tensor | None = None) -> Tensor:
    """Run a lowering and hold it to the acceptance rule; returns its output."""
    if exact is None:
        exact = reference(spec)(*doubled(given), doubled(operands))
    before = [t.detach().clone() for t in (*given, *operands)]
    found = bind(str(spec), schedule)(*given, *operands)
    assert found.dtype == given[0].dtype and found.shape == exact.shape
    for was, now in zip(before, (*given, *operands), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
    close(found, exact, reference(spec)(*given, operands).to(found.dtype))
    return found


def close(found: Tensor, exact: Tensor, composed: Tensor) -> None:
    """The acceptance rule; `composed` is the plain composition in the dtype of `found`."""
    assert (found.isnan() == exact.isnan()).all(), "NaN must be where the reference has it"
    if not exact.numel():
        return

    def error(of: Tensor) -> float:
        return (of.detach().double() - exact).nan_to_num(0.0, 0.0, 0.0).abs().max().item()

    largest = exact.detach().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    bound = max(2 * error(composed), 8 * torch.finfo(found.dtype).eps * largest)
    assert error(found) <= bound, f"error must be at most {bound}, got {error(found)}"


# -- values ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_every_case(case: str, schedule: str, dtype: torch.dtype) -> None:
    spec = CASES[case]
    operands = [t.to(dtype) if t.is_floating_point() else t for t in operands_of(spec)]
    check(spec, inputs(dtype=dtype), operands, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", ["chosen", "dense"])
@pytest.mark.parametrize("case", CASES)
def test_gradients(case: str, schedule: str) -> None:
    spec = CASES[case]
    given = [t.requires_grad_() for t in inputs()]
    operands = [t.requires_grad_() if t.is_floating_point() else t for t in operands_of(spec)]
    leaves = [t for t in (*given, *operands) if t.requires_grad]
    used = [t for t in leaves if spec.score != "key" or t is not given[0] and t is not given[1]]
    ahead = torch.randn(B, H, Q, D)

    def gradients(out: Tensor, of: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(out, of, ahead.to(out.dtype))

    found = gradients(bind(str(spec), SCHEDULES[schedule])(*given, *operands), used)
    composed = gradients(reference(spec)(*given, operands), used)
    twins = {id(t): t.detach().double().requires_grad_() for t in leaves}
    exact = gradients(
        reference(spec)(*(twins[id(t)] for t in given), [twins.get(id(t), t) for t in operands]),
        [twins[id(t)] for t in used])
    for parts in zip(found, exact, composed, strict=True):
        close(*parts)


@pytest.mark.parametrize("case", ["plain", "causal", "bias", "padding and causal", "gate",
                                  "softcap and sink", "statistics", "talking heads"])
def test_gradcheck_twice(case: str) -> None:
    spec = CASES[case]
    run = bind(str(spec))
    given = [torch.randn(1, H, n, 2, dtype=torch.float64, requires_grad=True) for n in (Q, K, K)]
    operands = [t.double().requires_grad_() if t.is_floating_point() else t[:1]
                for t in operands_of(spec)]
    if case == "gate":
        operands[0] = operands[0].detach()[:1].requires_grad_()
    assert torch.autograd.gradcheck(run, (*given, *operands))
    assert torch.autograd.gradgradcheck(run, (*given, *operands))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", ["plain", "padding", "padding and causal", "softcap", "sink"])
@pytest.mark.parametrize("batch, rows, keys, dim", [
    (0, 5, 7, 8), (1, 1, 1, 1), (1, 3, 3, 3), (2, 0, 7, 8), (2, 5, 0, 8), (1, 130, 129, 5),
    (3, 1, 300, 4), (1, 16, 16, 16)])
def test_lengths(case: str, schedule: str, batch: int, rows: int, keys: int, dim: int) -> None:
    spec = CASES[case]
    given = [torch.randn(batch, H, n, dim) for n in (rows, keys, keys)]
    operands = {"padding": [torch.rand(batch, 1, 1, keys) < 0.7],
                "padding and causal": [torch.rand(batch, 1, 1, keys) < 0.7],
                "sink": [torch.randn(H, 1, 1)]}.get(case, [])
    check(spec, given, operands, SCHEDULES[schedule])


@pytest.mark.parametrize("value_dim", [4, 8, 12, 40])
@pytest.mark.parametrize("case", ["plain", "causal", "softcap", "sink", "gate"])
def test_a_value_dim_of_its_own(case: str, value_dim: int) -> None:
    query, key, _ = inputs()
    given = [query, key, torch.randn(B, H, K, value_dim)]
    check(CASES[case], given, operands_of(CASES[case]))
    if case in ("plain", "causal"):
        run = bind(str(CASES[case]))
        for t in given:
            t.requires_grad_()
        assert torch.equal(run(*given).detach(), run(*(t.detach() for t in given)))


# -- layouts --------------------------------------------------------------------------------------
def strided(layout: str) -> list[Tensor]:
    query, key, value = inputs()
    match layout:
        case "heads last":
            return [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
        case "transposed":
            return [t.mT.contiguous().mT for t in (query, key, value)]
        case "every second":
            return [torch.randn(B, H, t.shape[2], 2 * D)[..., ::2] for t in (query, key, value)]
        case "one key head":
            return [query, *(t[:, :1].expand(B, H, K, D) for t in (key, value))]
        case "key batch of one":
            return [query, key[:1].expand(B, H, K, D), value]
        case "broadcast":
            return [query[:1], key, value[:, :1]]
        case "query of one row":
            return [query[..., :1, :].expand(B, H, Q, D), key, value]
    raise ValueError(layout)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", ["plain", "bias", "softcap, padding and causal", "sink"])
@pytest.mark.parametrize("layout", ["heads last", "transposed", "every second", "one key head",
                                    "key batch of one", "broadcast", "query of one row"])
def test_strides(layout: str, case: str, schedule: str) -> None:
    spec = CASES[case]
    given, operands = strided(layout), operands_of(spec)
    check(spec, given, operands, SCHEDULES[schedule])
    for t in given:
        t.requires_grad_()
    check(spec, given, operands, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("leads, shared", [
    ((), 0), ((3,), 0), ((2, 3), 1), ((2, 3, 4), 0), ((2, 3, 4), 1), ((2, 3, 4), 2),
    ((2, 1, 3, 2), 1), ((1, 2, 2, 3), 0)])
def test_leading_axes(leads: tuple[int, ...], shared: int, schedule: str) -> None:
    """shared: counted from the right, the axis along which keys and values have length 1."""
    own = tuple(1 if shared and i == len(leads) - shared else n for i, n in enumerate(leads))
    given = [torch.randn(*lead, n, D) for lead, n in ((leads, Q), (own, K), (own, K))]
    bias = Operand("bias", ("h", "q", "k"), role="bias")
    for spec, operands in (
            (CASES["plain"], []), (CASES["softcap"], []),
            (Spec(logits=s * 0.3 + E.load("bias"), operands=(bias,)),
             [torch.randn(*leads[-1:], Q, K)]),
            (Spec(logits=tanh, mask=KeyKeep("pad") & Causal(), operands=(PAD,)),
             [(torch.rand(*leads[:1], *[1] * max(len(leads) - 1, 0), 1, K) < 0.6)
              .index_fill(-1, torch.tensor(0), True)])):
        check(spec, given, operands, SCHEDULES[schedule])
        check(spec, [t.clone().requires_grad_() for t in given], operands, SCHEDULES[schedule])


@pytest.mark.parametrize("mask", [(1, 4, 1), (2, 4, 3), (2, 1, 3), (1, 1, 3), (2, 1, 1)])
def test_masks_of_windows_are_not_written_out_more_than_needed(mask: tuple[int, ...]) -> None:
    given = [torch.randn(2, 4, 3, n, D) for n in (Q, K, K)]
    bias = torch.randn(*mask, Q, K)
    four = collapse(*given, bias)
    whole = torch.softmax(given[0] @ given[1].mT + bias, -1) @ given[2]
    small = torch.softmax(four[0] @ four[1].mT + four[3], -1) @ four[2]
    torch.testing.assert_close(small.view_as(whole), whole)
    full = [n == m for n, m in zip(mask, (2, 4, 3), strict=True)]
    if full in ([False, True, True], [True, True, False], [True, True, True]) or sum(full) == 1:
        assert four[3] is not None and four[3].numel() <= bias.numel() * 3


# -- rows without a key, and numbers that are none -----------------------------------------------
def empty_rows() -> dict[str, tuple[Spec, list[Tensor]]]:
    keep = torch.rand(B, 1, Q, K) < 0.5
    keep[0, :, 1] = False
    operand = Operand("keep", ("b", "q", "k"), E.BOOL, "mask")
    term = Operand("term", ("b", "q", "k"), role="mask")
    mask = Where(E.load("keep", dtype=E.BOOL))
    found = {}
    for row in ("nan", "zero", "uniform"):
        for name, logits in (("", s * 0.3), ("softcap ", tanh)):
            found[f"{name}{row}"] = (
                Spec(logits=logits, mask=mask, empty_row=row, operands=(operand,)), [keep])
    for name, fill in (("-inf", -INF), ("lowest", torch.finfo(torch.float32).min), ("-100", -100.0),
                       ("-1e9", -1e9)):
        for kind, logits in (("", s * 0.3), ("softcap ", tanh)):
            found[f"{kind}term {name}"] = (
                Spec(logits=logits + E.load("term"), operands=(term,)),
                [torch.zeros(B, 1, Q, K).masked_fill(~keep, fill)])
    return found


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", list(empty_rows()))
def test_rows_without_a_key(case: str, schedule: str, grad: bool) -> None:
    spec, operands = empty_rows()[case]
    given = [t.requires_grad_(grad) for t in inputs()]
    found = check(spec, given, operands, SCHEDULES[schedule])
    if grad and spec.empty_row != "nan":
        assert all(g.isfinite().all() for g in torch.autograd.grad(found.sum(), given))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_is_what_fused_attention_gives(schedule: str) -> None:
    """A float mask of -inf hides keys, too, and F.scaled_dot_product_attention gives 0 there."""
    given, mask = inputs(), torch.zeros(B, 1, Q, K)
    mask[0, :, 1] = -INF
    spec = Spec(logits=s * 0.3 + E.load("term"), empty_row="zero",
                operands=(Operand("term", ("b", "q", "k"), role="mask"),))
    found = bind(str(spec), SCHEDULES[schedule])(*given, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(*given, mask, scale=0.3)
    torch.testing.assert_close(found, expected)
    assert found[0, :, 1].eq(0).all()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("case", ["plain", "causal", "padding", "bias", "softcap", "sink",
                                  "softcap, padding and causal", "sigmoid"])
@pytest.mark.parametrize("what, where, number", [
    ("query", 3, float("nan")), ("key", 0, float("nan")), ("value", 0, float("nan")),
    ("query", 3, INF), ("key", 0, INF), ("value", 0, INF)])
def test_numbers_that_are_none_are_not_lost(
        what: str, where: int, number: float, case: str, schedule: str, grad: bool) -> None:
    spec, given = CASES[case], inputs()
    given["query key value".split().index(what)][:, :, where] = number
    operands = operands_of(spec)
    for t in given:
        t.requires_grad_(grad)
    exact = reference(spec)(*doubled(given), doubled(operands))
    found = bind(str(spec), SCHEDULES[schedule])(*given, *operands)
    assert (found.isnan() == exact.isnan()).all()
    assert (found.isinf() == exact.isinf()).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rows", [5, 200])
def test_a_query_of_nan_gives_nan(rows: int, schedule: str) -> None:
    """torch's flash kernel without a mask gives 0 there."""
    for spec in (CASES["plain"], CASES["causal"]):
        given = [torch.randn(1, 2, rows, D) for _ in range(3)]
        given[0][:, :, 3] = float("nan")
        found = bind(str(spec), SCHEDULES[schedule])(*given)
        assert found[:, :, 3].isnan().all() and not found[:, :, :3].isnan().any()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("number", [float("nan"), INF, -INF])
def test_a_key_that_is_hidden_cannot_spoil_the_row(number: float, schedule: str) -> None:
    spec = CASES["softcap, padding and causal"]
    pad = torch.ones(B, 1, 1, K, dtype=torch.bool)
    pad[..., 2] = False
    given = inputs()
    given[1][:, :, 2] = number
    found = check(spec, given, [pad], SCHEDULES[schedule])
    assert found.isfinite().all()


# -- dtypes of operands, dropout ------------------------------------------------------------------
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_bias", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_bias_of_another_dtype(dtype: torch.dtype, of_bias: torch.dtype, schedule: str) -> None:
    for case in ("bias", "bias and causal"):
        spec, given = CASES[case], inputs(dtype=dtype)
        bias = torch.randn(H, Q, K).to(of_bias)
        exact = reference(spec)(*doubled(given), [bias.double()])
        found = bind(str(spec), SCHEDULES[schedule])(*given, bias)
        assert found.dtype == dtype
        bound = 8 * torch.finfo(dtype).eps * exact.abs().max()
        assert (found.double() - exact).abs().max() <= bound


def test_dropout_draws_as_torch_does() -> None:
    query, key, value = inputs()
    torch.manual_seed(3)
    weight = torch.dropout(torch.softmax(query @ key.mT * 0.3, -1), 0.4, True)
    torch.manual_seed(3)
    found = bind(str(Spec(logits=s * 0.3, dropout=0.4)))(query, key, value)
    torch.testing.assert_close(found, weight @ value)


def test_talking_heads_may_change_the_number_of_heads() -> None:
    mix = Operand("mix", None, role="mix")
    spec = Spec(logits=s * 0.3, mix_logits="mix", operands=(mix,))
    query, key, _ = inputs()
    check(spec, [query, key, torch.randn(B, 4, K, D)], [torch.randn(4, H)])


# -- blocks ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("mask", [
    Causal(), Causal(2), Causal(-3), Causal(E.size("k") - E.size("q")), Band(-2, 1), Band(3, 5),
    Prefix(4), Causal() & Band(-3, 9), Causal() & Prefix(2), ALL])
@pytest.mark.parametrize("queries, keys", [(6, 6), (5, 9), (9, 5)])
def test_key_range_holds_every_kept_key(mask: object, queries: int, keys: int) -> None:
    kept = mask.to_dense(queries, keys)  # type: ignore[attr-defined]
    for first, stop in itertools.combinations(range(queries + 1), 2):
        low, high = key_range(mask, first, stop, queries, keys)  # type: ignore[arg-type]
        assert 0 <= low < high <= keys
        outside = kept[first:stop].clone()
        outside[:, low:high] = False
        assert not outside.any()


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (3, 100), (128, 1), (5, 6)])
@pytest.mark.parametrize("case", ["softcap, padding and causal", "softcap and sink", "relu",
                                  "statistics", "band", "low rank", "bias of a table", "distance",
                                  "additive", "key and causal", "gate"])
def test_any_tile(case: str, tile: tuple[int, int]) -> None:
    spec = CASES[case]
    check(spec, inputs(), operands_of(spec), str(Schedule("aten:blocks", tile)))


def test_blocks_do_not_hold_the_scores() -> None:
    spec, length = CASES["softcap"], 700
    given = [torch.randn(1, 4, length, D) for _ in range(3)]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU],
                                profile_memory=True) as profile:
        bind(str(spec), str(Schedule("aten:blocks", (32, 1))))(*given)
    largest = max(e.self_cpu_memory_usage for e in profile.events())
    assert largest < 4 * length * length, "one head's scores must not be held whole"


# -- choice ---------------------------------------------------------------------------------------
def test_choose() -> None:
    shape = (1, 8, 512, 64)

    def chosen(case: str, **more: bool) -> str:
        return choose(CASES[case], shape, shape, shape, **more).lowering

    assert chosen("plain") == chosen("padding") == chosen("bias") == chosen("sink") == "aten:sdpa"
    assert chosen("plain", requires_grad=True) == "aten:sdpa"
    assert chosen("bias", requires_grad=True, operand_grad=True) == "aten:dense"
    assert chosen("sink", requires_grad=True) == "aten:dense"
    assert chosen("softcap") == "aten:blocks"
    assert chosen("softcap", requires_grad=True) == "aten:dense"
    assert chosen("talking heads") == chosen("key") == "aten:dense"
    assert choose(CASES["plain"], shape, shape, (1, 8, 512, 256)).lowering == "aten:blocks"
    tiny = (1, 2, 8, 16)
    assert choose(CASES["softcap"], tiny, tiny, tiny).lowering == "aten:dense"


def test_block_tile_keeps_to_the_cache() -> None:
    for heads, rows, keys in itertools.product((1, 8, 96), (1, 100, 4096), (1, 77, 2048, 70000)):
        tile = block_tile("dot", heads, rows, keys, 64)
        if tile:
            assert 1 <= tile[0] <= rows and 1 <= tile[1] <= heads
            assert 4 * tile[0] * tile[1] * keys <= max(1 << 23, 8 * 4 * keys)


def test_reasons_say_what_must_be() -> None:
    assert reasons(CASES["plain"]) == []
    assert reasons(CASES["softcap"]) == ["logits must be scale * score + bias"]
    assert "normalizer must be softmax, got relu" in reasons(CASES["relu"])
    assert block_reasons(CASES["softcap"], torch.float32) == ()
    assert block_reasons(CASES["talking heads"], torch.float32) == ("heads must not be mixed",)
    assert block_reasons(CASES["key"], torch.float32) == ("weights must vary along q",)
    assert block_reasons(CASES["upcast"], torch.bfloat16) == ()


def test_foreign_and_impossible_schedules_are_chosen_again() -> None:
    given = inputs()
    for lowering in ("triton:flash", "aten:sdpa", "aten:blocks"):
        check(CASES["talking heads"], given, [torch.randn(H, H)], str(Schedule(lowering)))


@pytest.mark.parametrize("logits, expected", [
    (s * 0.5 + E.load("a"), (0.5, 0, 1)), ((s + E.load("a")) * 2.0, (2.0, 0, 1)),
    (E.load("a") - s / 4.0, (-0.25, 0, 1)), (s * E.load("a") * 3.0, (3.0, 1, 0)),
    (E.call("neg", s), (-1.0, 0, 0)), (s * s, None), (E.call("tanh", s), None),
    (s + s, None), (1.0 / s, None)])
def test_linear(logits: Expr, expected: tuple[float, int, int] | None) -> None:
    found = linear(logits)
    if expected is None:
        assert found is None
    else:
        assert found is not None
        assert (found.scale, len(found.factors), len(found.terms)) == expected


def test_causal_and_row_proofs_reach_the_plan() -> None:
    found = plan(CASES["causal"])
    assert found is not None and found.causal and found.bare and not found.empty_check
    padded = plan(CASES["padding"])
    assert padded is not None and padded.empty_check and padded.masking is not None
    assert padded.masking.slot == 0


# -- generated code -------------------------------------------------------------------------------
def pointwise() -> list[Expr]:
    i, j = q - 3, k - 4
    unary = [E.call(op, s) for op in (
        "exp", "exp2", "tanh", "sigmoid", "softplus", "relu", "cos", "sin", "sign", "erf", "round",
        "neg", "abs", "floor", "isnan", "int")]
    positive = s * s + 0.5
    return [
        *unary, *(E.call(op, positive) for op in ("log", "log1p", "sqrt", "rsqrt")),
        i // 2, i % 3, i // j.replace({k: k + 9}), (i + 1) % 5 - i, E.call("pow", positive, 1.5),
        s + E.load("row"), E.load("row") - s, s * E.load("row") / 3.0, 2.0 / positive, s - s * 2.0,
        E.call("minimum", s, 0.1), E.call("maximum", s, E.load("row")), E.call("minimum", 0.2, s),
        E.where(i < j, s, -INF), E.where(i <= j, -1.0, s), E.where(i.eq(j), 1.0, 0.0),
        E.where((i < 0) & ~(j < 0) | i.ne(j) ^ (s < 0.0), s * 2.0, E.load("row")),
        s + E.call("float", i * j) * 0.1 + E.size("k") / 3 + E.index("h") * E.size("h"),
        E.call("log", E.size("k")) * s, E.call("minimum", E.size("q"), 4) + s,
        E.load("table", E.index("h"), i), E.load("table", E.index("h"), E.call("abs", j)) * s,
        E.inner("left", "right") + s, E.call("abs", s) + s, E.call("tanh", s) * s + s]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("expr", pointwise(), ids=str)
def test_generated_code_means_what_the_expression_means(expr: Expr, mode: str) -> None:
    slots = {n: SLOTS[n]() for n in ("row", "table", "left", "right")}
    score = torch.randn(B, H, Q, K)
    expected = evaluate(expr, Env(score.shape, slots, {s: score}))
    tile = Tile(tuple(score.shape), slots, torch.float32, score.device)
    tile.leaves[s] = score.clone()
    before = {n: t.clone() for n, t in slots.items()}
    found = compiled(expr, mode)(tile)
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(expected), equal_nan=True)
    assert all(torch.equal(before[n], slots[n]) for n in slots)
    if mode == "none":
        assert "_(" not in source(expr, mode) and "_into(" not in source(expr, mode)


@pytest.mark.parametrize("expr", [e for e in pointwise() if e.dtype == E.FLOAT], ids=str)
def test_generated_code_may_be_differentiated(expr: Expr) -> None:
    slots = {n: SLOTS[n]().requires_grad_() for n in ("row", "table", "left", "right")}
    score = torch.randn(B, H, Q, K, requires_grad=True)
    given = [score, *slots.values()]

    def gradient(mode: str) -> list[Tensor | None]:
        tile = Tile(tuple(score.shape), slots, torch.float32, score.device)
        tile.leaves[s] = score * 1.0
        out = torch.as_tensor(compiled(expr, mode)(tile))
        if not out.requires_grad:
            return []
        return list(torch.autograd.grad(out.nan_to_num(0.0, 0.0, 0.0).sum(), given,
                                        allow_unused=True))

    for plain, in_place in zip(gradient("none"), gradient("safe"), strict=True):
        torch.testing.assert_close(in_place, plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("expr", pointwise(), ids=str)
def test_a_window_of_the_tile_is_a_window_of_the_whole(expr: Expr, mode: str) -> None:
    slots = {n: SLOTS[n]() for n in ("row", "table", "left", "right")}
    score = torch.randn(B, H, Q, K)
    whole = torch.as_tensor(evaluate(expr, Env(score.shape, slots, {s: score})))
    starts, lengths = (1, 0, 2, 1), (1, 2, 3, 5)
    window = tuple(slice(a, a + n) for a, n in zip(starts, lengths, strict=True))
    tile = Tile(lengths, slots, torch.float32, score.device, tuple(score.shape), starts)
    tile.leaves[s] = score[window].clone()
    found = torch.as_tensor(compiled(expr, mode)(tile))
    torch.testing.assert_close(found.expand(lengths), whole.expand(score.shape)[window],
                               equal_nan=True)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="spec must be"):
        bind("nonsense")
    with pytest.raises(ValueError, match="operands must be 1, got 0"):
        bind(str(CASES["padding"]))(*inputs())
    with pytest.raises(ValueError, match="leading axes must broadcast"):
        broadcast((2, 3), (4, 3))
    with pytest.raises(ValueError, match="mode must be one of"):
        compiled(s, "fast")
    segments = Spec(mask=Segments("ids", "ids"),
                    operands=(Operand("ids", ("b", "k"), E.INT, "mask"),))
    assert reasons(segments) == []
