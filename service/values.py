"""Values that grow: strings of records that are appended to without a lock, and replaced without losing a record.

Records may come in any order and more than once, whoever reads drops doubles; so appending needs no reading. What is
appended while a value is computed anew stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Final, NamedTuple

from service.servers import Command
from service.shards import MOST_OF_SCRIPT, Cache, slices

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


class Change(NamedTuple):
    """What a key holds, and what it shall hold in place of that."""

    key: str
    known: bytes
    kept: bytes


async def append(cache: Cache, keys: Sequence[str], blobs: Sequence[bytes]) -> list[int]:
    """Add a blob to each key; the length of each value, 0 where nothing was added and -1 where nothing can be.

    All keys live for the retention from now on, in one round trip. Raises StoreError.
    """
    # One key a script in a cluster: they are on several servers, and a visitor's two while its slot moves.
    most = 1 if cache.is_cluster else MOST_OF_SCRIPT
    commands: list[Command] = [
        ("EVAL", _APPEND, len(part), *part, cache.retention_ms, *added)
        for part, added in zip(slices(keys, most), slices(blobs, most), strict=True)
    ]
    return [length for lengths in await cache.run(*commands) for length in lengths]


def replacement(changes: Sequence[Change]) -> Command:
    """The command that makes all changes of keys of one slot, or none if one of them does not begin as it was known.

    Its reply is empty then, else the memory that the first key takes, and the length of its value.
    """
    told = [(len(one.known), hashlib.sha1(one.known, usedforsecurity=False).hexdigest(), one.kept) for one in changes]
    return (
        "EVAL",
        _REPLACE_HEADS,
        len(changes),
        *(one.key for one in changes),
        *(word for one in told for word in one),
    )
