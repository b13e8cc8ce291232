"""Which lowering and tile is chosen, what the blocks skip and hold, how a Spec is read."""

import itertools

import pytest
import torch

from attnopt.ir import expr as E
from attnopt.ir.expr import Expr
from attnopt.ir.mask import ALL, Band, Causal, Prefix, Segments
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels.aten import bind, choose
from attnopt.kernels.aten.choose import block_reasons, block_tile
from attnopt.kernels.aten.codegen import compiled
from attnopt.kernels.aten.linear import linear
from attnopt.kernels.aten.sdpa import plan, reasons
from attnopt.kernels.aten.skipping import key_range
from attnopt.kernels.aten.tile import broadcast
from tests.kernels.cases import (
    CASES,
    D,
    H,
    check,
    inputs,
    operands_of,
    s,
)


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
