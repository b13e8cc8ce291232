"""Softmax attention whose logits are a scaled dot product plus bias and mask: one fused call.

Takes every spelling whose Spec F.scaled_dot_product_attention can compute, on whatever backend
torch has for it. An author's own fused call is taken only where the normal form saves something:
a mask proven away, a causal flag, K and V without repetition.
"""

from __future__ import annotations

from attnopt import kernels
from attnopt.ir.spec import Schedule
from attnopt.passes.rules import memory
from attnopt.passes.rules.cost import local, pays
from attnopt.rules import Decline, Match, Region, Rule


class FusedSoftmax(Rule):
    name = "fused-softmax"
    recognizes = "softmax(scale * q·k + bias + mask) v, however it is spelled"

    def match(self, region: Region) -> Match:
        if "aten" not in region.lowerings:
            raise Decline("backend leaves out aten")
        local(region)
        if region.authored == "sdpa" and not region.gained:
            raise Decline("the author's own fused call, nothing to add")
        reasons = kernels.reasons(
            region.spec, "aten:sdpa", head_dims=region.lengths[-2:], dtypes=region.dtypes,
            device=region.device, requires_grad=region.training,
            operand_grad=region.training and region.operand_grad)
        if reasons:
            raise Decline(reasons[0])
        pays(region)
        smaller = memory.in_blocks(region)
        if memory.wanted(region) and smaller is not None and (
                memory.held(region, smaller, "aten:blocks")
                < memory.held(region, region.spec, "aten:sdpa")):
            raise Decline("a mask of queries x keys, where row blocks hold none")
        return Match(region.spec, Schedule("aten:sdpa"),
                     memory=memory.words(region, region.spec, "aten:sdpa"))
