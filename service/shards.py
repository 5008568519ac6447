"""Shards: how what is kept of many visitors together is spread over keys, and what those keys ask of a server.

A visitor belongs to one of SHARDS shards by its id. The keys of one shard of one model or audience share a hash tag,
so that one script changes them in one step, in a cluster too. Within a shard visitors are in the order of their tags,
which are their ids percent-encoded: plain ASCII above the space, so that a space ends an id wherever it stands.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeVar
from urllib.parse import quote, unquote

from service.errors import InvalidCursor
from service.servers import Command

SHARDS: Final = 64
# Visitors that one script handles: it takes half a millisecond, in which nothing else is asked of the server.
MOST_OF_SCRIPT: Final = 200

# The sum of what a command answers for each key.
_TOTAL: Final = """
local total = 0
for _, key in ipairs(KEYS) do total = total + redis.call(ARGV[1], key, unpack(ARGV, 2)) end
return total
"""

T = TypeVar("T")
CURSOR: Final = r"^([0-9]|[1-5][0-9]|6[0-3])\.[A-Za-z0-9_.~%-]*$"

_is_cursor: Final = re.compile(CURSOR.removeprefix("^").removesuffix("$")).fullmatch
_plain: Final = re.compile(r"[A-Za-z0-9_.~-]+").fullmatch


class Page(NamedTuple, Generic[T]):
    """Some items, and the cursor of the next ones: None at the end."""

    items: list[T]
    cursor: str | None


class Cache(Protocol):
    """What the sets ask of the feature cache, which `service.store.Store` is."""

    @property
    def namespace(self) -> str:
        """What all keys begin with."""

    @property
    def retention_ms(self) -> int:
        """How long what is known of a silent visitor is kept."""

    @property
    def is_cluster(self) -> bool:
        """Whether one command may only name keys of one slot."""

    def keys(self, visitor_id: str) -> tuple[str, ...]:
        """The keys of what is known of one visitor alone."""

    async def run(self, *commands: Command) -> list[Any]:
        """The reply to each command. Raises StoreError where a server is lost or refuses one."""

    async def attempt(self, *commands: Command) -> list[Any]:
        """The same with a Refusal for what a server refuses."""


def tag_of(text: str) -> str:
    """A text as it stands in keys and in sets: percent-encoded UTF-8, all but ASCII letters, digits and `_.-~`."""
    return text if _plain(text) else quote(text, safe="", errors="surrogatepass")


def text_of(tag: str | bytes) -> str:
    """The text that a tag stands for."""
    text = tag if isinstance(tag, str) else tag.decode("ascii")
    return unquote(text, errors="surrogatepass") if "%" in text else text


def shard_of(tag: str) -> int:
    """The shard of the visitor with this tag, in 0 ... SHARDS - 1."""
    return zlib.crc32(tag.encode("ascii")) % SHARDS


def by_shard(visitor_ids: Iterable[str]) -> dict[int, list[tuple[int, str]]]:
    """Place and tag of each visitor, by shard."""
    parts: dict[int, list[tuple[int, str]]] = {}
    for place, visitor_id in enumerate(visitor_ids):
        tag = tag_of(visitor_id)
        parts.setdefault(shard_of(tag), []).append((place, tag))
    return parts


def slices(items: Sequence[T], most: int) -> Iterator[Sequence[T]]:
    """The items, up to `most` at a time."""
    return (items[first : first + most] for first in range(0, len(items), most))


async def total(cache: Cache, keys: Sequence[str], command: str, *words: str | int) -> int:
    """The sum over all keys of what `command KEY WORDS` answers; on one server by one script."""
    parts = [[key] for key in keys] if cache.is_cluster else [keys]
    return sum(await cache.run(*(("EVAL", _TOTAL, len(part), *part, command, *words) for part in parts)))


class Cursor:
    """Where a walk over all shards goes on: after a tag of a shard. Written as `SHARD.TAG`, empty at the start."""

    __slots__ = ("shard", "tag")

    def __init__(self, shard: int = 0, tag: str = "") -> None:
        self.shard, self.tag = shard, tag

    @classmethod
    def parse(cls, text: str | None) -> Cursor:
        """The cursor that `str` wrote. Raises InvalidCursor for any other text."""
        if not text:
            return cls()
        if not _is_cursor(text):
            raise InvalidCursor("`cursor` is not that of a page; take the last page's, or leave it out to begin anew")
        shard, _, tag = text.partition(".")
        return cls(int(shard), tag)

    def __str__(self) -> str:
        return f"{self.shard}.{self.tag}"
