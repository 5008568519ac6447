"""How fast this process scores, and what follows: how many go together, and how many can be answered in time. Pure."""

from __future__ import annotations

from typing import Final

# Most visitors that are read and scored in one go, and how long that may take. Between two goes others have their turn.
GROUP: Final = 100
GROUP_S: Final = 0.003
# What a visitor of a small model costs; a costlier one is known after a few groups.
_FIRST_COST_S: Final = 20e-6
# Of a group that is smaller than this and could have been larger, most of the time is what every group costs; so a
# visitor of it costs less than it seems, which is news only where more was believed.
_TELLING: Final = 8
# How much of a lower cost is believed at once, and by how much the cost grows at most, since a machine may be held up.
_EASE: Final = 0.2
_GROWTH: Final = 1.5
# The share of its time that a request may stand in the queue; the rest is for the feature cache and the way.
_QUEUE_SHARE: Final = 0.5


class Pace:
    """Learns from each group what a visitor costs."""

    def __init__(self) -> None:
        self.cost_s = _FIRST_COST_S

    @property
    def group(self) -> int:
        """How many visitors to score in one go."""
        return min(max(int(GROUP_S / self.cost_s), 1), GROUP)

    def learn(self, visitors: int, seconds: float) -> None:
        """Note how long a group took to be scored and delivered."""
        found = seconds / visitors
        if visitors >= min(_TELLING, self.group) or found < self.cost_s:
            eased = self.cost_s + _EASE * (found - self.cost_s)
            self.cost_s = eased if found < self.cost_s else min(found, _GROWTH * self.cost_s)

    def is_in_time(self, waiting: int, allowed_s: float) -> bool:
        """Whether one who has so much time can be answered in it, behind so many others."""
        return waiting * self.cost_s <= _QUEUE_SHARE * allowed_s
