"""The circuit breaker: after failures in a row nobody asks any more, until a trial succeeds.

Pure: it is told what happened, and asks nothing of clock or network.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum


class State(StrEnum):
    """Closed: all ask. Open: nobody does. Half open: one trial is under way."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Counts failures in a row; `changed` is called with every new state, the first one too."""

    def __init__(self, failures: int, changed: Callable[[State], None] = lambda _: None) -> None:
        self._most, self._failures, self._changed = failures, 0, changed
        self.state = State.CLOSED
        changed(self.state)

    @property
    def is_closed(self) -> bool:
        """Whether anybody may ask."""
        return self.state is State.CLOSED

    def failed(self) -> None:
        """A question was not answered, or not in time."""
        self._failures += 1
        if self.state is State.HALF_OPEN or self._failures >= self._most:
            self._become(State.OPEN)

    def succeeded(self) -> None:
        """A question was answered; while open only the trial's answer counts, not one that comes late."""
        if self.state is not State.OPEN:
            self._failures = 0
            self._become(State.CLOSED)

    def try_again(self) -> None:
        """Begin a trial."""
        self._become(State.HALF_OPEN)

    def _become(self, state: State) -> None:
        if state is not self.state:
            self.state = state
            self._changed(state)
