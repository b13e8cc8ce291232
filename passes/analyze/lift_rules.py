"""The table of lifting rules: op name -> rule(lifter, node, arguments, indices) -> Expr."""

from __future__ import annotations

from collections.abc import Callable

from attnopt.ir.expr import Expr
from attnopt.passes.analyze.lift_arithmetic import ARITHMETIC
from attnopt.passes.analyze.lift_gathers import GATHERS
from attnopt.passes.analyze.lift_types import fold_pointwise
from attnopt.passes.analyze.lift_values import VALUES
from attnopt.passes.analyze.lift_views import VIEWS

RULES: dict[str, Callable[..., Expr]] = {**VIEWS, **GATHERS, **VALUES, **ARITHMETIC}
__all__ = ["RULES", "fold_pointwise"]
