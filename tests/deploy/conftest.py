"""A real Prometheus with the shipped rules beside real services, and visitors who are like the training population."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import numpy.typing as npt
import pytest
from prometheus_client.mmap_dict import MmapedDict

from service.core import bundle, spec
from service.embedded import EmbeddedServer
from tests.conftest import SHOP, ServiceProcess, WriteBundle, wait_until
from tests.deploy.prometheus import SCRAPE_S, Prometheus, program
from training import reference

Rows = npt.NDArray[np.float32]  # [n, F]
Scores = npt.NDArray[np.float32]  # [n]


def population(rows: int, seed: int) -> Rows:
    """Feature rows float32[rows, F] of the shop's model, of independent features, some of them missing."""
    random = np.random.default_rng(seed)
    matrix = np.column_stack(
        [
            random.poisson(2, rows),
            random.poisson(8, rows),
            random.poisson(1, rows),
            random.gamma(2, 30, rows),
            random.integers(0, 6, rows),
            np.where(random.random(rows) < 0.1, np.nan, random.exponential(3600, rows)),
            random.beta(1, 19, rows),
            random.integers(0, 3, rows),
            np.where(random.random(rows) < 0.3, np.nan, random.normal(0, 1, rows)),
            random.integers(0, 3, rows),
        ]
    )
    return matrix.astype(np.float32)


@dataclass
class Shop:
    """Two services that share a feature cache, the first of them with two workers."""

    services: list[ServiceProcess]
    model: bundle.Bundle
    prometheus: Prometheus
    counts: Path  # where the workers of the first service keep what they count

    def workers_that_scored(self) -> int:
        """How many workers of the first service have counted scores."""
        counted = 0
        for path in self.counts.glob("counter_*.db"):
            values = MmapedDict.read_all_values_from_file(str(path))  # type: ignore[no-untyped-call]
            counted += any(value > 0 and '"propensity_feature_bin_total"' in key for key, value, *_ in values)
        return counted

    def score(self, matrix: Rows, services: Sequence[ServiceProcess]) -> Scores:
        """The scores of feature rows, a part of them asked from each service."""
        parts = np.array_split(matrix, 12)
        urls = [services[place % len(services)].url for place in range(len(parts))]
        with ThreadPoolExecutor(4) as pool:
            return np.concatenate(list(pool.map(self._batch, urls, parts)))

    def _batch(self, url: str, matrix: Rows) -> Scores:
        visitors = [self._visitor(f"visitor-{number}", row) for number, row in enumerate(matrix)]
        # each on a connection of its own, so that the kernel gives some to either worker
        answer = httpx2.post(f"{url}/v1/score/batch", json={"visitors": visitors}, timeout=30)
        assert answer.status_code == 200, answer.text
        return np.array([one["propensity"] for one in answer.json()["results"]], np.float32)

    def _visitor(self, name: str, row: Rows) -> dict[str, Any]:
        values = [None if np.isnan(value) else float(value) for value in row]
        return {"visitor_id": name, "features": dict(zip(self.model.spec.names, values, strict=True))}

    def browse(self) -> None:
        """Send what senders send, good and bad, and ask for single scores, for some seconds."""
        for seed in range(3):
            for service in self.services:
                with httpx2.Client(base_url=service.url) as client:
                    sent = client.post("/v1/events", json={"batch": events()})
                    assert sent.status_code == 200, sent.text
                    assert client.get("/nowhere").status_code == 404
                    for place, row in enumerate(population(10, seed)):
                        scored = client.post("/v1/score", json=self._visitor(f"shopper-{place}", row))
                        assert scored.status_code == 200, scored.text
            time.sleep(SCRAPE_S)


def events() -> list[dict[str, Any]]:
    """Events of every kind that the dashboards tell apart."""
    now = datetime.now(UTC)
    moments = {"now": now, "future": now + timedelta(hours=2), "late": now - timedelta(days=2)}
    sound = [
        {"event": "Product Viewed", "timestamp": moments["now"], "properties": {"price": 9, "category": "shoes"}},
        {"event": "Product Added", "timestamp": moments["late"], "properties": {"price": 9, "category": "shoes"}},
        {"event": "Product Viewed", "timestamp": moments["future"], "properties": {}},
        {"type": "page", "name": "Home", "timestamp": moments["now"]},
        {"event": "Newsletter Read", "timestamp": moments["now"]},
    ]
    bad: list[dict[str, Any]] = [{"event": "Product Viewed", "timestamp": "yesterday"}, {"type": "track"}]
    return [
        {"userId": f"shopper-{number % 10}", "messageId": f"{number}-{time.time_ns()}", **written(event)}
        for number, event in enumerate([*sound, *sound, *bad])
    ]


def written(event: dict[str, Any]) -> dict[str, Any]:
    """An event with its moment as text."""
    return {key: value.isoformat() if isinstance(value, datetime) else value for key, value in event.items()}


@pytest.fixture(scope="module")
def shop_model(tmp_path_factory: pytest.TempPathFactory, write_bundle: WriteBundle) -> bundle.Bundle:
    """The shop's model with a reference of 20,000 rows of its population, as training would describe them."""
    directory = write_bundle(tmp_path_factory.mktemp("observed"), weight=0.001)
    matrix = population(20_000, seed=1)
    scores = bundle.load(directory).predict(matrix)
    described = reference.describe(spec.parse(SHOP), matrix, scores)
    (directory / "reference.json").write_text(described.model_dump_json(), encoding="utf-8")
    manifest = json.loads((directory / "manifest.json").read_text("utf-8"))
    bundle.seal(directory, {key: manifest[key] for key in manifest if key not in ("format", "files", "seal")})
    return bundle.load(directory)


@pytest.fixture(scope="module")
def shop(
    tmp_path_factory: pytest.TempPathFactory, embedded_server: EmbeddedServer, shop_model: bundle.Bundle
) -> Iterator[Shop]:
    """Services and Prometheus, before the first request; what each has counted is 0 at the first scrape."""
    program("prometheus")
    directory = tmp_path_factory.mktemp("shop")
    given = {
        "redis_url": embedded_server.url,
        "artifacts": shop_model.path.parents[1],
        "namespace": "observed",
    }
    counts = directory / "counts"
    counts.mkdir()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PROMETHEUS_MULTIPROC_DIR", str(counts))
        services = [ServiceProcess(directory, workers=2, **given)]
    services.append(ServiceProcess(directory, workers=1, **given))
    started: list[Prometheus] = []
    try:
        # it takes five seconds until it scrapes, as long as the services take to start
        started.append(Prometheus(directory / "prometheus", [f"127.0.0.1:{service.port}" for service in services]))
        for service in services:
            service.wait_until_ready()
        bins = "count by (instance) (propensity_feature_bin_total)"
        wait_until(lambda: len(started[0].query(bins)) == len(services))
        assert started[0].query("propensity_feature_bin_total > 0") == []
        yield Shop(services, shop_model, started[0], counts)
    finally:
        for one in started:
            one.end()
        for service in services:
            service.end()
