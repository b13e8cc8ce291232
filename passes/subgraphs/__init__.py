"""Patterns that are no single attention: read as terms, matched by meaning, replaced, verified."""
