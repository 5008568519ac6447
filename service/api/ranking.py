"""Ranking: the latest score of every visitor, best first or page by page, and how scores are spread."""

from __future__ import annotations

from typing import Annotated, Final

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, Field
from starlette.responses import Response

from service import tracing
from service.api.audiences import as_json
from service.api.state import CurrentModels, CurrentPropensities
from service.errors import answers
from service.propensities import Scored
from service.scoring import iso_8601
from service.shards import CURSOR

router = APIRouter(prefix="/v1/models", tags=["models"])

MOST: Final = 10_000
PERCENTILES: Final = (1, 5, 10, 25, 50, 75, 90, 95, 99)

Name = Annotated[str, Path(description="Name of the model.")]
Limit = Annotated[int, Query(ge=1, le=MOST, description="The most visitors of one answer.")]


class ScoredOut(BaseModel):
    """A visitor and the latest score."""

    visitor_id: str
    propensity: float = Field(ge=0, le=1)


class TopOut(BaseModel):
    """Visitors with the highest scores."""

    visitors: list[ScoredOut]


class VisitorsOut(BaseModel):
    """A page of visitors."""

    visitors: list[ScoredOut]
    cursor: str | None = Field(description="Ask for the next page with it; null on the last.")


class SpreadOut(BaseModel):
    """How the latest scores are spread."""

    visitors: int = Field(description="Of how many a score is kept.")
    above: int = Field(description="How many of them have at least the score that was asked for.")
    percentiles: dict[str, float] = Field(description="The lowest score that so many percent do not exceed.")
    versions: dict[str, str] = Field(description="Versions that scored, and when each did so last.")


@router.get(
    "/{name}/top",
    responses=answers(404, 422, 503),
    response_model=TopOut,
    summary="The visitors with the highest scores",
)
async def top(name: Name, models: CurrentModels, propensities: CurrentPropensities, limit: Limit = 100) -> Response:
    """Best first, by the latest score of each visitor."""
    models.find(name)
    with tracing.stage("store"):
        found = await propensities.top(name, limit)
    return Response(as_json({"visitors": [_out(one) for one in found]}), media_type="application/json")


@router.get(
    "/{name}/visitors",
    responses=answers(404, 422, 503),
    response_model=VisitorsOut,
    summary="Every visitor above a cut",
)
async def visitors(
    name: Name,
    models: CurrentModels,
    propensities: CurrentPropensities,
    above: Annotated[float, Query(ge=0, le=1, description="The lowest score of those who are wanted.")] = 0.0,
    cursor: Annotated[
        str | None,
        Query(description="Of the last page; left out, the first.", json_schema_extra={"pattern": CURSOR}),
    ] = None,
    limit: Limit = 1000,
) -> Response:
    """Page by page, in an order that no score changes.

    Who is above the cut from the first page to the last is on exactly one of them, however scores change meanwhile.
    """
    models.find(name)
    with tracing.stage("store"):
        page = await propensities.above(name, above, cursor, limit)
    told = {"visitors": [_out(one) for one in page.items], "cursor": page.cursor}
    return Response(as_json(told), media_type="application/json")


@router.get("/{name}/spread", responses=answers(404, 422, 503), summary="How scores are spread")
async def spread(
    name: Name,
    models: CurrentModels,
    propensities: CurrentPropensities,
    above: Annotated[float, Query(ge=0, le=1, description="Count who has at least this score.")] = 0.0,
) -> SpreadOut:
    """How many visitors have a score, how many at least a certain one, and percentiles."""
    models.find(name)
    with tracing.stage("store"):
        size = await propensities.count(name)
        levels = {str(p): await propensities.percentile(name, p) for p in PERCENTILES} if size else {}
        return SpreadOut(
            visitors=size,
            above=await propensities.count(name, above),
            percentiles={p: _rounded(level) for p, level in levels.items() if level is not None},
            versions={version: iso_8601(at_ms) for version, at_ms in (await propensities.versions(name)).items()},
        )


def _out(one: Scored) -> dict[str, str | float]:
    return {"visitor_id": one.visitor_id, "propensity": _rounded(one.propensity)}


def _rounded(propensity: float) -> float:
    """Six digits, as scores are given."""
    return float(f"{propensity:.6g}")
