"""What `/metrics` shows: exactly what the documentation lists, of all workers together, and never more series."""

from __future__ import annotations

import http.client
import itertools
import json
import math
import random
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from service import metrics
from service.core import bins, bundle, segments
from service.embedded import EmbeddedServer
from tests.conftest import SHOP, ServiceProcess, WriteBundle, fill_propensity_database, wait_until
from tests.service.scrapes import Scrape, scrape
from tests.service.test_workers import served, wait_for_workers
from tests.test_docs import codes, page, table

# --- the classes ---


@given(st.lists(st.one_of(st.floats(-10, 10), st.sampled_from([0.0, 1.0, 5.0])), max_size=50))
def test_many_observations_at_once_are_the_same_as_one_by_one(values: list[float]) -> None:
    together, alone = (
        metrics.Histogram("seconds", "Some.", ["a"], buckets=(0, 1, 5), registry=CollectorRegistry()).labels("x")
        for _ in range(2)
    )
    together.observe_all(values)
    for value in values:
        alone.observe(value)
    assert [value.get() for value in together._buckets] == [value.get() for value in alone._buckets]
    assert together._sum.get() == pytest.approx(alone._sum.get())


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What a test holds is not told later on."""
    before = len(metrics._HELD)
    yield
    del metrics._HELD[before:]


def test_what_is_held_is_told_once(forgotten: None) -> None:
    registry = CollectorRegistry()
    counter = Counter("things", "Some.", registry=registry)
    histogram = metrics.Histogram("seconds", "Some.", buckets=(1, 5), registry=registry)
    for number in (1, 2, 3):
        metrics.Held(counter).add(number)
        metrics.Held(histogram).add(number)
    assert registry.get_sample_value("things_total") == registry.get_sample_value("seconds_count") == 0
    for _ in range(2):
        metrics.tell()
        assert registry.get_sample_value("things_total") == registry.get_sample_value("seconds_sum") == 6
        assert registry.get_sample_value("seconds_bucket", {"le": "1.0"}) == 1
        assert registry.get_sample_value("seconds_count") == 3


# --- the real service ---

# Of most features bins by quantiles, of one by categories, of one none at all.
REFERENCE = {
    "features": {
        **{
            name: {"edges": [0.5, 2, 10, 40], "shares": [0.1, 0.2, 0.3, 0.2, 0.1, 0.1], "rows": 1000}
            for name in SHOP["features"]
        },
        "device": {"edges": [0.5, 1.5], "shares": [0.5, 0.5, 0, 0], "rows": 1000},
        "loyalty": {"edges": [], "shares": [0, 1], "rows": 1000},
    },
    "score": {"edges": [0.53, 0.61, 0.77, 0.9], "shares": [0, 0.2, 0.2, 0.2, 0.2, 0.2], "rows": 500},
}


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory, write_bundle: WriteBundle) -> bundle.Bundle:
    """A model with bins of all sorts, alone in its artifacts directory."""
    return bundle.load(write_bundle(tmp_path_factory.mktemp("shop"), reference=REFERENCE))


@pytest.fixture(scope="module")
def two_workers(
    shop: bundle.Bundle, tmp_path_factory: pytest.TempPathFactory, embedded_server: EmbeddedServer
) -> Iterator[ServiceProcess]:
    """A service of two workers with that model, whose metrics are in files beside its log."""
    directory = tmp_path_factory.mktemp("workers")
    fill_propensity_database(embedded_server.url, "two")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PROMETHEUS_MULTIPROC_DIR", str(directory))
        given = {"artifacts": shop.path.parents[1], "redis_url": embedded_server.url, "namespace": "two"}
        started = ServiceProcess(directory, workers=2, **given)
    wait_for_workers(started)
    yield started
    started.end(signal.SIGKILL)


def post(service: ServiceProcess, path: str, document: object) -> Any:
    """The answer over a connection of its own, so that any worker may take it."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=20)
    with closing(connection):
        connection.request("POST", path, json.dumps(document), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read())
    assert response.status == 200, answer
    return answer


def view(visitor: object, **members: object) -> dict[str, object]:
    return {"event": "Product Viewed", "userId": visitor, **members}


def some_traffic(service: ServiceProcess) -> None:
    """At least one of everything that is counted."""
    batch = [view("a", properties={"price": 1, "category": "shoes"}), view("a"), view("", properties={})]
    batch += [{"event": "Nobody Knows", "userId": "a"}, {"type": "page", "name": "Home", "userId": "b"}]
    assert post(service, "/v1/events", {"batch": batch})["accepted"] == 3
    for visitor in ("a", "nobody"):
        post(service, "/v1/score", {"visitor_id": visitor})


def documented() -> dict[str, tuple[str, tuple[str, ...]]]:
    """Type and labels of each metric in the documentation."""
    return {
        name: (cells[0], tuple(sorted(codes(cells[1]))))
        for name, cells in table(page("metrics.md")).items()
        if name.startswith("propensity_") and len(cells) == 3
    }


