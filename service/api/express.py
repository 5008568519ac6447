"""The express lane of `POST /v1/score`: what is plainly a good request is answered before FastAPI sees it.

A FastAPI route costs more than a score. Whatever is unusual here - a header, a key, a value, an error - goes on to the
route of `service.api.scores` as it came, which decides and says what is wrong; so there is one definition of both.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Final

import msgspec
from pydantic_core import to_json
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import metrics
from service.ingest import LONGEST_ID
from service.scoring import ScoreFailure, ScoreRequest

PATH: Final = "/v1/score"
_Values = dict[str, str | bool | int | float | None]
_TYPES: Final = (b"application/json", b"application/json; charset=utf-8")


class _Asked(msgspec.Struct, forbid_unknown_fields=True):
    visitor_id: Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_ID)]
    model: str | None | msgspec.UnsetType = msgspec.UNSET
    context: _Values | msgspec.UnsetType = msgspec.UNSET
    features: _Values | msgspec.UnsetType = msgspec.UNSET

    def colons(self) -> int:
        """How many colons the body has if no key comes twice: one a key, and those within strings."""
        keys, texts = 1, [self.visitor_id]
        if self.model is not msgspec.UNSET:
            keys += 1
            texts.append(self.model or "")
        for values in (self.context, self.features):
            if values is not msgspec.UNSET:
                keys += 1 + len(values)
                texts += values
                texts += [value for value in values.values() if type(value) is str]
        return keys + "".join(texts).count(":")


_decoder: Final = msgspec.json.Decoder(_Asked)


class ExpressLane:
    """ASGI middleware; must be the outermost."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self._seconds = metrics.REQUEST_SECONDS.labels(PATH, "POST", 200)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        first = await receive()
        request = _request(scope, first)
        result = None if request is None else await scope["state"]["scorer"].score_one(request)
        if result is None or isinstance(result, ScoreFailure):
            await self.app(scope, _again(first, receive), send)
            return
        content = to_json(result)
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(content))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": content})
        self._seconds.observe(time.perf_counter() - started)


def _request(scope: Scope, message: Message) -> ScoreRequest | None:
    """The request, if nothing about it is unusual: the body is in one piece and each key comes once."""
    if message["type"] != "http.request" or message.get("more_body"):
        return None
    body: bytes = message.get("body", b"")
    if len(body) > scope["state"]["settings"].body_bytes or b"\\" in body or not _is_plain_json(scope["headers"]):
        return None
    try:
        asked = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None
    if body.count(b":") != asked.colons():
        return None
    return ScoreRequest(asked.visitor_id, asked.model or None, asked.context or {}, asked.features or {})


def _is_plain_json(headers: list[tuple[bytes, bytes]]) -> bool:
    declared = [value for name, value in headers if name == b"content-type"]
    is_encoded = any(name == b"content-encoding" for name, _ in headers)
    return len(declared) == 1 and declared[0].lower() in _TYPES and not is_encoded


def _again(first: Message, receive: Receive) -> Receive:
    """A receive that gives the message that was already taken, then the rest."""
    pending: list[Any] = [first]

    async def replay() -> Message:
        return pending.pop() if pending else await receive()

    return replay
