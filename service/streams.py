"""Streams: served scores for whoever consumes them, and refused events. Both are capped, and expire.

- `NS:scores`: an entry has many scores, JSON lines, in the field `scores`.
- `NS:quarantine`: an entry is a refused event with its reason.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from typing import Final, NamedTuple
from urllib.parse import quote, unquote

from service.servers import Command, Refusal, granted
from service.shards import Cache

_PAGE: Final = 500


class ScoreStream:
    """The stream of served scores."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self._key = cache, f"{cache.namespace}:scores"

    async def add(self, entries: Sequence[bytes], length: int) -> None:
        """Add entries of scores, JSON lines; about the latest `length` entries are kept."""
        added = [("XADD", self._key, "MAXLEN", "~", length, "*", "scores", entry) for entry in entries]
        await self._cache.run(*added, ("PEXPIRE", self._key, self._cache.retention_ms))

    async def erase(self, names: Collection[str]) -> int:
        """Take visitors' lines out; the other lines of an entry come again, as a later entry."""
        needles = [
            f'"visitor_id":{json.dumps(name, ensure_ascii=False)},'.encode("utf-8", "surrogatepass") for name in names
        ]
        deleted = 0
        async for entries in _pages(self._cache, self._key):
            for name, fields in entries:
                lines = fields.get(b"scores", b"").split(b"\n")
                others = [line for line in lines if not any(needle in line for needle in needles)]
                if len(others) < len(lines):
                    deleted += len(lines) - len(others)
                    again = [("XADD", self._key, "*", "scores", b"\n".join(others))] if others else []
                    await self._cache.run(*again, ("XDEL", self._key, name))
        return deleted


class Quarantined(NamedTuple):
    """A refused event: why, when it came, whose it is if that can be told, and its JSON."""

    reason: str
    message: str
    received_ms: int
    visitor_ids: Sequence[str]
    event: str


class Quarantine:
    """The stream of refused events."""

    def __init__(self, cache: Cache) -> None:
        self._cache, self._key = cache, f"{cache.namespace}:quarantine"

    async def add(self, refused: Sequence[Quarantined], length: int) -> bool:
        """Keep refused events, about the latest `length` of them. Returns whether something else is not in the way."""
        added: list[Command] = [
            ("XADD", self._key, "MAXLEN", "~", length, "*", *(word for pair in _fields(item).items() for word in pair))
            for item in refused
        ]
        replies = await self._cache.attempt(*added, ("PEXPIRE", self._key, self._cache.retention_ms))
        if any(isinstance(reply, Refusal) and reply.is_wrong_type for reply in replies):
            return False
        for reply in replies:
            granted(reply)
        return True

    async def latest(self, count: int = 100) -> list[Quarantined]:
        """The latest `count` refused events, newest first."""
        (entries,) = await self._cache.run(("XREVRANGE", self._key, "+", "-", "COUNT", count))
        return [_quarantined(fields) for _, fields in entries]

    async def erase(self, names: Collection[str]) -> int:
        """Delete the events of visitors. Returns how many there were."""
        wanted = {quote(name, safe="", errors="surrogatepass").encode() for name in names}
        deleted = 0
        async for entries in _pages(self._cache, self._key):
            found = [entry for entry, fields in entries if wanted.intersection(fields.get(b"visitors", b"").split())]
            if found:
                deleted += sum(await self._cache.run(("XDEL", self._key, *found)))
        return deleted


def _fields(item: Quarantined) -> dict[str, str | int]:
    return {
        "reason": item.reason,
        "message": item.message,
        "received_ms": item.received_ms,
        "visitors": " ".join(quote(visitor_id, safe="") for visitor_id in item.visitor_ids),
        "event": item.event,
    }


def _quarantined(fields: Mapping[bytes, bytes]) -> Quarantined:
    text = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
    visitor_ids = tuple(unquote(part) for part in text["visitors"].split())
    return Quarantined(text["reason"], text["message"], int(text["received_ms"]), visitor_ids, text["event"])


async def _pages(cache: Cache, key: str) -> AsyncIterator[list[tuple[bytes, dict[bytes, bytes]]]]:
    """The entries of a stream in their order, some at a time."""
    start = "-"
    while True:
        (entries,) = await cache.run(("XRANGE", key, start, "+", "COUNT", _PAGE))
        if not entries:
            return
        yield entries
        start = f"({entries[-1][0].decode()}"
