"""Event files of any origin become the records that the same events leave when they are sent to the service."""

from __future__ import annotations

import gzip
import itertools
import json
import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service import ingest
from service.core import events, features, spec
from service.core.errors import PropensityError
from service.core.events import Records
from service.core.spec import FeatureSpec
from service.ingest import Accepted, Refused
from tests.training import online
from training import simulate, source, specfile, sql
from training.eventfiles import UnreadableEvents
from training.partition import NEVER
from training.source import EventLog

NOW_MS = 1_767_225_600_000  # 2026-01-01T00:00:00Z
DAY_MS = 86_400_000

DOCUMENT: dict[str, Any] = {
    "model": "shop",
    "events": {
        "view": {"code": 1, "event": "Product Viewed", "value": "price", "attribute": "category"},
        "cart": {"code": 2, "event": "Product Added", "value": "price", "attribute": "sku"},
        "order": {"code": 7, "event": "Order Completed", "value": "revenue"},
        "page": {"code": 3, "event": "Page Viewed", "attribute": "path"},
        "home": {"code": 4, "event": "Home"},
    },
    "features": {
        "views": {"count": "view"},
        "device": {"trait": "device", "categories": ["mobile", "desktop", "3", "true"]},
        "tier": {"trait": "tier", "categories": {"gold": 3, "7": 1}},
        "tier_number": {"trait": "tier"},
        "loyalty": {"trait": "loyalty"},
        "referrer": {"request": "referrer", "categories": ["ads", "mail", "true", "2.5", "3"]},
        "grade": {"request": "grade", "categories": {"a": 1.5, "b": 2}},
        "amount": {"request": "amount"},
    },
}


class Kept(NamedTuple):
    """What is kept of a visitor: event and trait records in canonical order, and each event's request features."""

    events: bytes
    traits: bytes
    request: bytes


@pytest.fixture
def shop() -> FeatureSpec:
    return spec.parse(DOCUMENT)


def with_source(mapping: Any, **changes: Any) -> FeatureSpec:
    return spec.parse({**DOCUMENT, "source": mapping, **changes})


def read(files: Path | Sequence[Path], spec: FeatureSpec, **given: Any) -> EventLog:
    """Read into a fresh directory beside the files."""
    paths = [files] if isinstance(files, Path) else list(files)
    workdir = paths[0].parent / f".work-{random.getrandbits(64):x}"
    workdir.mkdir()
    return source.read([str(path) for path in paths], spec, workdir, **{"now_ms": NOW_MS, **given})


def kept(log: EventLog) -> dict[str, Kept]:
    found = {}
    for index in range(log.partitions):
        part = log.partition(index, with_ids=True).at(NEVER - 1)
        assert part.visitor_ids is not None
        assert np.all(np.diff(part.visitor_hash.astype(object)) > 0)
        for place, visitor in enumerate(part.visitor_ids):
            assert visitor not in found, "a visitor is in one partition alone"
            span = slice(part.starts[place], part.starts[place + 1])
            traits = part.traits[part.trait_starts[place] : part.trait_starts[place + 1]]
            assert events.valid(part.records[span]).all()
            assert events.valid(traits).all()
            found[visitor] = Kept(part.records[span].tobytes(), traits.tobytes(), part.request[span].tobytes())
    return found


