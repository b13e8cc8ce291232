"""What the tests of the primitives share: float64 draws, dense attention, the comparison."""

import torch
from torch import Tensor

from attnopt.ir.expr import Expr
from attnopt.ir.mask import Mask
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels import reference


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def qkv(heads: int = 2, rows: int = 12, dim: int = 8, batch: int = 2) -> tuple[Tensor, ...]:
    return tuple(draw(batch, heads, rows, dim) for _ in range(3))


def spec(axes: dict[str, tuple[str, ...] | None] | None = None, **fields: object) -> Spec:
    """A Spec with an operand for every slot; `axes` says how those of broadcast operands lie."""
    found = set()
    for part in fields.values():
        if isinstance(part, Expr | Mask):
            found |= part.slots
    found |= {str(fields[n]) for n in ("mix_logits", "mix_weights") if n in fields}
    if fields.get("score") == "additive":
        found.add("score_weight")
    operands = tuple(Operand(slot, (axes or {}).get(slot)) for slot in sorted(found))
    made = Spec(operands=operands, **fields)  # type: ignore[arg-type]
    assert Spec.parse(str(made)) == made
    return made


def run(made: Spec, query: Tensor, key: Tensor, value: Tensor, **operands: Tensor) -> Tensor:
    return reference(made)(query, key, value, operands)


def call_reference(query: Tensor, key: Tensor, value: Tensor, operands: list[Tensor],
                   made: Spec) -> tuple[Tensor, Tensor]:
    """The attention op as a Rewrite's graph calls it, by the reference."""
    out, lse = reference(made)(query, key, value, operands, with_lse=True)
    return out, lse


def attend(x: Tensor, value: Tensor, keep: Tensor | None = None) -> Tensor:
    """softmax(x) @ value over the keys that are kept."""
    if keep is not None:
        x = x.masked_fill(~keep, -torch.inf)
    return torch.softmax(x, -1) @ value


def assert_equal(found: Tensor, expected: Tensor, bound: float = 1e-12) -> None:
    assert found.shape == expected.shape, (found.shape, expected.shape)
    assert torch.isfinite(expected).all()
    error = (found - expected).abs().max()
    assert error <= bound * expected.abs().max(), float(error)
