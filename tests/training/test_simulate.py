"""The simulated shop: the same bytes from the same seed, and a truth that its own orders bear out."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from service.core.errors import PropensityError
from training.shopfiles import ENDINGS
from training.simulate import DAY_MS, Shop, Summary, simulate, sized

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MILLION = 1_000_000
HORIZON_MS = 7 * DAY_MS
SMALL = Shop(visitors=600, days=20, seed=3)

RUN = """
import json, resource, sys, time
from dataclasses import asdict
from pathlib import Path
from training.simulate import Shop, simulate, sized

begin = time.process_time()  # others may keep the machine busy
summary = simulate(sized(Shop(seed=1), int(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]))
seconds = time.process_time() - begin
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
if Path("/proc/self/status").exists():  # there ru_maxrss begins with the memory of the process that started this one
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
print(json.dumps({"seconds": seconds, "peak": peak, "summary": asdict(summary)}))
"""


@dataclass(frozen=True)
class Simulated:
    """A million events. `table` is the file; the arrays hold its distinct events by visitor and time."""

    table: Any
    seconds: float
    peak_mb: float
    summary: Summary
    visitor: Integers
    at_ms: Integers
    event: npt.NDArray[np.object_]
    propensity: Floats
    label: npt.NDArray[np.bool_]
    matured: npt.NDArray[np.bool_]


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Simulated:
    folder = tmp_path_factory.mktemp("shop")
    events, truth = folder / "events.parquet", folder / "truth.parquet"
    command = [sys.executable, "-c", RUN, str(MILLION), str(events), str(truth)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    figures = json.loads(done.stdout)
    table = pq.read_table(events)
    true = pq.read_table(truth)
    encoded = true["visitor_id"].combine_chunks().dictionary_encode()
    visitor = encoded.indices.to_numpy().astype(np.int64)
    at_ms = true["at_ms"].to_numpy()
    name = named(table, encoded.dictionary, visitor, at_ms)
    key = visitor * 10**13 + at_ms
    orders = key[name == "Order Completed"]
    following = np.append(orders, np.iinfo(np.int64).max)[np.searchsorted(orders, key, side="right")]
    return Simulated(
        table=table,
        seconds=figures["seconds"],
        peak_mb=figures["peak"] / (1024 if sys.platform == "linux" else 1024**2),
        summary=Summary(**figures["summary"]),
        visitor=visitor,
        at_ms=at_ms,
        event=name,
        propensity=true["propensity"].to_numpy(),
        label=following <= key + HORIZON_MS,
        matured=at_ms + HORIZON_MS <= epoch_ms(Shop().end),
    )


def named(table: Any, ids: Any, visitor: Integers, at_ms: Integers) -> npt.NDArray[np.object_]:
    """The event's name for each row of the truth, found by visitor and time in the file of events."""
    owner = pc.index_in(visitor_ids(table), ids).to_numpy().astype(np.int64)
    at = table["timestamp"].cast(pa.int64()).to_numpy()
    key, first = np.unique(owner * 10**13 + at, return_index=True)
    assert np.array_equal(key, np.sort(visitor * 10**13 + at_ms)), "the truth has other rows than the events"
    assert np.array_equal(key, visitor * 10**13 + at_ms), "the truth is not by visitor and time"
    return np.asarray(table["event"].combine_chunks().to_numpy(zero_copy_only=False)[first], object)


def visitor_ids(table: Any) -> Any:
    return pc.coalesce(table["userId"], table["anonymousId"]).combine_chunks()


def epoch_ms(moment: datetime) -> int:
    return round(moment.timestamp() * 1000)


def field(table: Any, group: str, name: str) -> Any:
    return pc.struct_field(table[group], name).combine_chunks()


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def worst_bias(shop: Simulated, propensity: Floats) -> float:
    """Largest |sum of label - propensity| over bins of propensity, in standard errors of independent trials.

    Each visitor counts once a bin, with the first event in it: a choice that looks only at the past keeps the
    mean. An event drawn from the visitor's whole history would not: how long that gets depends on the orders.
    """
    edges = [0.003, 0.01, 0.03, 0.06, 0.1, 0.2, 0.35, 0.5, 0.65]
    inside = np.flatnonzero(shop.matured & (propensity > 0))
    cell = shop.visitor[inside] * (len(edges) + 1) + np.digitize(propensity[inside], edges)
    first = inside[np.unique(cell, return_index=True)[1]]
    group = np.digitize(propensity[first], edges)
    surprise = np.bincount(group, shop.label[first] - propensity[first])
    spread = np.sqrt(np.bincount(group, propensity[first] * (1 - propensity[first])))
    print("label - truth, in standard errors:", np.round(surprise / spread, 1))
    return float(np.max(np.abs(surprise / spread)))


