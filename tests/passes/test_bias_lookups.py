"""Relative positions that meet the query or the key are read from a table in the kernel: neither
the gathered embeddings nor the shifted or gathered scores are made.

Most expressions are evaluated by ATen, so that few kernels have to be compiled; all run without
verification, against the module itself in float64.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import attnopt
from attnopt.ir.spec import Spec
from tests.spellings import lookup_spellings as spell

B, H, N, D = 2, 3, 24, 8
LONGEST = 64
QUERY, KEY = "query table by relative position", "key table by relative position"
pytestmark = pytest.mark.usefixtures("by_aten")


class Program(spell.Rows):
    def __init__(self, function: spell.Spelling) -> None:
        super().__init__(H, LONGEST, D)
        self.function = function

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.function(self, q, k, v)


def drawn(length: int = N, keys: int = 0, batch: int = B,
          dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    return tuple(torch.randn(batch, H, n, D, generator=generator).to(dtype)
                 for n in (length, keys or length, keys or length))


def agree(opt: Any, module: Program, inputs: tuple[Tensor, ...]) -> None:
    """The rewritten module on some inputs is as close to float64 as rounding allows."""
    with torch.no_grad():
        exact = copy.deepcopy(module).double()(*(x.double() for x in inputs))
        scale = 1.0 if inputs[0].dtype == torch.float32 else 2.0**14
        torch.testing.assert_close(opt(*inputs).double(), exact, atol=5e-6 * scale,
                                   rtol=1e-5 * scale)


def check(function: spell.Spelling, inputs: tuple[Tensor, ...], *others: tuple[Tensor, ...],
          dynamic: bool = False) -> tuple[Spec, Any]:
    """Optimise on the inputs, compare on them and on others."""
    module = Program(function).eval().to(inputs[0].dtype)
    options: dict[str, Any] = {"verify": False}
    if dynamic:
        options["dynamic_shapes"] = ({2: torch.export.Dim.AUTO},) * 3
    opt = attnopt.optimize(module, inputs, **options)
    for given in (inputs, *others):
        agree(opt, module, given)
    assert sum(v for k, v in opt.report.calls.items() if k != "hits") == 0, opt.report.calls
    (site,) = opt.report.sites
    assert site.status == "rewritten", (site.reason, site.tried)
    return Spec.parse(site.spec), opt


def dense(spec: Spec) -> list[str]:
    """Operands that vary along both queries and keys."""
    return [o.slot for o in spec.operands if o.axes is not None and {"q", "k"} <= set(o.axes)]


def made(opt: Any) -> list[str]:
    """Tensors of queries x keys that the rewritten graph computes of its inputs."""
    return [n.name for n in opt.graph_modules[0].graph.nodes
            if n.op == "call_function" and isinstance(n.meta.get("val"), Tensor)
            and n.meta["val"].is_floating_point() and list(n.meta["val"].shape).count(N) > 1]


def named(function: spell.Spelling) -> str:
    return function.__name__


def some(*functions: spell.Spelling, quick: int = 1) -> list[Any]:
    """Spellings of which only the first ones are checked each time."""
    return [*functions[:quick], *(pytest.param(f, marks=pytest.mark.slow)
                                  for f in functions[quick:])]


# -- what is read in the kernel -------------------------------------------------------------------
@pytest.mark.parametrize("function", some(*spell.SHAW), ids=named)
def test_embeddings_of_distances_are_not_gathered(function: spell.Spelling) -> None:
    spec, opt = check(function, drawn())
    assert not dense(spec), spec
    assert QUERY in opt.report.sites[0].bias
    assert not made(opt)
    assert (KEY in opt.report.sites[0].bias) == (function is spell.relative_key_query)


@pytest.mark.parametrize("function", some(*spell.SHIFTS, *spell.SKEWS), ids=named)
def test_a_table_is_not_shifted(function: spell.Spelling) -> None:
    spec, opt = check(function, drawn())
    assert not dense(spec), spec
    assert f"{QUERY}, shift" in opt.report.sites[0].bias
    if function not in spell.SKEWS:  # their table itself is of queries x keys
        assert not made(opt)
    assert not [n for n in made(opt) if "pad" in n or "slice" in n or "view" in n]
    if function in spell.SKEWS:
        assert spec.mask.describe() == "causal"


@pytest.mark.parametrize("function", some(*spell.DISENTANGLED), ids=named)
def test_two_tables_of_buckets(function: spell.Spelling) -> None:
    spec, opt = check(function, drawn())
    assert not dense(spec), spec
    assert f"{QUERY}, buckets" in opt.report.sites[0].bias
    assert f"{KEY}, buckets" in opt.report.sites[0].bias
    assert not [n for n in made(opt) if "gather" in n]


@pytest.mark.parametrize("function", some(spell.relative_key_query, spell.clipped, spell.xlnet),
                         ids=named)
def test_fewer_queries_than_keys(function: spell.Spelling) -> None:
    spec, _ = check(function, drawn(17, 30))
    assert not dense(spec), spec


@pytest.mark.slow
def test_a_memory_before_the_queries() -> None:
    spec, _ = check(spell.transformer_xl, drawn(17, 30))
    assert not dense(spec), spec


@pytest.mark.parametrize("function", some(
    spell.skewed, spell.clipped, spell.shaw_by_product, spell.padded_shift, spell.flat_shift,
    spell.strided_shift, spell.gathered_shift, spell.deberta), ids=named)
def test_lengths_may_change(function: spell.Spelling) -> None:
    spec, _ = check(function, drawn(), drawn(41), drawn(7), dynamic=True)
    assert not dense(spec), spec


@pytest.mark.slow
@pytest.mark.parametrize("length", [2, 3, 5])
def test_short_rows(length: int) -> None:
    for function in (spell.relative_key, spell.padded_shift, spell.deberta, spell.skewed):
        check(function, drawn(length, batch=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_types(dtype: torch.dtype) -> None:
    for function in (spell.relative_key_query, spell.conformer):
        check(function, drawn(dtype=dtype))


# -- the kernel ------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("function", [
    spell.relative_key_query, spell.clipped, spell.conformer, spell.xlnet, spell.transformer_xl,
    spell.skewed, spell.deberta_v2], ids=named)
def test_the_kernel_reads_it(compiled: None, function: spell.Spelling) -> None:
    spec, opt = check(function, drawn(61, batch=1))
    assert not dense(spec) and opt.report.sites[0].lowering.startswith("cpp")


@pytest.mark.slow
def test_the_kernel_reads_a_shift(compiled: None) -> None:
    spec, opt = check(spell.padded_shift, drawn(37, batch=1))
    assert not dense(spec) and opt.report.sites[0].lowering.startswith("cpp")


@pytest.mark.parametrize("function", some(spell.relative_key_query, spell.padded_shift,
                                          spell.deberta_v2, spell.skewed), ids=named)
def test_gradients(function: spell.Spelling) -> None:
    """Of the queries, the keys and every table."""
    module = Program(function)
    inputs = [x.requires_grad_() for x in drawn()]
    opt = attnopt.optimize(module, tuple(inputs), verify=False)
    found = []
    for run in (module, opt):
        module.zero_grad()
        for x in inputs:
            x.grad = None
        run(*inputs).square().sum().backward()
        found.append([x.grad.clone() for x in (*inputs, *module.parameters())
                      if x.grad is not None])
    assert len(found[0]) == len(found[1]) > 3
    for ours, theirs in zip(*reversed(found), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("function", [spell.clipped, spell.skewed, spell.deberta], ids=named)
def test_gradients_of_the_kernel(compiled: None, function: spell.Spelling) -> None:
    test_gradients(function)


@pytest.mark.slow
def test_modules_can_be_saved() -> None:
    opt = attnopt.optimize(Program(spell.relative_key_query).eval(), drawn(), verify=False)
    with torch.no_grad():
        program = torch.export.export(opt, drawn())
        torch.testing.assert_close(program.module()(*drawn()), opt(*drawn()))


# -- near misses -----------------------------------------------------------------------------------
def shifted_by(offset: int, rows: int = 1) -> spell.Spelling:
    """The shift with another first column, which reads other distances; those of the next row come
    in where it is too far."""
    def function(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, n, d = q.shape
        far = q @ s.by_head[:, s.longest - n : s.longest + n - 1].mT
        far = F.pad(far, (1, 0)).reshape(b, h, 2 * n, n)[:, :, rows:]
        far = far.reshape(b, h, -1)[..., : n * (2 * n - 1) // (2 * n - 1) * (2 * n - 1)]
        far = far[..., : (far.shape[-1] // (2 * n - 1)) * (2 * n - 1)].reshape(b, h, -1, 2 * n - 1)
        far = F.pad(far, (0, 0, 0, n))[:, :, :n, offset : offset + n]
        return spell.attend((spell.dot(q, k) + far) * d**-0.5, v)
    function.__name__ = f"shifted_by_{offset}_{rows}"
    return function


def unmasked_skew(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What comes in from the next row is seen."""
    b, h, n, d = q.shape
    far = F.pad(q @ s.by_head[:, :n].mT, (1, 0)).reshape(b, h, n + 1, n)[:, :, 1:, :]
    return spell.attend((spell.dot(q, k) + far) * d**-0.5, v)


