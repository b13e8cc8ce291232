"""Any other pointwise attention: row blocks, in place, nothing N x N held.

In training every block is composed once more for its gradient, which is slower than the author's
composition where no keys are skipped (0.8 of its speed, with a tenth of its memory at 1024 keys):
only `prefer="memory"` asks for that.
"""

from __future__ import annotations

from attnopt import kernels
from attnopt.ir.spec import Schedule
from attnopt.passes.rules import cost, memory
from attnopt.passes.rules.cost import local, pays
from attnopt.rules import Decline, Match, Region, Rule


class RowBlocks(Rule):
    name = "row-blocks"
    recognizes = "any pointwise logits and weights (softcap, sinks, sigmoid …) at inference"

    def match(self, region: Region) -> Match:
        if "aten" not in region.lowerings:
            raise Decline("backend leaves out aten")
        local(region)
        spec = (memory.in_blocks(region) if memory.wanted(region) else None) or region.spec
        smaller = memory.saves(region, spec, "aten:blocks")
        if region.authored == "sdpa" and not region.approximate and not smaller:
            raise Decline("the author's own fused call, nothing to add")
        if region.training and not smaller:
            raise Decline("in training the composition is what its gradient needs, unless memory "
                          "is preferred")
        reasons = kernels.reasons(spec, "aten:blocks", dtypes=region.dtypes)
        if reasons:
            raise Decline(reasons[0])
        pays(region)
        tile = memory.block_tile(region) if memory.wanted(region) else ()
        return Match(spec, Schedule("aten:blocks", tile),
                     memory=memory.words(region, spec, "aten:blocks"),
                     seconds=cost.predicted(region, spec, "aten:blocks"))
