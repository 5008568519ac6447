"""This service with nothing of a score counted, timed or compared: what its metrics cost, seen from the other side.

Not a setting, since nobody should serve like that. Calls stay, but go nowhere.
"""

from __future__ import annotations

from prometheus_client import Counter

from service import metrics, population
from service.app import serve
from service.settings import load


class Nowhere(metrics.Held):
    """Takes numbers and keeps none."""

    def __init__(self, metric: Counter | metrics.Histogram) -> None:
        super().__init__(metric)
        self.add = lambda number: None


def be_quiet() -> None:
    """Count nothing from now on; before anything is counted."""
    metrics.Held = Nowhere  # type: ignore[misc]
    population.Population.add = lambda self, rows: None  # type: ignore[method-assign]


if __name__ == "__main__":
    be_quiet()
    serve(load())
