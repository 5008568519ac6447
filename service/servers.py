"""Which server a command goes to: the only one, the master that Sentinels name, or the owner of the key's slot.

Knows nothing of connections: a `Node` is one server with its own, and `find` asks who owns what. Nothing is tried again
but where a server itself says that another one has the key. After a failure who owns what is asked anew, beside the
commands; a server of several that does not answer is left alone until it does, so that the others are not held up.
"""

from __future__ import annotations

import asyncio
import binascii
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NamedTuple, Protocol

from service.errors import StoreError
from service.location import Address

SLOTS: Final = 16384
Word = str | bytes | int
Command = tuple[Word, ...]

# Place of the key in a command, where it is not the second word.
_KEY_AT: Final = {"EVAL": 3, "MEMORY": 2}
# A slot can move on while a command follows it; more than that is a cluster that does not know itself.
_MOST_REDIRECTS: Final = 4
# Between two questions whether a server answers again, and the least between two who owns what.
_PAUSE_S: Final = 0.5
_REFRESH_S: Final = 0.1


class Redirect(NamedTuple):
    """A server's answer that another one has the slot, for good or (`asking`) for this command."""

    slot: int
    address: Address
    asking: bool


class Refusal(NamedTuple):
    """An error that a server answered, as `WRONGTYPE Operation against ...`."""

    text: str

    @property
    def is_wrong_type(self) -> bool:
        """Whether something else lies under the key."""
        return self.text.startswith("WRONGTYPE")

    @property
    def is_of_the_topology(self) -> bool:
        """Whether somebody else should have been asked, or will have to be."""
        return self.text.startswith(("READONLY", "CLUSTERDOWN", "MASTERDOWN", "LOADING"))


def granted(reply: Any) -> Any:
    """A reply that is no refusal. Raises StoreError for one."""
    if isinstance(reply, Refusal):
        raise StoreError(f"the feature cache refuses ({reply.text}); try again later")
    return reply


def without_arguments(text: str) -> str:
    """A server's error without what it was asked, which `unknown command` repeats: keys of visitors, passwords."""
    return text.partition(", with args beginning")[0]


class Node(Protocol):
    """One server and the connections to it."""

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """The reply to each command; errors are Redirect and Refusal. Raises StoreError if the server is lost."""

    async def close(self) -> None:
        """Close its connections."""


class _Part(NamedTuple):
    """Commands of one server, which it answers for the time being if `asking`."""

    address: Address | None
    asking: bool = False


Owners = Sequence[Address | None]  # of each slot, or one for all
Find = Callable[[Sequence[Address]], Awaitable[Owners]]  # given the servers that were known last


class _Unread:
    """In place of a reply that did not come; false like the absence of a value."""

    def __bool__(self) -> bool:
        return False


UNREAD: Final = _Unread()


def slot_of(key: str | bytes) -> int:
    """The slot of a key: CRC-16 of what stands between its first braces, if that is anything, else of all of it."""
    name = key.encode("utf-8", "surrogatepass") if isinstance(key, str) else key
    start = name.find(b"{")
    end = name.find(b"}", start + 1) if start >= 0 else -1
    return binascii.crc_hqx(name[start + 1 : end] if end > start + 1 else name, 0) % SLOTS


def owners_from(reply: Sequence[Any], asked: Address) -> list[Address | None]:
    """Owner of each slot from the reply to CLUSTER SLOTS of the server at `asked`."""
    owners: list[Address | None] = [None] * SLOTS
    for first, last, (host, port, *_), *_ in reply:
        address = (host.decode() if host else asked[0], int(port))
        owners[first : last + 1] = [address] * (last + 1 - first)
    return owners


def alone(address: Address = ("localhost", 0)) -> Find:
    """One server has all keys."""

    async def find(_: Sequence[Address]) -> Owners:
        return (address,)

    return find


