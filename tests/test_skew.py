"""What is served equals what training computes: the same visitors, at the same instants, to the bit."""

from __future__ import annotations

import asyncio
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import httpx
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet
import pytest

from tests.conftest import free_port

ROOT = Path(__file__).parents[1]
SPEC = ROOT / "examples" / "shop.yaml"
VISITORS = 10_000


def propensity(*arguments: str, environment: dict[str, str]) -> None:
    subprocess.run([sys.executable, "-m", "cli.main", *arguments], cwd=ROOT, env=environment, check=True, timeout=240)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("skew")
    return {**os.environ, "PROPENSITY_DATA_DIR": str(directory / "data"), "SHOP": str(directory)}


@pytest.fixture(scope="module")
def shop(environment: dict[str, str]) -> Path:
    """A shop of more than 10,000 visitors, replayed and trained on, that is still open."""
    directory = Path(environment["SHOP"])
    propensity("simulate", "--out", str(directory), "--events", "240000", "--seed", "5", environment=environment)
    events = ("--events", str(directory / "events.parquet"), "--spec", str(SPEC))
    propensity("train", *events, "--artifacts", str(directory / "artifacts"), environment=environment)
    propensity("replay", *events, environment=environment)
    return directory


@pytest.fixture(scope="module")
def service(shop: Path, environment: dict[str, str]) -> Iterator[str]:
    port = free_port()
    command = [sys.executable, "-m", "cli.main", "serve", "--port", str(port), "--artifacts", str(shop / "artifacts")]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{url}/readyz").status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(20)


async def served(url: str, visitors: list[str]) -> list[dict[str, Any]]:
    """What the service says of each visitor, 16 asked at a time."""
    async with httpx.AsyncClient(base_url=url, timeout=30) as client:
        gate = asyncio.Semaphore(16)

        async def ask(visitor: str) -> dict[str, Any]:
            async with gate:
                answer = await client.get(f"/v1/visitors/{visitor}")
            answer.raise_for_status()
            found: dict[str, Any] = answer.json()
            return found

        return await asyncio.gather(*map(ask, visitors))


def compared(
    visitors: list[str], answers: list[dict[str, Any]], events: Path, environment: dict[str, str]
) -> npt.NDArray[np.float32]:
    """What was served of each visitor, float32[n, F], after it was found to be what files give for that moment."""
    shop = Path(environment["SHOP"])
    instants = [datetime.datetime.fromisoformat(answer["at"]) for answer in answers]
    pa.parquet.write_table(pa.table({"visitor_id": visitors, "at": instants}), shop / "at.parquet")
    arguments = ("--events", str(events), "--spec", str(SPEC), "--at", str(shop / "at.parquet"))
    out = shop / "features.parquet"
    propensity("features", *arguments, "--out", str(out), environment=environment)

    computed = pa.parquet.read_table(out)
    assert computed.column("visitor_id").to_pylist() == visitors
    names = [name for name in computed.column_names if name not in ("visitor_id", "at")]
    offline = np.stack([computed.column(name).to_numpy() for name in names], axis=1)
    online = np.array([[answer["features"]["purchase_7d"][name] for name in names] for answer in answers], np.float32)
    assert offline.dtype == np.float32
    different = (offline.view(np.uint32) != online.view(np.uint32)) & ~(np.isnan(offline) & np.isnan(online))
    assert not different.any(), [(visitors[row], names[column]) for row, column in np.argwhere(different)[:5]]
    return online


def days_of_logins(number: int, begin_ms: int) -> list[dict[str, Any]]:
    """Events of a phase in the order of time: 0 is long ago, before anybody logged in; then everybody does."""
    chance = random.Random(number)
    step_ms = 2 if number else 3_600_000
    sent: list[dict[str, Any]] = []
    for place in range(200):
        person, device = chance.randrange(30), f"device-{chance.randrange(40)}"
        item: dict[str, Any] = {"timestamp": begin_ms + place * step_ms, "messageId": f"{number}-{place}"}
        item |= {"event": chance.choice(("Product Viewed", "Product Added", "Order Completed"))}
        item["properties"] = {"price": chance.randrange(1, 90), "category": chance.choice("abc"), "revenue": 30}
        item["context"] = {"device": chance.choice(("mobile", "desktop", None))}
        item |= chance.choice(({"anonymousId": device}, {"userId": f"person-{person}"}))
        if number and chance.random() < 0.3:  # `device % 30` is the owner as a rule; some are shared
            known = f"person-{int(device[7:]) % 30 if chance.random() < 0.7 else person}"
            known = device if chance.random() < 0.05 else known
            item = {"timestamp": item["timestamp"], "userId": known, "traits": {"loyalty_tier": chance.choice("ab")}}
            kind = chance.choice(("identify", "identify", "alias"))
            item |= {"type": kind, "previousId" if kind == "alias" else "anonymousId": f"device-{chance.randrange(40)}"}
        elif chance.random() < 0.1:
            item |= {"userId": f"person-{person}", "anonymousId": device}
        sent.append(item)
    return sent


def send(url: str, sent: list[dict[str, Any]]) -> None:
    """Send events as they would come: none waits in a batch with the login after it."""
    with httpx.Client(base_url=url, timeout=30) as client:
        for item in sent:
            answer = client.post("/v1/events", json=item)
            assert answer.json()["refused"] == 0, answer.text


@pytest.mark.slow
def test_who_logs_in_is_served_the_features_that_training_computes_before_and_after(
    shop: Path, service: str, environment: dict[str, str]
) -> None:
    everybody = [f"person-{number}" for number in range(30)] + [f"device-{number}" for number in range(40)]
    visitors, answers, sent = [], [], []
    for number in range(4):
        begin_ms = time.time_ns() // 1_000_000 - (0 if number else 12 * 86_400_000)
        sent += (phase := days_of_logins(number, begin_ms))
        send(service, phase)
        while number and time.time_ns() // 1_000_000 <= phase[-1]["timestamp"]:
            time.sleep(0.01)
        visitors += everybody
        answers += asyncio.run(served(service, everybody))
    joined = {answer["visitor_id"] for answer in answers if answer["identity"]["visitor_id"] != answer["visitor_id"]}
    assert len(joined) > 30
    lines = shop / "logins.ndjson"
    lines.write_text("".join(json.dumps(item) + "\n" for item in sent))
    online = compared(visitors, answers, lines, environment)
    assert len(np.unique(online[:, :-1], axis=0)) > 100, "features that are the same for everyone would show nothing"


@pytest.mark.slow
def test_ten_thousand_visitors_are_served_the_features_that_training_computes(
    shop: Path, service: str, environment: dict[str, str]
) -> None:
    everyone = duckdb.execute(
        f"SELECT DISTINCT coalesce(userId, anonymousId) AS visitor FROM '{shop / 'events.parquet'}' ORDER BY visitor"
    ).fetchall()
    visitors = [row[0] for row in everyone[: VISITORS - 10]] + [f"never-seen-{number}" for number in range(10)]
    assert len(visitors) == VISITORS
    answers = asyncio.run(served(service, visitors))
    online = compared(visitors, answers, shop / "events.parquet", environment)
    told_apart = len(np.unique(online[:, :-1], axis=0))
    assert told_apart > VISITORS / 2, "features that are the same for everyone would show nothing"
    shutil.rmtree(shop / "artifacts")
