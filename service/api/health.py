"""Health and metrics, none of which asks the feature cache."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from service import metrics
from service.api.state import CurrentLifecycle, CurrentModels, CurrentScorer
from service.errors import answers
from service.workers import telling

router = APIRouter(tags=["health"])


class Live(BaseModel):
    """The process answers."""

    status: str = "live"


class Ready(BaseModel):
    """The process takes requests; also without a model or a feature cache it gives every visitor a segment."""

    status: str = "ready"
    models: int


@router.get("/livez", summary="Is the process alive?")
async def live() -> Live:
    """200 as long as the process answers; restart it when it does not."""
    return Live()


@router.get("/readyz", responses=answers(503), summary="Should it get requests?")
async def ready(models: CurrentModels, lifecycle: CurrentLifecycle) -> Ready:
    """200 once everything is loaded, and 503 from the moment on that the service was told to end."""
    if lifecycle.draining:
        raise HTTPException(503, "draining: the service was told to end; ask another one")
    return Ready(models=len(models.bundles))


@router.get(
    "/metrics",
    response_class=Response,
    responses={200: {"content": {CONTENT_TYPE_LATEST: {"schema": {"type": "string"}}}}},
    summary="Metrics for Prometheus",
)
async def exposition(models: CurrentModels, scorer: CurrentScorer) -> Response:
    """Every metric, in the text format of Prometheus."""
    telling.tell(models, scorer)
    text = await asyncio.to_thread(metrics.exposition)
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})
