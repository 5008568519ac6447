"""`propensity compact` as it is typed."""

from __future__ import annotations

import asyncio
import sys

import pytest

from cli import main as command_line
from service.core import events
from service.embedded import EmbeddedServer
from service.history import History
from service.store import Store
from service.visitors import Visitors
from tests.conftest import free_port

NOW_MS = 1_767_225_600_000
DAY_MS = 86_400_000


async def append_one_by_one(url: str, visitors: int) -> None:
    store = Store.open(url, namespace="compact", retention_ms=DAY_MS)
    for number in range(20):
        record = events.pack(NOW_MS + number, 1, number + 1, 0, 1.0)
        trait = events.pack(NOW_MS + number, events.TRAIT_NUMBER, 7, 0, 1.0)
        await Visitors(store).append({f"visitor-{place}": History(record, trait) for place in range(visitors)}, NOW_MS)
    await store.close()


def propensity(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(sys, "argv", ["propensity", *arguments])
        command_line.main()
    return int(ended.value.code or 0)


def test_visitors_are_stored_anew_once(
    embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROPENSITY_REDIS_URL", embedded_server.url)
    monkeypatch.setenv("PROPENSITY_NAMESPACE", "compact")
    asyncio.run(append_one_by_one(embedded_server.url, 700))
    for stored_anew in ("700", "0"):
        assert propensity("compact") == 0
        assert f"{stored_anew} visitors stored anew; memory used: " in capsys.readouterr().err.replace("\n", " ")


def test_a_feature_cache_that_is_gone_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PROPENSITY_REDIS_URL", f"redis://127.0.0.1:{free_port()}")
    assert propensity("compact") == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("propensity:")]
    assert "the feature cache failed" in line
