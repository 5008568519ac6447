"""Members of audiences: who is in which, since when, and who entered and left in what order.

Keys of the shard S of an audience A, beside the journal of changes (see `service.journal`), which has the kind `a`:

- `NS:a:s:{A.S}` a sorted set of `TAG ENTERED_MS`, all with score 0, which a server keeps in the order of the tags.
- `NS:a:names` the set of audiences. What else is known of one is in its journal's hash: `definition`, `described_ms`
  and `updated_ms`.

Names are those of the definitions file: letters, digits, `_`, `-` and `.`, 64 at most.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from service.core.errors import PropensityError
from service.erasures import Erasures, key_of
from service.journal import EMIT, Journal
from service.servers import Command
from service.shards import (
    MOST_OF_SCRIPT,
    SHARDS,
    Cache,
    Cursor,
    Page,
    by_shard,
    shard_of,
    slices,
    tag_of,
    text_of,
    total,
)

# Each has 64 sets, and series of its own in the metrics.
MOST_AUDIENCES: Final = 500
MOST_KEPT_CHANGES: Final = 200_000
# The reason of the one change that is left of a visitor who was erased.
ERASED: Final = "erased"
_SEND: Final = 10_000
_PAGES_AT_ONCE: Final = 2

_is_name: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}").fullmatch

# KEYS: members, outbox, counter. ARGV: now, reason, how long they live, [tag, entered_ms, ...], [tag, ...].
_CHANGE: Final = (
    EMIT
    + """
