"""The table of movement rules: op name -> rule(mover, node, arguments, index, where) -> pieces."""

from __future__ import annotations

from attnopt.passes.analyze.movement_pieces import PIECES
from attnopt.passes.analyze.movement_views import VIEWS, Rule

RULES: dict[str, Rule] = {**VIEWS, **PIECES}
