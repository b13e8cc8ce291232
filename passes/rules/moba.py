"""Mixture of Block Attention (arXiv 2502.13189), its selection applied to a dense causal model.

Keys are cut into blocks. A query keeps its own block and, of the blocks before it, those of largest
q . mean(keys of the block), `top` blocks in all, chosen anew at every call for each head. Not
exact: MoBA's models are trained with it.
"""

from __future__ import annotations

import json

from attnopt.ir.mask import BlockMap, Mask
from attnopt.ir.spec import leading_axes
from attnopt.passes.rules.reductions import causal, whole
from attnopt.rules import Approximation, BlockTable, Region

_SLOT = "moba_blocks"


class MoBA(Approximation):
    """Of the blocks of `block` keys, each query keeps `top`, its own block among them."""

    name = "moba"
    recognizes = "causal self-attention, by request: the best blocks of keys"

    def __init__(self, block: int, top: int, path: str = "*") -> None:
        self.block, self.top, self.path = whole("block", block), whole("top", top), path

    def reduce(self, region: Region) -> tuple[Mask, dict[str, BlockTable]]:
        causal(region)
        text = json.dumps({"pattern": "moba", "block": self.block, "top": self.top})
        lead = leading_axes(len(region.lengths) - 4)
        return BlockMap(_SLOT, 1, self.block, lead), {_SLOT: BlockTable(text, reads=True)}