local entered, left, lines = cmsgpack.unpack(ARGV[4]), cmsgpack.unpack(ARGV[5]), {}
local function known(tag) return redis.call('ZRANGEBYLEX', KEYS[1], '[' .. tag .. ' ', '(' .. tag .. '!')[1] end
for place = 1, #entered, 2 do
  local tag = entered[place]
  if not known(tag) then
    redis.call('ZADD', KEYS[1], 0, tag .. ' ' .. entered[place + 1])
    lines[#lines + 1] = ARGV[1] .. ' 1 ' .. ARGV[2] .. ' ' .. tag
  end
end
for _, tag in ipairs(left) do
  local member = known(tag)
  if member then
    redis.call('ZREM', KEYS[1], member)
    lines[#lines + 1] = ARGV[1] .. ' 0 ' .. ARGV[2] .. ' ' .. tag
  end
end
emit(KEYS[2], KEYS[3], lines, ARGV[3])
return redis.call('LLEN', KEYS[2])
"""
)

# The member with each tag, empty where there is none.
_HAS: Final = """
local found = {}
for place, tag in ipairs(cmsgpack.unpack(ARGV[1])) do
  found[place] = redis.call('ZRANGEBYLEX', KEYS[1], '[' .. tag .. ' ', '(' .. tag .. '!')[1] or ''
end
return found
"""

# Ends the membership of ARGV[2], of which only ARGV[3] is told, with the reason ARGV[1].
_FORGET: Final = (
    EMIT
    + """
local member = redis.call('ZRANGEBYLEX', KEYS[1], '[' .. ARGV[2] .. ' ', '(' .. ARGV[2] .. '!')[1]
if not member then return 0 end
redis.call('ZREM', KEYS[1], member)
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))
emit(KEYS[2], KEYS[3], {now .. ' 0 ' .. ARGV[1] .. ' ' .. ARGV[3]}, ARGV[4])
return 1
"""
)

# Sets a field of a hash to a number, unless it is larger there.
_RAISE: Final = """
local before = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or 0)
if before < tonumber(ARGV[2]) then redis.call('HSET', KEYS[1], ARGV[1], ARGV[2]) end
return 0
"""


class Member(NamedTuple):
    """A visitor in an audience, and since when."""

    visitor_id: str
    entered_ms: int


class Change(NamedTuple):
    """A visitor who entered an audience, or left it, and why.

    Of one who was erased (`why` is ERASED) `visitor_id` is `key_of` the visitor: enough to find and end a copy of the
    membership elsewhere, and not the id. The visitor's earlier changes are gone.
    """

    cursor: str
    at_ms: int
    visitor_id: str
    entered: bool
    why: str


class Audience(NamedTuple):
    """An audience: how many members it has, when that last changed, when it was last described, and as what.

    `cursor` is that of the latest change, empty where there was none yet.
    """

    name: str
    size: int
    updated_ms: int
    described_ms: int
    definition: str
    cursor: str

    @property
    def exists(self) -> bool:
        """Whether anything is known of it; of one that was let alone for the retention, the name is left for a time."""
        return bool(self.size or self.updated_ms or self.described_ms)


class TooManyAudiences(PropensityError):
    """One audience more than are kept."""


class Members:
    """The members of all audiences."""

    def __init__(self, cache: Cache, *, kept_changes: int = MOST_KEPT_CHANGES) -> None:
        self._cache, self._kept_changes = cache, kept_changes
        self._erasures = Erasures(cache)
        # For whoever sends pages on: with sixty streams at once scores took 47 ms instead of 12, and reads came late.
        self.turns = asyncio.Semaphore(_PAGES_AT_ONCE)

    # --- who is in ---

    async def page(self, audience: str, cursor: str | None, n: int) -> Page[Member]:
        """Up to n members after a cursor, in an order that does not change.

        Who is in from the first page to the last is on one page, and nobody is on two. Raises InvalidCursor for a
        text that is no cursor.
        """
        place, found = Cursor.parse(cursor), list[Member]()
        while place.shard < SHARDS and len(found) < n:
            wanted = n - len(found)
            start = f"({place.tag}!" if place.tag else "-"
            words = ("ZRANGEBYLEX", self._key(audience, place.shard), start, "+", "LIMIT", 0, wanted)
            (members,) = await self._cache.run(words)
            found += map(_member, members)
            if len(members) < wanted:
                place = Cursor(place.shard + 1)
            else:
                place = Cursor(place.shard, members[-1].decode("ascii").partition(" ")[0])
        return Page(found, str(place) if place.shard < SHARDS else None)

    async def size(self, audience: str) -> int:
        """How many members there are."""
        return await total(self._cache, [self._key(audience, shard) for shard in range(SHARDS)], "ZCARD")

    async def has(self, audience: str, ids: Sequence[str]) -> list[int]:
        """Since when each visitor is a member, in milliseconds since 1970; 0 for who is none."""
        found = [0] * len(ids)
        parts = [(shard, piece) for shard, all_ in by_shard(ids).items() for piece in slices(all_, MOST_OF_SCRIPT)]
        words: list[Command] = [
            ("EVAL", _HAS, 1, self._key(audience, shard), msgspec.msgpack.encode([tag for _, tag in piece]))
            for shard, piece in parts
        ]
        for (_, piece), members in zip(parts, await self._cache.run(*words) if words else (), strict=True):
            for (place, _), member in zip(piece, members, strict=True):
                found[place] = _member(member).entered_ms if member else 0
        return found

    async def erased(self, ids: Sequence[str]) -> Collection[str]:
        """Those of the visitors who were erased and have not come back, so that they cannot enter."""
        return await self._erasures.among(ids)

    # --- who enters and leaves ---

    async def change(
        self, audience: str, entered: Mapping[str, int], left: Sequence[str], at_ms: int, why: str
    ) -> None:
        """Let visitors enter, each since a moment, and let others leave.

        Who is in stays in since then, and who is out stays out. Each change is one step together with its line in the
        journal, so a call that was cut off is ended by another one like it. Who was erased and has not come back does
        not enter. `why` is one short text for all of them.
        """
        await self._register(audience)
        changes: list[tuple[str, int | None]] = [*entered.items(), *((visitor_id, None) for visitor_id in left)]
        for some in slices(changes, _SEND):
            entering = [visitor_id for visitor_id, since_ms in some if since_ms is not None]
            async with self._erasures.writing(entering, self.forget) as erased:
                if erased:
                    some = [one for one in some if one[1] is None or one[0] not in erased]
                await self._change(audience, some, at_ms, tag_of(why))
        await self._cache.run(("EVAL", _RAISE, 1, self.journal(audience).known_key, "updated_ms", at_ms))
        await self._keep(audience)

    async def _change(self, audience: str, changes: Sequence[tuple[str, int | None]], at_ms: int, reason: str) -> None:
        """Let each visitor enter since a moment, or leave where that is None."""
        journal, scripts, shards = self.journal(audience), list[Command](), list[int]()
        for shard, visitors in by_shard([visitor_id for visitor_id, _ in changes]).items():
            keys = self._key(audience, shard), *journal.outbox(shard)
            for piece in slices(visitors, MOST_OF_SCRIPT):
                told = [(tag, changes[place][1]) for place, tag in piece]
                entered = [part for tag, since_ms in told if since_ms is not None for part in (tag, str(since_ms))]
                blobs = map(msgspec.msgpack.encode, (entered, [tag for tag, since_ms in told if since_ms is None]))
                shards.append(shard)
                scripts.append(("EVAL", _CHANGE, 3, *keys, at_ms, reason, self._cache.retention_ms, *blobs))
        lengths = await self._cache.run(*scripts)
        await journal.drain({shard for shard, length in zip(shards, lengths, strict=True) if length})

    async def changes(self, audience: str, since: str, n: int) -> Page[Change]:
        """Up to n changes after the cursor `since`, from the first that is kept if it is empty; see `Journal.read`.

        The page's cursor is None where these are the latest; go on from the last change's own later.
        """
        entries, cursor = await self.journal(audience).read(since, n)
        changes = []
        for number, line in entries:
            at_ms, entered, why, tag = line.split(" ")
            changes.append(Change(str(number), int(at_ms), text_of(tag), entered == "1", text_of(why)))
        return Page(changes, cursor)

    def journal(self, audience: str) -> Journal:
        """The journal of the changes of an audience."""
        return Journal(self._cache, "a", _checked(audience), self._kept_changes)

    # --- which audiences there are ---

    async def names(self) -> list[Audience]:
        """Every audience, by name."""
        return [one for one in await self._registered() if one.exists]

    async def _registered(self) -> list[Audience]:
        """Every audience, with those that are about to begin or have been forgotten."""
        (names,) = await self._cache.run(("SMEMBERS", self._names_key))
        return [await self._audience(name) for name in sorted(name.decode("ascii") for name in names)]

    async def find(self, audience: str) -> Audience | None:
        """One audience, None if there is none of this name."""
        if not _is_name(audience):
            return None
        (is_known,) = await self._cache.run(("SISMEMBER", self._names_key, audience))
        found = await self._audience(audience) if is_known else None
        return found if found and found.exists else None

    async def describe(self, audience: str, definition_json: str, at_ms: int) -> None:
        """Say what an audience is. It is kept for the retention after this was said last, or something changed.

        Raises TooManyAudiences beyond MOST_AUDIENCES.
        """
        known = self.journal(audience).known_key
        await self._register(audience)
        await self._cache.run(
            ("HSET", known, "definition", definition_json),
            ("EVAL", _RAISE, 1, known, "described_ms", at_ms),
        )
        await self._keep(audience)

    async def undescribe(self, audience: str) -> None:
        """Say nothing any more of what an audience is. Its members stay, and its changes."""
        await self._cache.run(("HDEL", self.journal(audience).known_key, "definition", "described_ms"))

    async def drop(self, audience: str) -> None:
        """Forget an audience with its members and changes. Cut off, it is ended by another call."""
        await self._cache.run(*(("DEL", self._key(audience, shard)) for shard in range(SHARDS)))
        await self.journal(audience).drop()
        await self._cache.run(("SREM", self._names_key, audience))

    async def forget(self, ids: Sequence[str]) -> int:
        """Drop visitors from all audiences, and all that changes say of them but ERASED. Returns how much there was."""
        dropped = 0
        (names,) = await self._cache.run(("SMEMBERS", self._names_key))
        for name in sorted(name.decode("ascii") for name in names):
            journal = self.journal(name)
            for visitor_id in ids:
                tag = tag_of(visitor_id)
                shard = shard_of(tag)
                keys = self._key(name, shard), *journal.outbox(shard)
                told = ERASED, tag, key_of(visitor_id), self._cache.retention_ms
                dropped += sum(await self._cache.run(("EVAL", _FORGET, 3, *keys, *told)))
                await journal.drain([shard])
                dropped += await journal.scrub(tag)
        return dropped

    async def _keep(self, audience: str) -> None:
        """Let all of an audience live for the retention from now on."""
        sets = [self._key(audience, shard) for shard in range(SHARDS)]
        keys = [self._names_key, *sets, *self.journal(audience).all_keys()]
        await self._cache.run(*(("PEXPIRE", key, self._cache.retention_ms) for key in keys))

    async def _register(self, audience: str) -> None:
        """Have an audience be in the list."""
        key = self._names_key
        is_known, count = await self._cache.run(("SISMEMBER", key, _checked(audience)), ("SCARD", key))
        if is_known:
            return
        if count >= MOST_AUDIENCES:
            # Not before it is needed: whoever reads cannot tell one that is gone from one that is about to begin.
            gone = [one.name for one in await self._registered() if not one.exists]
            count -= (await self._cache.run(("SREM", key, *gone)))[0] if gone else 0
        if count >= MOST_AUDIENCES:
            raise TooManyAudiences(f"there are {MOST_AUDIENCES} audiences, and no more are kept; drop some first")
        await self._cache.run(("SADD", key, audience))

    async def _audience(self, name: str) -> Audience:
        words = ("HMGET", self.journal(name).known_key, "updated_ms", "described_ms", "definition", "next")
        size, (fields,) = await self.size(name), await self._cache.run(words)
        updated, described, definition, following = fields
        cursor = str(int(following) - 1) if following else ""
        return Audience(name, size, int(updated or 0), int(described or 0), (definition or b"").decode(), cursor)

    @property
    def _names_key(self) -> str:
        return f"{self._cache.namespace}:a:names"

    def _key(self, audience: str, shard: int) -> str:
        return f"{self._cache.namespace}:a:s:{{{_checked(audience)}.{shard}}}"


def _checked(audience: str) -> str:
    if not _is_name(audience):
        raise ValueError(f"{audience!r} is no name of an audience; write letters, digits, _, - and ., 64 at most")
    return audience


def _member(stored: bytes) -> Member:
    tag, _, entered_ms = stored.decode("ascii").partition(" ")
    return Member(text_of(tag), int(entered_ms))