def write_lines(path: Path, items: Iterable[Any]) -> Path:
    text = "".join(f"{item if isinstance(item, str) else json.dumps(item)}\n" for item in items)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_csv(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def only(log: EventLog) -> Records:
    """The records of a log with one visitor."""
    [visitor] = kept(log).values()
    return events.from_bytes(visitor.events)


# --- the definition: service.ingest ---


class Expected(NamedTuple):
    kept: dict[str, tuple[bytes, bytes]]
    requests: dict[tuple[str, bytes], set[bytes]]
    bad: int
    ignored: int


def expected(spec: FeatureSpec, sent: Sequence[Mapping[str, Any]]) -> Expected:
    """What the service keeps of events that it receives one by one."""
    catalogue, plan = ingest.catalogue([spec]), features.compile(spec)
    blobs: dict[str, list[bytes]] = defaultdict(lambda: [b"", b""])
    requests: dict[tuple[str, bytes], set[bytes]] = defaultdict(set)
    bad = ignored = 0
    for event in sent:
        outcome = ingest.parse(catalogue, event, NOW_MS)
        if isinstance(outcome, Refused) or event.get("timestamp") is None:
            bad += 1  # a file has no moment of receipt
        else:
            ignored += not (isinstance(outcome, Accepted) and outcome.events)
    for visitor, held in online.after(catalogue, sent, 2**62, NOW_MS).held.items():
        for event, outcome, _ in held:
            if isinstance(outcome, Accepted) and (outcome.events or outcome.traits):
                blobs[visitor][0] += outcome.events
                blobs[visitor][1] += outcome.traits
                code = np.array(plan.encode_request(event.get("context")), np.float32)
                requests[visitor, outcome.events].add(code.tobytes())
    made = {
        visitor: (events.compact(blob, 10**9), changes_and_last(events.compact(traits, 10**9)))
        for visitor, (blob, traits) in blobs.items()
    }
    return Expected(made, requests, bad, ignored)


def changes_and_last(blob: bytes) -> bytes:
    """Of each trait the records that say something else than the one before, and the last one."""
    records = events.from_bytes(blob)
    keep = np.zeros(len(records), np.bool_)
    last: dict[int, int] = {}
    for place, record in enumerate(records):
        before = records[last[record["id"]]] if record["id"] in last else None
        said = None if before is None else (before["attribute"], before["value"].tobytes())
        keep[place] = said != (record["attribute"], record["value"].tobytes())
        last[record["id"]] = place
    keep[list(last.values())] = True
    return records[keep].tobytes()


def assert_the_same(log: EventLog, wanted: Expected) -> None:
    found = kept(log)
    for visitor, (records, traits) in wanted.kept.items():
        assert found[visitor].events == records, (visitor, events.from_bytes(records))
        assert changes_and_last(found[visitor].traits) == traits, (visitor, events.from_bytes(traits))
        assert found[visitor].traits == traits or log.summary.joined
        width = len(found[visitor].request) // max(len(records) // events.RECORD_BYTES, 1)
        for place in range(len(records) // events.RECORD_BYTES):
            record = records[place * events.RECORD_BYTES : (place + 1) * events.RECORD_BYTES]
            request = found[visitor].request[place * width : (place + 1) * width]
            assert request in wanted.requests[visitor, record], (visitor, np.frombuffer(request, np.float32))
    silent = {visitor for visitor in found if visitor not in wanted.kept}
    assert not any(found[visitor].events or found[visitor].traits for visitor in silent)
    assert (log.summary.bad, log.summary.ignored) == (wanted.bad, wanted.ignored)


TEXTS = ("", " ", "a", "shoes", "Schuhe für Ö", "鞋 \U0001f45f", "it's", 'q"uote', "back\\slash", "null", "true", "3")
NUMBERS_AS_TEXT = ("12.5", " 7 ", "1e3", "-.5", "5.", "+1", "1_000", "inf", "nan", "1e400", "0x10", "1,5", "--1", "3.0")
NUMBERS = (0, 1, -1, 3, 3.0, -0.0, 1.5, 0.1, 2.5, 99.99, 1e15, 1e16, 1e21, 123456789012, 2**53 + 1, 2**63 - 1, 5e-324)
HUGE = (2**63, 2**64 - 1, 1 - 2**63, 1e39, -1e300)
OTHERS: tuple[Any, ...] = (None, True, False, [], [1], {}, {"a": 1}, "\0", "a\tb\nc", "x" * 300)
VALUES = (*TEXTS, *NUMBERS_AS_TEXT, *NUMBERS, *HUGE, *OTHERS)


def iso(moment: datetime, random: random.Random) -> str:
    text = moment.strftime("%Y-%m-%d") + random.choice("T ") + moment.strftime("%H:%M:%S")
    digits = random.choice((0, 0, 1, 3, 6, 9))
    text += f".{random.randrange(10**digits):0{digits}}" if digits else ""
    text += random.choice(("Z", "Z", "", "+02:00", "-0530", "+05", "-00:30"))
    return random.choice(
        (text, text, text, f" {text} ", moment.strftime("%Y-%m-%d"), moment.strftime("%Y-%m-%dT%H:%M"))
    )


def timestamp(random: random.Random) -> Any:
    ms = NOW_MS - random.choice((random.randrange(20 * DAY_MS), random.randrange(480) * 3_600_000))
    seconds = ms / 1000
    moment = datetime.fromtimestamp(seconds, UTC)
    usual = (iso(moment, random), iso(moment, random), ms, seconds, int(seconds), str(ms), f" {seconds} ", ms + 0.5)
    odd: tuple[Any, ...] = (
        None,
        True,
        "",
        "yesterday",
        "2025-13-01",
        "12:30",
        "2025-02-29T10:00:00Z",
        [],
        {},
        -1,
        "-5",
        0,
        1e13,
        1e300,
    )
    odd += (NOW_MS + DAY_MS, NOW_MS + DAY_MS + 1, "2026-03-01T00:00:00Z", "9999-12-31T23:59:59Z", 1_700_000_000_000_000)
    return random.choice(odd) if random.random() < 0.15 else random.choice(usual)


def some(random: random.Random, **choices: Sequence[Any]) -> dict[str, Any]:
    """A mapping with some of the names, each with one of its values."""
    return {name: random.choice(values) for name, values in choices.items() if random.random() < 0.8}


def random_event(random: random.Random) -> dict[str, Any]:
    names = ("Product Viewed", "Product Added", "Order Completed", "Page Viewed", "Home", "Unknown", "product viewed")
    event = some(
        random,
        type=("track",) * 20 + ("page", "page", "identify", "screen", "group", "alias", "other", None, 5, ""),
        event=(*names, *names, *names, *names, None, ""),
        name=("Home", "Home", "Product Viewed", "Unknown", "", None, 5, True),
        messageId=(*(f"m-{number}" for number in range(40)), *VALUES),
        properties=[some(random, price=VALUES, category=VALUES, sku=VALUES, revenue=VALUES, path=VALUES)],
        context=[some(random, device=VALUES, tier=VALUES, loyalty=VALUES, referrer=VALUES, grade="abc", amount=VALUES)],
        traits=[some(random, device=VALUES, tier=(*VALUES, "gold"), loyalty=VALUES)],
    )
    event |= some(random, userId=("u1", "u2", 17, 17.0, "17", "ü", *VALUES), anonymousId=("a1", "a2", 2.5, *VALUES))
    event["timestamp"] = timestamp(random)
    if random.random() < 0.02:
        event[random.choice(("properties", "context", "traits"))] = random.choice(("text", [1], 7, True, None))
    if random.random() < 0.05:
        del event["timestamp"]
    return event


@pytest.mark.parametrize("seed", range(3))
def test_ndjson_gives_the_records_that_the_same_events_leave_in_the_service(
    tmp_path: Path, shop: FeatureSpec, seed: int
) -> None:
    chance = random.Random(seed)
    sent = [random_event(chance) for _ in range(4000)]
    sent += chance.sample(sent, 200)
    wanted = expected(shop, sent)
    assert sum(len(blob) for blob, _ in wanted.kept.values()) > 1200 * events.RECORD_BYTES
    assert sum(len(blob) for _, blob in wanted.kept.values()) > 500 * events.RECORD_BYTES
    assert_the_same(read(write_lines(tmp_path / "events.ndjson", sent), shop, max_bad_rows=10_000), wanted)


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(1 - 2**63, 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False).filter(lambda x: not 3.4028234e38 < abs(x) < 3.4028236e38),
    st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs"]), max_size=8),
    st.decimals(allow_nan=False, allow_infinity=False, places=3).map(str),
)


@settings(max_examples=20)
@given(values=st.lists(st.tuples(*[JSON_VALUES] * 6), min_size=1, max_size=40))
def test_any_json_values_are_read_as_the_service_reads_them(
    tmp_path_factory: pytest.TempPathFactory, values: list[tuple[Any, ...]]
) -> None:
    shop = spec.parse(DOCUMENT)
    sent = [
        {
            "event": "Product Viewed",
            "userId": user,
            "anonymousId": "a",
            "messageId": message,
            "timestamp": NOW_MS - place,
            "properties": {"price": price, "category": category},
            "context": {"device": price, "referrer": category, "amount": amount, "grade": trait},
            "traits": {"tier": trait, "loyalty": amount},
        }
        for place, (user, message, price, category, trait, amount) in enumerate(values)
    ]
    path = write_lines(tmp_path_factory.mktemp("json") / "events.ndjson", sent)
    home = {"event": "Home", "userId": "home", "timestamp": NOW_MS}
    path.write_text(path.read_text() + json.dumps(home) + "\n")
    assert_the_same(read(path, shop), expected(shop, [*sent, home]))


def sound_event(random: random.Random, place: int) -> dict[str, Any]:
    """An event that Parquet's and CSV's columns can hold as well: every field has one type."""
    kind = random.choice(("track", "track", "track", "page", "identify"))
    known = random.random() < 0.5
    return {
        "type": kind,
        "event": random.choice([kind["event"] for kind in DOCUMENT["events"].values()]) if kind == "track" else None,
        "name": random.choice(("Home", "Elsewhere", None)) if kind == "page" else None,
        "userId": f"0{random.randrange(9)}" if known else None,
        "anonymousId": None if known else f"ä {random.randrange(9)}",
        "messageId": f"m{random.randrange(200)}" if place % 3 else None,
        "timestamp": NOW_MS - random.randrange(5_000) * random.choice((1, 60_000)),
        "properties": {
            "price": random.choice((None, 1.0, 2.5, 99.99, round(random.random() * 100, 2))),
            "category": random.choice((None, "shoes", "bags, hats", "it's", "鞋")),
            "sku": random.choice((None, 7, 8, 12)),
            "revenue": random.choice((None, 10, 20)),
            "path": None,
        },
        "context": {
            "device": random.choice((None, "mobile", "desktop", "watch")),
            "tier": random.choice((None, "gold", "none")),
            "loyalty": random.choice((None, 1.5, 2.0)),
            "referrer": random.choice((None, "ads", "sms")),
            "grade": random.choice((None, "a", "b", "c")),
            "amount": random.choice((None, 1.25, 3.0)),
        },
        "traits": {
            "device": random.choice((None, None, "desktop")),
            "tier": random.choice((None, "gold", "silver")),
            "loyalty": random.choice((None, 4.0)),
        },
    }


@pytest.fixture(scope="module")
def sound_events() -> list[dict[str, Any]]:
    chance = random.Random(5)
    return [sound_event(chance, place) for place in range(3000)]


def as_parquet(sent: Sequence[Mapping[str, Any]], path: Path, unit: str = "ms", zone: str | None = "UTC") -> Path:
    table = pa.Table.from_pylist(list(sent))
    moment = pa.array([event["timestamp"] for event in sent], pa.timestamp("ms", "UTC"))
    column = moment.cast(pa.timestamp(unit, "UTC"))
    column = column if zone else column.cast(pa.timestamp(unit))
    pq.write_table(table.set_column(table.column_names.index("timestamp"), "timestamp", column), path)
    return path


def as_flat_csv(sent: Sequence[Mapping[str, Any]], path: Path, dotted: bool, separator: str = ",") -> Path:
    """Flat columns: traits and context of one name need their section before it."""
    rows = []
    for event in sent:
        row = {name: value for name, value in event.items() if not isinstance(value, dict)}
        row["timestamp"] = datetime.fromtimestamp(row["timestamp"] / 1000, UTC).isoformat()
        for section in ("properties", "context", "traits"):
            for name, value in event[section].items():
                both = section != "properties" and name in ("device", "tier", "loyalty")
                row[f"{section}.{name}" if dotted or both else name] = value
        rows.append(row)
    lines = [separator.join(rows[0])]
    lines += [separator.join(csv_cell(value) for value in row.values()) for row in rows]
    return write_csv(path, "\n".join(lines) + "\n")


def csv_cell(value: Any) -> str:
    return "" if value is None else '"' + str(value).replace('"', '""') + '"' if isinstance(value, str) else str(value)


LAYOUTS: dict[str, Callable[[Sequence[Mapping[str, Any]], Path], Path]] = {
    "lines of JSON": lambda sent, to: write_lines(to / "events.ndjson", sent),
    "packed lines of JSON": lambda sent, to: write_lines(to / "events.jsonl.gz", sent),
    "Parquet": lambda sent, to: as_parquet(sent, to / "events.parquet"),
    "Parquet in microseconds": lambda sent, to: as_parquet(sent, to / "events.parquet", "us"),
    "Parquet in nanoseconds without a zone": lambda sent, to: as_parquet(sent, to / "events.parquet", "ns", None),
    "flat CSV": lambda sent, to: as_flat_csv(sent, to / "events.csv", dotted=False),
    "packed CSV with dotted names": lambda sent, to: as_flat_csv(sent, to / "events.csv.gz", dotted=True),
    "semicolons": lambda sent, to: as_flat_csv(sent, to / "events.csv", True, ";"),
    "tabs": lambda sent, to: as_flat_csv(sent, to / "events.tsv", True, "\t"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_records(
    tmp_path: Path, shop: FeatureSpec, sound_events: list[dict[str, Any]], layout: str
) -> None:
    assert_the_same(read(LAYOUTS[layout](sound_events, tmp_path), shop), expected(shop, sound_events))


def test_parquet_with_json_in_text_columns_gives_the_same_records(
    tmp_path: Path, shop: FeatureSpec, sound_events: list[dict[str, Any]]
) -> None:
    sections = ("properties", "context", "traits")
    texts = [{**event, **{name: json.dumps(event[name]) for name in sections}} for event in sound_events]
    assert_the_same(read(as_parquet(texts, tmp_path / "events.parquet"), shop), expected(shop, sound_events))


def test_the_simulated_shop_gives_the_same_records_in_every_format(tmp_path: Path) -> None:
    shop = specfile.load(Path(__file__).parents[2] / "examples" / "shop.yaml")
    end = datetime.fromtimestamp(NOW_MS / 1000, UTC) - timedelta(days=5)
    found = []
    for ending in ("parquet", "ndjson", "ndjson.gz", "csv", "csv.gz"):
        path = tmp_path / ending / f"events.{ending}"
        simulate.simulate(simulate.Shop(visitors=300, days=30, end=end), path)
        found.append(kept(read(path, shop)))
    sent = [json.loads(line) for line in (tmp_path / "ndjson" / "events.ndjson").read_text().splitlines()]
    assert_the_same(read(tmp_path / "ndjson" / "events.ndjson", shop), expected(shop, sent))
    assert len(found[0]) > 100
    assert all(other == found[0] for other in found)


# --- foreign files ---

MAPPING = {
    "visitor_id": "customer",
    "timestamp": "moment",
    "event": {"column": "action", "names": {"look": "Product Viewed", "buy": "Order Completed"}},
    "message_id": "row_id",
    "properties": {"price": "cost", "category": "section", "revenue": "quantity * cost"},
    "context": {"referrer": "campaign"},
    "traits": {"device": "device"},
}
FOREIGN = (
    "customer,moment,action,row_id,cost,quantity,section,campaign,device\n"
    "c1,2025-12-01 10:00:00,look,1,2.5,1,hats,ads,mobile\n"
    "c1,2025-12-01 10:05:00,buy,2,2.5,4,hats,,mobile\n"
    "c2,2025-12-02 10:00:00,look,3,9,1,bags,mail,desktop\n"
    "c2,2025-12-02 10:01:00,leave,4,,,,,desktop\n"
)


def ms(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp() * 1000)


def test_columns_expressions_and_names_of_a_foreign_file_are_mapped(tmp_path: Path) -> None:
    log = read(write_csv(tmp_path / "log.csv", FOREIGN), with_source(MAPPING))
    found = kept(log)
    look, buy = ms("2025-12-01T10:00:00"), ms("2025-12-01T10:05:00")
    assert found["c1"].events == (
        events.pack(look, 1, events.hash32("1"), events.hash32("hats"), 2.5)
        + events.pack(buy, 7, events.hash32("2"), 0, 10.0)
    )
    referrer, missing = np.frombuffer(found["c1"].request, np.float32).reshape(2, 3)[:, 0]
    assert referrer == 0
    assert math.isnan(missing)
    device = events.from_bytes(found["c2"].traits)
    assert list(device["attribute"]) == [events.hash32("desktop")] * 2
    assert (log.summary.rows, log.summary.events, log.summary.ignored, log.summary.bad) == (4, 3, 1, 0)
    assert (log.summary.visitors, log.summary.first_ms, log.summary.last_ms) == (2, look, ms("2025-12-02T10:00:00"))


def test_an_event_may_be_constant_and_its_column_an_expression(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", FOREIGN)
    constant = with_source({**MAPPING, "event": {"constant": "Home"}})
    assert list(only_kinds(read(path, constant))) == [4] * 4
    computed = with_source({**MAPPING, "event": "CASE WHEN quantity > 1 THEN 'Order Completed' ELSE 'Home' END"})
    assert sorted(only_kinds(read(path, computed))) == [4, 4, 4, 7]


def only_kinds(log: EventLog) -> npt.NDArray[np.uint16]:
    return np.concatenate([part.records["kind"] for part in log])


def test_where_chooses_rows_and_a_query_may_join_files(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", FOREIGN)
    log = read(path, with_source({**MAPPING, "where": "cost > 2 AND section = 'bags'"}))
    assert set(kept(log)) == {"c2"}
    write_csv(tmp_path / "campaigns.txt", "customer,channel\nc1,mail\nc2,ads\n")
    query = "SELECT * EXCLUDE campaign FROM {file} JOIN read_csv('{dir}/campaigns.txt') USING (customer)"
    joined = read(path, with_source({**MAPPING, "query": query, "context": {"referrer": "channel"}}))
    assert np.frombuffer(kept(joined)["c1"].request, np.float32)[0] == 1


def test_each_pattern_of_files_has_a_mapping_of_its_own(tmp_path: Path) -> None:
    write_csv(tmp_path / "orders_1.csv", "buyer,day,total\n007,2025-12-01,3\n")
    write_csv(tmp_path / "visits_1.csv", "who,at\n007,1764547200\n")
    log = read(
        tmp_path,
        with_source(
            [
                {
                    "files": "orders_*",
                    "visitor_id": "buyer",
                    "timestamp": "day",
                    "event": {"constant": "Order Completed"},
                    "properties": {"revenue": "total"},
                },
                {"files": "visits_*", "visitor_id": "who", "timestamp": "at", "event": {"constant": "Home"}},
            ]
        ),
    )
    assert sorted(only(log)["kind"]) == [4, 7]
    assert "revenue" not in log.summary.missing_properties, "what one of the files has is not missing"
    write_csv(tmp_path / "other.csv", "a\n1\n")
    with pytest.raises(UnreadableEvents, match=r"other\.csv: fits none of the patterns of source\.files \(orders"):
        read(tmp_path, with_source([{"files": "orders_*"}, {"files": "visits_*"}]))


@pytest.mark.parametrize(
    ("written", "layout"),
    [
        ("1764579600123", None),
        ("1764579600.1234", None),
        ("2025-12-01T09:00:00.123Z", None),
        ("2025-12-01T09:00:00.1239999Z", None),
        ("2025-12-01 09:00:00.123", None),
        ("2025-12-01T10:00:00.123+01:00", None),
        ("2025-12-01 09:00:00.123 UTC", None),
        ("01.12.2025 09:00:00.123", "%d.%m.%Y %H:%M:%S.%g"),
        ("1 Dec 2025 at 09h00m00s123", "%-d %b %Y at %Hh%Mm%Ss%g"),
        ("2025-12-01 10:00:00.123 +0100", "%Y-%m-%d %H:%M:%S.%g %z"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "ndjson"])
def test_timestamps_may_be_written_in_many_ways(tmp_path: Path, ending: str, written: str, layout: str | None) -> None:
    mapping = {"visitor_id": "who", "timestamp": "at", "event": {"constant": "Home"}, "timestamp_format": layout}
    path = tmp_path / f"log.{ending}"
    if ending == "csv":
        write_csv(path, f'who,at\na,"{written}"\n')
    else:
        write_lines(path, [{"who": "a", "at": written}])
    assert list(only(read(path, with_source(mapping)))["ts_ms"]) == [1764579600123]


@pytest.mark.parametrize(
    "values",
    [
        pa.array([1764579600123], pa.int64()),
        pa.array([1764579600.123], pa.float64()),
        pa.array([1764579600123], pa.timestamp("ms")),
        pa.array([1764579600123999], pa.timestamp("us", "Europe/Paris")),
        pa.array(["2025-12-01T09:00:00.123Z"]),
    ],
    ids=lambda array: str(array.type),
)
def test_timestamps_of_parquet_files_may_have_many_types(tmp_path: Path, values: Any) -> None:
    pq.write_table(pa.table({"who": ["a"], "at": values}), tmp_path / "log.parquet")
    mapping = {"visitor_id": "who", "timestamp": "at", "event": {"constant": "Home"}}
    assert list(only(read(tmp_path / "log.parquet", with_source(mapping)))["ts_ms"]) == [1764579600123]


def test_a_date_is_its_midnight(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "log.csv", "userId,event,timestamp\na,Home,2025-12-01\n")
    assert list(only(read(path, spec.parse(DOCUMENT)))["ts_ms"]) == [ms("2025-12-01")]


def test_leading_zeros_of_ids_attributes_and_categories_are_kept(tmp_path: Path) -> None:
    text = "customer,moment,action,row_id,cost,quantity,section,campaign,device\n"
    text += "".join(f"00{n},1764579600,buy,0{n},{n},1,0{n},0{n},0{n}\n" for n in range(1, 4))
    features: dict[str, Any] = {**DOCUMENT["features"], "device": {"trait": "device", "categories": ["01", "1"]}}
    features["referrer"] = {"request": "referrer", "categories": ["1", "01"]}
    catalogue = {"order": {"code": 7, "event": "Order Completed", "value": "revenue", "attribute": "category"}}
    rows = {"features": {**features, "views": {"count": "order"}}, "events": catalogue}
    found = kept(read(write_csv(tmp_path / "log.csv", text), with_source(MAPPING, **rows)))
    assert set(found) == {"001", "002", "003"}
    assert found["001"].events == events.pack(1764579600000, 7, events.hash32("01"), events.hash32("01"), 1.0)
    assert events.from_bytes(found["001"].traits)["attribute"] == events.hash32("01")
    assert np.frombuffer(found["001"].request, np.float32)[0] == 1


def test_codes_that_look_like_dates_or_large_numbers_stay_as_written(tmp_path: Path) -> None:
    text = "userId,event,timestamp,category,price\n"
    text += "1/2,Product Viewed,1764579600,2025-01-02,1\n2/3,Product Viewed,1764579600,2025-03-04,2\n"
    found = kept(read(write_csv(tmp_path / "log.csv", text), spec.parse(DOCUMENT)))
    assert set(found) == {"1/2", "2/3"}
    assert events.from_bytes(found["1/2"].events)["attribute"] == events.hash32("2025-01-02")


@pytest.mark.parametrize(("words", "kept_as"), [(("yes", "no"), "yes"), (("True", "False"), "true"), (("t", "f"), "t")])
def test_yes_and_no_stay_text_while_true_and_false_are_as_in_json(
    tmp_path: Path, words: tuple[str, str], kept_as: str
) -> None:
    rows = "".join(f"u{n},Product Viewed,1764579600,{words[n % 2]}\n" for n in range(10))
    path = write_csv(tmp_path / "log.csv", "userId,event,timestamp,category\n" + rows)
    record = events.from_bytes(kept(read(path, spec.parse(DOCUMENT)))["u0"].events)
    assert record["attribute"] == events.hash32(kept_as)


ODD_NAMES = (
    "a b",
    "a.b",
    "a,b",
    'quo"te',
    "it's",
    "select",
    "group",
    "ö",
    "1st",
    "a;b--c",
    "x); DROP TABLE t; --",
    "*",
)


@pytest.mark.parametrize("ending", ["csv", "parquet", "ndjson"])
def test_any_name_of_a_column_or_an_event_can_be_mapped(tmp_path: Path, ending: str) -> None:
    rows = [
        {
            "the visitor; --": f"v{place}",
            "moment's": 1764579600,
            "happened": name,
            **dict.fromkeys(ODD_NAMES, place + 0.5),
        }
        for place, name in enumerate(ODD_NAMES)
    ]
    path = tmp_path / f"log.{ending}"
    if ending == "csv":
        lines = [",".join(map(csv_cell, row)) for row in (rows[0], *(row.values() for row in rows))]
        write_csv(path, "\n".join(lines) + "\n")
    elif ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        write_lines(path, rows)
    odd = with_source(
        {
            "visitor_id": "the visitor; --",
            "timestamp": "moment's",
            "event": {"column": "happened", "names": {name: f"{name}'" for name in ODD_NAMES}},
            "properties": {f'{name}"': name for name in ODD_NAMES},
        },
        events={
            f"kind{place}": {"code": place + 1, "event": f"{name}'", "value": f'{name}"'}
            for place, name in enumerate(ODD_NAMES)
        },
        features={"all": {"count": "any"}},
    )
    found = {visitor: events.from_bytes(known.events)[0] for visitor, known in kept(read(path, odd)).items()}
    for place in range(len(ODD_NAMES)):
        assert (found[f"v{place}"]["kind"], found[f"v{place}"]["value"]) == (place + 1, place + 0.5)


def test_any_name_of_a_property_trait_or_context_field_is_found(tmp_path: Path) -> None:
    odd = spec.parse(
        {
            "model": "odd",
            "events": {
                f"kind{place}": {"code": place + 1, "event": name, "value": name, "attribute": f"{name}/~1"}
                for place, name in enumerate(ODD_NAMES)
            },
            "features": {
                **{f"trait{n}": {"trait": name, "categories": [name, "x"]} for n, name in enumerate(ODD_NAMES)},
                **{f"request{n}": {"request": name, "categories": ["x", name]} for n, name in enumerate(ODD_NAMES)},
            },
        }
    )
    sent = [
        {
            "userId": name,
            "event": name,
            "timestamp": 1764579600,
            "properties": {**dict.fromkeys(ODD_NAMES, 2.5), **{f"{name}/~1": name for name in ODD_NAMES}},
            "context": {name: name for name in ODD_NAMES},
        }
        for name in ODD_NAMES
    ]
    wanted = expected(odd, sent)
    assert_the_same(read(write_lines(tmp_path / "log.ndjson", sent), odd), wanted)
    pq.write_table(pa.Table.from_pylist(sent), tmp_path / "log.parquet")
    assert_the_same(read(tmp_path / "log.parquet", odd), wanted)


@pytest.mark.parametrize("ending", ["csv", "parquet", "ndjson"])
def test_a_file_of_any_name_is_read_and_no_other(tmp_path: Path, shop: FeatureSpec, ending: str) -> None:
    names = ("it's", 'quo"te', "a b", "[1]", "x*", "q?", "{dir}", "{file}", "ö", "a;b", "%20", "back\\slash")
    for name in names:
        (tmp_path / name).mkdir()
        for file, visitor in ((name, name), ("1", "wrong"), ("xy", "wrong"), ("qq", "wrong")):
            row = {"userId": visitor, "event": "Home", "timestamp": 1764579600}
            path = tmp_path / name / f"{file}.{ending}"
            if ending == "csv":
                write_csv(path, ",".join(row) + "\n" + ",".join(map(csv_cell, row.values())) + "\n")
            elif ending == "parquet":
                pq.write_table(pa.Table.from_pylist([row]), path)
            else:
                write_lines(path, [row])
    paths = [tmp_path / name / f"{name}.{ending}" for name in names]
    assert set(kept(read(paths, shop))) == set(names)
    queried = with_source({"query": "SELECT * FROM {file} WHERE '{dir}' LIKE '/%'", "event": "event"})
    for path, name in zip(paths, names, strict=True):
        if name in ("it's", "{dir}", "{file}"):
            assert set(kept(read(path, queried))) == {name}


# --- which files ---


def test_files_directories_and_globs_are_read_each_file_once(tmp_path: Path, shop: FeatureSpec) -> None:
    row = {"event": "Home", "timestamp": 1764579600}
    (tmp_path / "deep" / "part.parquet").mkdir(parents=True)
    write_lines(tmp_path / "a.ndjson", [{**row, "userId": "a"}])
    write_csv(tmp_path / "deep" / "b.csv.gz", "userId,event,timestamp\nb,Home,1764579600\n")
    pq.write_table(pa.Table.from_pylist([{**row, "userId": "c"}]), tmp_path / "deep" / "part.parquet" / "0.parquet")
    (tmp_path / "deep" / "notes.txt").write_text("not for reading")
    (tmp_path / "deep" / "_SUCCESS").write_text("")
    paths = [tmp_path, tmp_path / "a.ndjson", tmp_path / "*.ndjson", tmp_path / "deep" / "*", tmp_path / "**" / "*.gz"]
    for chosen in (paths, paths[::-1]):
        log = source.read([str(path) for path in chosen], shop, fresh(tmp_path), now_ms=NOW_MS)
        assert set(kept(log)) == {"a", "b", "c"}
        assert log.summary.rows == 3
        assert sorted(log.summary.files) == ["0.parquet", "a.ndjson", "b.csv.gz"]


def fresh(tmp_path: Path) -> Path:
    workdir = tmp_path.parent / f"work-{random.getrandbits(64):x}"
    workdir.mkdir()
    return workdir


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none.csv", "none.csv: no such file, directory or glob with event files"),
        ("*.none", "*.none: no such file, directory or glob with event files"),
        ("notes.txt", "notes.txt: unknown kind of file; give one of .csv, .tsv, .parquet"),
        ("empty", "empty: holds no event files (.csv, .tsv, .parquet, .ndjson, .jsonl, .json, also .gz)"),
    ],
)
def test_paths_without_event_files_are_refused(tmp_path: Path, shop: FeatureSpec, name: str, said: str) -> None:
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableEvents) as caught:
        source.read([str(tmp_path / name)], shop, fresh(tmp_path))
    assert said in str(caught.value)


def test_files_of_one_kind_may_have_different_columns(tmp_path: Path, shop: FeatureSpec) -> None:
    write_csv(tmp_path / "1.csv", "userId,event,timestamp,price\na,Product Viewed,1764579600,1.5\n")
    write_csv(tmp_path / "2.csv", "timestamp,price,extra,event,anonymousId\n1764579600,2.5,x,Product Viewed,b\n")
    write_csv(tmp_path / "3.csv", "userId,event,timestamp\nc,Product Viewed,1764579600\n")
    pq.write_table(pa.table({"userId": ["d"], "event": ["Home"], "timestamp": [1764579600]}), tmp_path / "1.parquet")
    pq.write_table(pa.table({"event": ["Home"], "timestamp": [1764579600], "userId": ["e"]}), tmp_path / "2.parquet")
    write_lines(tmp_path / "1.ndjson", [{"userId": "f", "event": "Home", "timestamp": 1764579600}])
    write_lines(tmp_path / "2.ndjson", [{"anonymousId": "g", "event": "Home", "timestamp": 1764579600, "extra": [1]}])
    found = kept(read(tmp_path, shop))
    values = {visitor: float(events.from_bytes(known.events)["value"][0]) for visitor, known in found.items()}
    assert set(values) == set("abcdefg")
    assert (values["a"], values["b"]) == (1.5, 2.5)
    assert math.isnan(values["c"])


# --- what cannot be read ---


def refused(tmp_path: Path, spec: FeatureSpec, **given: Any) -> str:
    with pytest.raises(UnreadableEvents) as caught:
        read(tmp_path, spec, **given)
    told = str(caught.value)
    assert "\n" not in told
    return told


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"visitor_id": "client"}, "source.visitor_id: client"),
        ({"timestamp": "date"}, "source.timestamp: date"),
        ({"event": "kind"}, "source.event: kind"),
        ({"message_id": "uid"}, "source.message_id: uid"),
        ({"properties": {"price": "Price * 2"}}, "source.properties.price: Price * 2"),
        ({"context": {"referrer": "ref"}}, "source.context.referrer: ref"),
        ({"traits": {"device": "dev"}}, "source.traits.device: dev"),
        ({"where": "amount > 3"}, "source.where: amount > 3"),
    ],
)
@pytest.mark.parametrize("ending", ["csv", "parquet", "ndjson"])
def test_a_column_that_is_not_there_is_named_with_its_place_and_what_the_file_has(
    tmp_path: Path, ending: str, change: dict[str, Any], place: str
) -> None:
    path = write_csv(tmp_path / "log.csv", FOREIGN)
    if ending != "csv":
        form = "parquet" if ending == "parquet" else "json"
        duckdb.sql(f"COPY (FROM '{path}') TO '{tmp_path}/log.{ending}' (FORMAT {form})")
        path.unlink()
    told = refused(tmp_path, with_source({**MAPPING, **change}))
    assert told.startswith(f"{tmp_path}/log.{ending}: {place} is no column and no expression over the columns")
    assert told.endswith("; the file has customer, moment, action, row_id, cost, quantity, section, campaign, device")


