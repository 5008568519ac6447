"""The way of a request to its score: the queue, the read of the feature cache, the deadlines.

No time is lost with waiting for company, and none with waiting for a feature cache that does not answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Final

from service import joining, metrics, scoring, tracing
from service.breaker import Breaker, State
from service.core.bundle import Bundle
from service.errors import Overloaded, ServiceError
from service.history import History, unfold
from service.models import Models
from service.pace import Pace
from service.reader import Values
from service.scoring import Batch, Score, Scored, ScoreFailure, ScoreRequest, Timing, unix_ms
from service.servers import UNREAD
from service.store import Store

logger = logging.getLogger(__name__)

# How long a group waits for the one before it to be read.
PATIENCE_S: Final = 0.002
# Groups of batches under way at once, one that is read while another is scored; single requests go in between.
GROUPS_OF_BATCHES: Final = 2
# The loop's timers count milliseconds and may be that early.
_TICK_S: Final = 0.001

Outcome = Score | ScoreFailure | Exception
Deliver = Callable[[Outcome, Timing], None]
Keep = Callable[[Bundle, Batch, Sequence[Score | ScoreFailure]], None]


class Waiting:
    """A request on its way: where its answer goes, when it came and when it must be answered, by perf_counter."""

    __slots__ = ("arrived", "deadline", "deliver", "is_done", "is_gone", "is_queued", "owner", "request")

    def __init__(
        self, request: ScoreRequest, deliver: Deliver, arrived: float, deadline: float, is_queued: bool
    ) -> None:
        self.request, self.deliver, self.arrived, self.deadline = request, deliver, arrived, deadline
        self.is_queued = is_queued  # counts towards the length of the queue
        self.is_gone = False  # its client went away
        self.is_done = False  # it was answered
        self.owner: str | None = None  # whom its visitor was joined into


class _Flight:
    """A group whose histories are being read, in its order.

    `due` is when the next of it must be answered, and `judged` when the read counts as failed, by perf_counter.
    """

    __slots__ = ("due", "group", "is_second", "judged", "now_ms", "read", "started")

    def __init__(
        self,
        group: list[Waiting],
        read: asyncio.Future[Values],
        now_ms: int,
        started: float,
        judged: float,
        is_second: bool = False,
    ) -> None:
        self.group, self.read, self.now_ms, self.started, self.judged = group, read, now_ms, started, judged
        self.is_second = is_second  # of those who were joined into others: it reads these
        self.due = min([one.deadline for one in group])

    def pass_on(self) -> None:
        """Have the next one be due."""
        self.due = min([one.deadline for one in self.group if not one.is_done], default=self.judged)


class Scorer:
    """Scores visitors. One per process.

    What arrives in one turn of the loop is taken up together, with one read, one call of the kernel and one of the
    model; what arrives while a group is being read goes next, together. A group is no larger than what is scored in a
    few milliseconds, and who could not be answered in time is refused at once. A read that hangs holds up nobody: the
    next group leaves after PATIENCE_S, each request is answered at its deadline, and the breaker ends the asking.
    `keep` is given what a model has scored.
    """

    def __init__(
        self,
        store: Store,
        models: Models,
        keep: Keep | None = None,
        *,
        deadline_ms: float,
        max_deadline_ms: float = 1000,
        queue_length: int = 1024,
        breaker_failures: int = 5,
        breaker_pause_ms: float = 1000,
        now_ms: Callable[[], int] = unix_ms,
    ) -> None:
        self._store, self._models, self._keep, self._now_ms = store, models, keep, now_ms
        self._deadline_s, self._max_deadline_s = deadline_ms / 1000, max_deadline_ms / 1000
        self._queue_length, self._pause_s = queue_length, breaker_pause_ms / 1000
        self._queue: deque[Waiting] = deque()
        self._pace = Pace()
        self._places = asyncio.Semaphore(GROUPS_OF_BATCHES)
        self._waiting = 0
        self._flights: set[_Flight] = set()
        self._turn: asyncio.Handle | None = None
        self._alarm: asyncio.TimerHandle | None = None
        self._alarm_at = math.inf
        self._trial: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()
        self._breaker = Breaker(breaker_failures, metrics.set_breaker_state)

    @property
    def waiting(self) -> int:
        """How many single requests wait, in the queue or for the feature cache."""
        return self._waiting

    @property
    def breaker_state(self) -> State:
        """The state of the breaker between scores and the feature cache."""
        return self._breaker.state

    def close(self) -> None:
        """Stop trying whether the feature cache is back."""
        if self._alarm is not None:
            self._alarm.cancel()
        if self._trial is not None:
            self._trial.cancel()

    def submit(self, request: ScoreRequest, deliver: Deliver, timeout_ms: float | None = None) -> Waiting:
        """Call `deliver` with the score of a request, soon and once. Raises Overloaded if too many wait."""
        allowed_s = self._allowed_s(timeout_ms)
        if self._waiting >= self._queue_length or not self._pace.is_in_time(self._waiting, allowed_s):
            metrics.shed("queue").add(1)
            raise Overloaded("too many scores wait; try again in a second")
        now = perf_counter()
        waiting = Waiting(request, deliver, now, now + allowed_s, True)
        self._waiting += 1
        self._queue.append(waiting)
        if self._turn is None:
            self._schedule()
        return waiting

    async def score_one(self, request: ScoreRequest, timeout_ms: float | None = None) -> tuple[Outcome, Timing]:
        """The score of one request, together with those that wait beside it."""
        answer: asyncio.Future[tuple[Outcome, Timing]] = self._loop.create_future()
        waiting = self.submit(request, _into(answer), timeout_ms)
        try:
            outcome, timing = await answer
        finally:
            waiting.is_gone = True
        tracing.add_stages(waiting.arrived, timing, outcome)
        return outcome, timing

    async def score(self, requests: Sequence[ScoreRequest], timeout_ms: float | None = None) -> list[Outcome]:
        """The score of each request, in order; they go in groups of their own, one after the other.

        Each group has the usual time until one has needed all of it, or all have `timeout_ms` together.
        """
        outcomes: list[Outcome] = []
        until = None if timeout_ms is None else perf_counter() + self._allowed_s(timeout_ms)
        while len(outcomes) < len(requests):
            first = len(outcomes)
            async with self._places:
                deadline = perf_counter() + self._deadline_s if until is None else until
                outcomes += await self._score_group(requests[first : first + self._pace.group], deadline)
            if perf_counter() >= deadline:
                until = deadline
        return outcomes

    async def _score_group(self, requests: Sequence[ScoreRequest], deadline: float) -> list[Outcome]:
        """The scores of a group of requests, which do not stand in the queue."""
        now = perf_counter()
        answers: list[asyncio.Future[tuple[Outcome, Timing]]] = [self._loop.create_future() for _ in requests]
        self._send(
            [
                Waiting(request, _into(answer), now, deadline, False)
                for request, answer in zip(requests, answers, strict=True)
            ]
        )
        results = [await answer for answer in answers]
        tracing.add_stages(now, results[0][1], results[0][0])
        return [outcome for outcome, _ in results]

    def _allowed_s(self, timeout_ms: float | None) -> float:
        return self._deadline_s if timeout_ms is None else min(timeout_ms, self._max_deadline_s * 1000) / 1000

    def _take_up(self) -> None:
        """Send the next group. Who stays behind goes when it has been read, or without waiting for that."""
        self._turn = None
        self._send([self._queue.popleft() for _ in range(min(len(self._queue), self._pace.group))])
        if self._queue:
            self._schedule()

    def _schedule(self) -> None:
        if not self._flights:
            self._turn = self._loop.call_soon(self._take_up)
        else:
            self._turn = self._loop.call_later(PATIENCE_S, self._lose_patience)

    def _lose_patience(self) -> None:
        """Send the next group, unless one has been read and is about to land, while the loop was held up."""
        self._turn = None
        if not any(flight.read.done() for flight in self._flights):
            self._take_up()

    def _send(self, group: list[Waiting]) -> None:
        """Ask for the histories of a group."""
        staying = [one for one in group if not one.is_gone]
        self._waiting -= sum(one.is_queued for one in group if one.is_gone)
        if not staying:
            return
        metrics.batch_visitors().add(len(staying))
        now, now_ms = perf_counter(), self._now_ms()
        if not self._breaker.is_closed:
            metrics.store_reads("skipped").add(1)
            self._finish(staying, None, now_ms, now)
            return
        judged = max(now + self._deadline_s, max([one.deadline for one in staying]))
        self._take_off(staying, [one.request.visitor_id for one in staying], now_ms, now, judged)

    def _take_off(
        self, group: list[Waiting], visitor_ids: list[str], now_ms: int, started: float, judged: float, *second: bool
    ) -> None:
        try:
            read = self._store.ask(visitor_ids)
        except Exception as error:  # a bug: who asked hears of it
            for one in group:
                self._deliver(one, error, Timing())
            return
        flight = _Flight(group, read, now_ms, started, judged, *second)
        self._flights.add(flight)
        self._set_alarm(flight.due)
        read.add_done_callback(lambda _: self._land(flight))

    def _set_alarm(self, due: float) -> None:
        """Look at all flights at that moment, if not before. One timer for all, since nearly every flight lands."""
        if due >= self._alarm_at:
            return
        if self._alarm is not None:
            self._alarm.cancel()
        self._alarm_at = due
        # The loop itself may have been held up: then an answer lies there, and has one turn to be seen.
        self._alarm = self._loop.call_later(due - perf_counter(), self._loop.call_soon, self._look_at_flights)

    def _look_at_flights(self) -> None:
        self._alarm, self._alarm_at = None, math.inf
        now = perf_counter() + _TICK_S
        for flight in [flight for flight in self._flights if not flight.read.done()]:
            if flight.due <= now:
                self._give_up(flight, now)
            if not flight.read.done():
                self._set_alarm(flight.due)

    def _give_up(self, flight: _Flight, now: float) -> None:
        """Answer those whose time is up, without their histories; end the read when it may count as failed."""
        late = [one for one in flight.group if not one.is_done and one.deadline <= now]
        if late:
            self._finish(late, None, flight.now_ms, flight.started)
        flight.pass_on()
        if now < flight.judged:
            return
        flight.due = math.inf
        metrics.store_reads("late").add(1)
        metrics.redis_seconds("read").add(now - _TICK_S - flight.started)
        if self._store.give_up(flight.read):
            self._note_failure("too slow")

    def _land(self, flight: _Flight) -> None:
        """Score a group with what was read for it; a read that was cancelled has been judged already."""
        self._flights.discard(flight)
        if self._queue:
            if self._turn is not None:
                self._turn.cancel()
            self._take_up()
        values: Values | None = None
        if not flight.read.cancelled():
            error = flight.read.exception()
            metrics.store_reads("ok" if error is None else "failed").add(1)
            metrics.redis_seconds("read").add(perf_counter() - flight.started)
            if error is None:
                self._breaker.succeeded()
                values = flight.read.result()
            else:
                self._note_failure(str(error))
        if values is not None and not flight.is_second and (owners := joining.owners(values)):
            values = self._follow(flight, values, owners)
            if not values:
                return
        for group, known in _split(flight.group, values):
            self._finish(group, known, flight.now_ms, flight.started)

    def _follow(self, flight: _Flight, values: Values, owners: Mapping[int, str]) -> Values:
        """Ask for those whom some of a flight were joined into, who leave it; the values of the others."""
        joined = {place: owner for place, owner in owners.items() if not flight.group[place].is_done}
        if joined:
            group = [flight.group[place] for place in joined]
            for one, owner in zip(group, joined.values(), strict=True):
                one.owner = owner
            self._take_off(group, list(joined.values()), flight.now_ms, flight.started, flight.judged, True)
        staying = [place for place in range(len(flight.group)) if place not in owners]
        flight.group = [flight.group[place] for place in staying]
        return [value for place in staying for value in values[2 * place : 2 * place + 2]]

    def _note_failure(self, why: str) -> None:
        self._breaker.failed()
        if self._breaker.state is State.OPEN and self._trial is None:
            logger.warning("the feature cache does not answer (%s); visitors are scored without it", why)
            self._trial = self._loop.create_task(self._try_until_it_answers())

    async def _try_until_it_answers(self) -> None:
        """While the breaker is open, ask once in a pause for a visitor that nobody is."""
        while not self._breaker.is_closed:
            await asyncio.sleep(self._pause_s)
            self._breaker.try_again()
            trial = self._store.ask([""])
            await asyncio.wait([trial], timeout=self._deadline_s)
            if trial.done() and not trial.cancelled() and trial.exception() is None:
                self._breaker.succeeded()
            else:
                self._store.give_up(trial)
                self._breaker.failed()
        self._trial = None
        logger.warning("the feature cache answers again")

    def _finish(self, group: Sequence[Waiting], values: Values | None, now_ms: int, started: float) -> None:
        """Score a group and deliver; a bug is delivered to all of it that it kept from a score."""
        read = perf_counter()
        store_s = read - started
        metrics.stage("store").add(store_s)
        try:
            for name, members, histories in _by_model(group, values):
                degraded = ("store",) if values is None else ()
                owners = [one.owner for one in members if one.owner is not None]  # of all or of none
                batch = Batch([one.request for one in members], histories, now_ms, degraded, owners)
                scored = self._score(name, batch)
                metrics.stage("features").add(scored.features_ms / 1000)
                metrics.stage("model").add(scored.model_ms / 1000)
                for one, answer in zip(members, scored.answers, strict=True):
                    queue_ms = (started - one.arrived) * 1000
                    self._deliver(one, answer, Timing(queue_ms, store_s * 1000, scored.features_ms, scored.model_ms))
        except Exception as error:
            for one in group:
                if not one.is_done:
                    self._deliver(one, error, Timing())
        self._pace.learn(len(group), perf_counter() - read)

    def _score(self, name: str | None, batch: Batch) -> Scored:
        try:
            bundle = self._models.choose(name)
        except ServiceError as error:
            return Scored([ScoreFailure(request.visitor_id, error) for request in batch.requests])
        if bundle is None:
            return scoring.score_by_rule(name, batch)
        scored = scoring.score_by_model(bundle, batch, self._models.populations[bundle.name])
        if self._keep is not None:
            self._keep(bundle, batch, scored.answers)
        return scored

    def _deliver(self, one: Waiting, outcome: Outcome, timing: Timing) -> None:
        self._waiting -= one.is_queued
        one.is_done = True
        if not one.is_gone:
            one.deliver(outcome, timing)


def _into(answer: asyncio.Future[tuple[Outcome, Timing]]) -> Deliver:
    """A delivery into a future, which nobody may be waiting for any more."""

    def deliver(outcome: Outcome, timing: Timing) -> None:
        if not answer.done():
            answer.set_result((outcome, timing))

    return deliver


def _split(group: Sequence[Waiting], values: Values | None) -> Iterator[tuple[Sequence[Waiting], Values | None]]:
    """Those of a group who still wait, with their values, and those whose values some server did not give."""
    places = [place for place, one in enumerate(group) if not one.is_done]
    if values is None or UNREAD not in values:
        read, unread = places, []
    else:
        read = [place for place in places if UNREAD not in values[2 * place : 2 * place + 2]]
        unread = [place for place in places if UNREAD in values[2 * place : 2 * place + 2]]
    if len(read) == len(group):
        yield group, values
    elif read:
        known = None if values is None else [value for place in read for value in values[2 * place : 2 * place + 2]]
        yield [group[place] for place in read], known
    if unread:
        yield [group[place] for place in unread], None


def _by_model(
    group: Sequence[Waiting], values: Values | None
) -> Iterator[tuple[str | None, Sequence[Waiting], list[History]]]:
    """The members of a group by the model that they ask for, with the histories that were read."""
    histories = (
        [History()] * len(group)
        if values is None
        else [unfold(known, traits) for known, traits in zip(values[::2], values[1::2], strict=True)]
    )
    names = {one.request.model for one in group}
    for name in names:
        if len(names) == 1:
            yield name, group, histories
        else:
            places = [place for place, one in enumerate(group) if one.request.model == name]
            yield name, [group[place] for place in places], [histories[place] for place in places]
