"""Replaying history: what files say comes into the feature cache as live events would, once, whatever breaks."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pytest
import redis

from cli import history, main
from cli.history import Loaded
from service import door, embedded, ingest
from service.app import open_store
from service.consent import Identities, Known
from service.core import events, features
from service.core.spec import FeatureSpec
from service.door import Door
from service.errors import StoreError
from service.history import History, compact_traits
from service.persons import Persons
from service.settings import Settings
from service.visitors import Visitors
from tests.conftest import MakeSettings, wait_until
from training import source, specfile
from training.eventfiles import UnreadableEvents

ROOT = Path(__file__).parents[2]
DAY_MS = 86_400_000
START_MS = 1_764_547_200_000  # 2025-12-01
ODD_IDS = ("a b", "{x}", "ü", "鞋", "it's", "%7B", "007", "*")
SPEC = """
model: shop
events:
  view: {code: 1, event: Product Viewed, value: price, attribute: category}
  order: {code: 2, event: Order Completed, value: revenue}
limits: {history: 60d}
features:
  views: {count: view}
  spend: {sum: order}
  categories: {distinct: view}
  last_price: {latest: view}
  device: {trait: device, categories: [mobile, desktop]}
  loyalty: {trait: loyalty}
"""
TABLE_SPEC = """
model: club
label: {column: joined, positive: yes}
source: {visitor_id: member}
features:
  tier: {trait: tier, categories: [none, gold]}
  age: {trait: age}
"""


def report(stage: str, share: float) -> None:
    """Nobody watches."""


def random_events(seed: int = 0, count: int = 2000) -> list[dict[str, Any]]:
    chance = random.Random(seed)
    visitors = [f"v{number}" for number in range(120)] + list(ODD_IDS)
    sent = [
        {
            "type": chance.choice(("track", "track", "track", "identify")),
            "event": chance.choice(("Product Viewed", "Order Completed")),
            "userId": chance.choice(visitors),
            "messageId": f"m{place}" if place % 4 else None,
            "timestamp": START_MS + chance.randrange(30 * DAY_MS),
            "properties": {"price": chance.randrange(99), "category": chance.choice("abc"), "revenue": 5.5},
            "context": {"device": chance.choice(("mobile", "desktop", "tv"))},
            "traits": {"loyalty": chance.randrange(3)} if place % 3 == 0 else {},
        }
        for place in range(count)
    ]
    return sent + chance.sample(sent, count // 20)


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A directory with events, read in several partitions, and their spec."""
    write_events(tmp_path / "events.ndjson", random_events())
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "club.yaml").write_text(TABLE_SPEC)
    return tmp_path


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "_PARTITION_ROWS", 300)
    monkeypatch.setattr(history, "VISITORS_AT_ONCE", 7)


def write_events(path: Path, sent: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in sent))
    return path


def replay(directory: Path, settings: Settings, name: str = "events.ndjson", **given: Any) -> Loaded:
    arguments = {"max_bad_rows": 0, "memory_limit": "1GB", "report": report, **given}
    return asyncio.run(history.replay_events([str(directory / name)], directory / "spec.yaml", settings, **arguments))


def replay_table(directory: Path, settings: Settings, max_bad_rows: int = 0) -> Loaded:
    path = str(directory / "table.csv")
    return asyncio.run(history.replay_table(path, directory / "club.yaml", settings, max_bad_rows, report))


def stored(settings: Settings, visitors: list[str]) -> dict[str, History]:
    async def read() -> list[History]:
        async with open_store(settings, 0) as store:
            return await store.read(visitors)

    return dict(zip(visitors, asyncio.run(read()), strict=True))