@pytest.mark.parametrize(
    ("header", "said"),
    [
        (
            "client,event,timestamp",
            "has neither userId nor anonymousId; name the visitor's column with source.visitor_id",
        ),
        ("userId,event,date", "has no column timestamp; name it with source.timestamp in the spec"),
        ("userId,action,timestamp", "has no column event; write source.event in the spec, as {constant: EVENT NAME}"),
    ],
)
def test_a_native_file_without_a_needed_column_says_which(
    tmp_path: Path, shop: FeatureSpec, header: str, said: str
) -> None:
    write_csv(tmp_path / "log.csv", f"{header}\na,Home,1764579600\n")
    told = refused(tmp_path, shop)
    assert said in told
    assert told.endswith(f"the file has {header.replace(',', ', ')}")
    (tmp_path / "log.csv").unlink()
    write_lines(tmp_path / "log.ndjson", [dict(zip(header.split(","), ("a", "Home", 1), strict=True))])
    assert said in refused(tmp_path, shop)


def test_unparsable_timestamps_are_counted_and_shown_and_bounded(tmp_path: Path, shop: FeatureSpec) -> None:
    rows = [{"userId": "a", "event": "Home", "timestamp": 1764579600 + n} for n in range(5)]
    bad: list[dict[str, Any]] = [
        *({"userId": "a", "event": "Home", "timestamp": text} for text in ("soon", "31/12/25", "soon")),
        {"event": "Home", "timestamp": 1764579600},
        {"userId": "a", "event": "Home"},
    ]
    write_lines(tmp_path / "log.ndjson", rows + bad)
    log = read(tmp_path, shop, max_bad_rows=5)
    assert (log.summary.bad, log.summary.events, log.summary.rows) == (5, 5, 10)
    shown = ["a row without a visitor", "timestamp 31/12/25", "timestamp missing", "timestamp soon"]
    assert list(log.summary.examples) == shown
    told = refused(tmp_path, shop, max_bad_rows=4)
    assert told.startswith("5 of 10 rows are bad, more than --max-bad-rows 4; for example a row without a visitor;")
    assert "timestamp soon" in told
    assert "source.timestamp_format" in told


