"""What `/metrics` shows: exactly what the documentation lists, of all workers together, and never more series."""

from __future__ import annotations

import json
import random
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter

from service import metrics
from service.core import bins, bundle, segments
from service.embedded import EmbeddedServer
from tests.conftest import SHOP, ServiceProcess, StartService, WriteBundle, wait_until
from tests.service.scrapes import Scrape, read, scrape
from tests.service.test_workers import served, wait_for_workers
from tests.test_docs import codes, page, table

RANDOM_THINGS = 10_000


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


def post(url: str, path: str, document: object) -> Any:
    """The answer over a connection of its own, so that any worker may take it."""
    response = httpx2.post(f"{url}{path}", json=document, timeout=20)
    assert response.status_code == 200, response.text
    return response.json()


def view(visitor: object, **members: object) -> dict[str, object]:
    return {"event": "Product Viewed", "userId": visitor, **members}


def some_traffic(url: str) -> None:
    """At least one of everything that is counted."""
    batch = [view("a", properties={"price": 1, "category": "shoes"}), view("a"), view("", properties={})]
    batch += [{"event": "Nobody Knows", "userId": "a"}, {"type": "page", "name": "Home", "userId": "b"}]
    assert post(url, "/v1/events", {"batch": batch})["accepted"] == 3
    for visitor in ("a", "nobody"):
        post(url, "/v1/score", {"visitor_id": visitor})


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


def test_a_scrape_after_traffic_shows_exactly_what_is_documented(
    shop: bundle.Bundle, start_service: StartService, embedded_server: EmbeddedServer
) -> None:
    given = {"artifacts": shop.path.parents[1], "redis_url": embedded_server.url, "namespace": "documented"}
    one, two = start_service(**given), start_service(**given, workers=2)
    one.wait_until_ready()
    wait_for_workers(two)
    for service in (one, two):
        some_traffic(service.url)
        wait_until(lambda url=service.url: shown(scrape(url)) == documented(), 5)  # type: ignore[misc]
        assert shown(scrape(service.url)) == documented()
    assert {name for name in scrape(one.url).types if not name.startswith(("python_", "process_"))} == set(documented())
    check_values(scrape(two.url), shop)


def check_values(scraped: Scrape, shop: bundle.Bundle) -> None:
    """What is known of models and reference is there once, however many workers say it."""
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
    # Of 4 bins among 11 looks: the quantile of chi-square for 3 degrees of freedom at 1 - 0.01 / 11, 16.46.
    assert scraped.value("propensity_drift_critical", feature="device") == pytest.approx(16.46, rel=0.01)


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


def test_counts_of_two_workers_together_are_those_of_numpy(
    shop: bundle.Bundle,
    start_service: StartService,
    embedded_server: EmbeddedServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    service = start_service(
        workers=2, artifacts=shop.path.parents[1], redis_url=embedded_server.url, namespace="counted"
    )
    wait_for_workers(service)
    requests, matrix = random_requests(shop, 4000)
    wrong = {"visitor_id": "wrong", "features": {"views_1d": "many"}}
    parts = [[*requests[first : first + 100], wrong] for first in range(0, 3800, 100)]
    with ThreadPoolExecutor(4) as pool:
        answers = [
            result
            for part in pool.map(lambda part: post(service.url, "/v1/score/batch", {"visitors": part}), parts)
            for result in part["results"]
            if "error" not in result
        ]
        answers += pool.map(lambda request: post(service.url, "/v1/score", request), requests[3800:])
    assert all(count > 5 for count in sorted(served(tmp_path).values())[1:]), "both workers have work; one is to spare"
    scores = shop.predict(matrix)
    assert [answer["propensity"] for answer in answers] == [float(f"{score:.6g}") for score in scores.tolist()]
    by_bin = {"name": "propensity_feature_bin_total", "model": "shop", "version": "1"}
    wait_until(lambda: scrape(service.url).value(**by_bin, feature=bins.SCORE) >= 4000, 5)
    scraped = scrape(service.url)
    for column, (name, described) in enumerate([*shop.reference.features.items(), (bins.SCORE, shop.reference.score)]):
        values = scores if name == bins.SCORE else matrix[:, shop.spec.names.index(name)]
        texts = bins.texts(described, shop.spec.features.get(name))
        wanted = dict(zip(texts, in_bins(described, values), strict=True))
        assert scraped.by("bin", **by_bin, feature=name) == wanted, column
    assert scraped.value("propensity_scores_total", model="shop") == 4000
    assert scraped.value("propensity_scores_without_history_total", model="shop") == 4000
    assert scraped.value("propensity_scores_capped_total", model="shop") == 0


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
    places = ("/", "/v1/visitors/", "/v1/models/", "/v2/models/", "/v1/score/", "/metrics/", "/docs/")
    methods = ("GET", "GET", "GET", "POST", "DELETE", "SEARCH", "REPORT")
    return [request(chance.choice(methods), chance.choice(places) + spelled(chance)) for _ in range(count)]


def random_scores(chance: random.Random, count: int) -> list[bytes]:
    """Of visitors whom nobody knows, some by models that do not exist, or with a context that nobody reads."""
    extra: list[dict[str, object]] = [
        {},
        {"model": spelled(chance)},
        {"context": {spelled(chance): spelled(chance), "referrer": spelled(chance)}},
        {"features": {spelled(chance): 1}},
        {"model": "shop", "features": {"device": spelled(chance)}},
    ]
    return [request("POST", "/v1/score", {"visitor_id": spelled(chance), **chance.choice(extra)}) for _ in range(count)]


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

    return [request("POST", "/v1/events", {"batch": [one() for _ in range(1000)]}) for _ in range(count // 1000)]


def test_ten_thousand_random_paths_and_ids_leave_the_number_of_series_as_it_is(service: ServiceProcess) -> None:
    chance = random.Random(3)

    def ask(count: int) -> int:
        thousands = -(-count // 1000) * 1000
        exchange(service, random_paths(chance, count))
        exchange(service, random_scores(chance, count))
        exchange(service, random_events(chance, thousands))
        return len(read(httpx2.get(f"{service.url}/metrics").text).samples)

    ask(200)
    assert ask(200) == ask(RANDOM_THINGS)
