"""Renders the report on a fitted probe: one self-contained HTML page, and a JSON file with every number of the page."""

from __future__ import annotations

from probescore_probes.fitting.report.writing import check_writable, write_report

__all__ = ["check_writable", "write_report"]
