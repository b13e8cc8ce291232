"""The grid on which Triton kernels are held to `kernels/reference.py` in float64.

It runs twice: small, in the interpreter (`interpreted`), and on a GPU (`test_gpu.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import (
    Band,
    BlockMap,
    Causal,
    Globals,
    KeyKeep,
    KeyLifetime,
    Neighborhood,
    Placed,
    Prefix,
    Segments,
    Select,
    Windows,
)
from attnopt.ir.spec import Operand, Spec
from attnopt.kernels.reference import reference
from attnopt.kernels.triton.attention import Attention
from attnopt.kernels.triton.boxes import Boxes
from attnopt.kernels.triton.launch import run_forward
from attnopt.kernels.triton.problem import describe
from attnopt.kernels.triton.tiles import Tile
from tests.kernels.cases import CASES as PLAIN
from tests.kernels.cases import close, doubled

s, q, k, h = E.score, E.index("q"), E.index("k"), E.index("h")
TILE = Tile(32, 16, 4, 1)
SCALED = s * 0.3
IDS = (Operand("row_ids", ("b", "q"), E.INT, "mask"), Operand("key_ids", ("b", "k"), E.INT, "mask"))
MORE = {
    "aligned at the end": Spec(logits=SCALED, mask=Causal(E.size("k") - E.size("q"))),
    "causal from a later row": Spec(logits=SCALED, mask=Causal(-20), empty_row="zero"),
    "wide band": Spec(logits=SCALED, mask=Band(-40, 3)),
    "prefix": Spec(logits=SCALED, mask=Prefix(E.const(21))),
    "prefix and band": Spec(logits=SCALED, mask=Prefix(E.const(37)) & Band(-30, 30),
                            empty_row="zero"),
    "globals": Spec(logits=SCALED, mask=Globals(E.const(5)) | Band(-4, 4)),
    "neighborhood": Spec(logits=SCALED, mask=Neighborhood((5,))),
    "windows": Spec(logits=SCALED, mask=Windows((E.const(24),)), empty_row="zero"),
    "per head": Spec(logits=SCALED, mask=Select("h", (Causal(), Band(-9, 9), Prefix(E.const(30))))),
    "placed": Spec(logits=SCALED, mask=Placed(Causal(), (E.const(8), E.const(50)),
                                              (E.const(8), E.const(50))), empty_row="zero"),
    "segments": Spec(logits=SCALED, mask=Segments("row_ids", "key_ids"), operands=IDS,
                     empty_row="zero"),
    "block map": Spec(logits=SCALED, mask=BlockMap("blocks", 16, 16),
                      operands=(Operand("blocks", None, E.BOOL, "mask"),), empty_row="zero"),
    "lifetime": Spec(logits=SCALED, mask=KeyLifetime("death"), empty_row="zero",
                     operands=(Operand("death", ("b", "k"), E.INT, "mask"),)),
    "hard sigmoid of a distance": Spec(logits=SCALED - E.call("log1p", E.call("abs", q - k))),
    "buckets": Spec(logits=SCALED + E.load("table", h, E.call(
        "minimum", E.call("floor", E.call("log1p", E.call("abs", k - q)) * 2.0), 9)),
        operands=(Operand("table", None, role="table"),)),
    "zero where nothing is kept": Spec(logits=SCALED, mask=KeyKeep("pad"), empty_row="zero",
                                       operands=(Operand("pad", ("b", "k"), E.BOOL, "mask"),)),
    "nan where nothing is kept": Spec(logits=SCALED, mask=KeyKeep("pad") & Band(-5, -2),
                                      operands=(Operand("pad", ("b", "k"), E.BOOL, "mask"),)),
    "squared relu": Spec(logits=SCALED, normalizer="relu", weights=E.weight * E.weight,
                         mask=Causal()),
    "sigmoid divided, edited": Spec(logits=SCALED, normalizer="sigmoid", l1=True,
                                    weights=E.weight / (E.stat("max") + 4.0)),
    "uniform, edited": Spec(logits=SCALED, mask=Band(-5, -2), empty_row="uniform",
                            weights=E.weight * 2.0),
    "edited beyond the mask": Spec(logits=SCALED, mask=Causal(), weights=E.weight + 0.01),
    "value residual": Spec(logits=SCALED, output=E.out * 0.5 + E.value * E.load("gate"),
                           operands=(Operand("gate", ("b", "h", "q"), role="gate"),)),
    "on the row maximum": Spec(logits=SCALED, mask=Causal(), output=E.where(
        E.const(0.4) < E.stat("max"), E.out, E.value)),
    "by count": Spec(logits=SCALED, mask=Causal(),
                     output=E.out * E.call("log", E.call("float", E.stat("count")) + 1.0)),
    "sink and maximum": Spec(logits=SCALED, sinks=E.load("sink"), mask=Causal(),
                             output=E.out * E.stat("max"),
                             operands=(Operand("sink", ("h",), role="sink"),)),
    "sink of a sum": Spec(logits=SCALED, normalizer="exp", l1=True, sinks=E.const(0.7)),
    "channels": Spec(logits=SCALED, output=E.out * E.load("channel"),
                     operands=(Operand("channel", ("d",), role="gate"),)),
}
LEFT_OUT = ("talking heads", "bias of heads")
#: by name, all that the kernels compute
CASES = {name: spec for name, spec in PLAIN.items() if name not in LEFT_OUT} | MORE


@dataclass(frozen=True)
class Shape:
    """Lengths of a problem; key_heads divides heads (grouped queries where it is 1)."""

    batch: int = 2
    heads: int = 3
    queries: int = 45
    keys: int = 50
    head_dim: int = 16
    value_dim: int = 16
    key_heads: int = 0

    def inputs(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        heads = self.key_heads or self.heads
        sizes = ((self.heads, self.queries, self.head_dim), (heads, self.keys, self.head_dim),
                 (heads, self.keys, self.value_dim))
        return [torch.randn(self.batch, *size, device=device).to(dtype) for size in sizes]

    def operands(self, spec: Spec, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        B, H, Q, K = self.batch, self.heads, self.queries, self.keys
        pad = torch.rand(B, 1, 1, K) < 0.7
        pad[..., K // 2] = True
        pad[-1, ..., : K // 2] = False
        made = {
            "pad": pad, "bias": torch.randn(H, Q, K), "row": torch.randn(B, 1, 1, K),
            "head": torch.rand(H, 1, 1) + 0.5, "sink": torch.randn(H, 1, 1),
            "table": torch.randn(H, 10), "gate": torch.randn(B, H, Q, 1),
            "left": torch.randn(H, Q, 2), "right": torch.randn(H, K, 2),
            "score_weight": torch.randn(self.head_dim),
            "row_ids": torch.randint(0, 3, (B, 1, Q, 1)),
            "key_ids": torch.randint(0, 3, (B, 1, 1, K)),
            "death": torch.randint(0, K, (B, 1, 1, K)),
            "blocks": torch.rand(-(-Q // 16), -(-K // 16)) < 0.6,
            "channel": torch.randn(self.value_dim)}
        return [t.to(device, dtype) if t.is_floating_point() else t.to(device)
                for t in (made[o.slot] for o in spec.operands)]


def check_forward(spec: Spec, inputs: Sequence[Tensor], operands: Sequence[Tensor] = (),
                  tile: Tile = TILE, descriptors: bool | None = None,
                  boxes: Boxes | None = None) -> Tensor:
    """One forward against float64: the output, and the log-sum-exp of rows that have one."""
    on_cpu = [t.cpu() for t in inputs], [t.cpu() for t in operands]
    exact, lse = reference(spec)(*doubled(on_cpu[0]), doubled(on_cpu[1]), with_lse=True)
    composed = reference(spec)(*on_cpu[0], on_cpu[1]).to(inputs[0].dtype)
    problem = describe(spec, *inputs, operands, lse=True)
    assert not isinstance(problem, str), problem
    found, found_lse = run_forward(spec, problem, tile, descriptors, boxes)
    assert found.shape == exact.shape and found.dtype == inputs[0].dtype
    close(found.cpu(), exact, composed)
    assert found_lse is not None
    sound = lse.isfinite() if spec.normalizer != "softmax" else lse.isfinite() | lse.isneginf()
    loose = 2e-5 if inputs[0].dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found_lse.cpu().double()[sound], lse[sound], rtol=loose, atol=loose)
    return found


def check_gradients(spec: Spec, inputs: Sequence[Tensor], operands: Sequence[Tensor] = (),
                    tile: Tile | None = TILE) -> None:
    """All gradients against those of the reference in float64."""
    exact_inputs = [t.requires_grad_() if t.is_floating_point() else t
                    for t in doubled([x.detach().cpu() for x in (*inputs, *operands)])]
    mine = [t.detach().clone().requires_grad_(t.is_floating_point()) for t in (*inputs, *operands)]
    composed_inputs = [t.detach().cpu().requires_grad_(t.is_floating_point())
                       for t in (*inputs, *operands)]
    exact = reference(spec)(*exact_inputs[:3], exact_inputs[3:])
    grad = torch.randn(exact.shape).to(inputs[0].dtype)
    out = Attention(spec, tile, tile)(*mine[:3], mine[3:])
    assert out is not None and out.grad_fn is not None
    composed = reference(spec)(*composed_inputs[:3], composed_inputs[3:]).to(grad.dtype)
    close(out.cpu(), exact, composed)
    chosen = [i for i, t in enumerate(mine) if t.requires_grad]

    def gradients(of: Tensor, tensors: list[Tensor]) -> Sequence[Tensor]:
        return torch.autograd.grad(of, [tensors[i] for i in chosen], grad.to(of), allow_unused=True,
                                   materialize_grads=True)

    for place, one, two, three in zip(
            chosen, gradients(out, mine), gradients(exact, exact_inputs),
            gradients(composed, composed_inputs), strict=True):
        assert one.shape == two.shape and one.dtype == mine[place].dtype
        error, most = (one.cpu().double() - two).abs().max(), two.abs().max()
        bound = max(3 * (three.double() - two).abs().max(),
                    32 * torch.finfo(one.dtype).eps * most, 1e-6)
        assert error <= bound, f"gradient {place}: error must be at most {bound}, got {error}"
