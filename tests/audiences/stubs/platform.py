"""A platform on loopback: an HTTP server that checks rules, remembers who broke one, and has faults on demand.

A rule that is broken is answered as the platform would, and kept in `broken`, which the fixtures of the tests assert to
be empty. So a client that breaks a rule fails its test even where it deals with the answer.
"""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self
from urllib.parse import parse_qs, unquote, urlsplit


class Request(NamedTuple):
    """A request as it came; header names in lower case."""

    method: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]
    body: Any
    at_s: float

    def __str__(self) -> str:
        return f"{self.method} {self.path}"


class Answer(NamedTuple):
    """What is said back. No body: an empty one."""

    status: int
    body: Any = None
    headers: Mapping[str, str] = {}


class Refused(Exception):
    """Ends the handling of a request with an answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(str(answer))
        self.answer = answer


class Fault(NamedTuple):
    """What goes wrong with the next requests that a pattern finds: an answer, a wait, or an answer that is lost."""

    pattern: str
    answer: Answer | None
    wait_s: float
    lost: bool


class Platform:
    """The server, and what all platforms have in common. A subclass has `handle` and `refusal`."""

    media = "application/json"

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.broken: list[str] = []
        self.faults: list[Fault] = []
        self.window: tuple[int, float] | None = None  # requests in so many seconds; above them comes a 429
        self.throttled = 0
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self._server.server_port}"

    def refuse(self, pattern: str, status: int, body: Any = None, times: int = 1, **headers: str) -> None:
        """Answer the next requests of this pattern like this, without carrying them out."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.faults += [Fault(pattern, Answer(status, body, named), 0.0, False)] * times

    def lose(self, pattern: str) -> None:
        """Carry out the next request of this pattern, and hang up without an answer."""
        self.faults.append(Fault(pattern, None, 0.0, True))

    def stall(self, pattern: str, wait_s: float) -> None:
        """Carry out the next request of this pattern only after so many seconds."""
        self.faults.append(Fault(pattern, None, wait_s, False))

    def sent(self, pattern: str) -> list[Request]:
        """The requests whose method and path a pattern finds."""
        return [request for request in self.requests if re.search(pattern, str(request))]

    def rule(self, holds: object, said: str, status: int = 400, kept: bool = True) -> None:
        """Refuse the request where a rule does not hold, and remember that, unless it is no fault of the client's."""
        if holds:
            return
        if kept:
            self.broken.append(said)
        raise Refused(self.refusal(status, said))

    def handle(self, request: Request) -> Answer:
        """Carry out a request."""
        raise NotImplementedError

    def refusal(self, status: int, said: str) -> Answer:
        """An error as the platform words it."""
        raise NotImplementedError

    def answered(self, request: Request) -> tuple[Answer, Fault | None]:
        """The answer to a request, and the fault that it runs into."""
        with self._lock:
            fault = next((one for one in self.faults if re.search(one.pattern, str(request))), None)
            if fault:
                self.faults.remove(fault)
        if fault and fault.wait_s:
            time.sleep(fault.wait_s)
        with self._lock:
            self.requests.append(request)
            if fault and fault.answer:
                return fault.answer, fault
            try:
                self._throttle(request)
                return self.handle(request), fault
            except Refused as refused:
                return refused.answer, fault
            except Exception as error:  # a bug of the stub must not look like one of the client
                self.broken.append(f"{request}: {error!r}")
                raise

    def _throttle(self, request: Request) -> None:
        if self.window:
            allowed, seconds = self.window
            lately = [one for one in self.requests if one.at_s > request.at_s - seconds]
            if len(lately) > allowed:
                self.throttled += 1
                raise Refused(self.too_many())

    def too_many(self) -> Answer:
        """A 429 as the platform words it."""
        raise NotImplementedError


def _handler(platform: Platform) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # else each answer waits 40 ms for the head's acknowledgement

        def handle_one(self) -> None:
            address = urlsplit(self.path)
            raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            body = json.loads(raw) if raw else None
            query = {name: values[-1] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
            headers = {name.lower(): value for name, value in self.headers.items()}
            request = Request(self.command, unquote(address.path), query, headers, body, time.monotonic())
            answer, fault = platform.answered(request)
            if fault and fault.lost:
                self.close_connection = True
                with suppress(OSError):
                    self.connection.shutdown(socket.SHUT_RDWR)
                return
            text = b"" if answer.body is None else json.dumps(answer.body).encode()
            with suppress(OSError):  # who asked may have given up
                self.send_response(answer.status)
                for name, value in {**answer.headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                if text:
                    self.send_header("Content-Type", platform.media)
                self.end_headers()
                self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_one  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    return Handler
