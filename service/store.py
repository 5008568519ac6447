"""The feature cache: what each visitor's events and traits are kept under, in Redis or Valkey.

Keys, all beginning with the namespace NS:

- `NS:e:{ID}` the visitor's event records and `NS:t:{ID}` its trait records, strings that grow by APPEND. ID is the
  visitor's id percent-encoded (UTF-8; all but ASCII letters, digits and `_.-~`), so that no id can end the hash tag
  early or reach another key; the braces put both keys into one slot of a cluster. Both expire together, `retention`
  after the last write to either.
- `NS:scores` a stream of served scores, for whoever consumes them.
- `NS:quarantine` a stream of refused events with their reason, which expires likewise.

Appending needs no lock and no reading: records may come in any order and more than once, the kernel drops doubles.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.client import Pipeline
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from service.core import events
from service.core.errors import PropensityError
from service.core.events import RECORD_BYTES
from service.errors import StoreError
from service.reader import Endpoint, Reader, Values

# The design's bound on a visitor's records, and what is let grow on top of it before a visitor is compacted.
MOST_EVENTS: Final = 2048
MOST_EVENT_BYTES: Final = 2 * MOST_EVENTS * RECORD_BYTES
# A visitor has few traits and sends them again with every event; beyond this the latest of each are kept.
MOST_TRAIT_BYTES: Final = 64 * RECORD_BYTES

_PAGE: Final = 500
_plain: Final = re.compile(r"[A-Za-z0-9_.~-]+").fullmatch

# Puts ARGV[3] in place of the first ARGV[1] bytes if their SHA-1 is still ARGV[2]; what was appended since stays.
_REPLACE_HEAD: Final = """
local size = tonumber(ARGV[1])
if redis.sha1hex(redis.call('GETRANGE', KEYS[1], 0, size - 1)) ~= ARGV[2] then return 0 end
redis.call('SET', KEYS[1], ARGV[3] .. redis.call('GETRANGE', KEYS[1], size, -1), 'KEEPTTL')
return 1
"""


class History(NamedTuple):
    """A visitor's records as they are stored, or some to add: events and traits, 24 bytes each."""

    events: bytes = b""
    traits: bytes = b""


class Quarantined(NamedTuple):
    """A refused event: why, when it came, whose it is if that can be told, and its JSON."""

    reason: str
    message: str
    received_ms: int
    visitor_ids: Sequence[str]
    event: str