@pytest.mark.parametrize(
    "wrong",
    [
        "1969-12-31T23:59:59Z",
        "-1",
        "1764579600123456",
        "2026-01-03",
        "9999-12-31",
        "99999-01-01",
        "0001-01-01",
        "1e300",
    ],
)
@pytest.mark.parametrize("ending", ["csv", "ndjson"])
def test_one_impossible_timestamp_does_not_stretch_the_history(
    tmp_path: Path, shop: FeatureSpec, ending: str, wrong: str
) -> None:
    rows = [("a", "Home", str(1764579600 + n)) for n in range(5)] + [("a", "Home", wrong)]
    if ending == "csv":
        write_csv(tmp_path / "log.csv", "\n".join(map(",".join, [("userId", "event", "timestamp"), *rows])) + "\n")
    else:
        names = ("userId", "event", "timestamp")
        write_lines(tmp_path / "log.ndjson", [dict(zip(names, row, strict=True)) for row in rows])
    summary = read(tmp_path, shop).summary
    assert (summary.events, summary.bad) == (5, 1)
    assert (summary.first_ms, summary.last_ms) == (1764579600000, 1764579604000)
    assert wrong in summary.examples[0]


def test_csv_lines_that_do_not_fit_are_counted_with_their_line(tmp_path: Path, shop: FeatureSpec) -> None:
    rows = [f"u{n},Product Viewed,1764579600,{n}.5" for n in range(50)]
    rows[10] = "short,Product Viewed"
    rows[20] = "long,Product Viewed,1764579600,1.5,extra"
    path = write_csv(tmp_path / "log.csv", "userId,event,timestamp,price\n" + "\n".join(rows) + "\n")
    log = read(path, shop)
    assert (log.summary.rows, log.summary.events, log.summary.bad) == (50, 48, 2)
    assert [text.partition(":")[0] for text in log.summary.examples] == ["log.csv line 12", "log.csv line 22"]
    assert "2 of 50 rows are bad" in refused(tmp_path, shop, max_bad_rows=1)