def expected(directory: Path, name: str = "events.ndjson") -> dict[str, History]:
    """The records of every visitor, as the files are read."""
    workdir = directory / f"work-{random.getrandbits(64):x}"
    workdir.mkdir()
    log = source.read([str(directory / name)], specfile.load(directory / "spec.yaml"), workdir)
    found = {}
    for index in range(log.partitions):
        part = log.partition(index, with_ids=True)
        for place, visitor in enumerate(part.visitor_ids or ()):
            found[visitor] = History(
                part.records[part.starts[place] : part.starts[place + 1]].tobytes(),
                part.traits[part.trait_starts[place] : part.trait_starts[place + 1]].tobytes(),
            )
    return found


def records_in(known: Mapping[str, History]) -> int:
    return sum(len(blob) for history in known.values() for blob in history) // events.RECORD_BYTES


# --- events ---


def test_every_record_arrives_and_a_second_replay_has_nothing_to_do(shop: Path, settings: Settings) -> None:
    wanted = expected(shop)
    assert set(ODD_IDS) < set(wanted)
    loaded = replay(shop, settings)
    assert (loaded.visitors, loaded.added) == (len(wanted), records_in(wanted))
    assert stored(settings, list(wanted)) == wanted
    assert replay(shop, settings) == Loaded(0, 0)
    assert stored(settings, list(wanted)) == wanted


