"""Models: which are served, which were refused, and what one reads."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field

from service.api.state import CurrentModels
from service.core.bundle import Bundle
from service.errors import answers

router = APIRouter(prefix="/v1/models", tags=["models"])


class ModelOut(BaseModel):
    """A model that is served."""

    name: str
    version: str
    created_at: str
    features: int = Field(description="How many features it takes.")
    spec_hash: str = Field(description="sha256 of all that decides the value of a feature.")
    segments: dict[str, float] = Field(description="The lowest propensity of each segment but the last.")


class ModelDetails(ModelOut):
    """A model that is served, in full."""

    names: list[str] = Field(description="The features in the order of its columns.")
    spec: dict[str, Any] = Field(description="The feature spec: catalogue, limits, label and features.")
    metrics: dict[str, Any] = Field(description="How it did on the last split of its training data.")
    data: dict[str, Any] = Field(description="What it was trained on.")
    libraries: dict[str, str]


class ModelsOut(BaseModel):
    """The models of this service."""

    models: list[ModelOut]
    refused: dict[str, str] = Field(description="Models that failed a check, with what to do about it.")
    default: str | None = Field(description="The model of requests that name none, where a setting says so.")


@router.get("", summary="The models that are served")
async def models(models: CurrentModels) -> ModelsOut:
    """Every loaded model, and those that were refused with the reason."""
    listed = [ModelOut(**_summary(bundle)) for bundle in models.bundles.values()]
    return ModelsOut(models=listed, refused=dict(models.refused), default=models.default)


@router.get("/{name}", responses=answers(404, 422, 503), summary="One model")
async def model(name: Annotated[str, Path(description="Name of the model.")], models: CurrentModels) -> ModelDetails:
    """What a model reads and how good it is."""
    bundle = models.find(name)
    manifest = bundle.manifest
    return ModelDetails(
        **_summary(bundle),
        names=list(manifest.names),
        spec=manifest.spec,
        metrics=manifest.metrics,
        data=manifest.data,
        libraries=manifest.libraries,
    )


def _summary(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "name": bundle.name,
        "version": bundle.version,
        "created_at": manifest.created_at,
        "features": bundle.plan.width,
        "spec_hash": manifest.spec_hash,
        "segments": manifest.segments,
    }
