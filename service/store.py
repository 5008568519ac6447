"""The feature cache: what each visitor's events and traits are kept under, in Redis or Valkey.

Keys, all beginning with the namespace NS:

- `NS:e:{ID}` the visitor's event records and `NS:t:{ID}` its trait records, strings that grow by APPEND. ID is the
  visitor's id percent-encoded (UTF-8; all but ASCII letters, digits and `_.-~`), so that no id can end the hash tag
  early or reach another key; the braces put both keys into one slot of a cluster. Both expire together, `retention`
  after the last write to either.
- `NS:scores` a stream of served scores, for whoever consumes them.
- `NS:quarantine` a stream of refused events with their reason, which expires likewise.
- `NS:p:*` and `NS:s:*` scores and segments by model, see `service.propensities`.
- `NS:a:*` members of audiences, see `service.members`.
- `NS:erased` who was erased, see `service.erasures`.

Appending needs no lock and no reading: records may come in any order and more than once, the kernel drops doubles.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, MovedError, RedisError, ResponseError

from service import history, location, servers
from service.core.events import RECORD_BYTES
from service.erasures import Erasures
from service.errors import StoreError
from service.history import MOST_EVENTS as MOST_EVENTS
from service.history import History as History
from service.history import compact_traits as compact_traits
from service.location import Address, Kind, Location
from service.members import Members
from service.propensities import Propensities
from service.reader import Endpoint, Reader, Values
from service.servers import UNREAD, Command, Redirect, Refusal, Servers
from service.shards import tag_of

# What is let grow on top of the design's bound before a visitor is compacted.
MOST_EVENT_BYTES: Final = 2 * MOST_EVENTS * RECORD_BYTES
# A visitor has few traits and sends them again with every event; beyond this the latest of each are kept.
MOST_TRAIT_BYTES: Final = 64 * RECORD_BYTES

_PAGE: Final = 500

# For each key, three arguments: puts the third in place of the first so many bytes if their SHA-1 is the second; what
# was appended since stays. All keys or none; what becomes empty goes. Returns the memory that the first key takes then,
# and the length of its value.
_REPLACE_HEADS: Final = """
for place, key in ipairs(KEYS) do
  local head = redis.call('GETRANGE', key, 0, ARGV[3 * place - 2] - 1)
  if redis.sha1hex(head) ~= ARGV[3 * place - 1] then return {} end
end
for place, key in ipairs(KEYS) do
  local value = ARGV[3 * place] .. redis.call('GETRANGE', key, ARGV[3 * place - 2], -1)
  if value == '' then redis.call('DEL', key) else redis.call('SET', key, value, 'KEEPTTL') end
end
local taken = redis.pcall('MEMORY', 'USAGE', KEYS[1])
return {type(taken) == 'number' and taken or 0, redis.call('STRLEN', KEYS[1])}
"""

# Adds to each key what it is given, and lets it live for ARGV[1] milliseconds from now on. Returns the length of each
# value, -1 where it has another type. One script instead of two commands a key: half the time, and no key without end.
_APPEND: Final = """
local lengths = {}
for place, key in ipairs(KEYS) do
  local added = ARGV[place + 1]
  local length = added == '' and 0 or redis.pcall('APPEND', key, added)
  if type(length) == 'number' then
    redis.call('PEXPIRE', key, ARGV[1])
  elseif string.find(length.err, 'WRONGTYPE', 1, true) then
    length = -1
  else
    return length
  end
  lengths[place] = length
end
return lengths
"""
# What else is asked of the server waits while one script runs; this many keys take it half a millisecond.
_MOST_KEYS: Final = 200

# What a value takes of memory, its length, whether the visitor's other value exists, and for how long it is kept.
_WEIGH: Final = """
local taken = redis.call('MEMORY', 'USAGE', KEYS[1]) or 0
return {taken, redis.call('STRLEN', KEYS[1]), redis.call('EXISTS', KEYS[2]), redis.call('PTTL', KEYS[1])}
"""

# Gives KEYS[1] to ARGV[1] for ARGV[2] milliseconds, unless it is another's.
_LEASE: Final = """
local owner = redis.call('GET', KEYS[1])
if owner and owner ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""


class Quarantined(NamedTuple):
    """A refused event: why, when it came, whose it is if that can be told, and its JSON."""

    reason: str
    message: str
    received_ms: int
    visitor_ids: Sequence[str]
    event: str