def shown(scraped: Scrape) -> dict[str, tuple[str, tuple[str, ...]]]:
    """Type and labels of each metric that has a value, those of the client library apart."""
    return {
        name: (scraped.types[name], labels)
        for name, labels in scraped.labels.items()
        if not name.startswith(("python_", "process_"))
    }


@pytest.mark.parametrize("started", ["service", "two_workers"])
def test_a_scrape_after_traffic_shows_exactly_what_is_documented(started: str, request: pytest.FixtureRequest) -> None:
    service: ServiceProcess = request.getfixturevalue(started)
    some_traffic(service)
    time.sleep(1.1)  # until the other worker has told what it counted
    scraped = scrape(service.url)
    assert shown(scraped) == documented()
    assert {name for name in scraped.types if not name.startswith(("python_", "process_"))} == set(documented())


def test_what_is_known_of_a_model_is_said_once_however_many_workers_there_are(
    two_workers: ServiceProcess, shop: bundle.Bundle
) -> None:
    scraped = scrape(two_workers.url)
    labels = {"model": "shop", "version": "1"}
    assert scraped.value("propensity_latency_objective_seconds") == 0.025
    assert scraped.value("propensity_build_info") == 1
    assert scraped.value("propensity_model_info", **labels) == 1
    assert 0 <= time.time() - scraped.value("propensity_model_loaded_timestamp_seconds", **labels) < 60
    assert scraped.value("propensity_model_created_timestamp_seconds", **labels) == 1_767_225_600
    assert 0 < scraped.value("propensity_model_load_seconds", **labels) < 10
    assert set(scraped.by("segment", "propensity_reference_segment_share", **labels)) == set(segments.SEGMENTS)
    assert scraped.value("propensity_reference_segment_share", **labels) == pytest.approx(1)
    for feature in (*shop.spec.names, bins.SCORE):
        assert scraped.value("propensity_reference_share", **labels, feature=feature) == pytest.approx(1)
        assert scraped.value("propensity_reference_rows", **labels, feature=feature) in (500, 1000)
        shares = scraped.by("bin", "propensity_reference_share", **labels, feature=feature)
        assert set(scraped.by("bin", "propensity_feature_bin_total", **labels, feature=feature)) == set(shares)
    assert set(scraped.by("bin", "propensity_reference_share", feature="device")) == {
        *("missing", "mobile", "desktop", "other")
    }
    # Of chi-square for 4 - 1 degrees of freedom the quantile at 1 - 0.01 / 11, since there are 11 of them.
    critical = scraped.value("propensity_drift_critical", **labels, feature="device")
    above = math.erfc(math.sqrt(critical / 2)) + math.sqrt(2 * critical / math.pi) * math.exp(-critical / 2)
    assert above == pytest.approx(0.01 / 11, rel=1e-3)


# --- counts of two workers ---


def random_requests(shop: bundle.Bundle, count: int) -> tuple[list[dict[str, object]], np.ndarray[Any, Any]]:
    """Requests that give every feature of their visitors, and float32[n, F] of the same."""
    chance = np.random.default_rng(1)
    matrix = chance.lognormal(1, 1.5, (count, len(shop.spec.names))).astype(np.float32)
    matrix[chance.random(matrix.shape) < 0.2] = np.nan
    matrix[chance.random(matrix.shape) < 0.1] = 2  # an edge
    matrix[:, shop.spec.names.index("device")] = chance.integers(0, 3, count)
    rows = [[None if np.isnan(value) else float(value) for value in row] for row in matrix]
    return [
        {"visitor_id": f"v{place}", "features": dict(zip(shop.spec.names, row, strict=True))}
        for place, row in enumerate(rows)
    ], matrix


def in_bins(described: bundle.Bins, values: np.ndarray[Any, Any]) -> list[int]:
    """How many values numpy finds in each bin, missing ones first."""
    known = values[~np.isnan(values)].astype(np.float64)
    counts = np.bincount(np.searchsorted(described.edges, known, "right"), minlength=len(described.edges) + 1)
    return [len(values) - len(known), *counts.tolist()]


