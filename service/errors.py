"""Errors as clients see them: one base with its status, and one form, RFC 9457 problem+json.

The Open Inference Protocol under `/v2` has a form of its own, `{"error": "..."}`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from http import HTTPStatus
from typing import Any, ClassVar, Final, NamedTuple

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from service import logs
from service.core.errors import PropensityError

logger = logging.getLogger(__name__)

MEDIA_TYPE: Final = "application/problem+json"


# An answer must not be many times the size of the body it is about.
MOST_PLACES: Final = 20
LONGEST_TOLD: Final = 300


class Place(NamedTuple):
    """What is wrong at one place of a body: a JSON pointer into it, and what to write instead."""

    pointer: str
    message: str


class ServiceError(PropensityError):
    """An error with a status. `code` ends the URI of the problem's type and never changes."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    headers: ClassVar[dict[str, str]] = {}
    places: Sequence[Place] = ()


class InvalidRequest(ServiceError):
    """The body is not what the route takes."""

    status = 422
    code = "invalid-request"

    def __init__(self, places: Sequence[Place]) -> None:
        told = [Place(place.pointer[:LONGEST_TOLD], place.message[:LONGEST_TOLD]) for place in places[:MOST_PLACES]]
        super().__init__("; ".join(f"{place.pointer}: {place.message}".lstrip(": ") for place in told[:3]))
        self.places = told


class UnknownModel(ServiceError):
    """No model of this name, or no such version of it, is loaded."""

    status = 404
    code = "unknown-model"


class ModelNotNamed(ServiceError):
    """Several models are loaded and the request names none."""

    status = 422
    code = "model-not-named"


class ModelNotReady(ServiceError):
    """The model exists and cannot be served."""

    status = 503
    code = "model-not-ready"


class InvalidCursor(ServiceError, ValueError):
    """A cursor that nobody gave."""

    status = 422
    code = "invalid-cursor"


class CursorGone(ServiceError):
    """What comes after the cursor is not kept any more."""

    status = 410
    code = "cursor-gone"


class UnknownAudience(ServiceError):
    """There is no audience of this name."""

    status = 404
    code = "unknown-audience"


class RefusedEvent(ServiceError):
    """The one event of a request was refused."""

    status = 422
    code = "refused-event"


class InvalidInference(ServiceError):
    """An inference request that breaks the Open Inference Protocol, or does not fit the model."""

    status = 400
    code = "invalid-inference"


class TooLarge(ServiceError):
    """The body is larger than the settings allow."""

    status = 413
    code = "too-large"


class NotJSON(ServiceError):
    """The body is declared to be something else than JSON."""

    status = 415
    code = "not-json"


class StoreError(ServiceError):
    """The feature cache did not do what it was asked; the client may try again."""

    status = 503
    code = "store-unavailable"
    headers = {"Retry-After": "1"}


class Overloaded(ServiceError):
    """More requests at once than this process answers in time."""

    status = 429
    code = "overloaded"
    headers = {"Retry-After": "1"}


class Problem(BaseModel):
    """An error, as RFC 9457 describes it."""

    type: str = Field(description="URI of the kind of problem; `about:blank` where the status says it all.")
    title: str = Field(description="The kind of problem in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What is wrong here and what to write instead.")
    instance: str = Field(description="The path that was asked.")
    errors: list[dict[str, str]] | None = Field(
        None, description="Each wrong place of the body: `pointer` (RFC 6901) and `message`."
    )


def answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The OpenAPI `responses` of a route that may answer these errors."""
    return {
        status: {
            "description": HTTPStatus(status).phrase,
            "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        }
        for status in statuses
    }


def pointer(location: Iterable[object]) -> str:
    """JSON pointer (RFC 6901) of a location in a body."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in location)


def places(error: ValidationError | RequestValidationError) -> list[Place]:
    """Each wrong place that pydantic found."""
    return [_place(item["loc"], item["msg"].removeprefix("Value error, ")) for item in error.errors()]


