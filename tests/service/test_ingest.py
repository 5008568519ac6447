"""The rules that make records of events."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from service import ingest
from service.core import events, spec
from service.core.events import Records
from service.ingest import Accepted, Catalogue, CatalogueConflict, Ignored, Refused

NOW_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z


def document(**changes: Any) -> dict[str, Any]:
    return {
        "model": "shop",
        "events": {
            "view": {"code": 1, "event": "Product Viewed", "value": "price", "attribute": "category"},
            "page": {"code": 2, "event": "Page Viewed"},
            "home": {"code": 3, "event": "Home"},
        },
        "features": {
            "views": {"count": "view"},
            "device": {"trait": "device", "categories": ["mobile"]},
            "loyalty": {"trait": "loyalty"},
        },
        **changes,
    }


@pytest.fixture
def catalogue() -> Catalogue:
    return ingest.catalogue([spec.parse(document())])


def view(**members: Any) -> dict[str, Any]:
    return {"type": "track", "event": "Product Viewed", "userId": "u", "timestamp": NOW_MS, **members}


def only_event(catalogue: Catalogue, event: object) -> Any:
    outcome = ingest.parse(catalogue, event, NOW_MS)
    assert isinstance(outcome, Accepted), outcome
    [record] = sound(outcome.events)
    return record


def sound(blob: bytes) -> Records:
    records = events.from_bytes(blob)
    assert events.valid(records).all()
    return records


def test_a_track_event_leaves_one_record_with_all_its_parts(catalogue: Catalogue) -> None:
    event = view(messageId="m-1", properties={"price": 12.5, "category": "shoes"})
    outcome = ingest.parse(catalogue, event, NOW_MS)
    hashes = events.hash32("m-1"), events.hash32("shoes")
    assert outcome == Accepted("u", events.pack(NOW_MS, 1, *hashes, 12.5), b"")


def test_without_a_message_id_equal_content_at_one_instant_is_one_event(catalogue: Catalogue) -> None:
    same = [only_event(catalogue, view(properties={"price": price, "category": "a"})) for price in (1, 1.0, "1")]
    other = only_event(catalogue, view(properties={"price": 2, "category": "a"}))
    assert len({int(record["id"]) for record in same}) == 1
    assert other["id"] != same[0]["id"]
    assert same[0]["id"] == events.content_id(events.hash32("a"), 1.0)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ({"userId": "a", "anonymousId": "b"}, "a"),
        ({"userId": "", "anonymousId": "b"}, "b"),
        ({"userId": None, "anonymousId": "b"}, "b"),
        ({"userId": False, "anonymousId": "b"}, "b"),
        ({"userId": {"id": 1}, "anonymousId": "b"}, "b"),
        ({"userId": 17}, "17"),
        ({"userId": 17.0}, "17"),
        ({"userId": "ü{}:*\n"}, "ü{}:*\n"),
    ],
)
def test_the_visitor_is_the_user_or_else_the_anonymous_one(
    catalogue: Catalogue, members: dict[str, Any], expected: str
) -> None:
    outcome = ingest.parse(catalogue, view(**members), NOW_MS)
    assert isinstance(outcome, Accepted)
    assert outcome.visitor_id == expected


@pytest.mark.parametrize(
    ("timestamp", "expected"),
    [
        ("2026-01-01T00:00:00Z", NOW_MS),
        ("2026-01-01T00:00:00.123456789Z", NOW_MS + 123),
        ("2026-01-01T00:00:00.9999Z", NOW_MS + 999),
        ("2026-01-01T02:30:00+02:30", NOW_MS),
        ("2026-01-01T02:30:00+0230", NOW_MS),
        ("2025-12-31T22:00:00-02", NOW_MS),
        ("2026-01-01 00:00", NOW_MS),
        ("2026-01-01", NOW_MS),
        (" 2026-01-01 ", NOW_MS),
        (NOW_MS, NOW_MS),
        (NOW_MS + 0.5, NOW_MS + 1),
        (NOW_MS // 1000, NOW_MS),
        (NOW_MS / 1000 + 0.25, NOW_MS + 250),
        (str(NOW_MS), NOW_MS),
        (0, 0),
        (None, NOW_MS),
        ("2026-01-02T00:00:00Z", NOW_MS + ingest.FUTURE_MS),
    ],
)
def test_a_timestamp_is_read_to_the_millisecond(catalogue: Catalogue, timestamp: object, expected: int) -> None:
    assert only_event(catalogue, view(timestamp=timestamp))["ts_ms"] == expected


def test_an_event_without_a_timestamp_happened_when_it_was_received(catalogue: Catalogue) -> None:
    event = view()
    del event["timestamp"]
    assert only_event(catalogue, event)["ts_ms"] == NOW_MS


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        ("text", "shape"),
        (None, "shape"),
        ([view()], "shape"),
        (view(properties=[1]), "shape"),
        (view(context="x"), "shape"),
        (view(traits=7), "shape"),
        (view(userId=""), "visitor"),
        (view(userId="x" * 257), "visitor"),
        (view(type="purchase"), "type"),
        (view(type=["track"]), "type"),
        (view(type=""), "type"),
        (view(event=""), "event"),
        (view(event=None), "event"),
        (view(event=7), "event"),
        (view(timestamp="yesterday"), "timestamp"),
        (view(timestamp="2026-13-01"), "timestamp"),
        (view(timestamp="2026-W01-1"), "timestamp"),
        (view(timestamp="0001-01-01T00:00:00+23:59"), "timestamp"),
        (view(timestamp=-1), "timestamp"),
        (view(timestamp=True), "timestamp"),
        (view(timestamp={}), "timestamp"),
        (view(timestamp=10**400), "timestamp"),
        (view(timestamp="9999-12-31T23:59:59-23:59"), "future"),
        (view(timestamp=NOW_MS + ingest.FUTURE_MS + 1), "future"),
        (view(timestamp=1e30), "future"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_its_reason(catalogue: Catalogue, event: object, reason: str) -> None:
    outcome = ingest.parse(catalogue, event, NOW_MS)
    assert isinstance(outcome, Refused)
    assert outcome.reason == reason
    assert outcome.message


@pytest.mark.parametrize(
    ("price", "expected"),
    [
        (12.5, 12.5),
        (-3, -3),
        ("12.5", 12.5),
        (" 1e3 ", 1000),
        (".5", 0.5),
        ("1_000", None),
        ("0x10", None),
        ("inf", None),
        ("٣", None),
        ("", None),
        (True, None),
        (None, None),
        ([1], None),
        (1e39, None),
        (10**400, None),
        ("1e999", None),
    ],
)
def test_a_value_is_a_number_or_the_spelling_of_one(
    catalogue: Catalogue, price: object, expected: float | None
) -> None:
    value = float(only_event(catalogue, view(properties={"price": price}))["value"])
    assert np.isnan(value) if expected is None else value == expected


@pytest.mark.parametrize(
    ("category", "text"),
    [
        ("shoes", "shoes"),
        (7, "7"),
        (7.0, "7"),
        (0.5, "0.5"),
        ("x" * 5000, "x" * 5000),
        (True, "true"),
        ("", None),
        (None, None),
        ({}, None),
        (float("inf"), None),
    ],
)
def test_an_attribute_is_the_hash_of_a_text(catalogue: Catalogue, category: object, text: str | None) -> None:
    attribute = only_event(catalogue, view(properties={"category": category}))["attribute"]
    assert attribute == (0 if text is None else events.hash32(text))


@pytest.mark.parametrize(
    ("members", "code"),
    [({"name": "Home"}, 3), ({"name": "Other"}, 2), ({}, 2), ({"name": ["Home"]}, 2), ({"event": "Home"}, 2)],
)
def test_a_page_is_known_by_its_name_and_else_as_page_viewed(
    catalogue: Catalogue, members: dict[str, Any], code: int
) -> None:
    event = {"type": "page", "userId": "u", "timestamp": NOW_MS, **members}
    assert only_event(catalogue, event)["kind"] == code


@pytest.mark.parametrize("sort", ["identify", "screen", "group", "alias"])
def test_other_types_leave_traits_only(catalogue: Catalogue, sort: str) -> None:
    event = {"type": sort, "event": "Product Viewed", "userId": "u", "timestamp": NOW_MS, "traits": {"loyalty": 3}}
    outcome = ingest.parse(catalogue, event, NOW_MS)
    trait = events.pack(NOW_MS, events.TRAIT_NUMBER, events.hash32("loyalty"), 0, 3)
    assert outcome == Accepted("u", b"", trait)


def test_an_event_of_no_model_is_ignored_unless_it_carries_a_trait(catalogue: Catalogue) -> None:
    assert isinstance(ingest.parse(catalogue, view(event="Newsletter Read"), NOW_MS), Ignored)
    outcome = ingest.parse(catalogue, view(event="Newsletter Read", context={"device": "mobile"}), NOW_MS)
    assert isinstance(outcome, Accepted)
    assert not outcome.events
    assert len(outcome.traits) == events.RECORD_BYTES


@pytest.mark.parametrize(
    ("traits", "context", "expected"),
    [
        ({"device": "mobile"}, {"device": "desktop"}, "mobile"),
        ({"device": None}, {"device": "desktop"}, "desktop"),
        ({}, {"device": 3.0}, "3"),
        ({}, {"device": True}, "true"),
        ({}, {"device": {"type": "phone"}}, None),
        ({"device": ""}, {"device": "desktop"}, None),
    ],
)
def test_a_trait_with_categories_is_kept_as_the_hash_of_its_text(
    catalogue: Catalogue, traits: dict[str, Any], context: dict[str, Any], expected: str | None
) -> None:
    outcome = ingest.parse(catalogue, view(traits=traits, context=context), NOW_MS)
    assert isinstance(outcome, Accepted)
    kept = sound(outcome.traits)
    assert kept["attribute"].tolist() == ([] if expected is None else [events.hash32(expected)])
    assert set(kept["kind"].tolist()) <= {events.TRAIT_TEXT}
    assert set(kept["id"].tolist()) <= {events.hash32("device")}


@pytest.mark.parametrize(("value", "expected"), [(3, 3), ("3.5", 3.5), (True, 1), ("gold", None), ([], None)])
def test_a_trait_without_categories_is_kept_as_its_number(
    catalogue: Catalogue, value: object, expected: float | None
) -> None:
    outcome = ingest.parse(catalogue, view(traits={"loyalty": value}), NOW_MS)
    assert isinstance(outcome, Accepted)
    assert sound(outcome.traits)["value"].tolist() == ([] if expected is None else [expected])


def test_a_trait_that_one_model_counts_and_another_lists_serves_both() -> None:
    listing = document(features={"loyalty": {"trait": "loyalty", "categories": ["3"]}})
    both = ingest.catalogue([spec.parse(document()), spec.parse(listing)])
    outcome = ingest.parse(both, view(traits={"loyalty": 3}), NOW_MS)
    assert isinstance(outcome, Accepted)
    [record] = sound(outcome.traits)
    assert (record["kind"], record["attribute"], record["value"]) == (events.TRAIT_TEXT, events.hash32("3"), 3)


@pytest.mark.parametrize(
    "change",
    [
        {"code": 1, "event": "Another"},
        {"code": 9, "event": "Product Viewed", "value": "price", "attribute": "category"},
        {"code": 1, "event": "Product Viewed", "value": "revenue", "attribute": "category"},
    ],
)
def test_specs_that_disagree_on_an_event_cannot_be_served_together(change: dict[str, Any]) -> None:
    other = document(model="other", events={"seen": change}, features={"seen": {"count": "seen"}})
    with pytest.raises(CatalogueConflict, match=r"model other: events\.seen"):
        ingest.catalogue([spec.parse(document()), spec.parse(other)])


def test_specs_that_agree_are_united() -> None:
    more = document(model="other", events={"bought": {"code": 9, "event": "Bought"}}, features={"n": {"count": "any"}})
    united = ingest.catalogue([spec.parse(document()), spec.parse(more)])
    assert set(united.kinds) == {"Product Viewed", "Page Viewed", "Home", "Bought"}
    assert united.names[9] == "bought"
