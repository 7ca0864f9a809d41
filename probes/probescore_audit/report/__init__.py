"""Renders the audit of a training run: one self-contained HTML page, and JSON values with every number of the page."""

from __future__ import annotations

from probescore_audit.report.numbers import numbers_of
from probescore_audit.report.page import report_page

__all__ = ["numbers_of", "report_page"]
