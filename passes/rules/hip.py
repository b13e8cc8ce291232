"""HiP attention (arXiv 2406.09827), its tree search applied to a dense causal model.

For each block of queries the keys before it are cut into groups of blocks. Step by step each group
falls into two halves, and of all halves those stay whose first block of keys has the largest scores
with every second query; what is left are `keep` keys in blocks of `block`. A window of nearest keys
is kept besides. Chosen anew at every call for each head. Not exact.
"""

from __future__ import annotations

import json

from attnopt.ir import expr as E
from attnopt.ir.mask import Band, BlockMap, Mask
from attnopt.ir.spec import leading_axes
from attnopt.passes.rules.reductions import causal, whole
from attnopt.rules import Approximation, BlockTable, Region

_SLOT = "hip_blocks"


class HiP(Approximation):
    """Blocks of `block_q` queries keep `keep` keys in blocks of `block`, and `window` nearest ones.
    """

    name = "hip"
    recognizes = "causal self-attention, by request: keys found by a tree search"

    def __init__(self, keep: int = 512, block_q: int = 32, block: int = 2, window: int = 128,
                 path: str = "*") -> None:
        self.keep, self.window, self.path = whole("keep", keep), whole("window", window), path
        self.block_q, self.block = whole("block_q", block_q), whole("block", block)

    def reduce(self, region: Region) -> tuple[Mask, dict[str, BlockTable]]:
        causal(region)
        text = json.dumps({"pattern": "hip", "block_q": self.block_q, "block": self.block,
                           "keep": self.keep, "window": self.window})
        lead = leading_axes(len(region.lengths) - 4)
        chosen = BlockMap(_SLOT, self.block_q, self.block, lead)
        near = Band(E.const(1 - self.window), E.const(0))
        return chosen | near, {_SLOT: BlockTable(text, reads=True)}
