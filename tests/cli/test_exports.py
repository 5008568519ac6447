"""`propensity audiences export` as it is typed, over a real feature cache."""

from __future__ import annotations

import asyncio
import csv
import json
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from service import consent, identity
from service.embedded import EmbeddedServer
from service.members import Members
from service.store import Store
from service.visitors import Visitors
from tests.cli.test_commands import propensity


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    directory = tmp_path / "scores"
    directory.mkdir()
    columns = {"propensity": np.array([0.3, 0.1, 0.1, 0.1], np.float32), "segment": ["champions", *["nurture"] * 3]}
    pq.write_table(pa.table(columns), directory / "part-00000.parquet")
    return directory


@pytest.fixture
def cache(embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PROPENSITY_REDIS_URL", embedded_server.url)
    monkeypatch.setenv("PROPENSITY_NAMESPACE", "export")
    return embedded_server.url


async def fill(url: str, agreed: int, refused: int) -> None:
    """An audience of visitors with addresses, and one of whom nothing is known."""
    store, now_ms = Store.open(url, namespace="export", retention_ms=10**9), time.time_ns() // 1_000_000
    members, names = Members(store), [f"visitor-{number}" for number in range(agreed + refused)]
    for number, name in enumerate(names):
        own = [
            consent.identifier(now_ms, [form], identity.hashed(form, f"{name}@example.com")) for form in identity.EMAILS
        ]
        said = consent.statement(now_ms, {"ads": number < agreed}, True)
        await Visitors(store).append_said({name: b"".join([*own, said])}, now_ms)
    await members.change("low_priority", dict.fromkeys([*names, "unknown"], now_ms), [], now_ms, "test")
    await members.describe("low_priority", json.dumps({"min_size": 3}), now_ms)
    await store.close()


def test_bids_are_written_and_shown(tmp_path: Path, scores: Path) -> None:
    out = tmp_path / "bids.csv"
    asked = ("audiences", "export", "--bids", scores, "--out", out)
    done = propensity(*asked, "--format", "google-ads", "--campaign", "Shoes", "--ad-group", "A", "--ad-group", "B")
    assert done.status == 0, done.err
    assert "+100 %" in done.out
    assert "-33 %" in done.out
    assert [*csv.reader(out.read_text().splitlines())] == [
        ["Campaign", "Ad group", "Audience", "Bid modifier"],
        ["Shoes", "A", "Propensity champions", "100"],
        ["Shoes", "A", "Propensity nurture", "-33"],
        ["Shoes", "B", "Propensity champions", "100"],
        ["Shoes", "B", "Propensity nurture", "-33"],
    ]
    assert propensity(*asked, "--lowest", "-20", "--highest", "40").status == 0
    assert [row["adjustment_percent"] for row in csv.DictReader(out.read_text().splitlines())] == ["40", "-20"]


def test_a_list_to_exclude_has_the_hashes_of_those_who_agreed(tmp_path: Path, cache: str) -> None:
    asyncio.run(fill(cache, agreed=3, refused=2))
    out = tmp_path / "exclude.csv"
    done = propensity("audiences", "export", "--exclusions", "low_priority", "--format", "meta", "--out", out)
    assert done.status == 0, done.err
    assert f"3 people in {out}. Not in it: 3 who did not agree to advertising" in done.err.replace("\n", " ")
    head, *rows = csv.reader(out.read_text().splitlines())
    assert head == ["email"]
    wanted = [identity.hashed("meta.email", f"visitor-{number}@example.com") for number in range(3)]
    assert sorted(value for (value,) in rows) == sorted(wanted)


def test_what_is_wrong_is_told_in_one_line_and_writes_nothing(tmp_path: Path, scores: Path, cache: str) -> None:
    out = tmp_path / "out.csv"
    for asked, said in {
        (): "give either --bids SCORES or --exclusions AUDIENCE",
        ("--bids", scores, "--exclusions", "low_priority"): "give either --bids SCORES or --exclusions AUDIENCE",
        ("--bids", scores, "--format", "bing"): "write --format google-ads or --format meta or --format csv",
        ("--bids", scores, "--format", "meta"): "Meta has no bid adjustments of audiences",
        ("--bids", scores, "--format", "google-ads"): "write --campaign NAME",
        ("--bids", tmp_path / "nowhere"): "no part-*.parquet",
        ("--exclusions", "unheard_of"): "no audience 'unheard_of'",
    }.items():
        done = propensity("audiences", "export", *asked, "--out", out)
        assert done.status == 2
        assert said in done.complaint
    assert not out.exists()