def test_a_number_that_is_none_spoils_its_line_or_its_value_but_no_other(tmp_path: Path, shop: FeatureSpec) -> None:
    rows = [f"u{n},Product Viewed,1764579600,{n}.5" for n in range(20_000)]
    rows[100] = "u100,Product Viewed,1764579600,unknown"
    log = read(write_csv(tmp_path / "log.csv", "userId,event,timestamp,price\n" + "\n".join(rows) + "\n"), shop)
    assert log.summary.events + log.summary.bad == 20_000
    found = kept(log)
    assert float(events.from_bytes(found["u99"].events)["value"][0]) == 99.5
    assert "u100" not in found or math.isnan(events.from_bytes(found["u100"].events)["value"][0])


def test_lines_that_are_no_json_objects_are_counted(tmp_path: Path, shop: FeatureSpec) -> None:
    sound = json.dumps({"userId": "a", "event": "Home", "timestamp": 1764579600})
    lines = [
        sound,
        "garbage",
        '"text"',
        "[1, 2]",
        '{"userId": "b", "event": "Home", "timest',
        "",
        "{}",
        sound[:-1],
        sound,
    ]
    summary = read(write_lines(tmp_path / "log.ndjson", lines), shop).summary
    assert (summary.events, summary.bad) == (2, 6)
    assert summary.examples == ("a line that is no event",)


