"""The other side of the comparison: the scoring service that a team would write first.

FastAPI, pydantic, redis.asyncio and onnxruntime, one of each per request. It is spared the features: a vector of
float32 lies ready under `vector:{visitor_id}`.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnxruntime as ort
import redis.asyncio as redis
import uvicorn
from fastapi import FastAPI, Request
from pydantic import BaseModel


class ScoreRequest(BaseModel):
    """Whom to score."""

    visitor_id: str


class ScoreResponse(BaseModel):
    """The answer."""

    score_id: str
    visitor_id: str
    propensity: float
    scored_at: datetime


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
    """The connection pool and the model."""
    client = redis.from_url(os.environ["REDIS_URL"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(Path(os.environ["MODEL"]).read_bytes(), options)
    yield {"redis": client, "session": session}
    await client.aclose()


app = FastAPI(lifespan=lifespan)


@app.post("/v1/score")
async def score(body: ScoreRequest, request: Request) -> ScoreResponse:
    """Read the vector, ask the model."""
    session: ort.InferenceSession = request.state.session
    blob = await request.state.redis.get(f"vector:{body.visitor_id}")
    width = session.get_inputs()[0].shape[1]
    vector = np.zeros(width, np.float32) if blob is None else np.frombuffer(blob, np.float32)
    [propensity] = session.run(None, {"features": vector.reshape(1, -1)})[0]
    return ScoreResponse(
        score_id=str(uuid.uuid4()),
        visitor_id=body.visitor_id,
        propensity=float(propensity),
        scored_at=datetime.now(UTC),
    )


if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ["PORT"]), log_level="warning", access_log=False)
