"""How a process that serves begins and ends: it says when it is ready, and it leaves without losing a request.

After SIGTERM it is not ready any more and serves on for a while, so that load balancers notice; its answers say
`Connection: close`, so that clients take their next request elsewhere. Then it takes no more connections, finishes
what is in flight and ends. SIGINT leaves the first part out, and another one the rest.
"""

from __future__ import annotations

import asyncio
import math
import signal
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Final

import uvicorn

from service import port

CLOSE: Final = (b"connection", b"close")
# How long the connections that clients have begun to make are waited for.
_HANDSHAKE_S: Final = 0.2


class Lifecycle:
    """Whether this process should get requests; in the state of each of them."""

    draining: bool = False


async def cancel(*tasks: asyncio.Task[None]) -> None:
    """Return when the tasks have ended; one that was cancelled in a library may have to be told again."""
    while pending := [task for task in tasks if not task.done()]:
        for task in pending:
            task.cancel()
        await asyncio.wait(pending, timeout=0.5)


class Server(uvicorn.Server):
    """Uvicorn's server with an end of its own. `on_ready` is called once, when it has begun to listen."""

    def __init__(
        self,
        config: uvicorn.Config,
        lifecycle: Lifecycle,
        *,
        delay_s: float,
        on_ready: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config)
        self._lifecycle, self._delay_s, self._on_ready = lifecycle, delay_s, on_ready
        self._ends_at = math.inf

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Load what is served, then listen."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end, or hurry up if that has begun."""
        if sig == signal.SIGINT and self.should_exit:
            self.force_exit = True
        if sig == signal.SIGINT or not self.started:
            self.should_exit = True
        if not self._lifecycle.draining:
            self._lifecycle.draining = True
            self._ends_at = time.monotonic() + self._delay_s
            self.config.encoded_headers.append(CLOSE)
            self.server_state.default_headers = [*self.server_state.default_headers, CLOSE]

    async def on_tick(self, counter: int) -> bool:
        """Whether it is time to take no more connections."""
        return await super().on_tick(counter) or time.monotonic() >= self._ends_at

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more connections, finish what is in flight and release what was loaded."""
        self.should_exit = True
        listeners = [listener for server in self.servers for listener in server.sockets]
        if not self.force_exit and all(port.refuse_handshakes(listener.fileno()) for listener in listeners):
            await asyncio.sleep(_HANDSHAKE_S)
        await super().shutdown(sockets)