def test_events_that_the_service_refuses_are_bad_here_too(tmp_path: Path, shop: FeatureSpec) -> None:
    sound = {"userId": "a", "event": "Home", "timestamp": 1764579600}
    bad = [
        {**sound, "type": "click"},
        {**sound, "event": ""},
        {**sound, "event": None},
        {**sound, "properties": "text"},
        {**sound, "userId": "x" * 257},
        {**sound, "userId": True},
    ]
    summary = read(write_lines(tmp_path / "log.ndjson", [sound, *bad]), shop).summary
    assert (summary.events, summary.bad) == (1, 6)
    assert set(summary.examples) == {
        "a row without a visitor",
        "an event without a name",
        "an id of more than 256 characters",
        "properties, traits or context that are no object",
        "type click",
    }


def test_json_that_is_no_list_of_lines_is_told_so(tmp_path: Path, shop: FeatureSpec) -> None:
    path = tmp_path / "log.json"
    for content in ('[{"userId": "a"}, {"userId": "b"}]', "garbage\nmore\n", "", "[]", '"text"\n'):
        path.write_text(content)
        assert "holds no JSON object a line; write NDJSON, one event a line" in refused(tmp_path, shop)


@pytest.mark.parametrize("content", [b"", b"userId,event,timestamp\n", b"\n"])
def test_a_csv_file_without_rows_is_told_so(tmp_path: Path, shop: FeatureSpec, content: bytes) -> None:
    (tmp_path / "log.csv").write_bytes(content)
    told = refused(tmp_path, shop)
    assert "none of 0 rows is an event of the catalogue" in told or "the file has" in told