def half_masked_skew(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One column more than causal is seen."""
    b, h, n, d = q.shape
    far = F.pad(q @ s.by_head[:, :n].mT, (1, 0)).reshape(b, h, n + 1, n)[:, :, 1:, :]
    scores = (spell.dot(q, k) + far) * d**-0.5
    return spell.attend(scores.masked_fill(torch.ones(n, n).triu(2).bool(), float("-inf")), v)


def reversed_distance(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """j - i in the place of i - j."""
    embedded = s.distance_embedding(s.longest - 1 - spell.distances(q, k))
    return spell.attend(spell.dot(q, k) + torch.einsum("bhld,lrd->bhlr", q, embedded), v)


def negative_index(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Distances below zero count from the end of the table."""
    embedded = s.short[spell.distances(q, k).clamp(-8, 8)]
    return spell.attend(spell.dot(q, k) + torch.einsum("bhld,lrd->bhlr", q, embedded), v)


def transposed_table(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """DeBERTa's second table without the transposition: of queries, by the keys' distances."""
    b, h, n, _ = q.shape
    back = torch.clamp(-spell.distances(q, k) + 12, 0, 23).expand(b, h, n, n)
    far = torch.gather(torch.matmul(k, s.by_head[:, :24].mT), -1, back)
    return spell.attend(spell.dot(q, k) + far, v)


def by_position_of_key(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Not a distance: the product of both places, modulo the table."""
    n, m = q.shape[-2], k.shape[-2]
    at = (torch.arange(n)[:, None] * torch.arange(m)) % 17
    return spell.attend(spell.dot(q, k) + torch.einsum("bhld,lrd->bhlr", q, s.short[at]), v)


def of_values(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Places that the input decides."""
    at = (v[0, 0, :, 0] * 4).long()
    embedded = s.short[(at[None, :] - at[:, None]).clamp(-8, 8) + 8]
    return spell.attend(spell.dot(q, k) + torch.einsum("bhld,lrd->bhlr", q, embedded), v)


def both_in_the_product(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Three factors: the query, the key and an embedding."""
    embedded = s.short[spell.distances(q, k).clamp(-8, 8) + 8]
    far = torch.einsum("bhld,lrd->bhlr", q * q, embedded * embedded)
    return spell.attend(spell.dot(q, k) + far, v)


def another_head(s: spell.Rows, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The table of the next head."""
    embedded = s.by_head.roll(1, 0)[:, spell.distances(q, k) + s.longest - 1]
    return spell.attend(spell.dot(q, k) + torch.einsum("bhld,hlrd->bhlr", q, embedded), v)


MISSES = [unmasked_skew, half_masked_skew, reversed_distance, negative_index, transposed_table,
          by_position_of_key, of_values, both_in_the_product, another_head,
          *(shifted_by(n) for n in (1, N - 1)), shifted_by(0, 2), shifted_by(3, 2)]


@pytest.mark.parametrize("function", some(*MISSES, quick=3), ids=named)
def test_near_misses_stay_right(function: spell.Spelling) -> None:
    check(function, drawn())


def test_places_out_of_the_table_are_no_business_of_ours() -> None:
    """A model that runs out of its table for longer inputs fails, and must not be read on."""
    module = Program(spell.relative_key).eval()
    opt = attnopt.optimize(module, drawn(), verify=False,
                           dynamic_shapes=({2: torch.export.Dim.AUTO},) * 3)
    assert dense(Spec.parse(opt.report.sites[0].spec))
    with pytest.raises(Exception), torch.no_grad():  # noqa: B017, the error is torch's own
        opt(*drawn(LONGEST + 9))


def test_the_table_is_read_at_each_call() -> None:
    module = Program(spell.relative_key).eval()
    opt = attnopt.optimize(module, drawn(), verify=False)
    with torch.no_grad():
        module.distance_embedding.weight.mul_(-2)
    agree(opt, module, drawn())
    assert QUERY in opt.report.sites[0].bias


class Repeated(torch.nn.Module):
    """A term per row and one per column of a grid, repeated to all tokens."""

    def __init__(self, side: int = 6) -> None:
        super().__init__()
        self.side = side
        self.high, self.wide = (torch.nn.Parameter(torch.randn(2 * side - 1, D)) for _ in range(2))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = self.side
        far = torch.arange(n)[:, None] - torch.arange(n) + n - 1
        rows = q.unflatten(2, (n, n))
        high = torch.einsum("bhyxc,yjc->bhyxj", rows, self.high[far]).flatten(2, 3)
        wide = torch.einsum("bhyxc,xjc->bhyxj", rows, self.wide[far]).flatten(2, 3)
        scores = (q * D**-0.5) @ k.mT + high.repeat_interleave(n, -1) + wide.repeat(1, 1, 1, n)
        return scores.softmax(-1) @ v


def test_parts_of_tokens_beside_a_batch_of_any_size() -> None:
    module = Repeated().eval()
    opt = attnopt.optimize(module, drawn(36), verify=False,
                           dynamic_shapes=({0: torch.export.Dim.AUTO},) * 3)
    for batch in (B, 1, 5):
        inputs = drawn(36, batch=batch)
        with torch.no_grad():
            torch.testing.assert_close(opt(*inputs), module(*inputs), atol=2e-5, rtol=1e-4)
    (site,) = opt.report.sites
    assert QUERY in site.bias and not dense(Spec.parse(site.spec)), site.bias


# -- grids whose keys are pooled -------------------------------------------------------------------
class Pooled(torch.nn.Module):
    """A term per row and one per column of fewer keys than queries (MViTv2, arXiv 2112.01526),
    with tokens before the grid."""

    def __init__(self, way: str, extra: int, rows: int = 32, keys: int = 16) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.way, self.extra, self.rows, self.keys = way, extra, rows, keys
        self.high, self.wide = (torch.nn.Parameter(torch.randn(
            2 * rows - 1, D, generator=generator)) for _ in range(2))

    def looked_up(self, table: Tensor) -> Tensor:
        ratio = self.rows // self.keys
        far = torch.arange(self.rows)[:, None] - torch.arange(self.keys)[None] * ratio
        return table[(far + (self.keys - 1) * ratio).long()]

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, _, d = q.shape
        n, m, c = self.rows, self.keys, self.extra
        scores = (q * d**-0.5) @ k.transpose(-2, -1)
        rows = q[:, :, c:].reshape(b, h, n, n, d)
        high = torch.einsum("byhwc,hkc->byhwk", rows, self.looked_up(self.high))
        wide = torch.einsum("byhwc,wkc->byhwk", rows, self.looked_up(self.wide))
        if self.way == "pad":
            far = (high[..., :, None] + wide[..., None, :]).reshape(b, h, n * n, m * m)
            scores = scores + F.pad(far, (c, 0, c, 0))
        else:
            inner = scores[:, :, c:, c:].view(b, h, n, n, m, m)
            scores[:, :, c:, c:] = (inner + high[..., :, None] + wide[..., None, :]).view(
                b, h, n * n, m * m)
        return scores.softmax(-1) @ v


@pytest.mark.slow
@pytest.mark.parametrize(("way", "extra"), [("pad", 1), ("assign", 0), ("assign", 1)])
def test_pooled_keys_have_terms_per_axis(way: str, extra: int) -> None:
    module = Pooled(way, extra).eval()
    inputs = tuple(torch.randn(1, 2, n * n + extra, D) for n in (32, 16, 16))
    opt = attnopt.optimize(module, inputs, verify=False)
    with torch.no_grad():
        torch.testing.assert_close(opt(*inputs), module(*inputs), atol=2e-5, rtol=1e-4)
    (site,) = opt.report.sites
    assert "separable per axis" in site.bias
