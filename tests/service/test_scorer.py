"""The queue, the deadlines and the breaker on the way to a score, over real feature caches."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from service import models
from service.breaker import State
from service.core import events
from service.errors import Overloaded, UnknownModel
from service.history import History
from service.joining import Login
from service.models import Models
from service.pace import GROUP
from service.persons import Persons
from service.reader import Values
from service.scorer import GROUPS_OF_BATCHES, Outcome, Scorer
from service.scoring import Score, ScoreFailure, ScoreRequest, Timing
from service.store import Store
from service.visitors import Visitors
from tests.conftest import DAY_MS, SHOP, RedisServer, WriteBundle

pytestmark = pytest.mark.anyio

NOW_MS = 1_767_225_600_000


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[Store]:
    opened = Store.open(store_url, namespace=f"scorer-{uuid.uuid4().hex[:12]}", retention_ms=DAY_MS)
    yield opened
    await opened.close()


@pytest.fixture
async def own_store(own_redis_server: RedisServer) -> AsyncIterator[Store]:
    """Over a server that the test may stop."""
    opened = Store.open(own_redis_server.url, namespace="p", retention_ms=DAY_MS)
    await Visitors(opened).append({"a": events_of(3)}, NOW_MS)
    yield opened
    await opened.close()


@pytest.fixture
def loaded(artifacts: Path) -> Models:
    return models.load(artifacts)


def scorer_of(store: Store, loaded: Models, deadline_ms: float = 2000, **more: float) -> Scorer:
    return Scorer(store, loaded, deadline_ms=deadline_ms, now_ms=lambda: NOW_MS, **more)  # type: ignore[arg-type]


def events_of(count: int) -> History:
    return History(b"".join(events.pack(NOW_MS - place, 1, place, 1, 1.0) for place in range(count)))


async def asked(scorer: Scorer, visitor_id: str = "a", timeout_ms: float | None = None) -> Score:
    outcome, _ = await scorer.score_one(ScoreRequest(visitor_id), timeout_ms)
    assert isinstance(outcome, Score), outcome
    return outcome


def stop(server: RedisServer) -> None:
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGSTOP)


def resume(server: RedisServer) -> None:
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGCONT)


async def test_each_of_many_at_once_gets_its_own_answer_though_neighbours_are_cancelled(
    store: Store, loaded: Models
) -> None:
    count = 3000
    scorer = scorer_of(store, loaded, deadline_ms=20_000, queue_length=count)
    for first in range(0, count, 500):
        await Visitors(store).append({f"v{row}": events_of(row % 97) for row in range(first, first + 500)}, NOW_MS)
    tasks = [asyncio.create_task(asked(scorer, f"v{row}")) for row in range(count)]
    gone = set()
    for row, task in enumerate(tasks):
        if row % 40 == 0:
            await asyncio.sleep(0)
        if row % 10 < 3 and task.cancel():
            gone.add(row)
    assert len(gone) > 100
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    for row, answer in enumerate(answers):
        if row in gone:
            assert isinstance(answer, asyncio.CancelledError)
        else:
            assert isinstance(answer, Score), answer
            assert (answer.visitor_id, answer.events) == (f"v{row}", row % 97)
    assert scorer.waiting == 0


async def test_requests_that_wait_together_are_read_together(
    store: Store, loaded: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, sizes = store.ask, []

    def watched(visitor_ids: Sequence[str]) -> asyncio.Future[Values]:
        sizes.append(len(visitor_ids))
        return ask(visitor_ids)

    monkeypatch.setattr(store, "ask", watched)
    scorer = scorer_of(store, loaded)
    await asyncio.gather(*(asked(scorer, f"v{row}") for row in range(250)))
    assert sizes == [GROUP, GROUP, 50]


async def test_of_a_batch_each_group_has_the_usual_time_and_all_have_what_the_client_gives(
    own_store: Store, loaded: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, loop = own_store.ask, asyncio.get_running_loop()

    def slow(visitor_ids: Sequence[str]) -> asyncio.Future[Values]:
        later: asyncio.Future[Values] = loop.create_future()

        def answer(read: asyncio.Future[Values]) -> None:
            if not later.cancelled():
                later.set_result(read.result())

        def give(read: asyncio.Future[Values]) -> None:
            loop.call_later(0.6, answer, read)

        ask(visitor_ids).add_done_callback(give)
        return later

    monkeypatch.setattr(own_store, "ask", slow)
    scorer = scorer_of(own_store, loaded, deadline_ms=2000, max_deadline_ms=2000)
    requests = [ScoreRequest(f"v{row}") for row in range(5 * GROUP)]
    missing = [outcome.degraded for outcome in await scorer.score(requests) if isinstance(outcome, Score)]
    assert missing == [[]] * len(requests)
    hurried = await scorer.score(requests, 2000)
    missing = [outcome.degraded for outcome in hurried if isinstance(outcome, Score)]
    assert missing[0] == []
    assert missing[-1] == ["store"]


async def test_a_group_of_several_models_gives_each_its_own(
    store: Store, tmp_path: Path, write_bundle: WriteBundle
) -> None:
    for name, weight in (("a", 0.1), ("b", 0.9)):
        write_bundle(tmp_path, {**SHOP, "model": name}, weight=weight)
    await Visitors(store).append({"v": events_of(5)}, NOW_MS)
    scorer = scorer_of(store, models.load(tmp_path))
    names = ["a", "b", "gone"] * 20
    outcomes = await asyncio.gather(*(scorer.score_one(ScoreRequest("v", name)) for name in names))
    propensities: dict[str | None, set[float | None]] = {}
    for name, (outcome, _) in zip(names, outcomes, strict=True):
        if name == "gone":
            assert isinstance(outcome, ScoreFailure)
            assert isinstance(outcome.error, UnknownModel)
        else:
            assert isinstance(outcome, Score)
            propensities.setdefault(outcome.model, set()).add(outcome.propensity)
    assert propensities.keys() == {"a", "b"}
    assert [len(found) for found in propensities.values()] == [1, 1]
    assert propensities["a"] != propensities["b"]


async def test_a_bug_reaches_who_asked_and_the_next_is_scored(
    store: Store, loaded: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError

    scorer = scorer_of(store, loaded)
    for target, name in ((store, "ask"), (Models, "choose")):
        with monkeypatch.context() as patched:
            patched.setattr(target, name, broken)
            outcome, _ = await scorer.score_one(ScoreRequest("a"))
            assert isinstance(outcome, ZeroDivisionError)
    assert (await asked(scorer)).degraded == []
    assert scorer.waiting == 0


async def test_one_more_than_may_wait_is_refused_at_once_and_batches_take_no_place(
    store: Store, loaded: Models
) -> None:
    scorer = scorer_of(store, loaded, queue_length=5)
    batch = asyncio.create_task(scorer.score([ScoreRequest(f"v{row}") for row in range(250)]))
    await asyncio.sleep(0)
    waiting = [asyncio.create_task(asked(scorer, f"v{row}")) for row in range(5)]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match="try again"):
        scorer.submit(ScoreRequest("a"), lambda *_: None)
    await asyncio.gather(batch, *waiting)
    assert (await asked(scorer)).degraded == []


@pytest.mark.alone
async def test_a_hanging_cache_costs_each_request_its_own_time_and_the_next_nothing(
    own_store: Store, own_redis_server: RedisServer, loaded: Models
) -> None:
    async def took_s(scorer: Scorer, timeout_ms: float | None) -> float:
        started = time.monotonic()
        assert (await asked(scorer, timeout_ms=timeout_ms)).degraded == ["store"]
        return time.monotonic() - started

    rounds = []
    for _ in range(3):
        scorer = scorer_of(own_store, loaded, deadline_ms=80, max_deadline_ms=200, breaker_failures=1)
        assert (await asked(scorer, timeout_ms=200)).events == 3
        stop(own_redis_server)
        waited_s = await asyncio.gather(*(took_s(scorer, timeout_ms) for timeout_ms in (20, None, 5000)))
        rounds.append([*waited_s, await took_s(scorer, None)])
        resume(own_redis_server)
        scorer.close()
    # No request is early, and a machine that is late once is not late every time.
    short, usual, long, next_ones = (min(found) for found in zip(*rounds, strict=True))
    assert 0.018 < short < 0.06
    assert 0.078 < usual < 0.12
    assert 0.198 < long < 0.24  # the cap
    assert next_ones < 0.02  # the breaker is open


async def test_those_who_did_not_wait_leave_the_others_their_own_histories(
    own_store: Store, own_redis_server: RedisServer, loaded: Models
) -> None:
    await Visitors(own_store).append({f"v{row}": events_of(row) for row in range(40)}, NOW_MS)
    scorer = scorer_of(own_store, loaded)
    await asked(scorer)
    stop(own_redis_server)
    waiting = [asyncio.create_task(asked(scorer, f"v{row}", 10 if row % 3 else 2000)) for row in range(40)]
    await asyncio.sleep(0.1)
    resume(own_redis_server)
    for row, score in enumerate(await asyncio.gather(*waiting)):
        assert score.visitor_id == f"v{row}"
        assert (score.events, score.degraded) == ((0, ["store"]) if row % 3 else (row, []))
    assert scorer.waiting == 0


async def test_the_breaker_opens_on_failures_in_a_row_and_closes_when_the_cache_is_back(
    own_store: Store, own_redis_server: RedisServer, loaded: Models
) -> None:
    scorer = scorer_of(own_store, loaded, breaker_failures=3, breaker_pause_ms=100)
    own_redis_server.kill()
    for _ in range(3):
        assert scorer.breaker_state == "closed"
        assert (await asked(scorer)).degraded == ["store"]
    assert scorer.breaker_state == "open"
    await asyncio.sleep(0.3)
    assert scorer.breaker_state in ("open", "half_open")
    own_redis_server.start()
    await Visitors(own_store).append({"a": events_of(2)}, NOW_MS)
    until = time.monotonic() + 1
    while scorer.breaker_state != "closed":
        assert time.monotonic() < until
        await asyncio.sleep(0.01)
    score = await asked(scorer)
    assert (score.degraded, score.events) == ([], 2)


async def test_one_lost_connection_is_one_failure_however_many_wait_on_it(
    own_store: Store, own_redis_server: RedisServer, loaded: Models
) -> None:
    scorer = scorer_of(own_store, loaded, breaker_failures=2)
    await asked(scorer)
    stop(own_redis_server)
    groups = [asyncio.create_task(scorer.score([ScoreRequest("a")])) for _ in range(GROUPS_OF_BATCHES)]
    await asyncio.sleep(0.01)
    own_redis_server.kill()
    for outcomes in await asyncio.gather(*groups):
        assert isinstance(outcomes[0], Score)
        assert outcomes[0].degraded == ["store"]
    assert scorer.breaker_state == "closed"


@pytest.mark.alone
async def test_a_loop_that_was_held_up_does_not_blame_the_cache(store: Store, loaded: Models) -> None:
    await Visitors(store).append({"a": events_of(3)}, NOW_MS)
    scorer = scorer_of(store, loaded, deadline_ms=30)
    await asked(scorer)
    answer = asyncio.create_task(asked(scorer))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    time.sleep(0.1)  # noqa: ASYNC251 - that is what is tried
    assert (await answer).degraded == []


async def test_stages_are_timed(store: Store, loaded: Models) -> None:
    scorer = scorer_of(store, loaded)
    started = time.perf_counter()
    _, timing = await scorer.score_one(ScoreRequest("a"))
    took_ms = (time.perf_counter() - started) * 1000
    assert 0 < sum(timing) <= took_ms
    assert all(stage > 0 for stage in timing)
    assert (
        Timing(0.004, 1.5, 20, 0.126).header() == "queue;dur=0.00, store;dur=1.50, features;dur=20.00, model;dur=0.13"
    )


async def test_nothing_is_delivered_to_who_went_away(store: Store, loaded: Models) -> None:
    scorer, delivered = scorer_of(store, loaded), []

    def deliver(outcome: Outcome, _: Timing) -> None:
        delivered.append(outcome)

    gone_early = scorer.submit(ScoreRequest("a"), deliver)
    gone_early.is_gone = True
    gone_late = scorer.submit(ScoreRequest("b"), deliver)
    scorer.submit(ScoreRequest("c"), deliver)
    await asyncio.sleep(0)
    gone_late.is_gone = True
    await asked(scorer)
    assert [outcome.visitor_id for outcome in delivered if isinstance(outcome, Score)] == ["c"]
    assert scorer.waiting == 0


async def test_many_batches_at_once_leave_single_scores_their_turn(
    store: Store, loaded: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer, under_way, most, ask = scorer_of(store, loaded), 0, 0, store.ask

    def counted(visitor_ids: Sequence[str]) -> asyncio.Future[Values]:
        nonlocal under_way, most

        def end(_: object) -> None:
            nonlocal under_way
            under_way -= 1

        read = ask(visitor_ids)
        under_way += 1
        most = max(most, under_way)
        read.add_done_callback(end)
        return read

    monkeypatch.setattr(store, "ask", counted)
    batches = [scorer.score([ScoreRequest(f"v{row}") for row in range(300)]) for _ in range(8)]
    assert [len(outcomes) for outcomes in await asyncio.gather(*batches)] == [300] * 8
    assert most == GROUPS_OF_BATCHES


async def test_of_many_at_once_the_joined_ones_are_scored_as_those_whom_they_were_joined_into(
    store: Store, loaded: Models
) -> None:
    scorer, count = scorer_of(store, loaded), 200
    await Visitors(store).append({f"u{row}": events_of(row % 40) for row in range(count)}, NOW_MS)
    await Persons(store).join([(f"a{row}", Login(NOW_MS, f"u{row}")) for row in range(count)], NOW_MS)
    names = [f"{side}{row}" for row in range(count) for side in "au"]
    answers = await asyncio.gather(*(asked(scorer, name) for name in names))
    assert [answer.visitor_id for answer in answers] == names
    assert [answer.events for answer in answers] == [row % 40 for row in range(count) for _ in "au"]
    assert [one.propensity for one in answers[::2]] == [one.propensity for one in answers[1::2]]
    assert scorer.waiting == 0


@pytest.mark.alone
async def test_a_joined_visitor_whose_second_read_hangs_is_scored_without_it_in_time(
    own_store: Store, own_redis_server: RedisServer, loaded: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    await Persons(own_store).join([("joined", Login(NOW_MS, "a"))], NOW_MS)
    scorer, ask = scorer_of(own_store, loaded, deadline_ms=200, breaker_failures=1), own_store.ask
    assert (await asked(scorer, "joined")).events == 3

    def stop_before_the_second(visitor_ids: Sequence[str]) -> asyncio.Future[Values]:
        if visitor_ids == ["a"]:
            stop(own_redis_server)
        return ask(visitor_ids)

    monkeypatch.setattr(own_store, "ask", stop_before_the_second)
    started = time.perf_counter()
    answer = await asked(scorer, "joined")
    assert 0.15 < time.perf_counter() - started < 1
    assert (answer.visitor_id, answer.events, answer.degraded) == ("joined", 0, ["store"])
    assert scorer.breaker_state is not State.CLOSED
    resume(own_redis_server)
    scorer.close()
