"""What the lifespan gives to every request, and how routes ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypedDict, cast

from fastapi import Depends, Request

from service.door import Door
from service.lifecycle import Lifecycle
from service.members import Members
from service.models import Models
from service.propensities import Propensities
from service.score_log import ScoreLog
from service.scorer import Scorer
from service.settings import Settings
from service.store import Store
from service.tracing import Tracing

if TYPE_CHECKING:  # it is made of routes, which ask for the state
    from service.api.express import ExpressLane


class State(TypedDict):
    """The resources of one process, made at its start and closed at its end."""

    settings: Settings
    models: Models
    door: Door
    store: Store
    scorer: Scorer
    score_log: ScoreLog
    propensities: Propensities
    members: Members
    lane: ExpressLane
    tracing: Tracing | None
    lifecycle: Lifecycle


def state_of(request: Request) -> State:
    """The state that the lifespan made."""
    return cast(State, request.scope["state"])


# Coroutines, because FastAPI runs plain functions in a thread, which costs more than the whole request.
async def _settings(request: Request) -> Settings:
    return state_of(request)["settings"]


async def _models(request: Request) -> Models:
    return state_of(request)["models"]


async def _door(request: Request) -> Door:
    return state_of(request)["door"]


async def _store(request: Request) -> Store:
    return state_of(request)["store"]


async def _scorer(request: Request) -> Scorer:
    return state_of(request)["scorer"]


async def _score_log(request: Request) -> ScoreLog:
    return state_of(request)["score_log"]


async def _propensities(request: Request) -> Propensities:
    return state_of(request)["propensities"]


async def _members(request: Request) -> Members:
    return state_of(request)["members"]


async def _lifecycle(request: Request) -> Lifecycle:
    return state_of(request)["lifecycle"]


CurrentSettings = Annotated[Settings, Depends(_settings)]
CurrentModels = Annotated[Models, Depends(_models)]
CurrentDoor = Annotated[Door, Depends(_door)]
CurrentStore = Annotated[Store, Depends(_store)]
CurrentScorer = Annotated[Scorer, Depends(_scorer)]
CurrentScoreLog = Annotated[ScoreLog, Depends(_score_log)]
CurrentPropensities = Annotated[Propensities, Depends(_propensities)]
CurrentMembers = Annotated[Members, Depends(_members)]
CurrentLifecycle = Annotated[Lifecycle, Depends(_lifecycle)]
