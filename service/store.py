"""The feature cache: what each visitor's events and traits are kept under, in Redis or Valkey.

Keys, all beginning with the namespace NS:

- `NS:e:{ID}` the visitor's event records and `NS:t:{ID}` its trait records, strings that grow by APPEND. ID is the
  visitor's id percent-encoded (UTF-8; all but ASCII letters, digits and `_.-~`), so that no id can end the hash tag
  early or reach another key; the braces put both keys into one slot of a cluster. Both expire together, `retention`
  after the last write to either.
- `NS:i:{ID}` what the visitor said: hashed identifiers and consents; see `service.consent`. `NS:l:{ID}` a set of the
  anonymous visitors who are joined into this one. Their own keys begin with who that is; see `service.joining`.
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
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple
from urllib.parse import quote, unquote

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, MovedError, RedisError, ResponseError

from service import consent, history, joining, location, servers
from service.core.events import RECORD_BYTES
from service.erasures import Erasures
from service.errors import StoreError
from service.history import MOST_EVENTS as MOST_EVENTS
from service.history import History as History
from service.history import compact_traits as compact_traits
from service.joining import Linked, Login
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

# What a value takes of memory, its length, whether the visitor's other value exists, and for how long it is kept. What
# the visitor said, and who is joined into it, is kept no shorter.
_WEIGH: Final = """
local life = redis.call('PTTL', KEYS[1])
for place = 3, 4 do
  local left = redis.call('PTTL', KEYS[place])
  if left >= 0 and left < life then redis.call('PEXPIRE', KEYS[place], life) end
