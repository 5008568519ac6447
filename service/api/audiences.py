"""Audiences: which there are, who is in them, page by page or all in one stream, and who entered and left."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any, Final, Literal

import msgspec
from fastapi import APIRouter, Header, Path, Query
from pydantic import BaseModel, Field
from starlette.responses import Response, StreamingResponse
from starlette.types import Send

from service import tracing
from service.api.state import CurrentMembers
from service.errors import StoreError, UnknownAudience, answers
from service.members import ERASED, Audience, Change, Member, Members
from service.scoring import iso_8601
from service.shards import CURSOR, Page
from service.spreadsheets import cell

logger = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/audiences", tags=["audiences"])

# Members that are read and sent at once: a millisecond of the feature cache, 60 kB.
STREAM_PAGE: Final = 1000
MOST: Final = 10_000
NDJSON: Final = "application/x-ndjson"
CSV: Final = "text/csv"
_MEDIA: Final = {"json": "application/json", "ndjson": NDJSON, "csv": CSV}

Format = Literal["json", "ndjson", "csv"]
Write = Callable[[Page[Member]], bytes]
Name = Annotated[str, Path(description="Name of the audience, as in the definitions.")]
Limit = Annotated[int, Query(ge=1, le=MOST, description="The most that one page has.")]


class AudienceOut(BaseModel):
    """An audience."""

    name: str
    members: int = Field(description="How many there are now.")
    updated_at: str | None = Field(description="When members last changed, RFC 3339 in UTC; null before that.")
    refreshed_at: str | None = Field(description="When it was last looked at who belongs to it.")
    definition: Any = Field(description="As the definitions file had it at that time; null if nobody said.")
    changes_cursor: str | None = Field(description="Of the latest change: follow `changes` from here. null before one.")


class AudiencesOut(BaseModel):
    """All audiences, by name."""

    audiences: list[AudienceOut]


class MemberOut(BaseModel):
    """A member, and since when."""

    visitor_id: str
    entered_at: str


class MembersOut(BaseModel):
    """A page of members."""

    members: list[MemberOut]
    cursor: str | None = Field(description="Ask for the next page with it; null on the last.")


class ChangeOut(BaseModel):
    """A visitor who entered or left."""

    cursor: str
    at: str
    visitor_id: str | None = Field(description="null of one who was erased.")
    visitor_key: str | None = Field(
        description="Of one who was erased: 64 hex digits of the SHA-256 of the id, to find and drop your own copy."
    )
    entered: bool = Field(description="false: left.")
    why: str


class ChangesOut(BaseModel):
    """A page of changes, oldest first."""

    changes: list[ChangeOut]
    cursor: str | None = Field(description="Ask with it as `since` for what comes next, now or later.")
    more: bool = Field(description="Whether there may be more right now.")


@router.get("", responses=answers(503), summary="The audiences")
async def audiences(members: CurrentMembers) -> AudiencesOut:
    """Every audience with its size, when it changed, and its definition."""
    with tracing.stage("store"):
        found = await members.names()
    return AudiencesOut(audiences=[_out(one) for one in found])


@router.get("/{name}", responses=answers(404, 422, 503), summary="One audience")
async def audience(name: Name, members: CurrentMembers) -> AudienceOut:
    """How many members it has, when it changed, and its definition."""
    return _out(await _find(members, name))


@router.get(
    "/{name}/members",
    response_model=MembersOut,
    responses={
        200: {"content": {NDJSON: {"schema": {"type": "string"}}, CSV: {"schema": {"type": "string"}}}},
        **answers(404, 422, 503),
    },
    summary="The members of an audience",
)
async def members_of(
    name: Name,
    members: CurrentMembers,
    cursor: Annotated[
        str | None,
        Query(description="Of the last page; left out, the first.", json_schema_extra={"pattern": CURSOR}),
    ] = None,
    limit: Annotated[
        int | None,
        Query(ge=1, le=MOST, description="The most that one page has, 1,000 unless said. Streams have all members."),
    ] = None,
    format: Annotated[
        Format | None, Query(description="`json` for a page, `ndjson` or `csv` for all in a stream; before `Accept`.")
    ] = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """A page of members as JSON, or, by `format` or the header `Accept`, all of them as NDJSON or CSV.

    Who is a member from the first page to the last is on exactly one of them, whatever changes meanwhile. A stream that
    breaks off ended early: it lacks its last chunk, and clients report that.
    """
    await _find(members, name)
    chosen = format or _accepted(accept)
    if chosen == "json":
        body, _ = await _page(members, name, cursor, limit or STREAM_PAGE, _json)
        return Response(body, media_type=_MEDIA[chosen])
    write = _csv if chosen == "csv" else _ndjson
    first, following = await _page(members, name, cursor, STREAM_PAGE, write)
    headers = {"Content-Disposition": f'attachment; filename="{name}.csv"'} if chosen == "csv" else None
    head = b"visitor_id,entered_at\r\n" if chosen == "csv" and not cursor else b""
    rest = _pages(members, name, head + first, following, write)
    return _Stream(rest, media_type=_MEDIA[chosen], headers=headers)


@router.get(
    "/{name}/changes",
    responses=answers(404, 410, 422, 503),
    response_model=ChangesOut,
    summary="Who entered and left an audience",
)
async def changes_of(
    name: Name,
    members: CurrentMembers,
    since: Annotated[
        str | None,
        Query(
            description="The cursor of the last change that is known; left out, the first that is kept.",
            json_schema_extra={"pattern": "^[0-9]{1,16}$"},
        ),
    ] = None,
    limit: Limit = 1000,
) -> Response:
    """Changes in one order for all readers, each with a cursor that is larger than that of the one before.

    Go on from the last cursor whenever you like. `410` says that changes after `since` are not kept any more: read all
    members anew, and go on from the `changes_cursor` that the audience had before that.
    """
    await _find(members, name)
    page = await members.changes(name, since or "", limit)
    cursor = page.items[-1].cursor if page.items else since
    told = {"changes": [_change(one) for one in page.items], "cursor": cursor, "more": page.cursor is not None}
    return Response(as_json(told), media_type="application/json")


class _Stream(StreamingResponse):
    """A stream that lacks its end where the feature cache fails, so that no client takes it for whole."""

    async def stream_response(self, send: Send) -> None:
        try:
            await super().stream_response(send)
        except StoreError as error:
            logger.warning("GET /v1/audiences/{name}/members: a stream ended early: %s", error)


async def _find(members: Members, name: str) -> Audience:
    with tracing.stage("store"):
        found = await members.find(name)
    if found is None:
        raise UnknownAudience(f"there is no audience {name[:64]!r}; GET /v1/audiences lists those there are")
    return found


def _out(found: Audience) -> AudienceOut:
    return AudienceOut(
        name=found.name,
        members=found.size,
        updated_at=iso_8601(found.updated_ms) if found.updated_ms else None,
        refreshed_at=iso_8601(found.described_ms) if found.described_ms else None,
        definition=json.loads(found.definition) if found.definition else None,
        changes_cursor=found.cursor or None,
    )


def _change(one: Change) -> dict[str, Any]:
    is_erased = one.why == ERASED
    return {
        "cursor": one.cursor,
        "at": iso_8601(one.at_ms),
        "visitor_id": None if is_erased else one.visitor_id,
        "visitor_key": one.visitor_id if is_erased else None,
        "entered": one.entered,
        "why": one.why,
    }


def _member(one: Member) -> dict[str, str]:
    return {"visitor_id": one.visitor_id, "entered_at": iso_8601(one.entered_ms)}


def as_json(content: object) -> bytes:
    """JSON of whatever ids hold."""
    try:
        return msgspec.json.encode(content)
    except UnicodeEncodeError:  # an id with a lone surrogate, which UTF-8 cannot carry
        return json.dumps(content).encode("ascii")


def _json(page: Page[Member]) -> bytes:
    return as_json({"members": [_member(one) for one in page.items], "cursor": page.cursor})


def _ndjson(page: Page[Member]) -> bytes:
    return b"".join([as_json(_member(one)) + b"\n" for one in page.items])


def _csv(page: Page[Member]) -> bytes:
    """Lines of CSV (RFC 4180). An id that a spreadsheet would take for a formula gets an apostrophe before it."""
    text = io.StringIO()
    writer = csv.writer(text)
    for one in page.items:
        writer.writerow([cell(one.visitor_id), iso_8601(one.entered_ms)])
    return text.getvalue().encode("utf-8", "backslashreplace")


async def _page(members: Members, name: str, cursor: str | None, limit: int, write: Write) -> tuple[bytes, str | None]:
    """A page as it is sent, and the cursor of the next one."""
    async with members.turns:
        page = await members.page(name, cursor, limit)
        return write(page), page.cursor


async def _pages(members: Members, name: str, first: bytes, cursor: str | None, write: Write) -> AsyncIterator[bytes]:
    """The first page and the others; the next one is read when the client has taken most of the last one."""
    if first:
        yield first
    while cursor is not None:
        body, cursor = await _page(members, name, cursor, STREAM_PAGE, write)
        if body:
            yield body


def _accepted(accept: str) -> Format:
    """What a header `Accept` wants most (RFC 9110, 12.5.1) of what there is, JSON where it does not say."""
    best: tuple[float, Format] = (0.0, "json")
    for part in accept.lower().split(","):
        media, *parameters = (word.strip() for word in part.split(";"))
        quality = next((word[2:] for word in parameters if word.startswith("q=")), "1")
        try:
            weight = float(quality)
        except ValueError:
            weight = 0.0
        for name in ("json", "ndjson", "csv"):
            if media == _MEDIA[name] and weight > best[0]:
                best = weight, name
    return best[1]