def test_an_empty_file_among_others_does_no_harm(tmp_path: Path, shop: FeatureSpec) -> None:
    write_lines(tmp_path / "a.ndjson", [{"userId": "a", "event": "Home", "timestamp": 1764579600}])
    write_lines(tmp_path / "b.ndjson", [])
    write_csv(tmp_path / "c.csv", "userId,event,timestamp\n")
    pq.write_table(
        pa.table(
            {
                "userId": pa.array([], pa.string()),
                "event": pa.array([], pa.string()),
                "timestamp": pa.array([], pa.int64()),
            }
        ),
        tmp_path / "d.parquet",
    )
    assert read(tmp_path, shop).summary.rows == 1


def test_files_without_an_event_of_the_catalogue_show_the_names_that_they_have(
    tmp_path: Path, shop: FeatureSpec
) -> None:
    rows = [("a", "purchase"), ("b", "view"), ("b", "view")]
    write_csv(tmp_path / "log.csv", "userId,event,timestamp\n" + "".join(f"{a},{b},1764579600\n" for a, b in rows))
    write_lines(tmp_path / "log.ndjson", [{"userId": a, "event": f"{b}!", "timestamp": 1764579600} for a, b in rows])
    for file, names in ((tmp_path / "log.csv", "purchase, view"), (tmp_path / "log.ndjson", "purchase!, view!")):
        with pytest.raises(UnreadableEvents) as caught:
            read(file, shop)
        told = str(caught.value)
        assert told.startswith("none of 3 rows is an event of the catalogue (Product Viewed, Product Added, ")
        assert f"; the files have {names}; map the files' event names with source.event in the spec" in told


@pytest.mark.parametrize("name", ["log.csv.gz", "log.ndjson.gz", "log.parquet"])
def test_a_truncated_or_foreign_file_is_refused_by_name(tmp_path: Path, shop: FeatureSpec, name: str) -> None:
    rows = [{"userId": f"a{n}", "event": "Home", "timestamp": 1764579600} for n in range(5000)]
    path = tmp_path / name
    if name == "log.parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"plain text, nothing packed"):
        path.write_bytes(content)
        assert refused(tmp_path, shop).startswith(f"{path}: ")


def test_a_file_that_is_not_utf_8_has_bad_lines_or_is_refused(tmp_path: Path, shop: FeatureSpec) -> None:
    rows = "".join(f"u{n},Home,1764579600,x\n" for n in range(100)) + "Jörg,Home,1764579600,x\n"
    (tmp_path / "log.csv").write_bytes(("userId,event,timestamp,note\n" + rows).encode("latin-1"))
    summary = read(tmp_path, shop).summary
    assert (summary.events, summary.bad) == (100, 1)
    assert "utf-8" in summary.examples[0]


