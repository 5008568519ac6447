"""Streams keep about as much as they are told to."""

from __future__ import annotations

import pytest

from service.store import Store
from service.streams import Quarantine, Quarantined

pytestmark = pytest.mark.anyio

DAY_MS = 86_400_000


async def test_the_quarantine_keeps_about_the_latest_events(store: Store) -> None:
    for place in range(10):
        await Quarantine(store).add([Quarantined("type", "m", place, [], str(n)) for n in range(100)], 200)
    kept = await Quarantine(store).latest(1000)
    assert 200 <= len(kept) <= 400
    assert kept[0].event == "99"
