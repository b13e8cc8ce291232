"""Fixtures of the tests of attnopt/."""

from tests.attnopt.small_models import as_captured

__all__ = ["as_captured"]
