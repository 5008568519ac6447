"""Locust users of a running service: a website's visitors, a job that scores audiences, and Grafana.

    locust -f loadtest/locustfile.py --headless --host http://127.0.0.1:8000 --shape ramp -u 200 -t 60

`make load` does that. Every answer is checked; an event that was acknowledged must be in the very next score.
"""

from __future__ import annotations

import itertools
import logging
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Final

import locust.stats
import msgspec
from locust import FastHttpUser, LoadTestShape, events, task
from locust.env import Environment
from locust.runners import WorkerRunner

from loadtest import shapes, visits
from loadtest.answers import (
    Score,
    Wrong,
    check_batch,
    check_events,
    check_metrics,
    check_ready,
    check_score,
    require_ok,
)
from training import specfile

logger = logging.getLogger(__name__)

JSON: Final = {"Content-Type": "application/json"}
SCORE: Final = "/v1/score"
DEGRADED: Final = "DEGRADED"
DEFAULT_SECONDS: Final = 60
SPEC: Final = Path(__file__).parents[1] / "examples" / "shop.yaml"
locust.stats.PERCENTILES_TO_CHART = [0.5, 0.99]
_numbers = itertools.count()


def add_options(parser: ArgumentParser, **_: object) -> None:
    """The options of these users beside locust's own, in types that it can send to its other processes."""
    add = parser.add_argument_group("simulated shop").add_argument
    add(
        "--shape", choices=list(shapes.SHAPES), default="steady", help="Course of the load; -u is its peak, -t its time"
    )
    add("--spec", default=str(SPEC), help="Spec of the model; only its events are expected in scores")
    add("--visitors", type=int, default=100_000, help="Known visitors that there are")
    add("--ids", help="A file with their ids, one a line, the busiest first; visitor-1, ... without it")
    add("--exponent", type=float, default=1.0, help="Of the power law: 0 makes all visitors alike")
    add("--new-share", type=float, default=0.3, help="Share of visits by somebody new")
    add("--think", type=float, default=2.0, help="Mean seconds between two pages of a visitor")
    add("--audience-every", type=float, default=10.0, help="Seconds between two batches of the audience job")
    add("--scrape-every", type=float, default=5.0, help="Seconds between two scrapes")
    add("--model", help="Model to ask, where the service has several and no default")
    add("--max-p99", type=float, default=0.0, help="Fail if 99 %% of the scores took more milliseconds; 0: no limit")
    add("--max-degraded", type=float, default=1.0, help="Fail if a larger share of the scores was degraded")
    add("--seed", type=int, default=1, help="Of what the visitors do")


@cache
def population(visitors: int, exponent: float, ids: str | None) -> visits.Population:
    """The known visitors, the same ones for all users of a process."""
    return visits.Population(visitors, exponent, Path(ids).read_text().split() if ids else ())


@cache
def catalogue(spec: str) -> frozenset[str]:
    """The names of the events that the model knows."""
    return frozenset(event.event for event in specfile.load(Path(spec)).events.values())


class Role(FastHttpUser):
    """What all users share: requests whose answers are checked."""

    abstract = True
    connection_timeout = network_timeout = 10.0

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        assert environment.parsed_options is not None
        self.options: Namespace = environment.parsed_options
        worker = getattr(environment.runner, "worker_index", 0)
        self.rng = Random(f"{self.options.seed}/{worker}/{next(_numbers)}")
        self.population = population(self.options.visitors, self.options.exponent, self.options.ids)

    def ask(
        self, method: str, path: str, check: Callable[[bytes], Sequence[Score]], body: object = None, **headers: str
    ) -> bool:
        """Whether the answer is as `check` wants it; if not, a failure with its reason is counted."""
        data: Any = None if body is None else msgspec.json.encode(body)
        with self.client.request(method, path, data=data, headers={**JSON, **headers}, catch_response=True) as response:
            if response.status_code == 0:  # no answer; locust notes the reason
                return False
            try:
                content = response.content or b""
                require_ok(response.status_code, content)
                scores = check(content)
            except Wrong as wrong:
                response.failure(wrong)
                return False
            response_ms = round(response.request_meta["response_time"])
            for reason in (reason for score in scores for reason in score.degraded):
                # A statistic of its own, outside of the totals.
                self.environment.stats.get(f"{path} without {reason}", DEGRADED).log(response_ms, 0)
            return True


