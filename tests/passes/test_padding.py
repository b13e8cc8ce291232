"""Padding that is added to the scores hides tiles at run time, whatever its values are."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt.ir.mask import ALL
from attnopt.ir.spec import Spec
from attnopt.kernels import key_floor

B, H, N, D = 4, 2, 200, 16
LENGTHS = (200, 7, 65, 130)
LOWEST = torch.finfo(torch.float32).min
pytestmark = pytest.mark.usefixtures("by_aten")


class Program(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function
        self.bias = nn.Parameter(torch.randn(H, N, N, generator=torch.Generator().manual_seed(3)))

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def drawn(dtype: torch.dtype = torch.float32, length: int = N) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, H, length, D, generator=generator).to(dtype) for _ in range(3)]


def present(lengths: tuple[int, ...] = LENGTHS, length: int = N, left: bool = False) -> Tensor:
    kept = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    return kept.flip(-1) if left else kept


def bert(s, q, k, v, mask):
    added = (1.0 - mask[:, None, None, :].to(q.dtype)) * torch.finfo(q.dtype).min
    return (q @ k.mT / 4 + added).softmax(-1) @ v


def infinite(s, q, k, v, mask):
    added = torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask == 0, -math.inf)
    return (q @ k.mT / 4 + added[:, None, None]).softmax(-1) @ v


def given(s, q, k, v, mask):
    """The user gives what is added."""
    return (q @ k.mT / 4 + mask).softmax(-1) @ v


def optimized(function: Callable[..., Tensor], *inputs: Tensor, **options: object,
              ) -> tuple[Spec, nn.Module, nn.Module]:
    module = Program(function).eval()
    with torch.no_grad():
        opt = attnopt.optimize(module, inputs, **options)
    (site,) = opt.report.sites
    assert site.status == "rewritten", (site.reason, site.tried)
    return Spec.parse(site.spec), module, opt


def same(module: nn.Module, opt: nn.Module, *inputs: Tensor, tolerance: float = 3e-6) -> None:
    with torch.no_grad():
        torch.testing.assert_close(opt(*inputs), module(*inputs), atol=tolerance, rtol=1e-5,
                                   equal_nan=True)
    assert not any(n for why, n in opt.report.calls.items() if why != "hits"), opt.report.calls


def masks() -> list[Tensor]:
    """Of all kinds: left, right, none, one sentence that is empty, holes."""
    empty = (0, 200, 3, 64)
    holes = (torch.rand(B, N, generator=torch.Generator().manual_seed(0)) < 0.3).long()
    return [present(left=True), present((N,) * B), present(empty), present((1,) * B), holes]


@pytest.mark.parametrize("function", [bert, infinite])
def test_every_mask_of_the_user(function: Callable[..., Tensor]) -> None:
    spec, module, opt = optimized(function, *drawn(), present())
    assert spec.mask is not ALL and "key_floor" in spec.mask.slots
    for mask in masks():
        same(module, opt, *drawn(), mask)


@pytest.mark.slow
def test_compiled(compiled: None) -> None:
    spec, module, opt = optimized(bert, *drawn(), present())
    assert spec.mask is not ALL and opt.report.sites[0].lowering.startswith("cpp")
    for mask in masks():
        same(module, opt, *drawn(), mask)


def test_numbers_that_are_no_mask() -> None:
    """Nothing is hidden by what is not low beside the best of the row."""
    _, module, opt = optimized(given, *drawn(), torch.zeros(B, 1, 1, N))
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(B, 1, 1, N, generator=generator)
    for scale in (1.0, 100.0, -1e5):
        same(module, opt, *drawn(), bias * scale)
    for special in (math.nan, math.inf, -math.inf, LOWEST):
        odd = bias.clone()
        odd[1, ..., 3] = special
        odd[2] = special
        same(module, opt, *drawn(), odd)
    same(module, opt, *drawn(), torch.full((B, 1, 1, N), LOWEST / 2) + bias)


def test_other_lengths() -> None:
    auto = torch.export.Dim.AUTO
    shapes = tuple({d: auto for d in range(x.dim()) if x.shape[d] == N}
                   for x in (*drawn(), present()))
    spec, module, opt = optimized(bert, *drawn(), present(), dynamic_shapes=(shapes,))
    assert spec.mask is not ALL
    for length in (N, 97, 311):
        same(module, opt, *drawn(length=length), present((3, length, 1, 50), length))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """A row of padding alone is left out: the author's scores beside -65504 are rounded to 32."""
    _, module, opt = optimized(bert, *drawn(dtype), present())
    for mask in masks():
        if mask.any(-1).all():
            same(module, opt, *drawn(dtype), mask, tolerance=2e-2)


def test_gradients() -> None:
    inputs = [x.requires_grad_() for x in drawn()]
    module = Program(bert)
    opt = attnopt.optimize(module, (*inputs, present()))
    for mask in (present(), present((0, 200, 3, 64))):
        grads = [torch.autograd.grad(run(*inputs, mask).square().sum(), inputs)
                 for run in (module, opt)]
        for wanted, got in zip(*grads, strict=True):
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)


# -- where another mask may hide the best key -----------------------------------------------------
def causal(s, q, k, v, mask):
    added = (1.0 - mask[:, None, None, :].to(q.dtype)) * LOWEST
    future = torch.full((N, N), -math.inf).triu(1)
    return (q @ k.mT / 4 + future + added).softmax(-1) @ v


def twice(s, q, k, v, mask):
    added = (1.0 - mask[:, None, None, :].to(q.dtype)) * LOWEST
    return (q @ k.mT / 4 + added + mask[:, None, :, None].to(q.dtype)
            + added).softmax(-1) @ v


@pytest.mark.parametrize("function", [causal, twice])
def test_the_floor_stands_alone(function: Callable[..., Tensor]) -> None:
    spec, module, opt = optimized(function, *drawn(), present())
    assert "key_floor" not in spec.mask.slots
    for mask in masks():
        same(module, opt, *drawn(), mask)


def test_beside_a_learned_bias() -> None:
    def learned(s, q, k, v, mask):
        added = (1.0 - mask[:, None, None, :].to(q.dtype)) * LOWEST
        return (q @ k.mT / 4 + s.bias + added).softmax(-1) @ v

    spec, module, opt = optimized(learned, *drawn(), present())
    assert "key_floor" in spec.mask.slots
    for mask in masks():
        same(module, opt, *drawn(), mask)


# -- the op ---------------------------------------------------------------------------------------
def test_key_floor() -> None:
    bias = torch.tensor([[0.0, LOWEST], [LOWEST, LOWEST], [-math.inf, -math.inf], [3.0, -2e8]])
    found = torch.ops.attnopt.key_floor([bias], [], "1e8")
    kept = bias >= found
    assert kept.tolist() == [[True, False], [True, True], [True, True], [True, False]]
    assert torch.ops.attnopt.key_floor([bias.to("meta")], [], "1e8").shape == (4, 1)
    assert key_floor.margin(torch.float16) < 65504 < key_floor.margin(torch.bfloat16)
    missing = torch.tensor([[0.0, math.nan]])
    assert not (missing >= key_floor.key_floor([missing], [], "1e8")).any()
