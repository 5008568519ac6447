"""Cells of CSV, as a spreadsheet opens them. What stands in them comes from outside."""

from __future__ import annotations

from typing import Final

# What a spreadsheet takes for a formula if a cell begins with it (OWASP, CSV injection).
_FORMULA: Final = ("=", "+", "-", "@", "\t", "\r")


def cell(text: str) -> str:
    """The text, with an apostrophe before it where a spreadsheet would take it for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text