def test_a_replay_in_other_parts_looks_at_everyone_and_adds_nothing(
    shop: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = expected(shop)
    replay(shop, settings)
    monkeypatch.setattr(source, "_PARTITION_ROWS", 150)
    loaded = replay(shop, settings)
    assert (loaded.visitors, loaded.added) == (len(wanted), 0)
    assert stored(settings, list(wanted)) == wanted


def test_the_features_of_what_arrived_are_those_of_the_events_sent_one_by_one(shop: Path, settings: Settings) -> None:
    spec = specfile.load(shop / "spec.yaml")
    plan, catalogue = features.compile(spec), ingest.catalogue([spec])
    replay(shop, settings)
    sent = random_events()
    visitors = sorted({item["userId"] for item in sent})
    found = stored(settings, visitors)
    for visitor in visitors:
        kept = [ingest.parse(catalogue, item, START_MS + 99 * DAY_MS) for item in sent if item["userId"] == visitor]
        accepted = [item for item in kept if isinstance(item, ingest.Accepted)]
        live = History(b"".join(item.events for item in accepted), b"".join(item.traits for item in accepted))
        for moment in (START_MS + 3 * DAY_MS, START_MS + 17 * DAY_MS, START_MS + 40 * DAY_MS):
            replayed, one_by_one = (vector(plan, known, moment) for known in (found[visitor], live))
            np.testing.assert_array_equal(replayed, one_by_one)


def vector(plan: features.Plan, known: History, at_ms: int) -> Any:
    records, traits = events.from_bytes(known.events), events.from_bytes(known.traits)
    starts, trait_starts = np.array([0, len(records)]), np.array([0, len(traits)])
    return features.matrix(plan, records, starts, np.array([at_ms]), traits, trait_starts)


def test_what_came_live_before_or_while_replaying_is_not_doubled(shop: Path, settings: Settings) -> None:
    spec = specfile.load(shop / "spec.yaml")
    catalogue, sent = ingest.catalogue([spec]), random_events()
    live = [ingest.parse(catalogue, item, START_MS + 99 * DAY_MS) for item in sent[:500]]

    async def send() -> None:
        async with open_store(settings, DAY_MS) as store:
            for item in live:
                assert isinstance(item, ingest.Accepted)
                await Visitors(store).append({item.visitor_id: History(item.events, item.traits)}, START_MS)

    asyncio.run(send())
    replay(shop, settings)
    wanted = expected(shop)
    for visitor, known in stored(settings, list(wanted)).items():
        assert events.compact(known.events, 10**6) == wanted[visitor].events
        plan, today = features.compile(spec), START_MS + 40 * DAY_MS
        np.testing.assert_array_equal(vector(plan, known, today), vector(plan, wanted[visitor], today))


def test_a_replay_that_was_cut_off_resumes_where_it_was(
    shop: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, real, calls = expected(shop), Visitors.append_missing, 0

    async def failing(visitors: Visitors, additions: Mapping[str, History], now_ms: int) -> int:
        nonlocal calls
        calls += 1
        if calls == 12:
            raise StoreError("the feature cache failed (ConnectionError); try again later")
        return await real(visitors, additions, now_ms)

    with monkeypatch.context() as patched:
        patched.setattr(Visitors, "append_missing", failing)
        with pytest.raises(StoreError, match="try again later"):
            replay(shop, settings)
    before = records_in(stored(settings, list(wanted)))
    assert 0 < before < records_in(wanted)
    loaded = replay(shop, settings)
    assert loaded.added == records_in(wanted) - before
    assert loaded.visitors < len(wanted), "the parts that were done are skipped"
    assert stored(settings, list(wanted)) == wanted
    assert replay(shop, settings) == Loaded(0, 0)


def test_a_replay_that_was_killed_resumes_and_nothing_is_lost_or_doubled(shop: Path, settings: Settings) -> None:
    wanted = expected(shop)
    url, namespace = str(settings.redis_url), settings.namespace
    code = (
        "import time; from cli import history, main\n"
        "from service.visitors import Visitors; from training import source\n"
        "source._PARTITION_ROWS, history.VISITORS_AT_ONCE = 300, 7\n"
        "real = Visitors.append_missing\n"
        "async def slow(*arguments):\n"
        "    time.sleep(0.1)\n"
        "    return await real(*arguments)\n"
        "Visitors.append_missing = slow\n"
        "main.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "replay", "--events", "events.ndjson", "--spec", "spec.yaml"],
        cwd=shop,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PROPENSITY_REDIS_URL": url,
            "PROPENSITY_NAMESPACE": namespace,
            "TMPDIR": str(shop),
        },
        stderr=subprocess.DEVNULL,
    )
    try:
        direct = redis.Redis.from_url(url)
        wait_until(lambda: bool(list(direct.scan_iter(f"{namespace}:replay:*", count=1000))))
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    before = records_in(stored(settings, list(wanted)))
    assert 0 < before < records_in(wanted)
    loaded = replay(shop, settings)
    assert loaded.added == records_in(wanted) - before
    assert loaded.visitors < len(wanted)
    assert stored(settings, list(wanted)) == wanted


def test_changed_files_are_replayed_again(shop: Path, settings: Settings) -> None:
    replay(shop, settings)
    sent = random_events()
    for item in sent:
        item["traits"] = {"loyalty": 9}
    write_events(shop / "events.ndjson", [*sent, {**sent[0], "messageId": "new", "timestamp": START_MS + 31 * DAY_MS}])
    loaded = replay(shop, settings)
    assert loaded.added > 50
    spec = specfile.load(shop / "spec.yaml")
    [known] = stored(settings, [sent[0]["userId"]]).values()
    found = dict(zip(spec.names, vector(features.compile(spec), known, START_MS + 40 * DAY_MS)[0], strict=True))
    assert found["loyalty"] == 9


def test_histories_beyond_the_bound_are_cut_to_the_latest_and_stay_so(shop: Path, settings: Settings) -> None:
    sent = [
        {"userId": "bot", "event": "Product Viewed", "timestamp": START_MS + place, "messageId": f"m{place}"}
        for place in range(3000)
    ]
    write_events(shop / "events.ndjson", sent)
    assert replay(shop, settings) == Loaded(1, 2048)
    [known] = stored(settings, ["bot"]).values()
    kept = events.from_bytes(known.events)
    assert (len(kept), int(kept["ts_ms"].min())) == (2048, START_MS + 952)
    source_changed = [*sent, {**sent[0], "userId": "other"}]
    write_events(shop / "events.ndjson", source_changed)
    assert replay(shop, settings) == Loaded(2, 1)


def test_every_key_expires(shop: Path, settings: Settings) -> None:
    replay(shop, settings)
    direct = redis.Redis.from_url(str(settings.redis_url))
    keys = list(direct.scan_iter(f"{settings.namespace}:*", count=1000))
    assert len(keys) > 100
    longest = (60 + settings.retention_slack_days) * DAY_MS
    for key in keys:
        assert longest - 600_000 < int(direct.pttl(key)) <= longest


def test_too_many_bad_rows_are_refused_before_anything_is_written(shop: Path, settings: Settings) -> None:
    write_events(shop / "events.ndjson", [*random_events(), {"event": "Product Viewed", "timestamp": START_MS}])
    with pytest.raises(UnreadableEvents, match="1 of 2101 rows are bad"):
        replay(shop, settings)
    assert list(redis.Redis.from_url(str(settings.redis_url)).scan_iter(f"{settings.namespace}:*", count=1000)) == []
    assert replay(shop, settings, max_bad_rows=1).added > 0


def test_progress_is_told(shop: Path, settings: Settings) -> None:
    told: list[tuple[str, float]] = []
    replay(shop, settings, report=lambda stage, share: told.append((stage, share)))
    loading = [share for stage, share in told if stage == "Loading visitors"]
    assert loading == sorted(loading)
    assert loading[-1] == 1
    assert len(loading) == 2100 // 300 + 1


# --- tables ---


def write_table(path: Path, rows: list[str], at_s: float = 1_764_600_000) -> None:
    path.write_text("member,tier,age\n" + "\n".join(rows) + "\n")
    os.utime(path, (at_s, at_s))


def traits_of(directory: Path, settings: Settings, visitor: str) -> list[float]:
    spec = specfile.load(directory / "club.yaml")
    [known] = stored(settings, [visitor]).values()
    return [float(value) for value in vector(features.compile(spec), known, time.time_ns() // 1_000_000)[0]]


def test_the_traits_of_a_table_arrive_once(shop: Path, settings: Settings) -> None:
    write_table(shop / "table.csv", ["007,gold,41", "8,none,", *(f"m{n},gold,{n}" for n in range(50))])
    assert replay_table(shop, settings) == Loaded(52, 103)
    assert traits_of(shop, settings, "007") == [1, 41]
    assert traits_of(shop, settings, "m49") == [1, 49]
    before = stored(settings, ["007", "8", "m3"])
    assert replay_table(shop, settings) == Loaded(52, 0)
    assert stored(settings, ["007", "8", "m3"]) == before


def test_a_table_that_was_written_anew_replaces_what_was_known(shop: Path, settings: Settings) -> None:
    for day, (tier, age) in enumerate((("gold", 41), ("none", 42), ("gold", 43), ("other", 44))):
        write_table(shop / "table.csv", [f"007,{tier},{age}"], 1_764_600_000 + day * 86_400)
        assert replay_table(shop, settings) == Loaded(1, 2)
        assert traits_of(shop, settings, "007") == [{"none": 0, "gold": 1, "other": 2}[tier], age]


def test_several_rows_of_one_visitor_all_count(shop: Path, settings: Settings) -> None:
    (shop / "club.yaml").write_text(TABLE_SPEC.replace("member}", "member, timestamp: day}"))
    rows = ["007,gold,41,2025-12-03", "8,none,30,2025-12-01", "007,none,40,2025-12-01", "007,,42,2025-12-05"]
    (shop / "table.csv").write_text("member,tier,age,day\n" + "\n".join(rows) + "\n")
    loaded = replay_table(shop, settings)
    assert loaded.added == 7
    assert traits_of(shop, settings, "007") == [1, 42]


def test_rows_without_a_visitor_are_counted_and_never_stored(shop: Path, settings: Settings) -> None:
    write_table(shop / "table.csv", ["007,gold,41", ",gold,20"])
    with pytest.raises(
        UnreadableEvents, match="1 rows are bad, more than --max-bad-rows 0; for example a row without a v"
    ):
        replay_table(shop, settings)
    assert replay_table(shop, settings, max_bad_rows=1) == Loaded(1, 0)
    assert stored(settings, ["None", ""]) == {"None": History(), "": History()}


# --- who visitors are ---

PERSONS = [f"u{number}" for number in range(12)] + [f"a{number}" for number in range(16)]


def events_of_persons(seed: int) -> list[dict[str, Any]]:
    """Visits, addresses, numbers, consents and logins, in the order of time."""
    chance = random.Random(seed)
    sent: list[dict[str, Any]] = []
    for place in range(400):
        item: dict[str, Any] = {"timestamp": START_MS + place * 60_000, "messageId": f"m{place}"}
        item |= chance.choice(({"anonymousId": f"a{chance.randrange(16)}"}, {"userId": f"u{chance.randrange(12)}"}))
        item |= {"type": "track", "event": "Product Viewed", "properties": {"price": chance.randrange(99)}}
        if chance.random() < 0.3:
            del item["event"], item["properties"]
            item |= {"type": chance.choice(("identify", "identify", "alias")), "traits": {"loyalty": place % 3}}
            item |= {"userId": f"u{chance.randrange(12)}"} if chance.random() < 0.8 else {}
            item |= {"anonymousId": f"a{chance.randrange(16)}"} if chance.random() < 0.4 else {}
            item |= {"previousId": f"a{chance.randrange(16)}"} if chance.random() < 0.1 else {}
            email, phone = f"{place % 7}@example.com", chance.choice(("+49 30 90182012", "030 90182013", "12"))
            item["traits"] |= chance.choice(({"email": email}, {"phone": phone}, {"email": "none"}, {}))
        if chance.random() < 0.2:
            said = {name: chance.random() < 0.6 for name in ("Advertising", "email") if chance.random() < 0.7}
            item["context"] = {"device": "mobile", "consent": {"categoryPreferences": said or {"crm": True}}}
        sent.append(item)
    return sent


def write_csv(path: Path, sent: list[dict[str, Any]]) -> None:
    """Sections as JSON."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, sorted({name for event in sent for name in event}))
        table.writeheader()
        for event in sent:
            table.writerow(
                {name: json.dumps(value) if isinstance(value, dict) else value for name, value in event.items()}
            )


async def sent_live(settings: Settings, spec: FeatureSpec, sent: list[dict[str, Any]]) -> None:
    """What `POST /v1/events` does with each of these, one after the other."""
    catalogue, told_by = ingest.catalogue([spec]), Door.of(settings.phone_region, settings.consent_categories)
    async with open_store(settings, 0) as store:
        for event in sent:
            outcome = ingest.parse(catalogue, event, START_MS + DAY_MS)
            assert not isinstance(outcome, ingest.Refused)
            outcome = door.take(told_by, event, outcome, START_MS + DAY_MS, lambda what, became: None)
            if isinstance(outcome, ingest.Accepted):
                await Visitors(store).append({outcome.visitor_id: History(outcome.events, outcome.traits)}, START_MS)
                await Visitors(store).append_said({outcome.visitor_id: outcome.said} if outcome.said else {}, START_MS)
                await Persons(store).join([outcome.login] if outcome.login else [], START_MS)


async def known_of_all(settings: Settings) -> list[object]:
    async with open_store(settings, 0) as store:
        histories = [
            (events.compact(found.events, 10**6), compact_traits(found.traits, START_MS + DAY_MS))
            for found in await store.read(PERSONS)
        ]
        families = [await Persons(store).family(visitor) for visitor in PERSONS]
        return [histories, families, await Identities(store).read(PERSONS, START_MS + DAY_MS)]


@pytest.mark.parametrize("ending", ["ndjson", "parquet", "csv"])
def test_identifiers_consents_and_joins_are_those_of_the_events_sent_one_by_one(
    shop: Path, make_settings: MakeSettings, store_url: str, ending: str
) -> None:
    sent = events_of_persons(len(ending))
    path = write_events(shop / "persons.ndjson", sent)
    if ending == "parquet":
        duckdb.execute(f"COPY (FROM read_json('{path}', sample_size = -1)) TO '{shop / 'persons.parquet'}'")
    if ending == "csv":
        write_csv(shop / "persons.csv", sent)
    live, replayed = (make_settings(redis_url=store_url, phone_region="DE") for _ in range(2))
    assert live.namespace != replayed.namespace
    asyncio.run(sent_live(live, specfile.load(shop / "spec.yaml"), sent))
    loaded = replay(shop, replayed, f"persons.{ending}")
    wanted = asyncio.run(known_of_all(live))
    assert asyncio.run(known_of_all(replayed)) == wanted
    assert (loaded.joined, loaded.said > 50) == (
        len({name for name in PERSONS if owner_of(wanted, name) != name}),
        True,
    )
    assert replay(shop, replayed, f"persons.{ending}") == Loaded(0, 0)
    assert asyncio.run(known_of_all(replayed)) == wanted


MAPPED = """
source:
  visitor_id: customer
  anonymous_id: cookie
  timestamp: at
  event: {column: action, names: {look: Product Viewed}}
  traits: {email: mail, phone: tel}
  context: {consent: "{categoryPreferences: {Advertising: ads = 'yes', crm: crm = 'yes'}}"}
"""
COLUMNS = ("customer", "cookie", "at", "action", "mail", "tel", "country", "ads", "crm")
MAPPED_ROWS = [
    ("", "a1", START_MS, "look", "", "", "", "", ""),
    ("u1", "a1", START_MS + 1, "look", "One@example.com", "01711234567", "", "yes", "no"),
    ("u1", "", START_MS + 2, "look", "", "", "", "", "yes"),
    ("u2", "", START_MS + 3, "look", "two@example.com", "", "", "no", ""),
    ("u2", "", START_MS + 4, "look", "no address", "+4930901820", "", "yes", ""),
    ("u3", "", START_MS + 5, "look", "", "22123456", "NO", "", ""),
    ("u4", "", START_MS + 6, "look", "", "", "", "yes", "yes"),
    ("", "", START_MS + 7, "look", "nobody@example.com", "", "", "yes", ""),
]


def said_live(row: tuple[Any, ...]) -> dict[str, Any]:
    """The event that says the same as a mapped row."""
    known = {name: value for name, value in zip(COLUMNS, row, strict=True) if value != ""}
    traits = {
        name: known[key] for name, key in (("email", "mail"), ("phone", "tel"), ("country", "country")) if key in known
    }
    preferences = {name: known[key] == "yes" for name, key in (("Advertising", "ads"), ("crm", "crm")) if key in known}
    event = {"userId": known.get("customer"), "anonymousId": known.get("cookie"), "timestamp": known["at"]}
    event |= {"type": "identify"} if {"mail", "tel"} & set(known) else {"event": "Product Viewed"}
    return (
        event
        | {"traits": traits}
        | ({"context": {"consent": {"categoryPreferences": preferences}}} if preferences else {})
    )


@pytest.mark.parametrize("ending", ["csv", "ndjson", "parquet"])
def test_identifiers_and_consents_of_mapped_columns_are_those_of_events_that_say_the_same(
    shop: Path, make_settings: MakeSettings, store_url: str, ending: str
) -> None:
    with (shop / "mapped.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *MAPPED_ROWS])
    if ending != "csv":
        options = "FORMAT json" if ending == "ndjson" else "FORMAT parquet"
        read = f"read_csv('{shop / 'mapped.csv'}', all_varchar = true)"
        duckdb.execute(f"COPY (FROM {read}) TO '{shop / 'mapped'}.{ending}' ({options})")
    live, replayed = (make_settings(redis_url=store_url, phone_region="DE") for _ in range(2))
    persons = ["u1", "u2", "u3", "u4", "a1"]

    async def identities(settings: Settings) -> list[Known]:
        async with open_store(settings, 0) as store:
            return await Identities(store).read(persons, START_MS + DAY_MS)

    asyncio.run(sent_live(live, specfile.load(shop / "spec.yaml"), [said_live(row) for row in MAPPED_ROWS[:-1]]))
    wanted = asyncio.run(identities(live))
    assert [len(one.identifiers) for one in wanted] == [6, 6, 4, 0, 0]
    assert [one.consents["ads"] for one in wanted] == [True, True, False, True, False]
    (shop / "spec.yaml").write_text(SPEC + MAPPED)
    loaded = replay(shop, replayed, f"mapped.{ending}", max_bad_rows=1)
    assert (loaded.joined, loaded.said) == (1, 6)
    assert asyncio.run(identities(replayed)) == wanted


def test_what_a_spec_maps_later_is_kept_by_another_replay(shop: Path, settings: Settings) -> None:
    with (shop / "mapped.csv").open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *MAPPED_ROWS])
    unmapped = "".join(line for line in MAPPED.splitlines(True) if "traits" not in line and "consent" not in line)
    (shop / "spec.yaml").write_text(SPEC + unmapped)
    assert replay(shop, settings, "mapped.csv", max_bad_rows=1).said == 0
    (shop / "spec.yaml").write_text(SPEC + MAPPED)
    assert replay(shop, settings, "mapped.csv", max_bad_rows=1).said == 6
    assert replay(shop, settings, "mapped.csv", max_bad_rows=1) == Loaded(0, 0)


def owner_of(wanted: list[Any], visitor: str) -> str:
    return str(wanted[1][PERSONS.index(visitor)].visitor_id)


# --- the embedded feature cache, and the visitor for the first answer ---


def test_without_a_url_the_embedded_server_keeps_the_history_in_its_directory(
    shop: Path, make_settings: MakeSettings
) -> None:
    settings = make_settings(data_dir=shop / "data")
    wanted = expected(shop)
    assert replay(shop, settings).visitors == len(wanted)
    assert replay(shop, settings) == Loaded(0, 0)
    server = embedded.start(shop / "data")
    assert stored(settings, list(wanted)) == wanted
    server.close()


def test_some_visitor_is_one_with_a_late_event(shop: Path, settings: Settings) -> None:
    assert asyncio.run(history.some_visitor(settings)) is None
    write_events(
        shop / "events.ndjson",
        [
            {"userId": f"v{number}", "event": "Product Viewed", "timestamp": START_MS + number * DAY_MS}
            for number in range(10)
        ],
    )
    replay(shop, settings)
    found = asyncio.run(history.some_visitor(settings))
    assert found is None or found.startswith("v")


def test_the_command_says_what_it_did_and_that_there_is_nothing_to_do(
    shop: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = expected(shop)
    monkeypatch.chdir(shop)
    monkeypatch.setenv("PROPENSITY_REDIS_URL", str(settings.redis_url))
    monkeypatch.setenv("PROPENSITY_NAMESPACE", settings.namespace)

    def replay(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["propensity", "replay", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        out, err = capsys.readouterr()
        assert (ended.value.code or 0, out) == (0, ""), err
        return err

    first, again = (replay("--events", "events.ndjson", "--spec", "spec.yaml") for _ in range(2))
    told = [f"{len(wanted)} visitors, {records_in(wanted):,} records added to the feature cache."]
    named = sum(item["type"] == "identify" for item in random_events())
    assert first.splitlines() == [*told, f"{named} events kept that say something of a person."]
    assert re.fullmatch(r"Nothing to do: .*\n", again)
    write_table(shop / "table.csv", ["007,gold,41"])
    table = replay("--table", "table.csv", "--spec", "club.yaml")
    assert table == "1 visitors, 2 records added to the feature cache.\n"
