"""Constant masks of blocks are looked up block by block, others are read in mixed tiles alone."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.ir.mask import BlockMap
from attnopt.ir.spec import Spec
from attnopt.kernels import block_maps
from attnopt.kernels.cpp.attention import within_tables
from attnopt.passes.analyze.block_tables import BlockTables, blocks_of, tiles_of

B, H, N, D = 2, 2, 192, 8
BLOCK = 16
pytestmark = pytest.mark.usefixtures("by_aten")


def kept_blocks(heads: int = 1, side: int = N // BLOCK, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(heads, side, side, generator=generator) < 0.4
    return kept | torch.eye(side, dtype=torch.bool)


def spread(kept: Tensor, block_q: int = BLOCK, block_k: int = BLOCK) -> Tensor:
    return kept.repeat_interleave(block_q, -2).repeat_interleave(block_k, -1)


def drawn(dtype: torch.dtype = torch.float32, queries: int = N, keys: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, H, n, D, generator=generator).to(dtype) for n in (queries, keys, keys)]


class Program(nn.Module):
    def __init__(self, function: Callable[..., Tensor], mask: Tensor) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("mask", mask)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def check(function: Callable[..., Tensor], mask: Tensor, inputs: list[Tensor] | None = None,
          verify: bool = True, tolerance: float = 3e-6) -> tuple[Spec, nn.Module, nn.Module]:
    inputs = drawn() if inputs is None else inputs
    module = Program(function, mask).eval()
    with torch.no_grad():
        opt = attnopt.optimize(module, tuple(inputs), verify=verify)
        torch.testing.assert_close(opt(*inputs), module(*inputs), atol=tolerance, rtol=1e-5,
                                   equal_nan=True)
    (site,) = opt.report.sites
    assert site.status == "rewritten", (site.reason, site.tried)
    return Spec.parse(site.spec), module, opt


def maps(spec: Spec) -> list[BlockMap]:
    return [m for m in spec.mask.walk() if isinstance(m, BlockMap)]


def dense(spec: Spec) -> list[str]:
    return [o.slot for o in spec.operands if o.axes is not None and {"q", "k"} <= set(o.axes)]


# -- spellings of one mask ------------------------------------------------------------------------
def filled(s, q, k, v):
    return (q @ k.mT / 8).masked_fill(~s.mask, -math.inf).softmax(-1) @ v


def lowest(s, q, k, v):
    return (q @ k.mT / 8).masked_fill(~s.mask, torch.finfo(q.dtype).min).softmax(-1) @ v


def chosen(s, q, k, v):
    return torch.where(s.mask, q @ k.mT / 8, torch.tensor(-1e9)).softmax(-1) @ v


def fused(s, q, k, v):
    return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=s.mask)


def subtracted(s, q, k, v):
    return (q @ k.mT / 8 + (1.0 - s.mask.float()) * -1e9).softmax(-1) @ v


@pytest.mark.parametrize("function", [filled, lowest, chosen, fused, subtracted])
def test_one_mask_in_many_spellings(function: Callable[..., Tensor]) -> None:
    kept = kept_blocks()[0]
    spec, *_ = check(function, spread(kept))
    assert not dense(spec)
    (found,) = maps(spec)
    assert (found.block_q, found.block_k) == (BLOCK, BLOCK)


@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min, -1e9])
def test_an_added_mask(fill: float) -> None:
    mask = torch.zeros(N, N).masked_fill(~spread(kept_blocks()[0]), fill)
    spec, *_ = check(lambda s, q, k, v: (q @ k.mT / 8 + s.mask).softmax(-1) @ v, mask)
    assert not dense(spec) and len(maps(spec)) == 1


def test_a_mask_that_hides_where_it_is_true() -> None:
    spec, *_ = check(lambda s, q, k, v: (q @ k.mT).masked_fill(s.mask, -math.inf).softmax(-1) @ v,
                     ~spread(kept_blocks()[0]))
    assert not dense(spec) and any(n.op == "not" for n in spec.mask.predicate().walk())


def test_a_low_number_that_hides_nothing_is_added_by_look_up() -> None:
    """Swin's -100 leaves weights above zero."""
    mask = torch.zeros(N, N).masked_fill(~spread(kept_blocks()[0]), -100.0)
    spec, *_ = check(lambda s, q, k, v: (q @ k.mT / 8 + s.mask).softmax(-1) @ v, mask)
    assert not dense(spec) and not spec.mask.slots


