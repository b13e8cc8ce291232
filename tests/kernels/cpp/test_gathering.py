"""Kernels that gather the keys of boxes of queries, against the float64 reference."""

import random

import pytest
import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import KeyKeep, Mask, Neighborhood, Reindex, Select, Windows
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import cpp, reference
from attnopt.kernels.bind import bind
from attnopt.kernels.choosing import Problem, estimates, legal_tiles
from attnopt.kernels.cpp.call import Gathers
from attnopt.kernels.cpp.template import Tile
from attnopt.kernels.cpp.toolchain import isas, toolchain
from tests.kernels.cases import close, doubled

pytestmark = pytest.mark.skipif(bool(toolchain().why_not()), reason=toolchain().why_not())

s = E.score * 0.3
BIAS = Operand("bias", ("h", "q", "k"), E.FLOAT, "bias")
PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
TABLE = Operand("table", None, E.FLOAT, "table")


def tensors(tokens: int, dim: int = 24, value_dim: int = 20, batch: int = 2, heads: int = 2,
            dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(batch, heads, tokens, d, dtype=torch.float64).to(dtype)
            for d in (dim, dim, value_dim)]


def operands_for(spec: Spec, tokens: int, batch: int = 2, heads: int = 2) -> list[Tensor]:
    pad = torch.rand(batch, 1, 1, tokens) < 0.8
    given = {"bias": torch.randn(heads, tokens, tokens), "pad": pad,
             "table": torch.randn(heads, 2 * tokens)}
    return [given[o.slot] for o in spec.operands]


