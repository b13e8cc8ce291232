"""What the example inputs hide guides the choice of lowering and tile, and nothing else."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import attnopt
from attnopt import kernels
from attnopt.cost.choose import Candidate, choose
from attnopt.cost.devices import find_cpu
from attnopt.cost.tiles import TileCounts
from attnopt.ir.mask import KeyKeep
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.choosing import Problem, Tables, estimates
from attnopt.passes.analyze import by_rows
from attnopt.passes.analyze.by_value import Values

B, H, N, D = 4, 2, 96, 8
LENGTHS = (96, 7, 33, 50)


def drawn() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(B, H, N, D, generator=generator) for _ in range(3)]


def present() -> Tensor:
    return (torch.arange(N) < torch.tensor(LENGTHS)[:, None]).long()


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(N))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        hidden = (mask == 0)[:, None, None, :]
        return (q @ k.mT / 4).masked_fill(hidden, -1e9).softmax(-1) @ v


class Learned(Masked):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        hidden = (mask * self.weight <= 0)[:, None, None, :]
        return (q @ k.mT / 4).masked_fill(hidden, -1e9).softmax(-1) @ v


def asked(monkeypatch: pytest.MonkeyPatch, module: nn.Module, **options: Any,
          ) -> tuple[list[dict[str, Tensor]], nn.Module]:
    """The tables of all problems that the cost model was asked about."""
    found: list[dict[str, Tensor]] = []
    ask = kernels.estimates

    def recording(problem: Problem, *args: Any) -> Any:
        found.append(dict(problem.tables.by_slot))
        return ask(problem, *args)

    monkeypatch.setattr(kernels, "estimates", recording)
    inputs = (*drawn(), present())
    with torch.no_grad():
        opt = attnopt.optimize(module, inputs, verify=False, **options)
        torch.testing.assert_close(opt(*inputs), module(*inputs))
        other = torch.ones_like(inputs[-1])
        torch.testing.assert_close(opt(*inputs[:-1], other), module(*inputs[:-1], other))
    return found, opt


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_mask_of_the_example_is_known(monkeypatch: pytest.MonkeyPatch, by_aten: None,
                                          dynamic: bool) -> None:
    options = {}
    if dynamic:
        auto = torch.export.Dim.AUTO
        options["dynamic_shapes"] = (tuple({d: auto for d in range(x.dim()) if x.shape[d] == N}
                                           for x in (*drawn(), present())),)
    found, _ = asked(monkeypatch, Masked().eval(), **options)
    assert found
    (table,) = found[0].values()
    hidden = (present() == 0)[:, None, None]
    assert torch.equal(table, hidden) or torch.equal(table, ~hidden)


def test_what_depends_on_a_parameter_is_not(monkeypatch: pytest.MonkeyPatch,
                                            by_aten: None) -> None:
    found, _ = asked(monkeypatch, Learned().eval())
    assert found and not any(found)


# -- the model ------------------------------------------------------------------------------------
def problem(**changes: Any) -> Problem:
    spec = Spec(mask=KeyKeep("keep"), operands=(Operand("keep", ("b", "k"), "bool", "mask"),))
    shape = (16, 12, 256, 32)
    return Problem(spec, shape, shape, shape, threads=1, **changes)


def best(choice: Any, lowering: str) -> float:
    return min(e.seconds for e in choice.table if e.candidate.lowering == lowering)


def test_hidden_keys_make_the_kernel_cheaper() -> None:
    keep = torch.zeros(16, 1, 1, 256, dtype=torch.bool)
    keep[..., :32] = True
    lowerings = ("cpp", "aten:sdpa")
    unknown, known, thin = (estimates(p, lowerings) for p in (
        problem(), problem(tables=Tables({"keep": keep})), problem(visible=0.125)))
    for choice in (known, thin):
        assert best(choice, "cpp") < 0.5 * best(unknown, "cpp")
        assert best(choice, "aten:sdpa") == best(unknown, "aten:sdpa")
        assert choice.best is not None and choice.best.candidate.lowering == "cpp"


def test_thinned_counts() -> None:
    counts = TileCounts(torch.tensor([[3, 0, 4]]), torch.tensor([[1, 4, 0]]), 4)
    thin = counts.thinned(0.5)
    assert thin.full.tolist() == [[1, 0, 2]] and thin.partial.tolist() == [[1, 2, 0]]
    assert counts.thinned(1.0).visited.tolist() == counts.visited.tolist()


def test_visible_is_for_tiles_alone() -> None:
    device = find_cpu("", "avx2", 1, None)
    found = problem()
    given = [Candidate("cpp", (48, 64, 4, 2)), Candidate("aten:sdpa")]
    whole, part = (choose(given, found.work, found.spec.mask, device, visible=v)
                   for v in (1.0, 0.25))
    assert best(part, "cpp") < best(whole, "cpp")
    assert best(part, "aten:sdpa") == best(whole, "aten:sdpa")


# -- large constants ------------------------------------------------------------------------------
def test_a_mask_by_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its values are the same, and nothing larger than a block is made."""
    class Made(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            place = torch.arange(x.shape[-1])
            apart = (place[:, None] - place).abs()
            width = 40 / torch.log2(apart.clamp(min=2).float())
            return x.masked_fill((apart < width) | (place % 7 == 0), 0.0)

    module = torch.export.export(Made(), (torch.randn(130, 130),)).module()
    graph = module.graph
    fill = next(n for n in graph.nodes if "masked_fill" in str(n.target))
    mask = fill.args[1]
    kinds = {n.name: "constant" if "lifted" in n.name else "input"
             for n in graph.nodes if n.op == "placeholder"}
    values = Values(kinds, lambda name: None)
    whole = values.evaluate(mask)
    monkeypatch.setattr(by_rows, "SMALL", 2000)
    monkeypatch.setattr(by_rows, "BLOCK", 130 * 8 * 17)
    monkeypatch.setattr("attnopt.passes.analyze.by_value.LARGEST", 20_000)
    again = Values(kinds, lambda name: None)
    assert torch.equal(again.evaluate(mask), whole)
    assert 0 < int(whole.sum()) < whole.numel()
