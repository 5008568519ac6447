"""Visitors whose score tells whose it is: the price that visitor n saw last is n, and it saw `views(n)` in all."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from typing import Any, Final

import redis

from service.core import events

# What its score depends on, with the weights that tests.conftest.write_bundle gives.
SPEC: Final[dict[str, Any]] = {
    "model": "shop",
    "events": {"view": {"code": 1, "event": "Product Viewed", "value": "price"}},
    "features": {"price": {"latest": "view"}, "views": {"count": "view"}, "loyalty": {"trait": "loyalty"}},
}
WEIGHT: Final = 0.0002
NAMESPACE: Final = "p"
_DAY_MS: Final = 86_400_000


def name(number: int) -> str:
    """The id of a visitor."""
    return f"v{number}"


def views(number: int) -> int:
    """How many events a visitor has."""
    return 1 + number % 7


def key(number: int, kind: str = "e") -> str:
    """Where a visitor's events are kept, or its traits: `t`."""
    return f"{NAMESPACE}:{kind}:{{{name(number)}}}"


def history(number: int, now_ms: int) -> bytes:
    """A visitor's records: the dearest and last of them costs its number."""
    count = views(number)
    return b"".join(record(now_ms, number - age, age) for age in reversed(range(count)))


def record(now_ms: int, price: float, age: int = 0) -> bytes:
    """A sound record of a view, `age` minutes old."""
    return events.pack(now_ms - (age + 1) * 60_000, 1, age + 1, 0, float(price))


def fill(url: str, numbers: Iterable[int], now_ms: int) -> None:
    """Make visitors known."""
    with redis.Redis.from_url(url) as client:
        pipeline = client.pipeline(transaction=False)
        for number in numbers:
            pipeline.set(key(number), history(number, now_ms), px=_DAY_MS)
        pipeline.execute()


def now_ms() -> int:
    """The time that records are made with."""
    return time.time_ns() // 1_000_000


def content_of(raw: bytes) -> dict[str, Any]:
    """The JSON of an answer."""
    value: dict[str, Any] = json.loads(raw)
    return value


def propensity(price: float | None, count: int) -> float:
    """What the model says of a visitor that saw that price last."""
    return 1 / (1 + math.exp(-WEIGHT * ((price or 0.0) + 0.55 * count)))


def is_answer_for(number: int, content: dict[str, Any]) -> bool:
    """Whether a score is the visitor's own: with its whole history, or with none and saying so."""
    known = content["degraded"] == []
    price, count = (number, views(number)) if known else (None, 0)
    return (
        content["visitor_id"] == name(number)
        and content["degraded"] in ([], ["store"])
        and content["events"] == count
        and abs(content["propensity"] - propensity(price, count)) < 2e-6
    )