def check(spec: Spec, given: list[Tensor], operands: list[Tensor], tile: tuple[int, ...],
          isa: int = 0) -> None:
    target = isas()[isa]
    if tile[1] % (tile[3] * target.width):
        tile = (*tile[:3], max(1, tile[1] // target.width // 4), *tile[4:])
    run = cpp.Attention(spec, tile, target)
    _, lists = run.plan(*given, operands, Tile.of(tile))
    assert isinstance(lists, Gathers), "the mask must have halos"
    found = run(*given, operands)
    assert found is not None
    exact = reference(spec)(*doubled(given), doubled(operands))
    close(found, exact, reference(spec)(*given, operands).to(found.dtype))


def test_boxes_of_a_map() -> None:
    spec = Spec(logits=s, mask=Neighborhood((3, 5), length=(None, 11)))
    check(spec, tensors(99), [], (6, 32, 6, 2, 2, 3))
    check(spec, tensors(33), [], (6, 32, 6, 2, 2, 3))
    check(spec, tensors(99, batch=1, heads=1), [], (6, 32, 6, 2, 3, 2))
    # Heads side by side in memory, and keys that heads share.
    query, key, value = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors(99))
    check(spec, [query, key[:, :1], value[:, :1]], [], (6, 32, 6, 2, 2, 3))
    # No key is gathered from where there is none, and none that is hidden makes a row NaN.
    query, key, value = tensors(99)
    key[:, :, 98], value[:, :, 98] = torch.nan, torch.nan
    found = cpp.Attention(spec, (6, 32, 6, 2, 2, 3))(query, key, value, [])
    assert found is not None
    assert not found[:, :, :40].isnan().any() and found[0, 0, 98].isnan().all()


def test_operands_are_gathered() -> None:
    """A bias by score, a bias by key out of a table, and padding that leaves rows empty."""
    k = E.index("k")
    table = E.load("table", E.index("h"), E.index("q") + k)
    mask = Neighborhood((3, 3), length=(7, 10)) & KeyKeep("pad")
    spec = Spec(logits=s + E.load("bias") + table, mask=mask, empty_row="zero",
                operands=(BIAS, PAD, TABLE))
    given, operands = tensors(70), operands_for(spec, 70)
    operands[1][0, ..., :33] = False
    check(spec, given, operands, (16, 64, 4, 4, 4, 4))


def test_dilation_sinks_and_epilogue() -> None:
    spec = Spec(logits=s, mask=Neighborhood((3, 2), dilation=(2, 3), causal=(True, False),
                                            length=(8, 9)),
                sinks=E.const(0.5), output=E.out * E.call("float", E.index("q") + E.index("d")))
    check(spec, tensors(72, 16, 16, dtype=torch.bfloat16), [], (12, 32, 6, 2, 2, 3))


def test_where_there_are_no_halos_tiles_are_runs() -> None:
    spec = Spec(logits=s, mask=Neighborhood((3, 5), length=(None, 11)))
    run = cpp.Attention(spec, (6, 32, 6, 2, 200, 200))
    given = tensors(99)
    assert run.plan(*given, [], Tile(6, 32, 6, 2, (4, 4)))[0] == Tile(6, 32, 6, 2)  # 16 > 6 rows
    assert run.plan(*given, [], Tile(6, 32, 6, 2, (6,)))[0].box == ()
    assert run.plan(*given, [], Tile(6, 32, 6, 2, (2, 3)))[0].box == (2, 3)


def test_the_model_chooses_boxes() -> None:
    spec = Spec(logits=s, mask=Neighborhood((7, 7), length=(56, 56)))
    shape = (1, 4, 3136, 32)
    problem = Problem(spec, shape, shape, shape, threads=1)
    choice = estimates(problem, ("cpp", "aten:sdpa"))
    assert choice.best is not None and choice.best.candidate.lowering == "cpp:stencil"
    tiled = next(e.candidate for e in choice.table if e.candidate.lowering == "cpp")
    assert len(tiled.tile) == 6
    schedule = Schedule("cpp", tiled.tile)
    assert Schedule.parse(str(schedule)) == schedule
    assert all(len(t) == 4 for t in legal_tiles(
        Problem(spec, shape, shape, shape, grads=True, threads=1), False))
    # Lengths that are rounded would be no map any more.
    assert problem.rounded() == problem
    assert any(len(t) == 6 for t in legal_tiles(problem, True))


@pytest.mark.slow
def test_gradients_go_by_runs() -> None:
    spec = Spec(logits=s, mask=Neighborhood((3, 5), length=(9, 11)))
    given = [t.requires_grad_() for t in tensors(99)]
    run = bind(str(spec), str(Schedule("cpp", (6, 32, 6, 2, 2, 3))))
    found = torch.autograd.grad(run(*given).sum(), given)
    exact = [t.detach().double().requires_grad_() for t in given]
    for one, other in zip(found, torch.autograd.grad(
            reference(spec)(*exact).sum(), exact), strict=True):
        assert torch.allclose(one.double(), other, atol=1e-5)


MASKS: dict[str, tuple[Mask, int, tuple[int, ...]]] = {
    "volume": (Neighborhood((3, 3, 5), (1, 2, 3), length=(4, 6, 7)), 168, (2, 2, 3)),
    "partition": (Windows((3, 4), (9, 10)), 90, (3, 4)),
    "shifted": (Reindex((E.index("q") + 13) % E.size("q"), Windows((3, 4), (9, 10))), 90, (3, 4)),
    "by head": (Select("h", (Neighborhood((3, 3), length=(9, 10)),
                             Neighborhood((5, 7), length=(9, 10)))), 90, (3, 4)),
    "dilated line": (Neighborhood((5,), dilation=(6,), length=(100,)), 100, (11,)),
}


@pytest.mark.slow
@pytest.mark.parametrize("isa", range(len(isas())))
@pytest.mark.parametrize("name", MASKS)
def test_masks(name: str, isa: int) -> None:
    mask, tokens, box = MASKS[name]
    for dtype in (torch.float32, torch.float16):
        check(Spec(logits=s, mask=mask), tensors(tokens, 33, 17, dtype=dtype), [],
              (12, 32, 6, 2, *box), isa)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_random_neighborhoods(seed: int) -> None:
    draw = random.Random(seed)
    dims = draw.choice((2, 3))
    length = tuple(draw.randint(2, 9) for _ in range(dims))
    dilation = tuple(draw.randint(1, max(1, n // 3)) for n in length)
    window = tuple(draw.randint(1, n // d) for n, d in zip(length, dilation, strict=True))
    mask = Neighborhood(window, tuple(draw.randint(1, w) for w in window), dilation,
                        tuple(draw.random() < 0.3 for _ in length), length)
    box = tuple(draw.randint(1, min(n, 3)) for n in length)
    torch.manual_seed(seed)
    tokens = torch.tensor(length).prod().item()
    normalizer = draw.choice(("softmax", "softmax", "sigmoid"))
    check(Spec(logits=s, mask=mask, normalizer=normalizer), tensors(
        int(tokens), draw.randint(1, 40), draw.randint(1, 70)), [], (28, 32, 14, 2, *box))