def computed(s, q, k, v):
    """The pattern of `BlockPattern`, from coordinates and rounding arithmetic."""
    place = torch.arange(q.shape[-2]) // BLOCK * BLOCK
    frame, inside = place // 48, place % 48
    apart = (frame[:, None] - frame).abs()
    width = 48 / 2.0 ** torch.floor(torch.log2(apart.clamp(min=1).float())) / 5
    near = (inside[:, None] - inside).abs() < width.clamp(min=BLOCK)
    kept = (apart <= 1) | near | (frame == 0)
    return (q @ k.mT / 8).masked_fill(~kept, -math.inf).softmax(-1) @ v


def test_a_mask_that_is_computed() -> None:
    spec, *_ = check(computed, torch.zeros(1))
    assert not dense(spec)


def test_by_head() -> None:
    kept = kept_blocks(H)
    spec, *_ = check(filled, spread(kept))
    (found,) = maps(spec)
    assert found.leading == ("h",) and not dense(spec)
    same = spread(kept[:1].expand(H, -1, -1))
    assert maps(check(filled, same)[0])[0].leading == ()


def test_oblong_blocks_and_cut_ends() -> None:
    kept = kept_blocks(side=9)[0]
    mask = spread(kept, 24, 16)[:200, :137]
    spec, *_ = check(filled, mask, drawn(queries=200, keys=137))
    (found,) = maps(spec)
    assert (found.block_q, found.block_k) == (24, 16)


def test_beside_padding_of_the_user() -> None:
    """The constant part is looked up, the user's part stays an operand."""
    def both(s, q, k, v, present):
        mask = s.mask & present[:, None, None, :].bool()
        return (q @ k.mT / 8).masked_fill(~mask, torch.finfo(q.dtype).min).softmax(-1) @ v

    present = torch.ones(B, N, dtype=torch.long)
    present[1, 100:] = 0
    spec, module, opt = check(both, spread(kept_blocks()[0]), [*drawn(), present])
    assert len(maps(spec)) == 1 and not dense(spec)
    other = torch.ones(B, N, dtype=torch.long)
    other[0, :70] = 0
    with torch.no_grad():
        torch.testing.assert_close(opt(*drawn(), other), module(*drawn(), other),
                                   atol=3e-6, rtol=1e-5)


