"""The pipelined reader against real servers, and against servers that misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

import pytest

from service.errors import StoreError
from service.reader import Endpoint, Reader
from tests.conftest import RedisServer, free_port

pytestmark = pytest.mark.anyio

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def reader_of(endpoint: Endpoint, connect_timeout_s: float = 0.5) -> Reader:
    async def where() -> Endpoint:
        return endpoint

    return Reader(where, connect_timeout_s)


@pytest.fixture
async def server(own_redis_server: RedisServer) -> AsyncIterator[RedisServer]:
    await command(own_redis_server, "MSET", "a", "1", "b", "2")
    yield own_redis_server


async def command(server: RedisServer, *words: str) -> bytes:
    stream, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word.encode()) for word in words))
    answer = await stream.readline()
    writer.close()
    return answer


@asynccontextmanager
async def listening(handle: Handler) -> AsyncIterator[Endpoint]:
    """A server on the loopback that does what `handle` does, until its clients have gone."""
    served: set[asyncio.Task[None] | None] = set()

    async def serve(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.add(asyncio.current_task())
        with suppress(ConnectionError):
            await handle(stream, writer)
            await stream.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Endpoint("127.0.0.1", server.sockets[0].getsockname()[1])
    finally:
        server.close()
        await asyncio.wait_for(asyncio.gather(*filter(None, served)), 5)


async def test_answers_come_in_the_order_of_questions_that_were_all_sent_at_once(server: RedisServer) -> None:
    reader = reader_of(Endpoint("127.0.0.1", server.port))
    answers = await asyncio.gather(*(reader.mget(["a", "nothing", "b"][: 1 + place % 3]) for place in range(300)))
    for place, answer in enumerate(answers):
        assert answer == [b"1", None, b"2"][: 1 + place % 3]
    reader.close()


async def test_a_password_and_a_database_are_given_before_anything_is_asked(server: RedisServer) -> None:
    await command(server, "COPY", "a", "a", "DB", "3")
    assert (await command(server, "CONFIG", "SET", "requirepass", "secret")).startswith(b"+OK")
    reader = reader_of(Endpoint("127.0.0.1", server.port, username="default", password="secret", database=3))
    answers = await asyncio.gather(reader.mget(["a"]), reader.mget(["b"]))
    assert list(answers) == [[b"1"], [None]]
    reader.close()
    for password in (None, "wrong"):
        refused = reader_of(Endpoint("127.0.0.1", server.port, password=password))
        with pytest.raises((StoreError, asyncio.CancelledError)) as caught:
            await refused.mget(["a"])
        assert "secret" not in str(caught.value)
        refused.close()


async def test_nobody_listens_and_the_question_says_so(server: RedisServer) -> None:
    reader = reader_of(Endpoint("127.0.0.1", free_port()))
    with pytest.raises(StoreError, match="cannot be reached"):
        await reader.mget(["a"])


async def test_a_lost_connection_is_told_once_and_opened_again(server: RedisServer) -> None:
    reader = reader_of(Endpoint("127.0.0.1", server.port))
    await reader.mget(["a"])
    server.kill()
    with pytest.raises(StoreError):
        await reader.mget(["a"])
    server.start()
    assert await reader.mget(["a"]) == [None]
    reader.close()


async def test_of_many_who_wait_one_is_told_why_and_the_others_are_cancelled() -> None:
    async def hang_up(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.read(100)
        writer.transport.abort()

    async with listening(hang_up) as endpoint:
        reader = reader_of(endpoint)
        ends = await asyncio.gather(*(reader.mget(["a"]) for _ in range(20)), return_exceptions=True)
    assert [type(end) for end in ends] == [StoreError] + [asyncio.CancelledError] * 19


@pytest.mark.parametrize("rubbish", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"\x00" * 50, b"+OK\r\n" * 3])
async def test_answers_of_something_else_are_not_taken_for_values(rubbish: bytes) -> None:
    async def answer(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.read(100)
        writer.write(rubbish)

    async with listening(answer) as endpoint:
        reader = reader_of(endpoint)
        with pytest.raises(StoreError):
            await reader.mget(["a"])
        reader.close()


@pytest.mark.parametrize("count", [0, 1, 3])
async def test_an_answer_of_another_length_is_not_taken_for_values(count: int) -> None:
    async def answer(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.read(100)
        writer.write(b"*%d\r\n" % count + b"$1\r\nx\r\n" * count)

    async with listening(answer) as endpoint:
        reader = reader_of(endpoint)
        with pytest.raises(StoreError):
            await reader.mget(["a", "b"])
        reader.close()


async def test_values_of_another_type_are_not_taken() -> None:
    async def answer(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.read(100)
        writer.write(b"*2\r\n:1\r\n$1\r\nx\r\n")

    async with listening(answer) as endpoint:
        reader = reader_of(endpoint)
        with pytest.raises(StoreError):
            await reader.mget(["a", "b"])
        reader.close()


async def test_a_server_that_never_answers_is_given_up_with_what_it_owes() -> None:
    async def stay(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.read()

    async with listening(stay) as endpoint:
        reader = reader_of(endpoint)
        first, second = reader.mget(["a"]), reader.mget(["b"])
        await asyncio.sleep(0.05)
        assert not first.done()
        assert reader.give_up(first)
        assert first.cancelled()
        third = reader.mget(["c"])
        await asyncio.sleep(0.05)
        assert not second.done()
        assert not reader.give_up(second)  # that connection is out of use already
        assert not third.done()
        reader.close()
        assert third.cancelled()


async def test_what_a_slow_connection_owes_may_still_come() -> None:
    async def take_time(stream: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await stream.read(100)
        await asyncio.sleep(0.1)
        writer.write(b"*1\r\n$1\r\nx\r\n" * 2)

    async with listening(take_time) as endpoint:
        reader = reader_of(endpoint)
        first, second = reader.mget(["a"]), reader.mget(["b"])
        await asyncio.sleep(0.05)
        assert reader.give_up(first)
        assert await second == [b"x"]
        reader.close()


async def test_opening_a_connection_has_a_time_limit() -> None:
    async def where() -> Endpoint:
        await asyncio.sleep(60)
        return Endpoint()

    with pytest.raises(StoreError, match="cannot be reached"):
        await asyncio.wait_for(Reader(where, 0.1).mget(["a"]), 2)
