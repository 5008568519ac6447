"""Histories to store and to find again."""

from __future__ import annotations

import numpy as np

from service.core import events

NOW_MS = 1_767_225_600_000


def some(count: int, first_ms: int = NOW_MS, seed: int = 0) -> bytes:
    """Events one millisecond apart, in order."""
    ids = np.random.default_rng(seed).integers(1, 2**32, count)
    return events.records(first_ms + np.arange(count), np.ones(count), ids, ids, np.ones(count)).tobytes()
