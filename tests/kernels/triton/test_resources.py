"""What can be known of compiled kernels without a GPU: they fit, they do not spill, they use the
matrix units and the memory engine of their target, and they have not grown."""

import pytest

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal
from attnopt.ir.spec import Operand, Spec

triton = pytest.importorskip("triton")

from attnopt.kernels.triton.boxes import boxes_of  # noqa: E402
from attnopt.kernels.triton.budget import (  # noqa: E402
    CONFIGS,
    LISTS,
    SLACK,
    SPECS,
    TOKENS,
    WANTED,
    measure,
    recorded,
    version,
)
from attnopt.kernels.triton.resources import (  # noqa: E402
    TARGETS,
    Resources,
    backward_resources,
    forward_resources,
)
from attnopt.kernels.triton.scores import BY_CHANNEL  # noqa: E402
from attnopt.kernels.triton.tiles import (  # noqa: E402
    ROW_TILE,
    Tile,
    architecture,
    default,
    gradient_tile,
    widest,
)

QUICK = ("sm_90 forward causal 128", "sm_80 forward causal 64", "sm_90 forward video 128",
         "sm_90 grad_key low rank 64", "sm_100 forward distance 64", "sm_80 grad_query additive 64")


def fits(found: Resources, target: str) -> None:
    assert found.spills == 0
    assert 0 < found.shared <= architecture(target).shared
    assert found.registers <= (255 if target.startswith("sm_") else 512)


@pytest.mark.parametrize("name", [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS])
def test_budget(name: str) -> None:
    target = CONFIGS[name][0]
    found, known = measure(name), recorded()[name]
    fits(found, target)
    # Tiles of scores by channel are too small for the products of four warps.
    assert found.matrix + found.older > 0
    assert SPECS[CONFIGS[name][2]].score in BY_CHANNEL or not found.older
    assert (found.tma > 0) == architecture(target).tma
    if version() != triton.__version__:
        pytest.skip(f"the record is of triton {version()}")
    for what in ("registers", "shared", "code"):
        assert getattr(found, what) <= known[what] * (1 + SLACK), (
            f"{what} must be at most {known[what]} + {SLACK:.0%}, got {getattr(found, what)}")


def test_record_is_of_these_configurations() -> None:
    assert set(recorded()) == set(CONFIGS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float16", "bfloat16", "float32"))
@pytest.mark.parametrize("head_dim", (32, 80, 96, 256))
@pytest.mark.parametrize("target", TARGETS)
def test_head_dims(target: str, head_dim: int, dtype: str) -> None:
    if dtype == "float32" and head_dim > 128:
        pytest.skip("declined")
    size = 4 if dtype == "float32" else 2
    tile = default(target, head_dim, head_dim, size)
    fits(forward_resources(SPECS["causal"], tile, target, head_dim, dtype=dtype), target)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim, name", (
    (32, "documents"), (32, "image"), (32, "video"), (256, "documents"), (256, "image")))
@pytest.mark.parametrize("target", TARGETS)
def test_head_dims_over_lists(target: str, name: str, head_dim: int) -> None:
    tile, tokens = default(target, head_dim, head_dim, listed=True), TOKENS.get(name)
    boxes = boxes_of(SPECS[name].mask, tokens, tokens, tile.rows, tile.keys) if tokens else None
    assert (boxes is not None) == (name in TOKENS)
    fits(forward_resources(SPECS[name], tile, target, head_dim, lists=LISTS[name], boxes=boxes),
         target)


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ("grad_query", "grad_key"))
@pytest.mark.parametrize("name", ("image", "video"))
@pytest.mark.parametrize("target", TARGETS)
def test_backward_over_boxes(target: str, name: str, kernel: str) -> None:
    tile = gradient_tile(target, 64, 64, 2, kernel.removeprefix("grad_"))
    boxes = boxes_of(SPECS[name].mask, TOKENS[name], TOKENS[name], tile.rows, tile.keys)
    found = backward_resources(SPECS[name], kernel, tile, target, 64, lists=(), boxes=boxes)
    fits(found, target)
    assert (found.tma > 0) == architecture(target).tma


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ("grad_query", "grad_key", "row_dots", "grad_bias"))
@pytest.mark.parametrize("head_dim", (32, 64, 128, 256))
@pytest.mark.parametrize("target", TARGETS)
def test_backward_with_a_bias(target: str, head_dim: int, kernel: str) -> None:
    which = {"grad_query": "query", "grad_key": "key"}.get(kernel, "operand")
    tile = ROW_TILE if kernel == "row_dots" else (
        gradient_tile(target, head_dim, head_dim, 2, which))
    found = backward_resources(SPECS["bias"], kernel, tile, target, head_dim, wanted=("bias",))
    fits(found, target)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", (64, 128))
@pytest.mark.parametrize("target", TARGETS)
def test_backward_with_a_table(target: str, head_dim: int) -> None:
    spec = Spec(logits=E.score * 0.125 + E.load(
        "table", E.index("h"), E.index("q") - E.index("k") + 2047),
        operands=(Operand("table", None, role="table"),))
    tile = gradient_tile(target, head_dim, head_dim, 2, "operand")
    found = backward_resources(spec, "grad_table", tile, target, head_dim, wanted=("table",))
    fits(found, target)
    assert found.matrix + found.older > 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype, head_dim", (
    ("bfloat16", 32), ("bfloat16", 256), ("float32", 64), ("float32", 128)))
@pytest.mark.parametrize("name", ("low rank", *BY_CHANNEL))
@pytest.mark.parametrize("target", TARGETS)
def test_other_scores(target: str, name: str, dtype: str, head_dim: int) -> None:
    spec, size = SPECS[name], 4 if dtype == "float32" else 2
    shape, by_channel = (target, head_dim, head_dim, size), spec.score in BY_CHANNEL
    fits(forward_resources(spec, default(*shape, by_channel=by_channel), target, head_dim,
                           dtype=dtype), target)
    for kernel in ("query", "key") if head_dim <= widest(size, gradient=True) else ():
        fits(backward_resources(spec, f"grad_{kernel}", gradient_tile(*shape, kernel, by_channel),
                                target, head_dim, dtype=dtype, wanted=WANTED.get(name, ())), target)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
def test_other_normalisers_and_two_passes(target: str) -> None:
    for spec in (Spec(logits=E.score, normalizer="sigmoid", mask=Causal()),
                 Spec(logits=E.score, weights=E.weight * E.weight, renormalize=True),
                 Spec(logits=E.score, normalizer="relu", l1=True)):
        fits(forward_resources(spec, default(target, 64, 64), target, 64), target)


def test_a_tile_that_is_too_large_shows() -> None:
    found = forward_resources(SPECS["causal"], Tile(128, 64, 4, 3), "sm_80", 128)
    assert found.spills > 0
