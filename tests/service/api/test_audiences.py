"""Audiences over HTTP: pages, streams and changes, and what is said of wrong questions."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
from fastapi.testclient import TestClient

from service.app import create_app
from service.erasures import key_of
from service.members import Member, Members
from service.settings import Settings
from service.shards import Page
from service.store import Store
from tests.conftest import DAY_MS, MakeSettings, RedisServer

NOW_MS = 1_767_225_600_000
T = TypeVar("T")


def with_members(settings: Settings, work: Callable[[Members], Awaitable[T]], kept_changes: int = 1000) -> T:
    """Do something with the members that the service has."""

    async def run() -> T:
        assert settings.redis_url is not None
        store = Store.open(settings.redis_url, namespace=settings.namespace, retention_ms=90 * DAY_MS)
        try:
            return await work(Members(store, kept_changes=kept_changes))
        finally:
            await store.close()

    return asyncio.run(run())


@pytest.fixture
def best(settings: Settings) -> dict[str, int]:
    """An audience of 2,500 members, some of them with strange ids."""
    strange = ["=HYPERLINK(1)", "+1", "-1", "@x", 'a"b', "a,b", "a\nb", "é", "a/b", "\t", "\ud800"]
    entered = {name: NOW_MS + place for place, name in enumerate([*strange, *(f"v{at}" for at in range(2489))])}

    async def fill(members: Members) -> None:
        await members.describe("best", json.dumps({"segment": "champions"}), NOW_MS)
        await members.change("best", entered, [], NOW_MS, "score")

    with_members(settings, fill)
    return entered


def pages(client: TestClient, limit: int) -> Iterator[dict[str, Any]]:
    cursor: str | None = None
    while True:
        asked = {"limit": limit} | ({"cursor": cursor} if cursor else {})
        page = client.get("/v1/audiences/best/members", params=asked).json()
        yield page
        cursor = page["cursor"]
        if cursor is None:
            return


def test_audiences_say_what_they_are(client: TestClient, best: dict[str, int]) -> None:
    told = client.get("/v1/audiences/best").json()
    assert told["changes_cursor"].isdigit()
    assert {name: told[name] for name in ("name", "members", "updated_at", "refreshed_at", "definition")} == {
        "name": "best",
        "members": 2500,
        "updated_at": "2026-01-01T00:00:00.000Z",
        "refreshed_at": "2026-01-01T00:00:00.000Z",
        "definition": {"segment": "champions"},
    }
    assert client.get("/v1/audiences").json() == {"audiences": [told]}


def test_all_forms_have_each_member_once(client: TestClient, best: dict[str, int]) -> None:
    listed = [one["visitor_id"] for page in pages(client, 300) for one in page["members"]]
    assert sorted(listed) == sorted(best)
    lines = client.get("/v1/audiences/best/members?format=ndjson")
    assert lines.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line)["visitor_id"] for line in lines.content.splitlines()] == listed
    table = client.get("/v1/audiences/best/members", headers={"Accept": "text/html, text/csv;q=0.9"})
    assert table.headers["content-type"].startswith("text/csv")
    head, *rows = csv.reader(table.content.decode().splitlines(keepends=True))
    assert head == ["visitor_id", "entered_at"]
    formulas = ("=", "+", "-", "@", "\t")
    assert [name for name, _ in rows] == [
        f"'{name}" if name.startswith(formulas) else name.replace("\ud800", "\\ud800") for name in listed
    ]
    last = json.loads(lines.content.splitlines()[-1])
    assert best[last["visitor_id"]] - NOW_MS < 2500
    assert rows[-1][1] == last["entered_at"]


def test_changes_are_followed_and_an_erased_visitor_is_only_a_key(
    client: TestClient, settings: Settings, best: dict[str, int]
) -> None:
    first = client.get("/v1/audiences/best/changes?limit=2000").json()
    assert 1000 <= len(first["changes"]) < 1128
    assert first["more"] is False
    since = client.get("/v1/audiences/best").json()["changes_cursor"]
    assert first["cursor"] == since
    assert client.get(f"/v1/audiences/best/changes?since={since}").json() == {
        "changes": [],
        "cursor": since,
        "more": False,
    }
    with_members(settings, lambda members: members.change("best", {"new": 1}, ["v1"], NOW_MS + 1, "score above 0.2"))
    assert client.delete("/v1/visitors/v2").status_code == 204
    told = client.get(f"/v1/audiences/best/changes?since={since}&limit=2").json()
    assert told["more"]
    rest = client.get(f"/v1/audiences/best/changes?since={told['cursor']}").json()
    changes = [*told["changes"], *rest["changes"]]
    assert sorted((one["visitor_id"] or "", one["visitor_key"], one["entered"], one["why"]) for one in changes) == [
        ("", key_of("v2"), False, "erased"),
        ("new", None, True, "score above 0.2"),
        ("v1", None, False, "score above 0.2"),
    ]
    assert [int(one["cursor"]) for one in changes] == [int(since) + 1, int(since) + 2, int(since) + 3]
    gone = client.get(f"/v1/audiences/best/changes?since={int(since) - 2500}")
    assert gone.status_code == 410
    assert gone.json()["type"] == "urn:propensity:problem:cursor-gone"
    assert "read all members anew" in gone.json()["detail"]


WRONG = [
    ("/v1/audiences/none", 404, "unknown-audience"),
    ("/v1/audiences/no%20name", 404, "unknown-audience"),
    ("/v1/audiences/none/members", 404, "unknown-audience"),
    ("/v1/audiences/none/changes", 404, "unknown-audience"),
    ("/v1/audiences/best/members?limit=0", 422, "invalid-request"),
    ("/v1/audiences/best/members?limit=10001", 422, "invalid-request"),
    ("/v1/audiences/best/members?format=xml", 422, "invalid-request"),
    ("/v1/audiences/best/members?cursor=64.a", 422, "invalid-cursor"),
    ("/v1/audiences/best/members?cursor=1.a%20", 422, "invalid-cursor"),
    ("/v1/audiences/best/members?format=csv&cursor=x", 422, "invalid-cursor"),
    ("/v1/audiences/best/changes?since=x", 422, "invalid-cursor"),
    ("/v1/audiences/best/changes?since=9999999999999999", 422, "invalid-cursor"),
    ("/v1/models/none/top", 404, "unknown-model"),
    ("/v1/models/shop/visitors?cursor=x", 422, "invalid-cursor"),
    ("/v1/models/shop/visitors?above=2", 422, "invalid-request"),
]


def test_wrong_questions_get_a_problem(client: TestClient, best: dict[str, int]) -> None:
    for path, status, kind in WRONG:
        response = client.get(path)
        assert response.status_code == status, path
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["type"] == f"urn:propensity:problem:{kind}"
        assert response.json()["detail"]


def test_without_the_feature_cache_each_route_says_so(
    own_redis_server: RedisServer, make_settings: MakeSettings
) -> None:
    asked = ["audiences", "audiences/a", "audiences/a/members?format=csv", "audiences/a/changes"]
    with TestClient(create_app(make_settings(redis_url=own_redis_server.url))) as client:
        own_redis_server.kill()
        for path in (*asked, "models/shop/top", "models/shop/visitors", "models/shop/spread"):
            response = client.get(f"/v1/{path}")
            assert response.status_code == 503, path
            assert response.json()["type"] == "urn:propensity:problem:store-unavailable"


def test_however_many_stream_pages_are_made_two_at_a_time(
    settings: Settings, best: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, at_once = Members.page, [0, 0]

    async def counted(members: Members, audience: str, cursor: str | None, n: int) -> Page[Member]:
        at_once[0] += 1
        at_once[1] = max(at_once)
        try:
            return await page(members, audience, cursor, n)
        finally:
            at_once[0] -= 1

    monkeypatch.setattr(Members, "page", counted)
    with TestClient(create_app(settings)) as client, ThreadPoolExecutor(8) as pool:
        texts = list(pool.map(lambda _: client.get("/v1/audiences/best/members?format=ndjson").text, range(16)))
    assert {text.count("\n") for text in texts} == {len(best)}
    assert at_once == [0, 2]
