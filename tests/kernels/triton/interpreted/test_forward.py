"""Forward kernels in the interpreter: every step of the normal form, several tiles each way."""

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal
from attnopt.ir.spec import Spec
from attnopt.kernels.reference import reference
from attnopt.kernels.triton.attention import Attention, bind
from attnopt.kernels.triton.tiles import Tile
from tests.kernels.cases import close, doubled
from tests.kernels.triton.cases import CASES, TILE, Shape, check_forward

s = E.score
ONE_HEAD = Shape(batch=1, heads=1)
PLAIN = Spec(logits=s * 0.3)
#: enough to see that the template is whole; all cases are slow
QUICK = ("plain", "band", "padding and causal", "buckets", "sink", "edited", "statistics", "groups",
         "sigmoid divided, edited", "globals", "value residual", "low rank")
SOME = ("causal", "padding and bias", "softcap and sink", "alibi", "sigmoid", "relu", "edited")


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_case(name: str) -> None:
    spec = CASES[name]
    keys = 37 if E.value in spec.output.leaves else 35
    shape = Shape(batch=2, heads=2, queries=37, keys=keys)
    check_forward(spec, shape.inputs(torch.float32), shape.operands(spec, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", SOME)
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    spec, shape = CASES[name], Shape(batch=1, heads=2, queries=40, keys=50)
    check_forward(spec, shape.inputs(dtype), shape.operands(spec, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("name", ("plain", "causal", "wide band", "padding", "globals", "per head"))
@pytest.mark.parametrize("queries, keys", ((1, 1), (1, 33), (33, 1), (64, 64), (65, 97), (17, 64)))
def test_lengths(name: str, queries: int, keys: int) -> None:
    spec = CASES[name].with_(empty_row="zero")
    shape = Shape(batch=1, heads=3, queries=queries, keys=keys)
    check_forward(spec, shape.inputs(torch.float32), shape.operands(spec, torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("head_dim, value_dim", (
    (1, 1), (3, 5), (16, 40), (40, 16), (80, 64), (96, 96), (128, 8), (7, 120)))
def test_head_dims(head_dim: int, value_dim: int) -> None:
    shape = Shape(1, 1, 20, 24, head_dim, value_dim)
    check_forward(PLAIN, shape.inputs(torch.float32))


@pytest.mark.slow
@pytest.mark.parametrize("tile", (Tile(16, 16, 4, 1), Tile(16, 64, 4, 1), Tile(64, 32, 4, 2)))
@pytest.mark.parametrize("name", ("wide band", "globals", "prefix and band", "neighborhood"))
def test_tiles(name: str, tile: Tile) -> None:
    shape = Shape(batch=1, heads=1, queries=70, keys=70)
    check_forward(CASES[name], shape.inputs(torch.float32), tile=tile)


@pytest.mark.parametrize("name", ("plain", "causal", "globals", "edited", "uniform, edited"))
def test_descriptors(name: str) -> None:
    """What TMA reads on sm_90 and later: ragged ends and head dims are filled with zeros."""
    shape = Shape(1, 2, 40, 44, 24, 40)
    check_forward(CASES[name], shape.inputs(torch.float32), descriptors=True)
    shared = Shape(1, 3, 40, 44, 16, 16, key_heads=1)
    check_forward(CASES[name], shared.inputs(torch.float32), descriptors=True)


def test_grouped_queries_share_their_keys() -> None:
    shape = Shape(heads=3, key_heads=1)
    check_forward(CASES["causal"], shape.inputs(torch.float32))
    query, key, value = (torch.randn(2, 2, n, 20, 8) for n in (3, 1, 1))
    check_forward(PLAIN, (query, key, value))
    check_forward(PLAIN, (query, key.expand(2, 2, 3, 20, 8), value))


@pytest.mark.parametrize("leading", ((), (3,), (2, 1, 2, 2)))
def test_any_number_of_leading_axes(leading: tuple[int, ...]) -> None:
    check_forward(CASES["causal"], [torch.randn(*leading, n, 8) for n in (20, 24, 24)])


def test_leading_axes_broadcast() -> None:
    check_forward(PLAIN, (torch.randn(1, 3, 20, 8), torch.randn(2, 1, 24, 8), torch.randn(24, 8)))


def test_layouts_need_no_copy() -> None:
    made = [torch.randn(2, n, 3, 24) for n in (20, 24, 24)]
    heads_last = [t.transpose(1, 2) for t in made]
    check_forward(PLAIN, heads_last)
    check_forward(PLAIN, [t[..., ::2] for t in heads_last])
    packed = torch.randn(2, 40, 3, 3, 16).permute(3, 0, 2, 1, 4)
    check_forward(CASES["causal"], list(packed))


def test_operands_of_any_layout() -> None:
    spec, shape = CASES["bias"], Shape(1, 3, 20, 24)
    bias = torch.randn(24, 20, 3).permute(2, 1, 0)
    check_forward(spec, shape.inputs(torch.float32), [bias])
    check_forward(spec, shape.inputs(torch.float32), [bias[:1, :1]])
    check_forward(spec, shape.inputs(torch.float32), [bias[0]])


def test_nan_and_inf_come_through() -> None:
    query, key, value = ONE_HEAD.inputs(torch.float32)
    query[0, 0, 3], key[0, 0, 7, 0], value[0, 0, 9] = torch.nan, torch.inf, torch.nan
    check_forward(PLAIN, (query, key, value))
    key[0, 0, 7, 0] = torch.nan
    check_forward(CASES["causal"], (query, key, value))


def test_bias_that_hides_keys() -> None:
    spec, shape = CASES["bias"], Shape(1, 1, 37, 40)
    bias = torch.where(torch.rand(1, 37, 40) < 0.5, -torch.inf, 0.0)
    bias[..., :16] = -torch.inf  # a whole tile
    check_forward(spec, shape.inputs(torch.float32), [bias])
    bias[:, 5] = -torch.inf
    check_forward(spec, shape.inputs(torch.float32), [bias])
    check_forward(CASES["bias and causal"], shape.inputs(torch.float32), [bias])


def test_wide_logits() -> None:
    shape = Shape(1, 1, 40, 40, 64)
    check_forward(Spec(logits=s * 8.0), shape.inputs(torch.float32))
    check_forward(Spec(logits=s * 8.0, mask=Causal()), shape.inputs(torch.float32))


@pytest.mark.parametrize("name", ("padding and bias", "globals", "low rank", "value residual"))
def test_second_call_of_a_layout(name: str) -> None:
    """It skips what the first one found out, and differs in values only."""
    spec, attention = CASES[name], Attention(CASES[name], TILE)
    for _ in range(2):
        shape = Shape(1, 2, 37, 37)
        inputs, operands = shape.inputs(torch.float32), shape.operands(spec, torch.float32)
        found = attention(*inputs, operands)
        assert found is not None and len(attention.known) == 1
        exact = reference(spec)(*doubled(inputs), doubled(operands))
        close(found, exact, reference(spec)(*inputs, operands))


def test_what_is_not_taken_is_none() -> None:
    attention = Attention(PLAIN, TILE)
    assert attention(*(torch.randn(4, 8).double() for _ in range(3))) is None
    assert attention(*(torch.randn(n, 8) for n in (0, 4, 4))) is None
    assert attention(*(torch.randn(4, 300) for _ in range(3))) is None
    assert attention(*(torch.randn(4, 8, device="meta") for _ in range(3))) is None
    assert bind(str(PLAIN))(*(torch.randn(4, 8).double() for _ in range(3))).dtype == torch.float64


def test_integers_beyond_32_bits() -> None:
    far = (E.index("q") * 3_000_000_000 + E.index("k")) % 7
    check_forward(Spec(logits=s * 0.3 + E.call("float", far)), ONE_HEAD.inputs(torch.float32))