class Store:
    """What is kept of visitors, on one server or many. Every failure is a StoreError; nothing is retried."""

    def __init__(self, network: _Network, *, namespace: str, retention_ms: int) -> None:
        self._network = network
        self._servers = network.servers()
        self._namespace = namespace
        self._retention_ms = retention_ms
        self._reader = Reader(self.endpoint, network.connect_timeout_s)
        # What a value stored in one piece takes beyond `fresh_bytes` on this server; seen when values are stored anew.
        self._excess = 0

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
        """A store at a URL of one of the forms of `service.location`. Connects when first used."""
        network = _Network(location.parse(url), timeout_ms / 1000, connect_timeout_ms / 1000, connections)
        return cls(network, namespace=namespace, retention_ms=retention_ms)

    @property
    def namespace(self) -> str:
        """What all keys begin with."""
        return self._namespace

    @property
    def retention_ms(self) -> int:
        """How long what is known of a silent visitor is kept."""
        return self._retention_ms

    @property
    def is_cluster(self) -> bool:
        """Whether one command may only name keys of one slot."""
        return self._network.is_cluster

    async def run(self, *commands: Command) -> list[Any]:
        """The reply to each command, in one round trip. Raises StoreError also where a server refuses one."""
        return await self._run(*commands)

    async def close(self) -> None:
        """Close every connection."""
        self._reader.close()
        await self._servers.close()

    async def ping(self) -> None:
        """Raise StoreError unless every server answers."""
        for address in await self._servers.addresses():
            await self._servers.run_on(address, [("PING",)])

    async def endpoint(self) -> Endpoint:
        """Where the server is that has all visitors: of Sentinels the master of now. A cluster has none."""
        (address,) = await self._servers.addresses(anew=True)
        return self._network.endpoint(address)

    def keys(self, visitor_id: str) -> tuple[str, str]:
        """The keys of a visitor's events and traits."""
        tag = tag_of(visitor_id)
        return f"{self._namespace}:e:{{{tag}}}", f"{self._namespace}:t:{{{tag}}}"

    async def read(self, visitor_ids: Sequence[str]) -> list[History]:
        """The history of each visitor, empty where there is none; one round trip."""
        if not visitor_ids:
            return []
        values = await self._values(visitor_ids, self._servers.run)
        if UNREAD in values:
            raise StoreError("a server of the feature cache refuses to read; try again later")
        return [history.unfold(*pair) for pair in zip(values[::2], values[1::2], strict=True)]

    def ask(self, visitor_ids: Sequence[str]) -> asyncio.Future[Values]:
        """The events and traits of each visitor in turn, as they are stored, None where there are none.

        `history.unfold` makes a History of the two. Where some servers of a cluster do not answer, those of their
        visitors are UNREAD. The future fails with StoreError, and is cancelled if the connection is dropped. Who
        cancels it says that it took too long.
        """
        if self._network.is_cluster:
            return asyncio.create_task(self._values(visitor_ids, self._servers.run_partly))
        keys = [key for visitor_id in visitor_ids for key in self.keys(visitor_id)]
        return self._reader.mget(keys)

    def give_up(self, read: asyncio.Future[Values]) -> bool:
        """Cancel what `ask` gave, which takes too long; True if that speaks against the connection in use."""
        return self._reader.give_up(read)

    async def _values(self, visitor_ids: Sequence[str], run: _Run) -> Values:
        """What `ask` gives; each pair of keys is one command, so that every server gets its own at once."""
        pairs = [self.keys(visitor_id) for visitor_id in visitor_ids]
        if not self._network.is_cluster:
            (values,) = await run([("MGET", *(key for pair in pairs for key in pair))])
            return list(_granted(values))
        replies = await run([("MGET", *pair) for pair in pairs])
        values = [value for reply in replies for value in (reply if isinstance(reply, list) else (UNREAD, UNREAD))]
        # While a slot moves, a pair of which one key has gone, or never was, is refused; each key has its own answer.
        split = [place for place, reply in enumerate(replies) if isinstance(reply, Refusal)]
        if split:
            alone = await run([("GET", key) for place in split for key in pairs[place]])
            for place, value in zip((2 * place + side for place in split for side in (0, 1)), alone, strict=True):
                values[place] = (None if value.is_wrong_type else UNREAD) if isinstance(value, Refusal) else value
        return values

    async def append(self, additions: Mapping[str, History], now_ms: int) -> dict[str, History]:
        """Add records to visitors, in one round trip. Returns those that could not be added, by visitor.

        That is only where something else has put a value of another type under a key. Any other failure, also of a
        part, raises StoreError: the whole can be sent again without harm.
        """
        keys = [key for visitor_id in additions for key in self.keys(visitor_id)]
        blobs = [blob for history in additions.values() for blob in history]
        lengths = await self._append(keys, blobs)
        outgrown = [
            key
            for key, blob, length in zip(keys, blobs, lengths, strict=True)
            if length > 0 and (length % RECORD_BYTES or self._has_outgrown(key, length - len(blob), length))
        ]
        if outgrown:
            await self._trim(outgrown, now_ms)
        if -1 not in lengths:
            return {}
        lost = [blob if length < 0 else b"" for blob, length in zip(blobs, lengths, strict=True)]
        return {
            name: left for name, left in zip(additions, map(History, lost[::2], lost[1::2]), strict=True) if any(left)
        }

    async def _append(self, keys: Sequence[str], blobs: Sequence[bytes]) -> list[int]:
        """Add a blob to each key; the length of each value, 0 where nothing was added and -1 where nothing can be."""
        # One key a script in a cluster: they are on several servers, and a visitor's two while its slot moves.
        most = 1 if self._network.is_cluster else _MOST_KEYS
        parts = [(keys[first : first + most], blobs[first : first + most]) for first in range(0, len(keys), most)]
        commands: list[Command] = [
            ("EVAL", _APPEND, len(part), *part, self._retention_ms, *added) for part, added in parts
        ]
        return [length for lengths in await self._run(*commands) for length in lengths]

    async def append_missing(self, additions: Mapping[str, History], now_ms: int) -> int:
        """Add the records that are not there yet, and that compaction would keep. Returns how many were added.

        Doing it twice changes nothing the second time, so a replay can be cut off and begun again.
        """
        missing = {}
        for (visitor_id, new), known in zip(additions.items(), await self.read(list(additions)), strict=True):
            fresh = History(
                history.missing(known.events, new.events, history.compact_events),
                history.missing(known.traits, new.traits, lambda blob: history.compact_traits(blob, now_ms)),
            )
            if any(fresh):
                missing[visitor_id] = fresh
        unfit = await self.append(missing, now_ms)
        if unfit:
            raise StoreError(f"visitor {min(unfit)!r} has a key of another type in the feature cache; delete it")
        return sum(len(blob) for history in missing.values() for blob in history) // RECORD_BYTES

    async def replayed(self, mark: str) -> set[int]:
        """Parts of the replay named `mark` that are already here."""
        (parts,) = await self._run(("SMEMBERS", f"{self._namespace}:replay:{mark}"))
        return {int(part) for part in parts}

    async def mark_replayed(self, mark: str, part: int) -> None:
        """Remember, for as long as visitors are kept, that a part of a replay is here."""
        key = f"{self._namespace}:replay:{mark}"
        await self._run(("SADD", key, part), ("PEXPIRE", key, self._retention_ms))

    async def sample(self, count: int) -> list[str]:
        """Ids of up to `count` visitors with events, picked at random."""
        addresses = await self._servers.addresses()
        share: list[Command] = [("RANDOMKEY",)] * -(-count // len(addresses))
        replies = await asyncio.gather(*(self._servers.run_on(address, share) for address in addresses))
        found = {self._visitor_id(_granted(key)) for keys in replies for key in keys if key is not None}
        return sorted(visitor_id for visitor_id in found if visitor_id is not None)[:count]

    def _visitor_id(self, key: bytes) -> str | None:
        """The visitor that a key has the events of."""
        prefix = f"{self._namespace}:e:{{".encode()
        return unquote(key[len(prefix) : -1].decode(), errors="surrogatepass") if key.startswith(prefix) else None

    async def erase(self, visitor_id: str) -> bool:
        """Delete everything that is kept of a visitor, refused events too. Returns whether there was anything."""
        deleted = sum(await self._run(*(("DEL", key) for key in self.keys(visitor_id))))
        deleted += await self._erase_quarantined(visitor_id)
        deleted += await self._erase_scores(visitor_id)
        await Erasures(self).note(visitor_id)
        deleted += await Propensities(self).forget([visitor_id])
        deleted += await Members(self).forget([visitor_id])
        return bool(deleted)

    async def log_scores(self, entries: Sequence[bytes], length: int) -> None:
        """Add entries of served scores, JSON lines, to their stream; about the latest `length` entries are kept."""
        key = self._scores_key
        added = [("XADD", key, "MAXLEN", "~", length, "*", "scores", entry) for entry in entries]
        await self._run(*added, ("PEXPIRE", key, self._retention_ms))

    async def quarantine(self, refused: Sequence[Quarantined], length: int) -> bool:
        """Keep refused events, about the latest `length` of them. Returns whether something else is not in the way."""
        key, added = self._quarantine_key, []
        for item in refused:
            fields: dict[str, str | int] = {
                "reason": item.reason,
                "message": item.message,
                "received_ms": item.received_ms,
                "visitors": " ".join(quote(visitor_id, safe="") for visitor_id in item.visitor_ids),
                "event": item.event,
            }
            added.append(("XADD", key, "MAXLEN", "~", length, "*", *(word for pair in fields.items() for word in pair)))
        replies = await self._servers.run([*added, ("PEXPIRE", key, self._retention_ms)])
        if any(isinstance(reply, Refusal) and reply.is_wrong_type for reply in replies):
            return False
        for reply in replies:
            _granted(reply)
        return True

    async def quarantined(self, count: int = 100) -> list[Quarantined]:
        """The latest `count` refused events, newest first."""
        (entries,) = await self._run(("XREVRANGE", self._quarantine_key, "+", "-", "COUNT", count))
        return [_quarantined(fields) for _, fields in entries]

    async def _run(self, *commands: Command) -> list[Any]:
        """The reply to each command. Raises StoreError also where a server refuses one."""
        return [_granted(reply) for reply in await self._servers.run(commands)]

    @property
    def _scores_key(self) -> str:
        return f"{self._namespace}:scores"

    @property
    def _quarantine_key(self) -> str:
        return f"{self._namespace}:quarantine"

    async def _erase_quarantined(self, visitor_id: str) -> int:
        wanted, start, deleted = quote(visitor_id, safe="", errors="surrogatepass").encode(), "-", 0
        while True:
            (entries,) = await self._run(("XRANGE", self._quarantine_key, start, "+", "COUNT", _PAGE))
            if not entries:
                return deleted
            found = [entry for entry, fields in entries if wanted in fields.get(b"visitors", b"").split()]
            if found:
                deleted += sum(await self._run(("XDEL", self._quarantine_key, *found)))
            start = f"({entries[-1][0].decode()}"

    async def _erase_scores(self, visitor_id: str) -> int:
        """Take a visitor's lines out of the stream; the other lines of an entry come again, as a later entry."""
        told, start, deleted = json.dumps(visitor_id, ensure_ascii=False), "-", 0
        needle = f'"visitor_id":{told},'.encode("utf-8", "surrogatepass")
        while True:
            (entries,) = await self._run(("XRANGE", self._scores_key, start, "+", "COUNT", _PAGE))
            if not entries:
                return deleted
            for name, fields in entries:
                lines = fields.get(b"scores", b"").split(b"\n")
                others = [line for line in lines if needle not in line]
                if len(others) < len(lines):
                    deleted += len(lines) - len(others)
                    again = [("XADD", self._scores_key, "*", "scores", b"\n".join(others))] if others else []
                    await self._run(*again, ("XDEL", self._scores_key, name))
            start = f"({entries[-1][0].decode()}"

    def _has_outgrown(self, key: str, before: int, after: int) -> bool:
        """Whether a value passed a multiple of the size that it is let grow to; not every append tries to compact."""
        if after < MOST_TRAIT_BYTES:  # the lower of the two, and nearly all are below it
            return False
        most = MOST_EVENT_BYTES if key.startswith(f"{self._namespace}:e:") else MOST_TRAIT_BYTES
        return before // most < after // most

    async def _trim(self, keys: Sequence[str], now_ms: int) -> None:
        """Compact values, but those that change meanwhile other than by growing; the next append sees to them then."""
        changes = []
        for key, value in zip(keys, await self._run(*(("GET", key) for key in keys)), strict=True):
            known = value or b""
            is_events = key.startswith(f"{self._namespace}:e:")
            kept = history.trim_events(known) if is_events else history.compact_traits(known, now_ms)
            if len(kept) < len(known):
                changes.append(_Change(key, known, kept))
        await self._run(*(_replacement([change]) for change in changes))

    # --- compaction of visitors at rest, see `service.workers.compaction` ---

    async def lease(self, name: str, owner: str, ms: int) -> bool:
        """Give `name` to `owner` for a time, anew or on top. Returns whether it is not another's."""
        (is_given,) = await self._run(("EVAL", _LEASE, 1, f"{self._namespace}:{name}", owner, ms))
        return bool(is_given)

    async def note(self, name: str, text: str, ms: int) -> None:
        """Keep a text for a time."""
        await self._run(("SET", f"{self._namespace}:{name}", text, "PX", ms))

    async def noted(self, name: str) -> str:
        """The text that was kept, empty where there is none."""
        (text,) = await self._run(("GET", f"{self._namespace}:{name}"))
        return (text or b"").decode()

    async def addresses(self) -> tuple[Address, ...]:
        """The servers that have visitors."""
        return await self._servers.addresses()

    async def count_keys(self) -> int:
        """How many keys there are on all servers, those of other namespaces too."""
        return sum([_granted(count) async for (count,) in self._of_each(("DBSIZE",))])

    async def used_bytes(self) -> int:
        """Memory that all servers use, for others too."""
        return sum([int(_granted(told)["used_memory"]) async for (told,) in self._of_each(("INFO", "memory"))])

    async def _of_each(self, command: Command) -> AsyncIterator[list[Any]]:
        for address in await self.addresses():
            yield await self._servers.run_on(address, [command])

    async def scan(self, address: Address, cursor: int, count: int) -> tuple[int, list[str]]:
        """About `count` keys of visitors on one server from a cursor on, 0 at first; and the next one, 0 at the end."""
        words = ("SCAN", cursor, "MATCH", f"{self._namespace}:[et]:{{*}}", "COUNT", count, "TYPE", "string")
        (reply,) = await self._servers.run_on(address, [words])
        following, keys = _granted(reply)
        return int(following), [key.decode() for key in keys if key.isascii()]

    async def compact(self, keys: Sequence[str], now_ms: int, rest_ms: int = 0) -> int:
        """Store anew, in one piece and under one key, the visitors among `keys` that take more memory than they must.

        Left alone is who was written to in the last `rest_ms`. Records that are broken, doubled or beyond the bound
        go; what is appended meanwhile stays. Returns how many visitors were stored anew.
        """
        loose = await self._loose(keys, rest_ms)
        stored = await self._servers.run([("MGET", *pair) for pair in loose])
        changes = []
        for (pair, is_spacious), values in zip(loose.items(), stored, strict=True):
            known = [value or b"" for value in values] if isinstance(values, list) else []
            if any(known):
                kept = history.fold(known[0], known[1], now_ms)
                if is_spacious or kept != tuple(known):
                    changes.append([_Change(*change) for change in zip(pair, known, kept, strict=True) if change[1]])
        replies = await self._servers.run([_replacement(change) for change in changes])
        done = [
            (first.key, *reply)
            for (first, *_), reply in zip(changes, replies, strict=True)
            if isinstance(reply, list) and reply
        ]
        for key, taken, size in done:
            self._excess = max(self._excess, taken - history.fresh_bytes(key, size))
        return len(done)

    async def _loose(self, keys: Sequence[str], rest_ms: int) -> dict[tuple[str, str], bool]:
        """Both keys of each visitor at rest that may be worth storing anew; True where that spares memory for sure."""
        pairs = [self._pair(key) for key in keys]
        asked = [
            ("EVAL", _WEIGH, 2, *(pair if key == pair[0] else pair[::-1]))
            for key, pair in zip(keys, pairs, strict=True)
        ]
        loose: dict[tuple[str, str], bool] = {}
        for key, pair, reply in zip(keys, pairs, await self._servers.run(asked), strict=True):
            if isinstance(reply, list):
                taken, size, others, life_ms = reply
                spare = taken - history.fresh_bytes(key, size) - self._excess
                is_spacious = others > 0 or spare > max(16, size // 16)
                is_busy = 0 <= self._retention_ms - life_ms < rest_ms
                if not is_busy and (is_spacious or size % RECORD_BYTES or size > MOST_EVENTS * RECORD_BYTES):
                    loose[pair] = loose.get(pair, False) or is_spacious
        return loose

    def _pair(self, key: str) -> tuple[str, str]:
        """Both keys of the visitor that has this one."""
        rest = key[len(self._namespace) + 2 :]
        return f"{self._namespace}:e{rest}", f"{self._namespace}:t{rest}"


class _Change(NamedTuple):
    """What a key holds, and what it shall hold in place of that."""

    key: str
    known: bytes
    kept: bytes


def _replacement(changes: Sequence[_Change]) -> Command:
    told = [(len(one.known), hashlib.sha1(one.known, usedforsecurity=False).hexdigest(), one.kept) for one in changes]
    return (
        "EVAL",
        _REPLACE_HEADS,
        len(changes),
        *(one.key for one in changes),
        *(word for one in told for word in one),
    )


def _quarantined(fields: Mapping[bytes, bytes]) -> Quarantined:
    text = {name.decode(): value.decode("utf-8", "replace") for name, value in fields.items()}
    visitor_ids = tuple(unquote(part) for part in text["visitors"].split())
    return Quarantined(text["reason"], text["message"], int(text["received_ms"]), visitor_ids, text["event"])


def _granted(reply: Any) -> Any:
    """A reply that is no refusal. Raises StoreError for one."""
    if isinstance(reply, Refusal):
        raise StoreError(f"the feature cache refuses ({reply.text}); try again later")
    return reply


_Run = Callable[[Sequence[Command]], Awaitable[list[Any]]]


@dataclass(frozen=True)
class _Network:
    """How connections are opened, to the servers of a location."""

    where: Location
    timeout_s: float
    connect_timeout_s: float
    connections: int

    @property
    def is_cluster(self) -> bool:
        return self.where.kind is Kind.CLUSTER

    def servers(self) -> Servers:
        if self.where.kind is Kind.SENTINEL:
            sentinel = self.where._replace(username=None, password=None, database=0)
            # Sentinels that want a password are taken to have that of the servers.
            openers = [
                _Network(known, self.timeout_s, self.connect_timeout_s, 1).node
                for known in (sentinel, self.where._replace(database=0))[: 2 if self.where.password else 1]
            ]
            return Servers(servers.by_sentinels(self.where.addresses, self.where.service, openers), self.node)
        if self.is_cluster:
            return Servers(servers.in_cluster(self.where.addresses, self.node), self.node)
        return Servers(servers.alone(*self.where.addresses), self.node)

    def node(self, address: Address) -> _Node:
        """One server, not connected yet."""
        known = self.endpoint(address)
        place: dict[str, Any] = {"connection_class": Connection, "host": known.host, "port": known.port}
        if known.path is not None:
            place = {"connection_class": UnixDomainSocketConnection, "path": known.path}
        elif self.where.tls:
            place["connection_class"] = SSLConnection
        pool = BlockingConnectionPool(
            max_connections=self.connections,
            timeout=self.timeout_s,
            socket_timeout=self.timeout_s,
            socket_connect_timeout=self.connect_timeout_s,
            username=known.username,
            password=known.password,
            db=known.database,
            # The library's own defaults, 5 s and ten retries, would hold a visitor's page for a minute.
            retry=Retry(NoBackoff(), 0),
            # RESP2 and no driver name: one round trip less for every connection that is opened.
            protocol=2,
            driver_info=None,
            **place,
        )
        return _Node(Redis.from_pool(pool))

    def endpoint(self, address: Address) -> Endpoint:
        """Where a server listens, and what it asks first."""
        host, port = address
        where = self.where
        tls = self._tls if where.tls else None
        return Endpoint(host, port, where.path, tls, where.username, where.password, where.database)

    @cached_property
    def _tls(self) -> ssl.SSLContext:
        return ssl.create_default_context()


class _Node:
    """One server, and a pool of connections to it by redis-py."""

    def __init__(self, client: Redis) -> None:
        self._client = client

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """The reply to each command, in one round trip; see `servers.Node`."""
        with _failures():
            pipeline = self._client.pipeline(transaction=False)
            for command in commands:
                pipeline.execute_command(*command)
            replies = await pipeline.execute(raise_on_error=False)
        return [_told(reply) if isinstance(reply, ResponseError) else reply for reply in replies]

    async def close(self) -> None:
        """Close its connections."""
        await self._client.aclose()


def _told(error: ResponseError) -> Redirect | Refusal:
    """What a server's error says."""
    if isinstance(error, AskError):  # of which MovedError is one
        return Redirect(error.slot_id, (error.host, error.port), not isinstance(error, MovedError))
    text = servers.without_arguments(str(error))
    return Refusal(f"{error.status_code} {text}" if error.status_code else text)


@contextmanager
def _failures() -> Iterator[None]:
    try:
        yield
    except (RedisError, OSError, EOFError) as error:
        # The message of a connection error names hosts, which is no client's business; the cause keeps it.
        raise StoreError(f"the feature cache failed ({type(error).__name__}); try again later") from error