end
local taken = redis.call('MEMORY', 'USAGE', KEYS[1]) or 0
return {taken, redis.call('STRLEN', KEYS[1]), redis.call('EXISTS', KEYS[2]), life}
"""

# Notes in KEYS[2] that ARGV[1] is about to be joined into the visitor whose events KEYS[1] has. Returns 1; 0 if that
# one is joined into another itself, and -1 if there are ARGV[3] already. ARGV[2] begins what is joined.
_NOTE_JOINED: Final = """
local value = redis.call('GET', KEYS[1]) or ''
if string.sub(value, 1, #ARGV[2]) == ARGV[2] then return 0 end
if redis.call('SISMEMBER', KEYS[2], ARGV[1]) == 0 and redis.call('SCARD', KEYS[2]) >= tonumber(ARGV[3]) then
  return -1
end
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('PEXPIRE', KEYS[2], ARGV[4])
return 1
"""

# Puts the head ARGV[2] before three values, or in place of the head ARGV[1] that they begin with. Returns 1; 0 if they
# begin otherwise by now, or if ARGV[5] is 1 and something stands behind that head, which may have been handed over
# already to whom it says; and -1 if somebody is joined into this visitor. ARGV[3] begins any head.
_LINK: Final = """
if redis.call('SCARD', KEYS[4]) > 0 then return -1 end
local values = {}
for place = 1, 3 do
  local value = redis.call('GET', KEYS[place]) or ''
  if string.sub(value, 1, #ARGV[3]) == ARGV[3] then
    if ARGV[1] == '' or string.sub(value, 1, #ARGV[1]) ~= ARGV[1] then return 0 end
    value = string.sub(value, #ARGV[1] + 1)
    if ARGV[5] == '1' and value ~= '' then return 0 end
  elseif place == 1 and ARGV[1] ~= '' then
    return 0
  end
  values[place] = ARGV[2] .. value
end
for place = 1, 3 do redis.call('SET', KEYS[place], values[place], 'PX', ARGV[4]) end
return 1
"""
# Two processes may join the same visitor at once; each try is a few round trips.
_MOST_TRIES: Final = 10

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


class Family(NamedTuple):
    """A visitor, and the anonymous ones who are joined into it: one person under several ids."""

    visitor_id: str
    joined: Sequence[str]


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
        """The history of each visitor, empty where there is none; of who was joined into another, that one's."""
        if not visitor_ids:
            return []
        values = await self._values(visitor_ids, self._servers.run)
        if owners := joining.owners(values):
            found = await self._values(list(owners.values()), self._servers.run)
            for place, *pair in zip(owners, found[::2], found[1::2], strict=True):
                values[2 * place : 2 * place + 2] = pair
        if UNREAD in values:
            raise StoreError("a server of the feature cache refuses to read; try again later")
        return [history.unfold(*pair) for pair in zip(values[::2], values[1::2], strict=True)]

    def ask(self, visitor_ids: Sequence[str]) -> asyncio.Future[Values]:
        """The events and traits of each visitor in turn, as they are stored, None where there are none.

        `history.unfold` makes a History of the two. Who is in `joining.owners` was joined into another, who is asked
        for next. Where some servers of a cluster do not answer, those of their visitors are UNREAD. The future fails
        with StoreError, and is cancelled if the connection is dropped. Who cancels it says that it took too long.
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
        return self._owner_of(key.decode()) if key.startswith(f"{self._namespace}:e:{{".encode()) else None

    def _owner_of(self, key: str) -> str:
        """The visitor that a key of one is of."""
        return unquote(key[len(self._namespace) + len(":e:{") : -1], errors="surrogatepass")

    async def erase(self, visitor_id: str) -> bool:
        """Delete everything that is kept of a person, refused events too. Returns whether there was anything.

        The person is the visitor with all of `family`. Cut off and begun again it ends the same: who was asked for
        goes last, after what tells who else is meant.
        """
        owner, joined = await self.family(visitor_id)
        names = {owner, *joined, visitor_id}
        deleted = await self._erase_quarantined(names)
        deleted += await self._erase_scores(names)
        for name in sorted(names - {visitor_id}):
            deleted += await self._erase_one(name)
        await self._leave_shared(owner)
        await self._run(("DEL", self._joined_key(owner)))
        deleted += await self._erase_one(visitor_id)
        return bool(deleted)

    async def _erase_one(self, visitor_id: str) -> int:
        """Delete a visitor's own keys, then note that, then take it out of all sets: `service.erasures` says why."""
        deleted: int = sum(await self._run(*(("DEL", key) for key in self._all_keys(visitor_id))))
        await Erasures(self).note(visitor_id)
        deleted += await Propensities(self).forget([visitor_id])
        return deleted + await Members(self).forget([visitor_id])

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

    async def _erase_quarantined(self, names: Collection[str]) -> int:
        wanted = {quote(name, safe="", errors="surrogatepass").encode() for name in names}
        start, deleted = "-", 0
        while True:
            (entries,) = await self._run(("XRANGE", self._quarantine_key, start, "+", "COUNT", _PAGE))
            if not entries:
                return deleted
            found = [entry for entry, fields in entries if wanted.intersection(fields.get(b"visitors", b"").split())]
            if found:
                deleted += sum(await self._run(("XDEL", self._quarantine_key, *found)))
            start = f"({entries[-1][0].decode()}"

    async def _erase_scores(self, names: Collection[str]) -> int:
        """Take visitors' lines out of the stream; the other lines of an entry come again, as a later entry."""
        start, deleted = "-", 0
        needles = [
            f'"visitor_id":{json.dumps(name, ensure_ascii=False)},'.encode("utf-8", "surrogatepass") for name in names
        ]
        while True:
            (entries,) = await self._run(("XRANGE", self._scores_key, start, "+", "COUNT", _PAGE))
            if not entries:
                return deleted
            for name, fields in entries:
                lines = fields.get(b"scores", b"").split(b"\n")
                others = [line for line in lines if not any(needle in line for needle in needles)]
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
        changes, linked = [], set()
        for key, value in zip(keys, await self._run(*(("GET", key) for key in keys)), strict=True):
            known = value or b""
            if joining.is_linked(known):
                linked.add(self._owner_of(key))
                continue
            is_events = key.startswith(f"{self._namespace}:e:")
            kept = history.trim_events(known) if is_events else history.compact_traits(known, now_ms)
            if len(kept) < len(known):
                changes.append(_Change(key, known, kept))
        await self._run(*(_replacement([change]) for change in changes))
        for visitor_id in sorted(linked):
            await self.settle(visitor_id, now_ms)

    # --- what visitors said, see `service.consent` ---

    async def said(self, visitor_ids: Sequence[str]) -> list[bytes | None]:
        """What each visitor said, as records; None of one who was joined into another."""
        replies = await self._servers.run([("GET", self._said_key(visitor_id)) for visitor_id in visitor_ids])
        values = [b"" if isinstance(reply, Refusal) and reply.is_wrong_type else _granted(reply) for reply in replies]
        return [None if joining.is_linked(value) else value or b"" for value in values]

    async def append_said(self, additions: Mapping[str, bytes], now_ms: int) -> set[str]:
        """Add to what visitors said, in one round trip. Returns those who have something else under the key."""
        keys = [self._said_key(visitor_id) for visitor_id in additions]
        lengths = await self._append(keys, list(additions.values()))
        most = consent.MOST_BYTES
        grown = [
            visitor_id
            for (visitor_id, blob), length in zip(additions.items(), lengths, strict=True)
            if length > 0 and (length % consent.RECORD_BYTES or (length - len(blob)) // most < length // most)
        ]
        if grown:
            await self._trim_said(grown, now_ms)
        return {visitor_id for visitor_id, length in zip(additions, lengths, strict=True) if length < 0}

    async def _trim_said(self, visitor_ids: Sequence[str], now_ms: int) -> None:
        keys = [self._said_key(visitor_id) for visitor_id in visitor_ids]
        changes = []
        for visitor_id, key, value in zip(
            visitor_ids, keys, await self._run(*(("GET", key) for key in keys)), strict=True
        ):
            if joining.is_linked(value):
                await self.settle(visitor_id, now_ms)
            elif value:
                changes.append(_Change(key, value, consent.compact(value, now_ms)))
        await self._run(*(_replacement([change]) for change in changes))

    # --- joining an anonymous visitor with a known one, see `service.joining` ---

    async def join(self, logins: Sequence[tuple[str, Login]], now_ms: int) -> list[str]:
        """Join anonymous visitors into who they logged in as. Returns `joined`, `known` or `refused` for each.

        It is `known` where it changes nothing, and `refused` where one of the two cannot be joined: others are joined
        into the anonymous one, so that it is a known one itself, or too many into the known one. Cut off at any point
        and begun again, it ends the same. Raises StoreError.
        """
        links = await self._links([name for anonymous, login in logins for name in (anonymous, login.visitor_id)])
        outcomes = []
        for (anonymous, login), linked, other in zip(logins, links[::2], links[1::2], strict=True):
            owner = other.owner if other else login.visitor_id
            if owner == anonymous:
                outcomes.append("known")
            elif linked and joining.owner_at(linked.logins, login.ts_ms) == owner:
                if linked.tail:
                    await self.settle(anonymous, now_ms)
                outcomes.append("known")
            else:
                outcomes.append(await self._join(anonymous, login, now_ms))
        return outcomes

    async def _join(self, anonymous: str, login: Login, now_ms: int) -> str:
        for _ in range(_MOST_TRIES):
            linked, other = await self._links([anonymous, login.visitor_id])
            owner = other.owner if other else login.visitor_id
            known = linked.logins if linked else ()
            logins = joining.with_login(known, Login(login.ts_ms, owner))
            if owner == anonymous or logins == known:
                await self.settle(anonymous, now_ms)
                return "known"
            # First who is joined into the owner, so that erasing it reaches them; then, in one step, the link itself.
            if (noted := await self._note_joined(anonymous, owner)) < 0:
                return "refused"
            settled = await self.settle(anonymous, now_ms) if noted and linked else False
            old = linked.head if linked else b""
            done = await self._link(anonymous, old, joining.head(logins), settled=settled) if noted else 0
            if done < 0:
                await self._run(("SREM", self._joined_key(owner), anonymous))
                return "refused"
            if done:
                await self.settle(anonymous, now_ms)
                await Propensities(self).drop([anonymous])  # its scores are of whom it belongs to from now on
                return "joined"
        raise StoreError("a visitor is being joined by others at this moment; try again later")

    async def _note_joined(self, anonymous: str, owner: str) -> int:
        keys = self.keys(owner)[0], self._joined_key(owner)
        given = anonymous.encode("utf-8", "surrogatepass"), joining.MAGIC, joining.MOST_JOINED, self._retention_ms
        (reply,) = await self._servers.run([("EVAL", _NOTE_JOINED, len(keys), *keys, *given)])
        return -1 if isinstance(reply, Refusal) and reply.is_wrong_type else int(_granted(reply))

    async def _link(self, visitor_id: str, old: bytes, new: bytes, settled: bool = False) -> int:
        keys = *self._all_keys(visitor_id), self._joined_key(visitor_id)
        given = old, new, joining.MAGIC, self._retention_ms, int(settled)
        (reply,) = await self._servers.run([("EVAL", _LINK, len(keys), *keys, *given)])
        return -1 if isinstance(reply, Refusal) and reply.is_wrong_type else int(_granted(reply))

    async def settle(self, visitor_id: str, now_ms: int) -> bool:
        """Move what was added to a joined visitor to whom it belongs; nothing to do for any other.

        It is added there first and then taken away here, so that cut off in between it is in both places, which counts
        once: doubles are dropped when read. What is added meanwhile stays for the next time. False if something has to
        stay, since something else is under a key of whom it belongs to.
        """
        keys = self._all_keys(visitor_id)
        for _ in range(_MOST_TRIES):
            values = [value or b"" for value in await self._run(*(("GET", key) for key in keys))]
            parts = [joining.split(value) for value in values]
            linked = next(filter(None, parts), None)
            tails = [value if part is None else part.tail for part, value in zip(parts, values, strict=True)]
            if linked is None or not any(tails):
                return True
            if not await self._hand_over(linked.logins, *tails, now_ms=now_ms):
                return False
            changes = [_Change(key, value, linked.head) for key, value in zip(keys, values, strict=True) if value]
            (reply,) = await self._servers.run([_replacement(changes)])
            if reply and not isinstance(reply, Refusal):
                return True
        return True

    async def _hand_over(
        self, logins: Sequence[Login], stored: bytes, traits: bytes, said: bytes, *, now_ms: int
    ) -> bool:
        """Give records to whom they belong by their time. False if something else is under a key of theirs."""
        known = history.unfold(stored, traits)
        events = dict(joining.by_owner(logins, known.events, RECORD_BYTES)) if known.events else {}
        traits_of = dict(joining.by_owner(logins, known.traits, RECORD_BYTES)) if known.traits else {}
        said_by = dict(joining.by_owner(logins, said, consent.RECORD_BYTES)) if said else {}
        owners = sorted({*events, *traits_of})
        additions = {owner: History(events.get(owner, b""), traits_of.get(owner, b"")) for owner in owners}
        unfit = bool(additions and await self.append(additions, now_ms))
        unfit |= bool(said_by and await self.append_said(said_by, now_ms))
        # An owner is told who is joined into it for as long as they are.
        keys = {self._joined_key(login.visitor_id) for login in logins}
        await self._run(*(("PEXPIRE", key, self._retention_ms) for key in sorted(keys)))
        return not unfit

    async def family(self, visitor_id: str) -> Family:
        """Who a visitor is, itself or whom it was joined into, and all anonymous ones that are joined into that one."""
        (linked,) = await self._links([visitor_id])
        owner = linked.owner if linked else visitor_id
        noted = await self._noted_joined(owner)
        return Family(owner, [name for name, one in noted.items() if one is not None and one.owner == owner])

    async def _noted_joined(self, owner: str) -> dict[str, Linked | None]:
        """Who was to be joined into a visitor, in order, and what their events begin with."""
        (reply,) = await self._servers.run([("SMEMBERS", self._joined_key(owner))])
        found = () if isinstance(reply, Refusal) and reply.is_wrong_type else _granted(reply)
        names = sorted(name.decode("utf-8", "surrogatepass") for name in found)
        return dict(zip(names, await self._links(names), strict=True))

    async def _links(self, visitor_ids: Sequence[str]) -> list[Linked | None]:
        """Into whom each visitor was joined, None where it was not."""
        if not visitor_ids:
            return []
        replies = await self._servers.run([("GET", self.keys(visitor_id)[0]) for visitor_id in visitor_ids])
        return [
            None if isinstance(reply, Refusal) and reply.is_wrong_type else joining.split(_granted(reply))
            for reply in replies
        ]

    async def _leave_shared(self, owner: str) -> None:
        """Take a visitor out of the logins of those who were joined into another one later."""
        for name, linked in (await self._noted_joined(owner)).items():
            if linked is not None and linked.owner != owner:
                logins = [login for login in linked.logins if login.visitor_id != owner]
                if len(logins) < len(linked.logins):
                    await self._link(name, linked.head, joining.head(logins))

    def _said_key(self, visitor_id: str) -> str:
        return f"{self._namespace}:i:{{{tag_of(visitor_id)}}}"

    def _joined_key(self, visitor_id: str) -> str:
        return f"{self._namespace}:l:{{{tag_of(visitor_id)}}}"

    def _all_keys(self, visitor_id: str) -> tuple[str, str, str]:
        """The keys of a visitor's events, traits, and what it said."""
        return *self.keys(visitor_id), self._said_key(visitor_id)

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
        changes: list[list[_Change]] = []
        for (pair, is_spacious), values in zip(loose.items(), stored, strict=True):
            known = [value or b"" for value in values] if isinstance(values, list) else []
            if any(map(joining.is_linked, known)):
                await self.settle(self._owner_of(pair[0]), now_ms)
            elif any(known):
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
            ("EVAL", _WEIGH, 4, *(pair if key == pair[0] else pair[::-1]), *self._beside(key))
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

    def _beside(self, key: str) -> tuple[str, str]:
        """The keys of what the visitor that has this one said, and of who is joined into it."""
        rest = key[len(self._namespace) + 2 :]
        return f"{self._namespace}:i{rest}", f"{self._namespace}:l{rest}"


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
