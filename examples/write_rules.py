"""Three rules of one's own: two functions, a kernel, an approximation; the first wrong at first.

attnopt finds the attention in a model; a rule says what to compute in its place. This tutorial
writes three of them from nothing, for a small model with three attentions in three spellings:

1. a rewrite as two plain functions. Its first version forgets the rows whose keys are all masked;
   `attnopt.check_rule` finds the smallest input that shows it, and the second version is right.
2. a class with `match` and `rewrite` that puts in an operator of one's own.
3. an approximation: a mask of one's own that leaves keys out. It is used because the user names it,
   and the report says what it changes.

    python examples/write_rules.py [--tokens 128]
"""

import argparse
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import attnopt
from attnopt.ir import expr as E
from attnopt.ir.mask import Band, Causal, Mask
from attnopt.rules import Approximation, Decline, Match, Region


class Model(nn.Module):
    """Three attentions, each spelled in another way."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
        # Scaled before the product, tokens before heads, the mask by `where`.
        swapped = (x.transpose(1, 2) for x in (query / math.sqrt(query.shape[-1]), key, value))
        first = masked(*swapped, keep)
        # A squashed score.
        second = (torch.tanh(query @ key.mT / 8) * 4).softmax(-1) @ first
        # Causal.
        scores = second @ key.mT / math.sqrt(query.shape[-1])
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return scores.masked_fill(hidden, -math.inf).softmax(-1) @ value


def masked(query: Tensor, key: Tensor, value: Tensor, keep: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key)
    weights = torch.where(keep, scores, -math.inf).softmax(-1)
    return torch.einsum("bhqk,bkhd->bhqd", weights, value)


# -- 1. two functions ------------------------------------------------------------------------------
def pattern(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """One spelling stands for all."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    return scores.masked_fill(~keep, -math.inf).softmax(-1) @ v


def forgetful(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def mended(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    """A row without keys is NaN in the pattern; torch's own attention makes it 0."""
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=keep)
    return out.masked_fill(~keep.any(-1, keepdim=True), math.nan)


DIMENSIONS = {"q": "b h s d", "k": "b h t d", "v": "b h t e", "keep": "bool b 1 s t"}


# -- 2. a kernel of one's own ----------------------------------------------------------------------
@torch.library.custom_op("write_rules::squashed", mutates_args=())
def squashed(query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float) -> Tensor:
    """softmax(cap * tanh(scale * q·k)) v, one head after another: a Triton kernel goes here."""
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    for place in range(query.shape[1]):
        scores = torch.tanh(query[:, place] @ key[:, place].mT * scale) * cap
        out[:, place] = scores.softmax(-1) @ value[:, place]
    return out


@squashed.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, scale: float, cap: float) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


def _remember(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.numbers = inputs[3:]


def _backward(ctx, grad: Tensor):
    with torch.enable_grad():
        query, key, value = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        scale, cap = ctx.numbers
        out = (torch.tanh(query @ key.mT * scale) * cap).softmax(-1) @ value
        return (*torch.autograd.grad(out, (query, key, value), grad), None, None)


squashed.register_autograd(_backward, setup_context=_remember)


class Squashed:
    """Takes softmax(cap * tanh(scale * q·k)) without a mask, whatever the two numbers are."""

    name = "squashed"
    recognizes = "a score squashed by tanh, without mask or bias"
    priority = 10

    def match(self, region: Region) -> Match | Decline:
        spec, logits = region.spec, region.spec.logits
        if len(region.shapes[0]) != 4 or any(
                shape[:2] != region.shapes[0][:2] for shape in region.shapes):
            return Decline("query, key and value do not have the same batch and heads")
        if logits.op != "mul" or logits.args[0].op != "tanh" or logits.args[1].op != "const":
            return Decline(f"its logits are {logits}")
        inside = logits.args[0].args[0]
        if inside.op not in ("mul", "div") or inside.args[0] is not E.score \
                or inside.args[1].op != "const":
            return Decline(f"it squashes {inside}")
        scale = inside.args[1].value
        plain = type(spec)(logits=logits)  # a Spec with these logits and nothing else
        if spec.with_(compute=None) != plain:
            return Decline("it has a mask, or something after the softmax")
        scale, cap = (scale if inside.op == "mul" else 1 / scale), logits.args[1].value
        return Match(spec, compute=lambda query, key, value: squashed(
            query, key, value, scale, cap))


# -- 3. an approximation ---------------------------------------------------------------------------
class Nearby(Approximation):
    """Of a causal attention the nearest keys, and every eighth one."""

    name = "nearby"
    recognizes = "causal attention, by request: near keys and every eighth"

    def __init__(self, window: int) -> None:
        self.window = window

    def reduce(self, region: Region) -> tuple[Mask, dict[str, object]]:
        if region.spec.mask != Causal():
            raise Decline("it is not causal")
        return Band(E.const(1 - self.window), E.const(0)) | every(8), {}


def every(step: int) -> Mask:
    """A mask is an expression of the row q and the key k."""
    from attnopt.ir.mask import Where
    return Where((E.index("k") % step).eq(0))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--tokens", type=int, default=128)
    tokens = options.parse_args().tokens
    torch.manual_seed(0)

    rows = []
    for version in (forgetful, mended):
        rule = attnopt.register_rewrite(pattern, version, DIMENSIONS, register=False)
        found = attnopt.check_rule(rule)
        print(found, end="\n\n")
        rows.append((version.__name__, "two functions", "right" if found else "WRONG"))
    attnopt.register_rule(rule)  # the mended one: from now on it is used wherever it fits

    found = attnopt.check_rule(Squashed)
    print(found, end="\n\n")
    rows.append(("squashed", "own operator", "right" if found else "WRONG"))

    query, key, value = torch.randn(3, 2, 4, tokens, 16)
    keep = torch.rand(2, 1, tokens, tokens) > 0.5
    model = Model()
    exact = attnopt.optimize(model, (query, key, value, keep), rules=[rule, Squashed()])
    print(exact.report, end="\n\n")
    print(attnopt.check_rule(Nearby(4)), end="\n\n")  # not exact: what it changes
    near = attnopt.optimize(model, (query, key, value, keep),
                            rules=[rule, Squashed(), Nearby(tokens // 2), "row-blocks",
                                   "fused-softmax", "generated"])
    changed = [site for site in near.report.sites if site.deviation is not None]
    rows.append(("nearby", "own mask", f"changes {changed[0].deviation:.1%}" if changed
                 else "not used"))
    wanted = model(query, key, value, keep)
    error = (exact(query, key, value, keep) - wanted).abs().max()
    for name, kind, verdict in rows:
        print(f"{name:12}{kind:16}{verdict}")
    print(f"exact rules: {sum(s.rule in ('mended', 'squashed') for s in exact.report.sites)} sites,"
          f" results differ by at most {error:.1e}")


if __name__ == "__main__":
    main()