# -- rows without a key ---------------------------------------------------------------------------
@pytest.mark.parametrize("fill", [-math.inf, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("added", [False, True])
def test_a_row_of_blocks_without_a_key(fill: float, added: bool) -> None:
    kept = kept_blocks()[0]
    kept[2] = False
    mask = spread(kept)
    if added:
        check(lambda s, q, k, v: (q @ k.mT / 8 + s.mask).softmax(-1) @ v,
              torch.zeros(N, N).masked_fill(~mask, fill))
    else:
        check(lambda s, q, k, v: (q @ k.mT / 8).masked_fill(~s.mask, fill).softmax(-1) @ v, mask)


# -- no blocks ------------------------------------------------------------------------------------
def ragged() -> Tensor:
    """Blocks, of which some are triangles."""
    mask = spread(kept_blocks(side=3, seed=5)[0], 64, 64)
    mask[:64, 128:] = mask[128:, :64] = False
    return mask & (torch.rand(N, N, generator=torch.Generator().manual_seed(2)) < 0.9) \
        | torch.eye(N, dtype=torch.bool) | spread(torch.eye(3, dtype=torch.bool), 64, 64)


def test_a_mask_without_blocks_is_read_in_mixed_tiles() -> None:
    spec, *_ = check(filled, ragged())
    assert len(maps(spec)) == 2 and len(dense(spec)) == 1
    assert within_tables(spec) == set(dense(spec))


@pytest.mark.parametrize("fill", [-math.inf, -1e9])
def test_a_bias_that_also_hides(fill: float) -> None:
    generator = torch.Generator().manual_seed(0)
    plain = torch.zeros(N, N).masked_fill(~ragged(), fill)
    varied = torch.randn(N, N, generator=generator).masked_fill(~ragged(), fill)
    add = lambda s, q, k, v: (q @ k.mT / 8 + s.mask).softmax(-1) @ v  # noqa: E731
    for mask, loaded in ((plain, False), (varied, True)):
        spec, *_ = check(add, mask)
        assert len(maps(spec)) == 2
        assert bool(spec.logits.slots) == loaded


def test_a_mask_that_hides_no_tile_is_carried() -> None:
    mask = torch.rand(N, N, generator=torch.Generator().manual_seed(2)) < 0.5
    spec, *_ = check(filled, mask)
    assert not maps(spec) and len(dense(spec)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mask", [spread(kept_blocks()[0]), ragged()])
def test_compiled(mask: Tensor, compiled: None) -> None:
    spec, *_ = check(filled, mask, verify=False)
    assert maps(spec)


# -- what may change ------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [lambda: spread(kept_blocks()[0]), ragged])
def test_a_buffer_that_changes_in_place(make: Callable[[], Tensor]) -> None:
    _, module, opt = check(filled, make())
    for change in (lambda m: m.logical_not_(), lambda m: m.data.fill_(True)):
        change(module.mask)
        with torch.no_grad():
            torch.testing.assert_close(opt(*drawn()), module(*drawn()), atol=3e-6, rtol=1e-5,
                                       equal_nan=True)


def test_a_mask_of_the_user_is_not_specialised() -> None:
    def given(s, q, k, v, mask):
        return (q @ k.mT / 8).masked_fill(~mask, -math.inf).softmax(-1) @ v

    spec, module, opt = check(given, torch.zeros(1), [*drawn(), spread(kept_blocks()[0])])
    assert not maps(spec)
    other = spread(kept_blocks(seed=9)[0])
    with torch.no_grad():
        torch.testing.assert_close(opt(*drawn(), other), module(*drawn(), other),
                                   atol=3e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    check(lowest, spread(kept_blocks()[0]), drawn(dtype), tolerance=2e-2)


def test_training() -> None:
    inputs = [x.requires_grad_() for x in drawn()]
    module = Program(filled, spread(kept_blocks()[0]))
    opt = attnopt.optimize(module, tuple(inputs))
    grads = [torch.autograd.grad(run(*inputs).square().sum(), inputs) for run in (module, opt)]
    for wanted, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


# -- the parts ------------------------------------------------------------------------------------
def test_blocks_of_random_tables() -> None:
    generator = torch.Generator().manual_seed(4)
    for _ in range(40):
        bq, bk, rows, columns = (int(torch.randint(a, b, (), generator=generator))
                                 for a, b in ((8, 40), (8, 40), (3, 6), (3, 6)))
        kept = torch.rand(1, rows, columns, generator=generator) < 0.5
        kept[0, 0, 0], kept[0, 0, 1], kept[0, 1, 0] = True, False, False
        cut = int(torch.randint(0, 7, (), generator=generator))
        mask = spread(kept, bq, bk)[:, : rows * bq - cut, : columns * bk - cut]
        found = blocks_of(mask)
        assert found is not None
        again = spread(found.kept, found.block_q, found.block_k)
        assert torch.equal(again[:, : mask.shape[1], : mask.shape[2]], mask)
        mask[0, 3, 5] = ~mask[0, 3, 5]
        assert blocks_of(mask) is None


def test_tiles_of_a_table() -> None:
    mask = torch.zeros(1, 150, 130, dtype=torch.bool)
    mask[0, :64, :64] = True
    mask[0, 149, 129] = True
    some, whole = tiles_of(mask)
    assert some.kept.int().tolist() == [[[1, 0, 0], [0, 0, 0], [0, 0, 1]]]
    assert whole.kept.int().tolist() == [[[1, 0, 0], [0, 0, 0], [0, 0, 0]]]
    mask[0, 128:, 128:] = True
    assert tiles_of(mask)[1].kept[0, 2, 2]
    assert tiles_of(torch.ones(1, 150, 130, dtype=torch.bool)) is None


def test_equal_tables_have_one_slot() -> None:
    tables, mask = BlockTables(), spread(kept_blocks())
    assert tables.exact(mask) is tables.exact(mask.clone()) is not None
    assert len(tables.by_slot) == 1


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (1, 1)])
def test_a_table_as_text(shape: tuple[int, ...]) -> None:
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    text = block_maps.table_text(kept, 16, 8)
    lengths = [shape[-2] * 16 - 3, shape[-1] * 8 - 5]
    query = torch.zeros(2, 3)
    found = torch.ops.attnopt.block_map([query], lengths, text)
    assert torch.equal(found, kept) and block_maps.blocks_of(text) == (16, 8)
    assert torch.ops.attnopt.block_map([query.to("meta")], lengths, text).shape == shape
    with pytest.raises(ValueError, match="must give"):
        block_maps.block_map([query], [lengths[0] + 64, lengths[1]], text)
