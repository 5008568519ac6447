"""What the synchronisation asks of a destination, and what it is told.

A destination is told differences in batches and holds the resulting list. It remembers nothing, waits for nothing and
retries nothing: the ledger, the limits of its rate and the retries are the synchronisation's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final, NamedTuple, Protocol

from service.core.errors import PropensityError

KEY: Final = "key"  # the form of a person's key, for destinations of one's own that know people by it; everybody has it


class Purpose(StrEnum):
    """What a person agreed to, or did not."""

    ADS = "ads"
    EMAIL = "email"
    CRM = "crm"
    ANALYTICS = "analytics"


class Limits(NamedTuple):
    """What a platform documents: members a request, and requests in any so many seconds."""

    members: int
    requests: int
    seconds: float


@dataclass(frozen=True)
class Person:
    """A member as a destination gets to know it. There is no address and no number in the clear."""

    key: str  # 64 hex digits of SHA-256 of the visitor's id: what the ledger knows a person by
    identifiers: Mapping[str, tuple[str, ...]]  # by form, as `google.email`, `meta.phone`, `external_id`; sorted
    fields: Mapping[str, str | float] = field(default_factory=dict)  # propensity, percentile, segment, ...


class Outcome(NamedTuple):
    """What a platform said of one member of a batch.

    Accepted and not `final`: the platform works the batch off, and `Reviews` tells the end; all of a batch who are
    accepted have the same answer then, which names the job. Refused and not `final`: the same may be accepted later.
    """

    accepted: bool
    answer: str  # its words, shortened; an id of its request where it gives one
    final: bool = True


class Destination(Protocol):
    """A platform. Methods block, and raise one of the errors below; anything else that is raised is a bug.

    `add` and `remove` are idempotent: the same member added twice is a member once. Their outcomes are in the order of
    the people. A batch whose answer never came may have been taken or not, and is sent again.

    `batch` names a batch: it is the same when a batch is tried again within a synchronisation and never used for
    another, so that it can be the key of idempotency where a platform knows one. After a kill, members of unknown
    outcome come in a new batch, since meanwhile they may have changed, or withdrawn their consent.
    """

    name: str
    purpose: Purpose
    limits: Limits
    forms: tuple[str, ...]  # identifiers that it understands, or KEY; who has none of them cannot be sent
    fields: tuple[str, ...]  # of a person that it keeps; a change of one is sent, of others not

    def open(self, audience: str) -> str:
        """The platform's id of the list of an audience, which is made where it is missing."""

    def add(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """Make people members, and give them their fields."""

    def remove(self, list_id: str, people: Sequence[Person], batch: str) -> Sequence[Outcome]:
        """End memberships; of who is none is no error.

        People come with the identifiers that were sent, without their fields. Of who stays a member with other
        identifiers than before, only those that are no more are removed, and the person is added right after.
        """


class Snapshots(Protocol):
    """What a destination is as well that holds a whole list in one piece, as a file."""

    def write(self, list_id: str, people: Iterable[Person]) -> None:
        """Put the list in the place of the one before, all at once; called after batches that changed something."""


class Reviews(Protocol):
    """What a destination is as well whose platform takes batches and works them off later."""

    def review(self, answers: Sequence[str]) -> Sequence[Outcome | None]:
        """The end of batches that were answered so, in their order; None where it has not come.

        Accepted and not `final`: all but some, who would not be taken again either, and of whom nobody is named.
        """


class Unordered(Protocol):
    """What a `Reviews` is as well whose platform works off batches in any order, so that one may undo a later one.

    The synchronisation sends the later one again then. `late_ms` is how long after it was sent a batch may be worked
    off of which no answer came.
    """

    late_ms: int


class Forgets(Protocol):
    """What a destination is as well whose platform drops members some time after they were sent last."""

    keeps_ms: int


class Checks(Protocol):
    """What a destination is as well that can be asked whether it lets us in, without sending anybody."""

    def check(self) -> str:
        """What answered, in a few words. Raises as a request does, and the words of the platform are the error's."""


class DestinationError(PropensityError):
    """A request that a platform did not carry out."""


class Busy(DestinationError):
    """Try again, after so many seconds where the platform says so: 429, 5xx, no answer in time."""

    def __init__(self, message: str, after_s: float | None = None) -> None:
        super().__init__(message)
        self.after_s = after_s


class Rejected(DestinationError):
    """Nobody of the batch was taken, and trying again does not help: credentials, permissions, a list that is gone."""