class Store:
    """One connection pool to one Redis or Valkey. Every failure is a StoreError; nothing is retried."""

    def __init__(self, client: Redis, *, namespace: str, retention_ms: int) -> None:
        self._client = client
        self._namespace = namespace
        self._retention_ms = retention_ms
        self._replace_head = client.register_script(_REPLACE_HEAD)
        self._reader = Reader(self.endpoint, connect_timeout_s=0.2)

    async def endpoint(self) -> Endpoint:
        """Where the server is that answers reads."""
        given = self._client.connection_pool.connection_kwargs
        return Endpoint(
            host=given.get("host", "localhost"),
            port=given.get("port", 6379),
            path=given.get("path"),
            username=given.get("username"),
            password=given.get("password"),
            database=given.get("db") or 0,
        )

    @classmethod
    def open(
        cls,
        url: str,
        *,
        namespace: str,
        retention_ms: int,
        timeout_ms: int = 1000,
        connect_timeout_ms: int = 200,
        connections: int = 32,
    ) -> Store:
        """A store at a redis://, rediss:// or unix:// URL. Connects when first used."""
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=connections,
                timeout=timeout_ms / 1000,
                socket_timeout=timeout_ms / 1000,
                socket_connect_timeout=connect_timeout_ms / 1000,
                # The library's own defaults, 5 s and ten retries, would hold a visitor's page for a minute.
                retry=Retry(NoBackoff(), 0),
                # RESP2 and no driver name: one round trip less for every connection that is opened.
                protocol=2,
                driver_info=None,
            )
        except ValueError as error:
            raise PropensityError(
                f"the URL of the feature cache cannot be read ({error}); write redis://HOST:6379/0, "
                "rediss://HOST:6379/0 or unix:///PATH/TO/SOCKET"
            ) from None
        return cls(Redis.from_pool(pool), namespace=namespace, retention_ms=retention_ms)

    async def close(self) -> None:
        """Close every connection."""
        self._reader.drop()
        await self._client.aclose()

    async def ping(self) -> None:
        """Raise StoreError unless the server answers."""
        with _failures():
            await self._client.ping()

    def keys(self, visitor_id: str) -> tuple[str, str]:
        """The keys of a visitor's events and traits."""
        tag = visitor_id if _plain(visitor_id) else quote(visitor_id, safe="", errors="surrogatepass")
        return f"{self._namespace}:e:{{{tag}}}", f"{self._namespace}:t:{{{tag}}}"

    async def read(self, visitor_ids: Sequence[str]) -> list[History]:
        """The history of each visitor, empty where there is none; one round trip."""
        if not visitor_ids:
            return []
        with _failures():
            values = await self._client.mget([key for visitor_id in visitor_ids for key in self.keys(visitor_id)])
        return [History(*pair) for pair in zip(map(_bytes, values[::2]), map(_bytes, values[1::2]), strict=True)]

    def ask(self, visitor_ids: Sequence[str]) -> asyncio.Future[Values]:
        """The events and traits of each visitor in turn, as they are stored, None where there are none.

        The future fails with StoreError, and is cancelled if the connection is dropped.
        """
        keys = [key for visitor_id in visitor_ids for key in self.keys(visitor_id)]
        return self._reader.mget(keys)

    def drop(self) -> None:
        """Give up the connection of `ask` and what it still owes; the next question opens another."""
        self._reader.drop()

    async def append(self, additions: Mapping[str, History], now_ms: int) -> set[str]:
        """Add records to visitors, in one round trip. Returns the visitors that cannot hold any.

        That is only where something else has put a value of another type under their keys. Any other failure, also
        of a part, raises StoreError: the whole can be sent again without harm.
        """
        added = [
            (visitor_id, key, blob)
            for visitor_id, history in additions.items()
            for key, blob in zip(self.keys(visitor_id), history, strict=True)
            if blob
        ]
        with _failures():
            pipeline = self._client.pipeline(transaction=False)
            for _, key, blob in added:
                pipeline.append(key, blob)
            for visitor_id in additions:
                self._keep(pipeline, visitor_id)
            replies = await pipeline.execute(raise_on_error=False)
        unfit: set[str] = set()
        for (visitor_id, key, blob), reply in zip(added, replies, strict=False):
            if isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE"):
                unfit.add(visitor_id)
            elif isinstance(reply, Exception):
                raise StoreError(f"the feature cache refuses to write ({reply}); try again later") from reply
            elif self._has_outgrown(key, reply - len(blob), reply) or reply % RECORD_BYTES:
                await self._trim(key, now_ms)
        return unfit

    async def append_missing(self, additions: Mapping[str, History], now_ms: int) -> int:
        """Add the records that are not there yet, and that compaction would keep. Returns how many were added.

        Doing it twice changes nothing the second time, so a replay can be cut off and begun again.
        """
        missing = {}
        for (visitor_id, new), known in zip(additions.items(), await self.read(list(additions)), strict=True):
            fresh = History(
                _missing(known.events, new.events, compact_events),
                _missing(known.traits, new.traits, lambda blob: compact_traits(blob, now_ms)),
            )
            if any(fresh):
                missing[visitor_id] = fresh
        unfit = await self.append(missing, now_ms)
        if unfit:
            raise StoreError(f"visitor {min(unfit)!r} has a key of another type in the feature cache; delete it")
        return sum(len(blob) for history in missing.values() for blob in history) // RECORD_BYTES

    async def replayed(self, mark: str) -> set[int]:
        """Parts of the replay named `mark` that are already here."""
        with _failures():
            parts: Any = await self._client.smembers(f"{self._namespace}:replay:{mark}")
        return {int(part) for part in parts}

    async def mark_replayed(self, mark: str, part: int) -> None:
        """Remember, for as long as visitors are kept, that a part of a replay is here."""
        key = f"{self._namespace}:replay:{mark}"
        with _failures():
            pipeline = self._client.pipeline(transaction=False)
            pipeline.sadd(key, part)
            pipeline.pexpire(key, self._retention_ms)
            await pipeline.execute()

    async def sample(self, count: int) -> list[str]:
        """Ids of up to `count` visitors with events, picked at random."""
        prefix = f"{self._namespace}:e:{{".encode()
        with _failures():
            pipeline = self._client.pipeline(transaction=False)
            for _ in range(count):
                pipeline.randomkey()
            keys: list[bytes | None] = await pipeline.execute()
        found = {key for key in keys if key is not None and key.startswith(prefix)}
        return sorted(unquote(key[len(prefix) : -1].decode(), errors="surrogatepass") for key in found)

    async def erase(self, visitor_id: str) -> bool:
        """Delete everything that is kept of a visitor, refused events too. Returns whether there was anything."""
        with _failures():
            deleted = await self._client.delete(*self.keys(visitor_id))
            deleted += await self._erase_quarantined(visitor_id)
            deleted += await self._erase_scores(visitor_id)
        return bool(deleted)

    async def log_scores(self, entries: Sequence[bytes], length: int) -> None:
        """Add entries of served scores, JSON lines, to their stream; about the latest `length` entries are kept."""
        with _failures():
            pipeline = self._client.pipeline(transaction=False)
            for entry in entries:
                pipeline.xadd(self._scores_key, {"scores": entry}, maxlen=length, approximate=True)
            pipeline.pexpire(self._scores_key, self._retention_ms)
            await pipeline.execute()

    async def quarantine(self, refused: Sequence[Quarantined], length: int) -> None:
        """Keep refused events, about the latest `length` of them."""
        with _failures():
            pipeline = self._client.pipeline(transaction=False)
            for item in refused:
                fields: dict[Any, Any] = {
                    "reason": item.reason,
                    "message": item.message,
                    "received_ms": item.received_ms,
                    "visitors": " ".join(quote(visitor_id, safe="") for visitor_id in item.visitor_ids),
                    "event": item.event,
                }
                pipeline.xadd(self._quarantine_key, fields, maxlen=length, approximate=True)
            pipeline.pexpire(self._quarantine_key, self._retention_ms)
            await pipeline.execute()

    async def quarantined(self, count: int = 100) -> list[Quarantined]:
        """The latest `count` refused events, newest first."""
        with _failures():
            entries: Any = await self._client.xrevrange(self._quarantine_key, count=count)
        return [_quarantined(fields) for _, fields in entries]

    @property
    def _scores_key(self) -> str:
        return f"{self._namespace}:scores"

    @property
    def _quarantine_key(self) -> str:
        return f"{self._namespace}:quarantine"

    async def _erase_quarantined(self, visitor_id: str) -> int:
        wanted, start, deleted = quote(visitor_id, safe="", errors="surrogatepass").encode(), "-", 0
        while True:
            entries: Any = await self._client.xrange(self._quarantine_key, min=start, count=_PAGE)
            if not entries:
                return deleted
            found = [entry for entry, fields in entries if wanted in fields.get(b"visitors", b"").split()]
            if found:
                deleted += await self._client.xdel(self._quarantine_key, *found)
            start = f"({entries[-1][0].decode()}"

    async def _erase_scores(self, visitor_id: str) -> int:
        """Take a visitor's lines out of the stream; the other lines of an entry come again, as a later entry."""
        told, start, deleted = json.dumps(visitor_id, ensure_ascii=False), "-", 0
        needle = f'"visitor_id":{told},'.encode("utf-8", "surrogatepass")
        while True:
            entries: Any = await self._client.xrange(self._scores_key, min=start, count=_PAGE)
            if not entries:
                return deleted
            for name, fields in entries:
                lines = fields.get(b"scores", b"").split(b"\n")
                others = [line for line in lines if needle not in line]
                if len(others) < len(lines):
                    deleted += len(lines) - len(others)
                    pipeline = self._client.pipeline(transaction=False)
                    if others:
                        pipeline.xadd(self._scores_key, {"scores": b"\n".join(others)})
                    pipeline.xdel(self._scores_key, name)
                    await pipeline.execute()
            start = f"({entries[-1][0].decode()}"

    def _keep(self, pipeline: Pipeline, visitor_id: str) -> None:
        for key in self.keys(visitor_id):
            pipeline.pexpire(key, self._retention_ms)

    def _has_outgrown(self, key: str, before: int, after: int) -> bool:
        """Whether a value passed a multiple of the size that it is let grow to; not every append tries to compact."""
        most = MOST_EVENT_BYTES if key.startswith(f"{self._namespace}:e:") else MOST_TRAIT_BYTES
        return before // most < after // most

    async def _trim(self, key: str, now_ms: int) -> None:
        """Compact one value, unless it changed meanwhile other than by growing; the next append sees to it then."""
        with _failures():
            known = _bytes(await self._client.get(key))
            is_events = key.startswith(f"{self._namespace}:e:")
            kept = compact_events(known) if is_events else compact_traits(known, now_ms)
            if len(kept) < len(known):
                await self._replace_head(
                    keys=[key],
                    args=[len(known), hashlib.sha1(known, usedforsecurity=False).hexdigest(), kept],
                )


