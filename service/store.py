"""The feature cache, in Redis or Valkey: how its servers are reached, and how visitors are read for a score.

All keys begin with the namespace NS: `service.keys` has those of one visitor, `service.propensities` (`NS:p:*`,
`NS:s:*`) and `service.members` (`NS:a:*`) the sets of many, `service.streams` scores and refused events,
`service.erasures` who was erased. They ask by commands, as the protocol `service.shards.Cache` has it.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AskError, MovedError, RedisError, ResponseError

from service import history, joining, location, servers
from service.errors import StoreError
from service.history import History
from service.location import Address, Kind, Location
from service.reader import Endpoint, Reader, Values
from service.servers import UNREAD, Command, Redirect, Refusal, Servers, granted
from service.shards import tag_of


class Store:
    """What is kept of visitors, on one server or many. Every failure is a StoreError; nothing is retried."""

    def __init__(self, network: _Network, *, namespace: str, retention_ms: int) -> None:
        self._network = network
        self._servers = network.servers()
        self._namespace = namespace
        self._retention_ms = retention_ms
        self._reader = Reader(self.endpoint, network.connect_timeout_s)

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
        return [granted(reply) for reply in await self._servers.run(commands)]

    async def attempt(self, *commands: Command) -> list[Any]:
        """The reply to each command, in one round trip; a Refusal where a server refuses one."""
        return await self._servers.run(commands)

    async def run_on(self, address: Address, *commands: Command) -> list[Any]:
        """The reply of one server to each command, a Refusal where it refuses one."""
        return await self._servers.run_on(address, commands)

    async def close(self) -> None:
        """Close every connection."""
        self._reader.close()
        await self._servers.close()

    async def ping(self) -> None:
        """Raise StoreError unless every server answers."""
        for address in await self.addresses():
            await self.run_on(address, ("PING",))

    async def addresses(self) -> tuple[Address, ...]:
        """The servers that have visitors."""
        return await self._servers.addresses()

    async def count_keys(self) -> int:
        """How many keys there are on all servers, those of other namespaces too."""
        return sum([granted(count) async for (count,) in self._of_each(("DBSIZE",))])

    async def used_bytes(self) -> int:
        """Memory that all servers use, for others too."""
        return sum([int(granted(told)["used_memory"]) async for (told,) in self._of_each(("INFO", "memory"))])

    async def _of_each(self, command: Command) -> AsyncIterator[list[Any]]:
        for address in await self.addresses():
            yield await self.run_on(address, command)

    async def endpoint(self) -> Endpoint:
        """Where the server is that has all visitors: of Sentinels the master of now. A cluster has none."""
        (address,) = await self._servers.addresses(anew=True)
        return self._network.endpoint(address)

    def keys(self, visitor_id: str) -> tuple[str, str]:
        """The keys of a visitor's events and traits."""
        # Those of `service.keys`; all four take twice as long, and every score needs these.
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
            return list(granted(values))
        replies = await run([("MGET", *pair) for pair in pairs])
        values = [value for reply in replies for value in (reply if isinstance(reply, list) else (UNREAD, UNREAD))]
        # While a slot moves, a pair of which one key has gone, or never was, is refused; each key has its own answer.
        split = [place for place, reply in enumerate(replies) if isinstance(reply, Refusal)]
        if split:
            alone = await run([("GET", key) for place in split for key in pairs[place]])
            for place, value in zip((2 * place + side for place in split for side in (0, 1)), alone, strict=True):
                values[place] = (None if value.is_wrong_type else UNREAD) if isinstance(value, Refusal) else value
        return values


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