def test_a_million_events_take_less_than_twenty_seconds_and_a_gigabyte(simulated: Simulated) -> None:
    rows = len(simulated.table)
    print(f"{rows} rows with truth: {simulated.seconds:.1f} s, peak {simulated.peak_mb:.0f} MB")
    assert rows == pytest.approx(MILLION, rel=0.05)
    assert simulated.seconds * MILLION / rows < 20
    assert simulated.peak_mb < 1000


def test_the_true_propensity_is_what_the_orders_that_follow_bear_out(simulated: Simulated) -> None:
    assert worst_bias(simulated, simulated.propensity) < 4
    assert worst_bias(simulated, np.minimum(simulated.propensity * 1.1, 0.99)) > 4, (
        "this check would not see a bias of a tenth"
    )


def test_the_truth_ranks_well_but_not_perfectly_and_orders_are_rare(simulated: Simulated) -> None:
    label, propensity = simulated.label[simulated.matured], simulated.propensity[simulated.matured]
    assert 0.03 < label.mean() < 0.10
    assert 0.80 < roc_auc_score(label, propensity) < 0.93


def test_the_truth_is_a_probability_of_each_distinct_event(simulated: Simulated) -> None:
    assert len(simulated.propensity) == len(pc.unique(simulated.table["messageId"])) == simulated.summary.events
    assert simulated.propensity.min() >= 0
    assert simulated.propensity.max() < 1


def test_carts_raise_the_propensity_and_orders_lower_it(simulated: Simulated) -> None:
    by_event = {
        name: simulated.propensity[simulated.event == name].mean()
        for name in ("Product Viewed", "Product Added", "Order Completed")
    }
    assert by_event["Product Added"] > 2 * by_event["Product Viewed"]
    assert by_event["Order Completed"] < by_event["Product Added"] / 2


def test_a_visitor_never_has_two_events_in_one_millisecond(simulated: Simulated) -> None:
    same_visitor = np.diff(simulated.visitor) == 0
    assert np.all(np.diff(simulated.at_ms)[same_visitor] > 0)


def test_duplicates_repeat_an_event_in_every_field(simulated: Simulated) -> None:
    table = simulated.table
    codes = table["messageId"].combine_chunks().dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    again = np.flatnonzero(np.diff(codes[order]) == 0)
    assert len(again) == simulated.summary.duplicates == simulated.summary.rows - simulated.summary.events
    assert len(again) / len(table) == pytest.approx(Shop().duplicate_share, rel=0.1)
    assert table.take(order[again][:500]).equals(table.take(order[again + 1][:500]))


def test_the_file_is_in_the_order_of_delivery_and_a_share_comes_late(simulated: Simulated) -> None:
    at = simulated.table["timestamp"].cast(pa.int64()).to_numpy()
    _, first = np.unique(
        simulated.table["messageId"].combine_chunks().dictionary_encode().indices.to_numpy(),
        return_index=True,
    )
    at = at[np.sort(first)]
    behind = np.maximum.accumulate(at) - at
    assert (behind > 20_000).mean() == pytest.approx(Shop().late_share, rel=0.1)
    assert behind.max() > 3_600_000
    assert simulated.summary.late / simulated.summary.events == pytest.approx(Shop().late_share, rel=0.1)


def test_bots_view_fast_and_never_order(simulated: Simulated) -> None:
    hopeless = np.bincount(simulated.visitor, simulated.propensity) == 0
    of_bot = hopeless[simulated.visitor]
    assert of_bot.sum() == simulated.summary.bot_events
    assert 0.01 < of_bot.mean() < 0.10
    assert set(simulated.event[of_bot]) == {"Product Viewed"}
    gap = np.diff(simulated.at_ms)
    assert np.median(gap[of_bot[1:] & of_bot[:-1]]) < 1000 < np.median(gap[~of_bot[1:] & ~of_bot[:-1]])