def compact_events(blob: bytes) -> bytes:
    """The events worth keeping of a value: sound, each once, in canonical order, the latest 2,048."""
    return events.compact(_aligned(blob), MOST_EVENTS)


def compact_traits(blob: bytes, now_ms: int) -> bytes:
    """The trait records worth keeping: the latest of each trait at `now_ms`, and those that are still to come."""
    known = events.from_bytes(_aligned(blob))
    known = known[events.valid(known)]
    known = known[events.canonical_order(known)]
    known = known[events.first_of_each(known)]
    keep = known["ts_ms"] > now_ms
    backwards = np.flatnonzero(~keep)[::-1]
    keep[backwards[np.unique(known["id"][backwards], return_index=True)[1]]] = True
    return known[keep][-MOST_EVENTS:].tobytes()


def _aligned(blob: bytes) -> bytes:
    """Whole records of a value. Bytes that are no record shift what follows, so a torn value is cut both ways."""
    torn = len(blob) % RECORD_BYTES
    return blob[:-torn] + blob[torn:] if torn else blob


def _missing(known: bytes, new: bytes, compact: Callable[[bytes], bytes]) -> bytes:
    """The records of `new` that `known` has not, without those that compaction would drop again."""
    if not known and len(new) <= MOST_EVENTS * RECORD_BYTES:
        return new
    known = _aligned(known)
    held = set(_records(known))
    return b"".join(record for record in _records(compact(known + new)) if record not in held)


def _records(blob: bytes) -> Iterator[bytes]:
    return (blob[start : start + RECORD_BYTES] for start in range(0, len(blob), RECORD_BYTES))


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else b""


def _quarantined(fields: Mapping[bytes, bytes]) -> Quarantined:
    text = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
    visitor_ids = tuple(unquote(part) for part in text["visitors"].split())
    return Quarantined(text["reason"], text["message"], int(text["received_ms"]), visitor_ids, text["event"])


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, EOFError) as error:
        # The message of a connection error names hosts, which is no client's business; the cause keeps it.
        raise StoreError(f"the feature cache failed ({type(error).__name__}); try again later") from error
