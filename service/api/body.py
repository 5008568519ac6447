"""Request bodies: bounded while they are read, and JSON as RFC 8259 means it.

Python's own reader takes NaN, a key twice, lone surrogates and any depth; each of them has crashed a server that
wrote back what it had read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final, NoReturn

import msgspec
from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive, Scope

from service.api.state import state_of
from service.errors import InvalidRequest, NotJSON, Place, TooLarge

DEEPEST: Final = 64
_DEEPEST_PLAIN: Final = 8  # making the fast reader takes twice as long with each level


class _Refused(ValueError):
    """JSON that another reader would understand otherwise, or not at all."""


def decode(raw: bytes) -> Any:
    """The value of a JSON text. Raises InvalidRequest that says where it is wrong."""
    try:
        return _plain(raw)
    except (msgspec.MsgspecError, UnicodeError, _Unsure):
        return decode_exactly(raw)


class _Unsure(ValueError):
    """JSON that the fast reader took, and may have taken for something else."""


def _plain(raw: bytes) -> Any:
    """The value, read several times as fast. Raises where it is not plainly what the exact reader would read.

    The fast reader keeps the last of a key that comes twice, so that there are fewer colons when it is written again:
    nothing adds one but a colon that was escaped.
    """
    value = _FAST_DECODER.decode(raw)
    written = _ENCODER.encode(value)
    if written != raw and (b"\\u003" in raw or written.count(b":") != raw.count(b":")):
        raise _Unsure
    return value


def _nested(levels: int) -> Any:
    """The type of a JSON value with lists and objects in each other up to so many levels."""
    value: Any = str | int | float | bool | None
    for _ in range(levels):
        value = str | int | float | bool | None | list[value] | dict[str, value]
    return value


_FAST_DECODER: Final = msgspec.json.Decoder(_nested(_DEEPEST_PLAIN))
_ENCODER: Final = msgspec.json.Encoder()


def decode_exactly(raw: bytes) -> Any:
    """The same by the reader that says what is wrong, which takes several times as long."""
    try:
        value = _DECODER.decode(raw.decode("utf-8"))
        if b"\\u" in raw:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        _refuse(f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}")
    except UnicodeDecodeError as error:
        _refuse(f"not JSON: byte {error.start} is not UTF-8")
    except UnicodeEncodeError:
        _refuse("a string holds half of a surrogate pair; write whole characters")
    except _Refused as error:
        _refuse(str(error))
    except RecursionError:
        _refuse(f"nested deeper than {DEEPEST} levels")
    except ValueError:  # int() of more digits than the interpreter converts
        _refuse("a number has too many digits")
    if _is_deeper_than(value, DEEPEST):
        _refuse(f"nested deeper than {DEEPEST} levels")
    return value


def _refuse(message: str) -> NoReturn:
    raise InvalidRequest([Place("", message)]) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise _Refused(f"the key {twice[:64]!r} comes twice in one object")
    return made


def _float(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise _Refused(f"the number {text[:32]} is beyond the range of float64")
    return number


def _constant(text: str) -> NoReturn:
    raise _Refused(f"{text} is not JSON; write null for a missing number")


_DECODER: Final = json.JSONDecoder(object_pairs_hook=_object, parse_float=_float, parse_constant=_constant)


def _is_deeper_than(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


async def read(request: Request, limit: int) -> bytes:
    """The body, of at most `limit` bytes. Raises TooLarge as soon as there are more."""
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise TooLarge(f"the body is longer than {limit} bytes; send it in parts")
        chunks.append(chunk)
    return b"".join(chunks)


def require_json(request: Request) -> None:
    """Raise NotJSON unless the body is declared to be plain JSON."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    is_json = media_type == "application/json" or (
        media_type.startswith("application/") and media_type.endswith("+json")
    )
    if not is_json or request.headers.get("content-encoding", "identity").lower() != "identity":
        raise NotJSON("send JSON that is not compressed, with the header Content-Type: application/json")


class _ReadRequest(Request):
    """A request whose JSON body has been read."""

    def __init__(self, scope: Scope, receive: Receive, raw: bytes) -> None:
        super().__init__(scope, receive)
        self._raw = raw
        self._value = decode(raw)

    async def body(self) -> bytes:
        return self._raw

    async def json(self) -> Any:
        return self._value


class JSONRoute(APIRoute):
    """A route whose body is read as this module says."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        if self.body_field is None:
            return handle

        async def read_first(request: Request) -> Response:
            require_json(request)
            raw = await read(request, state_of(request)["settings"].body_bytes)
            return await handle(_ReadRequest(request.scope, request.receive, raw))

        return read_first
