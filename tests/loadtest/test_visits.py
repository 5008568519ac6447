"""Owns the promise that simulated visitors come by a power law and send what the shop's catalogue knows."""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from pathlib import Path
from random import Random

import pytest

from loadtest import shapes, visits
from loadtest.visits import Population
from service import ingest
from service.core.spec import FeatureSpec
from training import specfile

SHOP: FeatureSpec = specfile.load(Path(__file__).parents[2] / "examples" / "shop.yaml")
NOW_MS = 1_790_000_000_000


def test_visitors_come_as_often_as_their_rank_says() -> None:
    population, rng = Population(100, 1.0), Random(1)
    found = Counter(population.pick(rng) for _ in range(50_000))
    whole = sum(1 / rank for rank in range(1, 101))
    for rank in (1, 2, 10, 50):
        assert found[f"visitor-{rank}"] / 50_000 == pytest.approx(1 / rank / whole, rel=0.15)
    assert set(found) == {f"visitor-{rank}" for rank in range(1, 101)}


def test_an_exponent_of_zero_makes_all_alike() -> None:
    population, rng = Population(10, 0), Random(1)
    found = Counter(population.pick(rng) for _ in range(20_000))
    assert max(found.values()) < 1.15 * min(found.values())


def test_given_ids_are_the_population() -> None:
    population = Population(1_000_000, 2.0, ["a", "b"])
    assert Counter(population.pick(Random(seed)) for seed in range(200)).most_common(1)[0][0] == "a"
    assert {population.pick(Random(seed)) for seed in range(200)} == {"a", "b"}


def test_a_visit_opens_the_home_page_and_then_products_of_the_catalogue() -> None:
    rng, names = Random(3), {event.event for event in SHOP.events.values()}
    seen: Counter[str] = Counter()
    for _ in range(300):
        visit = visits.begin(rng, Population(10, 1.0), 0.5)
        first = visits.open_page(visit, rng, NOW_MS)
        assert [event["name"] for event in first] == [visits.HOME]
        while visit.pages:
            events = visits.open_page(visit, rng, NOW_MS)
            assert visits.VIEW in [event["event"] for event in events]
            seen.update(event["event"] for event in events)
            assert all(visits.is_counted(event, names) for event in events)
    assert set(seen) == names - {visits.HOME}
    assert seen[visits.CART] / seen[visits.VIEW] == pytest.approx(visits.CART_SHARE, abs=0.04)


def test_the_service_keeps_every_event_of_a_visit() -> None:
    catalogue, rng = ingest.catalogue([SHOP]), Random(4)
    for _ in range(50):
        visit = visits.begin(rng, Population(10, 1.0), 0.5)
        while visit.pages:
            for event in visits.open_page(visit, rng, NOW_MS):
                assert isinstance(ingest.parse(catalogue, event, NOW_MS), ingest.Accepted)


def test_somebody_new_is_nobody_else() -> None:
    rng = Random(5)
    found = [visits.begin(rng, Population(10, 1.0), 1.0) for _ in range(100)]
    assert all(visit.is_new for visit in found)
    assert len({visit.visitor_id for visit in found}) == 100
    assert "anonymousId" in visits.open_page(found[0], rng, NOW_MS)[0]
    assert not visits.begin(rng, Population(10, 1.0), 0.0).is_new


def test_events_of_a_page_are_a_second_old_and_in_order() -> None:
    rng = Random(6)
    visit = visits.begin(rng, Population(10, 1.0), 0.0)
    for _ in range(200):
        times = [datetime.fromisoformat(event["timestamp"]) for event in visits.open_page(visit, rng, NOW_MS)]
        assert times == sorted(set(times))
        assert [round(1000 * (NOW_MS / 1000 - time.timestamp())) for time in times][0] == visits.EVENT_AGE_MS


@pytest.mark.parametrize(
    ("event", "is_counted"),
    [
        ({"type": "track", "event": "Product Viewed"}, True),
        ({"type": "track", "event": "Order Completed"}, False),
        ({"type": "page", "name": "Home Viewed"}, True),
    ],
)
def test_pages_count_as_page_viewed_and_other_events_only_by_name(event: visits.Event, is_counted: bool) -> None:
    assert visits.is_counted(event, {"Product Viewed", "Page Viewed"}) is is_counted


@pytest.mark.parametrize(
    ("shape", "visitors"),
    [
        ("steady", [100, 100, 100, 100, 100]),
        ("ramp", [1, 25, 50, 75, 99]),
        ("spike", [20, 20, 100, 20, 20]),
        ("soak", [1, 100, 100, 100, 100]),
    ],
)
def test_each_shape_has_its_course(shape: str, visitors: list[int]) -> None:
    assert [shapes.users(shape, elapsed_s, 100, 100) for elapsed_s in (0, 25, 50, 75, 99)] == visitors
    assert shapes.users(shape, 100, 100, 100) is None


def test_every_shape_reaches_its_peak_and_never_more() -> None:
    for shape in shapes.SHAPES:
        course = [shapes.users(shape, second, 60, 40) or 0 for second in range(60)]
        assert max(course) in (39, 40), shape
        assert min(course) >= 1
