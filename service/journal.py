"""Journals: what changed, in one order for all, numbered without gaps, for readers that go on where they stopped.

A script that changes a set of one shard puts a line for each change into the shard's outbox, in the same step. `drain`
then takes the lines of all outboxes into the journal, where they get their numbers. Lines of an outbox are numbered
too, and the journal knows the last one that it took of each, so a line is in the journal once, whoever is killed when.

Keys: `NS:KIND:o:{NAME.SHARD}` the outbox, a list of `NUMBER LINE`; `NS:KIND:n:{NAME.SHARD}` its last number;
`NS:KIND:l:{NAME}` the journal, a hash of chunks of CHUNK lines by number // CHUNK; `NS:KIND:m:{NAME}` what is known of
it: `next` and `first` are numbers, `moved:SHARD` the last that was taken of an outbox. Numbers begin at the microsecond
of the first line, so that a journal that was lost and began anew gives no number twice. A line is text in ASCII that
ends with the tag of its visitor; that of one who was erased is empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from service.errors import CursorGone, InvalidCursor
from service.servers import Command
from service.shards import SHARDS, Cache, Page

CHUNK: Final = 128
_PAGE: Final = 500
# Chunks that are looked through at once for a visitor who is erased.
_SCRUB: Final = 32

# In a script that changes a shard: emit(outbox, counter, lines, how long they live).
EMIT: Final = """
local function emit(outbox, counter, lines, life_ms)
  if #lines == 0 then return end
  local last = tonumber(redis.call('GET', counter) or false)
  if not last then
    local time = redis.call('TIME')
    last = time[1] * 1000000 + time[2]
  end
  for place, line in ipairs(lines) do
    redis.call('RPUSH', outbox, string.format('%.0f ', last + place) .. line)
  end
  redis.call('SET', counter, string.format('%.0f', last + #lines), 'PX', life_ms)
  redis.call('PEXPIRE', outbox, life_ms)
end
"""

# Takes lines of an outbox that have not been taken yet, and drops the oldest chunks beyond so many lines.
_TAKE: Final = """
local journal, known, shard, keep, chunk_lines = KEYS[1], KEYS[2], ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local life_ms = ARGV[4]
local taken = tonumber(redis.call('HGET', known, 'moved:' .. shard) or 0)
local following = tonumber(redis.call('HGET', known, 'next') or false)
if not following then
  local time = redis.call('TIME')
  following = time[1] * 1000000 + time[2]
  redis.call('HSET', known, 'first', string.format('%.0f', following))
end
local lines, chunk = {}, math.floor(following / chunk_lines)
local function store()
  local field = string.format('%.0f', chunk)
  if #lines > 0 then
    local before = redis.call('HGET', journal, field) or string.rep('\\n', (following - #lines) % chunk_lines)
    redis.call('HSET', journal, field, before .. table.concat(lines))
  end
  lines = {}
end
for place = 5, #ARGV do
  local number, line = string.match(ARGV[place], '^(%d+) (.*)$')
  if tonumber(number) > taken then
    taken = tonumber(number)
    lines[#lines + 1] = line .. '\\n'
    following = following + 1
    if following % chunk_lines == 0 then
      store()
      chunk = chunk + 1
    end
  end
end
store()
local first = tonumber(redis.call('HGET', known, 'first'))
local wanted = math.floor((following - keep) / chunk_lines) * chunk_lines
if wanted > first then
  for old = math.floor(first / chunk_lines), wanted / chunk_lines - 1 do
    redis.call('HDEL', journal, string.format('%.0f', old))
  end
  first = wanted
end
redis.call('HSET', known, 'moved:' .. shard, string.format('%.0f', taken), 'next', string.format('%.0f', following),
  'first', string.format('%.0f', first))
redis.call('PEXPIRE', journal, life_ms)
redis.call('PEXPIRE', known, life_ms)
return string.format('%.0f', taken)
"""

# Drops from an outbox what has been taken: lines up to a number, if they are still there.
_DROP: Final = """
local head = redis.call('LINDEX', KEYS[1], 0)
if not head then return 0 end
local count = tonumber(ARGV[1]) - tonumber(string.match(head, '^%d+')) + 1
if count > 0 then redis.call('LPOP', KEYS[1], count) end
return redis.call('LLEN', KEYS[1])
"""

# The numbers of the first line and of the next one, and the chunks of up to so many lines from a number on.
_READ: Final = """
local known = redis.call('HMGET', KEYS[2], 'first', 'next')
if not known[1] then return {} end
local start = math.max(tonumber(ARGV[1]), tonumber(known[1]))
local reply, size = {known[1], known[2]}, tonumber(ARGV[3])
for chunk = math.floor(start / size), math.floor((start + tonumber(ARGV[2]) - 1) / size) do
  local found = redis.call('HGET', KEYS[1], string.format('%.0f', chunk))
  if not found then break end
  reply[#reply + 1] = found
end
return reply
"""

# Empties the lines of a chunk that end with a text.
_SCRUB_CHUNK: Final = """
local chunk = redis.call('HGET', KEYS[1], ARGV[1])
if not chunk then return 0 end
local kept, count = {}, 0
for line in string.gmatch(chunk, '([^\\n]*)\\n') do
  if string.sub(line, -#ARGV[2]) == ARGV[2] then line, count = '', count + 1 end
  kept[#kept + 1] = line .. '\\n'
end
if count > 0 then redis.call('HSET', KEYS[1], ARGV[1], table.concat(kept)) end
return count
"""


class Entry(NamedTuple):
    """A line of the journal and its number, which is the cursor of a reader that has read up to it."""

    number: int
    line: str


class Journal:
    """The changes of one name, about the latest `keep` of them."""

    def __init__(self, cache: Cache, kind: str, name: str, keep: int) -> None:
        self._cache, self._keep = cache, keep
        self._prefix, self._name = f"{cache.namespace}:{kind}", name

    @property
    def key(self) -> str:
        """The key of the chunks."""
        return f"{self._prefix}:l:{{{self._name}}}"

    @property
    def known_key(self) -> str:
        """The key of what is known of it; others may keep fields of their own there."""
        return f"{self._prefix}:m:{{{self._name}}}"

    def outbox(self, shard: int) -> tuple[str, str]:
        """The keys of a shard's outbox and of its last number."""
        tag = f"{{{self._name}.{shard}}}"
        return f"{self._prefix}:o:{tag}", f"{self._prefix}:n:{tag}"

    async def drain(self, shards: Iterable[int] = range(SHARDS)) -> None:
        """Take over what is in the outboxes. Everybody may do so at any time."""
        waiting, life_ms = list(shards), self._cache.retention_ms
        while waiting:
            found = await self._cache.run(*(("LRANGE", self.outbox(shard)[0], 0, _PAGE - 1) for shard in waiting))
            full = {shard: lines for shard, lines in zip(waiting, found, strict=True) if lines}
            taken = await self._cache.run(
                *(
                    ("EVAL", _TAKE, 2, self.key, self.known_key, shard, self._keep, CHUNK, life_ms, *lines)
                    for shard, lines in full.items()
                )
            )
            drops: list[Command] = [
                ("EVAL", _DROP, 1, self.outbox(shard)[0], number) for shard, number in zip(full, taken, strict=True)
            ]
            left = await self._cache.run(*drops)
            waiting = [shard for shard, count in zip(full, left, strict=True) if count]

    async def last(self) -> int:
        """The number of the last line; 0 where there was none yet."""
        (following,) = await self._cache.run(("HGET", self.known_key, "next"))
        return int(following) - 1 if following else 0

    async def read(self, since: str, count: int) -> Page[Entry]:
        """Up to `count` lines after the number `since`, or from the first one that is kept if that is empty.

        Those of erased visitors are left out, and the page is shorter by them, but never empty before the end. Its
        cursor is the number of its last line, or None where no line came after that.
        Raises CursorGone if lines after `since` are not kept any more, InvalidCursor if it never was a number here.
        """
        start = _number(since) + 1 if since else 0
        while True:
            reply = await self._cache.run(("EVAL", _READ, 2, self.key, self.known_key, start, count, CHUNK))
            if not reply[0]:
                return Page([], None)
            first, following = int(reply[0][0]), int(reply[0][1])
            if start and start < first:
                raise CursorGone("what changed after `since` is not kept any more; read all members anew, then go on")
            if start > following:
                raise InvalidCursor("`since` is no cursor of these changes; take one that they gave")
            start = max(start, first)
            entries = list(_entries(start, min(count, following - start), reply[0][2:]))
            found = [entry for entry in entries if entry.line]
            if found or not entries:
                return Page(found, str(found[-1].number) if found and entries[-1].number + 1 < following else None)
            start = entries[-1].number + 1

    async def scrub(self, tag: str) -> int:
        """Empty the lines of a visitor, who is not to be told of any more. Returns how many there were."""
        first, following = (await self._cache.run(("HMGET", self.known_key, "first", "next")))[0]
        if first is None:
            return 0
        needle, scrubbed = f" {tag}\n".encode(), 0
        chunks = range(int(first) // CHUNK, (int(following) - 1) // CHUNK + 1)
        for start in range(0, len(chunks), _SCRUB):
            part = [str(chunk) for chunk in chunks[start : start + _SCRUB]]
            (blobs,) = await self._cache.run(("HMGET", self.key, *part))
            held = [name for name, blob in zip(part, blobs, strict=True) if blob and needle in blob]
            scripts: list[Command] = [("EVAL", _SCRUB_CHUNK, 1, self.key, name, f" {tag}") for name in held]
            scrubbed += sum(await self._cache.run(*scripts)) if scripts else 0
        return scrubbed

    def all_keys(self) -> list[str]:
        """Every key of it, outboxes last."""
        return [self.key, self.known_key, *(key for shard in range(SHARDS) for key in self.outbox(shard))]

    async def drop(self) -> None:
        """Forget all of it, outboxes last: a drop that was cut off is ended by another one."""
        for key in self.all_keys()[:2]:
            await self._cache.run(("DEL", key))
        await self._cache.run(*(("DEL", key) for key in self.all_keys()[2:]))


def _number(since: str) -> int:
    if not (since.isascii() and since.isdigit() and len(since) <= 16):
        raise InvalidCursor("`since` is no cursor of changes; take one that they gave, or leave it out")
    return int(since)


def _entries(start: int, count: int, chunks: Sequence[bytes]) -> Iterator[Entry]:
    """The lines from a number on, of chunks of which the first one has it."""
    lines = [line for chunk in chunks for line in chunk.decode("ascii").split("\n")[:-1]]
    at = start % CHUNK
    for place, line in enumerate(lines[at : at + count]):
        yield Entry(start + place, line)
