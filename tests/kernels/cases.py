"""Specs that between them use every step of the normal form, and how a lowering is held to them.

A lowering may be off by twice what the plain composition in the same dtype is off, or by 8 ulp of
the largest output: the rule by which rewrites are accepted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal, KeyKeep
from attnopt.ir.spec import Operand, Schedule, Spec
from attnopt.kernels import reference
from attnopt.kernels.bind import bind

B, H, Q, K, D = 2, 3, 5, 7, 8
INF = float("inf")
s, q, k = E.score, E.index("q"), E.index("k")
PAD = Operand("pad", ("b", "k"), E.BOOL, "mask")
BIAS = Operand("bias", ("h", "q", "k"), role="bias")
ROW = Operand("row", ("b", "k"), role="mask")
HEAD = Operand("head", ("h",), role="scale")
SINK = Operand("sink", ("h",), role="sink")
TABLE = Operand("table", None, role="table")
GATE = Operand("gate", ("b", "h", "q"), role="gate")
MIX = Operand("mix", None, role="mix")
LEVEL = Operand("level", None, role="mix")
WEIGHT = Operand("score_weight", None, role="other")
LEFT, RIGHT = (Operand(n, ("h", a), role="factor") for n, a in (("left", "q"), ("right", "k")))
SLOTS = {
    "pad": lambda: (torch.rand(B, 1, 1, K) < 0.7).index_fill(-1, torch.tensor(0), True),
    "bias": lambda: torch.randn(H, Q, K), "row": lambda: torch.randn(B, 1, 1, K),
    "head": lambda: torch.rand(H, 1, 1) + 0.5, "sink": lambda: torch.randn(H, 1, 1),
    "table": lambda: torch.randn(H, Q + K), "gate": lambda: torch.randn(B, H, Q, 1),
    "level": lambda: torch.randn(H), "mix": lambda: torch.randn(H, H),
    "score_weight": lambda: torch.randn(D),
    "left": lambda: torch.randn(H, Q, 2), "right": lambda: torch.randn(H, K, 2),
}
tanh = E.call("tanh", s * (0.3 / 5)) * 5.0
CASES = {
    "plain": Spec(logits=s * 0.3),
    "causal": Spec(logits=s * 0.3, mask=Causal()),
    "aligned": Spec(logits=s * 0.3, mask=Causal(E.size("k") - E.size("q"))),
    "band": Spec(logits=s * 0.3, mask=Band(-2, 1)),
    "bias": Spec(logits=s * 0.3 + E.load("bias"), operands=(BIAS,)),
    "biases": Spec(logits=(s + E.load("row")) / 3.0 - E.load("bias"), operands=(ROW, BIAS)),
    "bias of a table": Spec(logits=s * 0.3 + E.load("table", E.index("h"), q - k + (K - 1)),
                            operands=(TABLE,)),
    "bias and causal": Spec(logits=s * 0.3 + E.load("bias"), mask=Causal(), operands=(BIAS,)),
    "padding": Spec(logits=s * 0.3, mask=KeyKeep("pad"), operands=(PAD,)),
    "padding and causal": Spec(logits=s, mask=KeyKeep("pad") & Causal(), empty_row="uniform",
                               operands=(PAD,)),
    "padding and bias": Spec(logits=s * 0.3 + E.load("bias"), mask=KeyKeep("pad") & Causal(),
                             empty_row="zero", operands=(PAD, BIAS)),
    "scale per head": Spec(logits=s * E.load("head"), operands=(HEAD,)),
    "scale per key": Spec(logits=0.3 * s * E.load("row"), operands=(ROW,)),
    "negative scale": Spec(logits=1.0 - s * 0.3),
    "alibi": Spec(logits=s * 0.3 + E.load("head") * E.call("neg", E.call("abs", q - k)),
                  operands=(HEAD,)),
    "low rank": Spec(logits=s * 0.3 + E.inner("left", "right"), operands=(LEFT, RIGHT)),
    "gate": Spec(logits=s * 0.3, output=E.out * E.load("gate"), operands=(GATE,)),
    "sink": Spec(logits=s * 0.3, sinks=E.load("sink"), operands=(SINK,)),
    "sink and causal": Spec(logits=s * 0.3, mask=Causal(), sinks=E.load("sink"),
                            operands=(SINK,)),
    "softcap": Spec(logits=tanh),
    "softcap, padding and causal": Spec(logits=tanh, mask=KeyKeep("pad") & Causal(),
                                        operands=(PAD,)),
    "softcap and sink": Spec(logits=tanh + E.load("bias"), sinks=E.load("sink"), mask=Causal(),
                             operands=(BIAS, SINK)),
    "cases": Spec(logits=E.where(q < k, s * 0.3, E.call("maximum", s * s, 0.5) - s)),
    "upcast": Spec(logits=tanh, compute="float32"),
    "distance": Spec(score="distance", logits=s * -0.2),
    "additive": Spec(score="additive", operands=(WEIGHT,)),
    "key": Spec(score="key", logits=E.load("row"), operands=(ROW,)),
    "key and causal": Spec(score="key", logits=E.load("row"), mask=Causal(), operands=(ROW,)),
    "sigmoid": Spec(logits=s * 0.3 - 1.0, normalizer="sigmoid", mask=KeyKeep("pad"),
                    operands=(PAD,)),
    "relu": Spec(logits=s * 0.3 + 2.0, normalizer="relu", l1=True, mask=Causal()),
    "softplus": Spec(logits=s, normalizer="softplus", mask=Band(-3, 0)),
    "exp": Spec(logits=s * 0.3, normalizer="exp", l1=True),
    "linear": Spec(logits=s * 0.3, normalizer="identity", mask=Causal()),
    "edited": Spec(logits=s * 0.3, weights=E.weight * E.weight + 0.1, renormalize=True),
    "statistics": Spec(logits=s * 0.3, mask=KeyKeep("pad"), operands=(PAD,),
                       weights=E.weight * E.stat("count") + E.stat("max") * 0.1,
                       output=E.out * E.stat("lse") / E.stat("total")),
    "groups": Spec(logits=s * 0.3, groups=E.where(k < 3, 0, 1),
                   weights=E.where(k < 3, E.weight / E.stat("mass:0"), E.weight)),
    "bias of heads": Spec(logits=s * 0.3, mix_bias="level", operands=(LEVEL,)),
    "talking heads": Spec(logits=s * 0.3, mix_logits="mix", mix_weights="mix", mask=Causal(),
                          operands=(MIX,)),
}
SCHEDULES = {"chosen": "", "dense": str(Schedule("aten:dense")),
             "blocks": str(Schedule("aten:blocks", (2, 4))),
             "cpp": str(Schedule("cpp", (12, 32, 6, 2)))}


def operands_of(spec: Spec) -> list[Tensor]:
    return [SLOTS[o.slot]() for o in spec.operands]


def inputs(*leading: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    leading = leading or (B, H)
    return [torch.randn(*leading, n, D).to(dtype) for n in (Q, K, K)]


def doubled(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in tensors]


def check(spec: Spec, given: Sequence[Tensor], operands: Sequence[Tensor] = (),
          schedule: str = "", exact: Tensor | None = None) -> Tensor:
    """Run a lowering and hold it to the acceptance rule; returns its output."""
    if exact is None:
        exact = reference(spec)(*doubled(given), doubled(operands))
    before = [t.detach().clone() for t in (*given, *operands)]
    found = bind(str(spec), schedule)(*given, *operands)
    assert found.dtype == given[0].dtype and found.shape == exact.shape
    for was, now in zip(before, (*given, *operands), strict=True):
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)
    close(found, exact, reference(spec)(*given, operands).to(found.dtype))
    return found


def close(found: Tensor, exact: Tensor, composed: Tensor) -> None:
    """The acceptance rule; `composed` is the plain composition in the dtype of `found`."""
    assert (found.isnan() == exact.isnan()).all(), "NaN must be where the reference has it"
    if not exact.numel():
        return

    def error(of: Tensor) -> float:
        return (of.detach().double() - exact).nan_to_num(0.0, 0.0, 0.0).abs().max().item()

    largest = exact.detach().nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    bound = max(2 * error(composed), 8 * torch.finfo(found.dtype).eps * largest)
    assert error(found) <= bound, f"error must be at most {bound}, got {error(found)}"
