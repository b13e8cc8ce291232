"""Report: what was found, what became of it and why, as text, HTML and JSON."""

from attnopt.report.codec import SCHEMA_VERSION, schema
from attnopt.report.report import Report

__all__ = ["SCHEMA_VERSION", "Report", "schema"]
