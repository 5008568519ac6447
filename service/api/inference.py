"""The Open Inference Protocol v2, for clients that speak it: KServe, Triton, MLServer.

Inputs are `features` FP32 [n, F] with the model's features in order, or, beyond the protocol, `visitor_id` BYTES [n],
whose features are looked up as for `/v1/score`. The output is `propensity` FP32 [n].
"""

from __future__ import annotations

from collections import Counter
from time import perf_counter
from typing import Annotated, Any, Final

import numpy as np
import numpy.typing as npt
from fastapi import APIRouter, Header, Path, Request
from pydantic import BaseModel, Field
from starlette.responses import Response

from service import metrics, tracing
from service.api import body, tensors
from service.api.state import CurrentLifecycle, CurrentModels, CurrentScorer, CurrentSettings
from service.api.tensors import InferIn
from service.core.bundle import Bundle
from service.errors import InvalidInference, ModelNotReady, TooLarge
from service.ingest import LONGEST_ID
from service.models import Models
from service.population import Population, Rows
from service.scorer import Scorer
from service.scoring import Score, ScoreRequest

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

OUTPUT: Final = "propensity"
ModelName = Annotated[str, Path(description="Name of the model.")]
Version = Annotated[str, Path(description="Version of the model.")]
HeaderLength = Annotated[
    str | None, Header(alias=tensors.HEADER, description="Bytes of JSON before binary tensors.", max_length=20)
]


class InferenceError(BaseModel):
    """An error, as this protocol describes it."""

    error: str


