"""Approximations that a user may ask for: fewer keys than the model was given, or a simpler bias.

    attnopt.optimize(model, args, rules=[SinkWindow(window=1024)])
    attnopt.optimize(model, args, rules=[Radial(frames=30, tokens=3840, path="blocks.*")],
                     approximate={"output": 0.1})
    attnopt.optimize(model, args, rules=[LowRank(error=0.01)], freeze=True)

They are never used by themselves. An instance among the `rules` is for the sites whose module path
fits its `path` and that it can serve; every other site is optimised exactly, as without it. The
report says where one was used and what it changed on the example; `approximate={"output": bound}`
keeps a site as it was where that exceeds the bound.
"""

from attnopt.passes.rules.hip import HiP
from attnopt.passes.rules.low_rank import LowRank
from attnopt.passes.rules.moba import MoBA
from attnopt.passes.rules.radial import Radial
from attnopt.passes.rules.sink_window import SinkWindow

__all__ = ["HiP", "LowRank", "MoBA", "Radial", "SinkWindow"]
