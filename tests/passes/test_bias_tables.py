"""Biases by position are looked up in small tables: one vector for all distances, never Q x K.

Most expressions are evaluated by ATen, so that few kernels have to be compiled; all run without
verification, at the captured length and, where lengths may change, at another one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import attnopt
from attnopt.ir.spec import Spec
from tests.spellings import bias_spellings as spell

B, H, N, D = 4, 3, 36, 8
LONGER = 53
pytestmark = pytest.mark.usefixtures("by_aten")


class Program(spell.Tables):
    def __init__(self, function: spell.Spelling, grid: tuple[int, ...]) -> None:
        super().__init__(H, grid, D)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def drawn(length: int = N, batch: int = B, keys: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(batch, H, n, D, generator=generator)
            for n in (length, keys or length, keys or length)]


def check(function: spell.Spelling, inputs: list[Tensor], *others: list[Tensor],
          grid: tuple[int, ...] = (6, 6), dynamic: bool = False) -> tuple[Spec, Any]:
    """Optimise on the inputs, compare on them and on others."""
    module = Program(function, grid).eval()
    options: dict[str, Any] = {"verify": False}
    if dynamic:
        moving = ({2: torch.export.Dim.AUTO},) * 3
        options["dynamic_shapes"] = (moving,)
    opt = attnopt.optimize(module, tuple(inputs), **options)
    for given in (inputs, *others):
        with torch.no_grad():
            torch.testing.assert_close(opt(*given), module(*given), atol=5e-6, rtol=1e-5)
    assert sum(v for k, v in opt.report.calls.items() if k != "hits") == 0, opt.report.calls
    (site,) = opt.report.sites
    assert site.status == "rewritten", (site.reason, site.tried)
    return Spec.parse(site.spec), opt


def dense(spec: Spec) -> list[str]:
    """Operands that vary along both queries and keys."""
    return [o.slot for o in spec.operands if o.axes is not None and {"q", "k"} <= set(o.axes)]


def large(opt: Any, least: int) -> list[str]:
    """Tensors of the rewritten graph with at least so many elements."""
    return [n.name for n in opt.graph_modules[0].graph.nodes
            if isinstance(n.meta.get("val"), Tensor) and n.op == "call_function"
            and n.meta["val"].numel() >= least]


# -- one axis -------------------------------------------------------------------------------------
@pytest.mark.parametrize("function", spell.BY_DISTANCE, ids=lambda f: f.__name__)
def test_a_table_of_distances(function: spell.Spelling) -> None:
    spec, opt = check(function, drawn(), drawn(LONGER), dynamic=True)
    assert not dense(spec), spec
    assert "table by distance, 1-D" in opt.report.sites[0].bias


def test_a_table_of_distances_of_fixed_lengths() -> None:
    spec, opt = check(spell.t5, drawn(N, 2, 21))
    assert not dense(spec)
    assert not large(opt, N * 21 * H)  # no bias is made


def test_the_kernel_reads_it(compiled: None) -> None:
    spec, opt = check(spell.t5, drawn(33, 1, 51))
    assert not dense(spec) and opt.report.sites[0].lowering.startswith("cpp")


def test_a_causal_mask_beside_it_stays_a_mask() -> None:
    spec, _ = check(spell.t5_decoder, drawn(), drawn(LONGER), dynamic=True)
    assert spec.mask.describe() == "causal"


def test_the_table_is_read_at_each_call() -> None:
    module = Program(spell.t5, (6, 6)).eval()
    opt = attnopt.optimize(module, tuple(drawn()), verify=False)
    with torch.no_grad():
        module.buckets.mul_(-2)
        torch.testing.assert_close(opt(*drawn()), module(*drawn()), atol=5e-6, rtol=1e-5)
    assert "table by distance" in opt.report.sites[0].bias


def test_a_learned_table_keeps_its_gradient() -> None:
    module = Program(spell.t5, (6, 6))
    opt = attnopt.optimize(module, tuple(drawn()), verify=False)
    found = []
    for run in (module, opt):
        module.zero_grad()
        run(*drawn()).square().sum().backward()
        found.append(module.buckets.grad.clone())
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


# -- grids ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("grid", [(6, 6), (4, 9), (4, 3, 3)], ids=str)
@pytest.mark.parametrize("function", spell.ON_A_GRID, ids=lambda f: f.__name__)
def test_a_table_of_offsets(function: spell.Spelling, grid: tuple[int, ...]) -> None:
    spec, opt = check(function, drawn(), grid=grid)
    assert not dense(spec), spec
    assert f"table by distance, {len(grid)}-D" in opt.report.sites[0].bias


def test_extra_tokens_have_entries_of_their_own() -> None:
    spec, opt = check(spell.beit, drawn(37))
    assert not dense(spec)
    assert "2-D with 1 extra token" in opt.report.sites[0].bias


def test_a_shifted_window_has_regions() -> None:
    spec, opt = check(spell.swin_shifted, drawn(36, 8))
    assert not dense(spec)
    assert "regions with fill -100" in opt.report.sites[0].bias


@pytest.mark.slow
def test_the_kernel_reads_grids_and_regions(compiled: None) -> None:
    spec, _ = check(spell.swin_shifted, drawn(36, 4))
    assert not dense(spec)


@pytest.mark.slow
def test_the_kernel_reads_extra_tokens(compiled: None) -> None:
    check(spell.beit, drawn(37))


@pytest.mark.parametrize("function", spell.BY_AXIS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("grid", [(16, 16), (9, 32)], ids=str)
def test_a_term_per_axis(function: spell.Spelling, grid: tuple[int, int]) -> None:
    n = grid[0] * grid[1]
    spec, opt = check(function, drawn(n, 1), grid=grid)
    assert not dense(spec), spec
    assert "separable" in opt.report.sites[0].bias
    assert not large(opt, H * n * n)


@pytest.mark.slow
@pytest.mark.parametrize("grid", [(4, 32), (9, 10)], ids=str)
def test_the_kernel_reads_a_term_per_axis(compiled: None, grid: tuple[int, int]) -> None:
    check(spell.sam, drawn(grid[0] * grid[1], 1), grid=grid)


# -- what stays a load ----------------------------------------------------------------------------
def shuffled(s: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    order = torch.tensor([(7 * i * i + 3 * i) % 31 for i in range(q.shape[-2] * k.shape[-2])])
    bias = s.buckets[order.view(q.shape[-2], k.shape[-2])]
    return spell.soft(q, k, v, bias.permute(2, 0, 1))


def of_positions(s: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = (v[0, 0, :, 0] * 9).long()
    bias = s.buckets[(at[None, :] - at[:, None]).abs().clamp(max=31)]
    return spell.soft(q, k, v, bias.permute(2, 0, 1))


def two_fills(s: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.tensor([[0.0, -100.0, -50.0][(i * j) % 3] for i in range(N) for j in range(N)])
    return spell.soft(q, k, v, mask.view(N, N))


def scattered_fills(s: Program, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    chosen = [int(1e4 * abs(math.sin(12.9898 * i + 78.233 * i * i))) % 3 for i in range(N * N)]
    mask = torch.tensor([[0.0, -100.0, -50.0][c] for c in chosen])
    return spell.soft(q, k, v, mask.view(N, N))


@pytest.mark.parametrize("function", [shuffled, of_positions, scattered_fills],
                         ids=lambda f: f.__name__)
def test_what_does_not_repeat_is_loaded(function: Callable[..., Tensor]) -> None:
    spec, _ = check(function, drawn())
    assert dense(spec) == ["bias0"]


def test_fills_by_residues_are_not_loaded() -> None:
    """Rows and columns repeat: what is added depends on q and k modulo 3 alone."""
    spec, _ = check(two_fills, drawn())
    assert not dense(spec), spec


def test_an_index_that_is_edited_is_noticed() -> None:
    module = Program(spell.swin, (6, 6)).eval()
    opt = attnopt.optimize(module, tuple(drawn()), verify=False)
    module.flat.copy_(module.flat.flip(0))
    with torch.no_grad():
        torch.testing.assert_close(opt(*drawn()), module(*drawn()), atol=5e-6, rtol=1e-5)


def test_modules_can_be_saved(tmp_path: Path) -> None:
    for function, inputs in ((spell.t5, drawn()), (spell.swin_shifted, drawn(36, 4))):
        opt = attnopt.optimize(Program(function, (6, 6)).eval(), tuple(inputs), verify=False)
        with torch.no_grad():
            program = torch.export.export(opt, tuple(inputs))
            torch.testing.assert_close(program.module()(*inputs), opt(*inputs))


