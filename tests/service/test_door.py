"""What events say of persons, from the request to the feature cache, and that no address gets further than the door."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import pytest
import redis
from fastapi.testclient import TestClient

from service import door as doors
from service import ingest
from service.consent import Known, known
from service.core import spec
from service.door import Door
from service.identity import EMAILS, PHONES, hashed
from service.ingest import Accepted, Ignored
from service.joining import Login
from service.settings import Settings
from tests.conftest import SHOP, MakeSettings, RedisServer, StartService, wait_until
from tests.service.scrapes import scrape

NOW_MS = 1_767_225_600_000
CATALOGUE = ingest.catalogue([spec.parse(SHOP)])
USUAL = Door.of(None, None)
ADDRESS, NUMBER = "dana@example.com", "+49 30 901820"


def identify(**members: Any) -> dict[str, Any]:
    return {"type": "identify", "userId": "u-1", "timestamp": NOW_MS, **members}


def take(event: dict[str, Any], door: Door = USUAL) -> tuple[Accepted | Ignored, Counter[tuple[str, str]]]:
    counted: Counter[tuple[str, str]] = Counter()
    outcome = ingest.parse(CATALOGUE, event, NOW_MS)
    assert isinstance(outcome, Accepted | Ignored)
    if doors.speaks(event):
        outcome = doors.take(door, event, outcome, NOW_MS, lambda *what: counted.update([what]))
    return outcome, counted


def said(event: dict[str, Any], door: Door = USUAL) -> Known:
    outcome, _ = take(event, door)
    assert isinstance(outcome, Accepted), outcome
    return known(outcome.visitor_id, outcome.said, NOW_MS)


def consents(event: dict[str, Any], door: Door = USUAL) -> set[str]:
    return {purpose for purpose, is_agreed in said(event, door).consents.items() if is_agreed}


# --- identifiers ---


@pytest.mark.parametrize(
    "members",
    [
        {"traits": {"email": ADDRESS, "phone": NUMBER}},
        {"context": {"traits": {"email": ADDRESS, "phone": NUMBER}}},
        {"traits": {"email": None, "phone": "030 901820", "country": "de"}, "context": {"traits": {"email": ADDRESS}}},
        {"traits": {"email": f" {ADDRESS.upper()}", "phone": "030/901820", "address": {"country": "DE"}}},
    ],
)
def test_an_identify_event_gives_every_form_of_its_address_and_number(members: dict[str, Any]) -> None:
    identifiers = said(identify(**members)).identifiers
    assert {form: identifiers[form] for form in EMAILS} == {form: (hashed(form, ADDRESS),) for form in EMAILS}
    assert {form: identifiers[form] for form in PHONES} == {form: (hashed(form, NUMBER),) for form in PHONES}
    assert identifiers["external_id"] == ("u-1",)


def test_equal_hashes_of_two_platforms_take_one_record() -> None:
    outcome, _ = take(identify(traits={"email": ADDRESS}))
    gmail, _ = take(identify(traits={"email": "a.b@gmail.com"}))
    assert isinstance(outcome, Accepted)
    assert isinstance(gmail, Accepted)
    assert (len(outcome.said), len(gmail.said)) == (2 * 48, 3 * 48)


def test_a_number_without_a_country_is_of_the_region_of_the_settings() -> None:
    event = identify(traits={"phone": "030 901820"})
    assert said(event, Door.of("DE", {})).identifiers["google.phone"] == (hashed("google.phone", NUMBER),)
    outcome, counted = take(event)
    assert "google.phone" not in said(event).identifiers
    assert counted == {("phone", "no_region"): 1}
    assert outcome.message is not None
    assert "PROPENSITY_PHONE_REGION" in outcome.message


def test_nonsense_is_counted_and_told_and_the_rest_of_the_event_is_kept() -> None:
    traits = {"email": "n/a", "phone": [1], "loyalty": 3}
    outcome, counted = take(identify(traits=traits, context={"consent": {"categoryPreferences": {"ads": "yes"}}}))
    assert isinstance(outcome, Accepted)
    assert outcome.traits
    assert known("u-1", outcome.said, NOW_MS).identifiers.keys() == {"external_id", "meta.external_id"}
    assert counted == {("email", "malformed"): 1, ("phone", "malformed"): 1, ("consent", "malformed"): 1}
    assert outcome.message == (
        "its email is not kept: an e-mail address looks like name@example.com; its phone is not kept: a phone number "
        "looks like +49 30 901820; its consent is not kept: context.consent.categoryPreferences has true or false "
        "by category"
    )


@pytest.mark.parametrize(
    "event",
    [
        {"type": "track", "event": "Signed Up", "userId": "u", "traits": {"email": ADDRESS}},
        {"type": "page", "userId": "u", "properties": {"email": ADDRESS}},
        {"type": "identify", "anonymousId": "a", "traits": {"name": "Dana"}},
        {"type": "alias", "userId": "u", "anonymousId": "u"},
    ],
)
def test_events_that_say_nothing_of_a_person_are_ignored_as_before(event: dict[str, Any]) -> None:
    assert isinstance(take({**event, "timestamp": NOW_MS})[0], Ignored | Accepted)
    outcome, counted = take({**event, "timestamp": NOW_MS})
    assert not (isinstance(outcome, Accepted) and (outcome.said or outcome.login))
    assert not counted


@pytest.mark.parametrize("visitor_id", ["dana@example.com", "+49 30 901820"])
def test_an_id_that_is_an_address_is_counted_and_told(visitor_id: str) -> None:
    outcome, counted = take(identify(userId=visitor_id))
    assert counted == {("id", "address"): 1}
    assert outcome.message is not None
    assert outcome.message.endswith("ids are stored as they are: send another")
    assert visitor_id not in outcome.message


# --- consents ---


def preferences(**categories: object) -> dict[str, Any]:
    return {"context": {"consent": {"categoryPreferences": categories}}}


def test_consent_comes_with_any_event_by_the_categories_of_the_settings() -> None:
    track = {"type": "track", "event": "Product Viewed", "userId": "u", "timestamp": NOW_MS}
    assert consents({**track, **preferences(Advertising=True, analytics=True, CRM=False, Functional=True)}) == {
        *("ads", "analytics")
    }
    door = Door.of(None, {"Targeting": ["ads", "email"], "C0005": ["ads"], "Performance": ["analytics"]})
    assert consents({**track, **preferences(targeting=True, C0005=False, Performance=True)}, door) == {
        *("email", "analytics")
    }
    assert consents({**track, **preferences(targeting=True)}, door) == {"ads", "email"}


def test_categories_without_a_purpose_and_no_consent_say_nothing() -> None:
    unsaid: list[dict[str, Any]] = [{"context": {"consent": {}}}, {"context": {"consent": None}}]
    for given in (preferences(Functional=True), *unsaid):
        outcome, _ = take({"type": "page", "userId": "u", "timestamp": NOW_MS, **given})
        assert not getattr(outcome, "said", b"")


def test_an_object_without_categories_refuses_everything() -> None:
    first = take(identify(timestamp=NOW_MS - 1, **preferences(ads=True, email=True)))[0]
    then = take(identify(**preferences()))[0]
    assert isinstance(first, Accepted)
    assert isinstance(then, Accepted)
    assert not any(known("u-1", first.said + then.said, NOW_MS).consents.values())
    assert known("u-1", first.said, NOW_MS).consents["email"]


# --- logins ---


@pytest.mark.parametrize(
    ("members", "login"),
    [
        ({"anonymousId": "a-1"}, ("a-1", Login(NOW_MS, "u-1"))),
        ({"anonymousId": 17}, ("17", Login(NOW_MS, "u-1"))),
        ({"type": "alias", "previousId": "p-1", "anonymousId": "a-1"}, ("p-1", Login(NOW_MS, "u-1"))),
        ({"type": "alias", "anonymousId": "a-1"}, ("a-1", Login(NOW_MS, "u-1"))),
        ({"previousId": "p-1"}, None),
        ({"anonymousId": "u-1"}, None),
        ({"anonymousId": True}, None),
        ({"anonymousId": "x" * 257}, None),
        ({"userId": None, "anonymousId": "a-1", "traits": {"email": ADDRESS}}, None),
    ],
)
def test_a_login_is_who_an_other_id_turned_out_to_be(members: dict[str, Any], login: tuple[str, Login] | None) -> None:
    outcome, _ = take(identify(**members))
    assert getattr(outcome, "login", None) == login


# --- through the service ---


def view(number: int, **who: str) -> dict[str, Any]:
    properties = {"price": 10 * number, "category": f"c-{number}"}
    return {
        "event": "Product Viewed",
        "messageId": f"m-{number}",
        "properties": properties,
        **who,
        "timestamp": now_s(),
    }


def now_s() -> float:
    return time.time_ns() // 1_000_000 / 1000


def score(client: TestClient, visitor_id: str) -> dict[str, Any]:
    answer = client.post("/v1/score", json={"visitor_id": visitor_id})
    told: dict[str, Any] = answer.json()
    assert (answer.status_code, told["visitor_id"], told["degraded"]) == (200, visitor_id, [])
    return told


def test_who_logs_in_is_scored_with_both_histories_under_both_ids(client: TestClient) -> None:
    first = [view(1, anonymousId="a"), view(2, anonymousId="a"), view(3, userId="u")]
    assert client.post("/v1/events", json={"batch": first}).json()["accepted"] == 3
    assert (score(client, "a")["events"], score(client, "u")["events"]) == (2, 1)
    login = {"type": "identify", "userId": "u", "anonymousId": "a", "traits": {"email": ADDRESS}}
    consent = {"context": {"consent": {"categoryPreferences": {"Advertising": True}}}}
    assert client.post("/v1/events", json={**login, **consent}).json()["accepted"] == 1
    # Sent again, and what comes for the anonymous id still.
    client.post("/v1/events", json={"batch": [*first, login, view(4, anonymousId="a")]})
    assert (score(client, "a")["events"], score(client, "u")["events"]) == (4, 4)
    both = client.post("/v1/score/batch", json={"visitors": [{"visitor_id": name} for name in ("a", "b", "u", "a")]})
    scores = both.json()["results"]
    assert [one["events"] for one in scores] == [4, 0, 4, 4]
    assert scores[0]["propensity"] == scores[2]["propensity"] == scores[3]["propensity"] != scores[1]["propensity"]
    known, asked = (client.get(f"/v1/visitors/{name}").json() for name in ("u", "a"))
    assert (
        known["identity"]
        == asked["identity"]
        == {
            "visitor_id": "u",
            "joined": ["a"],
            "forms": ["external_id", "google.email", "meta.email", "meta.external_id"],
            "rules": "2026-11",
            "consents": {"ads": True, "email": False, "crm": False, "analytics": False},
        }
    )
    assert known["events"] == asked["events"]
    assert hashed("meta.email", ADDRESS) not in json.dumps(known)
    assert client.delete("/v1/visitors/a").status_code == 204
    for name in ("a", "u"):
        told = client.get(f"/v1/visitors/{name}").json()
        assert (told["events"]["total"], told["identity"]["forms"]) == (0, [])
        assert (told["identity"]["visitor_id"], told["identity"]["joined"]) == (name, [])


def test_a_login_in_the_batch_of_the_visit_takes_all_of_it_along(client: TestClient) -> None:
    batch = [view(1, anonymousId="a"), {"type": "alias", "previousId": "a", "userId": "u"}, view(2, anonymousId="a")]
    told = client.post("/v1/events", json={"batch": batch}).json()
    assert [one["status"] for one in told["results"]] == ["accepted"] * 3
    assert score(client, "u")["events"] == 2


def test_what_is_not_kept_is_told_with_the_event(client: TestClient) -> None:
    told = client.post("/v1/events", json={"type": "identify", "userId": "u", "traits": {"email": "n/a"}}).json()
    assert told["results"] == [
        {"status": "accepted", "message": "its email is not kept: an e-mail address looks like name@example.com"}
    ]


def test_identifiers_that_cannot_be_stored_do_not_take_the_event_along(client: TestClient, settings: Settings) -> None:
    with redis.Redis.from_url(str(settings.redis_url), protocol=2) as direct:
        direct.lpush(f"{settings.namespace}:i:{{u}}", "x")
    event = {"type": "identify", "userId": "u", "traits": {"email": ADDRESS}}
    assert client.post("/v1/events", json=event).json()["detail"].startswith("unfit: ")
    told = client.post("/v1/events", json={**event, "traits": {"email": ADDRESS, "loyalty": 3}}).json()
    assert told["results"][0]["message"].startswith("its identifiers and consents are not kept")
    assert client.get("/v1/visitors/u").json()["traits"]["loyalty"]["value"] == 3


@pytest.mark.parametrize(
    ("name", "value", "advice"),
    [
        ("phone_region", "Germany", "two letters of ISO 3166-1"),
        ("consent_categories", {"Targeting": ["adverts"]}, "'adverts' is no purpose; write some of ads, email"),
    ],
)
def test_a_setting_that_says_nothing_is_refused(
    make_settings: MakeSettings, name: str, value: Any, advice: str
) -> None:
    with pytest.raises(ValueError, match=advice):
        make_settings(**{name: value})


def test_a_region_is_written_in_either_case(make_settings: MakeSettings) -> None:
    assert make_settings(phone_region="de").phone_region == "DE"


# --- canaries ---

CANARY = "canary.5e1f@example.com"
CANARIES = ["canary.5e1f", "canary%2e5e1f", "5550142", "555 01 42", "555-01-42", "555.01.42"]
TRAITS = {
    "email": CANARY,
    "phone": "+49 170 5550142",
    "phone2": "0170 555 01 42",
    "mobile": 491705550142,
    "name": f"Dana <{CANARY}>",
    "address": {"country": "DE", "phone": "0170 555-01-42", "note": CANARY.upper()},
    "contacts": [{"email": CANARY}, CANARY, "+49 170 555.01.42", "01705550142"],
}
SOUND = {"type": "identify", "userId": "u-1", "anonymousId": "a-1", "messageId": "m-1", "traits": TRAITS}
REFUSED = [
    {**SOUND, "timestamp": "yesterday"},
    {**SOUND, "timestamp": CANARY},
    {**SOUND, "timestamp": NOW_MS * 2},
    {**SOUND, "type": CANARY},
    {**SOUND, "context": CANARY},
    {**SOUND, "userId": None, "anonymousId": None},
    {**SOUND, "traits": [TRAITS]},
    {**SOUND, "traits": CANARY, "properties": TRAITS},
    {**SOUND, "type": "track", "event": "", "context": {"traits": TRAITS, CANARY: 1}, "properties": {"user": TRAITS}},
    {**SOUND, "type": "track", "event": {"email": CANARY}},
    CANARY,
    [CANARY],
]


def test_no_address_and_no_number_is_in_the_feature_cache_the_log_or_an_answer(
    start_service: StartService, own_redis_server: RedisServer, artifacts: Path
) -> None:
    service = start_service(
        redis_url=own_redis_server.url, artifacts=artifacts, log_level="debug", score_log_length=100
    )
    service.wait_until_ready()
    sound = [SOUND, {**SOUND, "traits": {"email": f"{CANARY} x@", "phone": "0170 555 01 42"}}]
    sound += [
        {"event": "Product Viewed", "userId": "u-1", "properties": {"category": CANARY, "price": "+49 170 5550142"}},
        {"event": CANARY, "userId": "u-1", "context": {"device": CANARY, "traits": TRAITS}, "traits": TRAITS},
    ]
    answers = []
    with httpx2.Client(base_url=service.url, timeout=10) as client:
        answers.append(client.post("/v1/events", json={"batch": [*sound, *REFUSED]}))
        answers += [client.post("/v1/events", json=event) for event in REFUSED]
        context = {"referrer": CANARY, "email": CANARY}
        for body in (
            {"visitor_id": "u-1", "context": context},
            {"visitor_id": "a-1", "context": context},
            {"visitor_id": "u-1", "features": {"device": CANARY}},
            {"visitor_id": "u-1", "model": "shop", "email": CANARY},
        ):
            answers.append(client.post("/v1/score", json=body))
        answers.append(client.post("/v1/events", content=json.dumps(SOUND)[:-1]))
        answers.append(client.get("/v1/visitors/a-1"))
        with redis.Redis.from_url(own_redis_server.url, protocol=2) as direct:
            wait_until(lambda: direct.xlen("p:scores") > 0)
            direct.config_set("rdbcompression", "no")
            direct.save()
            assert direct.xlen("p:quarantine") == 2 * len(REFUSED) - 2  # a body that is no object is no event
        found = scrape(service.url)
    assert [answer.status_code for answer in answers[:2]] == [200, 422]
    assert (answers[0].json()["accepted"], answers[0].json()["refused"]) == (4, len(REFUSED))
    dump = (own_redis_server.directory / "dump.rdb").read_bytes().decode("latin-1").lower()
    assert "u-1" in dump
    assert bytes.fromhex(hashed("meta.email", CANARY)).decode("latin-1").lower() in dump
    log = service.log.read_text().lower()
    told = "\n".join(answer.text for answer in answers).lower()
    for canary in CANARIES:
        assert canary not in dump
        assert canary not in log
        assert canary not in told
    kept = {(what, became): found.value("propensity_identity_total", said=what, outcome=became) for what, became in [
        *(("email", "kept"), ("email", "malformed"), ("phone", "kept"), ("phone", "no_region"))
    ]}  # fmt: skip
    assert kept == {("email", "kept"): 1, ("email", "malformed"): 1, ("phone", "kept"): 1, ("phone", "no_region"): 1}
    assert found.by("outcome", "propensity_joins_total") == {"joined": 1, "known": 0, "refused": 0}
