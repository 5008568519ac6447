"""One of several processes that serve, `python -m service.worker`, as `service.supervisor` starts them.

Its standard input is a socket to the supervisor. By it come its orders, one line of JSON, and when it is needed a
second line; by it goes the answer, which is `ready` or why it cannot serve, and after `ready` a line each second, by
the loop that serves: one that hangs falls silent. When the supervisor is gone, however that came about, the socket
closes and the worker ends.
"""

from __future__ import annotations

import asyncio
import faulthandler
import json
import logging
import os
import shutil
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import TextIO

from prometheus_client import values

from service import logs, port
from service.core.errors import PropensityError
from service.settings import Settings, load
from service.supervisor import ALIVE, ALIVE_EVERY_S, READY, REPLACE, SHOW_STACKS, Orders

logger = logging.getLogger("service.worker")


def main() -> None:
    """Take the orders, serve, and leave nothing behind."""
    for each in (signal.SIGTERM, signal.SIGINT):  # until there is a server that handles them
        signal.signal(each, lambda *_: sys.exit(0))
    faulthandler.register(SHOW_STACKS, all_threads=True)
    channel, is_orphan = socket.socket(fileno=sys.stdin.fileno()), threading.Event()
    lines = channel.makefile()
    orders: Orders = json.loads(lines.readline())
    settings = load(**orders["settings"])
    logs.configure(settings.log_format, settings.log_level, with_process=True)
    try:
        _serve(orders, settings, channel, lines, is_orphan)
    except PropensityError as error:
        channel.sendall(f"{error}\n".encode())
        sys.exit(2)
    finally:
        if is_orphan.is_set() and orders["temporary"] is not None:
            shutil.rmtree(orders["temporary"], ignore_errors=True)


def _serve(
    orders: Orders, settings: Settings, channel: socket.socket, lines: TextIO, is_orphan: threading.Event
) -> None:
    # Before the first metric is made: its files are those of the name, and go on with what they hold.
    values.ValueClass = values.MultiProcessValue(lambda: orders["name"])  # type: ignore[no-untyped-call]
    from service import app, metrics, tracing

    tracing.prepare()
    order = lines.readline().strip()
    threading.Thread(target=_end_with_supervisor, args=[lines, is_orphan, orders["limit_s"]], daemon=True).start()
    if order == REPLACE:
        metrics.WORKER_RESTARTS.inc()
    shared = orders["listener"]
    bound = port.bind(settings.host, settings.port, shared=True) if shared is None else socket.socket(fileno=shared)
    app.run(settings, bound, on_ready=lambda: _begin(channel))


def _begin(channel: socket.socket) -> None:
    channel.sendall(f"{READY}\n".encode())
    asyncio.get_running_loop().call_later(ALIVE_EVERY_S, _go_on, channel)


def _go_on(channel: socket.socket) -> None:
    with suppress(OSError):  # that the supervisor is gone is noticed below; one that does not read needs no more lines
        channel.send(f"{ALIVE}\n".encode(), socket.MSG_DONTWAIT)
    asyncio.get_running_loop().call_later(ALIVE_EVERY_S, _go_on, channel)


def _end_with_supervisor(lines: TextIO, is_orphan: threading.Event, limit_s: float) -> None:
    lines.readline()
    logger.error("the supervisor is gone, and this worker ends too")
    is_orphan.set()
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(limit_s)
    os._exit(1)


if __name__ == "__main__":
    main()
