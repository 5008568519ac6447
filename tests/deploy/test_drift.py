"""Drift in a real Prometheus: the numbers of the formulas, and those of the same scores in files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loadtest import prove_drift
from service.core import bundle, drift
from service.core.bundle import Bins
from service.embedded import EmbeddedServer
from tests.cli.test_commands import propensity
from tests.conftest import ServiceProcess, StartService, WriteBundle, wait_until
from tests.deploy.prometheus import Exposition, Prometheus, counters, scraping, watched
from tests.service.test_metrics import REFERENCE, post, random_requests
from tests.service.test_workers import wait_for_workers

FEATURE = ("model", "version", "feature")
LABELS = (*FEATURE, "bin")
Counts = Mapping[tuple[str, str, str], npt.NDArray[np.int64]]


def described(features: Mapping[tuple[str, str, str], tuple[Bins, float]]) -> str:
    """What a service says of its references."""
    shares = {(*at, str(place)): s for at, (bins, _) in features.items() for place, s in enumerate(bins.shares)}
    named = {(*labels[:3], "missing" if labels[3] == "0" else labels[3]): value for labels, value in shares.items()}
    return (
        counters("propensity_reference_share", named, *LABELS)
        + counters("propensity_reference_rows", {at: bins.rows for at, (bins, _) in features.items()}, *FEATURE)
        + counters("propensity_drift_critical", {at: critical for at, (_, critical) in features.items()}, *FEATURE)
    )


def counted(counts: Counts, factor: int = 1) -> str:
    """What it has counted."""
    named = {
        (*at, "missing" if place == 0 else str(place)): factor * int(count)
        for at, own in counts.items()
        for place, count in enumerate(own)
    }
    return counters("propensity_feature_bin_total", named, *LABELS)


def agree(prometheus: Prometheus, window: str, expected: Mapping[Any, float]) -> bool:
    """Whether the PSI that Prometheus has is what is expected, to 1e-6."""
    found = prometheus.values(f"propensity:psi:{window}", *FEATURE)
    return set(found) == set(expected) and all(abs(found[at] - value) < 1e-6 for at, value in expected.items())


def of_all(replicas: list[Exposition], counts: Counts, population: Mapping[Any, float]) -> bool:
    """Whether the counts of all replicas are seen: the shares are the same as soon as those of one are."""
    return all(population[at] > len(replicas) * own.sum() - 1e-3 for at, own in counts.items())


def count_in(
    prometheus: Prometheus, replicas: list[Exposition], text: str, counts: Counts, expected: Mapping[Any, float]
) -> None:
    """Have Prometheus see that the counts rise from 0, in each replica.

    All have the same counts: `increase` extrapolates by the moments of a replica's scrapes, alike for all its bins and
    not for those of another.
    """
    for replica in replicas:
        replica.text = text + counted(counts, 0)
    wait_until(lambda: len(prometheus.query("count by (instance) (propensity_feature_bin_total)")) == len(replicas))
    for replica in replicas:
        replica.text = text + counted(counts)

    def is_seen() -> bool:
        population = prometheus.values("propensity:feature_population:1h", *FEATURE)
        return agree(prometheus, "1h", expected) and of_all(replicas, counts, population)

    wait_until(is_seen, 30)


@pytest.fixture
def two_workers(
    tmp_path: Path, write_bundle: WriteBundle, embedded_server: EmbeddedServer, start_service: StartService
) -> ServiceProcess:
    """A service of two workers with the model `shop` in `artifacts` beside its log."""
    artifacts = write_bundle(tmp_path / "artifacts", reference=REFERENCE).parents[1]
    service = start_service(artifacts=artifacts, redis_url=embedded_server.url, namespace="drift", workers=2)
    wait_for_workers(service)
    return service


def test_prometheus_and_files_of_what_two_workers_scored_give_the_same_drift(
    tmp_path: Path, two_workers: ServiceProcess
) -> None:
    artifacts = tmp_path / "artifacts"
    model = bundle.load(artifacts / "shop" / "1")
    requests, matrix = random_requests(model, 900)
    for one in requests:
        cast("dict[str, float]", one["features"])["loyalty"] = 1
    matrix[:, model.spec.names.index("loyalty")] = 1  # all values are in its one bin
    scores = model.predict(matrix)
    table = pa.table({**dict(zip(model.spec.names, matrix.T, strict=True)), "propensity": scores})
    pq.write_table(table.slice(0, 500), tmp_path / "first.parquet")
    rest = [{name: None if value != value else value for name, value in row.items()} for row in table.to_pylist()[500:]]
    (tmp_path / "rest.ndjson").write_text("".join(json.dumps(row) + "\n" for row in rest), "utf-8")
    files = ("--offline", tmp_path / "first.parquet", "--offline", tmp_path / "rest.ndjson")
    offline = propensity("drift", *files, "--artifacts", artifacts, "--json")
    expected = {(line["model"], line["version"], line["feature"]): line["psi"] for line in json.loads(offline.out)}
    alarms = 'ALERTS{alertname="PropensityFeatureDrift", window="1h"}'

    (tmp_path / "prometheus").mkdir()
    with scraping(tmp_path / "prometheus", [two_workers.url.removeprefix("http://")]) as prometheus:
        wait_until(lambda: bool(prometheus.query("propensity_feature_bin_total")))
        assert not prometheus.query(alarms)
        for first in range(0, 900, 100):
            post(two_workers, "/v1/score/batch", {"visitors": requests[first : first + 100]})
        wait_until(lambda: agree(prometheus, "1h", expected) and agree(prometheus, "24h", expected), 30)
        wait_until(lambda: len(prometheus.query(alarms)) == sum(line["drifts"] for line in json.loads(offline.out)) - 1)
        online = propensity("drift", "--prometheus", prometheus.url, "--json")
        shown = propensity("drift", "--prometheus", prometheus.url, "--window", "24h")
        firing = prometheus.values(alarms, "feature", "alertstate")
        unknown = propensity("drift", "--prometheus", prometheus.url, "--model", "other")

    assert (online.status, offline.status) == (1, 1), online.err + offline.err
    first_lines, second_lines = json.loads(online.out), json.loads(offline.out)
    assert [line["feature"] for line in first_lines] == sorted([*model.spec.names, drift.SCORE])
    for one, other in zip(first_lines, second_lines, strict=True):
        for number in ("psi", "floor", "missing", "reference_missing"):
            assert one[number] == pytest.approx(other[number], abs=1e-6), (one["feature"], number)
        assert (one["feature"], one["drifts"]) == (other["feature"], other["drifts"])
        assert other["population"] == 900
        assert 899 < one["population"] < 1_850, "increase extrapolates to the window's end"
    drifting = {line["feature"] for line in second_lines if line["drifts"]}
    assert "views_1d" in drifting
    assert "loyalty" not in drifting
    assert set(firing) == {(feature, "firing") for feature in drifting - {drift.SCORE}}
    assert "drifts" in shown.out
    assert "no propensity:psi:1h" in unknown.complaint


def test_simulated_hours_have_the_numbers_and_the_verdicts_of_the_formulas_in_prometheus(tmp_path: Path) -> None:
    random = np.random.default_rng(4)
    features = prove_drift.population(random)
    described_hours: dict[tuple[str, str, str], tuple[Bins, float]] = {}
    counts: dict[tuple[str, str, str], npt.NDArray[np.int64]] = {}
    watched_by: dict[tuple[str, str, str], prove_drift.Watched] = {}
    for hour, size in enumerate((100, 300, 1_000, 10_000)):
        for place, one in enumerate(prove_drift.watch(features, random, 2_000)):
            at = (
                f"hour {hour}",
                "1",
                f"{place} {one.feature.name}" if one.feature.name != drift.SCORE else drift.SCORE,
            )
            moved = place % 6 == hour and one.moved is not None
            chances = one.moved if moved and one.moved is not None else one.chances
            if place % 6 == 5 and hour == 1:
                chances = prove_drift.gone(one)
            counts[at] = random.multinomial(size, chances)
            described_hours[at] = (one.bins, one.critical)
            watched_by[at] = one
    expected = {at: drift.psi(own, watched_by[at].bins.shares) for at, own in counts.items()}
    with watched(tmp_path, 2) as (prometheus, replicas):
        count_in(prometheus, replicas, described(described_hours), counts, expected)
        found: dict[str, dict[tuple[str, ...], float]] = {}

        def are_read() -> bool:
            """Whether rules that read what other groups recorded have seen the last counts; keeps what all say."""
            moment_s = time.time() - 2
            for name in ("psi", "drift_threshold", "missing_share", "missing_threshold", "feature_population"):
                found[name] = prometheus.values(f"propensity:{name}:1h", *FEATURE, at_s=moment_s)
            before = prometheus.values("propensity:feature_population:1h", *FEATURE, at_s=moment_s - 2)
            return all(set(values) == set(counts) for values in (before, *found.values())) and of_all(
                replicas, counts, before
            )

        wait_until(are_read)
    floor, per_visitor = drift.WINDOWS["1h"]
    verdicts = set()
    for at, own in counts.items():
        one, seen = watched_by[at], found["feature_population"][at]
        assert found["psi"][at] == pytest.approx(expected[at], abs=1e-6)
        assert found["missing_share"][at] == pytest.approx(own[0] / own.sum(), abs=1e-6)
        chance = drift.chance_level(one.critical, seen, one.bins.rows, per_visitor)
        assert found["drift_threshold"][at] == pytest.approx(chance + floor, rel=1e-6)
        size = len(replicas) * own.sum()  # and up to twice that, by what increase extrapolates
        highest, lowest = (
            drift.missing_threshold(one.bins.shares[0], population, one.bins.rows, per_visitor)
            for population in (size, 2 * size)
        )
        assert lowest - 1e-6 < found["missing_threshold"][at] < highest + 1e-6
        verdicts.add(found["psi"][at] > found["drift_threshold"][at])
    assert verdicts == {True, False}