def _answers(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": InferenceError} for status in statuses}


class ServerLive(BaseModel):
    """The process answers."""

    live: bool = True


class ServerReady(BaseModel):
    """All models are ready."""

    ready: bool = True


class ModelReady(BaseModel):
    """The model can be asked."""

    name: str
    ready: bool = True


class ServerMetadata(BaseModel):
    """What this server is."""

    name: str = "propensity"
    version: str
    extensions: list[str] = ["binary_tensor_data"]


class TensorMetadata(BaseModel):
    """Name, type and shape of a tensor; -1 stands for any number."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(BaseModel):
    """What a model takes and gives."""

    name: str
    versions: list[str]
    platform: str = "onnxruntime_onnx"
    inputs: list[TensorMetadata] = Field(description="Send `features`; or instead of it a `visitor_id` BYTES [n].")
    outputs: list[TensorMetadata]


@router.get("", summary="What this server is")
async def server(request: Request) -> ServerMetadata:
    """Name, version and extensions."""
    return ServerMetadata(version=request.app.version)


@router.get("/health/live", summary="Is the process alive?")
async def server_live() -> ServerLive:
    """200 as long as the process answers."""
    return ServerLive()


@router.get("/health/ready", responses=_answers(503), summary="Are all models ready?")
async def server_ready(models: CurrentModels, lifecycle: CurrentLifecycle) -> ServerReady:
    """200 if there is a model, none was refused, and the service was not told to end."""
    if lifecycle.draining:
        raise ModelNotReady("draining: the service was told to end; ask another one")
    if models.refused or not models.bundles:
        raise ModelNotReady("; ".join(models.refused.values()) or "no model is loaded")
    return ServerReady()


@router.get("/models/{name}/ready", responses=_answers(404, 422, 503), summary="Is the model ready?")
async def model_ready(name: ModelName, models: CurrentModels) -> ModelReady:
    """200 if the model can be asked."""
    return ModelReady(name=models.find(name).name)


@router.get(
    "/models/{name}/versions/{version}/ready", responses=_answers(404, 422, 503), summary="Is the version ready?"
)
async def version_ready(name: ModelName, version: Version, models: CurrentModels) -> ModelReady:
    """200 if this version of the model can be asked."""
    return ModelReady(name=models.find(name, version).name)


@router.get("/models/{name}", responses=_answers(404, 422, 503), summary="What a model takes and gives")
async def model_metadata(name: ModelName, models: CurrentModels) -> ModelMetadata:
    """Names, types and shapes."""
    return _metadata(models.find(name))


@router.get("/models/{name}/versions/{version}", responses=_answers(404, 422, 503), summary="The same for one version")
async def version_metadata(name: ModelName, version: Version, models: CurrentModels) -> ModelMetadata:
    """Names, types and shapes."""
    return _metadata(models.find(name, version))


_INFER: Final[dict[str, Any]] = {
    "response_class": Response,
    "responses": {
        200: {
            "description": "The propensities.",
            "content": {
                "application/json": {"schema": {"type": "object"}},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        },
        **_answers(400, 404, 413, 422, 503),
    },
    "openapi_extra": {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": {"$ref": "#/components/schemas/InferIn"}},
                "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
            },
        }
    },
}


@router.post("/models/{name}/infer", summary="Ask a model", **_INFER)
async def infer(
    request: Request,
    name: ModelName,
    models: CurrentModels,
    scorer: CurrentScorer,
    settings: CurrentSettings,
    header_length: HeaderLength = None,
) -> Response:
    """Propensities of rows of features, or of visitors."""
    raw = await body.read(request, settings.body_bytes)
    return await _infer(models, models.find(name), scorer, settings.batch_visitors, *tensors.read(raw, header_length))


@router.post("/models/{name}/versions/{version}/infer", summary="Ask one version", **_INFER)
async def infer_version(
    request: Request,
    name: ModelName,
    version: Version,
    models: CurrentModels,
    scorer: CurrentScorer,
    settings: CurrentSettings,
    header_length: HeaderLength = None,
) -> Response:
    """Propensities of rows of features, or of visitors, if this version is the one that is served."""
    raw = await body.read(request, settings.body_bytes)
    return await _infer(
        models, models.find(name, version), scorer, settings.batch_visitors, *tensors.read(raw, header_length)
    )


def _metadata(bundle: Bundle) -> ModelMetadata:
    return ModelMetadata(
        name=bundle.name,
        versions=[bundle.version],
        inputs=[TensorMetadata(name="features", datatype="FP32", shape=[-1, bundle.plan.width])],
        outputs=[TensorMetadata(name=OUTPUT, datatype="FP32", shape=[-1])],
    )


async def _infer(models: Models, bundle: Bundle, scorer: Scorer, most: int, asked: InferIn, binary: bytes) -> Response:
    [tensor] = asked.inputs
    for output in asked.outputs or []:
        if output.name != OUTPUT:
            raise InvalidInference(f"there is no output {output.name!r}; ask for {OUTPUT}")
    if tensor.shape[0] > most:
        raise TooLarge(f"{tensor.shape[0]} rows are more than {most}; send several requests")
    head: dict[str, Any] = {"model_name": bundle.name, "model_version": bundle.version}
    if asked.id is not None:
        head["id"] = asked.id
    if tensor.name == "features":
        values = _ask(bundle, models.populations[bundle.name], tensors.numbers(tensor, binary, bundle.plan.width))
    elif tensor.name == "visitor_id":
        values, degraded = await _look_up(bundle, scorer, tensors.texts(tensor, binary))
        head |= {"parameters": {"degraded": ",".join(degraded)}} if degraded else {}
    else:
        raise InvalidInference(f"there is no input {tensor.name!r}; send features or visitor_id")
    content, headers = tensors.write(head, OUTPUT, values, asked.wants_binary)
    return Response(content, headers=headers)


def _ask(bundle: Bundle, population: Population, matrix: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    began = perf_counter()
    with tracing.stage("model"):
        propensities = bundle.predict(matrix)
    metrics.stage("model").add(perf_counter() - began)
    for segment, times in Counter(map(bundle.segment, propensities.tolist())).items():
        metrics.scores(bundle.name, bundle.version, segment).add(times)
    population.add(Rows(matrix, propensities))
    return propensities


async def _look_up(bundle: Bundle, scorer: Scorer, visitor_ids: list[str]) -> tuple[npt.NDArray[np.float32], list[str]]:
    if not all(1 <= len(visitor_id) <= LONGEST_ID for visitor_id in visitor_ids):
        raise InvalidInference(f"visitor_id: every id must have 1 to {LONGEST_ID} characters")
    results = await scorer.score([ScoreRequest(visitor_id, bundle.name) for visitor_id in visitor_ids])
    scores = [result for result in results if isinstance(result, Score)]
    values = np.array([score.propensity for score in scores], np.float32)
    return values, sorted({reason for score in scores for reason in score.degraded})
