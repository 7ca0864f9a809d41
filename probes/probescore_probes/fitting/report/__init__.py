"""The report on a fitted probe: one HTML page that needs nothing else, and every number of it as JSON beside it."""

from __future__ import annotations

from probescore_probes.fitting.report.writing import check_writable, write_report

__all__ = ["check_writable", "write_report"]
