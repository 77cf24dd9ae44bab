"""One HTML report builder and one plot style for all studies."""

from analysis.report.html import Report

__all__ = ["Report"]