def test_traffic_follows_the_hour_the_day_and_the_campaigns(simulated: Simulated) -> None:
    people = simulated.propensity > 0
    hour = simulated.at_ms[people] // 3_600_000
    by_hour = np.bincount(hour % 24, minlength=24)
    assert by_hour[20] > 5 * by_hour[3]
    by_day = np.bincount((hour // 24 + 3) % 7, minlength=7)
    assert by_day[6] > 1.15 * by_day[2]  # Sunday, Wednesday
    campaign, referrer = (
        field(simulated.table, "context", "campaign"),
        field(simulated.table, "context", "referrer"),
    )
    for channel in ("email", "ads"):
        caused = pc.fill_null(pc.starts_with(campaign, channel), False)
        assert pc.sum(caused).as_py() > 5000
        assert pc.unique(referrer.filter(caused)).to_pylist() == [channel]
        at = simulated.table["timestamp"].filter(pc.equal(campaign, f"{channel}_1")).cast(pa.int64())
        assert pc.max(at).as_py() - pc.min(at).as_py() < 49 * 3_600_000
    mailed = simulated.table.filter(pc.fill_null(pc.starts_with(campaign, "email"), False))
    assert mailed["userId"].null_count == 0


def test_events_have_the_fields_of_their_kind(simulated: Simulated) -> None:
    table = simulated.table
    assert table.schema.names == [
        *(
            "type",
            "event",
            "userId",
            "anonymousId",
            "messageId",
            "timestamp",
            "properties",
            "context",
            "traits",
        )
    ]
    assert table.schema.field("timestamp").type == pa.timestamp("ms", tz="UTC")
    one_id = pc.xor(pc.is_valid(table["userId"]), pc.is_valid(table["anonymousId"]))
    assert pc.all(one_id).as_py()
    assert 0.25 < 1 - table["userId"].null_count / len(table) < 0.60
    login = pc.equal(table["type"], "identify")
    assert table.filter(login)["userId"].null_count == 0
    for present in (pc.is_valid(table["traits"]), pc.is_null(table["event"])):
        assert pc.all(pc.equal(login, present)).as_py()
    filled = {
        "price": {"Product Viewed", "Product Added"},
        "category": {"Product Viewed", "Product Added"},
        "query": {"Products Searched"},
        "revenue": {"Order Completed"},
    }
    for name, events in filled.items():
        present = pc.is_valid(field(table, "properties", name))
        assert set(pc.unique(table["event"].filter(present)).to_pylist()) == events
        assert pc.all(present.filter(pc.is_in(table["event"], pa.array(sorted(events))).combine_chunks())).as_py()
    devices = pc.unique(field(table, "context", "device")).to_pylist()
    assert sorted(devices) == ["desktop", "mobile", "tablet"]
    tiers = pc.unique(field(table, "traits", "loyalty_tier").drop_null()).to_pylist()
    assert sorted(tiers) == ["bronze", "gold", "none", "silver"]
    assert pc.min(field(table, "properties", "revenue")).as_py() > 0


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_same_shop_gives_the_same_bytes_and_another_seed_others(tmp_path: Path, ending: str) -> None:
    digests = []
    for run, shop in enumerate((SMALL, SMALL, Shop(visitors=600, days=20, seed=4))):
        out, truth = tmp_path / f"{run}{ending}", tmp_path / f"truth{run}.parquet"
        simulate(shop, out, truth)
        digests.append((digest(out), digest(truth)))
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]
    assert digests[0][1] != digests[2][1]


def test_every_format_says_the_same(tmp_path: Path) -> None:
    for ending in ENDINGS:
        simulate(SMALL, tmp_path / f"events{ending}")
    for text in ("ndjson", "csv"):
        packed = gzip.decompress((tmp_path / f"events.{text}.gz").read_bytes())
        assert packed == (tmp_path / f"events.{text}").read_bytes()
    rows = [without_nulls(row) for row in pq.read_table(tmp_path / "events.parquet").to_pylist()]
    lines = [json.loads(line) for line in (tmp_path / "events.ndjson").read_text().splitlines()]
    assert len(rows) > 3000
    assert lines == rows
    with (tmp_path / "events.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    flat = [{name: str(value) for name, value in flattened(row).items()} for row in rows]
    parsed = [{name: plain(value) for name, value in row.items() if value} for row in table]
    assert parsed == [{name: plain(value) for name, value in row.items()} for row in flat]


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """An event as its JSON has it: what is null is left out and the time is ISO 8601."""
    kept: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            kept[name] = without_nulls(value)
        elif isinstance(value, datetime):
            kept[name] = value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
        elif value is not None:
            kept[name] = value
    return kept


def flattened(row: dict[str, Any]) -> dict[str, Any]:
    groups = [value for value in row.values() if isinstance(value, dict)]
    single = {name: value for name, value in row.items() if not isinstance(value, dict)}
    return {name: value for group in [single, *groups] for name, value in group.items()}


def plain(text: str) -> str:
    """Numbers written the same way: 12 and 12.0 are one value."""
    return text.removesuffix(".0")


def test_no_event_lies_outside_the_days_of_the_shop(tmp_path: Path) -> None:
    shop = Shop(visitors=2000, days=12, seed=5, end=datetime(2026, 3, 9, 13, 37, 12, 345_000, UTC))
    simulate(shop, tmp_path / "events.parquet", tmp_path / "truth.parquet")
    at = pq.read_table(tmp_path / "truth.parquet")["at_ms"].to_numpy()
    assert epoch_ms(shop.end) - 12 * DAY_MS <= at.min() < epoch_ms(shop.end) - 11 * DAY_MS
    assert epoch_ms(shop.end) - DAY_MS < at.max() <= epoch_ms(shop.end)


def test_a_shop_without_any_event_is_still_a_readable_file(tmp_path: Path) -> None:
    idle = next(
        shop
        for shop in (Shop(visitors=1, days=8, seed=seed) for seed in range(100))
        if simulate(shop, tmp_path / "events.parquet", tmp_path / "truth.parquet").events == 0
    )
    assert len(pq.read_table(tmp_path / "events.parquet")) == len(pq.read_table(tmp_path / "truth.parquet")) == 0
    simulate(idle, tmp_path / "events.ndjson")
    assert (tmp_path / "events.ndjson").read_bytes() == b""


def test_a_size_in_events_is_met_about(tmp_path: Path) -> None:
    summary = simulate(sized(Shop(seed=9, days=30), 200_000), tmp_path / "events.parquet")
    assert summary.rows == pytest.approx(200_000, rel=0.05)


def test_progress_counts_up_to_its_total(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    simulate(Shop(visitors=20_000, days=30), tmp_path / "e.csv", on_progress=lambda *at: seen.append(at))
    total = seen[0][1]
    assert seen == [(done, total) for done in range(1, total + 1)]


def test_an_interrupted_run_leaves_nothing_behind(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(SMALL, tmp_path / "events.ndjson.gz", tmp_path / "truth.parquet", interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"visitors": -5}, "visitors is -5; write a number from 1"),
        ({"visitors": 0}, "visitors is 0; write a number from 1"),
        ({"days": 5}, "days is 5; write more than the horizon of 7 days"),
        ({"days": 7}, "days is 7; write more than the horizon of 7 days"),
        ({"horizon_days": 0}, "horizon_days is 0; write a number from 1"),
        ({"seed": -1}, "seed is -1; write 0 or a positive whole number"),
        ({"end": datetime(2026, 1, 1)}, "without a time zone; write it in UTC"),
        ({"bot_share": 1.5}, "bot_share is 1.5; write a share from 0 to below 1"),
        ({"late_share": float("nan")}, "late_share is nan; write a share from 0 to below 1"),
    ],
)
def test_a_shop_that_cannot_be_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PropensityError, match=message):
        Shop(**fields)


def test_files_that_cannot_be_written_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(PropensityError, match=r"let its name end in \.parquet"):
        simulate(SMALL, tmp_path / "events.xlsx")
    with pytest.raises(PropensityError, match="name another file that ends in .parquet"):
        simulate(SMALL, tmp_path / "events.parquet", tmp_path / "events.parquet")
    with pytest.raises(PropensityError, match="events is 0; write a positive number"):
        sized(SMALL, 0)
    assert list(tmp_path.iterdir()) == []
