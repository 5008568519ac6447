"""The express lane of `POST /v1/score`: what is plainly a good request is read and answered without FastAPI.

Routing a request costs more than scoring it. `service.http` asks here what a connection has just received; whatever is
unusual - a header, a key, a value, an error - it gives on as it came to the route of `service.api.scores`, which
decides and says what is wrong. So there is one definition of both, and the lane holds only what it must.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Final, NamedTuple

import httptools
import msgspec

from service import metrics
from service.api.scores import TIMEOUT_HEADER, encode
from service.errors import MEDIA_TYPE, Overloaded, body_of
from service.ingest import LONGEST_ID
from service.logs import REQUEST_ID
from service.score_log import ScoreLog
from service.scorer import Scorer
from service.scoring import Score, ScoreRequest, Timing
from service.tracing import TRACEPARENT, TRACESTATE, Marks, Tracing

PATH: Final = "/v1/score"
_START: Final = b"POST /v1/score HTTP/1.1\r\n"
_TYPES: Final = (b"application/json", b"application/json; charset=utf-8")
# Heads that are remembered. A client sends the same one with most requests, unless it numbers them.
_MOST_HEADS: Final = 1024
_LONGEST_HEAD: Final = 4096
# Lines of a head that are others with every request. Only what any parser takes for a line of its own: the next one
# belongs to no earlier one. What looks otherwise stays in the head, and its parser decides. Spelled out, since ignoring
# the case takes twice as long.
_MARK: Final = re.compile(
    rb"\r\n([Xx]-[Rr]equest-[Ii][Dd]|[Tt]race[Pp]arent|[Tt]race[Ss]tate): ?([ -~]{1,512})(?=\r\n[^ \t]|\Z)"
)
_is_plain: Final = re.compile(REQUEST_ID).fullmatch
# A longer body is no plain score's; the route holds no more of those at once than it has places.
_LONGEST_BODY: Final = 16 * 1024
_Values = dict[str, str | bool | int | float | None]


class Asked(NamedTuple):
    """A plain request, how long its client waits for the answer if it says, and what marks it if anything does."""

    request: ScoreRequest
    timeout_ms: int | None
    marks: Marks | None = None


class ExpressLane:
    """Reads plain requests for one score and writes their answers. One per process."""

    def __init__(self, scorer: Scorer, log: ScoreLog, body_bytes: int, tracing: Tracing | None = None) -> None:
        self.scorer, self._log, self._body_bytes, self.tracing = scorer, log, body_bytes, tracing
        self.connections: set[Any] = set()
        self._heads: dict[bytes, _Head | None] = {}
        self._headers: list[tuple[bytes, bytes]] = []
        self._header_bytes = b""
        self._seconds = metrics.express(PATH, 200)
        self._refused_seconds = metrics.express(PATH, 429)

    def read(self, data: bytes) -> Asked | bool:
        """The request that `data` is. True if that takes more bytes; False if it is not one plain request alone."""
        raw_head, end, body = data.partition(b"\r\n\r\n")
        if not end or len(raw_head) > _LONGEST_HEAD:
            return False
        marks = None
        try:
            head = self._heads[raw_head]
        except KeyError:
            head, marks = self._look_closer(raw_head)
        if head is None or len(body) > head.length or b"\\" in body:
            return False
        if len(body) < head.length:
            return True
        try:
            asked = _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return False
        if body.count(b":") != asked.colons():
            return False
        request = ScoreRequest(
            asked.visitor_id,
            None if asked.model is msgspec.UNSET else asked.model,
            asked.context or {},
            asked.features or {},
        )
        return Asked(request, head.timeout_ms, marks)

    def _look_closer(self, raw: bytes) -> tuple[_Head | None, Marks | None]:
        """A head that is not known, as it is without the lines that differ with every request, and what these say."""
        if not raw.startswith(_START):
            return None, None
        parts = _MARK.split(raw)  # what is between the lines, with the name and the value of each in turn
        if len(parts) == 1:
            return self._learn(raw), None
        found = dict(zip(map(bytes.lower, parts[1::3]), parts[2::3], strict=True))
        marks = Marks(found.get(b"x-request-id"), found.get(TRACEPARENT), found.get(TRACESTATE))
        if len(found) < len(parts) // 3 or not (marks.request_id is None or _is_plain(marks.request_id)):
            return None, None
        common = b"".join(parts[::3])
        try:
            return self._heads[common], marks
        except KeyError:
            return self._learn(common), marks

    def _learn(self, raw: bytes) -> _Head | None:
        if len(self._heads) >= _MOST_HEADS:
            self._heads.clear()
        head = self._heads[raw] = _plain_head(raw, self._body_bytes)
        return head

    def usual_headers(self, headers: list[tuple[bytes, bytes]]) -> bytes:
        """The bytes of headers that every answer has; made once for each list of them."""
        if headers is not self._headers:
            self._headers, self._header_bytes = headers, b"".join([b"%b: %b\r\n" % header for header in headers])
        return self._header_bytes

    def answer(self, score: Score, timing: Timing, seconds: float, marks: Marks | None = None) -> bytes:
        """Headers from the content type on, and the body; the score is logged and its time counted."""
        body = encode(score)
        self._log.add(body)
        self._seconds.add(seconds)
        return b"content-type: application/json\r\n%bserver-timing: %b\r\ncontent-length: %d\r\n\r\n%b" % (
            _told_id(marks),
            timing.header().encode(),
            len(body),
            body,
        )

    def refusal(self, error: Overloaded, marks: Marks | None = None) -> bytes:
        """The same for a request that is one too many."""
        self._refused_seconds.add(0)
        body = json.dumps(body_of(error, PATH)).encode()
        headers = "".join(f"{name.lower()}: {value}\r\n" for name, value in error.headers.items())
        head = f"content-type: {MEDIA_TYPE}\r\n{headers}content-length: {len(body)}\r\n\r\n".encode()
        return b"%b%b%b" % (_told_id(marks), head, body)


def _told_id(marks: Marks | None) -> bytes:
    """The header that gives a client its own id back. Others get none: nothing of an answer here is in the log."""
    return b"x-request-id: %b\r\n" % marks.request_id if marks is not None and marks.request_id is not None else b""


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


class _Head(NamedTuple):
    """What of a plain head matters: the bytes of the body, and how long the client waits."""

    length: int
    timeout_ms: int | None


class _HeadParser:
    """Collects what httptools finds in a head."""

    def __init__(self) -> None:
        self.headers: list[tuple[bytes, bytes]] = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))


def _plain_head(raw: bytes, most_bytes: int) -> _Head | None:
    """The head, if nothing about it is unusual."""
    found = _HeadParser()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(raw + b"\r\n\r\n")
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    headers = dict(found.headers)
    length, timeout = headers.get(b"content-length", b""), headers.get(TIMEOUT_HEADER.lower().encode())
    is_plain = (
        len(headers) == len(found.headers)
        and headers.get(b"content-type", b"").lower() in _TYPES
        and not headers.keys() & {b"content-encoding", b"transfer-encoding", b"expect", b"upgrade", b"x-request-id"}
        and parser.should_keep_alive()
        and length.isdigit()
        and len(length) < 10
        and int(length) <= min(most_bytes, _LONGEST_BODY)
        and (timeout is None or (timeout.isdigit() and len(timeout) < 10 and int(timeout) > 0))
    )
    return _Head(int(length), None if timeout is None else int(timeout)) if is_plain else None