class Website(Role):
    """A visitor who opens pages: each sends its events, then asks for the score that it is shown by."""

    def on_start(self) -> None:
        """The visitor comes, not in step with the others who come now."""
        self.visit = self.new_visit()
        time.sleep(self.rng.random() * self.options.think)

    def new_visit(self) -> visits.Visit:
        """Somebody comes to the site."""
        return visits.begin(self.rng, self.population, self.options.new_share)

    def wait_time(self) -> float:
        """Seconds on a page."""
        # Below uvicorn's keep-alive of 5 s unless asked for more: a POST that meets the closing connection is lost.
        return self.rng.uniform(0.5, 1.5) * float(self.options.think)

    @task
    def open_page(self) -> None:
        """Send what the visitor does, then score: it must be in there."""
        if self.visit.pages == 0:
            self.visit = self.new_visit()
        visit = self.visit
        sent = visits.open_page(visit, self.rng, time.time_ns() // 1_000_000)
        body = {"batch": sent} if len(sent) > 1 else sent[0]
        known = catalogue(self.options.spec)
        if not self.ask("POST", "/v1/events", lambda answer: check_events(answer, visit, sent, known), body):
            self.visit = self.new_visit()  # what arrived of this one is not certain
            return
        asked: dict[str, object] = {"visitor_id": visit.visitor_id, "context": {"referrer": visit.referrer}}
        if self.options.model:
            asked["model"] = self.options.model
        self.ask("POST", SCORE, lambda answer: check_score(answer, visit), asked)


class AudienceJob(Role):
    """A job that scores 500 to 1,000 visitors at a time."""

    fixed_count = 1

    def wait_time(self) -> float:
        """Seconds between two batches."""
        return float(self.options.audience_every)

    @task
    def score_batch(self) -> None:
        """Score visitors, each with a result in its place."""
        chosen = [self.population.pick(self.rng) for _ in range(self.rng.randint(500, 1000))]
        model = {"model": self.options.model} if self.options.model else {}
        body = {"visitors": [{"visitor_id": visitor_id, **model} for visitor_id in chosen]}
        self.ask("POST", f"{SCORE}/batch", lambda answer: check_batch(answer, chosen), body, Connection="close")


class Grafana(Role):
    """What watches: the scrape behind Grafana, and a readiness probe."""

    fixed_count = 1

    def wait_time(self) -> float:
        """Seconds between two scrapes."""
        return float(self.options.scrape_every)

    @task
    def scrape(self) -> None:
        """Fetch the metrics and ask whether the service is ready."""
        self.ask("GET", "/metrics", check_metrics)
        self.ask("GET", "/readyz", check_ready)


class Shape(LoadTestShape):
    """The chosen shape of the number of visitors; the other roles come on top."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """Users, and how many of them may come or go in a second; None ends the test."""
        assert self.runner is not None and self.runner.environment.parsed_options is not None
        options, classes = self.runner.environment.parsed_options, self.runner.environment.user_classes
        peak, duration = options.num_users or 10, options.run_time or DEFAULT_SECONDS
        elapsed_s: float = self.get_run_time()  # type: ignore[no-untyped-call]
        visitors = shapes.users(options.shape, elapsed_s, duration, peak)
        if visitors is None:
            return None
        return visitors * (Website in classes) + sum(role.fixed_count for role in classes), float(peak)


def judge(environment: Environment, **_: object) -> None:
    """Set the exit code where a limit is missed; failed requests make it 1 anyway."""
    if isinstance(environment.runner, WorkerRunner) or Website not in environment.user_classes:
        return
    options, entries = environment.parsed_options, environment.stats.entries
    assert options is not None
    scores = entries[SCORE, "POST"]
    p99_ms = scores.get_response_time_percentile(0.99)
    degraded = sum(
        entry.num_requests
        for (name, kind), entry in entries.items()
        if kind == DEGRADED and name.startswith(f"{SCORE} ")
    )
    missed = []
    if scores.num_requests == 0:
        missed.append("no score was asked for")
    if options.max_p99 and p99_ms > options.max_p99:
        missed.append(f"99 % of the scores came within {p99_ms:g} ms, wanted {options.max_p99:g} ms")
    if degraded > options.max_degraded * scores.num_requests:
        missed.append(f"{degraded} of {scores.num_requests} scores were degraded, wanted {options.max_degraded:.1%}")
    for line in missed:
        logger.error("missed: %s", line)
    if missed:
        environment.process_exit_code = 1


events.init_command_line_parser.add_listener(add_options)  # type: ignore[no-untyped-call]
events.quitting.add_listener(judge)  # type: ignore[no-untyped-call]
