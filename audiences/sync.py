"""Synchronisation: bring the lists of one destination in step with who should be on them.

For each list everybody who is wanted is staged, compared with the ledger, and the difference sent in batches: removals
first, so that a withdrawal waits for nothing. Whatever kills a run, the next one ends the same.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final, NamedTuple, TypeVar

import stamina
from pyrate_limiter import InMemoryBucket, Limiter, MonotonicClock, Rate, RateItem

from audiences import identifiers, leases, plan
from audiences import ledger as ledgers
from audiences.destinations.protocol import KEY, Busy, Destination, Outcome, Person, Rejected
from audiences.destinations.registry import Sending
from audiences.identifiers import Identifiers
from audiences.leases import Held, Lease
from audiences.ledger import ADD, REMOVE, Batch, Intent, Ledger, List, Undone, Working
from audiences.stage import Stage
from audiences.wanted import Wanted
from service.core.errors import PropensityError

KEPT: Final = "kept, since another member has it"
RETENTION_MS: Final = 90 * ledgers.DAY_MS
LOST_MS: Final = 7 * ledgers.DAY_MS  # without a word of its end a batch counts as failed; Google takes a day at most
RENEWED_SHARE: Final = 10  # one in so many members is renewed by a run, unless it is late

Answer = TypeVar("Answer")
Item = TypeVar("Item")
Progress = Callable[[str, float], None]


class NothingDefined(PropensityError):
    """No audience is defined while the ledger has lists, which would all be emptied."""


@dataclass
class Counts:
    """What a run did with one list, or would do; `why` has a number for each operation and cause."""

    audience: str
    wanted: int = 0  # who agreed and can be named
    without_consent: int = 0
    below: int = 0  # the audience's minimum, where fewer are wanted and its list is empty therefore
    unchanged: int = 0
    refused_before: int = 0  # and unchanged since, so not sent again before they are due
    refused: int = 0  # now
    failed: int = 0  # who were sent by a run before in batches that the platform took and failed to work off
    working: int = 0  # who are in batches that the platform works off
    not_removed: int = 0  # since the platform refused; tried again by the next run
    batches: int = 0
    why: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)  # what an operator should know

    @property
    def complete(self) -> bool:
        """Whether the destination has what it should."""
        return not (self.refused or self.refused_before or self.not_removed)

    def causes(self, operation: str) -> dict[str, int]:
        """How many members an operation was sent of, by cause."""
        mark = f"{operation}: "
        return {why.removeprefix(mark): number for why, number in sorted(self.why.items()) if why.startswith(mark)}

    @property
    def added(self) -> int:
        """Members that were sent, for the first time or since something changed."""
        return sum(self.causes(ADD).values())

    @property
    def entering(self) -> int:
        """Of them, those who were not sent before."""
        return self.causes(ADD).get(plan.ENTERED, 0)

    @property
    def removed(self) -> int:
        """Members whose removal was sent."""
        return sum(self.causes(REMOVE).values())

    @property
    def all_refused(self) -> int:
        """Members whom the destination does not take, or does not remove."""
        return self.refused + self.refused_before + self.not_removed

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {**vars(self), "added": self.added, "removed": self.removed, "why": dict(sorted(self.why.items()))}


class Clock(NamedTuple):
    """Where the time comes from."""

    now_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True)
class Options:
    """How a run is made."""

    dry_run: bool = False
    wait_s: float = 0  # for another run to end
    lease_ms: int = 120_000  # longer than the timeout of a request
    retention_ms: int = RETENTION_MS
    remove_all: bool = False  # although no audience is defined


def run(
    ledger: Ledger,
    destination: Destination,
    wanted: Wanted,
    sending: Sending,
    audience: str | None = None,
    options: Options = Options(),  # noqa: B008 - frozen
    progress: Progress = lambda stage, share: None,
    clock: Clock = Clock(),  # noqa: B008 - a tuple
) -> list[Counts]:
    """Bring one list in step, or with no audience named all of them, those without a definition too.

    Raises Held where another run is at the same destination, and what the destination raises: Busy where it did not
    answer for so long, Rejected where it refuses everything. Run again, it goes on where it was.
    """
    names = _names(ledger, destination, wanted, audience, options.remove_all)
    if options.dry_run:
        dry = _Dry(ledger, destination, wanted, names.defined, progress, clock)
        return [dry.list(Counts(name)) for name in names.all]
    holder = leases.holder()
    _take(ledger, destination.name, holder, options, clock)
    number = ledger.begin(destination.name, audience, holder, clock.now_ms())
    result = "cut off"
    try:
        with (
            _Sender(ledger, destination, sending, options, holder, number, clock) as sender,
            _kept(ledger, sender.lease, clock),
        ):
            begun = _Run(ledger, destination, wanted, names.defined, progress, clock, sender)
            done = [begun.list(one) for one in begun.reviewed(names.all)]
        ledger.compact(clock.now_ms() - options.retention_ms)
        result = ", ".join(f"{sum(one.why.values())} of {one.audience} sent" for one in done)
        return done
    except Exception as error:
        result = str(error) or type(error).__name__
        raise
    finally:
        ledger.end(number, result[:1000], clock.now_ms())
        ledger.leases.give_back(destination.name, holder)


class _Names(NamedTuple):
    """Audiences whose lists are looked at, and those of them that should have any members there."""

    all: Sequence[str]
    defined: set[str]


def _names(ledger: Ledger, destination: Destination, wanted: Wanted, audience: str | None, remove_all: bool) -> _Names:
    """Lists that should be no more come first, since they are only emptied."""
    existing = wanted.audiences()
    defined = {name for name, names in existing.items() if destination.name in names}
    known = {one.audience for one in ledger.lists(destination.name)}
    if audience is not None and audience not in defined | known:
        raise PropensityError(_missing(audience, destination.name, existing))
    if not existing and known and not remove_all:
        raise NothingDefined(
            "no audience is defined in this feature cache, and everybody would be removed from the lists of "
            f"{', '.join(sorted(known))}; see that PROPENSITY_REDIS_URL is right, or say --remove-all"
        )
    if audience is not None:
        defined, known = defined & {audience}, known & {audience}
    return _Names([*sorted(known - defined), *sorted(defined)], defined)


def _missing(audience: str, destination: str, existing: Mapping[str, Sequence[str]]) -> str:
    if audience in existing:
        return (
            f"the audience {audience} does not go to {destination}; write destinations: [{destination}] "
            "into its definition and run propensity audiences refresh"
        )
    return (
        f"no audience {audience!r}; there is {', '.join(sorted(existing)) or 'none'}. See propensity audiences refresh"
    )


def _take(ledger: Ledger, name: str, holder: str, options: Options, clock: Clock) -> None:
    end_ms = clock.now_ms() + options.wait_s * 1000
    while (other := ledger.leases.take(name, holder, clock.now_ms(), options.lease_ms)) is not None:
        if clock.now_ms() >= end_ms:
            raise Held(
                f"{leases.described(other)} is synchronising {name}; wait for it with --wait 600, "
                f"or, where it was killed, {options.lease_ms // 1000} seconds"
            )
        clock.sleep(0.5)


@contextmanager
def _kept(ledger: Ledger, lease: Lease, clock: Clock) -> Iterator[None]:
    """Hold the lease in the background, while a limit or a busy platform is waited for."""
    over = threading.Event()

    def keep() -> None:
        while not over.wait(lease.lease_ms / 3000):
            with suppress(Exception):  # the run itself asks for it before and after each request
                ledger.leases.keep(lease, clock.now_ms())

    thread = threading.Thread(target=keep, name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


# --- one list ---


@dataclass
class _Either:
    """What a run and a dry run have in common: staging, and both readings side by side."""

    ledger: Ledger
    destination: Destination
    wanted: Wanted
    defined: set[str]
    progress: Progress
    clock: Clock

    def list(self, counts: Counts) -> Counts:
        audience = counts.audience
        self.progress(f"Reading {audience}", 0)
        with Stage() as stage:
            why = self._fill(stage, audience, counts)
            self._act(stage, audience, why, counts)
        counts.working = sum(batch.members for _, batch in self._working([audience]))
        return counts

    def _working(self, audiences: Sequence[str]) -> Sequence[tuple[List, Working]]:
        """Batches that the platform took and works off, as far as it was asked."""
        own = [one for one in self.ledger.lists(self.destination.name) if one.audience in audiences]
        return [(one, batch) for one in own for batch in self.ledger.working(one)]

    def _steps(self, own: List | None, stage: Stage, why: str) -> Iterator[plan.Step]:
        known = self.ledger.known(own) if own else iter(())
        keeps_ms: int | None = getattr(self.destination, "keeps_ms", None)
        most = max(self.destination.limits.members, stage.allowed // RENEWED_SHARE)
        return plan.steps(known, stage.members_in_order(), why, plan.Age(self.clock.now_ms(), keeps_ms, most))

    def _fill(self, stage: Stage, audience: str, counts: Counts) -> str:
        """Stage who is wanted; why those who are not have to go."""
        if audience not in self.defined:
            return plan.DELETED
        own = self.destination
        stage.fill(self.wanted.candidates(audience, own.purpose, own.forms, own.fields), own.forms, own.fields)
        counts.wanted = stage.allowed
        counts.without_consent = stage.refusing
        if stage.allowed < self.wanted.minimum(audience):
            counts.below = self.wanted.minimum(audience)
            stage.clear()
            return plan.MINIMUM
        return plan.LEFT

    def _act(self, stage: Stage, audience: str, why: str, counts: Counts) -> None:
        raise NotImplementedError


class _Dry(_Either):
    """Counts what would be done."""

    def _act(self, stage: Stage, audience: str, why: str, counts: Counts) -> None:
        own = next((one for one in self.ledger.lists(self.destination.name) if one.audience == audience), None)
        for step in self._steps(own, stage, why):
            _count(step, counts)
            if isinstance(step, plan.Addition):
                counts.why[f"{ADD}: {step.why}"] += 1
            elif isinstance(step, plan.Removal) and not step.stays:
                counts.why[f"{REMOVE}: {step.why}"] += 1


@dataclass
class _Run(_Either):
    """Does it."""

    sender: _Sender

    def reviewed(self, audiences: Sequence[str]) -> Sequence[Counts]:
        """What became, since, of batches that runs before have sent; those that failed are undone in the ledger."""
        counts = {audience: Counts(audience) for audience in audiences}
        review = getattr(self.destination, "review", None)
        working = self._working(audiences) if review else ()
        if not review or not working:
            return list(counts.values())
        answers = [batch.answer for _, batch in working]
        outcomes: Sequence[Outcome | None] = self.sender.tried(lambda: review(answers))
        now_ms = self.clock.now_ms()
        for (own, batch), told in zip(working, outcomes, strict=True):
            outcome = self._end(own, batch, told, now_ms)
            if outcome is not None:
                undone = self.ledger.conclude(own, batch, outcome, self.sender.lease, now_ms)
                _tell(counts[own.audience], batch, outcome, undone)
        return list(counts.values())

    def _end(self, own: List, batch: Working, told: Outcome | None, now_ms: int) -> Outcome | None:
        """What became of a batch of which a platform told this; None where that is not known yet."""
        if told is None:
            is_lost = now_ms - batch.settled_ms > LOST_MS
            return Outcome(False, f"{batch.answer}, and no end of it for a week") if is_lost else None
        late_ms: int | None = getattr(self.destination, "late_ms", None)
        until_ms = self.ledger.undone_until(own, batch, late_ms) if told.accepted and late_ms else None
        if until_ms is None:
            return told
        is_over = now_ms >= until_ms
        return Outcome(False, f"{told.answer}, and one that was under way may have undone it") if is_over else None

    def _act(self, stage: Stage, audience: str, why: str, counts: Counts) -> None:
        own = self.ledger.list_of(self.destination.name, audience)
        total = max(1, stage.allowed)
        self.progress(f"Removing from {audience}", 0)
        self._remove(own, stage, why, counts)
        done = 0
        for batch in _chunks(self._additions(own, stage, why, counts), self.destination.limits.members):
            if own.list_id is None:
                own = self.ledger.opened(own, self.sender.open(audience))
            self._add(own, batch, counts)
            done += len(batch)
            self.progress(f"Adding to {audience}", done / total)
        self._snapshot(own, audience, stage)
        self.ledger.in_step(own, self.sender.clock.now_ms(), snapshot=False)

    def _remove(self, own: List, stage: Stage, why: str, counts: Counts) -> None:
        traces: list[bytes] = []

        def removals() -> Iterator[plan.Removal]:
            for step in self._steps(own, stage, why):
                if isinstance(step, plan.Removal):
                    yield step
                elif isinstance(step, plan.Trace):
                    traces.append(step.known.key)
                    if len(traces) >= self.destination.limits.members:
                        self._forget(own, traces)
                        traces.clear()

        for batch in _chunks(removals(), self.destination.limits.members):
            erased = self._erased([one.known.key for one in batch if not one.stays])
            told = [one._replace(why=ledgers.ERASED) if one.known.key in erased else one for one in batch]
            self._remove_batch(own, stage, told, counts)
        self._forget(own, traces)

    def _forget(self, own: List, traces: Sequence[bytes]) -> None:
        self.ledger.forget(own, traces, list(self._erased(traces)))

    def _erased(self, keys: Sequence[bytes]) -> set[bytes]:
        """Those of the keys whose visitors were erased; nothing is kept of them, wherever they were."""
        return set(map(bytes.fromhex, self.wanted.erased([key.hex() for key in keys]))) if keys else set()

    def _remove_batch(self, own: List, stage: Stage, batch: Sequence[plan.Removal], counts: Counts) -> None:
        held = stage.held(one.identifiers for one in batch)
        sent: list[Intent] = []
        kept: list[Intent] = []
        for one in batch:
            free = _free(one.identifiers, held)
            after = identifiers.without(one.known.identifiers, one.identifiers) if one.stays else None
            (sent if free else kept).append(Intent(one.known, one.why, b"", free, after))
        if kept:
            self.sender.note(own, kept, KEPT)
        outcomes = self.sender.send(own, REMOVE, [_removed(one) for one in sent], sent) if sent else []
        counts.batches += bool(sent)
        for intent, outcome in [*zip(sent, outcomes, strict=True), *((one, Outcome(True, KEPT)) for one in kept)]:
            counts.not_removed += not outcome.accepted
            if intent.after is None:
                counts.why[f"{REMOVE}: {intent.why}"] += 1

    def _additions(self, own: List, stage: Stage, why: str, counts: Counts) -> Iterator[plan.Addition]:
        for step in self._steps(own, stage, why):
            _count(step, counts)
            if isinstance(step, plan.Addition):
                yield step

    def _add(self, own: List, batch: Sequence[plan.Addition], counts: Counts) -> None:
        intents = [
            Intent(one.known, one.why, one.mark, one.person.identifiers, _after(one.known.identifiers, one.person))
            for one in batch
        ]
        outcomes = self.sender.send(own, ADD, [one.person for one in batch], intents)
        counts.batches += 1
        counts.refused += sum(not one.accepted for one in outcomes)
        counts.why.update(f"{ADD}: {one.why}" for one in batch)

    def _snapshot(self, own: List, audience: str, stage: Stage) -> None:
        write = getattr(self.destination, "write", None)
        if write is None or not self.ledger.is_stale(own):
            return
        if own.list_id is None:
            own = self.ledger.opened(own, self.sender.open(audience))
        list_id = own.list_id
        self.sender.tried(lambda: write(list_id, plan.taken(self.ledger.known(own), stage.members_in_order())))
        self.ledger.in_step(own, self.sender.clock.now_ms(), snapshot=True)


def _tell(counts: Counts, batch: Working, outcome: Outcome, undone: Undone) -> None:
    if outcome.accepted:
        if not outcome.final:
            counts.notes.append(f"{outcome.answer}: of {batch.members:,} some were not taken, and whom is not told")
        return
    counts.failed += batch.members
    said = (
        f"{outcome.answer}: {batch.members:,} were {'not added' if batch.operation == ADD else 'not removed'} after all"
    )
    parts = [
        (undone.members - undone.later, "are sent again"),
        (undone.later, "failed again and wait for some days"),
        (undone.given_up, "failed too often and wait until something about them changes"),
    ]
    counts.notes.append("; ".join([said, *(f"{number:,} {words}" for number, words in parts if number)]))


def _count(step: plan.Step, counts: Counts) -> None:
    if isinstance(step, plan.Unsent):
        counts.refused_before += step.refused
        counts.unchanged += not step.refused


def _removed(intent: Intent) -> Person:
    return Person(intent.known.key.hex(), intent.sent)


def _free(identifiers: Identifiers, held: set[tuple[str, str]]) -> Identifiers:
    """Identifiers that no other member has."""
    left = {form: tuple(one for one in values if (form, one) not in held) for form, values in identifiers.items()}
    return {form: values for form, values in left.items() if values}


def _after(before: Identifiers, person: Person) -> Identifiers:
    """What a platform may have of somebody who was added: what knows people by key forgets what they had before."""
    return person.identifiers if KEY in person.identifiers else identifiers.joined(before, person.identifiers)


def _chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk


# --- one request ---


class _Sender:
    """Sends batches: written ahead, within the rate, tried again while the platform is busy."""

    def __init__(
        self,
        ledger: Ledger,
        destination: Destination,
        sending: Sending,
        options: Options,
        holder: str,
        run: int,
        clock: Clock,
    ) -> None:
        self.ledger, self.destination, self.sending, self.run, self.clock = ledger, destination, sending, run, clock
        self.lease = Lease(destination.name, holder, options.lease_ms)
        self.unanswered = 0  # attempts of this request
        self.limiter = self._limiter()

    def __enter__(self) -> _Sender:
        return self

    def __exit__(self, *_: object) -> None:
        self.limiter.close()

    def _limiter(self) -> Limiter:
        """A limiter that knows of the requests of a run before this one, which may have been killed a second ago."""
        members, requests, seconds = self.destination.limits
        bucket = InMemoryBucket([Rate(requests, round(seconds * 1000))])
        now_ms, now = self.clock.now_ms(), MonotonicClock().now()
        for moment_ms in self.ledger.attempts_since(self.destination.name, round(now_ms - seconds * 1000))[-requests:]:
            bucket.put(RateItem(self.destination.name, now - (now_ms - moment_ms)))
        return Limiter(bucket)

    def open(self, audience: str) -> str:
        """The platform's id of an audience's list."""
        return self.tried(lambda: self.destination.open(audience))

    def note(self, own: List, intents: Sequence[Intent], answer: str) -> None:
        """Settle what needs no request."""
        batch = self.ledger.intend(own, self.run, REMOVE, intents, self.lease, self.clock.now_ms())
        self.ledger.settle(batch, [Outcome(True, answer)] * len(intents), self.lease, self.clock.now_ms())

    def send(self, own: List, operation: str, people: Sequence[Person], intents: Sequence[Intent]) -> Sequence[Outcome]:
        """Add or remove people, and write down what came of it."""
        batch = self.ledger.intend(own, self.run, operation, intents, self.lease, self.clock.now_ms())
        list_id = own.list_id or ""
        method = self.destination.add if operation == ADD else self.destination.remove
        try:
            outcomes = self.tried(
                lambda: method(list_id, people, batch.name),
                lambda: self.ledger.attempt(batch, self.lease, self.clock.now_ms()),
            )
        except Rejected as error:
            self._rejected(batch, error)
            raise
        if len(outcomes) != len(people):
            raise RuntimeError(f"{self.destination.name} told {len(outcomes)} outcomes of {len(people)} people")
        self.ledger.settle(batch, outcomes, self.lease, self.clock.now_ms())
        return outcomes

    def _rejected(self, batch: Batch, error: Rejected) -> None:
        # An attempt before may have been taken although its answer never came: then nothing is known after all.
        if not self.unanswered:
            self.ledger.reject(batch, str(error), self.lease, self.clock.now_ms())

    def tried(self, request: Callable[[], Answer], before: Callable[[], None] = lambda: None) -> Answer:
        """Make a request until it is answered or patience ends; `before` is called ahead of every attempt."""
        self.unanswered = 0
        given = self.sending
        attempts = stamina.retry_context(
            on=self._pause,
            attempts=None,
            timeout=given.patience_s,
            wait_initial=given.first_wait_s,
            wait_max=given.longest_wait_s,
            wait_jitter=given.first_wait_s,
        )
        for attempt in attempts:
            with attempt:
                self.limiter.try_acquire(self.destination.name)
                before()
                return request()
        raise AssertionError("stamina raises what the last attempt did")

    def _pause(self, error: Exception) -> bool | float:
        if not isinstance(error, Busy):
            return False
        self.unanswered += 1
        if error.after_s is None:
            return True
        return min(error.after_s, self.sending.patience_s) + random.uniform(0, self.sending.first_wait_s)
