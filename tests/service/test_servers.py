"""Which server a command goes to, where servers say what real ones say too seldom to wait for."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from service.errors import StoreError
from service.location import Address
from service.servers import SLOTS, UNREAD, Command, Owners, Redirect, Refusal, Servers, slot_of

pytestmark = pytest.mark.anyio

HERE, THERE = ("here", 1), ("there", 2)


class FakeNode:
    """A server that gives prepared replies: one of them to every command, or an error, or none for ever."""

    def __init__(self, address: Address, reply: object) -> None:
        self.address, self.reply, self.asked = address, reply, 0

    async def run(self, commands: Sequence[Command]) -> list[Any]:
        self.asked += 1
        if isinstance(self.reply, StoreError):
            raise self.reply
        if self.reply is asyncio:
            await asyncio.Event().wait()
        return [self.reply] * len(commands)

    async def close(self) -> None:
        self.asked = -1


def servers(replies: dict[Address, object]) -> tuple[Servers, dict[Address, FakeNode]]:
    """Servers of which the first has the lower half of the slots and the second the rest."""
    nodes = {address: FakeNode(address, reply) for address, reply in replies.items()}

    async def find(_: Sequence[Address]) -> Owners:
        return [HERE] * (SLOTS // 2) + [THERE] * (SLOTS // 2)

    return Servers(find, nodes.__getitem__), nodes


def key_in(half: int) -> str:
    """A key of the lower or the upper half of the slots."""
    return next(key for key in map(str, range(100)) if slot_of(key) * 2 // SLOTS == half)


BOTH: list[Command] = [("GET", key_in(0)), ("GET", key_in(1))]


async def test_servers_that_send_to_each_other_are_given_up() -> None:
    asked, nodes = servers({HERE: Redirect(1, THERE, False), THERE: Redirect(1, HERE, False)})
    with pytest.raises(StoreError, match="to and fro"):
        await asked.run(BOTH[:1])
    assert nodes[HERE].asked + nodes[THERE].asked == 5
    await asked.close()


async def test_a_server_without_a_name_means_the_one_that_was_asked() -> None:
    asked, _ = servers({HERE: Redirect(1, ("", 2), False), THERE: b"", ("here", 2): b"moved"})
    assert await asked.run(BOTH[:1]) == [b"moved"]
    await asked.close()


async def test_of_several_servers_one_that_fails_is_an_error_or_a_gap() -> None:
    asked, nodes = servers({HERE: b"value", THERE: StoreError("gone")})
    with pytest.raises(StoreError, match="gone"):
        await asked.run(BOTH)
    assert await asked.run_partly(BOTH) == [b"value", UNREAD]
    assert await asked.run_partly(BOTH[1:]) == [UNREAD]
    assert nodes[THERE].asked <= 2  # once by us, and once whether it is back
    await asked.close()


async def test_where_all_servers_fail_there_is_no_gap_but_an_error() -> None:
    asked, _ = servers({HERE: StoreError("gone"), THERE: StoreError("gone")})
    with pytest.raises(StoreError):
        await asked.run_partly(BOTH)
    await asked.close()


async def test_who_did_not_answer_in_time_is_not_asked_again_and_who_did_is() -> None:
    asked, nodes = servers({HERE: b"value", THERE: asyncio})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await asked.run_partly(BOTH)
    for _ in range(3):
        assert await asked.run_partly(BOTH) == [b"value", UNREAD]
    assert (nodes[HERE].asked, nodes[THERE].asked) == (4, 2)
    nodes[THERE].reply = b"back"
    await asked.close()


async def test_a_write_that_is_given_up_says_nothing_about_the_server() -> None:
    asked, nodes = servers({HERE: asyncio, THERE: b"value"})
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.02):
            await asked.run(BOTH)
    nodes[HERE].reply = b"value"
    assert await asked.run(BOTH) == [b"value", b"value"]
    await asked.close()


async def test_a_refusal_is_a_reply() -> None:
    asked, _ = servers({HERE: Refusal("WRONGTYPE no"), THERE: b"value"})
    assert await asked.run(BOTH) == [Refusal("WRONGTYPE no"), b"value"]
    await asked.close()