@pytest.mark.parametrize("layout", ["%Q", "%d.%m.%Y"])
def test_a_layout_of_timestamps_that_does_not_fit_is_told(tmp_path: Path, layout: str) -> None:
    write_csv(tmp_path / "log.csv", FOREIGN)
    told = refused(tmp_path, with_source({**MAPPING, "timestamp_format": layout}), max_bad_rows=0)
    assert "log.csv" in told or "timestamp 2025-12-01 10:00:00" in told


def test_names_of_missing_fields_are_reported(tmp_path: Path, shop: FeatureSpec) -> None:
    path = write_csv(tmp_path / "log.csv", "userId,event,timestamp,price\na,Home,1764579600,1\n")
    missing = read(path, shop).summary.missing_properties
    assert set(missing) == {
        *("category", "sku", "revenue", "path", "context.referrer", "context.grade", "context.amount"),
        *("traits.device", "traits.tier", "traits.loyalty"),
    }


def test_memory_that_is_no_amount_is_refused_and_too_little_is_told(tmp_path: Path, shop: FeatureSpec) -> None:
    path = write_csv(tmp_path / "log.csv", "userId,event,timestamp\n" + "a,Home,1764579600\n" * 100_000)
    with pytest.raises(PropensityError, match=r"--memory-limit lots: .*; write for example 1GB"):
        read(path, shop, memory_limit="lots")
    with pytest.raises(UnreadableEvents, match=r"Out of Memory Error: .*; raise --memory-limit"):
        read(path, shop, memory_limit="1MB")


# --- order, duplicates, partitions ---


def test_an_event_that_is_delivered_twice_counts_once(tmp_path: Path, shop: FeatureSpec) -> None:
    event = {
        "userId": "a",
        "event": "Product Viewed",
        "timestamp": 1764579600,
        "messageId": "m",
        "properties": {"price": 1},
    }
    unnamed = {**event, "messageId": None, "timestamp": 1764579601}
    other = {**unnamed, "properties": {"price": 2}}
    log = read(write_lines(tmp_path / "log.ndjson", [event, unnamed, event, other, unnamed]), shop)
    assert sorted(only(log)["value"]) == [1, 1, 2]
    assert log.summary.rows == 5


def test_the_order_of_rows_and_files_and_the_number_of_partitions_change_nothing(
    tmp_path: Path, shop: FeatureSpec, monkeypatch: pytest.MonkeyPatch, sound_events: list[dict[str, Any]]
) -> None:
    chance = random.Random(3)
    ties = [{**event, "timestamp": NOW_MS - chance.randrange(5) * 1000} for event in sound_events]
    twins = [{**event, "context": chance.choice(ties)["context"]} for event in chance.sample(ties, 500)]
    rows = ties + twins
    found, fingerprints = [], set()
    for number, share in enumerate((10**6, 1000, 100, 30)):
        chance.shuffle(rows)
        directory = tmp_path / str(number)
        directory.mkdir()
        cuts = sorted(chance.sample(range(len(rows)), number))
        for name, (begin, end) in zip(
            chance.sample("abcdef", number + 1), itertools.pairwise([0, *cuts, len(rows)]), strict=True
        ):
            write_lines(directory / f"{name}.ndjson", rows[begin:end])
        monkeypatch.setattr(source, "_PARTITION_ROWS", share)
        log = read(directory, shop)
        assert log.partitions == len(rows) // share + 1
        found.append(kept(log))
        fingerprints.add(log.summary.fingerprint)
    assert all(other == found[0] for other in found[1:])
    assert len(fingerprints) == 1


def test_the_fingerprint_tells_any_other_content(tmp_path: Path, shop: FeatureSpec) -> None:
    event = {
        "userId": "a",
        "event": "Product Viewed",
        "timestamp": 1764579600,
        "messageId": "m",
        "properties": {"price": 1, "category": "x"},
        "context": {"referrer": "ads"},
        "traits": {"tier": "gold"},
    }
    changes: list[dict[str, Any]] = [
        {},
        {"userId": "b"},
        {"timestamp": 1764579601},
        {"messageId": "n"},
        {"properties": {"price": 2, "category": "x"}},
        {"properties": {"price": 1, "category": "y"}},
        {"context": {"referrer": "mail"}},
        {"traits": {"tier": "none"}},
    ]
    contents = [[{**event, **change}] for change in changes] + [[event, event], [event, event, event]]
    prints = set()
    for number, content in enumerate(contents):
        path = write_lines(tmp_path / f"{number}.ndjson", content)
        prints.add(read(path, shop).summary.fingerprint)
    assert len(prints) == len(contents)


def test_traits_that_are_said_in_one_millisecond_are_told_apart_the_same_way_however_they_come(
    tmp_path: Path, shop: FeatureSpec
) -> None:
    said = [("gold", 5), ("none", 5), ("none", 6), ("gold", 7), ("none", 7), ("gold", 8), ("gold", 9)]
    rows = [
        {"userId": "a", "event": "Home", "timestamp": 1764579600_000 + at, "traits": {"tier": tier}}
        for tier, at in said
    ]
    wanted = expected(shop, rows)
    for number, order in enumerate(itertools.islice(itertools.permutations(rows), 0, 5040, 600)):
        assert_the_same(read(write_lines(tmp_path / f"{number}.ndjson", order), shop), wanted)


# --- SQL for hashes and numbers ---


@settings(max_examples=200)
@given(texts=st.lists(st.one_of(st.none(), st.text(st.characters(exclude_categories=["Cs"]))), min_size=1))
def test_sql_hashes_as_records_do_and_nothing_has_no_hash(texts: list[str | None]) -> None:
    rows = duckdb.execute(f"SELECT {sql.hash32('t')} FROM (SELECT unnest(?::VARCHAR[]) AS t)", [texts]).fetchall()
    assert [row[0] for row in rows] == [None if text is None else events.hash32(text) for text in texts]


@settings(max_examples=200)
@given(values=st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=1))
def test_sql_writes_numbers_as_the_service_does(values: list[float]) -> None:
    field = sql.field("x", "DOUBLE")
    rows = duckdb.execute(f"SELECT {sql.text(field)} FROM (SELECT unnest(?::DOUBLE[]) AS x)", [values]).fetchall()
    assert [row[0] for row in rows] == [features.text_of(value) for value in values]


@settings(max_examples=200)
@given(texts=st.lists(st.text("0123456789+-.eE _xinfa", max_size=8), min_size=1))
def test_sql_reads_numbers_that_are_text_as_the_service_does(texts: list[str]) -> None:
    field = sql.field("t", "VARCHAR")
    query = f"SELECT TRY_CAST({sql.number(field)} AS FLOAT) FROM (SELECT unnest(?::VARCHAR[]) AS t)"
    for text, (found,) in zip(texts, duckdb.execute(query, [texts]).fetchall(), strict=True):
        wanted = np.float32(ingest.number_of(text))
        finite = found is not None and math.isfinite(found)
        assert finite == bool(np.isfinite(wanted)), text
        assert not finite or found == wanted, text
