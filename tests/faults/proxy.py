"""A TCP proxy on the loopback, before the feature cache, that can be told to misbehave at any moment."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from contextlib import suppress
from enum import Enum, auto
from typing import Final, cast

from tests.conftest import free_port

# Closes with a reset instead of a farewell.
_NO_LINGER: Final = struct.pack("ii", 1, 0)


class Way(Enum):
    """What becomes of a question and its answer."""

    PASS = auto()
    RESET = auto()  # the connection is reset as soon as something is asked
    CUT = auto()  # half of the answer, then a reset
    CLOSE = auto()  # half of the answer, then an orderly end
    SWALLOW = auto()  # taken and never answered; a connection that saw this once stays so, as after a lost route
    TRICKLE = auto()  # the answer comes byte by byte, at least `pause_s` apart
    BABBLE = auto()  # `babble` instead of the answer, or random bytes


class Proxy:
    """Listens on a port of its own in the running loop and passes on to `upstream`, both of 127.0.0.1."""

    def __init__(self, upstream: int) -> None:
        self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.upstream = upstream
        self.way = Way.PASS
        self.delay_s = 0.0  # that each answer takes longer
        self.babble = b""
        self.pause_s = 0.0  # between two bytes that trickle
        self.questions = 0  # pieces received from the service
        self.links: set[_Link] = set()
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        """Take connections."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Link(self), "127.0.0.1", self.port)

    async def refuse(self) -> None:
        """End all connections and let the port refuse others, until `listen`."""
        if self._server is not None:
            self._server.close()
        for link in list(self.links):
            link.reset()
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None


class _Link(asyncio.Protocol):
    """A connection of the service, and the one to the feature cache that belongs to it."""

    def __init__(self, proxy: Proxy) -> None:
        self._proxy = proxy
        self._service: asyncio.Transport | None = None
        self._cache: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._is_lost = False  # in the air: neither side hears of it
        self._owed: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()  # pieces of answers, each with its moment
        self._tasks: list[asyncio.Task[None]] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._proxy.links.add(self)
        self._service = cast(asyncio.Transport, transport)
        self._tasks = [asyncio.create_task(self._connect()), asyncio.create_task(self._pay())]

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            transport, _ = await loop.create_connection(lambda: _Answers(self), "127.0.0.1", self._proxy.upstream)
        except OSError:
            self.reset()
            return
        self._cache = transport
        for data in self._early:
            transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._proxy.questions += 1
        self._is_lost |= self._proxy.way is Way.SWALLOW
        if self._is_lost:
            return
        if self._proxy.way is Way.RESET:
            self.reset()
        elif self._cache is None:
            self._early.append(data)
        else:
            self._cache.write(data)

    def answer(self, data: bytes) -> None:
        """Let the service have what the feature cache answered, in the way of the moment."""
        way = self._proxy.way
        self._is_lost |= way is Way.SWALLOW
        if self._is_lost:
            return
        if way is Way.BABBLE:
            data = self._proxy.babble or os.urandom(len(data))
        elif way in (Way.CUT, Way.CLOSE):
            self._send(data[: len(data) // 2])
            asyncio.get_running_loop().call_soon(self.reset if way is Way.CUT else self.close)
            return
        moment = asyncio.get_running_loop().time() + self._proxy.delay_s
        for piece in [bytes([byte]) for byte in data] if way is Way.TRICKLE else [data]:
            self._owed.put_nowait((moment, piece))
            moment += self._proxy.pause_s

    async def _pay(self) -> None:
        """Send what is owed in its order, whatever became of the delay meanwhile."""
        while True:
            moment, piece = await self._owed.get()
            wait_s = moment - asyncio.get_running_loop().time()
            await asyncio.sleep(max(wait_s, 0.0))
            self._send(piece)

    def _send(self, data: bytes) -> None:
        if self._service is not None and not self._service.is_closing():
            self._service.write(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.close()

    def reset(self) -> None:
        """End both connections; the service finds its own reset."""
        if self._service is not None:
            with suppress(OSError):
                opened: socket.socket = self._service.get_extra_info("socket")
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
            self._service.abort()
        self.close()

    def close(self) -> None:
        """End both connections."""
        self._proxy.links.discard(self)
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        for transport in (self._service, self._cache):
            if transport is not None:
                transport.close()


class _Answers(asyncio.Protocol):
    """The connection to the feature cache."""

    def __init__(self, link: _Link) -> None:
        self._link = link

    def data_received(self, data: bytes) -> None:
        self._link.answer(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._link.close()
