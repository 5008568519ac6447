"""What destinations were sent of an audience, and what the next synchronisation would send after a refresh.

No platform is reached: what they have is what the ledger says.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from audiences import sync
from audiences.definitions import Audience
from audiences.destinations.protocol import Purpose
from audiences.destinations.registry import Entry
from audiences.ledger import Copy, Ledger
from audiences.live import PAGE, Live
from audiences.sync import Counts
from audiences.wanted import Candidate
from service.core.errors import PropensityError
from service.core.segments import SEGMENTS

NOTHING: Final = Copy("", None, 0)


@dataclass(frozen=True)
class Chosen:
    """n members by a decision that is not written, with what the audience's model says of them."""

    ids: Sequence[str]
    propensity: npt.NDArray[np.float32] | None = None  # [n], NaN of whom the model knows nothing; none without a model
    segment: npt.NDArray[np.int8] | None = None  # [n] places in SEGMENTS; -1 of whom the model knows nothing


@dataclass(frozen=True)
class Sent:
    """What a destination has of an audience, and what it would be sent now; None with a problem that says why."""

    destination: str
    synced_ms: int | None  # when it was last in step, if ever
    has: int  # people that it may have
    next: Counts | None
    problem: str = ""


class Foreseen:
    """`Wanted` as it would be after a refresh: members and scores as decided, consents and contacts as kept."""

    def __init__(self, live: Live, audience: Audience, chosen: Chosen) -> None:
        self._live, self._audience, self._chosen = live, audience, chosen

    def audiences(self) -> Mapping[str, Sequence[str]]:
        """The one audience, and where it goes by its definition."""
        return {self._audience.name: self._audience.destinations}

    def minimum(self, audience: str) -> int:
        """`min_size` of the definition."""
        return self._audience.min_size or 1

    def candidates(
        self, audience: str, purpose: Purpose, forms: Sequence[str], fields: Sequence[str]
    ) -> Iterator[Candidate]:
        """The members, page by page."""
        purposes = {purpose, self._audience.purpose or purpose}
        for first in range(0, len(self._chosen.ids), PAGE):
            page = range(first, min(first + PAGE, len(self._chosen.ids)))
            values = [self._fields(place, fields) for place in page]
            yield from self._live.people([self._chosen.ids[place] for place in page], values, purposes)

    def _fields(self, place: int, fields: Sequence[str]) -> dict[str, str | float]:
        found: dict[str, str | float] = {}
        propensity, segment, model = self._chosen.propensity, self._chosen.segment, self._audience.model
        if model is not None and propensity is not None and not np.isnan(propensity[place]):
            found |= self._live.of_score(model, float(propensity[place]), fields)
        if segment is not None and "segment" in fields and segment[place] >= 0:
            found["segment"] = SEGMENTS[segment[place]]
        if model is not None and "model" in fields:
            found["model"] = model
        return found

    def erased(self, keys: Sequence[str]) -> Collection[str]:
        """Those of the keys whose visitors were erased within the retention."""
        return self._live.erased(keys)


def compare(
    ledger: Ledger, wanted: Foreseen, audience: str, entry: Callable[[str], Entry], progress: sync.Progress
) -> list[Sent]:
    """What each destination has of an audience and would be sent: those of its definition, then others that have any.

    `entry` gives a destination of this name as the file has it, and raises PropensityError where it does not.
    """
    copies = {one.destination: one for one in ledger.copies(audience)}
    named = wanted.audiences()[audience]
    left = [name for name, copy in copies.items() if copy.size and name not in named]
    return [
        _sent(ledger, wanted, audience, name, copies.get(name, NOTHING), entry, progress) for name in (*named, *left)
    ]


def _sent(
    ledger: Ledger,
    wanted: Foreseen,
    audience: str,
    name: str,
    copy: Copy,
    entry: Callable[[str], Entry],
    progress: sync.Progress,
) -> Sent:
    try:
        found = entry(name)
        options = sync.Options(dry_run=True)
        (counts,) = sync.run(ledger, found.build(), wanted, found.sending, audience, options, progress)
    except PropensityError as error:
        return Sent(name, copy.synced_ms, copy.size, None, str(error))
    return Sent(name, copy.synced_ms, copy.size, counts)
