"""How many visitors are on the site in the course of a load test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

# Share of the peak at a share of the duration, both 0 to 1.
SHAPES: Final[Mapping[str, Callable[[float], float]]] = {
    # The peak from the first second on: what does this load feel like?
    "steady": lambda _: 1.0,
    # From nobody to the peak, evenly: where does it begin to hurt?
    "ramp": lambda done: done,
    # A fifth of the peak, in the middle fifth of the time all of it: an e-mail went out; does it recover?
    "spike": lambda done: 1.0 if 0.4 <= done < 0.6 else 0.2,
    # Up within the first twentieth, then the peak for hours: does anything grow, leak or slow down?
    "soak": lambda done: min(done / 0.05, 1.0),
}


def users(shape: str, elapsed_s: float, duration_s: float, peak: int) -> int | None:
    """Visitors at a moment, at least one; None once the time is over."""
    if elapsed_s >= duration_s:
        return None
    return max(round(peak * SHAPES[shape](elapsed_s / duration_s)), 1)
