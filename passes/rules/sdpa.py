"""Softmax attention whose logits are a scaled dot product plus bias and mask: one fused call.

Takes every spelling whose Spec F.scaled_dot_product_attention can compute, on whatever backend
torch has for it. An author's own fused call is taken only where the normal form saves something:
a mask proven away, a causal flag, K and V without repetition. A bias that the graph makes as a
product is further columns of query and key, see `attnopt.kernels.low_rank`.
"""

from __future__ import annotations

from dataclasses import replace

from attnopt import kernels
from attnopt.ir.spec import Schedule, Spec
from attnopt.passes.rules import cost, memory
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
        spec = self.form(region)
        reasons = self.reasons(region, spec)
        if reasons:
            raise Decline(reasons[0])
        pays(region)
        smaller = memory.in_blocks(region)
        if memory.wanted(region) and smaller is not None and (
                memory.held(region, smaller, "aten:blocks")
                < memory.held(region, spec, "aten:sdpa")):
            raise Decline("a mask of queries x keys, where row blocks hold none")
        return Match(spec, Schedule("aten:sdpa"), memory=memory.words(region, spec, "aten:sdpa"),
                     seconds=cost.predicted(region, spec, "aten:sdpa"))

    def form(self, region: Region) -> Spec:
        """The form whose low-rank terms are columns of query and key, where it holds less of
        queries x keys and is not slower, or where nothing else serves. In training it always is
        taken: fused attention has no gradient of a mask."""
        columns = region.inlined
        if columns is None or kernels.low_rank.widening(columns) is None \
                or self.reasons(region, columns):
            return region.spec
        if memory.held(region, columns, "aten:sdpa") >= memory.held(
                region, region.spec, "aten:sdpa"):
            return region.spec
        if memory.wanted(region) or cost.TAKE_ALL or region.training \
                or self.reasons(region, region.spec):
            return columns
        narrow, wide = (cost.problem_of(region, spec) for spec in (region.spec, columns))
        width = max(wide.query[-1], wide.value[-1])  # fused attention wants one of all three
        wide = replace(wide, query=(*wide.query[:-1], width), key=(*wide.key[:-1], width),
                       value=(*wide.value[:-1], width))
        seconds = [best.seconds for p in (narrow, wide)
                   if (best := kernels.estimates(p, ("aten:sdpa",)).best) is not None]
        faster = len(seconds) == 2 and seconds[1] <= seconds[0] + cost.construction(region)
        return columns if faster else region.spec

    def reasons(self, region: Region, spec: Spec) -> list[str]:
        """Why fused attention does not serve a form of the region."""
        head_dim, value_dim = region.lengths[-2:]
        made = kernels.low_rank.widening(spec)
        learned = region.training and region.operand_grad
        if made is not None:
            head_dim = made.width(head_dim, region.rank)
        return kernels.reasons(
            spec, "aten:sdpa", head_dims=(head_dim, value_dim), dtypes=region.dtypes,
            device=region.device, requires_grad=region.training, operand_grad=learned)
