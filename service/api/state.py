"""What the lifespan gives to every request, and how routes ask for it."""

from __future__ import annotations

from typing import Annotated, TypedDict, cast

from fastapi import Depends, Request

from service.models import Models
from service.scoring import Scorer
from service.settings import Settings
from service.store import Store


class State(TypedDict):
    """The resources of one process, made at its start and closed at its end."""

    settings: Settings
    models: Models
    store: Store
    scorer: Scorer


def state_of(request: Request) -> State:
    """The state that the lifespan made."""
    return cast(State, request.scope["state"])


# Coroutines, because FastAPI runs plain functions in a thread, which costs more than the whole request.
async def _settings(request: Request) -> Settings:
    return state_of(request)["settings"]


async def _models(request: Request) -> Models:
    return state_of(request)["models"]


async def _store(request: Request) -> Store:
    return state_of(request)["store"]


async def _scorer(request: Request) -> Scorer:
    return state_of(request)["scorer"]


CurrentSettings = Annotated[Settings, Depends(_settings)]
CurrentModels = Annotated[Models, Depends(_models)]
CurrentStore = Annotated[Store, Depends(_store)]
CurrentScorer = Annotated[Scorer, Depends(_scorer)]
