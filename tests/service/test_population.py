"""What of scores is counted for drift, and what is not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from service import metrics, population
from service.core import bins, bundle, events
from service.core.bundle import Bundle
from service.history import History
from service.population import Population, Rows
from service.scoring import Batch, ScoreRequest, score_by_model
from tests.conftest import SHOP, WriteBundle

NOW_MS = 1_767_225_600_000
LIMIT = 5


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, write_bundle: WriteBundle) -> Bundle:
    """A model of a name of its own, so that nothing else has been counted for it."""
    document = {**SHOP, "model": "counted", "limits": {"records": LIMIT}}
    return bundle.load(write_bundle(tmp_path_factory.mktemp("counted"), document))


@pytest.fixture
def counted(loaded: Bundle) -> Iterator[Population]:
    """Counts that begin at 0."""
    for metric in (
        metrics.FEATURE_BINS,
        metrics.LAST_EVENT_AGE,
        metrics.SCORES_CAPPED,
        metrics.SCORES_WITHOUT_HISTORY,
        metrics.EARLIER_EVENTS,
    ):
        for labels in [labels for labels in metric._metrics if labels[0] == "counted"]:
            metric.remove(*labels)
    yield Population(loaded)


def in_bins(feature: str) -> dict[str, float]:
    """The counts of a feature's bins."""
    counters: Any = metrics.FEATURE_BINS._metrics
    return {
        text: counter._value.get()
        for (model, _, name, text), counter in counters.items()
        if (model, name) == ("counted", feature)
    }


def value(metric: Any) -> float:
    counted: float = metric.labels("counted")._value.get()
    return counted


def views(count: int, age_ms: int) -> History:
    """So many events, the newest of that age."""
    records = [events.pack(NOW_MS - age_ms - place * 1000, 1, place + 1, 0, 1.0) for place in range(count)]
    return History(b"".join(records), b"")


def score(
    loaded: Bundle, counted: Population, histories: list[History], degraded: tuple[str, ...] = (), **features: object
) -> None:
    requests = [ScoreRequest(f"v{place}", features=features) for place in range(len(histories))]
    score_by_model(loaded, Batch(requests, histories, NOW_MS, degraded), counted)
    counted.tell()


def test_all_bins_are_there_from_the_start(counted: Population, loaded: Bundle) -> None:
    assert {feature: in_bins(feature) for feature in (*loaded.spec.names, bins.SCORE)} == dict.fromkeys(
        (*loaded.spec.names, bins.SCORE), {"missing": 0, "below 1": 0, "from 1": 0}
    )


def test_the_features_of_each_visitor_and_the_score_are_in_one_bin_each(counted: Population, loaded: Bundle) -> None:
    score(loaded, counted, [views(0, 0), views(2, 1000), views(3, 1000)])
    assert in_bins("views_90d") == {"missing": 0, "below 1": 1, "from 1": 2}
    assert in_bins("since_view") == {"missing": 1, "below 1": 0, "from 1": 2}
    assert in_bins("referrer") == {"missing": 3, "below 1": 0, "from 1": 0}
    assert in_bins(bins.SCORE) == {"missing": 0, "below 1": 3, "from 1": 0}


def test_values_of_a_request_count_as_the_model_got_them(counted: Population, loaded: Bundle) -> None:
    score(loaded, counted, [views(2, 1000)], views_90d=0, loyalty=7)
    assert in_bins("views_90d") == {"missing": 0, "below 1": 1, "from 1": 0}
    assert in_bins("loyalty") == {"missing": 0, "below 1": 0, "from 1": 1}


def test_what_is_known_of_visitors_is_counted(counted: Population, loaded: Bundle) -> None:
    score(loaded, counted, [views(0, 0), views(0, 0), views(4, 3_000), views(LIMIT, 100_000), views(9, 100_000)])
    assert value(metrics.SCORES_WITHOUT_HISTORY) == 2
    assert value(metrics.SCORES_CAPPED) == 2
    ages = metrics.LAST_EVENT_AGE.labels("counted")
    assert ages._sum.get() == pytest.approx(203)
    assert [bucket.get() for bucket in ages._buckets] == [0, 0, 0, 1, 0, 2, *[0] * 9]