def _place(location: Sequence[object], message: str) -> Place:
    if location and location[0] == "body":
        return Place(pointer(location[1:]), message)
    if location and location[0] in ("path", "query", "header", "cookie"):
        return Place("", f"{location[0]} {'.'.join(map(str, location[1:]))}: {message}")
    return Place(pointer(location), message)


def body_of(error: ServiceError, instance: str) -> dict[str, Any]:
    """The members of the problem that `error` is."""
    words = error.code.replace("-", " ").replace("json", "JSON")
    title = words[:1].upper() + words[1:]
    return _members(f"urn:propensity:problem:{error.code}", title, error.status, str(error), instance, error.places)


def _members(
    kind: str, title: str, status: int, detail: str, instance: str, wrong: Sequence[Place] = ()
) -> dict[str, Any]:
    members = {"type": kind, "title": title, "status": status, "detail": detail, "instance": instance}
    return members | ({"errors": [place._asdict() for place in wrong]} if wrong else {})


def respond(request: Request, members: dict[str, Any], headers: dict[str, str] | None = None) -> Response:
    """The response for a problem, in the form that the asked path uses."""
    path = request.scope["path"]
    if path == "/v2" or path.startswith("/v2/"):
        return _json({"error": members["detail"]}, members["status"], "application/json", headers)
    return _json(members, members["status"], MEDIA_TYPE, headers)


def _json(content: dict[str, Any], status: int, media_type: str, headers: dict[str, str] | None) -> Response:
    # ASCII output: what a client sent may hold lone surrogates, which UTF-8 cannot carry.
    return Response(json.dumps(content).encode("ascii"), status, headers, media_type)


async def _on_service_error(request: Request, error: ServiceError) -> Response:
    if error.status >= 500:
        came_from = f"; it came from {causes}" if (causes := logs.causes(error)) else ""
        route = logs.route_of(request.scope)
        logger.warning("%s %s: %d: %s%s", logs.method_of(request.scope), route, error.status, error, came_from)
    return respond(request, body_of(error, request.url.path), error.headers)


async def _on_validation_error(request: Request, error: RequestValidationError) -> Response:
    return await _on_service_error(request, InvalidRequest(places(error)))


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    title = HTTPStatus(error.status_code).phrase
    detail = {
        404: f"no route {request.url.path}; /docs lists the routes",
        405: f"{request.method} is not a method of {request.url.path}; /docs lists the routes",
    }.get(error.status_code, str(error.detail))
    members = _members("about:blank", title, error.status_code, detail, request.url.path)
    headers = dict(error.headers or {})
    if error.status_code == 405 and (allowed := _methods(request)):
        headers["Allow"] = ", ".join(allowed)
    return respond(request, members, headers)


def _methods(request: Request) -> list[str]:
    """The methods of the path; a route knows only its own, and some paths have several routes."""
    path = getattr(request.scope.get("route"), "path_format", None)
    return sorted(method.upper() for method in request.app.openapi()["paths"].get(path, ()))


async def _on_disconnect(request: Request, _: ClientDisconnect) -> Response:
    return respond(request, _members("about:blank", "Bad Request", 400, "the body ended early", request.url.path))


async def _on_bug(request: Request, error: Exception) -> Response:
    # The middleware has logged it, with the id, which it cannot add to this answer.
    detail = f"a bug in the service ({type(error).__name__}); its log has the details"
    members = _members("about:blank", "Internal Server Error", 500, detail, request.url.path)
    return respond(request, members, {logs.REQUEST_ID_HEADER: request.scope["request_id"]})


def install(app: FastAPI) -> None:
    """Give every error of `app` its form."""
    app.exception_handler(ServiceError)(_on_service_error)
    app.exception_handler(RequestValidationError)(_on_validation_error)
    app.exception_handler(HTTPException)(_on_http_exception)
    app.exception_handler(ClientDisconnect)(_on_disconnect)
    app.exception_handler(Exception)(_on_bug)
