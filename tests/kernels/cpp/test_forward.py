"""The generated forward kernel against the float64 reference: head dims, lengths, instruction sets,
dtypes, tiles. `tests/kernels/test_aten.py` runs every case of the normal form through it, too."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal, KeyKeep, Segments
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels import cpp, reference
from attnopt.kernels.cpp.template import unrolled
from attnopt.kernels.cpp.toolchain import isas, toolchain
from tests.kernels.cases import CASES, close, doubled, inputs, operands_of, s

pytestmark = pytest.mark.skipif(bool(toolchain().why_not()), reason=toolchain().why_not())

PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
IDS = tuple(Operand(n, ("b", a), E.INT, "mask") for n, a in (("own", "q"), ("other", "k")))
SPECS = {
    "plain": Spec(logits=s * 0.2),
    "softcap, causal": Spec(logits=E.call("tanh", s * 0.02) * 10.0,
                            mask=Causal(E.size("k") - E.size("q"))),
    "window": Spec(logits=s * 0.2, mask=Band(-33, 20), empty_row="zero"),
    "padding": Spec(logits=s * 0.2, mask=KeyKeep("pad"), operands=(PAD,)),
    "documents": Spec(logits=s * 0.2, mask=Segments("own", "other"), empty_row="zero",
                      operands=IDS),
    "sigmoid": Spec(logits=s * 0.2 - 2.0, normalizer="sigmoid", mask=Causal()),
    "distance": Spec(score="distance", logits=s * -0.05),
}


def given_for(spec: Spec, batch: int, heads: int, queries: int, keys: int, dim: int, value_dim: int,
              dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
    given = [torch.randn(batch, heads, n, d, dtype=torch.float64).to(dtype)
             for n, d in ((queries, dim), (keys, dim), (keys, value_dim))]
    pad = torch.rand(batch, 1, 1, keys) < 0.7
    pad[..., 0] = True
    own = torch.arange(queries)[:, None] * 4 // max(queries, 1)
    other = torch.arange(keys)[None] * 4 // max(keys, 1)
    slots = {"pad": pad, "own": own.expand(batch, 1, -1, 1), "other": other.expand(batch, 1, 1, -1)}
    return given, [slots[o.slot] for o in spec.operands]


def check(spec: Spec, given: Sequence[Tensor], operands: Sequence[Tensor],
          tile: Sequence[int] = (48, 64, 6, 4), isa: int = 0) -> None:
    target = isas()[isa]
    if tile[1] % (tile[3] * target.width):
        tile = (tile[0], tile[1], tile[2], max(1, tile[1] // target.width // 4))
    found = cpp.Attention(spec, tile, target)(*given, operands)
    assert found is not None, "the kernel must take the call"
    exact = reference(spec)(*doubled(given), doubled(operands))
    close(found, exact, reference(spec)(*given, operands).to(found.dtype))


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 17, 33, 64,
                                 *(pytest.param(d, marks=pytest.mark.slow) for d in (
                                     5, 16, 31, 48, 80, 96, 127, 128, 160, 255, 256))])
def test_head_dims(dim: int) -> None:
    for name in ("plain", "softcap, causal"):
        check(SPECS[name], *given_for(SPECS[name], 1, 2, 70, 131, dim, dim))
    check(SPECS["plain"], *given_for(SPECS["plain"], 1, 2, 33, 65, dim, max(1, dim // 2 + 3)))


@pytest.mark.parametrize("name", SPECS)
def test_lengths(name: str) -> None:
    spec = SPECS[name]
    for queries, keys in ((1, 1), (1, 4097), (2, 3), (15, 16), (17, 15), (47, 64), (48, 65),
                          (49, 63), (97, 128), (129, 1), (200, 257), (300, 1000)):
        check(spec, *given_for(spec, 2, 2, queries, keys, 16, 16))


@pytest.mark.slow
@pytest.mark.parametrize("name", SPECS)
def test_long(name: str) -> None:
    check(SPECS[name], *given_for(SPECS[name], 1, 1, 4097, 4096, 16, 16))


@pytest.mark.parametrize("isa", range(len(isas())))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_instruction_sets(isa: int, dtype: torch.dtype) -> None:
    for name in ("plain", "softcap, causal", "window"):
        check(SPECS[name], *given_for(SPECS[name], 2, 2, 75, 90, 24, 20, dtype), isa=isa)


@pytest.mark.slow
@pytest.mark.parametrize("isa", range(1, len(isas())))
@pytest.mark.parametrize("case", [c for c in CASES if not cpp.spec_reasons(CASES[c])])
def test_every_case_on_every_instruction_set(case: str, isa: int) -> None:
    check(CASES[case], inputs(), operands_of(CASES[case]), (12, 32, 6, 2), isa)


@pytest.mark.parametrize("tile", [(16, 32, 4, 1), (24, 64, 8, 2), (12, 64, 12, 2), (96, 128, 6, 4),
                                  (5, 32, 5, 2), (7, 16, 7, 1)])
def test_tiles(tile: tuple[int, ...]) -> None:
    for name in ("plain", "padding", "softcap, causal"):
        check(SPECS[name], *given_for(SPECS[name], 2, 2, 101, 203, 40, 72), tile)


def test_threads_agree() -> None:
    spec = SPECS["softcap, causal"]
    given, operands = given_for(spec, 3, 2, 200, 200, 32, 32)
    run = cpp.Attention(spec, (48, 64, 6, 4))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(*given, operands)
        torch.set_num_threads(4)
        together = run(*given, operands)
    finally:
        torch.set_num_threads(before)
    assert alone is not None and together is not None and torch.equal(alone, together)


def test_a_long_cell_is_not_unrolled_whole() -> None:
    """Six look-ups of sixteen vectors at once keep a compiler busy for seconds."""
    assert unrolled(["const vf x1 = score + x0;"] * 8) == 16
    assert unrolled(["const vf x1 = op_table.gather<float>(x0);"] * 6) == 4
    q, k = E.index("q"), E.index("k")
    tables = tuple(Operand(f"table{i}", None, role="table") for i in range(6))
    logits = s * 0.2
    for i, table in enumerate(tables):
        logits = logits + E.load(table.slot, E.index("h"), q % (i + 2) - k // (i + 2) + 60)
    spec = Spec(logits=logits, mask=Causal(), operands=tables)
    given, _ = given_for(SPECS["plain"], 1, 2, 61, 61, 8, 8)
    check(spec, given, [torch.randn(2, 70) for _ in tables], (12, 256, 12, 2))


def test_what_is_not_for_the_kernel_is_handed_back() -> None:
    spec = SPECS["plain"]
    run = cpp.Attention(spec, (48, 64, 6, 4))
    assert run(*(t.double() for t in inputs()), []) is None
    assert run(*(t[:0] for t in inputs()), []) is None
    ids = SPECS["documents"]
    given, operands = given_for(ids, 1, 1, 20, 20, 8, 8)
    big = [t.clone() + 2**40 for t in operands]
    assert cpp.Attention(ids, (48, 64, 6, 4))(*given, big) is None
    assert cpp.Attention(ids, (48, 64, 6, 4))(*given, operands) is not None


def test_reasons() -> None:
    assert not cpp.reasons(SPECS["plain"])
    assert "heads" in cpp.reasons(CASES["talking heads"])[0]
    vector = Operand("vector", None)
    assert "heads" in cpp.reasons(Spec(mix_bias="vector", operands=(vector,)))[0]
    by_key = Operand("sink", ("h", "k"), role="sink")
    assert "sinks" in cpp.reasons(Spec(sinks=E.load("sink"), operands=(by_key,)))[0]
    assert "float64" in cpp.reasons(SPECS["plain"], (torch.float64,))[0]
    assert "cuda" in cpp.reasons(SPECS["plain"], device="cuda")[0]