def earlier_events() -> dict[str, float]:
    """The earlier events of whom `counted` scored, by window."""
    counters: Any = metrics.EARLIER_EVENTS._metrics
    return {window: one._value.get() for (model, _, window), one in counters.items() if model == "counted"}


def test_events_of_half_a_window_before_a_score_are_counted_without_the_newest(
    counted: Population, loaded: Bundle
) -> None:
    half_ms = population.HALF_WINDOWS_MS["1h"]
    assert earlier_events() == {"1h": 0, "24h": 0}
    score(loaded, counted, [views(0, 0), views(1, 0), views(4, half_ms - 2_500), views(3, 2 * half_ms), views(2, -1)])
    assert earlier_events() == {"1h": 2, "24h": 3 + 2}


def test_they_tell_how_many_scores_a_visitor_has_where_each_event_is_scored(
    counted: Population, loaded: Bundle
) -> None:
    visits = [1, 2, 12]
    for events_so_far in range(1, 13):
        score(loaded, counted, [views(events_so_far, 0) for visit in visits if visit >= events_so_far])
    scores_per_visitor = sum(visit**2 for visit in visits) / sum(visits)
    assert 1 + 2 * earlier_events()["1h"] / sum(visits) == pytest.approx(scores_per_visitor)


@pytest.mark.parametrize(("degraded", "features"), [(("store",), {}), ((), {"nonsense": 1})])
def test_rows_without_history_for_want_of_the_store_and_rows_without_an_answer_do_not_count(
    counted: Population, loaded: Bundle, degraded: tuple[str, ...], features: dict[str, object]
) -> None:
    score(loaded, counted, [views(0, 0), views(2, 1000)], degraded, **features)
    assert in_bins(bins.SCORE) == {"missing": 0, "below 1": 0, "from 1": 0}
    assert value(metrics.SCORES_WITHOUT_HISTORY) == 0


def test_beside_a_row_without_an_answer_the_others_count(counted: Population, loaded: Bundle) -> None:
    requests = [ScoreRequest("a"), ScoreRequest("b", features={"views_1d": "many"}), ScoreRequest("c")]
    score_by_model(loaded, Batch(requests, [views(1, 0), views(2, 0), views(0, 0)], NOW_MS), counted)
    counted.tell()
    assert in_bins("views_90d") == {"missing": 0, "below 1": 1, "from 1": 1}
    assert value(metrics.SCORES_WITHOUT_HISTORY) == 1
    score(loaded, counted, [views(3, 0)])
    assert earlier_events()["1h"] == 2


def test_rows_whose_histories_nobody_asked_for_count_by_their_features_alone(
    counted: Population, loaded: Bundle
) -> None:
    counted.add(Rows(np.zeros((3, len(loaded.spec.names)), np.float32), np.full(3, 0.5, np.float32)))
    counted.tell()
    assert in_bins("device") == {"missing": 0, "below 1": 3, "from 1": 0}
    assert value(metrics.SCORES_WITHOUT_HISTORY) == 0


def test_rows_do_not_pile_up_until_they_are_told(counted: Population, loaded: Bundle) -> None:
    row = np.zeros((1, len(loaded.spec.names)), np.float32)
    for _ in range(3 * population.COUNTED_TOGETHER + 1):
        counted.add(Rows(row, np.zeros(1, np.float32)))
    assert len(counted._waiting) == 1
    assert in_bins(bins.SCORE)["below 1"] == 0
    for _ in range(2):
        counted.tell()
        assert in_bins(bins.SCORE)["below 1"] == 3 * population.COUNTED_TOGETHER + 1


@pytest.mark.parametrize("created_at", ["2026-01-01", "long ago"])
def test_when_a_model_was_trained_is_said_if_it_can_be_read(
    tmp_path: Path, write_bundle: WriteBundle, created_at: str
) -> None:
    dated = bundle.load(write_bundle(tmp_path, {**SHOP, "model": "dated"}, created_at, created_at))
    metrics.set_model(dated, 0.1)
    assert (("dated", created_at) in metrics.MODEL_CREATED._metrics) == (created_at != "long ago")
    if created_at != "long ago":
        assert metrics.MODEL_CREATED.labels("dated", created_at)._value.get() == NOW_MS / 1000
