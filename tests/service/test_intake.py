"""What of events is counted: lag, kinds, properties, and why some were refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from service import ingest, intake, metrics
from service.core import spec
from service.ingest import Catalogue, Refused
from service.intake import Intake

NOW_MS = 1_767_225_600_000
DOCUMENT: dict[str, Any] = {
    "model": "m",
    "events": {
        "view": {"code": 7, "event": "Product Viewed", "value": "price", "attribute": "category"},
        "cart": {"code": 2, "event": "Product Added", "value": "price"},
        "login": {"code": 9, "event": "Signed In"},
        "rate": {"code": 4, "event": "Rated", "value": "stars", "attribute": "stars"},
        "unknown": {"code": 5, "event": "Unknown Thing"},
    },
    "features": {"views": {"count": "view"}, "device": {"trait": "device", "categories": ["mobile"]}},
}


@pytest.fixture
def counted() -> Iterator[Intake]:
    """Counts that begin at 0."""
    metrics.tell()
    for metric in (metrics.EVENTS_BY_KIND, metrics.EVENT_PROPERTIES):
        metric.clear()
    metrics.events_by_kind.cache_clear()
    yield Intake(catalogue())


def catalogue() -> Catalogue:
    return ingest.catalogue([spec.parse(DOCUMENT)])


def take(counted: Intake, *batch: object) -> None:
    counted.add(batch, [ingest.parse(catalogue(), event, NOW_MS) for event in batch], NOW_MS)
    counted.tell()
    metrics.tell()


def event(name: str, **members: object) -> dict[str, object]:
    return {"event": name, "userId": "a", **members}


def counts(metric: Any) -> dict[tuple[str, ...], float]:
    """Values by labels, zeros left out."""
    return {labels: child._value.get() for labels, child in metric._metrics.items() if child._value.get()}


def test_events_are_counted_by_their_kind_in_the_catalogue(counted: Intake) -> None:
    take(
        counted,
        *(event("Product Viewed"), event("Product Viewed"), event("Product Added"), event("Signed In")),
        *(event("Nobody Knows"), event("Nobody Knows", context={"device": "mobile"}), event("Unknown Thing")),
        *({"type": "page", "name": "Home", "userId": "a"}, {"type": "page", "name": "Signed In", "userId": "a"}),
        *({"type": "identify", "userId": "a", "traits": {"device": "mobile"}}, {"type": "screen", "userId": "a"}),
        *(event("Product Viewed", userId=""), 7),
    )
    assert counts(metrics.EVENTS_BY_KIND) == {
        ("view",): 2,
        ("cart",): 1,
        ("login",): 2,
        ("unknown",): 3,
        ("unknown (catalogue)",): 1,
    }


def test_the_properties_that_the_catalogue_names_are_present_or_missing(counted: Intake) -> None:
    take(
        counted,
        event("Product Viewed", properties={"price": "1.5", "category": 3, "other": 1}),
        event("Product Viewed", properties={"price": "cheap", "category": ""}),
        event("Product Viewed", properties={"price": 0}),
        event("Product Added"),
        event("Signed In", properties={"price": 1}),
        event("Rated", properties={"stars": "five"}),
        event("Nobody Knows", properties={"price": 1}),
    )
    assert counts(metrics.EVENT_PROPERTIES) == {
        ("view", "price", "present"): 2,
        ("view", "price", "missing"): 1,
        ("view", "category", "present"): 1,
        ("view", "category", "missing"): 2,
        ("cart", "price", "missing"): 1,
        ("rate", "stars", "present"): 1,
    }


def test_all_kinds_and_properties_are_there_from_the_start(counted: Intake) -> None:
    assert len(metrics.EVENTS_BY_KIND._metrics) == 6
    assert len(metrics.EVENT_PROPERTIES._metrics) == 2 * 4


def lags(counted: Intake, *timestamps: object) -> list[float]:
    """How many events fell into each bucket of the lag, and the sum of the lags last."""
    before = [bucket.get() for bucket in metrics.EVENT_LAG._buckets]
    before_s = metrics.EVENT_LAG._sum.get()
    take(counted, *(event("Signed In", timestamp=timestamp) for timestamp in timestamps))
    now = [bucket.get() for bucket in metrics.EVENT_LAG._buckets]
    grown = [later - earlier for later, earlier in zip(now, before, strict=True)]
    return [*grown, round(metrics.EVENT_LAG._sum.get() - before_s, 1)]


def test_only_events_of_the_future_have_a_lag_below_zero(counted: Intake) -> None:
    found = lags(counted, NOW_MS + 1, NOW_MS + 60_000, NOW_MS, None, NOW_MS - 5_000)
    assert found == [2, 2, 0, 1, *[0] * 11, -55.0]


def test_late_events_are_told_apart_up_to_ninety_days(counted: Intake) -> None:
    days = [NOW_MS - number * 86_400_000 for number in (0.5, 2, 20, 80, 400)]
    assert lags(counted, *days)[:-1] == [*[0] * 9, 1, 1, 0, 1, 1, 1]


def test_events_with_traits_alone_have_a_lag_too(counted: Intake) -> None:
    before = metrics.EVENT_LAG._sum.get()
    take(counted, {"type": "identify", "userId": "a", "traits": {"device": "x"}, "timestamp": NOW_MS - 2_000})
    assert metrics.EVENT_LAG._sum.get() - before == pytest.approx(2, abs=0.001)


def test_refused_events_are_counted_by_reason(counted: Intake) -> None:
    before = counts(metrics.EVENTS_REFUSED)
    counted.add([{}, {}, {}], [Refused("size", ""), Refused("unfit", ""), Refused("size", "")], NOW_MS)
    metrics.tell()
    now = counts(metrics.EVENTS_REFUSED)
    assert {key: now[key] - before.get(key, 0) for key in now if now[key] != before.get(key)} == {
        ("size",): 2,
        ("unfit",): 1,
    }
    assert counts(metrics.EVENTS_BY_KIND) == {}


def test_events_do_not_pile_up_until_they_are_told(counted: Intake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "_COUNTED_TOGETHER", 10)
    seen = ingest.parse(catalogue(), event("Signed In"), NOW_MS)
    for _ in range(25):
        counted.add([{}], [seen], NOW_MS)
    assert counted._waiting == 5
    assert counts(metrics.EVENTS_BY_KIND) == {("login",): 20}
