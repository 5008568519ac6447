"""The training report: one self-contained HTML page about one model, for people who decide whether to serve it."""

from training.report.data import Importance, ReportData, Scored, Span
from training.report.page import render

__all__ = ["Importance", "ReportData", "Scored", "Span", "render"]
