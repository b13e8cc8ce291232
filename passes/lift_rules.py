"""The table of lifting rules: op name -> rule(lifter, node, arguments, indices) -> Expr."""

from __future__ import annotations

from collections.abc import Callable

from attnopt.ir.expr import Expr
from attnopt.passes.lift_values import VALUES, fold_pointwise
from attnopt.passes.lift_views import VIEWS

RULES: dict[str, Callable[..., Expr]] = {**VIEWS, **VALUES}
__all__ = ["RULES", "fold_pointwise"]
