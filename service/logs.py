"""Logs: how a line looks, the id of the request that it belongs to, and what may be told of a request.

Nothing of what a client sent is in a line: no id of a visitor, no path, no value. So a request is told by the template
of its route, and an error of Python by its type and its place in the code: its words often quote what it is about.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.core.errors import PropensityError

logger = logging.getLogger(__name__)

Format = Literal["text", "json"]
Level = Literal["debug", "info", "warning", "error"]

REQUEST_ID_HEADER: Final = "X-Request-ID"
# Ids that go into logs and answers as they came: what cannot end a line, nor hold an e-mail.
REQUEST_ID: Final = rb"[A-Za-z0-9._-]{1,128}"
METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

_HEADER: Final = REQUEST_ID_HEADER.lower().encode()
_is_plain: Final = re.compile(REQUEST_ID).fullmatch
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
_OURS: Final = ("service", "cli")
# A library that cannot export its spans says so for every batch.
_SELDOM_S: Final = 60.0
_MOST_KINDS: Final = 100
_MOST_CAUSES: Final = 10


class _Request:
    """A request that is being answered. Callbacks and tasks that it began may go on after it, for others."""

    __slots__ = ("id", "is_over")

    def __init__(self, request_id: str) -> None:
        self.id, self.is_over = request_id, False


_request: ContextVar[_Request | None] = ContextVar("request", default=None)


def request_id() -> str | None:
    """The id of the request that this code runs for, None outside of one."""
    request = _request.get()
    return None if request is None or request.is_over else request.id


def route_of(scope: Mapping[str, Any]) -> str:
    """The template of the route that a request took, `none` where there is no such route."""
    return str(getattr(scope.get("route"), "path_format", "none"))


def method_of(scope: Mapping[str, Any]) -> str:
    """The method of a request, `other` if it is an unusual one."""
    return str(scope["method"]) if scope["method"] in METHODS else "other"


class RequestId:
    """ASGI middleware that gives every request an id, the client's if it is a plain one, and tells it in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request = _Request(_given_id(scope["headers"]) or os.urandom(16).hex())
        scope["request_id"] = request.id
        header = (_HEADER, request.id.encode())
        token = _request.set(request)

        async def tell_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], header]}
            await send(message)

        try:
            await self.app(scope, receive, tell_id)
        except Exception as error:
            # Its answer is made outside of this, by `errors`; it is raised once more for the server's log.
            logger.error("%s %s: a bug", method_of(scope), route_of(scope), exc_info=error)
            error.is_told = True  # type: ignore[attr-defined]
            raise
        finally:
            request.is_over = True
            _request.reset(token)


def _given_id(headers: list[tuple[bytes, bytes]]) -> str | None:
    given = [value for name, value in headers if name == _HEADER]
    return given[0].decode() if len(given) == 1 and _is_plain(given[0]) else None


def configure(form: Format, level: Level, *, with_process: bool = False) -> None:
    """Log to stderr from now on, and whatever else ends a thread or a callback too.

    `with_process` puts the process into lines of text; JSON always has it. Libraries do not say more than at `info`.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(JSONLines() if form == "json" else Text(with_process))
    handler.addFilter(_Filter().filter)
    lowest = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=max(lowest, logging.INFO), handlers=[handler], force=True)
    for name in _OURS:
        logging.getLogger(name).setLevel(lowest)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = lambda given: _log_uncaught(given.exc_type, given.exc_value, given.exc_traceback)
    sys.unraisablehook = lambda given: _log_uncaught(given.exc_type, given.exc_value, given.exc_traceback)


def _log_uncaught(kind: type[BaseException], error: BaseException | None, place: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    logger.critical("an error that nothing caught", exc_info=(kind, error or kind(), place))


def log_loop_error(_: asyncio.AbstractEventLoop, context: Mapping[str, Any]) -> None:
    """What an event loop calls with an error in a callback or a lost task.

    Its own handler would print what the callback was called with, which is whole requests.
    """
    message = str(context.get("message", "")).partition("(")[0].strip()
    logger.error("%s", message or "an error in the event loop", exc_info=context.get("exception"))


class Text(logging.Formatter):
    """A line for people, and below it where an error came from."""

    def __init__(self, with_process: bool) -> None:
        process = " %(process)d" if with_process else ""
        super().__init__(f"%(levelname)s{process} %(name)s: %(line)s")

    def format(self, record: logging.LogRecord) -> str:
        """The line, and the request's id behind it where there is one."""
        known = request_id()
        message = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], record.getMessage().strip())
        record.line = message if known is None else f"{message} [{known}]"
        lines = self.formatMessage(record)
        return f"{lines}\n{told}" if (told := _told(record)) else lines


class JSONLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The object: time, level, logger, process and message; request_id and exception where there are such."""
        members: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": record.getMessage().strip(),
        }
        if (known := request_id()) is not None:
            members["request_id"] = known
        if told := _told(record):
            members["exception"] = told
        return json.dumps(members)


class _Filter:
    """Lets through what was not told yet, and of the tracing library each kind of line once a minute."""

    def __init__(self) -> None:
        self._last: dict[tuple[str, str], float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and getattr(record.exc_info[1], "is_told", False):
            return False
        if not record.name.startswith("opentelemetry."):
            return True
        if record.name == "opentelemetry.util.re":  # it quotes headers that it cannot read, which hold secrets
            record.args = ("(left out)",)
        now, line = time.monotonic(), (record.name, str(record.msg))
        is_new = now - self._last.get(line, -_SELDOM_S) >= _SELDOM_S
        if is_new:
            if len(self._last) >= _MOST_KINDS:
                self._last.clear()
            self._last[line] = now
        return is_new


def _told(record: logging.LogRecord) -> str:
    error = record.exc_info[1] if record.exc_info else None
    return "" if error is None else "\n".join(_lines(error, _MOST_CAUSES))


def _lines(error: BaseException, most: int) -> Iterator[str]:
    """Where an error came from and of what type it is, its causes first."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None and most > 1:
        yield from _lines(cause, most - 1)
        yield "which led to"
    yield "Traceback (most recent call last):"
    yield "".join(traceback.format_tb(error.__traceback__)).rstrip("\n")
    yield in_short(error)
    if isinstance(error, BaseExceptionGroup) and most > 1:
        for one in error.exceptions[:_MOST_CAUSES]:
            yield "of which one is"
            yield from _lines(one, most - 1)


def in_short(error: BaseException) -> str:
    """The type of an error, and its words where they speak of the system and not of a request."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    is_ours = isinstance(error, PropensityError) and getattr(error, "status", 500) >= 500
    if is_ours or isinstance(error, OSError | ImportError):
        return f"{name}: {error}"
    return name


def causes(error: BaseException) -> str:
    """What an error comes from, in one line."""
    told: list[str] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and len(told) < _MOST_CAUSES:
        told.append(in_short(cause))
        cause = cause.__cause__ or cause.__context__
    return " from ".join(told)
