"""Any attention that one generated kernel computes, where the cost model says that it pays.

The kernel is printed from the Spec: logits, mask, normaliser and epilogues become statements inside
its loops, so that nothing of queries x keys is ever held. On a CPU it is C++. The rule comes first;
what it declines goes to the rules that compose from ATen.
"""

from __future__ import annotations

import math

from attnopt import kernels
from attnopt.cost.choose import Estimate
from attnopt.ir.spec import Schedule, Spec
from attnopt.passes.rules import cost, memory
from attnopt.rules import Decline, Match, Region, Rule


class Generated(Rule):
    name = "generated"
    recognizes = "any pointwise logits, mask, normaliser and epilogue, as one generated kernel"

    def match(self, region: Region) -> Match:
        lowering = "cpp" if region.device == "cpu" else "triton"
        if lowering not in region.lowerings:
            raise Decline(f"backend leaves out {lowering}")
        spec, best, seconds = self.form(region, lowering)
        problem = cost.problem_of(region)
        made = cost.construction(region)
        others = [(cost.original(region, problem) + made, memory.of_author(region))]
        if "aten" in region.lowerings and region.copies is None:
            other = kernels.estimates(problem, (kernels.aten_lowering(
                region.spec, region.dtypes[0], region.training),)).best
            if other is not None:
                others.append((other.seconds + made, memory.held(
                    region, region.spec, other.candidate.lowering)))
        own = memory.held(region, spec, lowering)
        rivals = [s for s, elements in others if elements <= own or not memory.wanted(region)]
        verdict = kernels.worth(min(rivals, default=math.inf), seconds)
        if not verdict.pays and not cost.TAKE_ALL and not region.approximate:
            raise Decline(verdict.text)
        tile = best.candidate.tile if region.fixed else ()
        # Of unknown lengths, the tile is chosen again at each call.
        return Match(spec, Schedule(best.candidate.lowering, tuple(tile)), others[0][0] / seconds,
                     memory.words(region, spec, lowering, (min(others)[0], seconds)), seconds)

    def form(self, region: Region, lowering: str) -> tuple[Spec, Estimate, float]:
        """The form of the Spec that the kernel computes, its best tile, and the seconds that it
        takes together with the making of what it carries."""
        found: list[tuple[Spec, Estimate, float]] = []
        reason = ""
        for spec in filter(None, (region.inlined, region.spec)):
            reasons = kernels.reasons(
                spec, lowering, head_dims=region.lengths[-2:], dtypes=region.dtypes,
                device=region.device, requires_grad=region.training,
                operand_grad=region.training and region.operand_grad)
            if reasons:
                reason = reasons[0]
                continue
            best = kernels.estimates(cost.problem_of(region, spec), (lowering,),
                                     not region.fixed).best
            if best is not None:
                made = 0.0 if spec is region.inlined else cost.construction(region)
                found.append((spec, best, cost.rows(region) * best.seconds + made))
        if not found:
            raise Decline(reason or "no tile fits")
        if memory.wanted(region):
            return min(found, key=lambda form: (memory.held(region, form[0], lowering), form[2]))
        return found[0] if cost.TAKE_ALL else min(found, key=lambda form: form[2])
