"""The propensity database: the latest score of every visitor, ranked, and the segment that each one is in.

Keys of the shard S of a model M, beside the journal of moves (see `service.journal`), which has the kind `s`:

- `NS:p:r:{M.S}` a sorted set of tags by `packed` score: the propensity, and after it the moment.
- `NS:p:i:{M.S}` the same tags, all with score 0, which a server keeps in the order of the tags. Pages follow it.
- `NS:p:s:{M.S}` a hash of the segment of each tag, `SINCE_MS SEGMENT`.
- `NS:p:models` the set of models that have any.
- `NS:p:v:{M}` a hash of the versions that scored, and when each did so last.

A packed score is the bits of the float32, which for numbers that are not negative grow with the number, times 2^23,
plus the quarter-hours since 1970: an integer below 2^53, which a double holds exactly. So the moment takes no memory of
its own, and is there to let the later score win and to know whom to forget. See docs/adr/0014-propensity-database.md.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from service.erasures import Erasures
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

MOMENTS: Final = 2**23
MOMENT_MS: Final = 15 * 60_000
MOST_KEPT_MOVES: Final = 200_000
_BEYOND: Final = 0x3F800001 * MOMENTS  # of any propensity
# A page of tags that one script looks at. And members above a cut that are rather read all at once than looked for.
_WALK: Final = 500
_FEW: Final = 2_000
# Visitors whose commands are made and sent together.
_SEND: Final = 10_000

_encode: Final = msgspec.msgpack.encode

# KEYS: ranks and ids of one shard or several. ARGV: how long they live, then for each shard {tags, {packed, tag, ...}}.
_PUT: Final = """
for place = 1, #KEYS, 2 do
  local ranks, ids = KEYS[place], KEYS[place + 1]
  local tags, scores = unpack(cmsgpack.unpack(ARGV[(place + 3) / 2]))
  local added, stale = {}, {}
  for at, before in ipairs(redis.call('ZMSCORE', ranks, unpack(tags))) do
    if not before then
      added[#added + 1] = 0
      added[#added + 1] = tags[at]
    elseif tonumber(before) % 8388608 > tonumber(scores[2 * at - 1]) % 8388608 then
      stale[#stale + 1] = at
    end
  end
  for at = #stale, 1, -1 do
    table.remove(scores, 2 * stale[at])
    table.remove(scores, 2 * stale[at] - 1)
  end
  if #scores > 0 then redis.call('ZADD', ranks, unpack(scores)) end
  if #added > 0 then
    redis.call('ZADD', ids, unpack(added))
  end
  redis.call('PEXPIRE', ranks, ARGV[1])
  redis.call('PEXPIRE', ids, ARGV[1])
end
return 0
"""

# Of up to ARGV[2] tags from ARGV[1] on: the last one, if there may be more, and those at ARGV[3] or above with scores.
_ABOVE: Final = """
local tags = redis.call('ZRANGEBYLEX', KEYS[2], ARGV[1], '+', 'LIMIT', 0, ARGV[2])
if #tags == 0 then return {''} end
local reply, least = {#tags == tonumber(ARGV[2]) and tags[#tags] or ''}, tonumber(ARGV[3])
for place, packed in ipairs(redis.call('ZMSCORE', KEYS[1], unpack(tags))) do
  if packed and tonumber(packed) >= least then
    reply[#reply + 1] = tags[place]
    reply[#reply + 1] = packed
  end
end
return reply
"""

# Forgets those of a page of tags whose moment, of the segment where there is no score, is before ARGV[3]; or, where
# ARGV[2] is 0, those that are named from ARGV[4] on.
_PRUNE: Final = """
local tags, reply = {}, {'', 0}
if ARGV[2] ~= '0' then
  tags = redis.call('ZRANGEBYLEX', KEYS[2], ARGV[1], '+', 'LIMIT', 0, ARGV[2])
  if #tags == tonumber(ARGV[2]) then reply[1] = tags[#tags] end
else
  for place = 4, #ARGV do tags[#tags + 1] = ARGV[place] end
end
if #tags == 0 then return reply end
local gone, all, moment = {}, ARGV[2] == '0', tonumber(ARGV[3])
for place, packed in ipairs(redis.call('ZMSCORE', KEYS[1], unpack(tags))) do
  local last = packed and tonumber(packed) % 8388608
  if not packed and not all then
    local segment = redis.call('HGET', KEYS[3], tags[place])
    last = segment and math.floor(tonumber(string.match(segment, '^%d+')) / 900000) or 0
  end
  if all or last < moment then gone[#gone + 1] = tags[place] end
end
if #gone > 0 then
  reply[2] = math.max(redis.call('ZREM', KEYS[2], unpack(gone)), redis.call('HDEL', KEYS[3], unpack(gone)))
  redis.call('ZREM', KEYS[1], unpack(gone))
end
return reply
"""

# KEYS: segments, ids, outbox, counter. ARGV: now, how long it lives, [tag, segment, ...].
_MOVE: Final = (
    EMIT
    + """
local items, lines, changed = cmsgpack.unpack(ARGV[3]), {}, {}
local tags = {}
for at = 1, #items, 2 do tags[#tags + 1] = items[at] end
local known = redis.call('HMGET', KEYS[1], unpack(tags))
for at, tag in ipairs(tags) do
  local segment, since, before = items[2 * at], nil, nil
  if known[at] then since, before = string.match(known[at], '^(%d+) (.*)$') end
  if before ~= segment and not (since and tonumber(since) > tonumber(ARGV[1])) then
    changed[#changed + 1] = tag
    changed[#changed + 1] = ARGV[1] .. ' ' .. segment
    redis.call('ZADD', KEYS[2], 0, tag)
    lines[#lines + 1] = ARGV[1] .. ' ' .. (before or '') .. ' ' .. segment .. ' ' .. tag
  end
end
if #changed > 0 then redis.call('HSET', KEYS[1], unpack(changed)) end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[2], ARGV[2])
emit(KEYS[3], KEYS[4], lines, ARGV[2])
return #lines
"""
)


class Scored(NamedTuple):
    """A visitor and the latest score."""

    visitor_id: str
    propensity: float


class Move(NamedTuple):
    """A visitor who came into a segment, from another one or (`left` is None) for the first time."""

    cursor: str
    at_ms: int
    visitor_id: str
    model: str
    left: str | None
    entered: str


def pack(propensity: npt.ArrayLike, at_ms: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Scores as they are kept: int64[n] in [0, 2^53).

    propensity: [n] in [0, 1], taken as float32; at_ms: milliseconds since 1970, one or [n]. Raises ValueError for a
    propensity that is no probability.
    """
    values = np.ascontiguousarray(propensity, np.float32)
    if not np.all((values >= 0) & (values <= 1)):  # NaN too
        raise ValueError("a propensity must be a number from 0 to 1")
    moments = np.clip(np.asarray(at_ms, np.int64) // MOMENT_MS, 0, MOMENTS - 1)
    packed: npt.NDArray[np.int64] = (values + np.float32(0)).view(np.int32).astype(np.int64) * MOMENTS + moments
    return packed


def unpack(packed: Sequence[bytes | float]) -> list[float]:
    """The propensities of packed scores as a server writes them; float32 values."""
    bits = (np.array(packed).astype(np.float64).astype(np.int64) // MOMENTS).astype(np.int32)
    found: list[float] = bits.view(np.float32).tolist()
    return found


class Propensities:
    """Scores and segments of all visitors, by model."""

    def __init__(self, cache: Cache, *, kept_moves: int = MOST_KEPT_MOVES) -> None:
        self._cache, self._kept_moves = cache, kept_moves
        self._erasures = Erasures(cache)

    # --- scores ---

    async def put(
        self, model: str, version: str, ids: Sequence[str], propensity: npt.ArrayLike, at_ms: int | Sequence[int]
    ) -> None:
        """Keep the scores of visitors; one that is known from a later moment stays.

        propensity: [n] in [0, 1]; at_ms: when they hold, for all or for each. Moments are told apart by quarter-hours;
        within one the last put wins. Doing it twice changes nothing. Who was erased and has not come back is left out.
        Raises ValueError for what is no probability.
        """
        packed = pack(propensity, at_ms).tolist()
        if not ids:
            return
        for first in range(0, len(ids), _SEND):
            some = ids[first : first + _SEND]
            async with self._erasures.writing(some, self.forget) as erased:
                parts = {
                    shard: {tag: packed[first + at] for at, tag in visitors if some[at] not in erased}
                    for shard, visitors in by_shard(some).items()
                }
                await self._cache.run(*self._puts(model, parts))
        await self._note_version(model, version, int(np.max(at_ms)))

    async def put_live(self, model: str, version: str, shards: Sequence[Mapping[str, tuple[float, int]]]) -> None:
        """The same for scores and moments by tag, of each shard in turn, sent in small parts, so that others get turns.

        Tags are those of `service.shards`.
        """
        tags = [tag for held in shards for tag in held]
        if not tags:
            return
        parts = {shard: _packed(held) for shard, held in enumerate(shards) if held}
        async with self._erasures.writing_tags(tags, self.forget) as erased:
            for tag in erased:
                parts[shard_of(tag)].pop(tag)
            for command in self._puts(model, parts):
                await self._cache.run(command)
        await self._note_version(model, version, max(at_ms for held in shards for _, at_ms in held.values()))

    async def _note_version(self, model: str, version: str, at_ms: int) -> None:
        versions, life_ms = f"{self._cache.namespace}:p:v:{{{model}}}", self._cache.retention_ms
        await self._cache.run(
            *(("HSET", versions, version, at_ms), ("PEXPIRE", versions, life_ms)),
            *(("SADD", self._models_key, model), ("PEXPIRE", self._models_key, life_ms)),
        )

    def _puts(self, model: str, parts: Mapping[int, Mapping[str, int]]) -> Iterator[Command]:
        """Commands of about MOST_OF_SCRIPT visitors each; in a cluster none names keys of two shards."""
        keys: list[str] = []
        blobs: list[bytes] = []
        held = 0
        for shard, members in parts.items():
            for piece in slices(list(members.items()), MOST_OF_SCRIPT):
                if keys and (self._cache.is_cluster or held + len(piece) > MOST_OF_SCRIPT):
                    yield ("EVAL", _PUT, len(keys), *keys, self._cache.retention_ms, *blobs)
                    keys, blobs, held = [], [], 0
                keys += self._keys(model, shard)[:2]
                scores = [part for tag, packed in piece for part in (str(packed), tag)]
                blobs.append(_encode(([tag for tag, _ in piece], scores)))
                held += len(piece)
        if keys:
            yield ("EVAL", _PUT, len(keys), *keys, self._cache.retention_ms, *blobs)

    async def top(self, model: str, n: int) -> list[Scored]:
        """The n visitors with the highest scores, best first; equals by moment, then by tag, latest first."""
        if n <= 0:
            return []
        # A shard rarely has much more than its part of the best, and is asked again if it has.
        share = min(n, -(-n // SHARDS) + 16 + 4 * math.isqrt(-(-n // SHARDS)))
        found: dict[int, list[bytes]] = {}
        asked = dict.fromkeys(range(SHARDS), share)
        while asked:
            replies = await self._cache.run(
                *(
                    ("ZREVRANGE", self._keys(model, shard)[0], 0, count - 1, "WITHSCORES")
                    for shard, count in asked.items()
                )
            )
            found |= dict(zip(asked, replies, strict=True))
            ranked = sorted(
                ((float(one[at + 1]), one[at], shard) for shard, one in found.items() for at in range(0, len(one), 2)),
                reverse=True,
            )[:n]
            taken = dict.fromkeys(range(SHARDS), 0)
            for _, _, shard in ranked:
                taken[shard] += 1
            asked = {
                shard: min(n, 4 * asked[shard])
                for shard in asked
                if asked[shard] < n and taken[shard] == len(found[shard]) // 2 == asked[shard]
            }
        return _scored([part for packed, tag, _ in ranked for part in (tag, b"%.0f" % packed)])

    async def above(self, model: str, cut: float, cursor: str | None, n: int) -> Page[Scored]:
        """Up to n visitors with a score of at least `cut`, after a cursor; in an order that no score changes.

        Who is above the cut from the first page to the last is on one page, and nobody is on two. Raises
        InvalidCursor for a text that is no cursor.
        """
        place, found = Cursor.parse(cursor), list[bytes]()
        least = _least(cut)
        while place.shard < SHARDS and len(found) < 2 * n:
            wanted = n - len(found) // 2
            more, last = await self._above(model, least, place, wanted)
            found += more
            place = Cursor(place.shard, last) if last else Cursor(place.shard + 1)
        return Page(_scored(found), str(place) if place.shard < SHARDS else None)

    async def _above(self, model: str, least: int, place: Cursor, n: int) -> tuple[list[bytes], str]:
        """Tags and scores of one shard after a tag, and the tag to go on from, empty at the shard's end."""
        ranks, ids, _ = self._keys(model, place.shard)
        (count,) = await self._cache.run(("ZCOUNT", ranks, least, "+inf"))
        if not count:
            return [], ""
        if count <= _FEW:
            (flat,) = await self._cache.run(("ZRANGEBYSCORE", ranks, least, "+inf", "WITHSCORES"))
            after = place.tag.encode()
            pairs = sorted((flat[at], flat[at + 1]) for at in range(0, len(flat), 2) if flat[at] > after)
            return [part for pair in pairs[:n] for part in pair], pairs[n - 1][0].decode() if len(pairs) > n else ""
        found: list[bytes] = []
        last = place.tag
        while len(found) < 2 * n:
            # As many as are likely to hold what is missing, so that few are looked at twice.
            (reply,) = await self._cache.run(("EVAL", _ABOVE, 2, ranks, ids, f"({last}" if last else "-", _WALK, least))
            found += reply[1:]
            last = reply[0].decode()
            if not last:
                break
        return (found[: 2 * n], found[2 * n - 2].decode()) if len(found) > 2 * n else (found, last)

    async def count(self, model: str, low: float = 0.0, high: float = math.inf) -> int:
        """How many visitors have a score s with low <= s < high."""
        least, beyond = _least(low), _least(high)
        return await total(self._cache, self._ranks(model), "ZCOUNT", least, f"({beyond}")

    async def percentile(self, model: str, p: float) -> float | None:
        """The lowest kept score that at least p percent of the visitors do not exceed; None without any.

        The nearest-rank percentile (Hyndman and Fan 1996, definition 1), p in [0, 100]; 0 gives the lowest score.
        Exact: the float32 is found bit by bit, with thirty counts.
        """
        size = await self.count(model)
        if not size:
            return None
        rank = min(max(1, math.ceil(p / 100 * size)), size)
        low, high = 0, 0x3F800000
        while low < high:
            middle = (low + high) // 2
            beyond = f"({(middle + 1) * MOMENTS}"
            if await total(self._cache, self._ranks(model), "ZCOUNT", "-inf", beyond) >= rank:
                high = middle
            else:
                low = middle + 1
        return unpack([b"%d" % (low * MOMENTS)])[0]

    async def of(self, model: str, ids: Sequence[str]) -> list[float | None]:
        """The latest score of each visitor, None where there is none."""
        found: list[float | None] = [None] * len(ids)
        parts = [(shard, piece) for shard, all_ in by_shard(ids).items() for piece in slices(all_, MOST_OF_SCRIPT)]
        words: list[Command] = [
            ("ZMSCORE", self._keys(model, shard)[0], *(tag for _, tag in piece)) for shard, piece in parts
        ]
        for (_, piece), scores in zip(parts, await self._cache.run(*words) if words else (), strict=True):
            for (place, _), score in zip(piece, scores, strict=True):
                found[place] = None if score is None else unpack([score])[0]
        return found

    async def versions(self, model: str) -> dict[str, int]:
        """The versions of a model that scored, and when each did so last, in milliseconds since 1970."""
        (flat,) = await self._cache.run(("HGETALL", f"{self._cache.namespace}:p:v:{{{model}}}"))
        pairs = flat.items() if isinstance(flat, dict) else zip(flat[::2], flat[1::2], strict=True)
        return {version.decode(): int(at_ms) for version, at_ms in pairs}

    # --- segments ---

    async def segments(self, model: str, ids: Sequence[str]) -> list[tuple[str, int] | None]:
        """The segment of each visitor and the moment it was entered, None where there is none yet."""
        found: list[tuple[str, int] | None] = [None] * len(ids)
        parts = [(shard, piece) for shard, all_ in by_shard(ids).items() for piece in slices(all_, MOST_OF_SCRIPT)]
        words: list[Command] = [
            ("HMGET", self._keys(model, shard)[2], *(tag for _, tag in piece)) for shard, piece in parts
        ]
        for (_, piece), values in zip(parts, await self._cache.run(*words) if words else (), strict=True):
            for (place, _), value in zip(piece, values, strict=True):
                if value is not None:
                    since_ms, _, segment = value.decode("ascii").partition(" ")
                    found[place] = text_of(segment), int(since_ms)
        return found

    async def move(self, model: str, moves: Mapping[str, str], at_ms: int) -> None:
        """Put visitors into segments, by id; who is in it already, or came into one after `at_ms`, stays.

        Each change is one step together with its line in the journal, so a call that was cut off is ended by another.
        Who was erased and has not come back is left out.
        """
        models, life_ms = self._models_key, self._cache.retention_ms
        await self._cache.run(("SADD", models, model), ("PEXPIRE", models, life_ms))
        for names in slices(list(moves), _SEND):
            async with self._erasures.writing(names, self.forget) as erased:
                staying = [name for name in names if name not in erased] if erased else names
                await self._move(model, staying, moves, at_ms)

    async def _move(self, model: str, names: Sequence[str], moves: Mapping[str, str], at_ms: int) -> None:
        journal, scripts, shards = self.journal(model), list[Command](), set[int]()
        for shard, visitors in by_shard(names).items():
            keys = *self._segment_keys(model, shard), *journal.outbox(shard)
            shards.add(shard)
            for piece in slices(visitors, MOST_OF_SCRIPT):
                blob = msgspec.msgpack.encode([part for at, tag in piece for part in (tag, tag_of(moves[names[at]]))])
                scripts.append(("EVAL", _MOVE, 4, *keys, at_ms, self._cache.retention_ms, blob))
        await self._cache.run(*scripts)
        await journal.drain(shards)

    async def moves(self, model: str, since: str, n: int) -> Page[Move]:
        """Up to n moves after the cursor `since`, from the first that is kept if it is empty; see `Journal.read`."""
        entries, cursor = await self.journal(model).read(since, n)
        moves = []
        for number, line in entries:
            at_ms, left, entered, tag = line.split(" ")
            moves.append(Move(str(number), int(at_ms), text_of(tag), model, text_of(left) or None, text_of(entered)))
        return Page(moves, cursor)

    def journal(self, model: str) -> Journal:
        """The journal of the moves of a model."""
        return Journal(self._cache, "s", model, self._kept_moves)

    # --- the end of a visitor ---

    async def models(self) -> list[str]:
        """The models that any score or segment is kept of."""
        (names,) = await self._cache.run(("SMEMBERS", self._models_key))
        return sorted(name.decode() for name in names)

    async def forget(self, ids: Sequence[str]) -> int:
        """Drop the scores, segments and moves of visitors. Returns how many there were."""
        dropped = await self.drop(ids)
        for model in await self.models():
            journal = self.journal(model)
            for shard, members in by_shard(ids).items():
                await journal.drain([shard])
                for _, tag in members:
                    dropped += await journal.scrub(tag)
        return dropped

    async def drop(self, ids: Sequence[str]) -> int:
        """Drop the scores and segments of visitors, not what is told of their moves. Returns how many there were."""
        dropped = 0
        for model in await self.models():
            for shard, members in by_shard(ids).items():
                for piece in slices([tag for _, tag in members], MOST_OF_SCRIPT):
                    words: Command = ("EVAL", _PRUNE, 3, *self._keys(model, shard), "-", 0, MOMENTS, *piece)
                    dropped += (await self._cache.run(words))[0][1]
        return dropped

    async def prune(self, model: str, before_ms: int) -> AsyncIterator[int]:
        """Drop page after page who was not scored since `before_ms`; gives how many of each page that were."""
        moment = max(0, before_ms // MOMENT_MS)
        for shard in range(SHARDS):
            last = ""
            while True:
                start = f"({last}" if last else "-"
                words = ("EVAL", _PRUNE, 3, *self._keys(model, shard), start, MOST_OF_SCRIPT, moment)
                (reply,) = await self._cache.run(words)
                yield reply[1]
                last = reply[0].decode()
                if not last:
                    break

    @property
    def _models_key(self) -> str:
        return f"{self._cache.namespace}:p:models"

    def _ranks(self, model: str) -> list[str]:
        return [self._keys(model, shard)[0] for shard in range(SHARDS)]

    def _segment_keys(self, model: str, shard: int) -> tuple[str, str]:
        _, ids, segments = self._keys(model, shard)
        return segments, ids

    def _keys(self, model: str, shard: int) -> tuple[str, str, str]:
        """The keys of ranks, ids and segments."""
        prefix, tag = f"{self._cache.namespace}:p", f"{{{model}.{shard}}}"
        return f"{prefix}:r:{tag}", f"{prefix}:i:{tag}", f"{prefix}:s:{tag}"


def _least(propensity: float) -> int:
    """The lowest packed score of a propensity that is at least this one, both as float32."""
    if propensity > 1:
        return _BEYOND
    return int(np.float32(max(propensity, 0.0)).view(np.int32)) * MOMENTS


def _packed(held: Mapping[str, tuple[float, int]]) -> dict[str, int]:
    """Packed scores by tag."""
    scores, moments = zip(*held.values(), strict=True)
    return dict(zip(held, pack(scores, moments).tolist(), strict=True))


def _scored(flat: Sequence[bytes]) -> list[Scored]:
    return list(map(Scored, map(text_of, flat[::2]), unpack(flat[1::2])))
