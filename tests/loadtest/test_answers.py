"""Owns the promise that a simulated visitor notices an answer that is not what it must be, and says why."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest

from loadtest import answers
from loadtest.answers import Wrong, check_batch, check_events, check_metrics, check_ready, check_score, require_ok
from loadtest.visits import Event, Visit

NOW_MS = 1_790_000_000_000
CATALOGUE = {"Product Viewed", "Home Viewed"}


def visit(counted: int = 2, is_new: bool = False) -> Visit:
    return Visit("visitor-1", is_new, "mobile", "ads", 3, counted=counted, last_ms=NOW_MS - 1000)


def score(**changed: Any) -> dict[str, Any]:
    return {
        "score_id": "c8b5c305",
        "visitor_id": "visitor-1",
        "propensity": 0.25,
        "percentile": 87.2,
        "segment": "high_intent",
        "model": "purchase_7d",
        "version": "1",
        "scored_at": datetime.fromtimestamp(NOW_MS / 1000, UTC).isoformat().replace("+00:00", "Z"),
        "events": 2,
        "last_event_age_s": 1.0,
        "degraded": [],
        **changed,
    }


def body(answer: object) -> bytes:
    return json.dumps(answer).encode()


def event(name: str, type: str = "track") -> Event:
    key = "name" if type == "page" else "event"
    return {"type": type, key: name, "timestamp": "2026-09-21T13:46:39.000+00:00"}


def outcomes(*statuses: str) -> bytes:
    return body({"accepted": statuses.count("accepted"), "results": [{"status": status} for status in statuses]})


def test_a_good_score_passes() -> None:
    (found,) = check_score(body(score()), visit())
    assert found.events == 2


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"events": 1}, "`events` does not count what was just sent"),
        ({"last_event_age_s": 1.002}, "`last_event_age_s` does not know what was just sent"),
        ({"visitor_id": "visitor-2"}, "the score of another visitor"),
        ({"propensity": None}, "`propensity` does not agree with `degraded`"),
        ({"degraded": ["model"]}, "`propensity` does not agree with `degraded`"),
        ({"propensity": 1.5}, "not the agreed answer: Expected `float` <= N.N - at `$.propensity`"),
        ({"segment": "vip"}, "not the agreed answer: Invalid enum value 'vip' - at `$.segment`"),
        ({"scored_at": "yesterday"}, "not the agreed answer: Invalid RFCN encoded datetime - at `$.scored_at`"),
        ({"degraded": None}, "not the agreed answer: Expected `array`, got `null` - at `$.degraded`"),
    ],
)
def test_a_wrong_score_is_told_apart(changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(Wrong) as wrong:
        check_score(body(score(**changed)), visit())
    assert str(wrong.value) == reason


@pytest.mark.parametrize("field", list(score()))
def test_every_field_of_a_score_is_missed(field: str) -> None:
    kept = {name: value for name, value in score().items() if name != field}
    with pytest.raises(Wrong, match=f"missing required field `{field}`"):
        check_score(body(kept), visit())


def test_more_events_than_sent_are_right_for_a_known_visitor_alone() -> None:
    check_score(body(score(events=50)), visit())
    with pytest.raises(Wrong, match="does not count"):
        check_score(body(score(events=3)), visit(is_new=True))


def test_a_score_without_the_feature_cache_need_not_know_the_events() -> None:
    check_score(body(score(events=0, last_event_age_s=None, degraded=["store"])), visit())


def test_a_score_by_rule_has_no_propensity() -> None:
    check_score(body(score(propensity=None, percentile=None, version=None, degraded=["model"])), visit())


def test_acknowledged_events_of_the_catalogue_are_expected_in_the_score() -> None:
    one = visit(counted=0)
    sent = [event("Home Viewed", "page"), event("Order Completed"), event("Product Viewed")]
    check_events(outcomes("accepted", "accepted", "ignored"), one, sent, CATALOGUE)
    assert (one.counted, one.last_ms) == (1, 1_789_998_399_000)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (outcomes("accepted"), "not one result for each event"),
        (outcomes("accepted", "refused"), "an event was refused"),
        (b"<html>", "not the agreed answer"),
        (body({"accepted": 2}), "missing required field `results`"),
    ],
)
def test_wrong_answers_to_events_are_noticed(answer: bytes, reason: str) -> None:
    with pytest.raises(Wrong, match=reason):
        check_events(answer, visit(), [event("Product Viewed")] * 2, CATALOGUE)


def test_a_batch_has_the_score_of_each_visitor_in_its_place() -> None:
    results = [score(visitor_id=name) for name in ("a", "b")]
    assert len(check_batch(body({"results": results}), ["a", "b"])) == 2
    with pytest.raises(Wrong, match="another visitor"):
        check_batch(body({"results": results}), ["b", "a"])
    with pytest.raises(Wrong, match="not one result for each visitor"):
        check_batch(body({"results": results}), ["a"])


def test_an_error_in_a_batch_is_noticed_with_its_title() -> None:
    results = [score(visitor_id="a"), {"visitor_id": "b", "error": {"title": "Unknown model"}}]
    with pytest.raises(Wrong, match="^visitors with an error: Unknown model$"):
        check_batch(json.dumps({"results": results}, separators=(",", ":")).encode(), ["a", "b"])
    with pytest.raises(Wrong, match="missing required field"):
        check_batch(body({"results": [{"visitor_id": "a"}]}), ["a"])


def test_statuses_are_told_with_the_title_of_the_problem() -> None:
    require_ok(200, b"")
    with pytest.raises(Wrong, match="^status 429 Too many requests$"):
        require_ok(429, body({"title": "Too many requests"}))
    with pytest.raises(Wrong, match="^status 502$"):
        require_ok(502, b"<html>Bad Gateway</html>")


def test_metrics_must_be_those_of_the_service() -> None:
    check_metrics(b"# TYPE propensity_request_seconds histogram\n")
    with pytest.raises(Wrong):
        check_metrics(b"# TYPE python_info gauge\n")


def test_a_service_that_is_not_ready_is_noticed() -> None:
    check_ready(b'{"status":"ready","models":1}')
    with pytest.raises(Wrong):
        check_ready(b'{"status":"starting"}')


def test_reasons_hold_no_numbers_that_would_keep_equal_ones_apart() -> None:
    with pytest.raises(Wrong) as wrong:
        answers.check_score(b'{"score_id": "1234", "visitor_id": 5678}', visit())
    assert not any(digit in str(wrong.value) for digit in "0123456789")
