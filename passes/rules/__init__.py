"""The rewrite rules that come with attnopt, in the order in which they are tried."""

from attnopt.passes.rules.blocks import RowBlocks
from attnopt.passes.rules.deformable import Deformable
from attnopt.passes.rules.generated import Generated
from attnopt.passes.rules.sdpa import FusedSoftmax
from attnopt.rules import REGISTRY

#: in the order in which they are tried
BUILT_IN = (Generated(), FusedSoftmax(), RowBlocks(), Deformable())
for _rule in BUILT_IN:
    REGISTRY.add(_rule)

__all__ = ["BUILT_IN", "REGISTRY"]
