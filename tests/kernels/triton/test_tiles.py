"""Tiles and reasons: pure functions, for which nothing is compiled."""

import torch

from attnopt.ir import expr as E
from attnopt.ir.mask import Causal, Where
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.triton import reasons
from attnopt.kernels.triton.printer import live
from attnopt.kernels.triton.tiles import (
    ARCHITECTURES,
    Tile,
    architecture,
    candidates,
    default,
    legal,
    padded,
    shared_bytes,
)
from attnopt.kernels.triton.widths import needs_wide

s = E.score
HALF = (torch.float16,) * 3
FACTORS = tuple(Operand(name, (axis,), role="factor")
                for name, axis in (("left", "q"), ("right", "k")))


def test_every_device_has_tiles_for_every_width() -> None:
    for name in ARCHITECTURES:
        for width in (1, 16, 40, 64, 96, 128, 200, 256):
            tile = default(name, width, width)
            assert shared_bytes(tile, width, width, 2) <= architecture(name).shared
            assert len(candidates(name, width, width)) >= (12 if width <= 128 else 4)
            assert candidates(name, width, width)[0] == tile
            listed = default(name, width, width, listed=True)
            assert shared_bytes(listed, width, width, 2) <= architecture(name).shared
            assert listed.rows * listed.keys <= tile.rows * tile.keys


def test_candidates_are_legal_and_differ() -> None:
    found = candidates("sm_90", 128, 128)
    assert len(set(found)) == len(found)
    assert all(legal(t, architecture("sm_90"), 128, 128, 2) for t in found[1:])


def test_unknown_devices_count_as_the_nearest_older_one() -> None:
    assert architecture("sm_87").name == "sm_86"
    assert architecture("sm_103").name == "sm_100"
    assert architecture("gfx1100").name == "gfx90a"


def test_capability_is_a_number() -> None:
    narrow = Tile(64, 64, 8, 1)
    known = {a.name: (a.capability, legal(narrow, a, 64, 64, 2)) for a in ARCHITECTURES.values()}
    assert known == {
        "sm_80": (80, True), "sm_86": (86, True), "sm_89": (89, True), "sm_90": (90, False),
        "sm_100": (100, False), "sm_120": (120, True), "gfx942": (0, True), "gfx90a": (0, True)}
    for name in ("sm_90", "sm_100"):
        assert all(t.rows >= 16 * t.warps for t in candidates(name, 64, 64))


def test_widths_are_padded_to_powers_of_two() -> None:
    assert [padded(n) for n in (1, 16, 17, 96, 128)] == [16, 16, 32, 128, 128]


def test_what_is_taken() -> None:
    for spec in (Spec(), Spec(mask=Causal()), Spec(score="key"), Spec(score="distance"),
                 Spec(weights=E.weight * E.weight, renormalize=True)):
        assert reasons(spec, HALF) == [] or reasons(spec, HALF) == ["triton is not installed"]


def test_what_is_declined_and_why() -> None:
    def why(spec: Spec, **call: object) -> str:
        return "; ".join(reasons(spec, call.pop("dtypes", HALF), **call))  # type: ignore[arg-type]

    mix = (Operand("mix", None, role="mix"),)
    assert "heads must not be mixed" in why(Spec(mix_logits="mix", operands=mix))
    assert "dropout must be 0, got 0.1" in why(Spec(dropout=0.1))
    masked = Spec(mask=Where(E.const(0.0) < E.inner("left", "right")), operands=FACTORS)
    assert "a low-rank term must be part of the logits" in why(masked)
    assert "compute must be float32 or less" in why(Spec(compute="float64"))
    assert "got float64" in why(Spec(), dtypes=(torch.float64,) * 3)
    assert "device must be cuda, got cpu" in why(Spec(), device="cpu")
    assert "head_dims must be in [1, 256]" in why(Spec(), head_dims=(512, 64))
    assert "head_dims must be in [1, 128]" in why(
        Spec(), head_dims=(256, 64), dtypes=(torch.float32,) * 3)
    assert "edited weights" in why(Spec(weights=E.weight * E.weight), requires_grad=True)
    table = Spec(logits=s + E.load("table", E.index("q") - E.index("k")),
                 operands=(Operand("table", None, role="table"),))
    assert why(table, requires_grad=True) == why(Spec())
    assert why(table, grads_of=("table",)) == why(Spec())
    factors = Spec(logits=s + E.inner("left", "right"), operands=FACTORS)
    assert why(factors, grads_of=("left", "right")) == why(Spec())
    twice = Spec(logits=s + E.inner("left", "right"), operands=FACTORS,
                 output=E.out * E.load("left"))
    assert "the gradient is not made for left" in why(twice, grads_of=("left",))


def test_integers_are_wide_only_where_they_must_be() -> None:
    q, k = E.index("q"), E.index("k")
    flat = Spec(logits=s + E.call("float", q * E.size("k") + k))
    assert not needs_wide(flat, {"q": 4096, "k": 4096}, {})
    assert needs_wide(flat, {"q": 65536, "k": 65536}, {})
    assert not needs_wide(Spec(mask=Causal()), {"q": 1 << 20, "k": 1 << 20}, {})
    large = torch.empty((1 << 16, 1 << 16), device="meta")
    assert needs_wide(Spec(), {"q": 1 << 16, "k": 1 << 16}, {"bias": large})


def test_only_statements_that_are_needed_stay() -> None:
    lines = ["a = x + 1", "b = a * 2", "c = b - a", "d = x"]
    assert live(lines, ["b"]) == lines[:2]
    assert live(lines, ["d + a"]) == [lines[0], lines[3]]
