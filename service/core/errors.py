"""The base of every error that a person can mend."""

from __future__ import annotations


class PropensityError(Exception):
    """Says what is wrong and what to write instead; the edges print it without a traceback."""