def by_sentinels(sentinels: Sequence[Address], service: str, openers: Sequence[Callable[[Address], Node]]) -> Find:
    """The master of `service` has all keys. Each Sentinel is tried with each opener; who answered is asked first."""
    order = list(sentinels)

    async def find(_: Sequence[Address]) -> Owners:
        error = StoreError("no Sentinel of the feature cache answers; try again later")
        for sentinel in tuple(order):
            for open_node in openers:
                try:
                    (master,) = await _ask(open_node(sentinel), ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", service))
                except StoreError as failure:
                    error = failure
                    continue
                if isinstance(master, list):
                    order.remove(sentinel)
                    order.insert(0, sentinel)
                    host, port = master
                    return ((host.decode(), int(port)),)
                error = StoreError(
                    f"a Sentinel knows no master named {service!r}; correct the URL of the feature cache"
                )
        raise error

    return find


def in_cluster(seeds: Sequence[Address], open_node: Callable[[Address], Node]) -> Find:
    """The servers of a cluster have some slots each; the known ones are asked before the seeds."""

    async def find(known: Sequence[Address]) -> Owners:
        error = StoreError("no server of the feature cache answers; try again later")
        for address in dict.fromkeys([*known, *seeds]):
            try:
                (reply,) = await _ask(open_node(address), ("CLUSTER", "SLOTS"))
            except StoreError as failure:
                error = failure
                continue
            if isinstance(reply, list):
                return owners_from(reply, address)
            error = StoreError(f"a server is of no cluster ({reply.text}); correct the URL of the feature cache")
        raise error

    return find


async def _ask(node: Node, command: Command) -> list[Any]:
    try:
        return await node.run([command])
    finally:
        await node.close()


class Servers:
    """One server, or several of which each has some slots. Made for one event loop."""

    def __init__(self, find: Find, open_node: Callable[[Address], Node]) -> None:
        self._find, self._open = find, open_node
        self._owners: Owners = ()
        self._addresses: tuple[Address, ...] = ()
        self._nodes: dict[Address, Node] = {}
        self._refreshing: asyncio.Task[None] | None = None
        self._refreshed_at = -_REFRESH_S
        self._away: dict[Address, asyncio.Task[None]] = {}

    async def close(self) -> None:
        """Close every connection."""
        tasks = [*self._away.values(), *([self._refreshing] if self._refreshing else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(node.close() for node in self._nodes.values()))
        self._nodes.clear()

    async def addresses(self, anew: bool = False) -> tuple[Address, ...]:
        """The servers that own any slot, as it was known last or as it is now. Raises StoreError if nobody knows."""
        if anew or not self._owners:
            await asyncio.shield(self._refresh())
        return self._addresses

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        """The reply to each command, a Refusal where it failed. Raises StoreError if any server is lost."""
        replies, lost = await self._run(commands, set())
        if lost is not None:
            raise lost
        return replies

    async def run_partly(self, commands: Sequence[Command]) -> list[Any]:
        """The same with UNREAD for what a lost server was asked. Raises StoreError if all servers are lost.

        Who cancels this says that it took too long: servers that have not answered by then count as lost.
        """
        slow: set[Address] = set()
        try:
            replies, lost = await self._run(commands, slow)
        except asyncio.CancelledError:
            for address in slow:
                self._leave_alone(address)
            raise
        if lost is not None and self._away.keys() >= set(self._addresses):
            raise lost
        return replies

    async def run_on(self, address: Address, commands: Sequence[Command]) -> list[Any]:
        """The reply of one server to each command. Raises StoreError if it is lost."""
        if address in self._away:
            raise StoreError("a server of the feature cache does not answer; try again later")
        try:
            replies = await self._node(address).run(commands)
        except StoreError:
            self._leave_alone(address)
            raise
        if any(isinstance(reply, Refusal) and reply.is_of_the_topology for reply in replies):
            self._refresh_soon()
        return replies

    def _node(self, address: Address) -> Node:
        if address not in self._nodes:
            self._nodes[address] = self._open(address)
        return self._nodes[address]

    async def _run(self, commands: Sequence[Command], slow: set[Address]) -> tuple[list[Any], StoreError | None]:
        """Replies, and an error if any server was lost; where it is cancelled, `slow` gets who owes an answer."""
        if not self._owners:
            await asyncio.shield(self._refresh())
        replies: list[Any] = [UNREAD] * len(commands)
        lost: StoreError | None = None
        parts = self._parts(commands)
        for _ in range(1 + _MOST_REDIRECTS):
            answers = await asyncio.gather(
                *(self._run_part(part, [commands[at] for at in places], slow) for part, places in parts.items())
            )
            redirected: dict[_Part, list[int]] = {}
            for (part, places), answer in zip(parts.items(), answers, strict=True):
                if isinstance(answer, StoreError):
                    lost = answer
                    continue
                for place, reply in zip(places, answer, strict=True):
                    if isinstance(reply, Redirect):
                        redirected.setdefault(self._follow(reply, part), []).append(place)
                    else:
                        replies[place] = reply
            if not redirected:
                return replies, lost
            parts = redirected
        return replies, StoreError("the servers of the feature cache send to and fro; try again later")

    def _parts(self, commands: Sequence[Command]) -> dict[_Part, list[int]]:
        """The places of the commands that each server gets."""
        if len(self._owners) == 1:
            return {_Part(self._owners[0]): list(range(len(commands)))}
        parts: dict[_Part, list[int]] = {}
        for place, command in enumerate(commands):
            slot = slot_of(str(command[_KEY_AT.get(str(command[0]), 1)]))
            parts.setdefault(_Part(self._owners[slot]), []).append(place)
        return parts

    async def _run_part(self, part: _Part, commands: list[Command], slow: set[Address]) -> list[Any] | StoreError:
        if part.address is None:
            self._refresh_soon()
            return StoreError("no server of the feature cache has the slot of a visitor; try again later")
        try:
            if not part.asking:
                return await self.run_on(part.address, commands)
            permitted = [word for command in commands for word in (("ASKING",), command)]
            return (await self.run_on(part.address, permitted))[1::2]
        except StoreError as error:
            return error
        except asyncio.CancelledError:
            slow.add(part.address)
            raise

    def _follow(self, moved: Redirect, part: _Part) -> _Part:
        """Who has the key; a slot's new owner is noted, and those of others will have changed too."""
        host, port = moved.address
        address = (host or (part.address or moved.address)[0], port)
        if not moved.asking and len(self._owners) == SLOTS:
            self._owners = [*self._owners[: moved.slot], address, *self._owners[moved.slot + 1 :]]
            self._refresh_soon()
        return _Part(address, moved.asking)

    def _leave_alone(self, address: Address) -> None:
        """Ask who owns what; where there are several servers, ask this one nothing until it answers again."""
        self._refresh_soon()
        if len(self._addresses) > 1 and address not in self._away:
            self._away[address] = asyncio.create_task(self._wait_for(address))

    async def _wait_for(self, address: Address) -> None:
        """Return once a server answers or owns nothing any more."""
        try:
            while address in self._addresses:
                try:
                    await self._node(address).run([("PING",)])
                    return
                except StoreError:
                    await asyncio.sleep(_PAUSE_S)
                    self._refresh_soon()
        finally:
            del self._away[address]

    def _refresh_soon(self) -> None:
        if asyncio.get_running_loop().time() - self._refreshed_at > _REFRESH_S:
            self._refresh().add_done_callback(lambda task: task.cancelled() or task.exception())

    def _refresh(self) -> asyncio.Task[None]:
        """The one task that asks who owns what."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.create_task(self._ask_owners())
        return self._refreshing

    async def _ask_owners(self) -> None:
        try:
            self._owners = await self._find(sorted(self._addresses, key=lambda address: address in self._away))
        finally:
            self._refreshed_at = asyncio.get_running_loop().time()
        before, self._addresses = self._addresses, tuple(dict.fromkeys(filter(None, self._owners)))
        gone = self._nodes.keys() & (set(before) - set(self._addresses))
        await asyncio.gather(*(self._nodes.pop(address).close() for address in gone))