def test_counts_of_two_workers_together_are_those_of_numpy(two_workers: ServiceProcess, shop: bundle.Bundle) -> None:
    before, before_of_each = scrape(two_workers.url), served(two_workers.log.parent)
    requests, matrix = random_requests(shop, 4000)
    wrong = {"visitor_id": "wrong", "features": {"views_1d": "many"}}
    parts = [[*requests[first : first + 100], wrong] for first in range(0, 3800, 100)]
    with ThreadPoolExecutor(4) as pool:
        answers = [
            result
            for part in pool.map(lambda part: post(two_workers, "/v1/score/batch", {"visitors": part}), parts)
            for result in part["results"]
            if "error" not in result
        ]
        answers += pool.map(lambda request: post(two_workers, "/v1/score", request), requests[3800:])
    scores = shop.predict(matrix)
    assert [answer["propensity"] for answer in answers] == [float(f"{score:.6g}") for score in scores.tolist()]
    by_bin = {"name": "propensity_feature_bin_total", "model": "shop", "version": "1"}
    wait_until(lambda: grown(before, scrape(two_workers.url), **by_bin, feature=bins.SCORE) >= 4000)
    now, now_of_each = scrape(two_workers.url), served(two_workers.log.parent)
    assert sorted(now_of_each[name] - before_of_each[name] > 5 for name in now_of_each) == [False, True, True]
    for name, described in {**shop.reference.features, bins.SCORE: shop.reference.score}.items():
        values = scores if name == bins.SCORE else matrix[:, shop.spec.names.index(name)]
        texts = bins.texts(described, shop.spec.features.get(name))
        found = [grown(before, now, **by_bin, feature=name, bin=text) for text in texts]
        assert found == in_bins(described, values), name
    assert grown(before, now, "propensity_scores_total", model="shop") == 4000
    assert grown(before, now, "propensity_scores_without_history_total", model="shop") == 4000
    assert grown(before, now, "propensity_scores_capped_total", model="shop") == 0


def grown(before: Scrape, now: Scrape, name: str, **labels: str) -> float:
    """By how much a sum has grown."""
    return now.value(name, **labels) - before.value(name, **labels)


# --- the number of series ---


def exchange(service: ServiceProcess, requests: list[bytes]) -> None:
    """Send requests one after the other over one connection, and read that much of the answers."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        received = connection.makefile("rb")
        for request in requests:
            connection.sendall(request)
            length = 0
            while (line := received.readline()) not in (b"\r\n", b""):
                if line.lower().startswith(b"content-length:"):
                    length = int(line.partition(b":")[2])
            received.read(length)


def spelled(chance: random.Random) -> str:
    return f"{chance.getrandbits(64):x}"


def request(method: str, path: str, document: object = None) -> bytes:
    body = b"" if document is None else json.dumps(document).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def random_paths(chance: random.Random, count: int) -> list[bytes]:
    """Each method on each place in turn, and beyond it what nobody has."""
    places = ("/", "/v1/visitors/", "/v1/models/", "/v2/models/", "/v1/score/", "/metrics/", "/docs/")
    methods = ("GET", "PUT", "POST", "DELETE", "SEARCH", "REPORT")
    pairs = itertools.cycle(itertools.product(methods, places))
    return [request(method, place + spelled(chance)) for method, place in itertools.islice(pairs, count)]


def random_scores(chance: random.Random, count: int) -> list[bytes]:
    """Of visitors whom nobody knows, some by models that do not exist, or with a context that nobody reads."""
    extra: list[dict[str, object]] = [
        {},
        {"model": spelled(chance)},
        {"context": {spelled(chance): spelled(chance), "referrer": spelled(chance)}},
        {"features": {spelled(chance): 1}},
        {"model": "shop", "features": {"device": spelled(chance)}},
    ]
    extras = itertools.islice(itertools.cycle(extra), count)
    return [request("POST", "/v1/score", {"visitor_id": spelled(chance), **one}) for one in extras]


def random_events(chance: random.Random, count: int) -> list[bytes]:
    """Known and unknown ones, each with names that nobody has heard of, a thousand a request."""

    def one() -> dict[str, object]:
        return {
            "type": chance.choice(["track", "page", "identify", "screen", spelled(chance)]),
            "event": chance.choice(["Product Viewed", "Product Added", spelled(chance)]),
            "name": spelled(chance),
            "userId": spelled(chance),
            "messageId": spelled(chance),
            "timestamp": chance.choice([None, spelled(chance), chance.getrandbits(32)]),
            "properties": {spelled(chance): spelled(chance), "category": spelled(chance), "price": spelled(chance)},
            "traits": {spelled(chance): spelled(chance), "device": spelled(chance)},
        }

    return [request("POST", "/v1/events", {"batch": [one() for _ in range(500)]}) for _ in range(count // 500)]


def test_ten_thousand_random_paths_and_ids_leave_the_series_as_they_are(service: ServiceProcess) -> None:
    chance = random.Random(3)

    def series_after(paths: int, scores: int, events: int) -> set[object]:
        exchange(service, random_paths(chance, paths))
        exchange(service, random_scores(chance, scores))
        exchange(service, random_events(chance, events))
        return set(scrape(service.url).samples)

    series_after(100, 100, 1000)
    before = scrape(service.url)
    assert series_after(10_000, 10_000, 10_000) - set(before.samples) == set()
    now = scrape(service.url)
    assert grown(before, now, "propensity_request_seconds_count", route="none") > 1000
    assert grown(before, now, "propensity_events_by_kind_total", kind="unknown") > 100
    assert grown(before, now, "propensity_scores_without_history_total") > 1000
